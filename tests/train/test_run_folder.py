"""A run's folder: damaged files are named and not used, lines of a later step go."""

from dataclasses import replace

import pytest

from inbatch.train.config import Config, DataConfig, LossConfig, ModelConfig, TrainConfig
from inbatch.train.run_folder import RunFolder, read_metrics

CONFIG = Config(
    model=ModelConfig(name_or_path="m"),
    data=DataConfig(train="t"),
    train=TrainConfig(output_dir="o"),
    loss=LossConfig(negatives="local"),
)


def test_damaged_lines_are_named_and_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n\x00\xff\n{"loss": 3}\n{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    with pytest.warns(UserWarning, match=r"metrics.jsonl, line [23] is damaged") as warned:
        assert [line["step"] for line in read_metrics(tmp_path)] == [1, 3]
    assert len(warned) == 2, "the last line was being written: that is no damage"
    with pytest.warns(UserWarning, match="line 2 is damaged"):
        RunFolder(tmp_path).drop_lines_after(1)
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n'
    assert read_metrics(tmp_path / "absent") == []


@pytest.mark.parametrize("model", ["model", "model/query"])
def test_a_run_in_a_saved_model_is_refused(tmp_path, model):
    (tmp_path / model).mkdir(parents=True)
    (tmp_path / model / "config_sentence_transformers.json").touch()
    for path in (tmp_path / "model", tmp_path / "model" / "runs" / "a"):
        with pytest.raises(ValueError, match=r"is or lies in the saved model .*model, which is replaced"):
            RunFolder(path).locked().__enter__()
    with RunFolder(tmp_path / "run").locked():
        pass


@pytest.mark.parametrize("content", [b"", b'{"steps": 5', b"\xff", b"5"])
def test_damaged_files_are_named_and_not_used(tmp_path, content):
    folder = RunFolder(tmp_path)
    assert folder.done() == {}
    folder.finish(5)
    assert folder.done() == {"steps": 5}
    (tmp_path / "done.json").write_bytes(content)
    with pytest.warns(UserWarning, match=r"done.json is damaged and is not used"):
        assert folder.done() == {}
    (tmp_path / "data.json").write_bytes(content)
    with pytest.warns(UserWarning, match=r"data.json is damaged and is not used"):
        folder.check_data(CONFIG, 7)


def test_a_run_with_local_negatives_goes_on_with_as_many_ranks(tmp_path):
    (tmp_path / "data.json").write_text('{"examples": 7, "ranks": 2}')
    with pytest.raises(
        ValueError, match=r"loss\.negatives is local, .* began with 2, and this one has 1; start as many"
    ):
        RunFolder(tmp_path).check_data(CONFIG, 7)
    RunFolder(tmp_path).check_data(replace(CONFIG, loss=LossConfig()), 7)
