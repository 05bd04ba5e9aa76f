"""Reading a configuration: a YAML file first, command-line options over it, each mistake in one line with its place."""

import argparse
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import yaml
from typing_extensions import is_typeddict

from inbatch.train.config import Config
from inbatch.train.settings import GROUPS, SettingsError, in_words, keys, kind, members, shown, unknown

_MAX_BYTES, _MAX_DEPTH = 1 << 20, 8


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of a YAML file (None: no file) with options such as ["--optim.lr", "1e-4"] over it.

    Raises ValueError with one line for a missing or damaged file, an unknown key (with the nearest known one), a value
    of a wrong type or out of range, a missing required key.
    """
    tree, lines = ({}, {}) if path is None else _read_file(Path(path))
    return build(tree, overrides, lines={key: f"{path} line {line}" for key, line in lines.items()})


def build(tree: dict[str, Any], overrides: Sequence[str] = (), *, lines: Mapping[str, str] | None = None) -> Config:
    """Return the configuration of {group: {key: value}}, and options over it; lines: where each key was read."""
    lines = lines or {}
    options = _read_options(overrides)
    for key, value in options.items():
        group, name = key.split(".")
        tree.setdefault(group, {})[name] = value
    groups, wrong, missing = {}, {}, []
    for group, cls in GROUPS.items():
        try:
            groups[group] = cls(**tree.get(group, {}))
        except SettingsError as error:
            wrong |= error.wrong
            missing += error.missing
    for key in wrong.keys() & lines.keys() - options.keys():
        wrong[key] = f"{lines[key]}: {wrong[key]}"
    if wrong or missing:
        raise SettingsError(wrong, missing)
    return Config(**groups)


# ---- the file


class _Loader(yaml.SafeLoader):
    """Refuse YAML that misleads: a key twice, an alias (which can stand for gigabytes), a tag, deep nesting."""

    depth = 0
    aliases = False

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if self.check_event(yaml.AliasEvent) and not self.aliases:
            self._refuse(f"*{event.anchor} is an alias: write the value out", event)
        if getattr(event, "tag", None) is not None:
            self._refuse(f"{event.tag} is a tag: leave it out", event)
        if self.depth == _MAX_DEPTH:
            self._refuse(f"nested more than {_MAX_DEPTH} deep", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError) as error:  # a date of month 13, a number of 5000 digits
            self._refuse(f"{shown(node.value)} cannot be read ({error}): put text in quotes", node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (first := seen.setdefault((key.tag, key.value), key)) is not key:
                self._refuse(f"the key {key.value!r} stands in line {first.start_mark.line + 1} already", key)
        return super().construct_mapping(node, deep)

    @staticmethod
    def _refuse(problem: str, where: Any) -> None:
        raise yaml.constructor.ConstructorError(problem=problem, problem_mark=where.start_mark)


class _AliasLoader(_Loader):
    """Allow aliases too, each of which stays a single object: for files whose values are not walked through."""

    aliases = True


def _read_yaml(text: str, source: str, loader_class: type[_Loader] = _Loader) -> tuple[Any, yaml.Node | None]:
    """Return the value that a YAML text stands for, and its node, which knows the lines."""
    try:
        loader = loader_class(text)
        node = loader.get_single_node()
        return (None if node is None else loader.construct_document(node)), node
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = " ".join((getattr(error, "problem", None) or str(error)).split())
        raise ValueError(f"{source}{where} is not YAML as a configuration may use it: {problem}") from None


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Return the content of another trainer's YAML file; ValueError unless it is a mapping of names."""
    tree, _ = _read_yaml(_read_text(Path(path)), str(path), _AliasLoader)
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise ValueError(f"{path} holds no recipe: expected names such as `model:` with keys below them")
    return tree


def read_value(text: str, source: str) -> Any:
    """Return the value of a text on the command line, as YAML reads it, else the text."""
    if text[:1] + text[-1:] in ("[]", "{}"):
        return _read_yaml(text, source)[0]
    try:
        value, _ = _read_yaml(text, source)
    except ValueError:
        return text
    return text if isinstance(value, (dict, list)) else value


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"config file {path} {'is a folder' if path.is_dir() else 'does not exist'}")
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"{path} holds more than {_MAX_BYTES >> 20} MiB: expected the YAML file of a configuration")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): save it in that encoding") from None


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return what a file holds by group, and the line of each group and key."""
    tree, node = _read_yaml(_read_text(path), str(path))
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no configuration: expected groups such as `optim:` with keys below them")
    assert isinstance(node, yaml.MappingNode)
    lines: dict[str, int] = {}
    for (group, values), (name, below) in zip(tree.items(), node.value, strict=True):
        where = f"{path} line {name.start_mark.line + 1}"
        if group not in GROUPS:
            near = difflib.get_close_matches(str(group), GROUPS, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(GROUPS)}"
            raise ValueError(f"{where}: unknown group {group!r}; {remedy}")
        if not isinstance(values, dict):
            given, first = "empty" if values is None else shown(values), next(iter(get_type_hints(GROUPS[group])))
            raise ValueError(f"{where}: {group} is {given}, expected keys below it, such as {first!r}")
        lines[group] = name.start_mark.line + 1
        for key, _ in below.value:
            lines[f"{group}.{key.value}"] = key.start_mark.line + 1
        if unnamed := [key for key in values if not isinstance(key, str)]:
            raise ValueError(f"{where}: {group} has the key {shown(unnamed[0])}, which is no name")
    return tree, lines


# ---- the command line


def _read_options(overrides: Sequence[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for key in keys():
        parser.add_argument(f"--{key}")
    try:
        given, rest = parser.parse_known_args(list(overrides))
    except argparse.ArgumentError as error:
        raise ValueError(f"{(error.argument_name or '').lstrip('-')}: {error.message}") from None
    for argument in rest:
        if argument.startswith("--"):
            raise ValueError(f"the command line: {unknown(argument[2:].split('=', 1)[0])}")
        raise ValueError(f"unrecognized arguments: {argument} (CONFIG comes first, then options: --group.key value)")
    return {key: _typed(key, text) for key, text in vars(given).items() if text is not None}


def _typed(key: str, text: str) -> Any:
    """Return an option's value. A field that takes text takes it as it was typed; anything else is YAML.

    null, where a field may be null, is null. A list or a mapping is in brackets.
    """
    types = members(kind(key))
    if text == "null" and type(None) in types:
        return None
    bracketed = text[:1] + text[-1:] in ("[]", "{}")
    structured = any(get_origin(type_) in (list, dict) or is_typeddict(type_) for type_ in types)
    return text if str in types and not (bracketed and structured) else _read_yaml(text, f"--{key}")[0]


def help_text() -> str:
    """Return the help of every key: its type, its meaning and its default."""
    parser = argparse.ArgumentParser(add_help=False, usage=argparse.SUPPRESS)
    for group, cls in GROUPS.items():
        section = parser.add_argument_group(group, cls.__doc__)
        for name, field in cls.__pydantic_fields__.items():  # type: ignore[attr-defined]
            usual = "required" if field.is_required() else f"default: {shown(field.get_default())}"
            text = f"{field.description} ({usual})".replace("%", "%%")
            section.add_argument(f"--{group}.{name}", metavar=in_words(kind(f"{group}.{name}")), help=text)
    return parser.format_help()
