"""The command line: `inbatch train | check | evaluate | encode | mine | group | data | audit | export | push`.

A user's mistake ends every rank with status 1 and one line. INBATCH_TRACEBACK=1 shows where it was raised.
"""

import argparse
import atexit
import os
import sys
import traceback
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from inbatch.cli.launch import INTERRUPTED, REPORT_FD, in_one_line, launch, report, report_last, show_warning
from inbatch.cli.options import Parser, build_parser, common_options
from inbatch.train.stopping import Stopped, stop_on_signals

if TYPE_CHECKING:
    import torch

    from inbatch.train.config import Config

TRAIN_HELP = """\
Train the encoder that the YAML file CONFIG describes. Every key can be set as an option, over the file:

    inbatch train configs/quickstart.yaml --nproc-per-node 2 --optim.lr 1e-4 --train.output_dir runs/second

The same command again goes on with a run that was interrupted. On several machines, start
`torchrun ... -m inbatch train CONFIG` on each. --print_config prints the whole configuration as YAML and ends.

--from-nemo RECIPE.yaml in place of CONFIG trains a bi-encoder recipe of NeMo AutoModel, with its names for overrides
(--step_scheduler.max_steps 10) and ours from the groups data, train, loss, optim, eval and lora."""


def main() -> None:
    """Run the command `inbatch` with `sys.argv`, and end the process."""
    stop_on_signals()
    try:
        status = run(sys.argv[1:])
    except Exception:
        traceback.print_exc()
        if REPORT_FD in os.environ:
            report("")  # the traceback says it
        status = 1
    if status or "RANK" in os.environ:
        _leave(status)


def _leave(status: int) -> NoReturn:
    """End the process without the interpreter's finalisation and C++ destructors.

    A rank that failed would wait there for its peers. A rank that succeeded would at times abort: threads of
    torch.distributed outlive the process group, and may ask for the interpreter while it ends. After success the
    functions of atexit run, such as those that end compiling processes.
    """
    if status == 0:
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its status: 0, or 1 after a mistake in files or settings, the end of another process,
    or an error that `check` reports.

    After a signal it is 128 + the signal's number, 130 after Ctrl-C. Wrong usage is SystemExit(2) after one line.
    """
    arguments = list(arguments)
    known = _parse_train(arguments[1:]) if arguments[:1] == ["train"] else _parse(arguments)
    try:
        if known.nproc_per_node > 1 and "RANK" not in os.environ and not known.print_config:
            if known.command == "train":
                _load_config(known, say=False)  # a mistake in it is reported at once, by this process alone
            return launch(arguments, known.nproc_per_node)
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            return globals()[f"_{known.command}"](known) or 0
    except ModuleNotFoundError as error:
        report(f"{error.name} is not installed: pip install 'inbatch[train]'")
        return 1
    except (ValueError, OSError, ArithmeticError) as error:
        report(str(error))
        return 1
    except Stopped as stopped:
        report(stopped.message)
        return int(stopped.code or 0)
    except (RuntimeError, KeyboardInterrupt) as error:
        if (said := in_one_line(error)) is None:
            raise
        report(said[0], cause=said[1])
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Parse a command other than `train`; arguments unknown to `check` are overrides of the configuration."""
    parser = build_parser()
    known, rest = parser.parse_known_args(arguments)
    if rest and known.command != "check":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    known.overrides = rest
    return known


def _parse_train(arguments: list[str]) -> argparse.Namespace:
    """Parse CONFIG, which is optional, and options; unknown ones are overrides of the configuration."""
    config = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    parser = Parser("inbatch train", parents=[common_options()], add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--from-nemo", metavar="RECIPE")
    parser.add_argument("--print_config", "--print-config", action="store_true")
    known, overrides = parser.parse_known_args(arguments)
    if known.help:
        from inbatch.train.config_file import help_text

        print(f"{TRAIN_HELP}\n\n{help_text()}", end="")
        sys.exit(0)
    return argparse.Namespace(**vars(known), command="train", config=config, overrides=overrides)


@contextmanager
def _absent(*packages: str) -> Generator[None]:
    """Let packages look as if they were not installed to what is imported inside.

    transformers imports these, and pandas with them, to detect objects and to generate text by a second model, which
    no command does: a quarter or more of the CPU time that torch's and transformers' imports take.
    """
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextmanager
def _processes(device: str, minutes: float, setting: str = "--timeout-minutes") -> Generator["torch.device"]:
    """Hold the process group of torchrun's environment, if any, and this process's device; ended only after success."""
    import torch

    from inbatch import collectives

    with _absent("scipy", "sklearn"):
        from transformers import PreTrainedModel  # noqa: F401 - the modules that would import them
        from transformers.generation import candidate_generator  # noqa: F401
    _show_no_loading()
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda but torch sees no GPU: set it to auto or cpu")
    backend = "gloo" if device == "cpu" else None
    yield collectives.start(backend, timeout_s=60 * minutes, say=report_last, setting=setting)
    collectives.stop()


def _show_no_loading() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


# ---- the commands, each under its name; they import what they need when they run, so that --help is quick


def _load_config(known: argparse.Namespace, *, say: bool = True) -> "Config":
    from inbatch.cli.from_nemo import load_recipe
    from inbatch.train.config_file import load

    if known.from_nemo is None:
        return load(known.config, known.overrides)
    if known.config is not None:
        raise ValueError(f"both {known.config} and --from-nemo {known.from_nemo} are given: leave one out")
    world_size = int(os.environ.get("WORLD_SIZE") or known.nproc_per_node)
    config, unused = load_recipe(known.from_nemo, known.overrides, world_size=world_size)
    if say and unused and os.environ.get("RANK", "0") == "0":
        print(f"{known.from_nemo}: not used: {', '.join(unused)}", file=sys.stderr)
    return config


def _train(known: argparse.Namespace) -> None:
    config = _load_config(known)
    if known.print_config:
        from inbatch.train.config import dump

        print(dump(config), end="")
        return
    with _processes(config.train.device, config.train.timeout_minutes, "train.timeout_minutes") as device:
        import torch

        from inbatch.train.loop import train

        if device.type == "cuda":
            # Torch computes little on the CPU here. Its threads would compete for the cores with the workers that
            # tokenise and the thread that launches kernels.
            torch.set_num_threads(1)
        train(config, device=device)


def _check(known: argparse.Namespace) -> int:
    from inbatch.data.files import check_output, write_text
    from inbatch.train.check import check, text
    from inbatch.train.check_page import page
    from inbatch.train.config_file import load

    _show_no_loading()
    if known.html is not None:
        check_output(known.html)
    checked, name = check(load(known.config, known.overrides), ranks=known.ranks), Path(known.config).name
    print("\n".join(text(checked, name)))
    if known.html is not None:
        write_text(known.html, page(checked, name))
    return int(any(finding.level == "error" for finding in checked.findings))


def _with_model(known: argparse.Namespace) -> None:
    with _processes(known.device, known.timeout_minutes) as device:
        from inbatch.cli import with_model

        getattr(with_model, known.command)(known, device)


_evaluate = _encode = _mine = _group = _with_model


def _data(known: argparse.Namespace) -> None:
    from inbatch.data.describe import describe

    columns: dict[str, list[str]] = {}
    for field, names in known.columns:
        columns.setdefault(field, []).extend(names)
    print(describe(known.source, split=known.split, columns=columns or None, corpus=known.corpus, first=known.first))


def _audit(known: argparse.Namespace) -> None:
    from inbatch import collectives
    from inbatch.testing.audit import audit, inbatch_rows, lines
    from inbatch.testing.peers import missing, peer_rows

    collectives.start("gloo", timeout_s=600)
    for line in lines(audit([*inbatch_rows(), *peer_rows()])):
        if collectives.rank() == 0:
            print(line, flush=True)
    if collectives.rank() == 0:
        print(f"\nnot installed: {', '.join(missing()) or 'none'}")
    collectives.stop()


def _push(known: argparse.Namespace) -> None:
    from inbatch.encoder.card import push

    print(push(known.model, known.repo, private=known.private))


def _export(known: argparse.Namespace) -> None:
    if known.output.endswith(".onnx"):
        from inbatch.encoder.onnx import save_onnx
        from inbatch.encoder.sentence_transformer import open_encoder

        _show_no_loading()
        save_onnx(open_encoder(known.source), known.output)
        print(f"{known.output}: {known.source} as ONNX")
        return
    with _processes("cpu", minutes=10):
        from inbatch.train.towers import export

        path = export(known.source, known.output)
        print(f"{known.output}: the model of {path}")
