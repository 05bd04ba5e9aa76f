"""Sequences of examples that are parsed on access."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from inbatch.data.columns import Columns, example_from
from inbatch.data.index import Arrays
from inbatch.data.lines import Rows, Where, scanned
from inbatch.data.records import Example


class Examples(Rows[Example]):
    """A source's examples. ``left_out`` counts those of which a negative that equals a positive was left out."""

    left_out: int = 0


class ParsedExamples(Examples):
    """Examples of one record each, all parsed once (see ``scanned``): a broken one must not wait for its step of a run.

    settings: what else ``parse`` depends on; also: the other files that it reads.
    """

    def __init__(self, records: Rows, settings: object, *, also: Sequence[Path] = ()):
        self._records = records
        super().__init__(
            len(records), lambda index: self.parse(records[index], lambda: records.where(index))[0], records.where
        )

        def count(some: Iterator[tuple[object, Where]]) -> Arrays:
            return {"left_out": np.array([sum(self.parse(record, where)[1] for record, where in some)])}

        self.left_out = int(scanned(records, "examples", settings, count, also=also)["left_out"].sum())

    def parse(self, record: object, where: Where) -> tuple[Example, bool]:
        """The example of a record, and whether a negative that equals a positive was left out of it."""
        raise NotImplementedError


class InlineExamples(ParsedExamples):
    """Examples whose records hold their texts."""

    def __init__(self, records: Rows, columns: Columns, corpus: str):
        self._columns, self._corpus = columns, corpus
        super().__init__(records, columns)

    def parse(self, record: object, where: Where) -> tuple[Example, bool]:
        return example_from(record, self._columns, self._corpus, where)
