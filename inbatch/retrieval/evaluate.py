"""Retrieval evaluation: embed queries and corpus, search exactly, measure. The same figures for any number of ranks."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from inbatch import collectives
from inbatch.data.records import RetrievalData
from inbatch.retrieval import search
from inbatch.retrieval.embed import embed, share, unwrap
from inbatch.retrieval.metrics import (
    DEFAULT_MEASURES,
    TOP_K,
    Run,
    check_evaluation,
    retrieval_metrics,
    write_trec_run,
)

__all__ = ["embed", "evaluate", "retrieve"]


def evaluate(
    model: nn.Module,
    data: RetrievalData,
    *,
    measures: Sequence[str] = DEFAULT_MEASURES,
    top_k: int = TOP_K,
    run_file: str | os.PathLike | None = None,
    report: Callable[[dict[str, float]], object] | None = None,
    group=None,
    **options,
) -> dict[str, float]:
    """The measures of an exact search over the whole corpus, averaged over the judged queries.

    model, options: as `retrieve`. measures: names as ir-measures or other tools write them, such as "nDCG@10",
    "recall@100", "MRR@10"; they are the keys of the result. top_k: how many documents are retrieved for a query, at
    least the largest cut-off. run_file: where rank 0 writes a TREC run. report: called on rank 0 with the figures,
    before the run is written: they are known even where that fails.

    Every rank returns the same numbers. They do not depend on the number of ranks, but for rounding in the encoder.
    Raises ValueError, on every rank and before anything is embedded, for an unknown measure, an empty corpus, qrels
    that share no id with the data or call nothing relevant, a run file that cannot be written.
    """

    def check() -> None:
        check_evaluation(data, measures, top_k, run_file is not None)
        if run_file is not None and collectives.rank(group) == 0:
            _check_writable(Path(run_file))

    collectives.together(check, group)
    run = retrieve(model, data, top_k=top_k, group=group, **options)

    def measure() -> dict[str, float] | None:
        if collectives.rank(group) != 0:
            return None
        figures = retrieval_metrics(run, data.qrels, measures)
        if report is not None:
            report(figures)
        if run_file is not None:
            _write_run(Path(run_file), run)
        return figures

    figures = collectives.broadcast_object(collectives.together(measure, group), group=group)
    assert figures is not None
    return figures


def _check_writable(path: Path) -> None:
    """ValueError where no file of this name can be written; makes the folder it goes into."""
    if path.exists() and not path.is_file():
        raise ValueError(f"the run cannot be written to {path}, which is no file: name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _unfinished(path).touch()
        _unfinished(path).unlink()
    except OSError as error:
        raise ValueError(f"the run cannot be written to {path}: {error}; name a file in another folder") from None


def _write_run(path: Path, run: Run) -> None:
    try:
        write_trec_run(path, run)
    except BaseException:
        _unfinished(path).unlink(missing_ok=True)
        raise


def _unfinished(path: Path) -> Path:
    """The name under which `write_trec_run` writes before it renames."""
    return path.with_name(f"{path.name}.tmp")


def retrieve(
    model: nn.Module,
    data: RetrievalData,
    *,
    query_model: nn.Module | None = None,
    top_k: int = TOP_K,
    query_prefix: str | None = None,
    passage_prefix: str | None = None,
    query_max_len: int | None = None,
    passage_max_len: int | None = None,
    similarity: str = "cosine",
    batch_tokens: int = 16384,
    precision: str = "fp32",
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
    group=None,
) -> Run:
    """{query id: {document id: score}}, best first: the top_k documents of every query, on every rank.

    Each rank embeds and holds (in host memory, as `dtype`) a share of the corpus, reading its texts as it goes. prefix:
    None is the model's own prompt ("query", "document"), if it has one. max_len: tokens a text is cut to; None is the
    model's limit. similarity: "cosine" or "dot". batch_tokens, precision: see `embed`. progress: bars on rank 0.

    model: a BiEncoderModel or DDP around one, the same weights on every rank. Its training mode is left as it was.
    query_model: the encoder of the queries, where it is another one than the documents'.
    Raises ValueError on every rank if one fails, or if embeddings differ in size between ranks.
    """
    module = unwrap(model)
    query_module = module if query_model is None else unwrap(query_model)
    bars = progress and collectives.rank(group) == 0

    def embed_share(what: str, texts: Sequence[str], prefix: str | None, max_length: int | None, kept: torch.dtype):
        encoder = query_module if what == "query" else module
        return embed(
            encoder,
            texts,
            rows=share(len(texts), group),
            prefix=encoder.prompts.get(what, "") if prefix is None else prefix,
            max_length=max_length,
            batch_tokens=batch_tokens,
            precision=precision,
            dtype=kept,
            progress=what if bars else None,
        )

    def both():
        if similarity not in search.SIMILARITIES:
            raise ValueError(f"similarity is {similarity!r}; expected one of {', '.join(search.SIMILARITIES)}")
        queries = embed_share("query", data.queries, query_prefix, query_max_len, torch.float32)
        documents = embed_share("document", data.documents, passage_prefix, passage_max_len, dtype)
        return queries.to(next(module.parameters()).device), documents

    queries, documents = collectives.together(both, group)
    agreed = collectives.agree("the embeddings of the queries", {"queries": queries}, group=group)
    queries = collectives.all_gather(queries, group, rows=agreed["queries"])
    scores, indices = search.top_k(queries, documents, top_k, similarity=similarity, group=group)
    return {
        query: {data.doc_ids[i]: score for i, score in zip(row, row_scores, strict=True)}
        for query, row, row_scores in zip(data.query_ids, indices.tolist(), scores.tolist(), strict=True)
    }
