"""The interface between the solvers and the kernels: a block of rows against columns, and what is computed of it.

Shapes: R rows of a chunk, C columns, D dimension, K keys of a row, L keys of a column.

`tiled` (plain PyTorch) and `triton.host` offer these functions; the solvers (`gathered`, `ring`) call them and know
nothing else about how scores are computed. README.md beside this file derives the formulas.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

# exp(60) * 2**24 columns still fits float32 and bfloat16 with room for the products, and exp(-60) is not denormal.
MAX_EXPONENT = 60.0


@dataclass(kw_only=True, slots=True)
class Groups:
    """Hold what depends on a pair being of one group (see `masking`): candidates, masks, weights.

    rows, columns  int64 [R, 1] and [C, 1]: keys of groups
    rules          int32 [R]: bits from `masking.group_rules`
    own, others    float32 [R]: what a score is multiplied by, within the row's group and outside, for the exponential
                   alone: limit and gradients know nothing of it
    """

    rows: Tensor
    columns: Tensor
    rules: Tensor
    own: Tensor
    others: Tensor

    def select(self, rows: slice | Tensor) -> "Groups":
        """Return those of some rows."""
        of_rows = {name: getattr(self, name)[rows] for name in ("rows", "rules", "own", "others")}
        return Groups(columns=self.columns, **of_rows)


@dataclass(kw_only=True, slots=True)
class Block:
    """Rows [R, D] against columns [C, D] (same dtype and device, contiguous last dimension; R or C may be 0).

    positive  int32 [R]: the column left out of E and never counted (the row's positive, or the row itself); a value
              outside 0..C-1 stands for none
    scale     float32 [R] (float64 for float64 inputs): 1 / temperature, from `positive_scores`
    keys      pairs (row keys int64 [R, K], column keys int64 [C, L]), at most two, the last dimension contiguous;
              a pair (i, j) is masked when any key of row i, -1 excepted, equals any key of column j
    limit     float32 [R] or None: a column with s_ij > limit_i is masked
    groups    None, or what leaves out more columns, exempts some from the masks and weights scores
    counts    int32 [R, 2] or None: adds up per row the masked columns, and the unmasked ones with s_ij > the pivot
              given (the positive's score); the positive is not counted
    d_rows, d_columns  float32 [R, D] and [C, D] (float64 for float64): where the gradients go; None: not wanted
    adds_to_rows, adds_to_columns  False: the destination holds garbage and is overwritten
    """

    rows: Tensor
    columns: Tensor
    positive: Tensor
    scale: Tensor
    keys: tuple[tuple[Tensor, Tensor], ...] = ()
    limit: Tensor | None = None
    groups: Groups | None = None
    counts: Tensor | None = None
    d_rows: Tensor | None = None
    d_columns: Tensor | None = None
    adds_to_rows: bool = False
    adds_to_columns: bool = False

    def select(self, rows: slice | Tensor) -> "Block":
        """Return some rows: views of a slice, copies of places in a tensor."""
        of_rows = {name: getattr(self, name) for name in ("rows", "positive", "scale", "limit", "counts", "d_rows")}
        return replace(
            self,
            keys=tuple((row_keys[rows], column_keys) for row_keys, column_keys in self.keys),
            groups=None if self.groups is None else self.groups.select(rows),
            **{name: None if tensor is None else tensor[rows] for name, tensor in of_rows.items()},
        )

    def part(self, start: int, stop: int) -> "Block":
        """Return the chunk of rows start..stop. The chunk that starts at 0 comes first."""
        return replace(self.select(slice(start, stop)), adds_to_columns=self.adds_to_columns or start > 0)


class Kernels(Protocol):
    """The functions of a module of kernels."""

    # (MiB, rows at most): a chunk takes the most rows that one of these allows.
    DEFAULT_CHUNKS: tuple[tuple[float, float], ...]
    ROW_MULTIPLE: int  # a chunk's rows are a multiple of it, where that many fit

    @staticmethod
    def exp_itemsize(dtype: torch.dtype) -> int:
        """Return the bytes of one exponential for inputs of this dtype."""
        ...

    @staticmethod
    def positive_scores(rows: Tensor, positives: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return score_R, score_i = scale_i * rows_i . positives_i, and scale_R.

        scale_i is `scale`, corrected for what the kernel's own rounding takes from a product of row i.
        """
        ...

    @staticmethod
    def exp_scores(block: Block, pivot_R: Tensor, *, keep: bool = True) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return (E_RC, sum_R, pivot_R), and add to the block's counts.

        s_ij = scale_i * rows_i . columns_j in float32 (float64 for float64), times the group's factor if there are
        groups. E_ij = exp(s_ij - pivot_i), exactly 0 on the positive and on every masked column, in the dtype of the
        gradient products (None with keep=False). sum_i = sum_j E_ij in float32, taken before E is rounded. A row whose
        greatest score exceeds the pivot by more than MAX_EXPONENT gets that score as its pivot; the others keep
        theirs. Nothing overflows, and nothing is clamped.
        """
        ...

    @staticmethod
    def finish(
        sums: Sequence[Tensor], pivots: Sequence[Tensor], positive_R: Tensor, scale: Tensor | float, weight: float,
        loss_R: Tensor, coefficient_R: Tensor,
    ) -> list[Tensor]:  # fmt: skip
        """Fill loss_R and coefficient_R of a softmax over several blocks, and return each block's weight_R.

        Z_i = exp(positive_i) + sum over blocks of exp(pivot_i) * sum_i; loss_i = weight * (log Z_i - positive_i)
        weight_i of a block = scale * weight * exp(pivot_i) / Z_i
        coefficient_i = -scale * weight * (1 - exp(positive_i) / Z_i)
        A tiny loss or coefficient keeps its digits (log1p of the sums; never 1 - p).
        """
        ...

    @staticmethod
    def add_gradients(block: Block, exp_RC: Tensor | None, weight_R: Tensor, *, rows: bool, columns: bool) -> None:
        """Add to the block's gradients, those of the rows and those of the columns if asked for. exp_RC: as kept.

        d_rows += weight_R * (E @ columns);    d_columns += E^T @ (weight_R * rows)
        """
        ...

    @staticmethod
    def close(
        queries: Tensor, passages: Tensor, positives: slice | Tensor, coefficient_B: Tensor,
        d_queries: Tensor | None, d_passages: Tensor | None, grad: Tensor, dtype: torch.dtype,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """Return grad * (gradients + the positive's term) in `dtype`; None stays None.

        d_queries_i += coefficient_i * passages[positives]_i;    d_passages[positives]_i += coefficient_i * queries_i
        """
        ...
