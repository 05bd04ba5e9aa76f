"""Which of torch's attention kernels is the fastest for packed texts of which length?

    python -m benchmarks.attention [--output FILE]

FlashAttention-2 beside the memory-efficient kernels, as `inbatch.encoder.packing` calls them, for texts from half of T
to T tokens, about 65,536 in all, in bfloat16. Milliseconds of a forward pass, and of both passes. Needs CUDA.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import pad

from inbatch.encoder.packing import _efficient, _flash

TOKENS = 65536
HEADS = (  # of queries, of keys, dimension, causal, dropout
    (12, 12, 32, False, 0.1),  # MiniLM
    (12, 12, 64, False, 0.1),  # BERT-base
    (12, 12, 64, False, 0.0),
    (32, 8, 64, True, 0.0),  # Llama-3.2-1B
    (16, 8, 128, True, 0.0),  # Qwen3-0.6B
)


def milliseconds(function: Callable[[], object], repeats: int = 6) -> float:
    for _ in range(2):
        function()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats * 1e3


def measure(heads: tuple[int, int, int, bool, float], T: int) -> dict:
    H, of_keys, E, causal, dropout = heads
    lengths = torch.randint(T // 2, T + 1, (4 * TOKENS // (3 * T),))
    starts, tokens = pad(lengths.cuda().cumsum(0), (1, 0)).int(), int(lengths.sum())
    sizes = (H, of_keys, of_keys)
    inputs = [torch.randn(1, h, tokens, E, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in sizes]
    times: dict[str, float] = {}
    for name, run in (("flash", _flash), ("efficient", _efficient)):

        def forward(run: Callable = run) -> torch.Tensor:
            return run(*inputs, starts, T, dropout, E**-0.5, causal, None)

        grad = torch.randn_like(forward())
        with torch.no_grad():
            times[f"{name}_forward_ms"] = round(milliseconds(forward), 3)
        both = milliseconds(lambda forward=forward, grad=grad: torch.autograd.grad(forward(), inputs, grad))
        times[f"{name}_both_ms"] = round(both, 3)
    about = {"heads": H, "key_heads": of_keys, "dimension": E, "causal": causal, "dropout": dropout, "longest": T}
    return about | {"tokens": tokens, **times, "gpu": torch.cuda.get_device_name(), "torch": torch.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="append each row as a JSON line to this file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("it compares CUDA kernels, and there is no CUDA device")
    torch.manual_seed(0)
    for heads in HEADS:
        for longest in (16, 32, 48, 64, 96, 128):
            row = measure(heads, longest)
            print(json.dumps(row), flush=True)
            if options.output:
                with options.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
