"""Which columns are false negatives, from ids. Pure: no communication, no host synchronisation but in `sharing`.

Shapes: B queries (rows), M local passages, R rows, C columns of any kind, K and L keys of one row or column.

A pair (row, column) is masked when a document key of the row equals a document key of the column, or a query key of the
row equals a query key of the column. -1 is "unknown" and never matches. What the keys are:

                           document keys                           query keys
    row i                  its positive's id, its known positives  its query id
    passage as a column    its id                                  query ids of the rows whose positive it is
    query as a column      its positive's id, its known positives  its query id
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# "Nothing" differs between compacted rows and columns, so that kernels compare for equality and need no other rule.
ROW_NOTHING = -1
COLUMN_NOTHING = -2


@dataclass(frozen=True)
class FalseNegatives:
    """Which columns are no negatives of a row; its own positive always stays. Ids are int64; -1 never matches.

    passage_ids   [M]     a column with the id of the row's positive is no negative
    query_ids     [B]     a passage that is the positive of another row with the same query id is no negative
    positive_ids  [B, K]  every known positive of the query, padded with -1 (needs passage_ids; K may vary by rank)
    margin        a column with q.p above (q.positive + margin) is no negative; in units of q.p, not of scaled scores;
                  rounding decides about one that equals it, so 0 drops some copies of the positive and keeps others

    Every rank passes the same ones. Masked columns leave the sum exactly. A row's own hard negatives follow the same
    rules. A query as a column is no negative of rows with its query id or with a known positive in common.
    """

    passage_ids: Tensor | None = None
    query_ids: Tensor | None = None
    positive_ids: Tensor | None = None
    margin: float | None = None


@dataclass(frozen=True, kw_only=True)
class Keys:
    """int64 keys of n rows or columns: documents [n, K], queries [n, L], None where there are none."""

    documents: Tensor | None = None
    queries: Tensor | None = None

    def packed(self) -> Tensor | None:
        """Both side by side, to travel as one tensor [n, K + L]."""
        present = [keys for keys in (self.documents, self.queries) if keys is not None]
        return torch.cat(present, dim=1) if present else None

    def like(self, packed: Tensor | None) -> Keys:
        """The keys that `packed` holds, split as these are."""
        if packed is None:
            return Keys()
        width = 0 if self.documents is None else self.documents.shape[1]
        return Keys(
            documents=None if self.documents is None else packed[:, :width],
            queries=None if self.queries is None else packed[:, width:],
        )


def sharing(positives: Tensor | None) -> int:
    """How many rows share one positive at most (1 at least). Synchronises if `positives` is on a GPU."""
    if positives is None or positives.numel() == 0:
        return 1
    ordered = positives.sort().values
    return int(_position_in_run(ordered).max()) + 1


def _position_in_run(ordered: Tensor) -> Tensor:
    """[0, 1, 2, 0, 0, 1] for [3, 3, 3, 5, 7, 7]."""
    positions = torch.arange(ordered.numel(), device=ordered.device)
    return positions - torch.searchsorted(ordered, ordered)


def row_keys(ids: FalseNegatives, positives: Tensor, width: int) -> Keys:
    """Keys of rows, and of queries as columns. positives [B]: local column; documents get 1 + `width` keys."""
    documents = None
    if ids.passage_ids is not None:
        documents = ids.passage_ids[positives].unsqueeze(1)
        if ids.positive_ids is not None:
            documents = torch.cat([documents, ids.positive_ids], dim=1)
        if documents.shape[1] <= width:
            documents = F.pad(documents, (0, 1 + width - documents.shape[1]), value=-1)
    return Keys(documents=documents, queries=None if ids.query_ids is None else ids.query_ids.unsqueeze(1))


def passage_keys(ids: FalseNegatives, positives: Tensor, num_passages: int, width: int) -> Keys:
    """Keys of passages as columns. width: at least `sharing(positives)`, the same on all ranks."""
    queries = None
    if ids.query_ids is not None:
        queries = ids.query_ids.new_full((num_passages, width), -1)
        ordered, order = positives.sort()
        queries[ordered, _position_in_run(ordered)] = ids.query_ids[order]
    return Keys(documents=None if ids.passage_ids is None else ids.passage_ids.unsqueeze(1), queries=queries)


def compact(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Replaces 64-bit keys by 32-bit ones with exactly the same matches. rows [R, K], columns [C, L] int64 -> int32.

    A key becomes its first position among the sorted column keys, so equal keys agree and different ones differ; a row
    key that no column has becomes "nothing".
    """
    if columns.numel() == 0:
        return torch.full_like(rows, ROW_NOTHING, dtype=torch.int32), columns.int()
    ordered = columns.flatten().sort().values
    columns, rows = columns.contiguous(), rows.contiguous()
    column_keys = torch.searchsorted(ordered, columns, out_int32=True).masked_fill_(columns == -1, COLUMN_NOTHING)
    first = torch.searchsorted(ordered, rows, out_int32=True)
    after = torch.searchsorted(ordered, rows, right=True, out_int32=True)
    # A row's -1 may get the place of the columns' -1, which no column has as its key any more.
    return torch.where(after > first, first, ROW_NOTHING), column_keys


def match(rows: Keys, columns: Keys) -> tuple[tuple[Tensor, Tensor], ...]:
    """The (row, column) pairs of compacted keys that a kernel compares."""
    return tuple(compact(row, column) for row, column in _pairs(rows, columns))


def mask(rows: Keys, columns: Keys, num_rows: int, num_columns: int, device: torch.device) -> Tensor:
    """Dense bool [R, C], True where the column is no negative of the row. The specification of `match`."""
    masked_RC = torch.zeros(num_rows, num_columns, dtype=torch.bool, device=device)
    for row, column in _pairs(rows, columns):
        for row_key in row.unbind(1):
            for column_key in column.unbind(1):
                masked_RC |= (row_key[:, None] == column_key) & (row_key[:, None] != -1)
    return masked_RC


def _pairs(rows: Keys, columns: Keys) -> list[tuple[Tensor, Tensor]]:
    both = ((rows.documents, columns.documents), (rows.queries, columns.queries))
    return [(row, column) for row, column in both if row is not None and column is not None]
