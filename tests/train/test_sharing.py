"""A model that others can use: its card, its way to the hub, records and figures from Python."""

import json
from dataclasses import replace
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer

from inbatch import BiEncoderModel, cli
from inbatch.encoder import card
from inbatch.train.config import CheckpointConfig, DataConfig, EvalConfig
from inbatch.train.config_file import load
from inbatch.train.loop import train
from inbatch.train.run_folder import read_metrics
from tests.tiny_models import TEXTS, save_tiny
from tests.train.test_loop import assert_close, folder, make_config, trained  # noqa: F401


class Hub:
    """Stands for HfApi: what was asked, and the files that came."""

    calls: list[tuple] = []  # noqa: RUF012

    def create_repo(self, repo_id: str, **options) -> str:
        if repo_id == "not mine":
            raise huggingface_hub.errors.HFValidationError("Repo id must be in the form 'owner/name'")
        self.calls.append((repo_id, options["private"]))
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, **options) -> None:
        files = {str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()}
        self.calls.append((repo_id, files))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(card, "HfApi", Hub)
    Hub.calls = []
    return Hub.calls


def test_a_run_from_python_is_watched_and_leaves_a_card_that_repeats_it(folder, tmp_path, hub, capsys):  # noqa: F811
    groups = {"eval": vars(EvalConfig(data=str(folder / "beir")))}
    config = make_config(folder, tmp_path / "files", **groups)
    seen = []
    train(config, device=torch.device("cpu"), on_figures=lambda step, figures: seen.append({"step": step, **figures}))
    assert seen == read_metrics(tmp_path / "files")
    assert {"loss", "eval_nDCG@10"} <= {name for line in seen for name in line}

    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    for name, data in (("list", records), ("datasets", datasets.Dataset.from_list(records))):
        named = make_config(folder, tmp_path / name, data={"train": f"my {name}"})
        train(named, device=torch.device("cpu"), data=data)
        assert_close(trained(named), trained(config), atol=0)
    two = replace(config, data=DataConfig(train=["a", "b"]))
    with pytest.raises(ValueError, match=r"data is given beside 2 sources in data\.train"):
        train(replace(two, train=replace(two.train, output_dir=str(tmp_path / "two"))), data=records)

    text = (tmp_path / "files" / "model" / "README.md").read_text()
    about = huggingface_hub.ModelCard(text).data
    assert (about.library_name, about.pipeline_tag) == ("sentence-transformers", "sentence-similarity")
    assert "inbatch" in about.tags
    assert about.base_model is None, "a folder is no name on the hub"
    final = [line for line in seen if "eval_nDCG@10" in line][-1]
    assert f"| {final['eval_nDCG@10']:.4f} |" in text
    assert f"- {folder / 'records.jsonl'}" in text
    (tmp_path / "again.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    assert load(tmp_path / "again.yaml") == config

    model = BiEncoderModel.from_pretrained(tmp_path / "files" / "model")
    assert model.push_to_hub("me/it", private=True) == "https://hub/me/it"
    assert cli.run(["push", str(tmp_path / "files" / "model"), "me/it"]) == 0
    assert "https://hub/me/it" in capsys.readouterr().out
    (asked, private), (_, files), (_, not_said), (_, again) = hub
    assert (asked, private, not_said) == ("me/it", True, None)
    assert files == again >= {"README.md", "modules.json", "model.safetensors", "tokenizer.json"}
    for arguments, message in (
        ([str(folder / "beir"), "me/it"], "is not a saved model"),
        ([str(tmp_path / "files" / "model"), "not mine"], "the hub takes no not mine: Repo id must be"),
    ):
        assert cli.run(["push", *arguments]) == 1
        assert message in capsys.readouterr().err


def test_a_base_model_and_data_on_the_hub_are_named_in_the_card(folder, tmp_path):  # noqa: F811
    model = BiEncoderModel.from_pretrained(folder / "model", prompts={"query": "query: "})
    model.base_model = "someone/some-model"
    text = card.model_card(model, datasets=["someone/some-data"])
    front = yaml.safe_load(text.split("---")[1])
    assert (front["base_model"], front["datasets"]) == ("someone/some-model", ["someone/some-data"])
    assert "prompt `query`: 'query: '" in text
    model.base_model = "~/a-folder"
    assert "base_model" not in yaml.safe_load(card.model_card(model).split("---")[1])


@pytest.mark.parametrize("kind", ["model", "llama"])
def test_an_adapter_is_saved_as_one_and_opened_with_its_base(folder, tmp_path, capsys, kind):  # noqa: F811
    """The same embeddings as the merged model of the same run, by us and by sentence-transformers."""
    if kind == "llama":
        save_tiny("llama", tmp_path / "llama", is_causal=False)
    name = str((tmp_path if kind == "llama" else folder) / kind)
    models = {}
    for merge in (True, False):
        config = make_config(
            folder, tmp_path / str(merge), model={"name_or_path": name}, lora={"r": 2, "merge": merge},
            optim={"lr": 0.05}, checkpoint=vars(CheckpointConfig(every_steps=5)),
        )  # fmt: skip
        train(config, device=torch.device("cpu"))
        models[merge] = BiEncoderModel.from_pretrained(tmp_path / str(merge) / "model").eval()
    saved = tmp_path / "False" / "model"
    assert (saved / "adapter_config.json").is_file()
    assert not (saved / "model.safetensors").exists()
    assert cli.run(["export", str(tmp_path / "False"), str(tmp_path / "exported")]) == 0
    assert (tmp_path / "exported" / "adapter_model.safetensors").is_file()
    batch = models[True].tokenize(TEXTS)
    merged_BD = models[True](batch)
    start_BD = BiEncoderModel.from_pretrained(name).eval()(batch)
    assert (merged_BD - start_BD).abs().max() > 1e-2
    for model in (models[False], BiEncoderModel.from_pretrained(tmp_path / "exported").eval()):
        torch.testing.assert_close(model(batch), merged_BD, rtol=0, atol=1e-5)
    theirs = SentenceTransformer(str(saved), device="cpu").encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(theirs, merged_BD.detach(), rtol=0, atol=1e-5)
    if kind == "llama":
        save_tiny("llama", tmp_path / "causal")
        config = replace(config, model=replace(config.model, name_or_path=str(tmp_path / "causal")))
        with pytest.raises(ValueError, match=r"does not record bidirectional .* set lora\.merge to true"):
            train(replace(config, train=replace(config.train, output_dir=str(tmp_path / "c"))))
    (saved / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ValueError, match="names no base_model_name_or_path"):
        BiEncoderModel.from_pretrained(saved)


def test_a_model_is_exported_to_onnx(tmp_path, capsys):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    save_tiny("bert", tmp_path / "model", num_hidden_layers=1)
    assert cli.run(["export", str(tmp_path / "model"), str(tmp_path / "model.onnx")]) == 0
    assert "as ONNX" in capsys.readouterr().out
    model = BiEncoderModel.from_pretrained(tmp_path / "model").eval()
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    for texts in (TEXTS, TEXTS[:1]):
        batch = model.tokenize(texts)
        (embeddings_BD,) = session.run(None, {name: value.numpy() for name, value in batch.items()})
        torch.testing.assert_close(torch.from_numpy(embeddings_BD), model(batch).detach(), rtol=0, atol=1e-4)
