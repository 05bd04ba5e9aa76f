"""How benchmarks.loss tells its results: a table for people, and a chart."""

from __future__ import annotations

import os
import statistics
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def facts(gpus: int) -> dict:
    """Hardware, versions and commit. INBATCH_COMMIT names the commit of a copy without its history."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    command = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    packages = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "inf-cl", "quack-kernels")
    return {
        "gpu": torch.cuda.get_device_name(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "commit": os.environ.get("INBATCH_COMMIT") or commit or None,
        **{package: installed(package) for package in packages},
    }


def table(result: dict) -> str:
    lines = [" ".join(f"{name}={value}" for name, value in result["facts"].items()), ""]
    for each in result["errors"]:
        values = each.get("failed") or f"loss {each['loss_error']:.1e}  dq {each['dq']:.1e}  dp {each['dp']:.1e}"
        lines.append(f"{each['setting']:34s} {each['row']:46s} {values}")
    for shape in result["shapes"]:
        plain = " ".join(f"{name} {rate:.0f}" for name, rate in shape.get("plain_tflops", {}).items())
        lines += [
            "",
            f"{shape['B']} x {shape['N']} x {shape['D']}" + (f"   plain products, TFLOP/s: {plain}" if plain else ""),
        ]
        if shape.get("card"):
            lines.append(
                f"  {'while inbatch runs, the card':46s} " + " ".join(f"{k}={v}" for k, v in shape["card"].items())
            )
        for row in shape["rows"]:
            if "failed" in row:
                lines.append(f"  {row['row']:46s} {row['failed'][:60]}")
                continue
            share = f"share {row['share']:.2f}" if "share" in row else ""
            busy = f", GPU busy {row['busy_ms']:.3f} ms" if "busy_ms" in row else ""
            lines.append(
                f"  {row['row']:46s} {row['ms']:9.3f} ms {row['tflops']:5.0f} TF {share:10s} "
                f"{row['gib_above_inputs']:7.2f} GiB above the inputs{busy}"
            )
    return "\n".join(lines)


def draw(result: dict, path: Path) -> None:
    """Speed and memory over the batch size, from the shapes with N = 2 B and D = 1024."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = sorted((s for s in result["shapes"] if s["D"] == 1024 and s["N"] == 2 * s["B"]), key=lambda s: s["B"])
    series: dict[str, list[tuple[int, float, float]]] = {}
    for shape in shapes:
        for row in shape["rows"]:
            if "ms" in row:
                series.setdefault(row["row"], []).append((shape["B"], row["tflops"], row["gib_above_inputs"]))
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(11, 4.2))
    for name, points in series.items():
        if len(points) > 2:
            batch, rate, gib = zip(*points, strict=True)
            speed.plot(batch, rate, marker="o", label=name)
            memory.plot(batch, gib, marker="o", label=name)
    plain = [statistics.mean(shape["plain_tflops"].values()) for shape in shapes]
    speed.plot([shape["B"] for shape in shapes], plain, color="gray", linestyle="--", label="plain products")
    speed.set(ylabel="TFLOP/s, counting 6 B N D", ylim=(0, None))
    memory.set(yscale="log", ylabel="GiB above the inputs")
    for axes in (speed, memory):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("queries B; passages N = 2 B")
        axes.grid(alpha=0.3)
    speed.legend(fontsize=8)
    figure.suptitle(f"Loss, forward + backward, bfloat16, D = 1024, one {result['facts']['gpu']}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
