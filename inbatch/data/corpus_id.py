"""NeMo AutoModel's corpus-id JSON: records that name documents by id, the documents in a corpus folder.

    train.json      {"corpus": [{"path": "wiki"}], "data": [{question_id, question, corpus_id, pos_doc, neg_doc}]}
    wiki/           merlin_metadata.json {"class": "TextQADataset", "corpus_id": "wiki"} and Parquet or JSONL files of
                    documents {id, text, title?}

Paths are relative to the JSON file; ``pos_doc`` and ``neg_doc`` hold ids or objects {id}.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from inbatch.data.columns import id_text, query_text, without_positives
from inbatch.data.corpus import Documents
from inbatch.data.examples import ParsedExamples
from inbatch.data.lines import Lines, Rows, Where, joined, spooled
from inbatch.data.parquet import ParquetRows
from inbatch.data.records import ID_NAMES, Example, Passage

METADATA = "merlin_metadata.json"
SHAPE = "{corpus: [{path}], data: [{question_id, question, corpus_id, pos_doc: [{id}], neg_doc: [{id}]}]}"

# corpus_id -> (folder, documents): files that share a corpus share its index.
Corpora = dict[str, tuple[Path, Documents]]


class CorpusIdExamples(ParsedExamples):
    """The examples of one corpus-id JSON file. The file is parsed whole, once, and its records kept on disk."""

    def __init__(self, path: Path, content: Mapping, corpora: Corpora):
        places, data = content["corpus"], content["data"]
        places = [places] if isinstance(places, Mapping) else places
        ok = isinstance(places, list) and all(isinstance(p, Mapping) and isinstance(p.get("path"), str) for p in places)
        if not ok or not isinstance(data, list):
            raise ValueError(f"{path}: expected {SHAPE}, found another `corpus` or `data`")
        names = [_open_corpus(path.parent / place["path"], corpora) for place in places]
        self._corpora = {name: corpora[name][1] for name in names}
        if not data:
            raise ValueError(f"{path} is empty: `data` holds no record")
        files = [file for documents in self._corpora.values() for file in documents.files]
        super().__init__(spooled(path, data, unit="record"), None, also=files)

    def parse(self, record: object, where: Where) -> tuple[Example, bool]:
        if not isinstance(record, Mapping):
            raise ValueError(f"{where()}: expected an object, found {type(record).__name__}")
        corpus = id_text(record.get("corpus_id"), "corpus_id", where)
        if corpus is None and len(self._corpora) == 1:
            corpus = next(iter(self._corpora))
        if corpus is None or corpus not in self._corpora:
            raise ValueError(f"{where()}: corpus_id is {corpus!r}, but the file's corpora are {list(self._corpora)}")
        positives, negatives = (
            self._documents(record.get(name), name, corpus, where) for name in ("pos_doc", "neg_doc")
        )
        if not positives:
            raise ValueError(
                f"{where()}: the record has no positive: pos_doc is missing or empty. Complete or delete it."
            )
        kept = without_positives(positives, negatives)
        name = "question" if "question" in record else "query"
        example = Example(
            query=query_text(record.get(name), name, where),
            query_id=id_text(record.get("question_id"), "question_id", where),
            positives=tuple(positives),
            negatives=tuple(kept),
            corpus=corpus,
        )
        return example, len(kept) < len(negatives)

    def _documents(self, value: object, name: str, corpus: str, where: Where) -> list[Passage]:
        documents = self._corpora[corpus]
        passages = []
        for item in value if isinstance(value, list) else [] if value is None else [value]:
            given = item.get("id") if isinstance(item, Mapping) else item
            doc_id = id_text(given, name, where)
            row = None if doc_id is None else documents.row(doc_id)
            if row is None:
                raise ValueError(
                    f"{where()}: {name} names the document {given!r}, which is not in corpus {corpus!r}. Expected ids "
                    "of that corpus: add the document or delete the reference."
                )
            passages.append(documents[row])
        return passages


def _open_corpus(folder: Path, corpora: Corpora) -> str:
    """Opens a corpus folder (once) and returns its corpus_id."""
    path = folder / METADATA
    if not path.is_file():
        raise ValueError(f"{path} does not exist: expected it in a corpus folder, holding {{class, corpus_id}}")
    try:
        metadata = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    name = metadata.get("corpus_id") if isinstance(metadata, dict) else None
    if not isinstance(name, str) or metadata.get("class") != "TextQADataset":
        raise ValueError(f"{path}: expected {{class: TextQADataset, corpus_id: <name>}}, found {metadata}")
    folder = folder.resolve()
    known, _ = corpora.get(name, (folder, None))
    if known != folder:
        raise ValueError(f"corpus_id {name!r} names two folders, {known} and {folder}: rename one in its {METADATA}")
    if name not in corpora:
        files = sorted(file for file in folder.rglob("*") if file.name.endswith((".parquet", ".jsonl", ".jsonl.gz")))
        if not files:
            raise ValueError(f"{folder} holds no documents: expected *.parquet or *.jsonl files of {{id, text, title}}")
        corpora[name] = folder, Documents(joined([_document_rows(file) for file in files]))
    return name


def _document_rows(path: Path) -> Rows:
    if path.suffix != ".parquet":
        return Lines(path)
    return ParquetRows(path, lambda names: [name for name in names if name in (*ID_NAMES, "title", "text")])
