"""The configuration of a training run: one frozen dataclass per group, one YAML file, every field also an option.

`config_file.load` reads a file and command-line overrides; `dump` is the resolved configuration, kept with the run.
The docstring under each field is its help text on the command line.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import yaml

# A key that a resumed run may change: it alters neither the batches nor the meaning of a step already taken.
MAY_CHANGE = {"may_change_on_resume": True}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which encoder, and how it turns tokens into one vector."""

    name_or_path: str
    """folder (or hub name) of a sentence-transformers or transformers model"""
    pooling: Literal["mean", "cls", "last", "weighted_mean"] | None = None
    """null takes what the saved model says, else mean"""
    l2_normalize: bool | None = None
    """unit-length embeddings; null takes what the saved model says, else true"""
    bidirectional: bool | None = None
    """let every token see every other one; null means true for decoder backbones"""
    attn_implementation: str | None = None
    """attention kernel, as transformers names it (sdpa, eager, flash_attention_2)"""
    packed: bool = False
    """encode without padding, where the backbone allows it: the same embeddings"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third more time"""
    separate_towers: bool = False
    """an encoder for queries and another for passages, alike at the start; saved as model/query and model/passage"""
    freeze: Literal["query", "passage"] | None = None
    """the one of the separate towers that is not trained"""

    def __post_init__(self):
        _require(
            self.freeze is None or self.separate_towers,
            f"model.freeze is {self.freeze!r}, but there is one encoder for both: set model.separate_towers to true",
        )
        _require(
            not self.packed or self.attn_implementation is None,
            f"model.packed brings its own attention: leave out model.attn_implementation {self.attn_implementation!r}",
        )


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Train low-rank additions to the backbone's weights instead of the weights; merged in the saved model."""

    r: int | None = None
    """rank, such as 16; null trains all weights"""
    alpha: float = 32.0
    """the additions are scaled by alpha / r"""
    dropout: float = 0.0
    """on the inputs of the additions"""
    target_modules: str | list[str] = "all-linear"
    """which layers: all-linear, or a list of the ends of their names, such as [q_proj, v_proj]"""

    def __post_init__(self):
        _require(self.r is None or self.r >= 1, f"lora.r is {self.r}: expected at least 1, or null for full training")
        _require(self.alpha > 0, f"lora.alpha is {self.alpha}: expected a positive number")
        _require(0 <= self.dropout < 1, f"lora.dropout is {self.dropout}: expected 0 <= dropout < 1")
        _require(len(self.target_modules) > 0, "lora.target_modules is empty: name layers, or leave it at all-linear")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training records and their lengths."""

    train: str | list[str]
    """BEIR folders, or JSONL, Parquet or corpus-id JSON files; one or a list"""
    split: str = "train"
    """which qrels of a BEIR folder"""
    columns: dict[str, str] | None = None
    """names of the columns where they are not recognised, such as {query: question, positive: answer}"""
    train_n_passages: int | None = None
    """passages per query, the positive included; null takes every hard negative a record has"""
    num_workers: int | None = field(default=None, metadata=MAY_CHANGE)
    """processes per rank that make batches ahead; null: up to 8, as the cores allow; 0 makes them between the steps"""
    query_max_len: int = 64
    """tokens a query is cut to"""
    passage_max_len: int = 256
    """tokens a passage is cut to"""
    query_prefix: str | None = None
    """text put before every query, saved with the model; null takes the saved model's"""
    passage_prefix: str | None = None
    """text put before every passage, saved with the model; null takes the saved model's"""

    def __post_init__(self):
        _require(len(self.train) > 0, "data.train is empty: name at least one file or folder")
        _require(self.query_max_len >= 3, f"data.query_max_len is {self.query_max_len}: expected at least 3 tokens")
        _require(
            self.passage_max_len >= 3, f"data.passage_max_len is {self.passage_max_len}: expected at least 3 tokens"
        )
        workers = self.num_workers
        _require(workers is None or workers >= 0, f"data.num_workers is {workers}: expected 0 or more")
        n = self.train_n_passages
        _require(n is None or n >= 1, f"data.train_n_passages is {n}: expected at least 1 (the positive)")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """InfoNCE over the passages of the whole global batch."""

    objective: Literal["info_nce", "clip", "gte", "qwen3_embedding"] = "info_nce"
    """which scores stand beside the positive's: info_nce takes query to passage, the others more directions"""
    matryoshka_dims: list[int] | None = None
    """sum the loss over these prefixes of the embeddings, such as [384, 128]; null takes them whole"""
    temperature: float = 0.02
    """scores are divided by it"""
    learnable_temperature: bool = False
    """train the temperature too (its logarithm, so that it stays positive)"""
    negatives: Literal["gather", "ring", "local"] = "gather"
    """gather and ring use the passages of every process, local only its own"""
    impl: Literal["auto", "reference", "tiled", "fused"] = "auto"
    """how the sum is computed; auto picks by device"""
    mask_duplicates: bool = True
    """leave out passages that are a positive of the query, by id or equal text"""
    margin: float | None = None
    """also leave out passages that score above the positive's score plus this (cosine); null is off"""

    def __post_init__(self):
        _require(
            self.temperature > 0, f"loss.temperature is {self.temperature}: expected a positive number, such as 0.02"
        )
        dims = self.matryoshka_dims
        _require(
            dims is None or (len(dims) > 0 and len(set(dims)) == len(dims) and min(dims) >= 1),
            f"loss.matryoshka_dims is {dims}: expected different positive numbers, or null",
        )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with warm-up and decay."""

    lr: float = 2e-5
    """peak learning rate"""
    weight_decay: float = 0.01
    """not applied to norms, biases and the temperature"""
    betas: tuple[float, float] = (0.9, 0.999)
    """decay of AdamW's moments"""
    eps: float = 1e-8
    """AdamW's epsilon"""
    warmup_ratio: float = 0.1
    """share of all steps in which the rate grows from 0"""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """shape of the decay after the warm-up"""
    max_grad_norm: float | None = 1.0
    """clip the global gradient norm to this; null is off"""

    def __post_init__(self):
        _require(self.lr > 0, f"optim.lr is {self.lr}: expected a positive number")
        _require(0 <= self.warmup_ratio < 1, f"optim.warmup_ratio is {self.warmup_ratio}: expected 0 <= ratio < 1")
        norm = self.max_grad_norm
        _require(
            norm is None or norm > 0, f"optim.max_grad_norm is {norm}: expected a positive number, or null for off"
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The batch, the length of the run, where and how it computes."""

    output_dir: str = field(metadata=MAY_CHANGE)
    """the run's folder: config.yaml, metrics.jsonl, speed.jsonl, tensorboard/, checkpoints/, model/"""
    global_batch_size: int = 256
    """queries per optimizer step over all processes"""
    accumulation_steps: int = 1
    """cut the global batch into this many; each query then sees only its part's passages"""
    epochs: int = field(default=1, metadata=MAY_CHANGE)
    """passes over the training records"""
    max_steps: int | None = field(default=None, metadata=MAY_CHANGE)
    """stop after this many optimizer steps; null means after `epochs`"""
    seed: int = 42
    """fixes the order of the records and the dropout"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on GPUs, fp32 on CPU; bf16 keeps float32 weights and computes in bf16 (fsdp2: from bf16 copies)"""
    parallel: Literal["ddp", "fsdp2"] = field(default="ddp", metadata=MAY_CHANGE)
    """ddp: the whole model on every GPU; fsdp2: weights, gradients and optimizer sharded over them"""
    reshard: bool = field(default=True, metadata=MAY_CHANGE)
    """fsdp2: false keeps the gathered weights through a step: faster, for the memory of the weights"""
    compile: bool = False
    """torch.compile for each transformer layer; takes minutes at the start"""
    micro_batch_tokens: int | Literal["auto"] | None = "auto"
    """padded tokens encoded at a time; null encodes the batch whole; the same gradient, but other dropout masks"""
    keep_graph_mib: int | Literal["auto"] = "auto"
    """memory for activations kept between the two passes, so that less is encoded twice"""
    log_every: int = field(default=10, metadata=MAY_CHANGE)
    """steps between two lines of metrics.jsonl"""
    progress: bool = field(default=True, metadata=MAY_CHANGE)
    """show a progress bar"""

    def __post_init__(self):
        for name in ("global_batch_size", "accumulation_steps", "epochs", "log_every"):
            value = getattr(self, name)
            _require(value >= 1, f"train.{name} is {value}: expected at least 1")
        _require(
            self.max_steps is None or self.max_steps >= 1, f"train.max_steps is {self.max_steps}: expected at least 1"
        )
        rest = self.global_batch_size % self.accumulation_steps
        _require(
            rest == 0,
            f"train.global_batch_size {self.global_batch_size} is not divisible by train.accumulation_steps "
            f"{self.accumulation_steps} (rest {rest}): the parts of a step must be equal; change one of them",
        )
        _require(
            self.reshard or self.parallel == "fsdp2",
            "train.reshard is false, which means nothing where nothing is sharded: set train.parallel to fsdp2",
        )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Retrieval evaluation over a whole corpus, at the start, during training and at the end."""

    data: str | None = field(default=None, metadata=MAY_CHANGE)
    """BEIR folder; null evaluates nothing"""
    split: str = field(default="dev", metadata=MAY_CHANGE)
    """which qrels"""
    every_steps: int | None = field(default=None, metadata=MAY_CHANGE)
    """steps between two evaluations; null means only at the end"""
    at_start: bool = field(default=True, metadata=MAY_CHANGE)
    """evaluate before the first step as well"""
    measures: list[str] = field(default_factory=lambda: ["nDCG@10", "R@100", "RR@10"], metadata=MAY_CHANGE)
    """as ir-measures names them; the best figure is kept by the first"""
    similarity: Literal["cosine", "dot"] = field(default="cosine", metadata=MAY_CHANGE)
    """how query and document vectors are compared"""

    def __post_init__(self):
        every = self.every_steps
        _require(every is None or every >= 1, f"eval.every_steps is {every}: expected at least 1, or null")
        _require(len(self.measures) > 0, "eval.measures is empty: name at least one, such as nDCG@10")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saved states from which the run continues exactly."""

    every_steps: int | None = field(default=None, metadata=MAY_CHANGE)
    """steps between two checkpoints; null saves none but the final model"""
    keep_last: int = field(default=2, metadata=MAY_CHANGE)
    """older checkpoints are deleted"""

    def __post_init__(self):
        every = self.every_steps
        _require(every is None or every >= 1, f"checkpoint.every_steps is {every}: expected at least 1, or null")
        _require(self.keep_last >= 1, f"checkpoint.keep_last is {self.keep_last}: expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that defines a run."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    lora: LoraConfig = field(default_factory=LoraConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


GROUPS: dict[str, type] = {
    "model": ModelConfig,
    "lora": LoraConfig,
    "data": DataConfig,
    "loss": LossConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "checkpoint": CheckpointConfig,
}


def flatten(config: Config) -> dict[str, Any]:
    """{"optim.lr": 1e-4, ...}: every field by the name it has on the command line, tuples as lists."""
    return {
        f"{group}.{name}": list(value) if isinstance(value, tuple) else value
        for group, values in asdict(config).items()
        for name, value in values.items()
    }


def dump(config: Config) -> str:
    """Every field, defaults included, as YAML that `config_file.load` reads back to an equal configuration."""
    tree: dict[str, dict[str, Any]] = {}
    for key, value in flatten(config).items():
        group, name = key.split(".")
        tree.setdefault(group, {})[name] = value
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def differences(config: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """The keys that make two configurations different runs, with both values; what a resume may change is left out."""
    free = {
        f"{group}.{f.name}"
        for group, cls in GROUPS.items()
        for f in fields(cls)
        if f.metadata.get("may_change_on_resume")
    }
    ours, theirs = flatten(config), flatten(other)
    return {key: (ours[key], theirs[key]) for key in ours if key not in free and ours[key] != theirs[key]}
