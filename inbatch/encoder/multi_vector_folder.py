"""Multi-vector models opened, from folders in the forms of PyLate and of sentence-transformers or new, and written.

Written: PyLate's form, which sentence-transformers opens too. Both projects then score alike.
"""

import string
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from inbatch.encoder.folder_settings import Settings, file_within, settings_of, usual_files, write_files
from inbatch.encoder.loading import failing_as
from inbatch.encoder.multi_vector import TASKS, MultiVector, TokenVectors
from inbatch.encoder.pooling import MULTI_VECTOR

if TYPE_CHECKING:
    from inbatch.encoder.st_folder import Folder, Layout

_PREFIXES = {"query": "[Q] ", "document": "[D] "}
_LENGTHS = {"query": 32, "document": 180}
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
    lengths = {f"{task}_length": top.take(f"{task}_length", "a positive integer") or _LENGTHS[task] for task in TASKS}
    return {"multi_vector": options, "prefixes": {t: p or "" for t, p in prefixes.items()}, **lengths}


def read_modules(folder: Path, modules: list[tuple[str, str]], options: MultiVector) -> tuple[MultiVector, list[str]]:
    """Return the options with what (kind, path) of the modules behind the Transformer say, and the paths of Dense ones.

    Raises ValueError for modules in another order, and for what they can do and TokenVectors cannot.
    """
    kinds = [kind for kind, _ in modules]
    tail = kinds[kinds.count("Dense") :]
    pools = tail[-1:] == ["HierarchicalTokenPooling"]
    tail = tail[: len(tail) - pools]
    if kinds[:1] != ["Dense"] or sorted(tail) not in ([], ["MultiVectorMask", "Normalize"]):
        raise ValueError(
            f"{folder}: a multi-vector model of the modules {['Transformer', *kinds]!s:.200}; expected Transformer, "
            "Dense, MultiVectorMask, Normalize, HierarchicalTokenPooling"
        )
    for kind, path in modules:
        settings = settings_of(folder, Path(path, "config.json"))
        if kind == "Dense":
            settings.require("activation_function", _IDENTITY)
            settings.require("use_residual", False)
            settings.ignore("in_features", "bias")
            options = replace(options, dim=settings.take("out_features", "a positive integer") or options.dim)
        if kind == "MultiVectorMask":
            settings.require("skiplist_tasks", ["document"])
            settings.require("keep_only_token_ids", None)
            words = settings.take("skiplist_words", "text or a list of texts")
            options = replace(options, skip_words=tuple(words or ()))
        elif kind == "HierarchicalTokenPooling":
            settings.require("tasks", ["document"])
            theirs = {"pool_factor": "pool_factor", "protected_tokens": "num_protected_tokens"}
            options = options.replaced({ours: settings.take(theirs[ours], kind) for ours, kind in _POOLING.items()})
        else:
            settings.require("module_input_name", "token_embeddings")
            settings.require("module_output_name", "token_embeddings", None)
        settings.done()
    return options, [path for kind, path in modules if kind == "Dense"]


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
    lengths["query_length"] = length or _LENGTHS["query"]
    return replace(options, query_expansion=True, attend_to_expansion=bool(attend))


def with_multi_vector(
    name: str, saved: "Layout", layout: "Layout", given: Mapping[str, Any] | None, l2_normalize: bool | None
) -> "Layout":
    """Return the layout with the options of a multi-vector model; ValueError for what does not go together."""
    given = {key: value for key, value in (given or {}).items() if value is not None}
    if layout.pooling != MULTI_VECTOR:
        if saved.multi_vector is not None:
            raise ValueError(f"pooling {layout.pooling!r}: {name} was saved as a multi-vector model: leave pooling out")
        if given:
            raise ValueError(f"multi_vector is given ({sorted(given)}) for pooling {layout.pooling!r}: set pooling to "
                             f"{MULTI_VECTOR!r}")  # fmt: skip
        return layout
    if l2_normalize is False:
        raise ValueError("l2_normalize=False: a multi-vector model's tokens are always normalised: leave it out")
    options = (saved.multi_vector or MultiVector()).replaced(given)
    if saved.multi_vector is not None:
        if options.dim != saved.multi_vector.dim:
            raise ValueError(
                f"multi_vector's dim {options.dim}: {name} was saved with {saved.multi_vector.dim}: leave it out"
            )
        return replace(layout, multi_vector=options)
    prompts = {**_PREFIXES, **{name: text for name, text in layout.prompts.items() if text}}
    return replace(
        layout, multi_vector=options, l2_normalize=True, similarity="max_sim", truncate_dim=None, prompts=prompts
    )


def open_head(
    folder: Path, saved: "Folder", layout: "Layout", backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> "tuple[Layout, TokenVectors]":
    """Return what turns states into vectors, from the folder or new, and the layout with lengths for each task."""
    options = layout.multi_vector
    assert options is not None
    if saved.dense:
        layers = _load_projection(folder, saved.dense, backbone.dtype)
        width: Any = layers[0].in_features, layers[-1].out_features
        if width != (expected := (backbone.config.hidden_size, options.dim)):
            raise ValueError(
                f"{folder}: its projection takes {width[0]} numbers to {width[1]}; expected {expected[0]} of the "
                f"backbone to {expected[1]}, which {saved.dense[-1]}/config.json says"
            )
        # Saved by PyLate, which puts these in as ids, they would not be seen in a text.
        known = tokenizer.get_vocab()
        firsts = (text for prefix in saved.prefixes.values() for text in (prefix, prefix.split(" ")[0]))
        _single_tokens(tokenizer, [text for text in firsts if text in known])
    else:
        if "HF_ColBERT" in (backbone.config.architectures or []):
            raise ValueError(f"{folder}: a ColBERT of Stanford's form is not read: save it by PyLate first")
        prompts = [layout.prompts[task] for task in TASKS]
        _single_tokens(tokenizer, [text for text in prompts if text.startswith("[") and text.rstrip().endswith("]")])
        layers = _new_projection(backbone, options.dim, len(tokenizer))
        warnings.warn(
            f"{folder} has no projection for a vector a token: a random one to {options.dim} numbers is to be trained",
            stacklevel=4,
        )
    longest = layout.max_seq_length or max(_LENGTHS.values())
    lengths = {task: getattr(layout, f"{task}_length") or min(_LENGTHS[task], longest) for task in TASKS}
    layout = replace(layout, query_length=lengths["query"], document_length=lengths["document"])
    return layout, TokenVectors(layers, options, tokenizer)


@torch.random.fork_rng(devices=[])
def _new_projection(backbone: PreTrainedModel, dim: int, tokens: int) -> nn.Sequential:
    """Return a random projection without bias, and add embeddings of new tokens: the same in every process."""
    torch.manual_seed(0)
    layer = nn.Linear(backbone.config.hidden_size, dim, bias=False, dtype=backbone.dtype)
    if tokens > backbone.get_input_embeddings().num_embeddings:  # type: ignore[union-attr]
        backbone.resize_token_embeddings(tokens, mean_resizing=False)
    return nn.Sequential(layer)


def _single_tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> None:
    """Let the tokenizer take these texts for one token each, wherever they stand and before it changes their case."""
    tokenize: Any = tokenizer.tokenize
    new = [AddedToken(text, normalized=False, special=True) for text in texts if tokenize(text) != [text]]
    tokenizer.add_tokens(new, special_tokens=True)


def _load_projection(folder: Path, dense: tuple[str, ...], dtype: torch.dtype) -> nn.Sequential:
    """Return the layers in these folders; ValueError where weights are missing or do not fit one another."""
    layers: list[nn.Linear] = []
    for name in dense:
        path, older = (file_within(folder, Path(name, file)) for file in ("model.safetensors", "pytorch_model.bin"))
        with failing_as(f"{path.parent}: its projection cannot be read"):
            weights = load_file(path) if path.is_file() else torch.load(older, "cpu", weights_only=True)
            weight, bias = weights["linear.weight"], weights.get("linear.bias")
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=dtype)
            layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
        if layers and layers[-1].out_features != layer.in_features:
            raise ValueError(f"{path.parent}: a projection of {layer.in_features} numbers behind one to "
                             f"{layers[-1].out_features}")  # fmt: skip
        layers.append(layer)
    return nn.Sequential(*layers)


def write_multi_vector(
    folder: Path, layout: Any, tokenizer: PreTrainedTokenizerBase, layers: dict[str, Tensor]
) -> None:
    """Write all but the backbone's and the tokenizer's files; layers: the state of the projection."""
    prefixes = {task: _prefix_token(tokenizer, layout.prompts.get(task, "")) for task in TASKS}
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


def _prefix_token(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Return the longest added token that the prompt begins with; "" if there is none."""
    tokenizer_: Any = tokenizer
    added = tokenizer_.get_added_vocab()
    return max((token for token in added if token and prompt.startswith(token)), key=len, default="")
