"""Keys that mark the false negatives of a row. Pure tensor functions: nothing here communicates.

Shapes: B queries (rows), M local passages, R rows, C columns of any kind, K and L keys of one row or column,
G rows of the global batch.

A pair (row, column) is masked when a document key of the row equals a document key of the column, or a query key of the
row equals a query key of the column. -1 is "unknown" and never matches. What the keys are:

                           document keys                           query keys
    row i                  its positive's id, its known positives  its query id
    passage as a column    its id                                  query ids of the rows whose positive it is
    query as a column      its positive's id, its known positives  its query id

Known positives of a row: those given, and the positives of all rows of the batch with its query id.

A group is a positive and the passages after it, up to the next positive: the rows of that positive and their hard
negatives. A pair is of one group, or not, by the third key, (column of the group's positive << 1) + (1 for a positive).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Which passages a row is compared with. By row they are given as places here.
CANDIDATES = ("all", "positives", "own")


@dataclass(frozen=True)
class FalseNegatives:
    """Mark columns that are not negatives of a row; its positive always stays. Ids are int64; -1 never matches.

    passage_ids   [M]     leaves out a column with the id of the row's positive
    query_ids     [B]     leaves out a passage that is the positive of another row with the same query id; with
                          passage_ids, also every other column with such a passage's id
    positive_ids  [B, K]  every known positive of the query, padded with -1 (needs passage_ids; K may vary by rank)
    margin        leaves out a column with q.p above (q.positive + margin), in units of q.p, not of scaled scores;
                  rounding decides about equality, so 0 drops some copies of the positive and keeps others

    candidates    "all", "positives" (the positives of other rows, and the row's own hard negatives) or "own" (its own
        hard negatives); by row int64 [B], as places in masking.CANDIDATES
    mask_own_negatives  False, or by row in bool [B]: the row's own hard negatives stay, whatever ids and margin say

    A row's own hard negatives are the passages between its positive and the next positive of the rank.

    Every rank gives the same fields. Masked columns leave the sum exactly. A query as a column is left out for rows
    with its query id or with a known positive in common.
    """

    passage_ids: Tensor | None = None
    query_ids: Tensor | None = None
    positive_ids: Tensor | None = None
    margin: float | None = None
    candidates: str | Tensor = "all"
    mask_own_negatives: bool | Tensor = True

    @property
    def needs_groups(self) -> bool:
        """True if it matters which hard negatives are a row's own."""
        return self.mask_own_negatives is not True or not isinstance(self.candidates, str) or self.candidates != "all"


NO_IDS = FalseNegatives()


class Keys(NamedTuple):
    """int64 keys of n rows or columns: documents [n, K], queries [n, L], groups [n, 1], None where there are none."""

    documents: Tensor | None = None
    queries: Tensor | None = None
    groups: Tensor | None = None

    def packed(self) -> Tensor | None:
        """Return them side by side, to travel as one tensor [n, K + L + 1]."""
        present = [keys for keys in self if keys is not None]
        if len(present) < 2:
            return present[0] if present else None
        return torch.cat(present, dim=1)

    def like(self, packed: Tensor | None) -> Keys:
        """Return the keys that `packed` holds, split as these are."""
        if packed is None:
            return NO_KEYS
        parts = packed.split([0 if keys is None else keys.shape[1] for keys in self], dim=1)
        return Keys(*(None if keys is None else part for keys, part in zip(self, parts, strict=True)))

    def part(self, start: int, stop: int) -> Keys:
        """Return those of rows or columns start..stop."""
        return Keys(*(None if keys is None else keys[start:stop] for keys in self))


NO_KEYS = Keys()


def sharing(positives: Tensor) -> int:
    """Return how many rows share one positive at most (1 at least). Synchronises if `positives` is on a GPU."""
    if positives.numel() == 0:
        return 1
    return int(_position_in_run(positives.sort().values).max()) + 1


def _position_in_run(ordered: Tensor) -> Tensor:
    """Return [0, 1, 2, 0, 0, 1] for [3, 3, 3, 5, 7, 7]."""
    positions = torch.arange(ordered.numel(), device=ordered.device)
    return positions - torch.searchsorted(ordered, ordered)


def positives_by_query(query_ids_B: Tensor, pairs_G2: Tensor) -> Tensor | None:
    """Return for each query the documents that any row of the batch with its id has as positive, [B, K] with -1.

    pairs: (query id, id of the positive) of every row of the global batch. K is the same for any part of the batch.
    None where no query id occurs twice. Synchronises if the ids are on a GPU.
    """
    known_G2 = pairs_G2[pairs_G2[:, 0] != -1]
    ordered_G, order_G = known_G2[:, 0].sort()
    if ordered_G.numel() == 0 or (width := int(_position_in_run(ordered_G).max()) + 1) == 1:
        return None
    query_ids_B = query_ids_B.contiguous()
    first_B = torch.searchsorted(ordered_G, query_ids_B)
    after_B = torch.searchsorted(ordered_G, query_ids_B, right=True)
    places_BK = first_B[:, None] + torch.arange(width, device=first_B.device)
    documents_BK = known_G2[order_G, 1][places_BK.clamp(max=len(order_G) - 1)]
    return documents_BK.masked_fill(places_BK >= after_B[:, None], -1)


def row_keys(ids: FalseNegatives, positives: slice | Tensor, known: list[Tensor]) -> Keys:
    """Return the keys of rows, and of queries as columns. known: the [B, K] ids of further known positives."""
    documents = None
    if ids.passage_ids is not None:
        documents = ids.passage_ids[positives].unsqueeze(1)
        if known:
            documents = torch.cat([documents, *known], dim=1)
    return Keys(documents=documents, queries=None if ids.query_ids is None else ids.query_ids.unsqueeze(1))


def passage_keys(ids: FalseNegatives, positives: slice | Tensor, num_passages: int, width: int) -> Keys:
    """Return the keys of passages as columns. width: at least `sharing(positives)`, the same on all ranks."""
    queries = None
    if ids.query_ids is not None:
        queries = ids.query_ids.new_full((num_passages, width), -1)
        if isinstance(positives, slice):
            queries[positives, 0] = ids.query_ids
        else:
            ordered, order = positives.sort()
            queries[ordered, _position_in_run(ordered)] = ids.query_ids[order]
    return Keys(documents=None if ids.passage_ids is None else ids.passage_ids.unsqueeze(1), queries=queries)


def group_keys(positives: Tensor, num_passages: int, before: int) -> tuple[Tensor, Tensor]:
    """Return the groups of rows [B, 1] and of passages [M, 1]. before: the passages of the ranks in front.

    Passages in front of the first positive are of no group: their key is -2, which no row has.
    """
    columns_M = torch.arange(num_passages, device=positives.device)
    ordered_B = positives.sort().values
    place_M = torch.searchsorted(ordered_B, columns_M, right=True) - 1
    owner_M = columns_M if len(ordered_B) == 0 else ordered_B[place_M.clamp(min=0)]
    passages_M = ((owner_M + before) * 2 + (owner_M == columns_M)).masked_fill(place_M < 0, -2)
    return ((positives + before) * 2 + 1).unsqueeze(1), passages_M.unsqueeze(1)


def group_rules(ids: FalseNegatives, num_rows: int, device: torch.device) -> Tensor:
    """Return int32 [B], the rules of the rows as bits.

    1 leaves out hard negatives of other groups, 2 their positives; 4 keeps the row's own hard negatives unmasked.
    """
    candidates, masked = ids.candidates, ids.mask_own_negatives
    if isinstance(candidates, str):
        candidates = torch.full((num_rows,), CANDIDATES.index(candidates), device=device)
    if not isinstance(masked, Tensor):
        masked = torch.full((num_rows,), masked, device=device)
    left_out_B = (1 << candidates.to(device, non_blocking=True)) - 1
    return (left_out_B + 4 * ~masked.to(device, non_blocking=True)).int()


def by_group(rows_R1: Tensor | None, columns_C1: Tensor | None, rules_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return dense bool [R, C]: of the row's group; left out by its rule; never masked, by its rule."""
    assert rows_R1 is not None
    assert columns_C1 is not None
    columns_C, rules_R1 = columns_C1[:, 0], rules_R[:, None]
    positive_C = (columns_C & 1).bool()
    own_RC = (rows_R1 >> 1) == (columns_C >> 1)
    left_out_RC = torch.where(positive_C, (rules_R1 & 2).bool(), (rules_R1 & 1).bool()) & ~own_RC
    return own_RC, left_out_RC, own_RC & ~positive_C & (rules_R1 & 4).bool()


def match(rows: Keys, columns: Keys, *, only_itself: bool = False) -> tuple[tuple[Tensor, Tensor], ...]:
    """Return the (row, column) pairs of keys that a kernel compares.

    only_itself: the rows are passages that stand for themselves, not for the other known positives of their query.
    """
    documents = rows.documents
    if documents is not None and only_itself:
        documents = documents[:, :1]
    both = ((documents, columns.documents), (rows.queries, columns.queries))
    return tuple((row, column) for row, column in both if row is not None and column is not None)


def mask(pairs: tuple[tuple[Tensor, Tensor], ...], num_rows: int, num_columns: int, device: torch.device) -> Tensor:
    """Return dense bool [R, C], True where the column is a false negative of the row."""
    masked_RC = torch.zeros(num_rows, num_columns, dtype=torch.bool, device=device)
    for row, column in pairs:
        for row_key in row.unbind(1):
            for column_key in column.unbind(1):
                masked_RC |= (row_key[:, None] == column_key) & (row_key[:, None] != -1)
    return masked_RC
