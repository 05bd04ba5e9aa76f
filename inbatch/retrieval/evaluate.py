"""Retrieval evaluation: embed queries and corpus, search exactly, measure. The same figures for any number of ranks."""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from inbatch import collectives
from inbatch.data.files import check_output
from inbatch.data.records import RetrievalData
from inbatch.retrieval.embed import EmbedOptions, embed, is_multi_vector, share, unwrap
from inbatch.retrieval.kept import embed_kept
from inbatch.retrieval.metrics import (
    DEFAULT_MEASURES,
    TOP_K,
    Run,
    check_evaluation,
    retrieval_metrics,
    write_trec_run,
)
from inbatch.retrieval.nearest import MAX_SIM, Embeddings, from_all_ranks, nearest
from inbatch.retrieval.search import SIMILARITIES


@dataclass(frozen=True, kw_only=True)
class RetrieveOptions:
    """Hold how queries and documents are embedded and compared."""

    top_k: int = TOP_K
    """documents per query"""
    similarity: str | None = None
    """"cosine" or "dot"; None is what the model was saved with"""
    query_prefix: str | None = None
    """before each query; None is the model's prompt "query", if it has one"""
    passage_prefix: str | None = None
    """before each document; None is the model's prompt "document", if it has one"""
    query_max_len: int | None = None
    """tokens a query is cut to; None is the model's limit"""
    passage_max_len: int | None = None
    """tokens a document is cut to; None is the model's limit"""
    keep_identical_ids: bool = False
    """let a query find the document that has the query's id"""
    embedding: EmbedOptions = field(default_factory=EmbedOptions)
    """batches, precision and the like, for queries and documents; dtype is that of the documents"""

    def __post_init__(self):
        if self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; expected at least 1 document a query")
        if self.similarity not in (None, *SIMILARITIES):
            raise ValueError(f"similarity is {self.similarity!r}; expected one of {', '.join(SIMILARITIES)}")
        for name in ("prefix", "task", "max_length"):
            if (given := getattr(self.embedding, name)) != getattr(EmbedOptions, name):
                raise ValueError(
                    f"embedding has the {name} {given!r}, which queries and documents have apart: leave it out, and "
                    "give query_prefix, query_max_len and the like"
                )


def evaluate(
    model: nn.Module,
    data: RetrievalData,
    options: RetrieveOptions | None = None,
    *,
    query_model: nn.Module | None = None,
    measures: Sequence[str] = DEFAULT_MEASURES,
    run_file: str | os.PathLike | None = None,
    report: Callable[[dict[str, float]], object] | None = None,
    group=None,
) -> dict[str, float]:
    """Return the measures of an exact search over the whole corpus, averaged over the judged queries.

    model, options, query_model: as `retrieve`. measures: names as ir-measures or other tools write them, such as
    "nDCG@10", "recall@100", "MRR@10", with cut-offs up to options.top_k; they are the keys of the result. run_file:
    where rank 0 writes a TREC run. report: called on rank 0 with the figures, before the run is written.

    Every rank returns the same numbers. They do not depend on the number of ranks, but for rounding in the encoder.
    A measure that turns out impossible for this run is left out with a warning. Raises ValueError, on every rank and
    before anything is embedded, for a measure that is unknown or impossible for such data, an empty corpus, qrels that
    share no id with the data or call nothing relevant, a run file that cannot be written.
    """
    options = options or RetrieveOptions()

    def check() -> None:
        check_evaluation(data, measures, options.top_k, run_file is not None)
        if run_file is not None and collectives.rank(group) == 0:
            check_output(run_file)

    collectives.together(check, group)
    run = retrieve(model, data, options, query_model=query_model, group=group)

    def measure() -> dict[str, float]:
        figures = retrieval_metrics(run, data.qrels, measures)
        if report is not None:
            report(figures)
        if run_file is not None:
            write_trec_run(run_file, run)
        return figures

    return collectives.on_rank_0(measure, group)


def retrieve(
    model: nn.Module,
    data: RetrievalData,
    options: RetrieveOptions | None = None,
    *,
    query_model: nn.Module | None = None,
    group=None,
) -> Run:
    """Return {query id: {document id: score}}, best first: the best documents of every query, on every rank.

    Each rank embeds and holds a share of the corpus, reading texts as it goes. A query does not find the document
    with its id, as in BEIR and MTEB, unless options.keep_identical_ids; a warning counts such queries.

    model: a BiEncoderModel or DDP around one, the same weights on every rank. Its training mode is kept.
    query_model: the encoder of the queries, if it is not that of the documents.
    Raises ValueError on every rank if one fails, or if embeddings differ in size between ranks.
    """
    options = options or RetrieveOptions()
    similarity, queries, documents = embed_both(
        model, data.queries, data.documents, options, query_model=query_model, group=group
    )
    exclude = None if options.keep_identical_ids else _own_documents(data, first=collectives.rank(group) == 0)
    scores, indices = nearest(queries, documents, options.top_k, similarity=similarity, exclude=exclude, group=group)
    return {
        query: {data.doc_ids[i]: score for i, score in zip(row, row_scores, strict=True) if i >= 0}
        for query, row, row_scores in zip(data.query_ids, indices.tolist(), scores.tolist(), strict=True)
    }


def embed_both(
    model: nn.Module,
    queries: Sequence[str],
    documents: Sequence[str],
    options: RetrieveOptions,
    *,
    query_model: nn.Module | None = None,
    group=None,
) -> tuple[str, Embeddings, Embeddings]:
    """Return the similarity to search by, all queries [Q, D] on the device, and this rank's share of the documents."""
    query_model = model if query_model is None else query_model
    similarity = collectives.together(lambda: similarity_of(model, options), group)
    every_query = embed_queries(query_model, queries, options, group=group)
    return similarity, every_query, embed_documents(model, documents, options, group=group)


def similarity_of(model: nn.Module, options: RetrieveOptions) -> str:
    """Return the similarity to search by; ValueError for a model saved with one that search does not have."""
    if is_multi_vector(model):
        if options.similarity is not None:
            raise ValueError(f"similarity is {options.similarity!r}, but a multi-vector model has MaxSim: leave it out")
        return MAX_SIM
    similarity = unwrap(model).similarity if options.similarity is None else options.similarity
    if similarity not in SIMILARITIES:
        raise ValueError(
            f"the model was saved with similarity {similarity!r}; expected one of {', '.join(SIMILARITIES)}: say "
            "which to search by"
        )
    return similarity


def embed_queries(model: nn.Module, queries: Sequence[str], options: RetrieveOptions, *, group=None) -> Embeddings:
    """Return the embeddings [Q, D] of all queries, which the ranks share out, on the model's device."""
    how = replace(embedding_options(model, "query", options, group), dtype=torch.float32)
    rows = collectives.together(lambda: embed(model, queries, how, rows=share(len(queries), group)), group)
    return from_all_ranks("the embeddings of the queries", rows, next(model.parameters()).device, group)


def embed_documents(
    model: nn.Module, documents: Sequence[str], options: RetrieveOptions, *, kept: Path | None = None, group=None
) -> Embeddings:
    """Return the embeddings of this rank's share of the documents, in host memory; kept: a folder where they stay."""
    how, rows = embedding_options(model, "document", options, group), share(len(documents), group)
    if kept is not None:
        return embed_kept(model, documents, how, kept, rows=rows, group=group)
    return collectives.together(lambda: embed(model, documents, how, rows=rows), group)


def embedding_options(model: nn.Module, what: str, options: RetrieveOptions, group=None) -> EmbedOptions:
    """Return the options to embed queries ("query") or documents ("document"): those given, else the model's."""
    module, of_query = unwrap(model), what == "query"
    prefix = options.query_prefix if of_query else options.passage_prefix
    shown = options.embedding.progress is not None and collectives.rank(group) == 0
    return replace(
        options.embedding,
        task=what,
        prefix=module.prompts.get(what, "") if prefix is None else prefix,
        max_length=options.query_max_len if of_query else options.passage_max_len,
        progress=what if shown else None,
    )


def _own_documents(data: RetrievalData, *, first: bool) -> Tensor:
    """Return the pairs [E, 2] of a query's row and the row of the document with its id; warn of them on one rank."""
    rows = {query: row for row, query in enumerate(data.query_ids)}
    pairs = [(rows[document], column) for column, document in enumerate(data.doc_ids) if document in rows]
    if pairs and first:
        judged = sum(data.qrels.get(query, {}).get(query, 0) > 0 for query in data.query_ids)
        warnings.warn(
            f"{len(pairs)} of {len(rows)} queries have the id of a document, which is left out of their results, as in "
            f"BEIR and MTEB{f' (though {judged} call it relevant)' if judged else ''}; keep_identical_ids keeps it",
            stacklevel=3,
        )
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
