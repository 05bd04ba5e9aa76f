"""What other libraries call our arguments, for the error about an unknown one. Needs Python alone."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_GATHER = 'negatives="gather", the default, or "local"'
_OBJECTIVE = "objective=Objective({})"
OTHER_NAMES = {
    "scale": "temperature, which is 1 / scale",
    "logit_scale": "temperature, which is 1 / scale",
    "gather_across_devices": _GATHER,
    "negatives_x_device": _GATHER,
    "negatives_cross_device": _GATHER,
    "gather_with_grad": _GATHER,
    "preserve_grad": 'negatives="gather", the default: remote passages always have their gradient',
    "mini_batch_size": "micro_batch_tokens, which counts tokens, not rows",
    "mini_batch_num_tokens": "micro_batch_tokens",
    "chunk_sizes": "micro_batch_tokens, which counts tokens, not rows",
    "directions": _OBJECTIVE.format("directions=..."),
    "partition_mode": _OBJECTIVE.format("partition=..."),
    "hardness_mode": _OBJECTIVE.format("hardness_mode=..., hardness_strength=..."),
    "hardness_strength": _OBJECTIVE.format("hardness_mode=..., hardness_strength=..."),
    "matryoshka_dims": _OBJECTIVE.format("matryoshka_dims=..."),
    "similarity_fct": "embeddings normalised before: scores are dot products, cosines of unit vectors",
    "labels": "positives, columns of the local passages",
    "process_group": "group",
}


def explains_other_names(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function to answer another library's keyword with a TypeError that names ours."""

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> T:
        if wrong := options.keys() & OTHER_NAMES.keys():
            name = min(wrong)
            raise TypeError(f"{function.__qualname__.split('.')[0]} has no {name}: give {OTHER_NAMES[name]}")
        return function(*args, **options)

    return call
