"""Folders of multi-vector models in the forms of PyLate, which sentence-transformers opens too, and of the latter.

Written: PyLate's form. Both projects then score alike.
"""

import string
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from inbatch.encoder.folder_settings import Settings, file_within, settings_of, usual_files, write_files
from inbatch.encoder.multi_vector import LENGTHS, TASKS, MultiVector, prefix_token

_IDENTITY = "torch.nn.modules.linear.Identity"
# Arguments of PyLate's encode, which ignores them in a folder, and what a setting of each must be.
_POOLING = {"pool_factor": "a positive integer", "protected_tokens": "an integer of at least 0"}
DENSE = "pylate.models.Dense.Dense"


def read_top(top: Settings, *, native: bool) -> dict[str, Any]:
    """Return fields of Layout that PyLate keeps in config_sentence_transformers.json, and "prefixes" by task.

    native: sentence-transformers wrote it, and keeps them with its modules.
    """
    if native:
        top.require("similarity_fn_name", "maxsim", None)
        return {"multi_vector": MultiVector(query_expansion=False, skip_words=()), "prefixes": {}}
    top.ignore("similarity_fn_name")  # MaxSim, or what a model of one vector left there
    prefixes = {task: top.take(f"{task}_prefix", "text") for task in TASKS}
    expansion, attend = (
        top.take(name, "true or false") for name in ("do_query_expansion", "attend_to_expansion_tokens")
    )
    words = top.take("skiplist_words", "text or a list of texts")
    options = MultiVector(
        query_expansion=expansion is not False,
        attend_to_expansion=bool(attend) and expansion is not False,
        skip_words=tuple(string.punctuation if words is None else words),
    ).replaced({name: top.take(name, kind) for name, kind in _POOLING.items()})
    lengths = {f"{task}_length": top.take(f"{task}_length", "a positive integer") or LENGTHS[task] for task in TASKS}
    return {"multi_vector": options, "prefixes": {t: p or "" for t, p in prefixes.items()}, **lengths}


def read_modules(folder: Path, modules: list[tuple[str, str]], options: MultiVector) -> tuple[MultiVector, list[str]]:
    """Return the options with what (kind, path) of the modules behind the Transformer say, and the paths of Dense ones.

    Raises ValueError for modules in another order, and for what they can do and TokenVectors cannot.
    """
    kinds, dense = [kind for kind, _ in modules], []
    tail = kinds[kinds.count("Dense") :]
    pools = tail[-1:] == ["HierarchicalTokenPooling"]
    tail = tail[: len(tail) - pools]
    if kinds[:1] != ["Dense"] or sorted(tail) not in ([], ["MultiVectorMask", "Normalize"]):
        raise ValueError(
            f"{folder}: a multi-vector model of the modules {['Transformer', *kinds]!s:.200}; expected Transformer, "
            "Dense, MultiVectorMask, Normalize, HierarchicalTokenPooling"
        )
    for kind, path in modules:
        settings = settings_of(folder, str(Path(path, "config.json")))
        if kind == "Dense":
            dense.append(path)
            settings.require("activation_function", _IDENTITY)
            settings.require("use_residual", False)
            settings.ignore("in_features", "bias")
            options = replace(options, dim=settings.take("out_features", "a positive integer") or options.dim)
        if kind == "MultiVectorMask":
            words = settings.take("skiplist_words", "text or a list of texts") or ()
            settings.require("skiplist_tasks", ["document"])
            settings.require("keep_only_token_ids", None)
            options = replace(options, skip_words=tuple(words))
        elif kind == "HierarchicalTokenPooling":
            settings.require("tasks", ["document"])
            theirs = {"pool_factor": "pool_factor", "protected_tokens": "num_protected_tokens"}
            options = options.replaced({ours: settings.take(theirs[ours], kind) for ours, kind in _POOLING.items()})
        else:
            settings.require("module_input_name", "token_embeddings")
            settings.require("module_output_name", "token_embeddings", None)
        settings.done()
    return options, dense


def read_expansion(settings: Settings, lengths: dict[str, Any], options: MultiVector) -> MultiVector:
    """Return the options with the query expansion that sentence-transformers' Transformer module says, if any."""
    given = settings.take("query_expansion", "an object")
    if given is None:
        return options
    expansion = settings.within("query_expansion.", given)
    expansion.require("strategy", "fixed")
    expansion.require("token", None)
    attend, length = expansion.take("attend", "true or false"), expansion.take("length", "a positive integer")
    expansion.done()
    lengths["query_length"] = length or LENGTHS["query"]
    return replace(options, query_expansion=True, attend_to_expansion=bool(attend))


def load_projection(folder: Path, dense: list[str], dtype: torch.dtype) -> nn.Sequential:
    """Return the layers in these folders; ValueError where weights are missing or do not fit one another."""
    layers: list[nn.Linear] = []
    for name in dense:
        path = file_within(folder, str(Path(name, "model.safetensors")))
        try:
            if path.is_file():
                weights = load_file(path)
            else:
                weights = torch.load(path.with_name("pytorch_model.bin"), map_location="cpu", weights_only=True)
            weight, bias = weights["linear.weight"], weights.get("linear.bias")
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=dtype)
            layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
        except Exception as error:  # a damaged file raises whatever it runs into
            raise ValueError(f"{path.parent}: its projection cannot be read: {str(error)[:200]}") from error
        if layers and layers[-1].out_features != layer.in_features:
            raise ValueError(f"{path.parent}: a projection of {layer.in_features} numbers behind one to "
                             f"{layers[-1].out_features}")  # fmt: skip
        layers.append(layer)
    return nn.Sequential(*layers)


def write_multi_vector(
    folder: Path, layout: Any, tokenizer: PreTrainedTokenizerBase, layers: dict[str, Tensor]
) -> None:
    """Write all but the backbone's and the tokenizer's files; layers: the state of the projection."""
    prefixes = {task: prefix_token(tokenizer, layout.prompts.get(task, "")) for task in TASKS}
    prompts = {name: text.removeprefix(prefixes.get(name, "")) for name, text in layout.prompts.items()}
    options: MultiVector = layout.multi_vector
    numbers = sorted({int(name.split(".")[0]) for name in layers})
    modules = [("", "sentence_transformers.models.Transformer")] + [(f"{n + 1}_Dense", DENSE) for n in numbers]
    files = usual_files(layout, modules, model_type="ColBERT", prompts=prompts, similarity="MaxSim")
    files["config_sentence_transformers.json"] |= {
        **{f"{task}_prefix": prefix for task, prefix in prefixes.items()},
        "query_length": layout.query_length,
        "document_length": layout.document_length,
        "do_query_expansion": options.query_expansion,
        "attend_to_expansion_tokens": options.attend_to_expansion,
        "skiplist_words": list(options.skip_words),
        **({name: getattr(options, name) for name in _POOLING} if options.pool_factor > 1 else {}),
    }
    for number in numbers:
        weights = {f"linear.{kind}": layers.get(f"{number}.{kind}") for kind in ("weight", "bias")}
        present = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items() if tensor is not None}
        place = folder / f"{number + 1}_Dense"
        place.mkdir(parents=True, exist_ok=True)
        save_file(present, place / "model.safetensors")
        files[f"{number + 1}_Dense/config.json"] = {
            "in_features": present["linear.weight"].shape[1],
            "out_features": present["linear.weight"].shape[0],
            "bias": "linear.bias" in present,
            "activation_function": _IDENTITY,
            "use_residual": False,
        }
    write_files(folder, files)
