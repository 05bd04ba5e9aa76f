"""Sequences of examples that are parsed on access."""

from collections.abc import Sequence

import numpy as np

from inbatch.data.columns import Columns, example_from
from inbatch.data.lines import Lines, Rows
from inbatch.data.records import Example


class Examples(Rows[Example]):
    """A source's examples. ``left_out`` counts those of which a negative that equals a positive was left out."""

    left_out: int = 0


class ParsedExamples(Examples):
    """Examples of one record each, all read once when opened: a broken one must not wait for its step of a run."""

    def __init__(self, lines: Lines):
        self._lines = lines
        self.left_out = sum(self.parse(index)[1] for index in range(len(self)))

    def __len__(self) -> int:
        return len(self._lines)

    def _read(self, index: int) -> Example:
        return self.parse(index)[0]

    def parse(self, index: int) -> tuple[Example, bool]:
        """Example ``index``, and whether a negative that equals a positive was left out of it."""
        raise NotImplementedError


class InlineExamples(ParsedExamples):
    """Examples whose records hold their texts."""

    def __init__(self, lines: Lines, columns: Columns, corpus: str):
        self._columns, self._corpus = columns, corpus
        super().__init__(lines)

    def parse(self, index: int) -> tuple[Example, bool]:
        return example_from(self._lines[index], self._columns, self._corpus, lambda: self._lines.where(index))


class Concatenated(Rows[Example]):
    """Several sequences of examples, one after the other."""

    def __init__(self, parts: Sequence[Sequence[Example]]):
        self._parts = parts
        self._starts = np.cumsum([0] + [len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _read(self, index: int) -> Example:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._parts[part][index - int(self._starts[part])]
