"""Small data files of each format, and a tokenizer of characters, for tests."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch


def write_jsonl(path: Path, records) -> Path:
    text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def write_beir(folder: Path, *, gz: str = "", qrels=None, header: bool = True, corpus=None) -> Path:
    documents = corpus or [{"_id": f"d{i}", "title": f"T{i}" if i % 2 else "", "text": f"text {i}"} for i in range(6)]
    write_jsonl(folder / f"corpus.jsonl{gz}", documents)
    write_jsonl(folder / f"queries.jsonl{gz}", [{"_id": f"q{i}", "text": f"query {i}"} for i in range(4)])
    (folder / "qrels").mkdir()
    for split, rows in (
        qrels or {"train": [("q0", "d0", 1), ("q1", "d1", 1), ("q1", "d2", 0), ("q1", "d3", 2)]}
    ).items():
        lines = ["query-id\tcorpus-id\tscore"] * header + ["\t".join(map(str, row)) for row in rows]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def write_corpus_id(folder: Path, *, documents=None, data=None, kind: str = "parquet", corpus_id: str = "wiki") -> Path:
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    metadata = {"class": "TextQADataset", "corpus_id": corpus_id}
    (corpus / "merlin_metadata.json").write_text(json.dumps(metadata))
    documents = documents or [{"id": i, "text": f"doc {i}"} for i in range(5)]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(documents), corpus / "train.parquet")
    else:
        write_jsonl(corpus / "docs.jsonl", documents)
    record = {"question_id": 7, "question": "why?", "corpus_id": corpus_id}
    record |= {"pos_doc": [{"id": 1}, {"id": "2"}], "neg_doc": [{"id": 3}, 4]}
    place = {"path": "corpus"}  # either alone or in a list
    content = {"corpus": [place] if kind == "parquet" else place, "data": [record] if data is None else data}
    path = folder / "train.json"
    path.write_text(json.dumps(content, indent=2))
    return path


def texts(passages) -> list[str]:
    return [passage.full_text for passage in passages]


def one_line(error) -> str:
    """The message, which must be one line: it ends up in a terminal beside those of other ranks."""
    message = str(error.value)
    assert "\n" not in message
    return message


def tokenize(texts_: list[str], max_length: int) -> dict[str, torch.Tensor]:
    """One token a character; refuses an empty list, as tokenizers do."""
    rows = [[ord(c) for c in text[:max_length]] for text in texts_]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}
