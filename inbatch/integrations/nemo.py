"""NeMo AutoModel's bi-encoder recipes as settings of ours: the translation of one dictionary into another.

`inbatch train --from-nemo RECIPE.yaml` trains one. Every key is used, named as not used, or refused by its name.
"""

import re
from collections.abc import Mapping
from typing import Any

# What changes no number but rounding, or is measured and logged elsewhere here.
_UNUSED = re.compile(
    r"""
    ci | rng | wandb | mlflow | comet | compile | bi_encoder_optimization
    | eval_negative_size | dist_env[.]backend
    | validation_dataset[.].+ | validation_dataloader[.]((?!collate_fn|dataset)\w+|collate_fn[.].+)
    | step_scheduler[.](val_every_steps|save_checkpoint_every_epoch|num_epochs)
    | model[.](use_liger_kernel|use_sdpa_patching|sdpa_method|out_dimension)
    | tokenizer[.](_target_|padding_side|force_hf|use_fast)
    | dataset[.](eval_negative_size|use_dataset_instruction|use_text_in_document)
    | dataloader[.](_target_|batch_size|pin_memory|persistent_workers|prefetch_factor|drop_last)
    | dataloader[.]collate_fn[.](padding|pad_to_multiple_of)
    | optimizer[.](master_weights|fused|foreach)
    | checkpoint[.](model_save_format|save_consolidated|is_async|best_metric_key)
    | distributed[.](_target_|backend|dp_replicate_size|mp_policy|offload_policy|sequence_parallel)
    | distributed[.]defer_fsdp_grad_sync | peft[.](_target_|use_triton)
    """,
    re.VERBOSE,
)

# The only value of a key with which the run is the same here; None: its absence.
_ONLY: dict[str, Any] = {
    "model.extract_submodel": None,
    "model.share_encoder": True,
    "model.add_linear_pooler": False,
    # The model's own tokenizer decides.
    "tokenizer.add_bos_token": False,
    "tokenizer.add_eos_token": False,
    "tokenizer.trust_remote_code": False,
    "dataset.model_type": "bi_encoder",
    "dataset.data_type": "train",
    "dataset.max_train_samples": None,
    "dataset.train_data_select_offset": 0,
    "dataset.cycle_positive_docs": False,
    "validation_dataset.data_type": "eval",
    "optimizer.adam_w_mode": True,
    "optimizer.bias_correction": True,
    "optimizer.amsgrad": False,
    "checkpoint.restore_from": None,
    "distributed.tp_size": 1,
    "distributed.cp_size": 1,
    "distributed.pp_size": 1,
    "peft.exclude_modules": [],
    "peft.use_dora": False,
}
_TARGETS = {
    "recipe": "TrainBi-?EncoderRecipe",
    "model._target_": "BiEncoder",
    "dataset._target_": "Retrieval_?Dataset",
    "dataloader.collate_fn._target_": "BiEncoderCollator",
    "optimizer._target_": "AdamW|FusedAdam",
}
_POOLINGS = {"avg": "mean", "weighted_avg": "mean", "cls": "cls", "last": "last"}
_PRECISIONS = {"auto": "auto", "bfloat16": "bf16", "bf16": "bf16", "float32": "fp32", "fp32": "fp32"}


def translate(recipe: Mapping[str, Any], *, world_size: int = 1) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the settings {group: {key: value}} of a recipe for so many processes, and the names that are not used.

    The recipe is what its YAML file holds, in today's nesting or with `dataloader.dataset`. Raises ValueError for a
    key or a value that would make another run of it here.
    """
    keys = _Keys(recipe)
    for key, pattern in _TARGETS.items():
        if (name := keys.take(key)) is not None and not re.search(pattern, str(name), re.IGNORECASE):
            raise ValueError(f"{key} is {name}: only bi-encoders are trained from a recipe, with AdamW")
    for key, only in _ONLY.items():
        if (value := keys.take(key, default=only)) != only:
            remedy = "leave it out" if only is None else f"expected {only!r}"
            raise ValueError(f"{key} is {value!r}, with which the run would be another one here: {remedy}")
    distributed = keys.take("model.do_distributed_inbatch_negative", default=False)
    detached = keys.take("model.detach_distributed_inbatch_negatives", default=True)
    data = _data(keys, distributed)
    tree = {
        "model": _model(keys),
        "lora": _lora(keys),
        "data": data,
        "eval": _validation(keys, data["instructions"]),
        "loss": _loss(keys, distributed, detached),
        "optim": _optim(keys),
        "train": _train(keys, world_size),
        "checkpoint": _checkpoint(keys),
    }
    return tree, keys.rest()


class _Keys:
    """The keys of a recipe with their dotted names, each taken once; null is absence."""

    def __init__(self, recipe: Mapping[str, Any]):
        self.given: dict[str, Any] = {}
        self._flatten("", recipe)
        # The older nesting, and names that have moved since.
        moved = {f"{of}dataloader.dataset.": f"{of}dataset." for of in ("", "validation_")}
        moved |= {f"{of}dataset.train_n_passages": f"{of}dataset.n_passages" for of in ("", "validation_")}
        moved |= {"train_n_passages": "dataset.n_passages", "recipe._target_": "recipe"}
        for old, new in moved.items():
            for key in [key for key in self.given if key.startswith(old)]:
                value, name = self.given.pop(key), new + key[len(old) :]
                if self.given.setdefault(name, value) != value:
                    raise ValueError(f"{key} is {value!r} and {name} is {self.given[name]!r}: leave one out")
        self._left = dict(self.given)

    def _flatten(self, prefix: str, values: Mapping[Any, Any]) -> None:
        for name, value in values.items():
            key = f"{prefix}{name}"
            if isinstance(value, Mapping) and not _UNUSED.fullmatch(key):
                self._flatten(f"{key}.", value)
            elif value not in (None, "none", "null", "None"):
                self.given[key] = value
            if len(self.given) > 1000:
                raise ValueError("the recipe has more than 1000 keys")

    def take(self, key: str, *, default: Any = None) -> Any:
        """Return the value of a key, the default where it is absent; ValueError unless it is of the default's kind."""
        value = self._left.pop(key, default)
        kinds = {bool: bool, int: int, str: str, list: (list, str)}.get(type(default), object)
        if not isinstance(value, kinds):
            raise ValueError(f"{key} is {value!r}: expected a value such as {default!r}")
        return value

    def sources(self, key: str) -> list[dict[str, Any]]:
        """Return the sources that a key lists, each as a mapping."""
        listed = self._left.pop(key, [])
        listed = listed if isinstance(listed, list) else [listed]
        if wrong := [source for source in listed if not isinstance(source, (str, Mapping))]:
            raise ValueError(f"{key} has {wrong[0]!r}: expected paths")
        return [{"path": source} if isinstance(source, str) else dict(source) for source in listed]

    def number(self, key: str, *, default: float) -> float:
        """Return a number, which YAML 1.1 may have read as text: it takes 1e-5 for such."""
        value = self._left.pop(key, default)
        try:
            return float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{key} is {value!r}: expected a number") from None

    def rest(self) -> list[str]:
        """Return the names that are not used; ValueError where one of them may matter."""
        for key in self._left:
            if not _UNUSED.fullmatch(key):
                raise ValueError(f"unknown key {key!r} in the recipe: it may change the result, so leave it out")
        return list(self._left)


def _model(keys: _Keys) -> dict[str, Any]:
    name, of_tokenizer = (keys.take(f"{part}.pretrained_model_name_or_path") for part in ("model", "tokenizer"))
    if of_tokenizer not in (None, name):
        raise ValueError(
            f"tokenizer.pretrained_model_name_or_path is {of_tokenizer}: only the model's own, {name}, is read here"
        )
    pooling, normalized = keys.take("model.pooling", default="avg"), keys.take("model.l2_normalize", default=True)
    causal = keys.take("model.is_causal")
    if pooling not in _POOLINGS:
        raise ValueError(f"model.pooling is {pooling}: expected one of {', '.join(_POOLINGS)}")
    if pooling == "weighted_avg" and not normalized:
        # Of length 1 a sum and a mean are the same vector.
        raise ValueError(
            "model.pooling weighted_avg is the sum of the token states, which models saved here cannot say unless "
            "model.l2_normalize is true: set that, or pooling to avg"
        )
    checkpointing = keys.take("distributed.activation_checkpointing", default=False)
    return {
        "name_or_path": name,
        "pooling": _POOLINGS[pooling],
        "l2_normalize": normalized,
        "bidirectional": None if causal is None else not causal,
        "attn_implementation": keys.take("model.attn_implementation"),
        "trust_remote_code": keys.take("model.trust_remote_code", default=False),
        "gradient_checkpointing": keys.take("model.do_gradient_checkpointing", default=False) or checkpointing,
    }


def _lora(keys: _Keys) -> dict[str, Any]:
    names = keys.take("peft.target_modules", default=[])
    names = [re.sub(r"^\*\.?", "", str(name)) for name in ([names] if isinstance(names, str) else names)]
    if keys.take("peft.match_all_linear", default=False) or not names:
        names = "all-linear"
    elif wild := [name for name in names if "*" in name or not name]:
        raise ValueError(f"peft.target_modules has {wild[0]!r}: name the ends of the layers' names, such as q_proj")
    adapted = any(key.startswith("peft.") for key in keys.given)
    return {
        "r": keys.take("peft.dim", default=8 if adapted else None),
        "alpha": keys.take("peft.alpha", default=32),
        "dropout": keys.number("peft.dropout", default=0.0),
        "target_modules": names,
    }


def _data(keys: _Keys, distributed: bool) -> dict[str, Any]:
    sources, seed = keys.sources("dataset.data_dir_list"), keys.take("dataset.seed", default=42)
    if seed != keys.given.get("seed", 42) and any(source.get("num_samples") for source in sources):
        raise ValueError(f"dataset.seed is {seed}, by which num_samples are drawn: give `seed` the same value")
    if not distributed:
        sources = [{**source, "negatives": "own"} for source in sources]
    texts, instructions = _texts(keys, "dataloader")
    reordered = [keys.take("dataset.do_shuffle", default=False), keys.take("dataloader.shuffle", default=True)]
    return {
        "train": sources,
        "mixed_batches": len(sources) > 1,
        "train_n_passages": keys.take("dataset.n_passages", default=5),
        "rotate_passages": False,
        "instructions": instructions,
        "shuffle": any(reordered),
        "drop_last": True,
        "num_workers": keys.take("dataloader.num_workers"),
        **texts,
    }


def _texts(keys: _Keys, loader: str) -> tuple[dict[str, Any], bool]:
    """Return lengths and prefixes of a loader's texts, and whether instructions of the corpus replace the prefixes."""
    collator = f"{loader}.collate_fn"
    prefixes = {side: keys.take(f"{collator}.{side}_prefix", default="") for side in ("query", "passage")}
    instructions = keys.take(f"{collator}.use_dataset_instruction", default=False)
    return {
        "query_max_len": keys.take(f"{collator}.q_max_len", default=512),
        "passage_max_len": keys.take(f"{collator}.p_max_len", default=512),
        # With instructions a text of none has no prefix either.
        **{f"{side}_prefix": f"{text} " if text and not instructions else "" for side, text in prefixes.items()},
    }, instructions


def _validation(keys: _Keys, instructions: bool) -> dict[str, Any]:
    """Return the settings of loss, accuracy and MRR among the candidates of each held-out query, without masks."""
    sources = keys.sources("validation_dataset.data_dir_list")
    if not sources:
        return {}
    if len(sources) > 1:
        raise ValueError(f"validation_dataset.data_dir_list has {len(sources)} sources: expected one")
    texts, has_instructions = _texts(keys, "validation_dataloader")
    if has_instructions != instructions:
        raise ValueError("validation_dataloader.collate_fn.use_dataset_instruction differs from dataloader's: expected "
                         f"{instructions}")  # fmt: skip
    passages = keys.take("validation_dataset.n_passages", default=5)
    negatives = keys.take("validation_dataset.eval_negative_size", default=passages - 1)
    own = {"split": "train", "train_n_passages": negatives + 1, "negatives": "own", "mask_own_negatives": False}
    every = keys.take("step_scheduler.val_every_steps")
    return {"validation": {**sources[0], **own, **texts}, "every_steps": every, "at_start": False}


def _loss(keys: _Keys, distributed: bool, detached: bool) -> dict[str, Any]:
    temperature = keys.number("temperature", default=1.0)
    # Inline records have no ids there, and so no masks.
    by_id = "inline" not in str(keys.given.get("dataset._target_", "")).lower()
    return {
        "temperature": temperature if keys.given.get("model.l2_normalize", True) is not False else 1.0,
        "mask_duplicates": "positive" if distributed and by_id else False,
        "detach_remote": distributed and detached,
    }


def _optim(keys: _Keys) -> dict[str, Any]:
    if over := [key for key in keys.given if key.startswith(("optimizer.param_group_overrides", "optimizer.params"))]:
        raise ValueError(f"{over[0]} is not supported here: weight decay goes to every parameter, as without it")
    rate, plain = keys.number("optimizer.lr", default=1e-3), "torch" in str(keys.given.get("optimizer._target_"))
    settings = {
        "lr": rate,
        "weight_decay": keys.number("optimizer.weight_decay", default=0.01 if plain else 0.0),
        "decay_all": True,
        "betas": keys.take("optimizer.betas", default=[0.9, 0.999]),
        "eps": keys.number("optimizer.eps", default=1e-8),
        "max_grad_norm": keys.number("clip_grad_norm.max_norm", default=1.0),
    }
    if not any(key.startswith("lr_scheduler.") for key in keys.given):
        return {**settings, "schedule": "constant", "warmup_steps": 0}
    steps, style = keys.take("lr_scheduler.lr_warmup_steps"), keys.take("lr_scheduler.lr_decay_style", default="cosine")
    if steps is None:
        raise ValueError("lr_scheduler.lr_warmup_steps is missing: its default depends on the data, so give a number")
    if style not in ("linear", "cosine", "constant"):
        raise ValueError(f"lr_scheduler.lr_decay_style is {style}: expected linear, cosine or constant")
    named = steps or "lr_scheduler.init_lr" in keys.given
    return {
        **settings,
        "schedule": style,
        "warmup_steps": steps,
        "decay_steps": keys.take("lr_scheduler.lr_decay_steps"),
        "init_lr": keys.number("lr_scheduler.init_lr", default=0.1 * rate) if named else None,
        "min_lr": keys.number("lr_scheduler.min_lr", default=0.01 * rate),
    }


def _train(keys: _Keys, world_size: int) -> dict[str, Any]:
    size = keys.take("step_scheduler.global_batch_size", default=32)
    local = keys.take("step_scheduler.local_batch_size", default=1)
    if local < 1 or size % (local * world_size):
        raise ValueError(
            f"step_scheduler.global_batch_size {size} is not divisible by local_batch_size {local} x {world_size} "
            "processes: change one of them"
        )
    wanted = keys.take("distributed.dp_size", default=world_size)
    if wanted != world_size:
        raise ValueError(f"distributed.dp_size is {wanted}, but there are {world_size} processes: leave it out")
    strategy = keys.take("distributed.strategy", default="fsdp2")
    precision = keys.take("model.torch_dtype", default="auto").removeprefix("torch.")
    if strategy not in ("fsdp2", "ddp", "megatron_fsdp"):
        raise ValueError(f"distributed.strategy is {strategy}: expected fsdp2, ddp or megatron_fsdp")
    if precision not in _PRECISIONS:
        raise ValueError(f"model.torch_dtype is {precision}: expected bfloat16 or float32")
    sharded, max_steps = strategy != "ddp", keys.take("step_scheduler.max_steps")
    # Beside max_steps the number of epochs stays among what is not used.
    epochs = 1 if max_steps else keys.take("step_scheduler.num_epochs", default=10)
    return {
        "output_dir": keys.take("checkpoint.checkpoint_dir", default="checkpoints"),
        "global_batch_size": size,
        "accumulation_steps": size // (local * world_size),
        "epochs": epochs,
        "max_steps": max_steps,
        "seed": keys.take("seed", default=42),
        "precision": _PRECISIONS[precision],
        "parallel": "fsdp2" if sharded else "ddp",
        "reshard": keys.take("distributed.reshard_after_forward", default=True) or not sharded,
        "log_every": keys.take("step_scheduler.log_remote_every_steps", default=1),
        "timeout_minutes": keys.take("dist_env.timeout_minutes", default=1),
    }


def _checkpoint(keys: _Keys) -> dict[str, Any]:
    every = keys.take("step_scheduler.ckpt_every_steps", default=100)
    return {
        "every_steps": every if keys.take("checkpoint.enabled", default=True) else None,
        "keep_last": keys.take("checkpoint.max_recent_checkpoints", default=2),
    }
