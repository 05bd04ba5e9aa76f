"""A recipe of NeMo AutoModel from its file, with overrides in its names, as a configuration of ours."""

from collections.abc import Sequence
from typing import Any

from inbatch.integrations.nemo import translate
from inbatch.train.config import Config
from inbatch.train.config_file import build, read_recipe, read_value
from inbatch.train.settings import GROUPS

# Groups of ours whose names a recipe may not have; the others are in both.
_OURS = GROUPS.keys() - {"model", "checkpoint"}


def load_recipe(path: str, overrides: Sequence[str], *, world_size: int) -> tuple[Config, list[str]]:
    """Return the configuration, and the recipe's names that are not used."""
    recipe, ours = read_recipe(path), []
    arguments = iter(overrides)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not key.startswith("--"):
            raise ValueError(f"unrecognized arguments: {argument}")
        value = value if equals else next(arguments, None)
        if value is None:
            raise ValueError(f"{key} has no value: expected one behind it")
        if key[2:].split(".")[0] in _OURS:
            ours += [key, value]
        else:
            _set(recipe, key[2:], read_value(value, key))
    tree, unused = translate(recipe, world_size=world_size)
    return build(tree, ours), unused


def _set(recipe: dict[str, Any], key: str, value: Any) -> None:
    *path, name = key.split(".")
    for part in path:
        if not isinstance(recipe.get(part), dict):
            recipe[part] = {}
        recipe = recipe[part]
    recipe[name] = value
