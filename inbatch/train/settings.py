"""Frozen dataclasses of settings, checked by pydantic; each mistake is one line.

A group is a class. Its fields are keys such as "optim.lr": their names in the file, on the command line and in
messages. A message names the key, what was given and what is expected.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import dataclass_transform, get_type_hints, is_typeddict

Class = TypeVar("Class")

GROUPS: dict[str, type] = {}
"""The groups by name, in the order in which they are declared."""

# What other trainers call a key, for the suggestion in the message about an unknown one.
_OTHER_NAMES = {
    "batch_size": "train.global_batch_size",
    "per_device_train_batch_size": "train.global_batch_size",
    "gradient_accumulation_steps": "train.accumulation_steps",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "bf16": "train.precision",
    "mini_batch_num_tokens": "train.micro_batch_tokens",
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.schedule",
    "clip_grad_norm": "optim.max_grad_norm",
    "q_max_len": "data.query_max_len",
    "p_max_len": "data.passage_max_len",
    "n_passages": "data.train_n_passages",
    "train_group_size": "data.train_n_passages",
    "query_instruction": "data.query_prefix",
    "train_file": "data.train",
    "train_data": "data.train",
    "normalize": "model.l2_normalize",
    "pretrained_model_name_or_path": "model.name_or_path",
    "model_name_or_path": "model.name_or_path",
    "model_name": "model.name_or_path",
    "gather_across_devices": "loss.negatives",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep_last",
    "eval_steps": "eval.every_steps",
    "logging_steps": "train.log_every",
    "fsdp": "train.parallel",
    "torch_compile": "train.compile",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target_modules",
    "untie_encoder": "model.separate_towers",
}


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


# The expectation by pydantic's name of the mistake.
_LIMITS = {
    "greater_than": "a positive number",  # of Field(gt=0), the only one in use
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "finite_number": "a finite number",
}

# YAML 1.1 takes 1e-4 for text.
Number = Annotated[float, BeforeValidator(_number)]


class SettingsError(ValueError):
    """Report mistakes in the settings of a group: messages by key (or under the group's name), and the missing keys."""

    def __init__(self, wrong: Mapping[str, str], missing: Sequence[str] = ()):
        self.wrong, self.missing = wrong, missing
        lines = [*wrong.values()]
        if missing:
            lines.append(f"missing from the configuration: {', '.join(missing)}; set it in the file or as an option")
        super().__init__("; ".join(lines))


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def settings(group: str) -> Callable[[Class], Class]:
    """Return a decorator that makes a class the group of this name, a frozen dataclass.

    Types are strict: no number stands for true or for text. The constructor raises SettingsError.
    """
    config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    def decorate(cls: Any) -> Any:
        made: Any = dataclass(frozen=True, kw_only=True, config=config)(cls)
        validate = made.__init__

        def __init__(self, **values: Any) -> None:
            try:
                validate(self, **values)
            except ValidationError as error:
                raise _explained(error, group, values) from None

        made.__init__ = __init__
        GROUPS[group] = made
        return made

    return decorate


def keys() -> list[str]:
    """Return every key, such as "optim.lr"."""
    return [f"{group}.{name}" for group, cls in GROUPS.items() for name in get_type_hints(cls)]


def kind(key: str) -> Any:
    """Return the type of a key."""
    group, name = key.split(".")
    return get_type_hints(GROUPS[group])[name]


def default(key: str) -> Any:
    """Return the default of a key that is not required."""
    group, name = key.split(".")
    return GROUPS[group].__pydantic_fields__[name].get_default()  # type: ignore[attr-defined]


def members(kind: Any) -> tuple[Any, ...]:
    """Return the alternative types of a value."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _explained(error: ValidationError, group: str, values: Mapping[str, Any]) -> SettingsError:
    wrong: dict[str, str] = {}
    missing = []
    for detail in error.errors(include_url=False):
        if not detail["loc"]:  # of a __post_init__
            wrong[group] = str(detail.get("ctx", {})["error"])
            continue
        name = str(detail["loc"][0])
        key = f"{group}.{name}"
        if detail["type"] == "missing" and len(detail["loc"]) == 1:
            missing.append(key)
        elif detail["type"] == "unexpected_keyword_argument":
            wrong[key] = unknown(key)
        elif within := _within(detail, kind(key)):
            wrong[key] = f"{key}: {within}"
        elif key not in wrong:  # a union has a mistake for each of its members
            wrong[key] = f"{key} {_expected(detail, values[name], kind(key))}"
    return SettingsError(wrong, missing)


def _within(detail: Any, kind_: Any) -> str | None:
    """Return the message about a key of a mapping that the value is or holds; None for other mistakes."""
    holder, name = ["", *detail["loc"]][-2:]
    known = next((get_type_hints(one) for one in members(kind_) if is_typeddict(one) and one.__name__ == holder), None)
    if known is None:
        return None
    if name not in known:
        return f"unknown key {name!r}, expected {', '.join(known)}"
    if detail["type"] == "missing":
        return f"{name} is missing"
    return f"{name} {_expected(detail, detail['input'], known[name])}"


def _expected(detail: Any, value: Any, kind_: Any) -> str:
    """Return the message about a value: the limit that it exceeds, or the expected type in words."""
    or_null = ", or null" if type(None) in members(kind_) else ""
    if detail["type"] in ("too_short", "string_too_short") and len(value) == 0:
        return f"is empty: name at least one{or_null}"
    words = _LIMITS.get(detail["type"])
    expected = in_words(kind_) if words is None else words.format(**detail.get("ctx", {})) + or_null
    return f"is {shown(value)}: expected {expected}"


def unknown(key: str) -> str:
    """Return the message about a key that does not exist, with the nearest one that does.

    The same name in another group or in another trainer comes first, then the nearest spelling.
    """
    known = keys()
    by_name = {**_OTHER_NAMES, **{k.split(".")[-1]: k for k in known}}
    name = key.split(".")[-1]
    near = difflib.get_close_matches(name, by_name, n=1, cutoff=0.75) or difflib.get_close_matches(key, known, n=1)
    remedy = f"did you mean {by_name.get(near[0], near[0])!r}?" if near else "`inbatch train --help` lists every key"
    return f"unknown key {key!r}; {remedy}"


def shown(value: Any) -> str:
    """Return a value as YAML spells it, cut to a readable length."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def in_words(kind: Any) -> str:
    """Return a type as users read it."""
    parts = get_args(kind)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if get_origin(kind) is Literal:
        return " or ".join(repr(value) for value in parts)
    if len(members(kind)) > 1:
        return " or ".join(in_words(part) for part in parts)
    if get_origin(kind) is list:
        return f"[{in_words(parts[0])}, ...]"
    if get_origin(kind) is tuple:
        return f"[{', '.join(in_words(part) for part in parts)}]"
    if get_origin(kind) is dict:
        return f"{{name: {in_words(parts[1])}, ...}}"
    if is_typeddict(kind):
        return f"{{{', '.join(get_type_hints(kind))}}}"
    return words[kind]
