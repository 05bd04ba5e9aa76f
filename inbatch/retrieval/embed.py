"""Texts to embeddings: in memory, or to a file that the ranks fill together.

Shapes: n texts, B texts in a batch, T token positions, D dimension.
"""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from inbatch import collectives
from inbatch.data import plan
from inbatch.data.corpus import Documents, DocumentTexts, open_documents
from inbatch.data.lines import Lines, find_file
from inbatch.grad_cache.memory import to_device

PRECISIONS = ("fp32", "bf16")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_WINDOW = 4096  # texts tokenised, sorted and batched together: enough that batches have hardly any padding
_NPY = {torch.float32: "<f4", torch.float16: "<f2"}
_SAFETENSORS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def embed(
    model: nn.Module,
    texts: Sequence[str],
    *,
    rows: range | None = None,
    prefix: str = "",
    max_length: int | None = None,
    batch_tokens: int = 16384,
    precision: str = "fp32",
    dtype: torch.dtype = torch.float32,
    progress: str | None = None,
) -> Tensor:
    """The embeddings [n, D] of texts[rows] (None: all), in order and in host memory, where a corpus has room.

    model: a BiEncoderModel, or DDP around one; it computes on its own device, in evaluation mode and without
    gradient, and is left as it was. texts: read as they are needed. prefix: put before each text. max_length: tokens a
    text is cut to; None is the model's. batch_tokens: padded tokens per batch, of texts of similar length. precision:
    "fp32", or "bf16" autocast. dtype: what is kept. progress: the label of a progress bar; None shows none.

    Raises ValueError for batch_tokens < 1, an unknown precision, or one string in place of a list.
    """
    if isinstance(texts, str):
        raise ValueError(f"embed: texts is one string; expected a sequence of them: pass [{texts[:40]!r}]")
    module = unwrap(model)
    rows = range(len(texts)) if rows is None else rows
    embeddings = torch.empty(len(rows), module.embedding_dim, dtype=dtype)
    options = {"prefix": prefix, "max_length": max_length, "batch_tokens": batch_tokens, "precision": precision}
    for start, window in _embed_windows(module, texts, rows, progress=progress, **options):
        embeddings[start : start + len(window)] = window
    return embeddings


def unwrap(model: nn.Module) -> Any:
    """The encoder inside DistributedDataParallel, whose own forward communicates."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def share(count: int, group=None) -> range:
    """This rank's contiguous share of `count` rows; shares follow one another in rank order and differ by at most 1."""
    return plan.share(count, collectives.rank(group), collectives.world_size(group))


def _embed_windows(
    module: Any, texts: Sequence[str], rows: range, *, prefix, max_length, batch_tokens, precision, progress
) -> Iterator[tuple[int, Tensor]]:
    """(place within rows, embeddings [w, D] on the model's device), window by window."""
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens is {batch_tokens}; expected at least 1, such as 16384")
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}")
    device = next(module.parameters()).device

    def tokenise(start: int) -> dict[str, Tensor]:
        window = [prefix + texts[row] for row in rows[start : start + _WINDOW]]
        return module.tokenize(window, max_length=max_length)

    # A window is read and tokenised while the one before it is encoded.
    with (
        _evaluating(module),
        ThreadPoolExecutor(1) as reader,
        tqdm(total=len(rows), desc=progress, disable=progress is None, unit="text", leave=False) as bar,
    ):
        ahead = reader.submit(tokenise, 0) if len(rows) else None
        for start in range(0, len(rows), _WINDOW):
            assert ahead is not None
            tokens = ahead.result()
            if start + _WINDOW < len(rows):
                ahead = reader.submit(tokenise, start + _WINDOW)
            order, parts = [], []
            for some in _batches(tokens["attention_mask"].sum(1), batch_tokens):
                batch = module.to_device(_without_padding(tokens, some))
                # Not inference_mode: what a backbone caches in its forward (rotary tables) must serve training.
                with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    parts.append(module(batch).float())
                order.append(some)
                bar.update(len(some))
            window = torch.cat(parts)
            yield start, torch.empty_like(window).index_copy_(0, to_device(torch.cat(order), device), window)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, module by module: a frozen tower may have been in it within a model that trains."""
    before = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


def _batches(lengths: Tensor, batch_tokens: int) -> Iterator[Tensor]:
    """Indices into lengths, batch by batch, so that count * longest <= batch_tokens (or one text). The longest come
    first: what does not fit in memory fails at once."""
    order = lengths.argsort(descending=True, stable=True)
    start = 0
    while start < len(order):
        count = max(1, batch_tokens // max(1, int(lengths[order[start]])))
        yield order[start : start + count]
        start += count


def _without_padding(tokens: dict[str, Tensor], some: Tensor) -> dict[str, Tensor]:
    """Some rows, less the columns that are padding in all of them, on whichever side."""
    batch = {name: value[some] for name, value in tokens.items()}
    used = batch["attention_mask"].any(0).nonzero().squeeze(1)
    if not len(used):
        return batch
    return {name: value[:, used[0] : used[-1] + 1] for name, value in batch.items()}


def encode_to_file(
    model: nn.Module,
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    prefix: str = "",
    max_length: int | None = None,
    batch_tokens: int = 16384,
    precision: str = "fp32",
    dtype: str = "float32",
    progress: bool = False,
    group=None,
) -> tuple[int, int]:
    """Writes the embeddings of a file's texts, one a row in file order, and returns their shape (n, D).

    source: a BEIR folder (its corpus), a JSONL file of {_id, title, text} records, or a text file with a text a line
    (blank lines left out). output: ends in .npy, or in .safetensors (one tensor, "embeddings"). Records' ids go to
    output + ".ids.txt", one a line. dtype: "float32", "float16" or, in .safetensors, "bfloat16". Else as `embed`.

    Every rank embeds its share and writes its rows into the one file, which must be on a file system that they share;
    a rank holds no more than a window of 4096 texts. The files appear under their names when all is complete, and
    ids of an earlier run go. Raises ValueError on every rank for a source or output that cannot be used, and for
    embeddings with NaN or infinity.
    """
    output = Path(output)
    unfinished = _beside(output, ".tmp")
    module = unwrap(model)
    collectives.agree("encode_to_file", {}, group=group, same={"dimension": module.embedding_dim, "dtype": dtype})
    texts, ids = collectives.together(lambda: _open_source(Path(source)), group)
    shape = len(texts), module.embedding_dim
    first = collectives.rank(group) == 0
    header = collectives.together(lambda: _header(output, dtype, shape), group)
    options = {"prefix": prefix, "max_length": max_length, "batch_tokens": batch_tokens, "precision": precision}
    label = f"encode {Path(source).name}" if progress and first else None

    def fill() -> None:
        width = shape[1] * DTYPES[dtype].itemsize
        rows = share(shape[0], group)
        # Written, not mapped: on a disk that is full a mapping ends the process by a signal.
        with unfinished.open("r+b") as file:
            file.seek(len(header) + rows.start * width)
            for start, window in _embed_windows(module, texts, rows, progress=label, **options):
                kept = window.to("cpu", DTYPES[dtype])
                _require_finite(kept, rows.start + start, source)
                file.write(kept.view(torch.uint8).numpy().data)

    try:
        collectives.together(lambda: _create(output, header, shape, DTYPES[dtype], ids) if first else None, group)
        collectives.together(fill, group)
        collectives.together(lambda: _finish(output) if first else None, group)
    except BaseException:
        if first:
            unfinished.unlink(missing_ok=True)
            _beside(output, ".ids.txt.tmp").unlink(missing_ok=True)
        raise
    return shape


def _beside(output: Path, ending: str) -> Path:
    return output.with_name(f"{output.name}{ending}")


def _require_finite(window: Tensor, start: int, source: str | os.PathLike) -> None:
    bad = (~window.isfinite()).any(1).nonzero()
    if len(bad):
        raise ValueError(
            f"{source}: the embedding of text {start + int(bad[0]) + 1} holds NaN or infinity as {window.dtype}; "
            "expected finite numbers: look at the model's weights, or try float32 and precision fp32"
        )


def _text(line: bytes) -> str:
    try:
        return line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 ({error}): save the file in that encoding") from None


def _open_source(source: Path) -> tuple[Sequence[str], Documents | None]:
    if source.is_dir():
        corpus = find_file(source, "corpus.jsonl")
        if corpus is None:
            raise ValueError(f"{source} has no corpus.jsonl; expected a BEIR folder, a JSONL file or a text file")
        source = corpus
    if not source.is_file():
        raise ValueError(f"{source} does not exist; expected a BEIR folder, a JSONL file or a text file")
    if source.name.removesuffix(".gz").endswith((".jsonl", ".json")):
        documents = open_documents(source)
        return DocumentTexts(documents), documents
    lines = Lines(source, _text)
    if not len(lines):
        raise ValueError(f"{source} is empty: expected one text a line")
    for _ in lines:  # as records are: what cannot be read is said before hours of encoding
        pass
    return lines, None


def _header(output: Path, dtype: str, shape: tuple[int, int]) -> bytes:
    """What stands before the rows in the file."""
    formats = {".npy": _NPY, ".safetensors": _SAFETENSORS}
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if output.suffix not in formats:
        raise ValueError(f"the output is {output.name!r}; expected a name ending in .npy or .safetensors")
    if output.is_dir():
        raise ValueError(f"{output} is a folder; expected the name of a file to write")
    names = formats[output.suffix]
    if DTYPES[dtype] not in names:
        raise ValueError(f"{output.suffix} files cannot hold {dtype}; expected float32 or float16, or .safetensors")
    if output.suffix == ".npy":
        description = f"{{'descr': '{names[DTYPES[dtype]]}', 'fortran_order': False, 'shape': {shape}, }}"
        size = -(-(10 + len(description) + 1) // 64) * 64 - 10
        return b"\x93NUMPY\x01\x00" + size.to_bytes(2, "little") + description.encode().ljust(size - 1) + b"\n"
    stop = shape[0] * shape[1] * DTYPES[dtype].itemsize
    tensor = {"dtype": names[DTYPES[dtype]], "shape": shape, "data_offsets": [0, stop]}
    description = json.dumps({"embeddings": tensor})
    size = -(-len(description) // 8) * 8
    return size.to_bytes(8, "little") + description.encode().ljust(size)


def _create(output: Path, header: bytes, shape: tuple[int, int], dtype: torch.dtype, ids: Documents | None) -> None:
    """The files under their temporary names: the embeddings' at its full size, and the ids', if there are any."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with _beside(output, ".tmp").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + shape[0] * shape[1] * dtype.itemsize)
    unfinished_ids = _beside(output, ".ids.txt.tmp")
    if ids is None:
        unfinished_ids.unlink(missing_ok=True)  # of a run that was killed
        return
    with unfinished_ids.open("w", encoding="utf-8") as file:
        for doc_id in ids.own_ids():
            if len(doc_id.splitlines()) != 1:
                raise ValueError(f"the id {doc_id!r} does not fit on a line of its own")
            file.write(f"{doc_id}\n")


def _finish(output: Path) -> None:
    """Gives the files their names, so that at no time the ids of other embeddings lie beside these."""
    ids, unfinished_ids = _beside(output, ".ids.txt"), _beside(output, ".ids.txt.tmp")
    ids.unlink(missing_ok=True)
    _beside(output, ".tmp").replace(output)
    if unfinished_ids.exists():
        unfinished_ids.replace(ids)
