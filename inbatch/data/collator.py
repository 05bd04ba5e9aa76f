"""From examples to the tensors of a training batch.  (B queries, M passages, K known positives)"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor

from inbatch.data.identity import passage_key, query_key
from inbatch.data.records import Example, Passage, TrainBatch

Tokenize = Callable[[list[str], int], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Collator:
    """Make one rank's ``TrainBatch`` of its examples: pure, the same for the same examples and epoch.

    Each query brings one positive, then its negatives: positive number ``epoch % len(positives)``, and
    ``train_n_passages - 1`` negatives (all where that is None), taken in turn over the epochs where there are more;
    a query with fewer brings fewer. All its positives are in ``positive_ids``, so that none counts as a negative.
    Passages are "title text" behind ``passage_prefix``, unless the example brings a prefix of its own; lengths are in
    tokens. Ids are keys of texts, or what ``same`` (see ``identity.merged``) gives for them.

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
    same: Mapping[int, int] = field(default_factory=dict)

    def __post_init__(self):
        if self.train_n_passages is not None and self.train_n_passages < 1:
            raise ValueError(
                f"train_n_passages must be 1 or more (it counts the positive) or None, got {self.train_n_passages}"
            )

    def __call__(self, examples: Sequence[Example], epoch: int) -> TrainBatch:
        groups = [self._passages(example, epoch) for example in examples]
        sizes = torch.tensor([0] + [len(group) for group in groups])
        known = [[self._key(passage_key(p)) for p in example.positives] for example in examples]
        width = max([1, *map(len, known)])
        queries = [_prefixed(example.query_prefix, self.query_prefix) + example.query for example in examples]
        passages = [
            _prefixed(example.passage_prefix, self.passage_prefix) + passage.full_text
            for example, group in zip(examples, groups, strict=True)
            for passage in group
        ]
        return TrainBatch(
            queries=self._tokenized(queries, self.query_max_len),
            passages=self._tokenized(passages, self.passage_max_len),
            positives=sizes.cumsum(0)[:-1],
            query_ids=_int64([self._key(query_key(example)) for example in examples]),
            passage_ids=_int64([self._key(passage_key(passage)) for group in groups for passage in group]),
            positive_ids=_int64([row + [-1] * (width - len(row)) for row in known]).reshape(-1, width),
        )

    def _key(self, key: int) -> int:
        return self.same.get(key, key)

    def _passages(self, example: Example, epoch: int) -> list[Passage]:
        positives, negatives = example.positives, example.negatives
        wanted = len(negatives) if self.train_n_passages is None else self.train_n_passages - 1
        # A window that moves on by its own width each epoch, so that every negative gets its turn.
        taken = [negatives[(epoch * wanted + i) % len(negatives)] for i in range(min(wanted, len(negatives)))]
        return [positives[epoch % len(positives)], *taken]

    def _tokenized(self, texts: list[str], max_length: int) -> dict[str, Tensor]:
        # Tokenizers refuse an empty list, but the names and dtypes of what they give are needed all the same.
        tensors = self.tokenize(texts or [""], max_length)
        return {name: tensor[: len(texts)] for name, tensor in tensors.items()}


def _prefixed(given: str | None, usual: str) -> str:
    return usual if given is None else given


def _int64(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
