"""Identity of passages and queries: equal texts are one document or query, and so are texts of one id in a corpus.

The key is a hash of the text, so copies are known whatever their source. An id matters only if it comes with several
texts: `merged` finds those, and gives all of them one key.
"""

import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from inbatch.data.distinct import Keys
from inbatch.data.index import Arrays
from inbatch.data.lines import Rows, Where, scanned
from inbatch.data.records import Example, Passage
from inbatch.ids import stable_id


def normalised(text: str) -> str:
    """Return the form in which texts are compared: Unicode NFC, white space as one space, case kept."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def passage_key(passage: Passage) -> int:
    """Return the int64 key of a passage's text, its title included."""
    return stable_id("text of a passage", normalised(passage.full_text))


def query_key(example: Example) -> int:
    """Return the int64 key of a query's text."""
    return stable_id("text of a query", normalised(example.query))


def without_positives(positives: Sequence[Passage], negatives: Sequence[Passage]) -> list[Passage]:
    """Return the negatives that equal no positive, neither in text nor in id."""
    if not negatives:
        return []
    texts = {normalised(passage.full_text) for passage in positives}
    ids = {passage.doc_id for passage in positives} - {None}
    return [p for p in negatives if p.doc_id not in ids and normalised(p.full_text) not in texts]


def apart(positives: Iterable[str], negatives: Iterable[str]) -> bool:
    """Return True if no text is in both, as `without_positives` compares them."""
    if {_first_word(text) for text in positives}.isdisjoint(map(_first_word, negatives)):  # enough for most
        return True
    return {normalised(text) for text in positives}.isdisjoint(map(normalised, negatives))


def _first_word(text: str) -> str:
    word = text.split(None, 1)[0]
    return word if word.isascii() else unicodedata.normalize("NFC", word)


def keys_of(rows: Rows[Example], same: Mapping[int, int], also: Sequence[Path] | None, settings: object) -> Keys:
    """Return the keys of each example's query and positives. Two examples of a batch shall share none.

    same: {key: the key that stands for it}, from `merged`. The keys are kept beside the data (see `inbatch.data.index`)
    while the files of the rows, those `also` read (None: not all are files) and the settings stay the same.
    """

    def visit(some: Iterator[tuple[Example, Where]]) -> Arrays:
        keys = [{query_key(example), *map(passage_key, example.positives)} for example, _ in some]
        return {
            "counts": np.array([len(of_row) for of_row in keys], np.int64),
            "keys": np.array([key for of_row in keys for key in sorted(of_row)], np.int64),
        }

    about = settings, len(rows), repr((rows[0], rows[-1]))
    found = scanned(rows, "keys", about, visit, also=also)
    keys = np.array(found["keys"])
    if same:
        given = np.array(sorted(same), np.int64)
        places = np.searchsorted(given, keys).clip(max=len(given) - 1)
        keys = np.where(given[places] == keys, np.array([same[key] for key in given.tolist()], np.int64)[places], keys)
    return Keys(np.concatenate([[0], np.cumsum(found["counts"])]), keys)


def id_texts(examples: Iterable[Example]) -> np.ndarray:
    """Return the different (key of an id within its corpus, key of a text that it comes with): int64 [n, 2]."""
    return distinct(array("q", chain.from_iterable(map(id_pairs, examples))))


def id_pairs(example: Example) -> Iterator[int]:
    """Yield the key of an id within its corpus, the key of the text that it comes with, and so on."""
    if example.query_id is not None:
        yield stable_id(f"queries of {example.corpus}", example.query_id)
        yield query_key(example)
    for passage in (*example.positives, *example.negatives):
        if passage.doc_id is not None:
            yield stable_id(f"documents of {example.corpus}", passage.doc_id)
            yield passage_key(passage)


def distinct(pairs: np.ndarray | array) -> np.ndarray:
    """Return the different rows of what is int64 [n, 2], or the same in one row, sorted."""
    pairs = np.asarray(pairs, np.int64).reshape(-1, 2)
    pairs = pairs[np.lexsort(pairs.T[::-1])]
    return pairs[np.append(True, (pairs[1:] != pairs[:-1]).any(1))[: len(pairs)]]


def merged(pairs: np.ndarray) -> dict[int, int]:
    """Return {text key: the text key that stands for it} for the texts that share an id, from what `id_texts` returns.

    Sharing is transitive: a text under two ids joins the texts of both.
    """
    ids, texts = distinct(pairs).T
    several = np.flatnonzero(ids[1:] == ids[:-1])
    parent: dict[int, int] = {}

    def root(key: int) -> int:
        while (above := parent.get(key, key)) != key:
            parent[key] = key = parent.get(above, above)  # halves the path for the next that takes it
        return key

    for first, second in zip(texts[several].tolist(), texts[several + 1].tolist(), strict=True):
        one, other = root(first), root(second)
        parent[max(one, other)] = min(one, other)
    return {key: root(key) for key in list(parent) if root(key) != key}
