"""Groups of examples that a teacher finds similar, for batches with hard negatives (after B3, arXiv:2505.11293).

Two examples are neighbours where the positive of one is among the teacher's best documents for the query of the
other, below the very best ones, which may be unlabelled positives. Groups grow along neighbours until they are full. A
run puts whole groups into its batches, in another order each epoch (`groups` of a source of `data.train`).
"""

import os
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from inbatch import collectives
from inbatch.data.columns import one_line
from inbatch.data.distinct import Keys
from inbatch.data.files import replacing
from inbatch.data.identity import keys_of
from inbatch.data.lines import Rows
from inbatch.data.plan import Groups
from inbatch.data.readers import Examples
from inbatch.data.records import Example
from inbatch.retrieval.evaluate import RetrieveOptions, embed_both
from inbatch.retrieval.kept import text_digest
from inbatch.retrieval.nearest import nearest

_QUERIES = 4096  # searched at a time
_DIGESTED = 1000  # examples whose digest is kept with their groups


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
    its first positive; examples that share a positive or the query's text are never neighbours.
    Memory: a share of the positives' embeddings a rank, all queries' embeddings, and 4 n (range_max - range_min) bytes.
    """
    options, retrieve = options or GroupOptions(), retrieve or RetrieveOptions()
    texts, positives = _texts(examples, lambda e: e.query), _texts(examples, lambda e: e.positives[0].full_text)
    if options.range_min >= len(examples):
        raise ValueError(f"range_min is {options.range_min}, and there are {len(examples)} examples: lower it")
    similarity, queries, documents = embed_both(model, texts, positives, retrieve, query_model=query_model, group=group)
    depth, count = min(options.range_max, len(examples)), len(examples)
    source = examples.sources[0]
    keys = collectives.together(lambda: keys_of(source.examples, examples.same, source.also, None), group)
    # Examples that share a key: a positive of either query, or a query with the same text.
    number_of_key, example_of_key = np.unique(keys.keys, return_inverse=True)[1], keys.of(np.arange(count))[1]
    numbers = Keys(keys.offsets, number_of_key)
    holders = Keys(
        np.append(0, np.cumsum(np.bincount(number_of_key))), example_of_key[np.argsort(number_of_key, kind="stable")]
    )
    near = np.empty((count, max(0, depth - options.range_min)), np.int32)
    for start in range(0, count, _QUERIES):
        stop = min(count, start + _QUERIES)
        shared, places = numbers.of(np.arange(start, stop))
        rows, of_key = holders.of(shared)
        known = torch.from_numpy(np.stack([places[of_key], rows], axis=1))
        _, best = nearest(queries[start:stop], documents, depth, similarity=similarity, exclude=known, group=group)
        near[start:stop] = best[:, options.range_min :].cpu().numpy()
    return Groups(_grown(near, options.size))


def _texts(examples: Examples, text: Callable[[Example], str]) -> Rows[str]:
    return Rows(len(examples), lambda index: text(examples[index]), examples.where)


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
    except Exception as error:  # of any class, from a file that was cut or is none of ours
        raise ValueError(f"groups {path} cannot be read ({one_line(error)}): make them by `inbatch group`") from None
    if len(of) != len(examples) or digest != _digest(examples):
        raise ValueError(
            f"groups {path} are of other examples than these {len(examples)}: make them anew, of the whole source"
        )
    return Groups(of)


def _digest(examples: Rows[Example]) -> str:
    some: Iterable[Example] = examples[:: max(1, len(examples) // _DIGESTED)]
    return text_digest(f"{example.query}\n{example.positives[0].full_text}" for example in some)
