"""Prove that a training step, in any library, gives on several processes the gradient of one.

The reference is the same step on the joined batch in one process without a process group.
"""

import copy
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from inbatch import collectives

Gradients = dict[str, Tensor]
Step = Callable[[nn.Module, Any], Any]
TIMEOUT_S = 120


@dataclass(frozen=True, kw_only=True)
class GradientParity:
    """Compare the gradient of several processes with that of one. Ratios are several / one; `str` is a report.

    cosine, norm_ratio, error: of all parameters with several elements together; error is |g - truth| / |truth|.
    loss_ratio: the mean of the ranks' losses. scalars: gradients of parameters with one element, by name.
    towers: (cosine, norm ratio) by name. ranks_apart: largest |g_rank - g_0| / |truth|. looks_like: the error in words.
    """

    processes: int
    rows: tuple[int, ...]
    cosine: float
    norm_ratio: float
    error: float
    loss_ratio: float
    ranks_apart: float
    tolerance: float
    looks_like: str = ""
    scalars: Mapping[str, float] = field(default_factory=dict)
    towers: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """True if the error, and that of every scalar and tower, is within the tolerance."""
        return self.looks_like == "exact"

    def __str__(self) -> str:
        lines = [
            f"gradient of {self.processes} processes with {self.rows} rows against one process: {self.looks_like}",
            f"  cosine {self.cosine:.6f}, norm ratio {self.norm_ratio:.6f}, error {self.error:.1e}, "
            f"loss ratio {self.loss_ratio:.6f}, ranks apart {self.ranks_apart:.1e}",
        ]
        lines += [f"  {name}: gradient ratio {ratio:.6f}" for name, ratio in self.scalars.items()]
        lines += [f"  {name}: cosine {cos:.6f}, norm ratio {norm:.6f}" for name, (cos, norm) in self.towers.items()]
        return "\n".join(lines)


def assert_gradient_parity(step: Step, model: nn.Module, batches: Sequence[Any], **options: Any) -> GradientParity:
    """Raise AssertionError, with a report, unless the step's gradient is that of one process; return the report.

    Arguments are those of `gradient_parity`.
    """
    found = gradient_parity(step, model, batches, **options)
    assert found.exact, str(found)
    return found


def gradient_parity(
    step: Step,
    model: nn.Module,
    batches: Sequence[Any],
    *,
    wrap: Callable[[nn.Module], nn.Module] | None = DistributedDataParallel,
    join: Callable[[Sequence[Any]], Any] | None = None,
    reference: Step | None = None,
    towers: Sequence[str] = (),
    tolerance: float = 1e-5,
) -> GradientParity:
    """Compare the gradient of `step` on len(batches) processes with that of one process on the joined batch.

    step(model, batch): runs forward and backward and returns the loss; gradients are then in `.grad`. A step that
        clears or keeps them elsewhere, as a trainer does, returns (loss, {name in the unwrapped model: gradient}).
    model: with dropout off; a copy is trained, never the model itself. Put a loss with parameters into it.
    batches: one for each rank; they may differ in rows. Mappings, tuples and namedtuples of tensors and lists.
    wrap: what the model is given to on several processes; None where the step wraps it. Not called in one process.
    join: batches -> one batch. Default: tensors are concatenated, with zeros on the right of dim 1; lists are added up.
    reference: what one process does, if not `step`; it must not communicate.
    towers: names of submodules to report apart: a shared encoder hides errors that one of two towers has.

    Under a launcher (torchrun, a trainer's) every rank calls it, with as many batches as processes; without a process
    group it starts that many on the CPU. What goes to another process is pickled: module-level functions, no lambdas,
    except that a given `reference` stays in this one. Every rank gets the same report.
    Raises ValueError for another number of batches than processes.
    """
    processes, here = len(batches), collectives.world_size()
    if (here > 1 and here != processes) or processes < 2:
        expected = f"{here}, one for each process" if here > 1 else "one for each of two or more processes"
        raise ValueError(f"gradient_parity: got {processes} batches; expected {expected}")
    whole = (join or _joined)(batches)
    alone = [whole, *batches]
    if here > 1:
        answers = collectives.gather_objects(_run(step, model, batches[collectives.rank()], wrap))
    else:
        answers = _in_processes([partial(_run, step, model, batch, wrap) for batch in batches], group=True)
    if here > 1 and reference is None:  # the step would communicate here
        calls = [partial(_run, step, model, batch) for batch in alone]
        references = collectives.on_rank_0(lambda: _in_processes(calls, group=False))
    else:
        references = [_run(reference or step, model, batch) for batch in alone]
    return _compared(answers, references, [_rows(batch) for batch in batches], towers, tolerance)


# ---- running


def _run(step: Step, model: nn.Module, batch: Any, wrap: Callable | None = None) -> tuple[float, Gradients]:
    """Return the loss and whole gradients, on the CPU in float64, of one step of a copy of the model."""
    torch.manual_seed(0)
    model = copy.deepcopy(model)
    model.zero_grad(set_to_none=True)
    result = step(model if wrap is None else wrap(model), batch)
    loss, found = result if isinstance(result, tuple) else (result, None)
    if loss is None:
        raise ValueError("gradient_parity: the step returned None; it must return the loss")
    if found is None:
        found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    if others := found.keys() - {name for name, _ in model.named_parameters(remove_duplicate=False)}:
        expected = "the model has no such parameter; expected the names that they have before it is wrapped"
        raise ValueError(f"gradient_parity: the step returned a gradient of {min(others)!r}: {expected}")
    whole = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}
    return float(torch.as_tensor(loss).detach()), {
        name: grad.detach().to("cpu", torch.float64) for name, grad in whole.items()
    }


def _in_processes(calls: Sequence[Callable[[], Any]], *, group: bool) -> list[Any]:
    """Return the results of the calls: with a group in one process each, else all in one new process."""
    port = 0
    if group:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    size = len(calls) if group else 1
    with ProcessPoolExecutor(size, mp_context=get_context("spawn")) as pool:
        return [job.result() for job in [pool.submit(_worker, call, n, size, port) for n, call in enumerate(calls)]]


def _worker(call: Callable[[], Any], rank: int, size: int, port: int) -> Any:
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in launched:
        os.environ.pop(name, None)
    torch.set_num_threads(1)
    if port:
        values = (rank, rank, size, size, "127.0.0.1", port)
        os.environ.update(zip(launched, map(str, values), strict=True))
        collectives.start("gloo", timeout_s=TIMEOUT_S)
    try:
        return call()
    finally:
        collectives.stop()


def _joined(batches: Sequence[Any]) -> Any:
    first = batches[0]
    if isinstance(first, Mapping):
        if any(batch.keys() != first.keys() for batch in batches):
            raise ValueError(f"gradient_parity: batches have other names than {list(first)}: give join=")
        return {name: _joined([batch[name] for batch in batches]) for name in first}
    if isinstance(first, tuple):
        parts = map(_joined, zip(*batches, strict=True))
        return first._make(parts) if hasattr(first, "_make") else tuple(parts)  # type: ignore[attr-defined]
    if isinstance(first, list):
        return [value for batch in batches for value in batch]
    if not isinstance(first, Tensor) or first.ndim == 0:
        if any(batch != first for batch in batches):
            raise ValueError(f"gradient_parity: batches differ in a {type(first).__name__}: give join=")
        return first
    if first.ndim > 1:
        widest, after = max(batch.shape[1] for batch in batches), [0, 0] * (first.ndim - 2)
        batches = [nn.functional.pad(batch, [*after, 0, widest - batch.shape[1]]) for batch in batches]
    return torch.cat(list(batches))


def _rows(batch: Any) -> int:
    if isinstance(batch, (Mapping, tuple)):
        return next(filter(None, map(_rows, batch.values() if isinstance(batch, Mapping) else batch)), 0)
    return len(batch) if isinstance(batch, list) or (isinstance(batch, Tensor) and batch.ndim) else 0


# ---- comparing


def _compared(
    answers: Sequence[tuple[float, Gradients]],
    references: Sequence[tuple[float, Gradients]],
    rows: Sequence[int],
    towers: Sequence[str],
    tolerance: float,
) -> GradientParity:
    (true_loss, truth), *alone = references
    if not truth:
        raise ValueError("gradient_parity: the step left no gradient in one process; it must run backward")
    everyone = [gradients for _, gradients in answers]
    like = {name: grad for gradients in [truth, *everyone] for name, grad in gradients.items()}
    true, *found = (_flat(gradients, like) for gradients in [truth, *everyone])
    cosine, norm = _cosine_and_norm(found[0], true)
    rounding = 1e-9 * true.norm()  # where both are no more than that, their ratio is 1
    report = GradientParity(
        processes=len(answers),
        rows=tuple(rows),
        cosine=cosine,
        norm_ratio=norm,
        error=float((found[0] - true).norm() / true.norm()),
        loss_ratio=sum(loss for loss, _ in answers) / len(answers) / true_loss if true_loss else float("nan"),
        ranks_apart=max(float((other - found[0]).norm() / true.norm()) for other in found),
        tolerance=tolerance,
        scalars={
            name: float((everyone[0].get(name, torch.zeros(1)).sum() + rounding) / (grad.sum() + rounding))
            for name, grad in truth.items()
            if grad.numel() == 1
        },
        towers={name: _cosine_and_norm(*(_flat(one, like, name) for one in (everyone[0], truth))) for name in towers},
    )
    local = torch.stack([_flat(gradients, like) for _, gradients in alone]).mean(0)
    return replace(report, looks_like=_named(report, found[0], local))


def _flat(gradients: Gradients, like: Gradients, tower: str | None = None) -> Tensor:
    """Return one vector of the tower's gradients, or of all but the scalars'; one that is missing is zero."""
    chosen = [n for n, grad in like.items() if (grad.numel() > 1 if tower is None else n.startswith(f"{tower}."))]
    if not chosen and tower is None:
        raise ValueError(
            "gradient_parity: no parameter with several elements has a gradient: there is no direction to compare"
        )
    if not chosen:
        raise ValueError(f"gradient_parity: no parameter of {tower!r} has a gradient; towers are names of submodules")
    return torch.cat([gradients.get(name, torch.zeros_like(like[name])).flatten() for name in chosen])


def _cosine_and_norm(found: Tensor, truth: Tensor) -> tuple[float, float]:
    norms = found.norm(), truth.norm()
    return float(found @ truth / (norms[0] * norms[1]).clamp(min=1e-300)), float(norms[0] / norms[1])


def _named(report: GradientParity, found: Tensor, local: Tensor) -> str:
    """Return the name of the error, by its pattern."""
    within, size, total = report.tolerance, report.processes, sum(report.rows)
    parts = [*((1.0, ratio) for ratio in report.scalars.values()), *report.towers.values()]
    if report.norm_ratio == 0:
        return "no gradient"
    if report.ranks_apart > within:
        return "nobody averages the gradients: every rank trains a different model"
    if report.error <= within:
        wrong = [n for n, r in report.scalars.items() if abs(r - 1) > within]
        if wrong:
            return f"the gradient of {', '.join(wrong)} is wrong"
        if all(1 - cos <= within and abs(norm - 1) <= within for cos, norm in parts):
            return "exact"
    scale = float(found @ local / (local @ local).clamp(min=1e-300))
    if float((found - scale * local).norm() / found.norm()) <= within:
        return "local negatives" + _times(scale, size, total, within)
    if 1 - report.cosine <= max(within**2, 1e-12):
        return "wrong scale" + _times(report.norm_ratio, size, total, within)
    if abs(report.loss_ratio - 1) <= within:
        return "detached: the loss is the global one, but no gradient goes to other ranks' passages"
    return "wrong direction"


def _times(scale: float, size: int, total: int, within: float) -> str:
    names = {1.0: "", 1 / size: "1/W", float(size): "W", float(total): "b x W", total / size: "b"}
    for value, name in names.items():
        if abs(scale / value - 1) <= max(within, 1e-3):
            return name and f": {name} {'of it' if name == '1/W' else 'times too large'}"
    return f": {scale:.3g} times"
