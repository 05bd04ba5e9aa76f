"""Agree before the first step that all ranks read the same: files of the same name may differ between hosts."""

import hashlib
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from inbatch import collectives
from inbatch.collectives import on_rank_0
from inbatch.data import Mixture
from inbatch.data.index import HEADER, made_once
from inbatch.data.readers import Examples
from inbatch.data.records import RetrievalData
from inbatch.data.token_cache import tokenizer_digest
from inbatch.encoder.model import BiEncoderModel
from inbatch.retrieval.kept import text_digest, weights_digest

_SAMPLES = 1000
_NFS_S = 5  # for which a host may trust its cached listing of a folder


def check_data(examples: Examples, plan: Mixture, evaluation: RetrievalData | None, held_out: Examples | None) -> None:
    """Raise ValueError, on every rank, unless all read the same examples, groups and evaluation data, in one order.

    Every byte of every file counts; a host reads large files once for that and keeps the digest. Of the examples
    themselves 1000 count, for documents in files of their own.
    """
    if collectives.world_size() == 1:
        return

    def digests() -> dict[str, str]:
        read = {"data.train": examples} | ({} if held_out is None else {"eval.validation": held_out})
        same = {key: f"{len(rows)} examples {_of_rows(rows, rows.files)}" for key, rows in read.items()}
        for source, groups in enumerate(plan.groups or ()):
            if groups is not None:
                same[f"groups of source {source}"] = hashlib.blake2b(groups.of.data, digest_size=16).hexdigest()
        if evaluation is not None:
            ids = evaluation.query_ids, evaluation.queries, evaluation.doc_ids, evaluation.qrels
            documents = _of_rows(evaluation.documents, getattr(evaluation.documents, "files", ()))
            same["eval.data"] = f"{len(evaluation.documents)} documents {text_digest([repr(ids), documents])}"
        return same

    collectives.agree("files read on each host", same=collectives.together(digests))


def check_towers(towers: Mapping[str, BiEncoderModel]) -> None:
    """Raise ValueError, on every rank, for weights that are not finite, and unless all opened the same models."""

    def digests() -> dict[str, int | str]:
        for name, tower in towers.items():
            for key, value in tower.state_dict().items():
                if not value.isfinite().all():
                    raise ValueError(f"the starting weights of {name} hold NaN or infinity, in {key}: they are damaged")
        if collectives.world_size() == 1:
            return {}
        return {
            f"{name}'s {what}": digest
            for name, tower in towers.items()
            for what, digest in (
                ("embedding size", tower.embedding_dim),
                ("settings", repr((tower.prompts, tower.pooling, tower.l2_normalize, tower.multi_vector))),
                ("tokenizer", tokenizer_digest(tower.tokenizer)),
                ("weights", weights_digest(tower.state_dict())),
            )
        }

    collectives.agree("the model", same=collectives.together(digests))


def check_shared(folder: Path) -> None:
    """Raise ValueError, on every rank, unless all see what rank 0 writes to the folder."""
    if collectives.world_size() == 1:
        return
    probe = on_rank_0(lambda: folder / f".probe-{secrets.token_hex(8)}")
    on_rank_0(probe.touch)
    deadline = time.monotonic() + _NFS_S
    while not (seen := os.path.exists(probe)) and time.monotonic() < deadline:
        time.sleep(0.1)
    everyone = collectives.gather_objects(seen)
    on_rank_0(probe.unlink)
    if not all(everyone):
        blind = ", ".join(str(rank) for rank, sees in enumerate(everyone) if not sees)
        raise ValueError(
            f"rank {blind} does not see what rank 0 writes to train.output_dir {folder}: choose a folder on a file "
            "system that all hosts share, for every rank writes a part of each checkpoint"
        )


def _of_rows(rows: Sequence[object], files: Sequence[Path]) -> str:
    """Return a digest of the files' content and of some rows: all, or evenly spaced ones."""
    step = max(1, len(rows) // _SAMPLES)
    return text_digest([_of_files(files), *map(repr, rows[::step])])


def _of_files(files: Sequence[Path]) -> str:
    def make(kept: IO[bytes]) -> None:
        digest = hashlib.blake2b(digest_size=16)
        for path in files:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            digest.update(path.stat().st_size.to_bytes(8, "little"))
        kept.write(digest.digest())

    if not files:
        return ""
    with made_once(files, "content", None, make) as kept:
        kept.seek(HEADER)
        return kept.read().hex()
