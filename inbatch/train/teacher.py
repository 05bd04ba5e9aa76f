"""A teacher's vectors of a run's texts: embedded once before the first step, by all ranks, and kept with the run.

Shapes: n texts, D dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from inbatch import collectives
from inbatch.data.identity import passage_key, query_key
from inbatch.data.readers import Examples
from inbatch.encoder.packing import wish
from inbatch.encoder.sentence_transformer import open_encoder
from inbatch.retrieval.embed import EmbedOptions, is_multi_vector, share
from inbatch.retrieval.evaluate import RetrieveOptions, embedding_options
from inbatch.retrieval.kept import embed_kept
from inbatch.train.same import check_towers


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """Hold the `vectors` [n, D], mapped from the disk, of texts by their sorted `keys`, int64 [n]."""

    keys: np.ndarray
    vectors: Tensor

    def of(self, ids: Tensor, device: torch.device) -> Tensor:
        """Return the vectors of texts by their ids in batches; texts that share an id share a vector."""
        rows = np.searchsorted(self.keys, ids.cpu().numpy())
        assert np.array_equal(self.keys[rows], ids.cpu().numpy())
        return self.vectors[rows].to(device)


def teacher_vectors(
    name: str, sets: Sequence[Examples], folder: Path, device: torch.device, precision: str
) -> tuple[Vectors, Vectors]:
    """Return an encoder's vectors of the queries and of the passages of sets of examples, with its own prompts.

    Every rank calls it with the same sets and embeds a share; memory holds each text once meanwhile. folder: shared by
    all hosts; what it holds of the same weights and texts is not embedded again. precision: as in EmbedOptions.
    Raises ValueError for an encoder that cannot be opened.
    """
    queries: dict[int, str] = {}
    passages: dict[int, str] = {}
    for examples in sets:
        for example in examples:
            key = query_key(example)
            queries.setdefault(examples.same.get(key, key), example.query)
            for passage in (*example.positives, *example.negatives):
                key = passage_key(passage)
                passages.setdefault(examples.same.get(key, key), passage.full_text)
    teacher = collectives.together(lambda: open_encoder(name, dtype=torch.float32, packed=wish(None, device)))
    check_towers({"the teacher": teacher})
    if is_multi_vector(teacher):
        raise ValueError(f"distill.teacher {name} gives a text several vectors; expected one: score by it with inbatch "
                         "mine --teacher, and learn the scores with distill.kind group")  # fmt: skip
    teacher.to(device)

    options = RetrieveOptions(embedding=EmbedOptions(precision=precision))

    def embedded(side: str, texts: dict[int, str]) -> Vectors:
        keys = sorted(texts)
        ordered, how = [texts[key] for key in keys], embedding_options(teacher, side, options)
        embed_kept(teacher, ordered, how, folder, rows=share(len(keys)))
        whole = embed_kept(teacher, ordered, how, folder, rows=range(len(keys)))
        assert isinstance(whole, Tensor)
        return Vectors(keys=np.array(keys, np.int64), vectors=whole)

    return embedded("query", queries), embedded("document", passages)
