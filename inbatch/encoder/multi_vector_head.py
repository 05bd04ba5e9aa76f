"""Opening the head of a multi-vector model: options by what is saved and what is given, projection, tokens."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inbatch.encoder.multi_vector import (
    LENGTHS,
    PREFIXES,
    TASKS,
    MultiVector,
    TokenVectors,
    add_prefix_tokens,
    new_projection,
    single_tokens,
)
from inbatch.encoder.multi_vector_folder import load_projection
from inbatch.encoder.pooling import MULTI_VECTOR
from inbatch.encoder.st_folder import Folder, Layout


def with_multi_vector(
    name: str, saved: Layout, layout: Layout, given: Mapping[str, Any] | None, l2_normalize: bool | None
) -> Layout:
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
    prompts = {**PREFIXES, **{name: text for name, text in layout.prompts.items() if text}}
    return replace(
        layout, multi_vector=options, l2_normalize=True, similarity="max_sim", truncate_dim=None, prompts=prompts
    )


def open_head(
    folder: Path, saved: Folder, layout: Layout, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[Layout, TokenVectors]:
    """Return what turns states into vectors, from the folder or new, and the layout with lengths for each task."""
    options = layout.multi_vector
    assert options is not None
    if saved.dense:
        layers = load_projection(folder, list(saved.dense), backbone.dtype)
        width: Any = layers[0].in_features, layers[-1].out_features
        if width != (expected := (backbone.config.hidden_size, options.dim)):
            raise ValueError(
                f"{folder}: its projection takes {width[0]} numbers to {width[1]}; expected {expected[0]} of the "
                f"backbone to {expected[1]}, which {saved.dense[-1]}/config.json says"
            )
        # Saved by PyLate, which puts these in as ids, they would not be seen in a text.
        known = tokenizer.get_vocab()
        firsts = [
            text for prefix in saved.prefixes.values() for text in (prefix, prefix.split(" ")[0]) if text in known
        ]
        single_tokens(tokenizer, firsts)
    else:
        if "HF_ColBERT" in (backbone.config.architectures or []):
            raise ValueError(f"{folder}: a ColBERT of Stanford's form is not read: save it by PyLate first")
        layers = new_projection(backbone, options.dim)
        add_prefix_tokens(tokenizer, backbone, {task: layout.prompts[task] for task in TASKS})
        warnings.warn(
            f"{folder} has no projection for a vector a token: a random one to {options.dim} numbers is to be trained",
            stacklevel=4,
        )
    longest = layout.max_seq_length or max(LENGTHS.values())
    lengths = {task: getattr(layout, f"{task}_length") or min(LENGTHS[task], longest) for task in TASKS}
    layout = replace(layout, query_length=lengths["query"], document_length=lengths["document"])
    return layout, TokenVectors(layers, options, tokenizer)
