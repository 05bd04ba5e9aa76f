"""Say which scores enter which softmax, and which softmaxes make the loss.

Label smoothing is left out: ALIGN (Jia et al. 2021) used it, the retrievers since do not, and it needs the plain sum of
all candidates' scores, which sums of exponentials do not give.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real

# direction -> (what the rows are, what the columns are); "positive" is the row's positive passage.
DIRECTIONS = {
    "query_to_passage": ("query", "passage"),
    "passage_to_query": ("positive", "query"),
    "query_to_query": ("query", "query"),
    "passage_to_passage": ("positive", "passage"),
}


HARDNESS_MODES = ("in_batch_negatives", "hard_negatives", "all_negatives")


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """One softmax for each row: `weight` * (logsumexp over the scores of `directions` - the positive's score)."""

    dim: int  # of the prefix
    directions: tuple[str, ...]
    weight: float
    plain: bool  # True for the queries' softmax over the passages, whole embeddings

    @property
    def query_columns(self) -> bool:
        """True if rows are compared with queries too."""
        return any(DIRECTIONS[direction][1] == "query" for direction in self.directions)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Say what info_nce computes, for row i with query q_i and positive passage d_i; s is the scaled score.

    directions: whose scores stand beside s(q_i, d_i) in the softmax of row i
        query_to_passage    s(q_i, p) for every other passage      passage_to_query    s(d_i, q) for every other query
        query_to_query      s(q_i, q) for every other query        passage_to_passage  s(d_i, p) for every other passage
    partition: "joint", one softmax over all of them, or "per_direction", one for each and the mean of their losses
    matryoshka_dims: the loss is the weighted sum over prefixes of the embeddings, each renormalised (the full dimension
        is taken as it is); weights default to 1 (Kusupati et al. 2022)
    hardness_mode: which negatives' scores s(q_i, p) of query_to_passage get hardness_strength * q_i.p added, a constant
        to the gradient: "in_batch_negatives" (of other rows; Lan et al. 2025 take strength 9), "hard_negatives" (the
        row's own; Schechter Vera et al. 2025 take 5) or "all_negatives"; a row's own are those between its positive
        and the next one

    Settings: CLIP (Radford et al. 2021), GTE (Li et al. 2023) and QWEN3_EMBEDDING (Zhang et al. 2025, which also masks
    by FalseNegatives(margin=0.1)). Each takes a list, too. Raises ValueError for unknown or repeated names, for wrong
    dimensions or weights, and for other collections.
    """

    directions: tuple[str, ...] = ("query_to_passage",)
    partition: str = "joint"
    matryoshka_dims: tuple[int, ...] | None = None
    matryoshka_weights: tuple[float, ...] | None = None
    hardness_mode: str | None = None
    hardness_strength: float = 0.0

    def __post_init__(self) -> None:
        for name in ("directions", "matryoshka_dims", "matryoshka_weights"):
            value = getattr(self, name)
            if isinstance(value, list):  # as configuration files have them
                object.__setattr__(self, name, tuple(value))
            elif not isinstance(value, tuple) and (value is not None or name == "directions"):
                # The order of a set differs between processes, and so would what they compute.
                raise ValueError(f"{name} must be a tuple or a list, got {type(value).__name__} {value!r}")
        known = [direction for direction in DIRECTIONS if direction in self.directions]
        if not known or len(known) < len(self.directions):  # some repeated, or not among them
            raise ValueError(f"directions must be different ones of {', '.join(DIRECTIONS)}, got {self.directions!r}")
        if self.partition not in ("joint", "per_direction"):
            raise ValueError(f'partition must be "joint" or "per_direction", got {self.partition!r}')
        dims, weights = self.matryoshka_dims, self.matryoshka_weights
        whole = dims is None or all(isinstance(dim, int) and not isinstance(dim, bool) for dim in dims)
        if dims is not None and (not dims or not whole or len(set(dims)) < len(dims) or min(dims) < 1):
            raise ValueError(f"matryoshka_dims must be different positive integers, got {dims!r}")
        numbers = weights is None or all(isinstance(weight, Real) and math.isfinite(weight) for weight in weights)
        if not numbers or (weights is not None and (dims is None or len(weights) != len(dims))):
            raise ValueError(
                f"matryoshka_weights must give one finite number for each of matryoshka_dims {dims!r}, got {weights!r}"
            )
        if self.hardness_mode not in (None, *HARDNESS_MODES):
            raise ValueError(f"hardness_mode must be None or one of {HARDNESS_MODES}, got {self.hardness_mode!r}")
        strength = self.hardness_strength
        if not (isinstance(strength, Real) and 0 <= strength < math.inf) or (strength > 0) == (not self.hardness_mode):
            raise ValueError(
                "hardness_strength must be a positive number with a hardness_mode, and 0 without, got "
                f"hardness_mode={self.hardness_mode!r}, hardness_strength={strength!r}"
            )
        if self.hardness_mode and "query_to_passage" not in self.directions:
            raise ValueError(
                f'hardness_mode={self.hardness_mode!r} weights the scores of "query_to_passage", which is not among '
                f"the directions {self.directions!r}"
            )

    @property
    def hardness(self) -> tuple[float, float]:
        """Return what is added to the scores of a row's own negatives, and of others, in units of q.p."""
        strength = float(self.hardness_strength)
        return (
            strength if self.hardness_mode in ("hard_negatives", "all_negatives") else 0.0,
            strength if self.hardness_mode in ("in_batch_negatives", "all_negatives") else 0.0,
        )


@lru_cache(maxsize=64)
def terms(objective: Objective, dim: int) -> list[Term]:
    """Return the softmaxes whose weighted sum the loss is, for embeddings of `dim` dimensions, the longest first."""
    weights = objective.matryoshka_weights or (1.0,) * len(objective.matryoshka_dims or (dim,))
    prefixes = sorted(zip(objective.matryoshka_dims or (dim,), weights, strict=True), reverse=True)
    parts = [objective.directions]
    if objective.partition == "per_direction":
        parts = [(direction,) for direction in objective.directions]
    return [
        Term(
            dim=length,
            directions=part,
            weight=weight / len(parts),
            plain=part == ("query_to_passage",) and length == dim,
        )
        for length, weight in prefixes
        for part in parts
    ]


PLAIN = Objective()
CLIP = Objective(directions=("query_to_passage", "passage_to_query"), partition="per_direction")
GTE = Objective(directions=tuple(DIRECTIONS))
QWEN3_EMBEDDING = Objective(directions=("query_to_passage", "query_to_query", "passage_to_passage"))
