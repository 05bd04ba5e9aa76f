"""The command line: `inbatch train | evaluate | encode | mine | data | audit | export`.

A mistake of the user's ends every rank with status 1 and one line. INBATCH_TRACEBACK=1 shows where it was raised.
"""

import argparse
import atexit
import json
import os
import sys
import traceback
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from inbatch import __version__
from inbatch.cli.launch import (
    INTERRUPTED,
    REPORT_FD,
    launch,
    no_fault_of_this_process,
    report,
    report_last,
    show_warning,
)
from inbatch.train.stopping import Stopped, stop_on_signals

if TYPE_CHECKING:
    import torch

    from inbatch.encoder.model import BiEncoderModel
    from inbatch.retrieval.embed import EmbedOptions
    from inbatch.retrieval.evaluate import RetrieveOptions
    from inbatch.train.config import Config

TRAIN_HELP = """\
Train the encoder that the YAML file CONFIG describes. Every key can be set as an option, over the file:

    inbatch train configs/quickstart.yaml --nproc-per-node 2 --optim.lr 1e-4 --train.output_dir runs/second

The same command again goes on with a run that was interrupted. On several machines, start
`torchrun ... -m inbatch train CONFIG` on each. --print_config prints the whole configuration as YAML and ends.

--from-nemo RECIPE.yaml in place of CONFIG trains a bi-encoder recipe of NeMo AutoModel, with its names for overrides
(--step_scheduler.max_steps 10) and ours from the groups data, train, loss, optim, eval and lora."""


def main() -> None:
    """The command `inbatch`: runs `sys.argv` and ends the process."""
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
    """Ends the process without the interpreter's finalisation and C++ destructors.

    A rank that failed would wait there for its peers. One that is done would at times abort: threads of
    torch.distributed outlive the process group, and one that asks for the interpreter while it ends takes the process
    with it. What was to run at exit still does after success, such as ending processes that compile.
    """
    if status == 0:
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its status: 0, 1 after a mistake in files or settings or the end of another process.

    After a signal it is 128 + the signal's number, 130 after Ctrl-C. Wrong usage is SystemExit(2), as in argparse.
    """
    arguments = list(arguments)
    known = _parse_train(arguments[1:]) if arguments[:1] == ["train"] else build_parser().parse_args(arguments)
    try:
        if known.nproc_per_node > 1 and "RANK" not in os.environ:
            if known.command == "train":
                _load_config(known, say=False)  # a mistake in it is found at once, and once
            return launch(arguments, known.nproc_per_node)
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            known.function(known)
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
        if (words := no_fault_of_this_process(error)) is None:
            raise
        interrupted = isinstance(error, KeyboardInterrupt)
        report(words, cause=interrupted)
        return INTERRUPTED if interrupted else 1
    return 0


def _parse_train(arguments: list[str]) -> argparse.Namespace:
    """CONFIG comes first, and is optional; what this parser does not know are overrides of the configuration."""
    config = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    parser = argparse.ArgumentParser(
        prog="inbatch train", parents=[_common_options()], add_help=False, allow_abbrev=False
    )
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--from-nemo", metavar="RECIPE")
    parser.add_argument("--print_config", "--print-config", action="store_true")
    known, overrides = parser.parse_known_args(arguments)
    if known.help:
        from inbatch.train.config_file import help_text

        print(f"{TRAIN_HELP}\n\n{help_text()}", end="")
        sys.exit(0)
    if known.print_config:
        known.nproc_per_node = 1
    function = _print_config if known.print_config else _train
    return argparse.Namespace(**vars(known), command="train", config=config, overrides=overrides, function=function)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="inbatch", description="Train and use text encoders for retrieval.")
    parser.add_argument("--version", action="version", version=f"inbatch {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("train", help="train a model from a YAML file (`inbatch train --help` lists every key)")

    for add in (_add_evaluate, _add_encode, _add_data, _add_mine, _add_audit, _add_export):
        add(commands)
    return parser


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate", parents=[_common_options(), _encoding_options(), _retrieval_options()],
        help="measure retrieval on a BEIR folder", allow_abbrev=False,
        description="Embed the queries and the corpus of a BEIR folder, search exactly and print the measures as JSON.",
    )  # fmt: skip
    evaluate.add_argument("data", metavar="DATA", help="BEIR folder: corpus.jsonl, queries.jsonl, qrels/")
    evaluate.add_argument("--split", default="test", help="which qrels (default: %(default)s)")
    evaluate.add_argument("--measures", nargs="+", metavar="M", help="such as nDCG@10 R@100 RR@10")
    evaluate.add_argument(
        "--top-k", type=_positive, default=100, metavar="K", help="documents per query (default: 100)"
    )
    evaluate.add_argument(
        "--keep-identical-ids", action="store_true",
        help="let a query find the document that has its own id; left out by default, as in BEIR and MTEB",
    )  # fmt: skip
    evaluate.add_argument("--run-file", metavar="FILE", help="write the rankings as a TREC run")
    evaluate.set_defaults(function=_evaluate)


def _add_encode(commands: Any) -> None:
    encode = commands.add_parser(
        "encode", parents=[_common_options(), _encoding_options()], help="write the embeddings of a file's texts",
        allow_abbrev=False,
        description="Write the embeddings of a file's texts, one a row in file order; ids go to OUTPUT.ids.txt.",
    )  # fmt: skip
    encode.add_argument("model", metavar="MODEL", help="folder or hub name of a model")
    encode.add_argument(
        "input", metavar="INPUT", help="BEIR folder (its corpus), JSONL of {_id, title, text}, or text lines"
    )
    encode.add_argument("output", metavar="OUTPUT", help="file name ending in .npy or .safetensors")
    encode.add_argument("--prompt", help="name of the prompt before each text (default: the model's, if any)")
    encode.add_argument("--prefix", help="text to put before each text, instead of a prompt")
    encode.add_argument("--max-len", type=_positive, metavar="T", help="tokens (default: the model's limit)")
    encode.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the file")
    encode.set_defaults(function=_encode)


def _add_data(commands: Any) -> None:
    data = commands.add_parser(
        "data", help="show what is recognised in training data", allow_abbrev=False,
        description="Show what is recognised in a source of training data, or in a corpus: columns, counts, lengths, "
        "the first examples, and what is not read.",
    )  # fmt: skip
    data.add_argument("source", metavar="SOURCE", help="file, folder or glob (docs/formats.md lists the formats)")
    data.add_argument("--split", default="train", help="of a folder (default: %(default)s)")
    data.add_argument(
        "--columns", nargs="+", metavar="FIELD=COLUMN", type=_column, help="such as query=question negative=worse,worst"
    )
    data.add_argument("--corpus", help="where documents are that records name by id, unless they lie beside them")
    data.add_argument("--first", type=_positive, default=3, metavar="N", help="examples to show (default: 3)")
    data.set_defaults(function=_data, nproc_per_node=1)


def _add_mine(commands: Any) -> None:
    mine = commands.add_parser(
        "mine", parents=[_common_options(), _encoding_options(), _retrieval_options()], help="find hard negatives",
        allow_abbrev=False,
        description="Write training records with the best documents of each query that are not known to be relevant.",
    )  # fmt: skip
    mine.add_argument("source", metavar="SOURCE", help="BEIR folder, or training records and their passages")
    mine.add_argument("output", metavar="OUTPUT", help="a .jsonl file; beside it a report and a plot of the scores")
    mine.add_argument("--split", default="train", help="which qrels (default: %(default)s)")
    mine.add_argument(
        "--format", choices=("lists", "triplets"), default="lists",
        help="lists: query, pos, neg and scores, a line a query (default); triplets: anchor, positive, negative_1...",
    )  # fmt: skip
    for name, kind, default, text in (
        ("num-negatives", int, 5, "negatives of a query"),
        ("range-min", int, 0, "skip this many of the best candidates"),
        ("range-max", int, 100, "look at this many of the best candidates"),
        (
            "relative-margin",
            float,
            None,
            "a negative scores at most the lowest positive score x (1 - this), such as 0.05",
        ),
        ("absolute-margin", float, None, "a negative scores at most the lowest positive score - this"),
        ("max-score", float, None, "a negative scores at most this"),
        ("min-score", float, None, "a negative scores at least this"),
        ("seed", int, 42, "of random sampling"),
    ):
        mine.add_argument(f"--{name}", type=kind, default=default, metavar="X", help=f"{text} (default: {default})")
    mine.add_argument(
        "--sampling", choices=("top", "random"), default="top", help="of the candidates that pass (default: top)"
    )
    mine.add_argument(
        "--teacher", metavar="MODEL",
        help="scores positives and candidates anew: an encoder, or a CrossEncoder of sentence-transformers",
    )  # fmt: skip
    mine.add_argument("--kept", metavar="FOLDER", help="where the documents' embeddings stay for later runs")
    mine.set_defaults(function=_mine)


def _add_audit(commands: Any) -> None:
    audit = commands.add_parser(
        "audit", parents=[_common_options()], help="measure the gradients of the losses installed here",
        description="Compare the gradient of several processes with that of one, for the losses of this library and "
        "of those installed beside it, on the CPU; prints a Markdown table.",
    )  # fmt: skip
    audit.set_defaults(function=_audit, nproc_per_node=2)


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export", help="make a model of a checkpoint", allow_abbrev=False,
        description="Make a model that sentence-transformers opens of a checkpoint, whatever number of ranks wrote it.",
    )  # fmt: skip
    export.add_argument("source", metavar="RUN", help="a run's folder (its newest checkpoint) or a checkpoint in it")
    export.add_argument("output", metavar="OUTPUT", help="the folder to make")
    export.set_defaults(function=_export, nproc_per_node=1)


def _common_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--nproc-per-node", type=_positive, default=1, metavar="N", help="processes to start here (default: 1)"
    )
    return options


def _encoding_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: a GPU if there is one)"
    )
    options.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto is bf16 on GPUs, fp32 on CPU"
    )
    options.add_argument("--batch-tokens", type=_positive, metavar="N", help="padded tokens per batch")
    options.add_argument(
        "--timeout-minutes", type=float, default=10, metavar="M",
        help="end all processes when none gets further, or one is silent, for this long (default: %(default)s)",
    )  # fmt: skip
    options.add_argument("--no-progress", dest="progress", action="store_false", help="show no progress bar")
    return options


def _column(text: str) -> tuple[str, list[str]]:
    field, equals, names = text.partition("=")
    if not equals or not names:
        raise argparse.ArgumentTypeError(f"{text}: expected FIELD=COLUMN or FIELD=COLUMN,COLUMN")
    return field, names.split(",")


def _retrieval_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "model", metavar="MODEL", help="folder or hub name of a model, or folder of two: MODEL/query and MODEL/passage"
    )
    options.add_argument("--similarity", choices=("cosine", "dot"), help="(default: what the model was saved with)")
    options.add_argument("--query-prefix", help="text before each query (default: the model's prompt)")
    options.add_argument("--passage-prefix", help="text before each document (default: the model's prompt)")
    options.add_argument("--query-max-len", type=_positive, metavar="T", help="tokens (default: the model's limit)")
    options.add_argument("--passage-max-len", type=_positive, metavar="T", help="tokens (default: the model's limit)")
    return options


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return value


@contextmanager
def _processes(device: str, minutes: float, setting: str = "--timeout-minutes") -> Generator["torch.device"]:
    """The process group of torchrun's environment, if any, and this process's device; ended only after success."""
    import torch
    from transformers.utils import logging as transformers_logging

    from inbatch import collectives

    transformers_logging.disable_progress_bar()
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda but torch sees no GPU: set it to auto or cpu")
    backend = "gloo" if device == "cpu" else None
    yield collectives.start(backend, timeout_s=60 * minutes, say=report_last, setting=setting)
    collectives.stop()


# ---- the commands; what they need is imported when they run, so that --help is quick


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


def _print_config(known: argparse.Namespace) -> None:
    from inbatch.train.config import dump

    print(dump(_load_config(known)), end="")


def _train(known: argparse.Namespace) -> None:
    config = _load_config(known)
    with _processes(config.train.device, config.train.timeout_minutes, "train.timeout_minutes") as device:
        import torch

        from inbatch.train.loop import train

        if device.type == "cuda":
            # What torch still computes on the CPU is small. Its pool of threads would compete for the cores with the
            # workers that tokenise and the thread that launches kernels, and then wait for its own slowest thread.
            torch.set_num_threads(1)
        train(config, device=device)


def _open_model(name: str, device: "torch.device") -> "BiEncoderModel":
    """The model on its device, in float32, packed on a GPU if it can be; its size agreed between the ranks."""
    import torch

    from inbatch import collectives
    from inbatch.encoder.model import BiEncoderModel
    from inbatch.encoder.packing import wish

    packed = wish(None, device)
    model = collectives.together(lambda: BiEncoderModel.from_pretrained(name, dtype=torch.float32, packed=packed))
    collectives.agree("the model", {}, same={"embedding size": model.embedding_dim})
    if packed is None and collectives.rank() == 0:
        print(f"{name}: {model.way}", file=sys.stderr)
    return model.to(device).eval()


def _embedding(known: argparse.Namespace, device: "torch.device", **options: Any) -> "EmbedOptions":
    from inbatch.retrieval.embed import EmbedOptions

    precision = known.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return EmbedOptions(precision=precision, batch_tokens=known.batch_tokens, **options)


def _open_towers(name: str, device: "torch.device") -> "tuple[BiEncoderModel, BiEncoderModel | None]":
    """The encoder of the documents, and that of the queries where the folder holds two."""
    towers = [Path(name) / tower for tower in ("passage", "query")]
    if all(tower.is_dir() for tower in towers):
        return _open_model(str(towers[0]), device), _open_model(str(towers[1]), device)
    return _open_model(name, device), None


def _retrieving(known: argparse.Namespace, device: "torch.device", **options: Any) -> "RetrieveOptions":
    from inbatch.retrieval.evaluate import RetrieveOptions

    names = ("similarity", "query_prefix", "passage_prefix", "query_max_len", "passage_max_len")
    embedding = _embedding(known, device, progress="texts" if known.progress else None)
    return RetrieveOptions(embedding=embedding, **{name: getattr(known, name) for name in names}, **options)


def _evaluate(known: argparse.Namespace) -> None:
    with _processes(known.device, known.timeout_minutes) as device:
        from inbatch import collectives
        from inbatch.data import load_retrieval
        from inbatch.retrieval.evaluate import evaluate
        from inbatch.retrieval.metrics import DEFAULT_MEASURES

        data = collectives.together(lambda: load_retrieval(known.data, known.split))
        model, query_model = _open_towers(known.model, device)
        measures = known.measures or DEFAULT_MEASURES
        figures = evaluate(
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


def _mine(known: argparse.Namespace) -> None:
    with _processes(known.device, known.timeout_minutes) as device:
        from dataclasses import fields

        from inbatch import collectives
        from inbatch.retrieval.mine import MineOptions, mine, open_mining_set

        options = MineOptions(**{field.name: getattr(known, field.name) for field in fields(MineOptions)})
        data = collectives.together(lambda: open_mining_set(known.source, known.split))
        model, query_model = _open_towers(known.model, device)
        retrieve = _retrieving(known, device)
        teacher = None if known.teacher is None else _open_teacher(known.teacher, device)
        report = mine(
            model, data, known.output, options, retrieve,
            query_model=query_model, teacher=teacher, kept=known.kept, format=known.format,
        )  # fmt: skip
        if collectives.rank() == 0:
            print(f"{known.output}: {json.dumps(report['counts'])}")


def _open_teacher(name: str, device: "torch.device") -> Any:
    """Return a CrossEncoder where the folder holds a classifier of pairs, else an encoder."""
    from inbatch import collectives
    from inbatch.encoder.loading import local_folder

    config = collectives.together(lambda: local_folder(name)) / "config.json"
    if not config.is_file() or "ForSequenceClassification" not in config.read_text(encoding="utf-8"):
        return _open_model(name, device)
    try:
        from sentence_transformers import CrossEncoder
    except ImportError:
        raise ValueError(f"--teacher {name} scores pairs: install sentence-transformers, which opens it") from None
    return collectives.together(lambda: CrossEncoder(name, device=str(device)))


def _encode(known: argparse.Namespace) -> None:
    with _processes(known.device, known.timeout_minutes) as device:
        import torch

        from inbatch import collectives
        from inbatch.retrieval.encode_file import encode_to_file

        model = _open_model(known.model, device)
        name = known.prompt or model.default_prompt_name
        if known.prompt is not None and (known.prefix is not None or known.prompt not in model.prompts):
            raise ValueError(
                f"--prompt {known.prompt}: expected one of {sorted(model.prompts)}, and no --prefix beside it"
            )
        options = _embedding(
            known,
            device,
            prefix=model.prompts.get(name or "", "") if known.prefix is None else known.prefix,
            max_length=known.max_len,
            dtype=getattr(torch, known.dtype),
            progress=f"encode {Path(known.input).name}" if known.progress else None,
        )
        rows, dimension = encode_to_file(model, known.input, known.output, options)
        if collectives.rank() == 0:
            print(f"{known.output}: {rows} x {dimension} {known.dtype}")


def _data(known: argparse.Namespace) -> None:
    from inbatch.data.describe import describe

    columns = dict(known.columns) if known.columns else None
    print(describe(known.source, split=known.split, columns=columns, corpus=known.corpus, first=known.first))


def _audit(known: argparse.Namespace) -> None:
    from inbatch import collectives
    from inbatch.testing.audit import audit, lines, missing

    collectives.start("gloo", timeout_s=600)
    for line in lines(audit()):
        if collectives.rank() == 0:
            print(line, flush=True)
    if collectives.rank() == 0:
        print(f"\nnot installed: {', '.join(missing()) or 'none'}")
    collectives.stop()


def _export(known: argparse.Namespace) -> None:
    with _processes("cpu", minutes=10):
        from inbatch.train.towers import export

        path = export(known.source, known.output)
        print(f"{known.output}: the model of {path}")
