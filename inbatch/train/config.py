"""The configuration of a training run: one frozen dataclass per group, one YAML file, every field also an option.

`config_file.load` reads a file and command-line overrides; `dump` is the resolved configuration, kept with the run.
The docstring under each field is its help text on the command line.
"""

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, with_config
from typing_extensions import Required, TypedDict

from inbatch.train.settings import Number, default, settings, shown

# The keys and whole groups that a resumed run may change: they alter neither the batches nor the meaning of a step
# already taken.
MAY_CHANGE = {
    "data.num_workers",
    "data.token_cache",
    "train.output_dir",
    "train.epochs",
    "train.max_steps",
    "train.parallel",
    "train.reshard",
    "train.log_every",
    "train.loggers",
    "train.progress",
    "train.timeout_minutes",
    "eval",
    "checkpoint",
}


@settings("model")
class ModelConfig:
    """Say which encoder, and how it turns tokens into one vector."""

    name_or_path: str
    """folder (or hub name) of a sentence-transformers or transformers model"""
    backend: Literal["auto", "inbatch", "sentence-transformers"] = "auto"
    """whose code opens it; auto: ours where it can (faster: packed, LoRA), else sentence-transformers (any modules)"""
    pooling: Literal["mean", "cls", "last", "weighted_mean", "multi_vector"] | None = None
    """null takes what the saved model says, else mean; multi_vector is a vector a token, compared by MaxSim"""
    l2_normalize: bool | None = None
    """unit-length embeddings; null takes what the saved model says, else true"""
    bidirectional: bool | None = None
    """let every token attend to every other token; null means true for decoder backbones"""
    attn_implementation: str | None = None
    """attention kernel, as transformers names it (sdpa, eager, flash_attention_2)"""
    packed: bool | None = None
    """encode without padding: the same embeddings, faster on GPUs; null does it on GPUs where the backbone allows it"""
    trust_remote_code: bool = False
    """run the code that the model's folder brings; read it first"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third more time"""
    separate_towers: bool = False
    """an encoder for queries and another for passages, alike at the start; saved as model/query and model/passage"""
    freeze: Literal["query", "passage"] | None = None
    """which of the separate towers to leave as it is"""

    def __post_init__(self):
        if self.freeze is not None and not self.separate_towers:
            raise ValueError(
                f"model.freeze is {self.freeze!r}, but there is one encoder for both: set model.separate_towers to true"
            )
        if self.packed and self.attn_implementation is not None:
            raise ValueError(
                f"model.packed brings its own attention: leave out model.attn_implementation "
                f"{self.attn_implementation!r}"
            )


@settings("lora")
class LoraConfig:
    """Train low-rank additions to the backbone's weights instead of the weights."""

    r: int | None = Field(default=None, ge=1)
    """rank, such as 16; null trains all weights"""
    alpha: Number = Field(default=32.0, gt=0)
    """the additions are scaled by alpha / r"""
    dropout: Number = Field(default=0.0, ge=0, lt=1)
    """on the inputs of the additions"""
    target_modules: str | list[str] = Field(default="all-linear", min_length=1)
    """which layers: all-linear, or a list of the ends of their names, such as [q_proj, v_proj]"""
    merge: bool = True
    """merge them in the saved model; false saves them as an adapter of peft, opened with its base model"""


@settings("multi_vector")
class MultiVectorConfig:
    """Say how tokens become vectors where model.pooling is multi_vector; null takes what the saved model says."""

    dim: int | None = Field(default=None, ge=1)
    """numbers of a token's vector; 128 for a new projection"""
    query_expansion: bool | None = None
    """fill queries up with mask tokens to data.query_max_len; a new model does"""
    attend_to_expansion: bool | None = None
    """let a query's tokens attend to these mask tokens; a new model does not"""
    skip_words: list[str] | None = None
    """tokens of passages that count for nothing; a new model skips punctuation"""
    pool_factor: int | None = Field(default=None, ge=1)
    """embedded documents keep a vector for so many tokens, as `inbatch encode --pool-factor` says; not in training"""


@with_config(ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
class TrainSource(TypedDict, total=False):
    """A source of training records with settings of its own, over those of the group `data`.

    weight: its share of the batches, against the other sources' weights. negatives: which passages its queries are
    compared with: all, positives (the other queries' positives and its own hard negatives) or own (those alone).
    mask_own_negatives: false keeps a query's own hard negatives whatever the masks say. loss_weight: of its losses.
    groups: file of `inbatch group`, whose groups of similar examples its batches are made of.
    """

    path: Required[str]
    weight: Annotated[Number, Field(gt=0)]
    num_samples: Annotated[int, Field(ge=1)]
    split: str
    columns: dict[str, str | list[str]]
    corpus: str
    train_n_passages: Annotated[int, Field(ge=1)]
    query_max_len: Annotated[int, Field(ge=3)]
    passage_max_len: Annotated[int, Field(ge=3)]
    query_prefix: str
    passage_prefix: str
    negatives: Literal["all", "positives", "own"]
    mask_own_negatives: bool
    loss_weight: Annotated[Number, Field(ge=0)]
    groups: str


@settings("data")
class DataConfig:
    """The training records and their lengths."""

    train: str | TrainSource | list[str | TrainSource] = Field(min_length=1)
    """file, folder or glob of records (docs/formats.md), or {path: records.jsonl, num_samples: 1000}; one or a list"""
    source_weights: Literal["proportional", "equal"] | Number = "proportional"
    """shares of several sources without `weight`: by size, equal, or for a number T by size ** (1 / T)"""
    mixed_batches: bool = False
    """draw every batch from all sources; false takes each batch from one"""
    split: str = "train"
    """of a folder, or which qrels"""
    columns: dict[str, str | list[str]] | None = None
    """names of the columns where they are not recognised, such as {query: question, negative: [worse, worst]}"""
    corpus: str | None = None
    """where documents are that records name by id, unless they lie beside them"""
    train_n_passages: int | None = Field(default=None, ge=1)
    """passages per query, the positive included; null takes every hard negative a record has"""
    rotate_passages: bool = True
    """take other positives and negatives of a record each epoch; false: always the first, repeated if too few"""
    instructions: bool = True
    """put instructions that the data brings before its texts, in place of the prefixes"""
    shuffle: bool = True
    """read the records in another order each epoch; false: in the order of the files"""
    drop_last: bool = False
    """leave out what is left of an epoch when it fills no batch"""
    no_duplicates: bool = False
    """no two queries of a batch share their text or a positive, by text or id: one of them waits for a later batch"""
    num_workers: int | None = Field(default=None, ge=0)
    """processes per rank that make batches ahead; null: up to 8, as the cores allow; 0 makes them between the steps"""
    token_cache: str | bool = "auto"
    """folder where tokens are kept, for later epochs and runs; auto: where the data's index is, if read twice; off"""
    query_max_len: int = Field(default=64, ge=3)
    """tokens a query is cut to"""
    passage_max_len: int = Field(default=256, ge=3)
    """tokens a passage is cut to"""
    query_prefix: str | None = None
    """text put before every query, saved with the model; null takes the saved model's"""
    passage_prefix: str | None = None
    """text put before every passage, saved with the model; null takes the saved model's"""

    def __post_init__(self):
        if isinstance(self.source_weights, (int, float)) and self.source_weights < 0.1:  # a power of at most 10
            raise ValueError(f"data.source_weights is {self.source_weights}: expected at least 0.1, or a name")
        if (self.mixed_batches or not self.shuffle) and any("groups" in source for source in self.sources):
            raise ValueError("a source's groups need data.mixed_batches false and data.shuffle true: set these")
        for name in ("mixed_batches", "drop_last"):
            if self.no_duplicates and getattr(self, name):
                raise ValueError(f"data.no_duplicates does not go with data.{name}: set one of them to false")
        for name in ("query_max_len", "passage_max_len"):
            lengths = {source.get(name, getattr(self, name)) for source in self.sources}
            if self.mixed_batches and len(lengths) > 1:
                raise ValueError(
                    f"data.mixed_batches is true and the sources' {name} are {sorted(lengths)}: the rows of a batch "
                    "are cut alike; give them one length, or take each batch from one source"
                )

    @property
    def sources(self) -> list[TrainSource]:
        """Return the sources of `train`, each with its settings."""
        listed = self.train if isinstance(self.train, list) else [self.train]
        return [{"path": source} if isinstance(source, str) else source for source in listed]


@settings("loss")
class LossConfig:
    """InfoNCE over the passages of the whole global batch."""

    objective: Literal["info_nce", "clip", "gte", "qwen3_embedding"] = "info_nce"
    """which scores stand beside the positive's: info_nce takes query to passage, the others more directions"""
    matryoshka_dims: list[int] | None = Field(default=None, min_length=1)
    """sum the loss over these prefixes of the embeddings, such as [384, 128]; null takes them whole"""
    temperature: Number = Field(default=0.02, gt=0)
    """scores are divided by it"""
    learnable_temperature: bool = False
    """train the temperature too (its logarithm, so that it stays positive)"""
    negatives: Literal["gather", "ring", "local"] = "gather"
    """gather and ring use the passages of every process, local only its own"""
    impl: Literal["auto", "reference", "tiled", "fused"] = "auto"
    """how the sum is computed; auto picks by device"""
    detach_remote: bool = False
    """give no gradient to passages of other processes: biased, for comparison with runs of trainers that do so"""
    mask_duplicates: bool | Literal["positive"] = True
    """leave out passages that are a positive of the query, by id or equal text; positive: copies of its own alone"""
    hardness_mode: Literal["in_batch_negatives", "hard_negatives", "all_negatives"] | None = None
    """whose scores get hardness_strength x cosine added, as a constant: hard negatives weigh more; null is off"""
    hardness_strength: Number = Field(default=0.0, ge=0)
    """such as 9 for in_batch_negatives, 5 for hard_negatives"""
    margin: Number | None = None
    """also leave out passages that score above the positive's score plus this (cosine); null is off"""

    def __post_init__(self):
        if self.temperature < 1e-6:
            raise ValueError(
                f"loss.temperature is {self.temperature}: expected at least 1e-6, below which scores overflow"
            )
        dims = self.matryoshka_dims
        if dims is not None and (len(set(dims)) < len(dims) or min(dims) < 1):
            raise ValueError(f"loss.matryoshka_dims is {dims}: expected different positive numbers, or null")
        if self.detach_remote and (
            (self.negatives, self.objective) != ("gather", "info_nce") or self.mask_duplicates is True
        ):
            raise ValueError(
                "loss.detach_remote goes with loss.negatives gather, loss.objective info_nce and loss.mask_duplicates "
                "positive or false: set these, or leave it out"
            )
        if (self.hardness_mode is None) == (self.hardness_strength > 0):
            raise ValueError(
                f"loss.hardness_mode is {self.hardness_mode} and loss.hardness_strength {self.hardness_strength}: "
                "expected a mode and a positive strength, or neither"
            )


@settings("distill")
class DistillConfig:
    """Learn from a teacher: its scores in the records (pos_scores, neg_scores), or an encoder's vectors."""

    weight: Number = Field(default=0.0, ge=0)
    """of the distance from the teacher that is added to the loss; 0 is off"""
    kind: Literal["group", "pool", "cosine", "mse"] = "group"
    """group: KL over a query's own passages, from the records' scores; with distill.teacher, pool: KL over all
    passages, by its products; cosine, mse: the distance of the vectors themselves"""
    teacher: str | None = None
    """encoder whose vectors are learnt; it embeds every text once, before the first step, with its own prompts"""
    contrastive_weight: Number = Field(default=1.0, ge=0)
    """of the contrastive loss beside it; 0 learns from the teacher alone"""
    student_temperature: Number | None = Field(default=None, ge=1e-6)
    """the student's scores are divided by it; null takes loss.temperature"""
    teacher_temperature: Number = Field(default=1.0, gt=0)
    """the teacher's scores are divided by it"""

    def __post_init__(self):
        if (self.kind == "group") != (self.teacher is None):
            raise ValueError(
                f"distill.kind is {self.kind} and distill.teacher {self.teacher!r}: group takes the records' scores "
                "and no teacher (inbatch mine --teacher writes them); pool, cosine and mse take a teacher"
            )
        if self.weight == 0 and any(
            (self.teacher, self.contrastive_weight != 1, self.student_temperature, self.teacher_temperature != 1)
        ):
            raise ValueError("distill.weight is 0, so that nothing is distilled: give it, or leave distill out")


Beta = Annotated[Number, Field(ge=0, lt=1)]


@settings("optim")
class OptimConfig:
    """AdamW with warm-up and decay."""

    lr: Number = Field(default=2e-5, gt=0)
    """peak learning rate"""
    weight_decay: Number = Field(default=0.01, ge=0)
    """not applied to norms, biases and the temperature"""
    decay_all: bool = False
    """apply it to norms and biases too"""
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), strict=False)  # a list, in YAML
    """decay of AdamW's moments"""
    eps: Number = Field(default=1e-8, gt=0)
    """AdamW's epsilon"""
    warmup_ratio: Number = Field(default=0.1, ge=0, lt=1)
    """share of all steps in which the rate grows from 0"""
    warmup_steps: int | None = Field(default=None, ge=0)
    """the same as a number of steps, in place of the share"""
    init_lr: Number | None = Field(default=None, ge=0)
    """rate of the first step of the warm-up; null: that of a growth from 0 that is one step old"""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """shape of the decay after the warm-up"""
    decay_steps: int | None = Field(default=None, ge=1)
    """step at which the decay ends; null: the end of the run"""
    min_lr: Number = Field(default=0.0, ge=0)
    """rate at which the decay ends"""
    max_grad_norm: Number | None = Field(default=1.0, gt=0)
    """clip the global gradient norm to this; null is off"""

    def __post_init__(self):
        if self.min_lr > self.lr:
            raise ValueError(f"optim.min_lr is {self.min_lr}: expected at most optim.lr, {self.lr}")


@settings("train")
class TrainConfig:
    """The batch, the length of the run, where and how it computes."""

    output_dir: str = Field(min_length=1)
    """the run's folder: config.yaml, metrics.jsonl, speed.jsonl, tensorboard/, checkpoints/, model/"""
    global_batch_size: int = Field(default=256, ge=1)
    """queries per optimizer step over all processes"""
    accumulation_steps: int = Field(default=1, ge=1)
    """cut the global batch into this many; each query then sees only its part's passages"""
    epochs: int = Field(default=1, ge=1)
    """passes over the training records"""
    max_steps: int | None = Field(default=None, ge=1)
    """stop after this many optimizer steps; null means after `epochs`"""
    seed: int = Field(default=42, ge=0, lt=2**63)
    """fixes the order of the records and the dropout"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one"""
    precision: Literal["auto", "fp32", "bf16", "autocast"] = "auto"
    """weights are float32; bf16 computes with bf16 copies of them, autocast casts where torch thinks it safe: closer to
    float32, slower; auto: fp32 on a CPU, autocast on GPUs, bf16 with fsdp2"""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """ddp: the whole model on every GPU; fsdp2: weights, gradients and optimizer sharded over them"""
    reshard: bool = True
    """fsdp2: false keeps the gathered weights through a step: faster, for the memory of the weights"""
    compile: bool | None = None
    """torch.compile for each transformer layer; null does so on a GPU where that pays in the run"""
    micro_batch_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] | None = "auto"
    """tokens encoded at a time, with padding that is encoded: the same gradient, other dropout masks; auto times on a
    GPU how few fill it (give a number for the same masks in every run), null encodes the batch whole"""
    keep_graph_mib: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """memory for activations kept between the two passes, so that less is encoded twice"""
    log_every: int = Field(default=10, ge=1)
    """steps between two lines of metrics.jsonl"""
    loggers: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(default=["tensorboard"])
    """where figures go beside metrics.jsonl; wandb and mlflow take what else they need from their own variables"""
    progress: bool = True
    """show a progress bar"""
    timeout_minutes: Number = Field(default=10, gt=0, lt=1e6)
    """end all processes when none gets further, or one is silent, for this long"""

    def __post_init__(self):
        rest = self.global_batch_size % self.accumulation_steps
        if rest:
            raise ValueError(
                f"train.global_batch_size {self.global_batch_size} is not divisible by train.accumulation_steps "
                f"{self.accumulation_steps} (rest {rest}): the parts of a step must be equal; change one of them"
            )
        if not self.reshard and self.parallel != "fsdp2":
            raise ValueError(
                "train.reshard is false, which means nothing where nothing is sharded: set train.parallel to fsdp2"
            )
        if self.precision == "autocast" and self.parallel == "fsdp2":
            raise ValueError(
                "train.precision is autocast, and train.parallel fsdp2 gathers weights in bfloat16: set it to bf16"
            )


@settings("eval")
class EvalConfig:
    """Retrieval and held-out loss at the start, during training and at the end, and what follows from the figures."""

    data: str | None = None
    """BEIR folder; null measures no retrieval"""
    validation: str | TrainSource | None = None
    """held-out records, measured in batches as in training: loss, in-batch accuracy and MRR; null measures none"""
    split: str = "dev"
    """which qrels; of a validation folder too"""
    every_steps: int | None = Field(default=None, ge=1)
    """steps between two evaluations; null means only at the end"""
    at_start: bool = True
    """evaluate before the first step as well"""
    measures: list[str] = Field(default=["nDCG@10", "R@100", "RR@10"], min_length=1)
    """as ir-measures names them"""
    similarity: Literal["cosine", "dot"] | None = None
    """how query and document vectors are compared, saved with the model; null takes the model's"""
    sample_queries: int | None = Field(default=None, ge=1)
    """before the end, search for this many queries only, chosen by hash; null takes all"""
    sample_documents: int | None = Field(default=None, ge=1)
    """before the end, search in this many documents only: the queries' relevant ones, and others chosen by hash"""
    best_by: str | None = None
    """validation_loss, _accuracy, _mrr or one of the measures; null: the first measure, else validation_loss"""
    keep_best: bool = False
    """keep a checkpoint of the best evaluation, and at the end its model in best/"""
    patience: int | None = Field(default=None, ge=1)
    """stop after this many evaluations without a better figure; null is off"""

    def __post_init__(self):
        for name in ("weight", "groups"):
            if isinstance(self.validation, dict) and name in self.validation:
                raise ValueError(f"eval.validation has {name}, which means nothing for held-out records: leave it out")
        for name in ("sample_queries", "sample_documents"):
            if getattr(self, name) is not None and self.data is None:
                raise ValueError(f"eval.{name} is set, but there is no eval.data to take a sample of")
        names = ["validation_loss", "validation_accuracy", "validation_mrr"] if self.validation is not None else []
        names += self.measures if self.data is not None else []
        if self.best_by is not None and self.best_by not in names:
            raise ValueError(f"eval.best_by is {self.best_by!r}, which is not measured: expected one of {names}")
        for name in ("keep_best", "patience"):
            if getattr(self, name) and (self.every_steps is None or not names):
                raise ValueError(f"eval.{name} needs eval.every_steps, and eval.data or eval.validation to evaluate")

    @property
    def sampled(self) -> bool:
        """Return True if evaluations before the end take a part of `data`."""
        return self.sample_queries is not None or self.sample_documents is not None

    @property
    def best_key(self) -> str:
        """Return the name in metrics.jsonl of the figure that decides which evaluation was the best."""
        name = self.best_by or (self.measures[0] if self.data is not None else "validation_loss")
        return name if name.startswith("validation_") else f"{'sample' if self.sampled else 'eval'}_{name}"


@settings("checkpoint")
class CheckpointConfig:
    """Saved states from which the run continues exactly."""

    every_steps: int | None = Field(default=None, ge=1)
    """steps between two checkpoints; null saves none but the final model"""
    keep_last: int = Field(default=2, ge=1)
    """older checkpoints are deleted"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hold everything that defines a run."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    lora: LoraConfig = field(default_factory=LoraConfig)
    multi_vector: MultiVectorConfig = field(default_factory=MultiVectorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


def flatten(config: Config) -> dict[str, Any]:
    """Return {"optim.lr": 1e-4, ...}: every field by its name on the command line."""
    return {f"{group}.{name}": value for group, values in asdict(config).items() for name, value in values.items()}


def unused(config: Config) -> list[str]:
    """Return a line for each setting that was given and has no effect beside the others."""
    data, train, optim, evaluation = config.data, config.train, config.optim, config.eval
    weighted = any("weight" in source for source in data.sources)
    nothing = evaluation.data is None and evaluation.validation is None
    distill, vectors = config.distill, config.distill.kind in ("cosine", "mse")
    of_contrast = ["objective", "matryoshka_dims", "learnable_temperature", "hardness_mode", "margin"]
    warm_up = optim.warmup_ratio if optim.warmup_steps is None else optim.warmup_steps
    idle = [
        ("data.train is one source", len(data.sources) == 1, ["data.source_weights", "data.mixed_batches"]),
        ("the sources have weights", weighted and len(data.sources) > 1, ["data.source_weights"]),
        ("train.max_steps is given", train.max_steps is not None, ["train.epochs"]),
        ("lora.r is null", config.lora.r is None, ["lora.alpha", "lora.dropout", "lora.target_modules", "lora.merge"]),
        ("optim.schedule is constant", optim.schedule == "constant", ["optim.decay_steps", "optim.min_lr"]),
        ("optim.warmup_steps is given", optim.warmup_steps is not None, ["optim.warmup_ratio"]),
        ("there is no warm-up", warm_up == 0, ["optim.init_lr"]),
        (f"distill.kind is {distill.kind}", vectors, ["distill.student_temperature", "distill.teacher_temperature"]),
        ("distill.contrastive_weight is 0", distill.contrastive_weight == 0, [f"loss.{name}" for name in of_contrast]),
        ("eval.data is null", evaluation.data is None, ["eval.measures"]),
        ("nothing is evaluated", nothing, ["eval.every_steps", "eval.at_start", "eval.split"]),
    ]
    values = flatten(config)
    lines = ["the weight of a source is not used: data.train is one"] if weighted and len(data.sources) == 1 else []
    return lines + [
        f"{key} is {shown(values[key])}, which is not used: {why}"
        for why, holds, keys in idle
        for key in keys
        if holds and values[key] != default(key)
    ]


def dump(config: Config) -> str:
    """Return every field, defaults included, as YAML that `config_file.load` reads back to an equal configuration."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def differences(config: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Return the keys that make two configurations different runs, with both values; a resume may change the rest."""
    ours, theirs = flatten(config), flatten(other)
    return {
        key: (ours[key], theirs[key])
        for key in ours
        if not {key, key.split(".")[0]} & MAY_CHANGE and ours[key] != theirs[key]
    }
