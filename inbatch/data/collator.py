"""From examples to the tensors of a training batch.  (B queries, M passages, K known positives)"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor

from inbatch.data.identity import passage_key, query_key
from inbatch.data.records import Example, Passage, TrainBatch
from inbatch.losses.masking import CANDIDATES

Tokenize = Callable[[list[str], int], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Collator:
    """Make one rank's ``TrainBatch`` of its examples of one source: pure, the same for the same examples and epoch.

    Each query brings positive number ``epoch % len(positives)``, then up to ``train_n_passages - 1`` negatives (None:
    all); if it has more, they rotate over the epochs. Without ``rotate_passages`` every epoch takes the first ones,
    and negatives are repeated up to that number. All positives of a query are in ``positive_ids``, so that none counts
    as a negative. Passages are "title text" behind ``passage_prefix``, or behind the example's prefix if
    ``instructions``; lengths are in tokens. Ids are keys of texts, replaced by ``same`` (see ``identity.merged``).
    ``negatives`` and ``mask_own_negatives`` are the candidates and the masks of ``FalseNegatives``; ``loss_weight``
    multiplies the queries' losses; ``teacher_scores`` adds those of the examples to the batch.

    ``tokenize(texts, max_length)`` returns padded int64 tensors ``[len(texts), T]``. No examples give tensors of 0
    rows under the same names.
    """

    tokenize: Tokenize
    _: KW_ONLY
    query_max_len: int
    passage_max_len: int
    query_prefix: str = ""
    passage_prefix: str = ""
    train_n_passages: int | None = None
    rotate_passages: bool = True
    instructions: bool = True
    negatives: str = "all"
    mask_own_negatives: bool = True
    loss_weight: float = 1.0
    teacher_scores: bool = False
    same: Mapping[int, int] = field(default_factory=dict)

    def __post_init__(self):
        if self.train_n_passages is not None and self.train_n_passages < 1:
            raise ValueError(
                f"train_n_passages must be 1 or more (it counts the positive) or None, got {self.train_n_passages}"
            )

    def __call__(self, examples: Sequence[Example], epoch: int) -> TrainBatch:
        return collate([(self, example, epoch) for example in examples], [self])

    def key(self, key: int) -> int:
        """Return the key that stands for the key of a text."""
        return self.same.get(key, key)

    def passages(self, example: Example, epoch: int) -> list[Passage]:
        """Return the passages that the example brings in this epoch, its positive first."""
        known = (*example.positives, *example.negatives)
        return [known[place] for place in self.chosen(example, epoch)]

    def chosen(self, example: Example, epoch: int) -> list[int]:
        """Return the places of `passages` among the example's positives, then negatives."""
        first, number = len(example.positives), len(example.negatives)
        wanted = number if self.train_n_passages is None else self.train_n_passages - 1
        if not self.rotate_passages:
            return [0, *(first + i % number for i in range(wanted if number else 0))]
        # A window that moves by its width each epoch, so that every negative gets its turn.
        taken = [first + (epoch * wanted + i) % number for i in range(min(wanted, number))]
        return [epoch % first, *taken]

    def prefixed(self, given: str | None, usual: str) -> str:
        """Return the prefix of a text: the example's, if instructions count, or the usual one."""
        return given if given is not None and self.instructions else usual

    def tokenized(self, texts: list[str], max_length: int) -> dict[str, Tensor]:
        """Return the tokens of texts, of which there may be none."""
        # Tokenizers refuse an empty list, but its tensors need the usual names and dtypes.
        tensors = self.tokenize(texts or [""], max_length)
        return {name: tensor[: len(texts)] for name, tensor in tensors.items()}


def collate(drawn: Sequence[tuple[Collator, Example, int]], collators: Sequence[Collator]) -> TrainBatch:
    """Return one rank's batch of examples, each with its source's collator and its epoch.

    collators: of all sources in the global batch, the same on every rank, which also share lengths and tokenizer.
    """
    groups = [collator.passages(example, epoch) for collator, example, epoch in drawn]
    sizes = torch.tensor([0] + [len(group) for group in groups])
    known = [[source.key(passage_key(passage)) for passage in example.positives] for source, example, _ in drawn]
    width = max([1, *map(len, known)])
    queries = [
        source.prefixed(example.query_prefix, source.query_prefix) + example.query for source, example, _ in drawn
    ]
    passages = [
        source.prefixed(example.passage_prefix, source.passage_prefix) + passage.full_text
        for (source, example, _), group in zip(drawn, groups, strict=True)
        for passage in group
    ]
    first = collators[0]
    # By all of the global batch's sources, so that ranks agree on what they pass.
    by_group = any(source.negatives != "all" or not source.mask_own_negatives for source in collators)
    return TrainBatch(
        queries=first.tokenized(queries, first.query_max_len),
        passages=first.tokenized(passages, first.passage_max_len),
        positives=sizes.cumsum(0)[:-1],
        query_ids=_int64([first.key(query_key(example)) for _, example, _ in drawn]),
        passage_ids=_int64([first.key(passage_key(passage)) for group in groups for passage in group]),
        positive_ids=_int64([row + [-1] * (width - len(row)) for row in known]).reshape(-1, width),
        candidates=_int64([CANDIDATES.index(source.negatives) for source, _, _ in drawn]) if by_group else None,
        mask_own_negatives=torch.tensor([source.mask_own_negatives for source, _, _ in drawn], dtype=torch.bool)
        if by_group
        else None,
        weights=torch.tensor([float(source.loss_weight) for source, _, _ in drawn])
        if any(source.loss_weight != 1 for source in collators)
        else None,
        teacher_scores=_scores(drawn, max(sizes.tolist())) if first.teacher_scores else None,
    )


def _scores(drawn: Sequence[tuple[Collator, Example, int]], width: int) -> Tensor:
    """Return the teacher's scores of the passages of each query [B, G], NaN where there are none."""
    scores_BG = torch.full((len(drawn), width), math.nan)
    for row_G, (source, example, epoch) in zip(scores_BG, drawn, strict=True):
        if example.scores:
            chosen = [example.scores[place] for place in source.chosen(example, epoch)]
            row_G[: len(chosen)] = torch.tensor(chosen)
    return scores_BG


def _int64(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
