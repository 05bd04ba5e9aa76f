"""The section of a model card on training: data, figures, and the settings to repeat the run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inbatch.train.config import Config, dump


def training_section(config: Config, lines: Sequence[dict[str, float]], world_size: int) -> str:
    """Return the section, in Markdown; lines: of metrics.jsonl so far."""
    sources = "\n".join(
        f"- {source['path']}" + "".join(f", {key} {value}" for key, value in source.items() if key != "path")
        for source in config.data.sources
    )
    processes = f" --nproc-per-node {world_size}" if world_size > 1 else ""
    return f"""
## Training

Trained with inbatch: in-batch negatives of all processes, by their exact gradient.

Data:

{sources}
{_figures(config, lines)}
The settings below, as `config.yaml`, repeat it by `inbatch train config.yaml{processes}`.

```yaml
{dump(config)}```
"""


def hub_data(config: Config) -> list[str]:
    """Return the names on the hub of the training data."""
    names = (source["path"].removeprefix("hf://") for source in config.data.sources if "hf://" in source["path"])
    return list(dict.fromkeys("/".join(Path(name).parts[:2]) for name in names))


def _figures(config: Config, lines: Sequence[dict[str, float]]) -> str:
    measured = [line for line in lines if any(key.startswith("eval_") for key in line)]
    losses: list[dict[str, Any]] = [line for line in lines if "loss" in line]
    text = f"\n{losses[-1]['step']} steps; the last loss was {losses[-1]['loss']:.4f}.\n" if losses else ""
    if not measured:
        return text
    rows = "".join(
        f"| {key.removeprefix('eval_')} | {measured[0][key]:.4f} | {value:.4f} |\n"
        for key, value in measured[-1].items()
        if key.startswith("eval_") and key in measured[0]
    )
    heads = " | ".join(f"step {line['step']}" for line in (measured[0], measured[-1]))
    return f"{text}\nOn the {config.eval.split} split of {config.eval.data}:\n\n| | {heads} |\n|---|---|---|\n{rows}"
