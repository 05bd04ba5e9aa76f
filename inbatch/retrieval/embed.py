"""Texts to embeddings: tokenised ahead, batched by length, in the order given.

Shapes: n texts, B texts in a batch, T token positions, D dimension.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from inbatch import collectives
from inbatch.data import plan
from inbatch.encoder.model import to_device
from inbatch.encoder.precision import PRECISIONS, bf16_copies
from inbatch.encoder.token_pooling import pool_tokens
from inbatch.losses.max_sim import Tokens
from inbatch.retrieval.nearest import Embeddings

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WINDOW = 4096  # texts tokenised, sorted and batched together: enough that batches have hardly any padding


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """Say how texts become embeddings."""

    prefix: str = ""
    """put before each text"""
    task: str | None = None
    """"query" or "document", which have lengths of their own and which a multi-vector model encodes differently"""
    max_length: int | None = None
    """tokens a text is cut to; None is the model's limit for such texts"""
    batch_tokens: int | None = None
    """padded tokens of a batch of similarly long texts; None is 65536 packed on a GPU, 16384 padded, 4096 on a CPU"""
    precision: str = "fp32"
    """"fp32", "bf16" (copies of the weights) or "autocast": see inbatch.encoder.precision"""
    dtype: torch.dtype = torch.float32
    """what is kept: float32, float16 or bfloat16"""
    progress: str | None = None
    """label of a progress bar; None shows none"""

    def __post_init__(self):
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise ValueError(f"batch_tokens is {self.batch_tokens}; expected at least 1, such as 16384")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; expected one of {', '.join(PRECISIONS)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype}; expected one of {', '.join(map(str, DTYPES))}")


def embed(
    model: nn.Module, texts: Sequence[str], options: EmbedOptions | None = None, *, rows: range | None = None
) -> Embeddings:
    """Return the embeddings [n, D] of texts[rows] (None: all), in order and in host memory, where a corpus has room.

    model: a BiEncoderModel, or DDP around one; it computes on its own device, in evaluation mode and without
    gradient, and is left as it was. texts: read as they are needed. A multi-vector model gives `Tokens`: the vectors
    that count, text after text, and how many each text has.

    Raises ValueError for one string in place of a list.
    """
    if isinstance(texts, str):
        raise ValueError(f"embed: texts is one string; expected a sequence of them: pass [{texts[:40]!r}]")
    options = options or EmbedOptions()
    module = unwrap(model)
    rows = range(len(texts)) if rows is None else rows
    windows = embed_windows(module, texts, rows, options)
    if is_multi_vector(module):
        return joined([window for _, window in windows], module.embedding_dim, options.dtype)
    embeddings = torch.empty(len(rows), module.embedding_dim, dtype=options.dtype)
    for start, window in windows:
        embeddings[start : start + len(window)] = window
    return embeddings


def joined(parts: list[Tokens], dim: int, dtype: torch.dtype) -> Tokens:
    """Return parts as one, and empty the list: memory holds the vectors once, and one part twice."""
    lengths = torch.cat([torch.empty(0, dtype=torch.int64), *(part.lengths for part in parts)])
    vectors, start = torch.empty(int(lengths.sum()), dim, dtype=dtype), 0
    parts.reverse()
    while parts:
        part = parts.pop()
        vectors[start : start + len(part.vectors)] = part.vectors
        start += len(part.vectors)
    return Tokens(vectors, lengths)


def is_multi_vector(module: nn.Module) -> bool:
    """Return True for an encoder that gives each text several vectors."""
    return getattr(unwrap(module), "multi_vector", None) is not None


def unwrap(model: nn.Module) -> Any:
    """Return the encoder inside DistributedDataParallel, whose own forward communicates."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def share(count: int, group=None) -> range:
    """Return this rank's contiguous share of `count` rows: in rank order, sizes differ by at most 1."""
    return plan.share(count, collectives.rank(group), collectives.world_size(group))


def embed_windows(module: Any, texts: Sequence[str], rows: range, options: EmbedOptions) -> Iterator[tuple[int, Any]]:
    """Yield (place within rows, embeddings [w, D] or Tokens in host memory, of options.dtype), window by window."""
    device = next(module.parameters()).device
    # A CPU's caches hold no more: MiniLM took a fifth less time than at 16384.
    usual = (65536 if module.packed else 16384) if device.type == "cuda" else 4096
    batch_tokens = options.batch_tokens or usual

    def tokenise(start: int) -> dict[str, Tensor]:
        window = [texts[row] for row in rows[start : start + WINDOW]]
        return module.tokenize(window, prefix=options.prefix, task=options.task, max_length=options.max_length)

    # A window is read and tokenised while the one before it is encoded.
    with (
        evaluating(module),
        bf16_copies(module) if options.precision == "bf16" else nullcontext(),
        ThreadPoolExecutor(1) as reader,
        tqdm(total=len(rows), desc=options.progress, disable=options.progress is None, unit="text", leave=False) as bar,
    ):
        ahead = reader.submit(tokenise, 0)
        for start in range(0, len(rows), WINDOW):
            tokens, ahead = ahead.result(), reader.submit(tokenise, start + WINDOW)
            order, parts = [], []
            for some in _batches(tokens["attention_mask"].sum(1), batch_tokens):
                batch = module.to_device(_without_padding(tokens, some))
                # Not inference_mode: what a backbone caches in its forward (rotary tables) must serve training.
                autocast = options.precision == "autocast"
                with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                    vectors = module(batch).float()
                if is_multi_vector(module) and options.task == "document":
                    vectors = pool_tokens(
                        vectors, module.multi_vector.pool_factor, module.multi_vector.protected_tokens
                    )
                parts.append(vectors)
                order.append(some)
                bar.update(len(some))
            places = to_device(torch.cat(order).argsort(), device)
            if is_multi_vector(module):
                real = [part.any(-1) for part in parts]
                vectors = torch.cat([part[mask] for part, mask in zip(parts, real, strict=True)])
                window = Tokens(vectors, torch.cat([mask.sum(1) for mask in real]))[places]
                yield start, Tokens(window.vectors.to("cpu", options.dtype), window.lengths.cpu())
            else:
                yield start, torch.cat(parts)[places].to("cpu", options.dtype)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, module by module: a frozen tower may have been in it within a model that trains."""
    before = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


def _batches(lengths: Tensor, batch_tokens: int) -> Iterator[Tensor]:
    """Yield batches of indices into lengths, with count * longest <= batch_tokens, or one text.

    The longest come first: what does not fit in memory fails at once.
    """
    order = lengths.argsort(descending=True, stable=True)
    start = 0
    while start < len(order):
        count = max(1, batch_tokens // max(1, int(lengths[order[start]])))
        yield order[start : start + count]
        start += count


def _without_padding(tokens: dict[str, Tensor], some: Tensor) -> dict[str, Tensor]:
    """Return some rows, less the columns that are padding in all of them, on whichever side."""
    batch = {name: value[some] for name, value in tokens.items()}
    used = batch["attention_mask"].any(0).nonzero().squeeze(1)
    if not len(used):
        return batch
    return {name: value[:, used[0] : used[-1] + 1] for name, value in batch.items()}
