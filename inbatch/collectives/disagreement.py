"""What a rank says about its tensors before a collective, and how a disagreement between ranks reads. Pure text."""

import torch
from torch import Tensor


def describe(tensor: Tensor | None, free_dims: int) -> str:
    """Everything about a tensor that ranks must agree on; the sizes of its first free_dims dimensions may differ."""
    if tensor is None:
        return "None"
    shape = ["rows", "length"][: min(free_dims, tensor.ndim)] + [str(n) for n in tensor.shape[free_dims:]]
    grad = " requiring grad" if tensor.requires_grad and torch.is_grad_enabled() else ""
    return f"({', '.join(shape)}) {str(tensor.dtype).removeprefix('torch.')}{grad}"


def disagreement(reports: list[tuple[str, dict[str, str], str | None]]) -> str:
    """The error message, from every rank's (call, descriptions, own mistake)."""
    errors = {f"rank {r}": error for r, (_, _, error) in enumerate(reports) if error is not None}
    if errors:
        return "; ".join(f"{who}: {error}" for who, error in errors.items())
    calls = [what for what, _, _ in reports]
    if len(set(calls)) > 1:
        return f"the ranks are in different calls: {_by_rank(calls)}"
    parts = []
    for name in dict.fromkeys(name for _, described, _ in reports for name in described):
        values = [described.get(name, "nothing of that name") for _, described, _ in reports]
        if len(set(values)) > 1:
            parts.append(f"{name}: {_by_rank(values)}")
    return f"{calls[0]}: the ranks disagree (only numbers of rows may differ): {'; '.join(parts)}"


def _by_rank(values: list[str]) -> str:
    """Puts ranks that say the same together: "ranks 0, 1 have x, rank 2 has y"."""
    ranks: dict[str, list[str]] = {}
    for r, value in enumerate(values):
        ranks.setdefault(value, []).append(str(r))
    return ", ".join(
        f"ranks {', '.join(who)} have {value}" if len(who) > 1 else f"rank {who[0]} has {value}"
        for value, who in ranks.items()
    )
