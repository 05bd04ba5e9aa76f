"""The command line: every mistake is one line that names it, the status is not 0, and no rank is left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml

import inbatch
from inbatch import cli
from inbatch.cli.launch import _report_killed, _wait
from inbatch.collectives import OtherRankError
from inbatch.encoder.model import BiEncoderModel
from inbatch.train.config_file import load
from tests.helpers import REPOSITORY
from tests.tiny_models import WORDS, save_tiny

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    save_tiny("bert", root / "model")
    save_tiny("bert", root / "wider", hidden_size=48)
    good = [{"query": WORDS[i], "positive": f"the {WORDS[i + 1]}"} for i in range(6)]
    write(root / "good.jsonl", *map(json.dumps, good))
    write(root / "broken.jsonl", json.dumps(good[0]), json.dumps(good[1]), '{"query": "a", "posi')
    write(root / "no_positive.jsonl", json.dumps(good[0]), '{"query": "where is the cat"}')
    for name, document in (("beir", "d1"), ("bad_qrels", "d9")):
        write(root / name / "corpus.jsonl", *(json.dumps({"_id": f"d{i}", "text": WORDS[i]}) for i in range(5)))
        write(root / name / "queries.jsonl", '{"_id": "q1", "text": "the cat"}')
        write(root / name / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore", f"q1\t{document}\t1")
    config = {
        "model": {"name_or_path": str(root / "model")},
        "data": {"train": str(root / "good.jsonl"), "query_max_len": 8, "passage_max_len": 8},
        "train": {
            "output_dir": str(root / "run"),
            "global_batch_size": 4,
            "max_steps": 2,
            "device": "cpu",
            "progress": False,
        },
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    return root


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def only_message(capsys) -> str:
    """What a user reads on stderr: exactly one line, and no traceback."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("inbatch: error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--data.train={home}/absent.jsonl"], ["absent.jsonl does not exist"]),
        (["--data.train={home}/broken.jsonl"], ["broken.jsonl, line 3", "not JSON"]),
        (["--data.train={home}/no_positive.jsonl"], ["no_positive.jsonl, line 2", "positive"]),
        (["--eval.data={home}/bad_qrels", "--eval.split=test"], ["bad_qrels/qrels/test.tsv, line 2", "'d9'"]),
        (["--eval.data={home}/beir", "--eval.split=test", "--eval.measures=[foo@10]"], ["'foo@10' is not a measure"]),
        (
            ["--eval.data={home}/beir", "--eval.split=test", "--eval.measures=[nDCG@1000]"],
            ["nDCG@1000 looks at more documents than the 100 that training retrieves; lower the cut-off"],
        ),
        (["--loss.matryoshka_dims=[64]"], ["matryoshka_dims must not exceed the embeddings' dimension 32, got (64,)"]),
        (["--loss.impl=fused"], ['impl="fused" cannot run here']),
        (["--train.output_dir={home}/good.jsonl"], ["train.output_dir", "good.jsonl is a file or lies below one"]),
        (["--optim.learning_rate=1"], ["unknown key 'optim.learning_rate'; did you mean 'optim.lr'?"]),
        (["--model.name_or_path={home}/beir"], ["beir is not a model"]),
        (["--train.accumulation_steps=3"], ["global_batch_size 4 is not divisible by train.accumulation_steps 3"]),
        (["--train.device=cuda"], ["device is cuda but torch sees no GPU"]),
        (["--loss.temperature=cold"], ["loss.temperature is cold: expected a number"]),
    ],
)
def test_a_mistake_is_one_line(home, tmp_path, capsys, monkeypatch, options, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    options = [option.format(home=home) for option in options]
    status = cli.run(["train", str(home / "config.yaml"), f"--train.output_dir={tmp_path}", *options])
    message = only_message(capsys)
    assert status == 1
    assert not (tmp_path / "config.yaml").exists(), "a run that could not start must not claim its folder"
    assert all(part in message for part in expected), message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            "train c.yaml --nproc-per-node x",
            "--nproc-per-node: x: expected a whole number of at least 1; `inbatch train",
        ),
        ("evaluate model", "required: DATA; `inbatch evaluate --help` lists the options"),
        ("encode m i o.npy --timeout-minutes 0", "--timeout-minutes: 0: expected a positive number of minutes"),
        ("mine m s o.jsonl --stray", "unrecognized arguments: --stray"),
        ("frobnicate", "invalid choice: 'frobnicate'"),
    ],
)
def test_wrong_usage_is_one_line(capsys, arguments, expected):
    with pytest.raises(SystemExit) as done:
        cli.run(arguments.split())
    assert done.value.code == 2
    assert expected in only_message(capsys)


@pytest.mark.parametrize(
    ("error", "status", "expected"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("[x/gloo/pair.cc:547] Connection closed by peer [1.2.3.4]:5"), 1, "another rank failed"),
        (RuntimeError("[x/gloo/unbound_buffer.cc:81] Timed out waiting 1000ms for recv"), 1, "another rank hangs"),
        (OtherRankError("rank 1: OSError: No space left on device"), 1, "rank 1: OSError: No space left"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 1, "lower train.micro_batch_tokens"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), 1, "lower data.num_workers"),
    ],
)
def test_an_end_that_came_from_outside_is_one_line(capsys, monkeypatch, error, status, expected):
    monkeypatch.setattr(cli, "_export", mock.Mock(side_effect=error))
    assert cli.run(["export", "run", "model"]) == status
    assert expected in only_message(capsys)


def test_an_unknown_error_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "_export", mock.Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.run(["export", "run", "model"])


@pytest.mark.parametrize("source", ["/absent-run", "/", "{home}/runs/without_checkpoints"])  # config.yaml is in home
def test_nothing_to_export(home, tmp_path, capsys, source):
    source = source.format(home=home)
    assert cli.run(["export", source, str(tmp_path / "model")]) == 1
    assert f"{source} is neither a run with checkpoints nor a checkpoint in one" in only_message(capsys)


def test_train_evaluate_encode(home, capsys):
    assert cli.run(["train", str(home / "config.yaml")]) == 0
    printed = capsys.readouterr().err
    assert "each query sees 4 candidates: its positive and 3 negatives (4 queries x 1 passage)" in printed

    # The same command finds the run done; another configuration in its folder is refused.
    assert cli.run(["train", str(home / "config.yaml")]) == 0
    assert "this run is done" in capsys.readouterr().err
    assert cli.run(["train", str(home / "config.yaml"), "--loss.temperature", "0.07"]) == 1
    assert "holds a run with another configuration (loss.temperature was 0.02, is 0.07)" in only_message(capsys)

    model, run_file = str(home / "run" / "model"), home / "test.run"
    options = ["--measures", "nDCG@10", "R@5", "--run-file", str(run_file), "--no-progress", "--device", "cpu"]
    assert cli.run(["evaluate", model, str(home / "beir"), *options]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["R@5"] == 1.0
    assert 0 < figures["nDCG@10"] <= 1
    assert len(run_file.read_text().splitlines()) == 5
    qrels = home / "beir" / "qrels" / "test.tsv"
    assert cli.run(["evaluate", model, str(home / "beir"), *options, "--run-file", str(qrels)]) == 1
    assert (
        only_message(capsys)
        == f"inbatch: error: {qrels} is read as the source, and would be replaced: name another file"
    )

    output = home / "corpus.npy"
    assert cli.run(["encode", model, str(home / "beir"), str(output), "--no-progress", "--device", "cpu"]) == 0
    assert "5 x 32 float32" in capsys.readouterr().out
    opened = BiEncoderModel.from_pretrained(model)
    expected = opened(opened.tokenize(WORDS[:5])).detach().numpy()
    np.testing.assert_allclose(np.load(output), expected, atol=1e-6)
    assert Path(f"{output}.ids.txt").read_text().split() == [f"d{i}" for i in range(5)]

    mined, options = home / "mined.jsonl", ["--num-negatives", "2", "--query-prefix", "", "--no-progress"]
    assert cli.run(["mine", model, str(home / "beir"), str(mined), "--split", "test", *options, "--device", "cpu"]) == 0
    assert '"negatives": ' in capsys.readouterr().out
    assert all(len(json.loads(line)["neg"]) == 2 for line in mined.read_text().splitlines())
    assert cli.run(["mine", model, str(home / "beir"), str(mined), "--range-min", "100", "--device", "cpu"]) == 1
    assert "range_min is 100 and range_max 100" in only_message(capsys)

    command = ["mine", model, str(home / "beir"), str(mined), "--split", "test", "--teacher", str(home / "run")]
    for wrong in (["encode", str(home / "run"), str(home / "beir"), str(output)], command):
        assert cli.run([*wrong, "--device", "cpu"]) == 1
        assert f"{home / 'run'} is not a model, but holds {home / 'run' / 'model'}: name" in only_message(capsys)
    assert cli.run(["encode", model, str(home / "beir"), str(output), "--prompt", "poem", "--device", "cpu"]) == 1
    assert "--prompt poem: expected one of" in only_message(capsys)


@pytest.mark.parametrize(("device", "threads"), [("cuda", 1), ("cpu", 2)])
def test_beside_a_gpu_torch_computes_in_one_thread(home, monkeypatch, device, threads):
    seen = []
    monkeypatch.setattr("inbatch.cli._processes", lambda *settings: nullcontext(torch.device(device)))
    monkeypatch.setattr("inbatch.train.loop.train", lambda config, device: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert cli.run(["train", str(home / "config.yaml")]) == 0
    finally:
        torch.set_num_threads(before)
    assert seen == [threads]


def test_help_names_every_key(capsys):
    for arguments in (
        ["--help"],
        ["train", "--help"],
        ["evaluate", "--help"],
        ["encode", "--help"],
        ["mine", "--help"],
    ):
        with pytest.raises(SystemExit) as done:
            cli.run(arguments)
        assert done.value.code == 0
    printed = capsys.readouterr().out
    assert "--optim.lr" in printed
    assert "peak learning rate" in printed
    assert "--nproc-per-node" in printed


def test_the_version_and_the_whole_configuration_are_printed(home, tmp_path, capsys):
    with pytest.raises(SystemExit) as done:
        cli.run(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"inbatch {inbatch.__version__}\n"
    arguments = ["train", str(home / "config.yaml"), "--nproc-per-node", "2", "--optim.lr", "1e-3", "--print_config"]
    assert cli.run(arguments) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load(tmp_path / "printed.yaml") == load(home / "config.yaml", ["--optim.lr", "1e-3"])


def test_without_the_extra_the_remedy_is_named(home, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydantic", None)
    for name in ("config_file", "config", "settings"):
        monkeypatch.delitem(sys.modules, f"inbatch.train.{name}", raising=False)
    assert cli.run(["train", str(home / "config.yaml")]) == 1
    assert "pydantic is not installed: pip install 'inbatch[train]'" in only_message(capsys)


def run_command(*command: str, cwd: Path = REPOSITORY, **variables: str) -> tuple[subprocess.CompletedProcess, float]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **variables}
    started = time.monotonic()
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False)
    return done, time.monotonic() - started


def test_training_imports_nothing_that_it_does_not_use(home, tmp_path):
    """transformers would import some of these, from half a thousand files, wherever they are installed."""
    code = "import sys; from inbatch import cli; assert cli.run(sys.argv[1:]) == 0; print(*sys.modules)"
    options = [f"--train.output_dir={tmp_path}", "--train.max_steps=1"]
    done, _ = run_command(sys.executable, "-c", code, "train", str(home / "config.yaml"), *options)
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.split())
    assert "transformers.modeling_utils" in imported
    assert not imported & {"datasets", "matplotlib", "pandas", "pyarrow", "scipy", "sklearn", "sentence_transformers"}


def test_two_processes_say_a_shared_mistake_once(home, tmp_path):
    command = [sys.executable, "-m", "inbatch", "train", str(home / "config.yaml"), "--nproc-per-node", "2"]
    done, _ = run_command(*command, f"--train.output_dir={tmp_path}", f"--data.train={home}/broken.jsonl")
    assert done.returncode != 0
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert "broken.jsonl, line 3" in lines[0]


def test_ranks_with_different_models(home, tmp_path):
    """Under torchrun itself: each rank has another model under the same name."""
    script = tmp_path / "start.py"
    script.write_text(
        "import os, sys; from inbatch.cli import main\n"
        "os.chdir(os.path.join(sys.argv.pop(1), os.environ['RANK'])); main()\n"
    )
    for rank, model in enumerate(("model", "wider")):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "local").symlink_to(home / model)
    options = ["--model.name_or_path=local", f"--train.output_dir={tmp_path}/run"]
    done, _ = run_command(*TORCHRUN, str(script), str(tmp_path), "train", str(home / "config.yaml"), *options)
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("inbatch: error: ")]
    assert len(ours) == 1, done.stderr
    assert "the model: the ranks disagree" in ours[0]
    assert "rank 0 has 32, rank 1 has 48" in ours[0]
    # torchrun's report comes last; its root cause repeats the message, and nobody printed a traceback of ours.
    assert done.stderr.rstrip().splitlines()[-2].strip().startswith("traceback : the model: the ranks disagree")
    assert "inbatch/train.py" not in done.stderr


def test_a_rank_that_is_done_does_not_finalise_the_interpreter(home, tmp_path):
    """Where threads of torch.distributed may abort it; what was registered to run at exit does, and nothing is lost."""
    script = tmp_path / "start.py"
    script.write_text(
        "import atexit, os; from inbatch import cli\n"
        "class Aborts:\n"
        "    def __del__(self, abort=os.abort): abort()\n"
        "kept = Aborts()\n"
        "atexit.register(print, 'at exit')\n"
        "cli._train = lambda known: print('trained')\n"
        "cli.main()\n"
    )
    done, _ = run_command(sys.executable, str(script), "train", str(home / "config.yaml"), RANK="0", WORLD_SIZE="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["trained", "at exit", ""]


def test_a_signal_is_named(capsys):
    _report_killed({0: -signal.SIGKILL, 1: -signal.SIGABRT, 2: 3})
    assert capsys.readouterr().err.splitlines() == [
        "inbatch: error: rank 0 was ended by SIGKILL (memory may have run out)",
        "inbatch: error: rank 1 was ended by SIGABRT",
        "inbatch: error: rank 2 ended with status 3 and said nothing",
    ]


def test_what_a_rank_repeats_of_another_is_said_once(capsys):
    reading, writing = os.pipe()
    for rank, message in enumerate(["no such file", "rank 0: no such file"]):
        os.write(writing, json.dumps({"rank": rank, "message": message, "cause": True}).encode() + b"\n")
    os.close(writing)
    assert _wait([subprocess.Popen("false") for _ in range(2)], reading) == 1
    os.close(reading)
    assert only_message(capsys) == "inbatch: error: no such file"


def test_a_rank_that_was_killed_gives_the_status_though_another_ends_before_it(capsys):
    reading, writing = os.pipe()
    os.write(writing, json.dumps({"rank": 0, "message": "its connection is lost", "cause": False}).encode() + b"\n")
    os.close(writing)
    killed = subprocess.Popen(["sh", "-c", "sleep 0.3; kill -9 $$"])
    assert _wait([subprocess.Popen("false"), killed], reading) == 128 + signal.SIGKILL
    os.close(reading)
    assert only_message(capsys) == "inbatch: error: rank 1 was ended by SIGKILL (memory may have run out)"


def test_a_mistake_on_one_rank_ends_all(home, tmp_path):
    """Rank 1 fails by itself while rank 0 waits for it in a collective."""
    script = tmp_path / "start.py"
    script.write_text(
        "import os; from inbatch import cli, collectives\n"
        "collectives.start('gloo')\n"
        "def fail(known):\n"
        "    if collectives.rank() == 1: raise ValueError('only here')\n"
        "    collectives.barrier()\n"
        "cli._train = fail\n"
        "cli.main()\n"
    )
    done, seconds = run_command(*TORCHRUN, str(script), "train", str(home / "config.yaml"))
    assert done.returncode != 0
    assert done.stderr.count("inbatch: error: only here") == 1
    assert seconds < 120, "the start of three Python processes, not the time-out of a collective (300 s)"
