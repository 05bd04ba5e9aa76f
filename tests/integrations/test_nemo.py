"""NeMo AutoModel's recipes: what each key becomes, and a run that follows a loop of torch alone step by step.

Shapes: b queries of a rank, n passages of a query, N passages of a micro-batch, D dimension.
"""

import json
import math
import random
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from inbatch import BiEncoderModel, cli
from inbatch.cli.from_nemo import load_recipe
from inbatch.integrations.nemo import translate
from inbatch.train.loop import train
from inbatch.train.run_folder import read_metrics
from tests.helpers import device
from tests.tiny_models import WORDS, save_tiny

NEMO = "nemo_automodel"
DATASET = {
    "_target_": f"{NEMO}.components.datasets.llm.retrieval_dataset.RetrievalDatasetConfig",
    "model_type": "bi_encoder",
    "data_type": "train",
    "n_passages": 3,
    "seed": 42,
    "do_shuffle": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Tiny backbones; a corpus-id file whose documents are often shared, with one to three negatives a query."""
    root = tmp_path_factory.mktemp("nemo")
    save_tiny("bert", root / "bert")
    save_tiny("llama", root / "llama", max_position_embeddings=512)
    chance = random.Random(3)
    texts = sorted({" ".join(chance.choices(WORDS, k=chance.randint(2, 9))) for _ in range(12)})
    (root / "wiki").mkdir()
    metadata = {"class": "TextQADataset", "corpus_id": "wiki", "query_instruction": "what is"}
    (root / "wiki" / "merlin_metadata.json").write_text(json.dumps(metadata))
    lines = [json.dumps({"id": f"d{i}", "text": text}) for i, text in enumerate(texts)]
    (root / "wiki" / "train.jsonl").write_text("\n".join(lines))
    records = []
    for i in range(18):
        positive, *negatives = chance.sample(range(len(texts)), 2 + i % 3)
        records.append(
            {
                "question_id": i,
                "question": " ".join(chance.choices(WORDS, k=chance.randint(2, 5))),
                "corpus_id": "wiki",
                "pos_doc": [{"id": f"d{positive}"}, {"id": f"d{(positive + 1) % len(texts)}"}][: 1 + i % 2],
                "neg_doc": [{"id": f"d{j}"} for j in negatives if j != (positive + 1) % len(texts)] or ["d0"],
            }
        )
    (root / "train.json").write_text(json.dumps({"corpus": [{"path": "wiki"}], "data": records}))
    return root


def recipe_of(folder: Path, kind: str, output: Path) -> dict:
    """The Llama-3.2-1B recipe with a local model and data."""
    name = str(folder / kind)
    return {
        "recipe": "TrainBiEncoderRecipe",
        "seed": 42,
        "temperature": 0.1,
        "step_scheduler": {
            "global_batch_size": 8, "local_batch_size": 2, "ckpt_every_steps": 500, "val_every_steps": 500,
            "num_epochs": 1,
        },
        "dist_env": {"backend": "nccl", "timeout_minutes": 30},
        "model": {
            "_target_": f"{NEMO}.NeMoAutoModelBiEncoder.from_pretrained",
            "pretrained_model_name_or_path": name,
            "pooling": "avg",
            "l2_normalize": True,
            "use_liger_kernel": True,
            "use_sdpa_patching": True,
            "torch_dtype": "bfloat16",
            "do_distributed_inbatch_negative": False,
        },
        "tokenizer": {
            "_target_": f"{NEMO}.NeMoAutoTokenizer.from_pretrained",
            "pretrained_model_name_or_path": name,
            "add_eos_token": False,
        },
        "dataset": {**DATASET, "data_dir_list": [str(folder / "train.json")]},
        "dataloader": {
            "collate_fn": {
                "_target_": f"{NEMO}.components.datasets.llm.BiEncoderCollator",
                "q_max_len": 8, "p_max_len": 12, "query_prefix": "query :", "passage_prefix": "document :",
                "pad_to_multiple_of": 8,
            },
            "shuffle": True,
            "num_workers": 0,
        },
        "optimizer": {
            "_target_": "transformer_engine.pytorch.optimizers.fused_adam.FusedAdam",
            "lr": 1e-3, "weight_decay": 0.1, "eps": 1e-5, "adam_w_mode": True, "bias_correction": True,
            "master_weights": True,
        },
        "lr_scheduler": {"lr_warmup_steps": 2, "lr_decay_style": "linear"},
        "checkpoint": {
            "enabled": True, "checkpoint_dir": str(output), "model_save_format": "safetensors",
            "save_consolidated": True,
        },
        "distributed": {
            "strategy": "fsdp2", "dp_size": "none", "tp_size": 1, "cp_size": 1, "sequence_parallel": False,
        },
        "ci": {"nightly": {"step_scheduler.max_steps": None}},
    }  # fmt: skip


def nemotron_of(folder: Path, kind: str, output: Path) -> dict:
    """The same as Nemotron's base recipe nests it, with its kernel, prefixes, schedule and checkpoints."""
    recipe = recipe_of(folder, kind, output)
    recipe["recipe"] = {"_target_": f"{NEMO}.recipes.retrieval.train_bi_encoder.TrainBiEncoderRecipe"}
    recipe["model"]["attn_implementation"] = "sdpa"
    dataset = recipe.pop("dataset")
    dataset["_target_"] = f"{NEMO}.components.datasets.llm.make_retrieval_dataset"
    dataset["train_n_passages"] = dataset.pop("n_passages")
    recipe["dataloader"]["dataset"] = {**dataset, "eval_negative_size": 4}
    recipe["dataloader"]["collate_fn"] |= {"query_prefix": "query : "}
    recipe["lr_scheduler"] = {"lr_warmup_steps": 1, "lr_decay_style": "cosine"}
    recipe["checkpoint"]["max_recent_checkpoints"] = 1
    held_out = {"data_dir_list": str(folder / "train.json"), "data_type": "eval", "train_n_passages": 5}
    recipe["validation_dataloader"] = {
        "dataset": {**dataset, **held_out, "eval_negative_size": 1, "max_train_samples": 9},
        "collate_fn": {**recipe["dataloader"]["collate_fn"], "query_prefix": "query :", "padding": "longest"},
        "batch_size": 2,
        "shuffle": False,
    }
    return recipe


def write(path: Path, recipe: dict) -> str:
    # The field's files anchor a group of overrides and name it again.
    path.write_text(yaml.safe_dump(recipe, sort_keys=False) + "anchored: &same\n  a: 1\n".replace("anchored", "wandb"))
    return str(path)


@pytest.mark.parametrize(("written", "kind"), [(recipe_of, "llama"), (nemotron_of, "bert")])
def test_recipes_train(folder, tmp_path, capsys, written, kind):
    path = write(tmp_path / "recipe.yaml", written(folder, kind, tmp_path / "run"))
    overrides = ["--step_scheduler.max_steps", "3", "--model.use_liger_kernel=false", "--train.progress", "false"]
    assert cli.run(["train", "--from-nemo", path, *overrides]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "not used" in line]
    assert len(said) == 1
    assert "ci" in said[0]
    validation = "step_scheduler.val_every_steps" if written is recipe_of else "validation_dataset.max_train_samples"
    for key in ("model.use_liger_kernel", "optimizer.master_weights", validation):
        assert key in said[0]
    losses = [line["loss"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert len(losses) == 3
    model = BiEncoderModel.from_pretrained(tmp_path / "run" / "model")
    assert model.prompts["query"] == ("query : " if written is recipe_of else "query :  ")
    assert cli.run(["train", "--from-nemo", path, "--nproc-per-node", "2", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["train"]["accumulation_steps"] == 2  # as for two processes
    config, _ = load_recipe(path, [], world_size=2)
    assert (config.train.accumulation_steps, config.optim.warmup_steps) == (2, 2 if written is recipe_of else 1)
    assert (config.optim.init_lr, config.optim.min_lr) == pytest.approx((1e-4, 1e-5))
    assert config.data.sources == [{"path": str(folder / "train.json"), "negatives": "own"}]
    assert (config.data.train_n_passages, config.train.parallel, config.train.precision) == (3, "fsdp2", "bf16")
    assert config.checkpoint.keep_last == (2 if written is recipe_of else 1)
    assert config.eval.validation == (
        None if written is recipe_of else {
            "path": str(folder / "train.json"), "split": "train", "train_n_passages": 2, "negatives": "own",
            "mask_own_negatives": False, "query_max_len": 8, "passage_max_len": 12, "query_prefix": "query : ",
            "passage_prefix": "document : ",
        }
    )  # fmt: skip
    assert config.eval.every_steps == (None if written is recipe_of else 500)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"recipe": "TrainFinetuneRecipeForNextTokenPrediction"}, "recipe is Train.*only bi-encoders"),
        ({"optimizer._target_": "torch.optim.SGD"}, "optimizer._target_ is torch.optim.SGD"),
        ({"optimizer.adam_w_mode": False}, "optimizer.adam_w_mode is False.*expected True"),
        ({"optimizer.param_group_overrides.0": 1}, "param_group_overrides.0 is not supported"),
        ({"distributed.tp_size": 2}, "distributed.tp_size is 2"),
        ({"distributed.dp_size": 4}, "distributed.dp_size is 4, but there are 1 processes"),
        ({"model.pooling": "colbert"}, "model.pooling is colbert: expected one of avg"),
        ({"model.pooling": "weighted_avg", "model.l2_normalize": False}, "is the sum of the token states"),
        ({"model.extract_submodel": "language_model"}, "model.extract_submodel is .*leave it out"),
        ({"tokenizer.add_eos_token": True}, "tokenizer.add_eos_token is True"),
        ({"tokenizer.pretrained_model_name_or_path": "other"}, "only the model's own"),
        ({"dataset.max_train_samples": 9}, "dataset.max_train_samples is 9"),
        ({"validation_dataset.data_dir_list": ["a", "b"]}, "validation_dataset.data_dir_list has 2 sources"),
        ({"model.tokenizer_backend": "x"}, "unknown key 'model.tokenizer_backend'"),
        ({"dataset.surprise": 1}, "unknown key 'dataset.surprise'"),
        ({"step_scheduler.local_batch_size": 0}, "8 is not divisible by local_batch_size 0"),
        ({"step_scheduler.global_batch_size": "all"}, "global_batch_size is 'all': expected a value such as 32"),
        ({"optimizer.lr": "high"}, "optimizer.lr is 'high': expected a number"),
        ({"dataset.data_dir_list": [3]}, "dataset.data_dir_list has 3: expected paths"),
        ({"dataloader.dataset.n_passages": 9}, "dataset.n_passages is 9 and dataset.n_passages is 3: leave one out"),
        ({"step_scheduler.local_batch_size": 3}, "8 is not divisible by local_batch_size 3 x 1"),
        ({"lr_scheduler.lr_decay_style": "WSD"}, "lr_decay_style is WSD"),
        ({"lr_scheduler.lr_warmup_steps": "none"}, "lr_warmup_steps is missing"),
        ({"peft.target_modules": ["*proj*"]}, r"peft.target_modules has 'proj\*'"),
        ({"checkpoint.restore_from": "LATEST"}, "checkpoint.restore_from is 'LATEST'"),
    ],
)
def test_what_would_change_the_result_is_refused(tmp_path, overrides, message):
    path = write(tmp_path / "recipe.yaml", recipe_of(tmp_path, "bert", tmp_path))
    options = [f"--{key}={json.dumps(value)}" for key, value in overrides.items()]
    with pytest.raises(ValueError, match=message):
        load_recipe(path, options, world_size=1)


def test_what_keys_become(tmp_path):
    def became(**changed):
        recipe = recipe_of(tmp_path, "bert", tmp_path)
        for key, value in changed.items():
            recipe[key] = {**recipe.get(key, {}), **value} if isinstance(value, dict) else value
        return translate(recipe)[0]

    gathered = {"do_distributed_inbatch_negative": True}
    assert became()["loss"] == {"temperature": 0.1, "mask_duplicates": False, "detach_remote": False}
    assert became(model=gathered)["loss"] == {"temperature": 0.1, "mask_duplicates": "positive", "detach_remote": True}
    inline = {"_target_": f"{NEMO}.components.datasets.llm.retrieval_dataset_inline.make_retrieval_dataset"}
    exact = {**gathered, "detach_distributed_inbatch_negatives": False}
    loss = became(model=exact, dataset=inline)["loss"]
    assert (loss["mask_duplicates"], loss["detach_remote"]) == (False, False)
    assert became(model={"l2_normalize": False})["loss"]["temperature"] == 1.0, "only with normalised embeddings"
    assert became(model={"pooling": "weighted_avg"})["model"]["pooling"] == "mean", "of length 1 the same"
    lora = became(peft={"target_modules": ["*.q_proj", "v_proj"], "dim": 16, "use_triton": True})["lora"]
    assert lora == {"r": 16, "alpha": 32, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
    data = became(dataset={"data_dir_list": [{"path": "a.json", "num_samples": 9}, "b.json"]})["data"]
    assert data["train"] == [
        {"path": "a.json", "num_samples": 9, "negatives": "own"}, {"path": "b.json", "negatives": "own"},
    ]  # fmt: skip
    assert data["mixed_batches"]
    assert became(lr_scheduler={"lr_warmup_steps": 3})["optim"]["warmup_steps"] == 3
    assert became(lr_scheduler={"lr_warmup_steps": 0})["optim"]["init_lr"] is None, "which only a warm-up uses"
    assert became(optimizer=yaml.safe_load("lr: 1e-5"))["optim"]["lr"] == 1e-5, "which YAML takes for text"
    assert became(model={"is_causal": True})["model"]["bidirectional"] is False
    assert became(validation_dataset=None, validation_dataloader=None, peft=None, clip_grad_norm=None)["eval"] == {}


# ---- step by step


def run_body(rank: int, path: str, overrides: list[str], world_size: int) -> None:
    config, _ = load_recipe(path, overrides, world_size=world_size)
    train(config, device=device())


def by_hand(
    folder: Path, *, ranks: int, steps: int, gathered: bool, detached: bool, normalized: bool = True
) -> tuple[list[dict], dict, dict]:
    """Steps as the specification has them, of all ranks in one process; the weights and the validation's figures."""
    model, tokenizer = AutoModel.from_pretrained(folder / "bert"), AutoTokenizer.from_pretrained(folder / "bert")
    documents = [json.loads(line) for line in (folder / "wiki" / "train.jsonl").read_text().splitlines()]
    texts = {document["id"]: document["text"] for document in documents}
    records = json.loads((folder / "train.json").read_text())["data"]
    parameters = [p for name, p in model.named_parameters() if not name.startswith("pooler")]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1, eps=1e-5)

    def embed(sentences: list[str], length: int) -> torch.Tensor:
        tokens = tokenizer(sentences, truncation=True, max_length=length, padding=True, return_tensors="pt")
        tokens.pop("token_type_ids", None)
        mask = tokens["attention_mask"][..., None].float()
        states_BD = (model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)
        return F.normalize(states_BD, dim=-1) if normalized else states_BD

    def group(row: dict, n: int) -> list[str]:
        negatives = [doc["id"] if isinstance(doc, dict) else doc for doc in row["neg_doc"]]
        return [row["pos_doc"][0]["id"], *(negatives[k % len(negatives)] for k in range(n - 1))]

    def own_scores(queries_bD: torch.Tensor, passages_ND: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bd,bnd->bn", queries_bD, passages_ND.unflatten(0, (len(queries_bD), -1))) / temperature

    temperature = 0.1 if normalized else 1.0
    b, n, lines = 2, 3, []
    per_epoch, accumulated = len(records) // 8, 8 // (b * ranks)
    for step in range(steps):
        loss, first = torch.zeros(()), step % per_epoch * 8
        for part in range(accumulated):
            queries, passages, ids = [], [], []
            for rank in range(ranks):
                start = first + (part * ranks + rank) * b
                rows = records[start : start + b]
                groups = [name for row in rows for name in group(row, n)]
                queries.append(embed([f"query : {row['question']}" for row in rows], 8))
                passages.append(embed([f"document : {texts[name]}" for name in groups], 12))
                ids += groups
            for rank in range(ranks):
                if gathered:
                    seen = [p.detach() if detached and r != rank else p for r, p in enumerate(passages)]
                    scores_bN = queries[rank] @ torch.cat(seen).T / temperature
                    labels = (torch.arange(b) + rank * b) * n
                    for i, label in enumerate(labels.tolist()):
                        copies = [j for j, name in enumerate(ids) if name == ids[label] and j != label]
                        scores_bN[i, copies] = torch.finfo(torch.float32).min
                else:
                    scores_bN = own_scores(queries[rank], passages[rank])
                    labels = torch.zeros(b, dtype=torch.long)
                loss = loss + F.cross_entropy(scores_bN, labels) / (accumulated * ranks)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        decayed = 1e-5 + (1e-3 - 1e-5) * 0.5 * (1 + math.cos(math.pi * (step - 2) / 3))
        rate = 1e-4 + (1e-3 - 1e-4) * step / 2 if step < 2 else decayed
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        lines.append({"loss": float(loss.detach()), "grad_norm": float(norm), "lr": rate})
    with torch.no_grad():
        queries_bD = embed([f"query : {row['question']}" for row in records], 8)
        passages_ND = embed([f"document : {texts[name]}" for row in records for name in group(row, 2)], 12)
        scores_bN = own_scores(queries_bD, passages_ND)
        loss = F.cross_entropy(scores_bN, torch.zeros(len(records), dtype=torch.long))
        ranks_b = 1 + (scores_bN > scores_bN[:, :1]).sum(1)
        found = {"loss": loss, "accuracy": (ranks_b == 1).float().mean(), "mrr": (1 / ranks_b).mean()}
    return lines, model.state_dict(), {f"validation_{name}": float(value) for name, value in found.items()}


@pytest.mark.parametrize(
    ("ranks", "gathered", "detached", "normalized"),
    [
        (1, False, True, True), (1, True, True, False), (2, False, True, True), (2, True, True, True),
        (2, True, False, True),
    ],
)  # fmt: skip
def test_a_run_follows_the_specification_step_by_step(pool, folder, tmp_path, ranks, gathered, detached, normalized):
    path = write(tmp_path / "recipe.yaml", nemotron_of(folder, "bert", tmp_path / "run"))
    overrides = {
        "step_scheduler.max_steps": 5, "model.torch_dtype": "float32", "distributed.strategy": "ddp",
        "dataloader.shuffle": "false", "dataloader.dataset.do_shuffle": "false", "lr_scheduler.lr_warmup_steps": 2,
        "dataloader.collate_fn.query_prefix": "query :", "train.progress": "false",
        "model.do_distributed_inbatch_negative": str(gathered).lower(),
        "model.detach_distributed_inbatch_negatives": str(detached).lower(),
        "model.l2_normalize": str(normalized).lower(),
    }  # fmt: skip
    options = [f"--{key}={value}" for key, value in overrides.items()]
    pool.run(run_body, ranks, path, options, ranks)
    kind = {"ranks": ranks, "gathered": gathered, "normalized": normalized}
    lines, weights, held_out = by_hand(folder, steps=5, detached=detached, **kind)
    last = read_metrics(tmp_path / "run")[-1]
    assert {name: last[name] for name in held_out} == pytest.approx(held_out, rel=1e-5)
    ours = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    for mine, reference in zip(ours, lines, strict=True):
        assert {name: mine[name] for name in reference} == pytest.approx(reference, rel=1e-5, abs=1e-5)
    trained = AutoModel.from_pretrained(tmp_path / "run" / "model").state_dict()
    for name, value in weights.items():
        torch.testing.assert_close(trained[name], value, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    if gathered and not detached:  # the two are different runs
        biased, *_ = by_hand(folder, steps=2, detached=True, **kind)
        assert abs(biased[1]["grad_norm"] - lines[1]["grad_norm"]) > 1e-3
