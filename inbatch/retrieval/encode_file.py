"""The embeddings of a file's texts in one .npy or .safetensors file, which the ranks fill together.

Shapes: n texts, D dimension, m vectors: n, or more from a multi-vector model.
"""

import io
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from inbatch import collectives
from inbatch.data import open_corpus
from inbatch.data.files import check_output, claimed, naming, partial, publish, remove, replacing
from inbatch.losses.max_sim import Tokens
from inbatch.retrieval.embed import EmbedOptions, embed_windows, is_multi_vector, share, unwrap
from inbatch.retrieval.nearest import Embeddings

_NPY = {torch.float32: "<f4", torch.float16: "<f2"}
_SAFETENSORS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def encode_to_file(
    model: nn.Module,
    source: str | os.PathLike,
    output: str | os.PathLike,
    options: EmbedOptions | None = None,
    *,
    group=None,
) -> tuple[int, int]:
    """Write the embeddings of a file's texts, one a row in file order, and return their shape (m, D).

    source: texts in any format that `open_corpus` reads, a .txt file with a text a line among them. output: ends in
    .npy, or in .safetensors (one tensor, "embeddings"). Records' ids go to output + ".ids.txt", one a line.
    options.dtype: bfloat16 in .safetensors only. options.progress: shown by rank 0. A multi-vector model writes the
    vectors of text i to the rows offsets[i] to offsets[i + 1], with the int64 offsets [n + 1] in output +
    ".offsets.npy", through a temporary file for each rank.

    Every rank embeds its share and writes its rows into the one file, which must be on a file system that they share;
    a rank holds no more than a window of texts. The complete files get their names at the end, and ids of an earlier
    run go. Raises ValueError on every rank for a source or output that cannot be used, and for embeddings with
    NaN or infinity.
    """
    output, options = Path(output), options or EmbedOptions()
    module, dtype = unwrap(model), options.dtype
    collectives.agree("encode_to_file", {}, group=group, same={"dimension": module.embedding_dim, "dtype": str(dtype)})
    documents = collectives.together(lambda: open_corpus(source, needs_ids=False), group)
    texts, several, row_bytes = documents.texts, is_multi_vector(module), module.embedding_dim * dtype.itemsize
    shape = len(texts), module.embedding_dim
    header = collectives.together(lambda: _header(output, dtype, shape), group)
    ids_path, offsets_path = (output.with_name(f"{output.name}.{what}") for what in ("ids.txt", "offsets.npy"))
    first, rows = collectives.rank(group) == 0, share(len(texts), group)
    part = output.with_name(f".{output.name}.rank-{collectives.rank(group)}")
    options = options if first else replace(options, progress=None)
    claims: list[IO] = []

    def claim() -> None:
        check_output(output, documents.files)
        claims.append(claimed(output))

    def create() -> None:
        with naming(output), partial(output).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + shape[0] * row_bytes)
        remove(partial(ids_path))  # of a run that was killed
        if documents.has_ids:
            with naming(ids_path), partial(ids_path).open("w", encoding="utf-8") as file:
                file.writelines(map(_line, documents.ids()))

    def fill(path: Path, mode: str, place: int) -> Tensor:
        # Written, not mapped: on a disk that is full a mapping ends the process by a signal.
        with naming(output), path.open(mode) as file:
            file.seek(place)
            return _fill(file, embed_windows(module, texts, rows, options), rows.start, source)  # type: ignore[arg-type]

    def join() -> None:
        with naming(output), partial(output).open("r+b") as file, part.open("rb") as mine:
            file.seek(len(header) + int(lengths[: rows.start].sum()) * row_bytes)
            shutil.copyfileobj(mine, file, 1 << 24)

    collectives.on_rank_0(claim, group)
    try:
        if several:
            filled = collectives.together(lambda: fill(part, "wb", 0), group)
            lengths = torch.cat(collectives.gather_objects(filled, group))
            shape = int(lengths.sum()), shape[1]
            header = _header(output, dtype, shape)
        collectives.on_rank_0(create, group)
        place = len(header) + rows.start * row_bytes
        collectives.together(join if several else lambda: fill(partial(output), "r+b", place), group)
        collectives.on_rank_0(lambda: _publish(output, ids_path, offsets_path, lengths if several else None), group)
    except BaseException:
        if first:
            remove(partial(output))
            remove(partial(ids_path))
        raise
    finally:
        for file in claims:
            file.close()
        remove(part)
    return shape


def _publish(output: Path, ids_path: Path, offsets_path: Path, lengths: Tensor | None) -> None:
    """Give the complete files their names; lengths: of the texts, of which offsets are written; None: none are."""
    for path in (ids_path, offsets_path):  # first: an earlier run's must never lie beside the new file
        remove(path)
    publish(output)
    if lengths is not None:
        with replacing(offsets_path) as filled, filled.open("wb") as file:
            np.save(file, np.concatenate([[0], lengths.cumsum(0).numpy()]).astype("<i8"))
    if partial(ids_path).exists():
        publish(ids_path)


def _fill(file: BinaryIO, windows: Iterator[tuple[int, Embeddings]], first: int, source: str | os.PathLike) -> Tensor:
    """Write vectors and return how many each text has; first: of all texts. Raises ValueError for NaN or infinity."""
    lengths = [torch.empty(0, dtype=torch.int64)]
    for start, window in windows:
        texts = window if isinstance(window, Tokens) else Tokens(window, torch.ones(len(window), dtype=torch.int64))
        vectors_mD, lengths_n = texts.vectors, texts.lengths
        bad = (~vectors_mD.isfinite()).any(1).nonzero().squeeze(1)
        if len(bad):
            text = first + start + int(torch.searchsorted(lengths_n.cumsum(0), bad[0], right=True))
            raise ValueError(
                f"{source}: the embedding of text {text + 1} holds NaN or infinity as {vectors_mD.dtype}; "
                "expected finite numbers: look at the model's weights, or try float32 and precision fp32"
            )
        file.write(vectors_mD.view(torch.uint8).numpy().data)
        lengths.append(lengths_n)
    return torch.cat(lengths)


def _line(doc_id: str) -> str:
    if len(doc_id.splitlines()) != 1:
        raise ValueError(f"the id {doc_id!r} does not fit on a line: ids are written one a line")
    return f"{doc_id}\n"


def _header(output: Path, dtype: torch.dtype, shape: tuple[int, int]) -> bytes:
    """Return the bytes before the rows in the file; ValueError where the file cannot be made."""
    formats = {".npy": _NPY, ".safetensors": _SAFETENSORS}
    if output.suffix not in formats:
        raise ValueError(f"the output is {output.name!r}; expected a name ending in .npy or .safetensors")
    names = formats[output.suffix]
    if dtype not in names:
        raise ValueError(f"{output.suffix} files cannot hold {dtype}; expected float32 or float16, or .safetensors")
    if output.suffix == ".npy":
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": names[dtype], "fortran_order": False, "shape": shape})
        return header.getvalue()
    tensor = {"dtype": names[dtype], "shape": shape, "data_offsets": [0, shape[0] * shape[1] * dtype.itemsize]}
    description = json.dumps({"embeddings": tensor})
    size = -(-len(description) // 8) * 8
    return size.to_bytes(8, "little") + description.encode().ljust(size)
