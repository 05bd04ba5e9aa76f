"""The options of every command but `train`, whose keys are the configuration's."""

import argparse
from typing import Any, NoReturn

from inbatch import __version__


class Parser(argparse.ArgumentParser):
    """Parse a command line; wrong usage is SystemExit(2) after one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"inbatch: error: {message}; `{self.prog} --help` lists the options\n")


def build_parser() -> Parser:
    parser = Parser(prog="inbatch", description="Train and use text encoders for retrieval.")
    parser.add_argument("--version", action="version", version=f"inbatch {__version__}")
    parser.set_defaults(nproc_per_node=1, print_config=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("train", help="train a model from a YAML file (`inbatch train --help` lists every key)")

    add_using = (_add_evaluate, _add_encode, _add_mine, _add_group)
    for add in (_add_check, *add_using, _add_data, _add_audit, _add_export, _add_push):
        add(commands)
    return parser


def _add_check(commands: Any) -> None:
    check = commands.add_parser(
        "check", help="look at a configuration and its data before training", allow_abbrev=False,
        description="Say what a configuration's data hold, what its batches will be and what looks wrong. CONFIG and "
        "overrides (--group.key value) are those of `inbatch train`. Status: 0, or 1 after an error or what training "
        "refuses; warnings alone leave 0.",
    )  # fmt: skip
    check.add_argument("config", metavar="CONFIG", help="the YAML file of a run")
    check.add_argument("--html", metavar="FILE", help="also write one HTML page, with plots")
    check.add_argument(
        "--nproc-per-node", dest="ranks", type=_positive, default=1, metavar="N", help="processes of the run"
    )


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate", parents=[common_options(), _encoding_options(), _retrieval_options()],
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


def _add_encode(commands: Any) -> None:
    encode = commands.add_parser(
        "encode", parents=[common_options(), _encoding_options()], help="write the embeddings of a file's texts",
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


def _add_data(commands: Any) -> None:
    data = commands.add_parser(
        "data", help="show what is recognised in training data", allow_abbrev=False,
        description="Show what is recognised in a source of training data, or in a corpus: columns, counts, lengths, "
        "the first examples, and what is not read.",
    )  # fmt: skip
    data.add_argument("source", metavar="SOURCE", help="file, folder or glob (docs/formats.md lists the formats)")
    data.add_argument("--split", default="train", help="of a folder (default: %(default)s)")
    data.add_argument(
        "--columns", nargs="+", metavar="FIELD=COLUMN", type=_column, default=[],
        help="such as query=question negative=worse,worst",
    )  # fmt: skip
    data.add_argument("--corpus", help="where documents are that records name by id, unless they lie beside them")
    data.add_argument("--first", type=_positive, default=3, metavar="N", help="examples to show (default: 3)")


def _add_mine(commands: Any) -> None:
    mine = commands.add_parser(
        "mine", parents=[common_options(), _encoding_options(), _retrieval_options()], help="find hard negatives",
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


def _add_group(commands: Any) -> None:
    group = commands.add_parser(
        "group", parents=[common_options(), _encoding_options(), _retrieval_options()], allow_abbrev=False,
        help="group similar training examples", description="Write groups of examples whose documents are near one "
        "another's queries, for batches with hard negatives: `groups` of a source of data.train names the file.",
    )  # fmt: skip
    group.add_argument("source", metavar="SOURCE", help="training records, or a BEIR folder")
    group.add_argument("output", metavar="OUTPUT", help="a .npz file")
    group.add_argument("--split", default="train", help="of a folder (default: %(default)s)")
    for name, default, text in (
        ("size", 32, "examples of a group, at most"),
        ("range-min", 5, "skip this many of the best documents"),
        ("range-max", 50, "look at this many of the best documents"),
    ):
        group.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})")


def _add_audit(commands: Any) -> None:
    audit = commands.add_parser(
        "audit", parents=[common_options()], help="measure the gradients of the losses installed here",
        description="Compare the gradient of several processes with that of one, for the losses of this library and "
        "of those installed beside it, on the CPU; prints a Markdown table.",
    )  # fmt: skip
    audit.set_defaults(nproc_per_node=2)


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export", help="make a model of a checkpoint, or an ONNX file of a model", allow_abbrev=False,
        description="Make a model that sentence-transformers opens of a checkpoint, whatever number of ranks wrote it; "
        "or an ONNX file of a model, from tokens to embeddings.",
    )  # fmt: skip
    export.add_argument(
        "source", metavar="RUN", help="a run's folder (its newest checkpoint) or a checkpoint in it; for .onnx, a model"
    )
    export.add_argument("output", metavar="OUTPUT", help="the folder to make, or a file name ending in .onnx")


def _add_push(commands: Any) -> None:
    push = commands.add_parser(
        "push", help="upload a model to the hub", allow_abbrev=False,
        description="Upload a saved model to the hub, after `hf auth login` or with HF_TOKEN.",
    )  # fmt: skip
    push.add_argument("model", metavar="MODEL", help="the folder of a model, such as RUN/model")
    push.add_argument("repo", metavar="REPO", help="its name there, such as me/my-model; made where it is missing")
    push.add_argument("--private", action="store_true", default=None, help="of a repository that is made")


def common_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--nproc-per-node", type=_positive, default=1, metavar="N",
        help="processes to start here (default: %(default)s)",
    )  # fmt: skip
    return options


def _encoding_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: a GPU if there is one)"
    )
    options.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "autocast"),
        default="auto",
        help="bf16 is of copies of the weights; auto is autocast on GPUs, fp32 on CPU",
    )
    options.add_argument(
        "--batch-tokens",
        type=_positive,
        metavar="N",
        help="padded tokens per batch (default: 65536 packed on a GPU, 16384 padded, 4096 on a CPU)",
    )
    options.add_argument(
        "--pool-factor",
        type=_positive,
        metavar="N",
        help="of a multi-vector model's documents, keep a vector for N tokens (default: as the model was saved)",
    )
    options.add_argument(
        "--timeout-minutes", type=_minutes, default=10, metavar="M",
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
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number of at least 1")
    return int(text)


def _minutes(text: str) -> float:
    try:
        if 0 < (minutes := float(text)) < float("inf"):
            return minutes
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text}: expected a positive number of minutes")
