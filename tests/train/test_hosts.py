"""Hosts whose files differ under one name are found out before the first step. Here each rank's folder is its host."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from inbatch.data import open_examples
from inbatch.data.plan import Groups
from inbatch.retrieval.grouping import save_groups
from inbatch.train.config import Config
from tests.train.test_loop import folder, make_config, train_body  # noqa: F401


def _other_order(file: Path) -> None:
    first, *others = file.read_text().splitlines()
    file.write_text("\n".join([*others, first]) + "\n")


def _data(host: Path) -> str:
    _other_order(host / "records.jsonl")
    return r"files read on each host: .*data.train: rank 0 has '26 examples \w+', rank 1 has '26 examples \w+'"


def _evaluation(host: Path) -> str:
    _other_order(host / "beir" / "corpus.jsonl")
    return r"files read on each host: .*eval.data: rank 0 has '30 documents \w+', rank 1 has"


def _judgements(host: Path) -> str:
    file = host / "beir" / "qrels" / "dev.tsv"
    file.write_text(file.read_text().replace("d3\t1", "d4\t1"))
    return "files read on each host: .*eval.data"


def _weights(host: Path) -> str:
    file = host / "model" / "model.safetensors"
    weights = load_file(file)
    next(iter(weights.values())).view(-1)[0] += 1e-6
    save_file(weights, file, {"format": "pt"})
    return r"the model: [^;]*model's weights: rank 0 has '\w+', rank 1 has"


def _tokenizer(host: Path) -> str:
    file = host / "model" / "tokenizer.json"
    values = json.loads(file.read_text())
    *_, a, b = values["model"]["vocab"]
    vocabulary = values["model"]["vocab"]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(values))
    return r"the model: [^;]*model's tokenizer: rank 0 has '\w+', rank 1 has"


def _groups(host: Path) -> str:
    grouped(host, 2)
    return "files read on each host: .*groups of source 0: rank 0 has"


def _no_groups(host: Path) -> str:
    (host / "groups.npz").unlink()
    return "groups groups.npz cannot be read .*: make them by `inbatch group`"


def grouped(host: Path, size: int) -> None:
    examples = open_examples(host / "records.jsonl")
    save_groups(host / "groups.npz", Groups(np.arange(len(examples), dtype=np.int32) // size), examples)


def _nothing(host: Path) -> str:
    return "rank 1 does not see what rank 0 writes to train.output_dir run.*all hosts share"


def hosts_body(rank: int, root: Path, config: Config, message: str) -> None:
    os.chdir(root / f"host-{rank}")
    with pytest.raises(ValueError, match=message):
        train_body(rank, config)
    assert not Path(config.train.output_dir, "config.yaml").exists()


CHANGES = [_data, _evaluation, _judgements, _weights, _tokenizer, _groups, _no_groups, _nothing]


@pytest.mark.parametrize("change", CHANGES)
def test_what_differs_between_hosts_is_named(pool, folder, tmp_path, change):  # noqa: F811
    source = {"path": "records.jsonl"} | ({"groups": "groups.npz"} if change in (_groups, _no_groups) else {})
    for host in ("host-0", "host-1"):
        shutil.copytree(folder, tmp_path / host)
        grouped(tmp_path / host, 3)
    output = "run" if change is _nothing else str(tmp_path / "run")
    config = make_config(Path(), Path(output), data={"train": [source]}, eval={"data": "beir"})
    message = change(tmp_path / "host-1")
    pool.run(hosts_body, 2, tmp_path, config, message)


def test_weights_that_are_not_finite_are_refused_before_the_first_step(folder, tmp_path):  # noqa: F811
    shutil.copytree(folder / "model", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("query.weight"))
    weights[name][0, 0] = torch.nan
    save_file(weights, file, {"format": "pt"})
    config = make_config(folder, tmp_path / "run", model={"name_or_path": str(tmp_path / "model")})
    with pytest.raises(ValueError, match=rf"the starting weights of model hold NaN or infinity, in \S*{name}"):
        train_body(0, config)
