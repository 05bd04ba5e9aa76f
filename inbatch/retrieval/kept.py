"""Embeddings kept in a folder, under a name made of the weights, the settings and the texts.

`NAME.embeddings` holds a row for each text, `NAME.rows` a byte for each, 1 once its row is on disk. A multi-vector
model's are in files `NAME.FIRST.safetensors`, each of the `WINDOW` texts from FIRST on. Ranks fill them together, and
any number of ranks can complete what a killed run left.

Shapes: n texts, D dimension.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from inbatch import collectives
from inbatch.data.files import naming, remove, replacing, sync
from inbatch.data.token_cache import tokenizer_digest
from inbatch.losses.max_sim import Tokens
from inbatch.retrieval.embed import WINDOW, EmbedOptions, embed_windows, is_multi_vector, joined, unwrap
from inbatch.retrieval.nearest import Embeddings


def model_digest(model: nn.Module) -> str:
    """Return a digest of an encoder: its weights, its tokenizer, its settings, and the library that runs it."""
    module, digest = unwrap(model), hashlib.blake2b(digest_size=16)
    settings = {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
    settings.pop("training", None)
    configuration = getattr(getattr(module, "backbone", None), "config", "")
    settings["multi_vector"] = str(getattr(module, "multi_vector", None))
    # As text the module names what its parts are and, of sentence-transformers' parts, their settings.
    digest.update(f"{sorted(settings.items())} {configuration} {version('transformers')} {module}".encode())
    if (tokenizer := getattr(module, "tokenizer", None)) is not None:
        digest.update(tokenizer_digest(tokenizer).encode())
    digest.update(weights_digest(module.state_dict()).encode())
    return digest.hexdigest()


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of named tensors, in any order."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def text_digest(texts: Iterable[str]) -> str:
    """Return a digest of texts and their order."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(f"{len(data)} ".encode() + data)
    return digest.hexdigest()


def embed_kept(
    model: nn.Module, texts: Any, options: EmbedOptions, folder: Path, *, rows: range, group=None
) -> Embeddings:
    """Return the embeddings of texts[rows], this rank's share, from the folder; missing ones are made.

    [n, D] are mapped; a multi-vector model's `Tokens` are read into memory. Every rank calls it, with shares that
    follow one another. Raises OSError, on every rank, if the folder cannot be written or is full.
    """
    module, dtype = unwrap(model), options.dtype
    settings = str(replace(options, progress=None, batch_tokens=None))

    def name() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        return text_digest([model_digest(module), settings, text_digest(texts)])

    key = collectives.on_rank_0(name, group)
    if is_multi_vector(module):
        return _kept_tokens(module, texts, options, folder / key, rows, group)
    row_bytes = module.embedding_dim * dtype.itemsize
    path, done_path = folder / f"{key}.embeddings", folder / f"{key}.rows"

    def create() -> None:
        if not path.exists() or path.stat().st_size != len(texts) * row_bytes:
            remove(done_path)  # of rows that are gone
        for created, size in ((path, len(texts) * row_bytes), (done_path, len(texts))):
            with naming(created), created.open("ab") as file:
                file.truncate(size)

    def fill() -> None:
        # Written, not mapped: on a disk that is full a mapping ends the process by a signal.
        with naming(path), path.open("r+b") as file, done_path.open("r+b") as done:
            for missing in _missing(np.fromfile(done_path, np.uint8)[rows.start : rows.stop], rows.start):
                for start, window in embed_windows(module, texts, missing, options):
                    file.seek((missing.start + start) * row_bytes)
                    file.write(window.view(torch.uint8).numpy().data)
                    file.flush()
                    sync(path)  # before it counts
                    done.seek(missing.start + start)
                    done.write(b"\x01" * len(window))
                    done.flush()

    collectives.on_rank_0(create, group)
    collectives.together(fill, group)
    if not len(rows):
        return torch.empty(0, module.embedding_dim, dtype=dtype)
    shape = len(rows), row_bytes
    mapped = np.memmap(path, np.uint8, mode="c", offset=rows.start * row_bytes, shape=shape)  # a copy where written
    return torch.from_numpy(mapped).view(dtype)


def _kept_tokens(module: Any, texts: Any, options: EmbedOptions, name: Path, rows: range, group) -> Tokens:
    paths = {first: name.with_name(f"{name.name}.{first}.safetensors") for first in range(0, len(texts), WINDOW)}

    def fill() -> None:
        missing = [first for first, path in paths.items() if first in rows and not path.exists()]
        # From the first missing one on, as a killed run leaves them.
        some = range(missing[0], min(len(texts), missing[-1] + WINDOW)) if missing else range(0)
        for start, window in embed_windows(module, texts, some, options):
            with replacing(paths[some.start + start]) as filled:
                save_file({"vectors": window.vectors, "lengths": window.lengths}, filled)

    def read() -> Tokens:
        parts = []
        for first, path in paths.items():
            begin, end = max(rows.start, first), min(rows.stop, first + WINDOW)
            if begin < end:
                try:
                    tensors = load_file(path)
                except SafetensorError as error:
                    raise ValueError(f"{path} is damaged ({error}): remove it, and it is made anew") from None
                part = Tokens(tensors["vectors"], tensors["lengths"])
                parts.append(part if end - begin == len(part) else part[begin - first : end - first])
        return joined(parts, module.embedding_dim, options.dtype)

    collectives.together(fill, group)
    return collectives.together(read, group)


def _missing(done: np.ndarray, first: int) -> list[range]:
    """Return the runs of rows that are not done; first: the number of the first row."""
    edges = np.flatnonzero(np.diff(np.concatenate([[1], done, [1]])) != 0) + first
    return [range(start, stop) for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)]
