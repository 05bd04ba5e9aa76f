"""Groups of examples that are alike by a teacher, for batches whose negatives are hard (after B3, arXiv:2505.11293).

Two examples are neighbours where the positive of one is among the teacher's best documents for the query of the
other, below the very best ones, which may be unlabelled positives. Groups grow along neighbours until they are full. A
run puts whole groups into its batches, in another order each epoch (`groups` of a source of `data.train`).

Shapes: n examples, Q queries searched at a time, k ranks that are looked at.
"""

import os
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from inbatch import collectives
from inbatch.data.files import replacing
from inbatch.data.identity import keys_of, passage_key
from inbatch.data.lines import Rows
from inbatch.data.plan import Groups
from inbatch.data.readers import Examples
from inbatch.data.records import Example
from inbatch.retrieval.evaluate import RetrieveOptions, embed_documents, embed_queries, similarity_of
from inbatch.retrieval.kept import text_digest
from inbatch.retrieval.nearest import nearest

_QUERIES = 4096  # searched at a time
_LOOKED_AT = 1000  # examples that tell whether groups are of this data


@dataclass(frozen=True, kw_only=True)
class GroupOptions:
    """Hold the size of groups and the ranks that make neighbours."""

    size: int = 32
    """examples of a group, at most"""
    range_min: int = 5
    """skip this many of the best documents, which may be relevant"""
    range_max: int = 50
    """look at this many of the best documents"""

    def __post_init__(self):
        if self.size < 2 or not 0 <= self.range_min < self.range_max:
            raise ValueError(
                f"size is {self.size}, range_min {self.range_min} and range_max {self.range_max}; expected at least 2, "
                "and 0 <= range_min < range_max"
            )


def group_examples(
    model: nn.Module,
    examples: Examples,
    options: GroupOptions | None = None,
    retrieve: RetrieveOptions | None = None,
    *,
    query_model: nn.Module | None = None,
    group=None,
) -> Groups:
    """Return the groups of the examples of one source, the same on every rank and for any number of them.

    model, query_model, retrieve: the teacher, as `evaluate.retrieve` takes them. Each example stands for its query and
    its first positive; documents that are a positive of a query, or of one with the same text, make no neighbours.
    Memory: a share of the positives' embeddings a rank, all queries' embeddings, and 4 n (range_max - range_min) bytes.
    """
    options, retrieve = options or GroupOptions(), retrieve or RetrieveOptions()
    similarity = collectives.together(lambda: similarity_of(model, retrieve), group)
    queries = embed_queries(query_model or model, _texts(examples, lambda e: e.query), retrieve, group=group)
    documents = embed_documents(model, _texts(examples, lambda e: e.positives[0].full_text), retrieve, group=group)
    depth = min(options.range_max, len(examples))
    known = collectives.together(lambda: _Known(examples), group)
    near = np.full((len(examples), max(1, depth - options.range_min)), -1, np.int32)
    for start in range(0, len(examples), _QUERIES):
        some = range(start, min(len(examples), start + _QUERIES))
        exclude = known.pairs(some)
        found = nearest(
            queries[start : some.stop], documents, depth, similarity=similarity, exclude=exclude, group=group
        )
        near[start : some.stop, : max(0, depth - options.range_min)] = found[1][:, options.range_min :].cpu().numpy()
    return Groups(_grown(near, options.size))


def _texts(examples: Examples, text) -> Rows[str]:
    return Rows(len(examples), lambda index: text(examples[index]), examples.where)


class _Known:
    """Find the examples whose document is known to a query: a positive of it, or of a query with the same text."""

    def __init__(self, examples: Examples):
        source = examples.sources[0]
        self._keys = keys_of(source.examples, examples.same, source.also, None)
        first = [passage_key(example.positives[0]) for example in examples.through(range(len(examples)))]
        documents = np.array([examples.same.get(key, key) for key in first], np.int64)
        everything, rows = self._keys.of(np.arange(len(examples)))
        # Rows whose document has a key, and rows whose query has it: texts of both kinds never share a key.
        self._by_key = _rows_by(
            np.concatenate([documents, everything]), np.concatenate([np.arange(len(examples)), rows])
        )

    def pairs(self, queries: range) -> torch.Tensor:
        """Return pairs [E, 2] of a place among the queries and a row that cannot be its neighbour."""
        keys, places = self._keys.of(np.arange(queries.start, queries.stop))
        pairs = {(int(place), row) for key, place in zip(keys, places, strict=True) for row in self._by_key(int(key))}
        return torch.tensor(sorted(pairs), dtype=torch.int64).reshape(-1, 2)


def _rows_by(keys: np.ndarray, rows: np.ndarray):
    order = np.argsort(keys, kind="stable")
    keys, rows = keys[order], rows[order]

    def of(key: int) -> list[int]:
        return rows[np.searchsorted(keys, key) : np.searchsorted(keys, key, side="right")].tolist()

    return of


def _grown(near: np.ndarray, size: int) -> np.ndarray:
    """Return the number of each example's group, int32 [n]: from the first free example along free neighbours."""
    of, group = np.full(len(near), -1, np.int32), -1
    for seed in range(len(near)):
        if of[seed] >= 0:
            continue
        group, members, waiting = group + 1, 1, deque([seed])
        of[seed] = group
        while waiting and members < size:
            for neighbour in near[waiting.popleft()].tolist():
                if neighbour >= 0 and of[neighbour] < 0 and members < size:
                    of[neighbour], members = group, members + 1
                    waiting.append(neighbour)
    return of


def save_groups(path: str | os.PathLike, groups: Groups, examples: Rows[Example]) -> None:
    """Write groups and a digest of their examples; `groups` of a source of `data.train` names the file."""
    with replacing(path) as filled, filled.open("wb") as file:
        np.savez_compressed(file, groups=groups.of, digest=_digest(examples))


def load_groups(path: str | os.PathLike, examples: Rows[Example]) -> Groups:
    """Return the groups in a file; ValueError if it is missing or of other examples."""
    try:
        with np.load(path) as kept:
            of, digest = kept["groups"], str(kept["digest"])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"groups {path} cannot be read ({error}): make them by `inbatch group`") from None
    if len(of) != len(examples) or digest != _digest(examples):
        raise ValueError(f"groups {path} are of other examples than these {len(examples)}: make them anew")
    return Groups(of)


def _digest(examples: Rows[Example]) -> str:
    some: Iterable[Example] = examples[:: max(1, len(examples) // _LOOKED_AT)]
    return text_digest(f"{example.query}\n{example.positives[0].full_text}" for example in some)
