"""Reading a configuration: a YAML file first, command-line options over it, unknown keys and wrong types refused."""

import argparse
import difflib
import re
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, set_parsing_settings  # pyright: ignore

from inbatch.train.config import GROUPS, Config

# What other trainers call a field, for the suggestion in the message about an unknown key.
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


def leaf_keys() -> list[str]:
    """Every option by its full name, such as "optim.lr"."""
    return [f"{group}.{f.name}" for group, cls in GROUPS.items() for f in fields(cls)]


def build_parser() -> ArgumentParser:
    """The jsonargparse parser of all groups: it knows the types and writes the help."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="inbatch train CONFIG", exit_on_error=False, default_env=False)
    parser.add_argument("--config", action=ActionConfigFile, help=argparse.SUPPRESS)
    for group, cls in GROUPS.items():
        parser.add_class_arguments(cls, group, help=(cls.__doc__ or "").strip())
    return parser


def load(path: str | Path | None, overrides: list[str] | None = None) -> Config:
    """The configuration of a YAML file (None: no file) with options such as ["--optim.lr", "1e-4"] over it.

    Raises ValueError with one line for a missing file, bad YAML, an unknown key (with the nearest known one), a wrong
    type or a missing required key.
    """
    tree = {} if path is None else _read_yaml(Path(path))
    source = "the configuration" if path is None else str(path)
    for group, values in tree.items():
        for name in values:
            _check_known(f"{group}.{name}", source)
    arguments = list(overrides or [])
    for argument in arguments:
        if argument.startswith("--"):
            _check_known(argument[2:].split("=", 1)[0].removesuffix("+"), "the command line")
    return _parse(None if path is None else Path(path), arguments)


class _DistinctKeys(yaml.SafeLoader):
    """PyYAML keeps the last of equal keys and says nothing of the others; YAML itself does not allow them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            first = seen.setdefault((key.tag, key.value), key)
            if first is not key:
                problem = f"the key {key.value!r} stands in line {first.start_mark.line + 1} already; keep one of them"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"config file {path} does not exist")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _DistinctKeys)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): save it in that encoding") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{where} is not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no configuration: expected groups such as `optim:` with keys below them")
    for group, values in tree.items():
        if group not in GROUPS:
            raise ValueError(f"{path}: unknown group {group!r}{_suggest(str(group), [*GROUPS, *leaf_keys()])}")
        if not isinstance(values, dict):
            given = "empty" if values is None else repr(values)
            raise ValueError(f"{path}: {group} is {given}, expected keys below it, such as {_first_key(group)!r}")
    return tree


def _first_key(group: str) -> str:
    return fields(GROUPS[group])[0].name


def _check_known(key: str, source: str) -> None:
    if key in ("help", "h") or key in leaf_keys():
        return
    raise ValueError(f"{source}: unknown key {key!r}{_suggest(key, leaf_keys())}")


def _suggest(key: str, known: list[str]) -> str:
    """The nearest known key: the same name in another group or in another trainer, then the nearest spelling."""
    by_name = {**_OTHER_NAMES, **{k.split(".")[-1]: k for k in known}}
    name = key.split(".")[-1]
    near = difflib.get_close_matches(name, by_name, n=1, cutoff=0.75) or difflib.get_close_matches(key, known, n=1)
    if not near:
        return "; `inbatch train --help` lists every key"
    return f"; did you mean {by_name.get(near[0], near[0])!r}?"


def _parse(path: Path | None, arguments: list[str]) -> Config:
    file_arguments = [] if path is None else ["--config", str(path)]
    try:
        parsed = build_parser().parse_args([*file_arguments, *arguments]).as_dict()
    except ArgumentError as error:
        raise ValueError(_one_line(str(error))) from None
    return Config(**{group: cls(**parsed[group]) for group, cls in GROUPS.items()})


def _one_line(message: str) -> str:
    """jsonargparse explains a wrong value over many lines; users need the key, the type and what they gave."""
    key = re.search(r'[Kk]ey "([\w.]+)"', message)
    given = re.search(r"(?:Got value|Given value): (.*)", message)
    if key and given and key.group(1) in leaf_keys():
        group, name = key.group(1).split(".")
        return f"{group}.{name} is {given.group(1)}: expected {_in_words(get_type_hints(GROUPS[group])[name])}"
    missing = re.search(r"arguments are required: ([\w., ]+)", message)
    if missing:
        return f"missing from the configuration: {missing.group(1)}; set it in the file or as an option"
    return " ".join(message.split())


def _in_words(kind: Any) -> str:
    """A type as users read it in the message about a wrong value."""
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return " or ".join(repr(value) for value in arguments)
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_in_words(argument) for argument in arguments)
    if arguments:
        return str(kind)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return words.get(kind, str(kind))
