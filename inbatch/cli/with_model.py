"""The commands that open a model: evaluate, mine, group and encode, each under its name."""

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from inbatch import collectives
from inbatch.data import load_retrieval, open_examples
from inbatch.data.files import check_output
from inbatch.data.readers import say_of_prompts
from inbatch.encoder.loading import local_folder
from inbatch.encoder.model import BiEncoderModel
from inbatch.encoder.packing import wish
from inbatch.encoder.precision import chosen
from inbatch.encoder.sentence_transformer import open_encoder
from inbatch.retrieval import mine as mining
from inbatch.retrieval.embed import EmbedOptions
from inbatch.retrieval.encode_file import encode_to_file
from inbatch.retrieval.evaluate import RetrieveOptions
from inbatch.retrieval.evaluate import evaluate as measure
from inbatch.retrieval.grouping import GroupOptions, group_examples, save_groups
from inbatch.retrieval.metrics import DEFAULT_MEASURES


def evaluate(known: argparse.Namespace, device: torch.device) -> None:
    data = collectives.together(lambda: load_retrieval(known.data, known.split))
    if known.run_file is not None:
        collectives.on_rank_0(lambda: check_output(known.run_file, Path(known.data).rglob("*")))
    model, query_model = _open_towers(known, device)
    measures = known.measures or DEFAULT_MEASURES
    figures = measure(
        model,
        data,
        _retrieving(known, device, top_k=known.top_k, keep_identical_ids=known.keep_identical_ids),
        query_model=query_model,
        measures=measures,
        run_file=known.run_file,
        report=lambda figures: print(json.dumps(figures), flush=True),
    )
    if missing := [name for name in measures if name not in figures]:
        raise ValueError(f"no figure for {', '.join(missing)}: see the warning above")


def mine(known: argparse.Namespace, device: torch.device) -> None:
    options = mining.MineOptions(**{field.name: getattr(known, field.name) for field in fields(mining.MineOptions)})
    data = collectives.together(lambda: mining.open_mining_set(known.source, known.split))
    model, query_model = _open_towers(known, device)
    retrieve = _retrieving(known, device)
    teacher = None if known.teacher is None else _open_teacher(known.teacher, device)
    report = mining.mine(
        model, data, known.output, options, retrieve,
        query_model=query_model, teacher=teacher, kept=known.kept, format=known.format,
    )  # fmt: skip
    _print_once(f"{known.output}: {json.dumps(report['counts'])}")


def group(known: argparse.Namespace, device: torch.device) -> None:
    options = GroupOptions(size=known.size, range_min=known.range_min, range_max=known.range_max)
    examples = collectives.together(lambda: open_examples(known.source, split=known.split))
    collectives.on_rank_0(lambda: check_output(known.output, examples.files))
    say_of_prompts(examples)
    model, query_model = _open_towers(known, device)
    groups = group_examples(model, examples, options, _retrieving(known, device), query_model=query_model)
    if collectives.rank() == 0:
        save_groups(known.output, groups, examples)
        print(f"{known.output}: {len(examples)} examples in {int(groups.of.max()) + 1} groups")


def encode(known: argparse.Namespace, device: torch.device) -> None:
    model = _open_model(known.model, device, known.pool_factor)
    name = known.prompt or model.default_prompt_name
    if model.multi_vector is not None:
        name = name or "document"
    if known.prompt is not None and (known.prefix is not None or known.prompt not in model.prompts):
        raise ValueError(f"--prompt {known.prompt}: expected one of {sorted(model.prompts)}, and no --prefix beside it")
    options = _embedding(
        known,
        device,
        prefix=model.prompts.get(name or "", "") if known.prefix is None else known.prefix,
        task=name,
        max_length=known.max_len,
        dtype=getattr(torch, known.dtype),
        progress=f"encode {Path(known.input).name}" if known.progress else None,
    )
    rows, dimension = encode_to_file(model, known.input, known.output, options)
    _print_once(f"{known.output}: {rows} x {dimension} {known.dtype}")


def _print_once(text: str) -> None:
    if collectives.rank() == 0:
        print(text)


# ---- what they open, and how they encode


def _open_model(name: str, device: torch.device, pool_factor: int | None = None) -> BiEncoderModel:
    """Return the model on its device, in float32, packed on a GPU if it can be; its size agreed between the ranks."""
    packed = wish(None, device)
    model = collectives.together(lambda: open_encoder(name, dtype=torch.float32, packed=packed))
    collectives.agree("the model", {}, same={"embedding size": model.embedding_dim})
    if pool_factor is not None:
        if model.multi_vector is None:
            raise ValueError(f"--pool-factor {pool_factor}: {name} gives a text one vector: leave it out")
        model.multi_vector = model.multi_vector.replaced({"pool_factor": pool_factor})
    if (packed is None or model.backend_because) and collectives.rank() == 0:
        print(f"{name}: {model.way}", file=sys.stderr)
    return model.to(device).eval()


def _open_towers(known: argparse.Namespace, device: torch.device) -> tuple[BiEncoderModel, BiEncoderModel | None]:
    """Return the encoder of the documents, and that of the queries where the folder holds two."""
    name, pool_factor = known.model, known.pool_factor
    towers = [Path(name).expanduser() / tower for tower in ("passage", "query")]
    if all(tower.is_dir() for tower in towers):
        return _open_model(str(towers[0]), device, pool_factor), _open_model(str(towers[1]), device)
    return _open_model(name, device, pool_factor), None


def _open_teacher(name: str, device: torch.device) -> Any:
    """Return a CrossEncoder where the folder holds a classifier of pairs, else an encoder."""
    config = collectives.together(lambda: local_folder(name)) / "config.json"
    if not config.is_file() or "ForSequenceClassification" not in config.read_text(encoding="utf-8"):
        return _open_model(name, device)
    try:
        from sentence_transformers import CrossEncoder
    except ImportError:
        raise ValueError(f"--teacher {name} scores pairs: install sentence-transformers, which opens it") from None
    return collectives.together(lambda: CrossEncoder(name, device=str(device)))


def _embedding(known: argparse.Namespace, device: torch.device, **options: Any) -> EmbedOptions:
    return EmbedOptions(precision=chosen(known.precision, device), batch_tokens=known.batch_tokens, **options)


def _retrieving(known: argparse.Namespace, device: torch.device, **options: Any) -> RetrieveOptions:
    names = ("similarity", "query_prefix", "passage_prefix", "query_max_len", "passage_max_len")
    embedding = _embedding(known, device, progress="texts" if known.progress else None)
    return RetrieveOptions(embedding=embedding, **{name: getattr(known, name) for name in names}, **options)
