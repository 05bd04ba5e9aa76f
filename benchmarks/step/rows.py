"""The rows of train_step.py made ready: data, models, and one forward and backward pass of each library."""

import gzip
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
from inbatch import BiEncoderModel, GradCache, collectives, info_nce  # noqa: E402
from inbatch.collectives import max_over_ranks  # noqa: E402
from inbatch.data.batches import start_worker as start_worker  # noqa: E402
from inbatch.data.files import replacing  # noqa: E402
from inbatch.encoder.packing import wish  # noqa: E402
from inbatch.encoder.precision import bf16_copies  # noqa: E402
from inbatch.grad_cache.micro_batches import cut  # noqa: E402
from inbatch.train.parallel import compile_layers, is_spread, replicate, shard  # noqa: E402

ON_GPU = torch.cuda.is_available()
TEMPERATURE = 0.02
SIZES = {
    "qwen3-0.6b": ("Qwen3Config", {"vocab_size": 151936, "intermediate_size": 3072, "num_hidden_layers": 28}),
    "llama-3.2-1b": ("LlamaConfig", {"vocab_size": 128256, "intermediate_size": 8192, "num_hidden_layers": 16}),
}
HEADS = {
    "qwen3-0.6b": {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
    "llama-3.2-1b": {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
}


@dataclass(frozen=True, kw_only=True)
class Row:
    library: str
    mini: int | None = None
    tokens: int | None = None
    keep: int | None = None
    inline: bool = False
    packed: bool = False
    padded: bool = False
    compile: bool = False
    liger: bool = False
    ckpt: bool = False
    weights: str = "float32"
    fsdp2: bool = False

    @classmethod
    def parse(cls, text: str) -> "Row":
        library, *words = text.split()
        fields: dict = {}
        for word in words:
            name, _, value = word.partition("=")
            fields[name] = True if not value else int(value) if value.isdigit() else value
        return cls(library=library, **fields)


@dataclass(kw_only=True)
class Trial:
    """A row made ready: texts -> tokens (in the host's memory), tokens -> one forward and backward pass."""

    tokenize: Callable[[list], list]
    forward_backward: Callable[[list], Tensor]
    module: nn.Module
    backbone: nn.Module
    ahead: bool  # tokenises in worker processes
    encoded_tokens: Callable[[list], int]  # with the padding that is encoded
    grad_cache: GradCache | None = None


# ---- data and models


def read_pairs(folder: Path) -> list[tuple[str, str]]:
    """(query, passage) for every judged pair of a BEIR folder's training split, files plain or gzipped, shuffled.

    As a trainer shuffles: neighbours in a file are alike in length, and one rank would have more tokens than another.
    """

    def lines(path: Path) -> Iterator[str]:
        with open(path, encoding="utf-8") if path.exists() else gzip.open(f"{path}.gz", "rt", encoding="utf-8") as file:
            yield from file

    corpus = {
        d["_id"]: f"{d.get('title', '')} {d['text']}".strip() for d in map(json.loads, lines(folder / "corpus.jsonl"))
    }
    queries = {d["_id"]: d["text"] for d in map(json.loads, lines(folder / "queries.jsonl"))}
    rows = (line.split("\t") for line in list(lines(folder / "qrels" / "train.tsv"))[1:])
    pairs = [(queries[row[0]], corpus[row[1]]) for row in rows if int(row[2]) > 0]
    random.Random(0).shuffle(pairs)
    return pairs


def model_folder(args) -> Path:
    """The folder given, or a new one with a bidirectional model of random weights and the tokenizer given.

    Rank 0 makes it, and no rank opens it before it is whole.
    """
    if args.model not in SIZES:
        return Path(args.model)
    import transformers

    folder = Path(tempfile.gettempdir()) / f"inbatch-{args.model}-{os.getuid()}"

    def make() -> None:
        kind, sizes = SIZES[args.model]
        config = getattr(transformers, kind)(**sizes, **HEADS[args.model], is_causal=False, tie_word_embeddings=True)
        torch.manual_seed(0)
        with torch.device(collectives.device()):
            model = transformers.AutoModel.from_config(config, dtype=torch.bfloat16)
        with replacing(folder) as filled:
            model.save_pretrained(filled)
            transformers.AutoTokenizer.from_pretrained(args.tokenizer).save_pretrained(filled)

    collectives.on_rank_0(lambda: None if folder.exists() else make())
    return folder


def build_inbatch(row: Row, folder: Path, args) -> Trial:
    device = collectives.device()
    bf16 = row.weights == "bf16"
    packed = wish(True if row.packed else False if row.padded else None, device)
    model = BiEncoderModel.from_pretrained(folder, packed=packed, dtype="float32", bidirectional=True).train()
    if row.ckpt:
        model.gradient_checkpointing_enable()
    if row.liger:
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model.backbone)
    if row.compile:
        compile_layers(model)
    network = shard(model, device, bf16=bf16) if row.fsdp2 else replicate(model, device)

    def encode(batch: dict[str, Tensor]) -> Tensor:
        moved = model.to_device(batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=not bf16):
            return network(moved).float()

    step = GradCache(
        encode,
        lambda queries_BD, passages_BD: info_nce(queries_BD, passages_BD, temperature=TEMPERATURE),
        modules=[network] if is_spread(network) else [],
        micro_batch_tokens=row.tokens or "auto",
        keep_graph_mib="auto" if row.keep is None else row.keep,
        packed=model.packed,
        max_over_ranks=max_over_ranks if row.fsdp2 else None,
        around=lambda: bf16_copies(model) if bf16 and not row.fsdp2 else nullcontext(),
        reshard=False,
    )

    def encoded_tokens(batch: list) -> int:
        if model.packed:
            return sum(int(part["attention_mask"].sum()) for part in batch)
        return sum(part.tokens for part in cut(batch, budget=step.micro_batch_tokens, multiple=8))

    return Trial(
        tokenize=lambda pairs: tokenize_sides(model, pairs, args),
        forward_backward=lambda batch: step(*batch),
        module=network,
        backbone=model.backbone,
        ahead=not row.inline,
        encoded_tokens=encoded_tokens,
        grad_cache=step,
    )


def build_sentence_transformers(row: Row, folder: Path, args) -> Trial:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )

    device = collectives.device()
    model = SentenceTransformer(str(folder), device=str(device), model_kwargs={"dtype": torch.float32})
    model.max_seq_length = args.max_length
    model.train()
    if row.library == "st-inbatch":
        from inbatch.integrations import sentence_transformers as ours

        loss = ours.CachedMultipleNegativesRankingLoss(
            model, scale=1 / TEMPERATURE, mini_batch_num_tokens=row.tokens, packed=False if row.padded else None
        )
    elif row.library == "st-plain":
        loss = MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)
    else:
        sizes = {"mini_batch_num_tokens": row.tokens} if row.tokens else {"mini_batch_size": row.mini or 32}
        loss = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, **sizes)

    def forward_backward(batch: list) -> Tensor:
        on_device = [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in part.items()} for part in batch]
        with torch.autocast(device.type, torch.bfloat16):
            value = loss(on_device, None)
            value.backward()
        return value.detach()

    backbone = next(module for module in model.modules() if hasattr(module, "get_input_embeddings"))
    tokenize = getattr(model, "preprocess", None) or model.tokenize
    return Trial(
        tokenize=lambda pairs: [tokenize(list(texts)) for texts in zip(*pairs, strict=True)],
        forward_backward=forward_backward,
        module=model,
        backbone=backbone,
        ahead=not row.inline,
        encoded_tokens=padded_tokens,
    )


def import_gradcache() -> tuple[type, type]:
    """The class and the loss of the package GradCache (Gao et al. 2021), whose class Tevatron's trainer calls, too."""
    try:
        import gradcache
    except ModuleNotFoundError:
        raise ModuleNotFoundError("not installed: pip install --no-deps GradCache==0.0.1") from None
    # The release installs as `gradcache` but imports itself by the name that its repository has.
    sys.modules.setdefault("grad_cache", gradcache)
    from grad_cache.grad_cache import GradCache as Peer
    from grad_cache.loss import SimpleContrastiveLoss

    return Peer, SimpleContrastiveLoss


def build_gradcache(row: Row, folder: Path, args) -> Trial:
    peer, contrastive_loss = import_gradcache()
    device = collectives.device()
    model = BiEncoderModel.from_pretrained(folder, dtype="float32", bidirectional=True).train().to(device)

    def encode(**tokens: Tensor) -> Tensor:
        # Its own mixed precision is float16 with a GradScaler.
        with torch.autocast(device.type, torch.bfloat16):
            return model(tokens).float()

    loss = contrastive_loss()
    step = peer(
        models=[encode, encode],
        chunk_sizes=row.mini or 32,
        loss_fn=lambda queries_BD, passages_BD: loss(queries_BD / TEMPERATURE, passages_BD),
    )
    return Trial(
        tokenize=lambda pairs: tokenize_sides(model, pairs, args),
        forward_backward=lambda batch: step(*({k: v.to(device) for k, v in part.items()} for part in batch)),
        module=model,
        backbone=model.backbone,
        ahead=not row.inline,
        encoded_tokens=padded_tokens,
    )


def tokenize_sides(model: BiEncoderModel, pairs: list, args) -> list:
    return [model.tokenize(texts, max_length=args.max_length) for texts in zip(*pairs, strict=True)]


def padded_tokens(batch: list) -> int:
    """Where mini-batches are slices of the padded batch."""
    return sum(part["attention_mask"].numel() for part in batch)


def build(row: Row, folder: Path, args) -> Trial:
    torch.manual_seed(1)
    builders = {"inbatch": build_inbatch, "gradcache": build_gradcache}
    return builders.get(row.library, build_sentence_transformers)(row, folder, args)
