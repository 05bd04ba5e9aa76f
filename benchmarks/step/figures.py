"""What train_step.py reports beside time: the bfloat16 peak, operations, kernels, and the gradient's error."""

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.step.rows import ON_GPU, TEMPERATURE, BiEncoderModel, Row, build, collectives


def sync() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def count_flops(backbone: nn.Module, lengths: Tensor) -> float:
    """Forward and backward of one encoding: 6 a weight and token, and attention's two products over real tokens."""
    config = backbone.config
    embeddings = {id(module.weight) for module in backbone.modules() if isinstance(module, nn.Embedding)}
    weights = sum(p.numel() for p in backbone.parameters() if p.ndim == 2 and id(p) not in embeddings)
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    return 6 * weights * float(lengths.sum()) + 12 * config.num_hidden_layers * width * float(lengths.square().sum())


def bf16_peak() -> float:
    """FLOP/s of a plain bfloat16 product."""
    if not ON_GPU:
        return float("nan")
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(12):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        stop.record()
        sync()
        times.append(start.elapsed_time(stop))
    return 2 * 8192**3 / statistics.median(times[2:]) * 1e3


def waits(step: Callable[[], None]) -> Counter[str]:
    """Lines that make the CPU wait for the GPU in one step, and how often."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{one.filename}:{one.lineno}" for one in caught if "synchroniz" in str(one.message))


def profile(step: Callable[[], None]) -> None:
    """Prints where the time of one step goes: the GPU's kernels, by total time, and what the CPU waits for."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    sync()
    start = time.perf_counter()
    step()
    sync()
    wall_ms = (time.perf_counter() - start) * 1e3
    with torch.profiler.profile(activities=activities) as recorded:
        step()
        sync()
    totals: dict[str, list[float]] = {}
    for event in recorded.events():
        # Annotated ranges, the optimizer's say, lie on the GPU's time line too.
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            total = totals.setdefault(event.name, [0.0, 0])
            total[0] += event.self_device_time_total / 1e3
            total[1] += 1
    busy_ms = sum(total for total, _ in totals.values())
    print(f"  step {wall_ms:.0f} ms, kernels {busy_ms:.0f} ms, {sum(n for _, n in totals.values())} launches")
    for name, (total, count) in sorted(totals.items(), key=lambda item: -item[1][0])[:25]:
        print(f"  {total:9.1f} ms {total / busy_ms:6.1%} {count:7d} x  {name[:150]}")
    for line, count in waits(step).most_common():
        print(f"  {count:7d} x  the CPU waits for the GPU at {line}")


# ---- the gradient's distance to a plain float32 step


def flat_gradient(backbone: nn.Module) -> Tensor:
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in backbone.parameters()]
    return torch.cat(
        [getattr(grad, "full_tensor", lambda grad=grad: grad)().flatten().double().cpu() for grad in grads]
    )


def without_dropout(module: nn.Module) -> nn.Module:
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return module


def plain_gradient(folder: Path, pairs: list, args) -> Tensor:
    model = BiEncoderModel.from_pretrained(folder, dtype="float32", bidirectional=True)
    model = without_dropout(model.to(collectives.device()).train())
    queries_BD, passages_BD = (
        model(
            {
                name: value.to(collectives.device())
                for name, value in model.tokenize(texts, max_length=args.max_length).items()
            }
        )
        for texts in zip(*pairs, strict=True)
    )
    labels = torch.arange(len(pairs), device=queries_BD.device)
    F.cross_entropy(queries_BD @ passages_BD.T / TEMPERATURE, labels).backward()
    return flat_gradient(model.backbone)


def gradient_error(row: Row, folder: Path, pairs: list, args, expected: Tensor) -> float:
    trial = build(row, folder, args)
    without_dropout(trial.module)
    trial.forward_backward(trial.tokenize(pairs))
    return float((flat_gradient(trial.backbone) - expected).norm() / expected.norm())
