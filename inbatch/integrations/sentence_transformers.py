"""The ranking losses of sentence-transformers, by the names and arguments that they have there: change the import.

    from inbatch.integrations.sentence_transformers import CachedMultipleNegativesRankingLoss, Collator

Shapes: B rows, N passages of a row (positive first), D dimension.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.losses.adaptive_layer import TransformerDecorator
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, StaticEmbedding, Transformer
from sentence_transformers.util import cos_sim, dot_score
from torch import Tensor, nn
from transformers import PreTrainedModel

from inbatch.encoder.loading import padding_shifts, position_table
from inbatch.encoder.packing import BOUNDS, enable_packing, packed_inputs, token_slots, wish
from inbatch.ids import stable_id
from inbatch.integrations.shared import TrainerLoss, ids_of, micro_batch_tokens
from inbatch.losses import Objective
from inbatch.retrieval.embed import unwrap

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


class MultipleNegativesRankingLoss(TrainerLoss):
    """InfoNCE over the passages of all devices; arguments up to hardness_strength are those of sentence-transformers.

    Different there: gather_across_devices is False by default, nothing is masked, and with "doc_to_query" in a joint
    softmax the positive pair is counted twice, here once.

    packed: encode texts without padding, as one sequence; None does so on CUDA wherever the model allows, True refuses
    by name where it does not.
    options: temperature, which is 1 / scale (give one of them); learnable, which trains it, with its gradient averaged
    over the ranks; negatives, impl and group as in `info_nce`, where negatives="ring" never gathers.
    labels [B, N] or [B, 1 + N] int64, as `Collator` makes them: ids of the passages, or of query and passages. What has
    the id of the row's positive, or answers the same query, is no negative. Other labels are not used, with a warning.

    Ranks may hold different numbers of rows. Raises ValueError for another similarity than cosine and dot, and for
    "doc_to_doc" with hard negatives, of which sentence-transformers leaves out a row's own.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float | None = None,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] | str = cos_sim,
        gather_across_devices: bool = True,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        *,
        packed: bool | None = None,
        **options: Any,
    ):
        if isinstance(directions, str) or not {*directions} <= {*DIRECTIONS}:
            raise ValueError(f"directions must be a tuple of some of {', '.join(DIRECTIONS)}, got {directions!r}")
        if similarity_fct not in (cos_sim, dot_score, "cosine", "dot"):
            raise ValueError(f"similarity_fct must be cos_sim or dot_score, got {similarity_fct!r}")
        inner: Any = unwrap(model)
        if not isinstance(model, nn.Module) or isinstance(inner, MultiVectorEncoder):
            remedy = "of inbatch.integrations.multi_vector for a MultiVectorEncoder"
            raise ValueError(f"the loss takes a SentenceTransformer, got {type(inner).__name__}: take those {remedy}")
        if "objective" in options:
            raise ValueError(
                "objective is directions, partition_mode, hardness_mode and hardness_strength here: give those"
            )
        objective = Objective(
            directions=tuple(direction.replace("doc", "passage") for direction in directions),
            partition=partition_mode,
            hardness_mode=hardness_mode,
            hardness_strength=hardness_strength,
        )
        options |= {"scale": scale, "gather_across_devices": gather_across_devices}
        super().__init__(model, usual_scale=20.0, objective=objective, **options)
        self.objective = objective
        self.cosine = similarity_fct in (cos_sim, "cosine")
        self.packed = wish(packed, getattr(model, "device", torch.device("cpu"))) is not False
        if self.packed and (problem := _enable_packing(inner)) is not None:
            if packed:
                raise ValueError(f"packed=True: {problem}; leave it out")
            self.packed = False
        self._first_position = position_table(inner[0].model)[1] if self.packed else 0

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """Return the loss of the columns (query, positive, negatives...), 0-d."""
        return self._of_columns(*(self._embed(one) for one in sentence_features), labels=labels)

    def _embed(self, features: dict[str, Any]) -> Tensor:
        features = _without_padding(features, self._first_position) if self.packed else features
        return self.model(features)["sentence_embedding"]

    def _of_columns(self, queries_BD: Tensor, *passages: Tensor, labels: Tensor | None = None) -> Tensor:
        if not passages:
            raise ValueError("the loss needs two columns or more, (query, positive, negatives...), got one")
        if len(passages) > 1 and "passage_to_passage" in self.objective.directions:
            raise ValueError(
                'directions with "doc_to_doc" take (query, positive) pairs only: drop it, or the negatives'
            )
        if self.cosine:
            queries_BD, *passages = (F.normalize(one, dim=1) for one in (queries_BD, *passages))  # type: ignore[assignment]
        together = torch.stack(list(passages), dim=1).flatten(0, 1)
        return self.loss(queries_BD, together, false_negatives=ids_of(labels, len(queries_BD), len(passages)))


def _enable_packing(model: nn.Module) -> str | None:
    """Let the model's attention take texts as one sequence; return why it would not give the padded embeddings."""
    if not isinstance(model, SentenceTransformer):
        return f"the model is {type(model).__name__}"
    first, *rest = model
    if not (isinstance(first, Transformer) and isinstance(first.model, PreTrainedModel) and first.tokenizer):
        return f"the model begins with {type(first).__name__}"
    others = [type(one).__name__ for one in rest[1:] if not isinstance(one, (Normalize, Dense))]
    if not rest or not isinstance(rest[0], Pooling) or others:
        return f"the model goes on with {', '.join(others) or 'no Pooling'}"
    weighted = "weightedmean" in rest[0].pooling_mode
    if shifted := padding_shifts(first.tokenizer, first.model, "weighted_mean" if weighted else ""):
        return f"its padding, on the left, shifts {shifted}"
    problem = enable_packing(first.model)
    if problem is None and first.model_forward_params is not None:
        first.model_forward_params |= {"position_ids", *BOUNDS}
    return problem


def _without_padding(features: Mapping[str, Any], first_position: int) -> dict[str, Any]:
    """Return the features with the real tokens of all texts as one sequence, which their Pooling takes as well."""
    mask_BT = features["attention_mask"] != 0
    per_token = {
        name: value
        for name, value in features.items()
        if isinstance(value, Tensor) and value.shape == mask_BT.shape and name not in ("attention_mask", "position_ids")
    }
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0) + first_position
    return {**features, **packed_inputs(mask_BT, token_slots(mask_BT), **per_token, position_ids=positions_BT)}


class CachedMultipleNegativesRankingLoss(MultipleNegativesRankingLoss):
    """The same loss and gradient in the memory of a micro-batch, by `GradCache`.

    mini_batch_size: memory of so many rows of the model's max_seq_length. mini_batch_num_tokens: of so many tokens, in
    its place. Without either GradCache finds a size that fits. show_progress_bar is not used.
    sentence-transformers' MatryoshkaLoss around it is right, with all dimensions in each step. Raises ValueError for a
    StaticEmbedding, whose inputs cannot be cut into rows.
    """

    uses_gradient_cache = True  # to MatryoshkaLoss, which then replaces calculate_loss

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float | None = None,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] | str = cos_sim,
        mini_batch_size: int | None = None,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = True,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        show_progress_bar: bool = False,
        **options: Any,
    ):
        super().__init__(model, scale, similarity_fct, gather_across_devices, directions, partition_mode, **options)
        if any(isinstance(module, StaticEmbedding) for module in model.modules()):
            raise ValueError("a StaticEmbedding's inputs cannot be cut into rows: use MultipleNegativesRankingLoss")
        longest = getattr(unwrap(model), "max_seq_length", None)
        self.micro_batch_tokens = micro_batch_tokens(
            mini_batch_size, mini_batch_num_tokens, longest, show_progress_bar=show_progress_bar
        )

    def calculate_loss(self, reps: Sequence[Sequence[Tensor]], labels: Tensor | None = None) -> Tensor:
        """Return the loss of the columns' embeddings, each in parts."""
        return self._of_columns(*(torch.cat(list(parts)) for parts in reps), labels=labels)

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """Return the loss, whose backward encodes a second time."""
        if any(isinstance(module.forward, TransformerDecorator) for module in self.model.modules()):
            raise ValueError(
                "AdaptiveLayerLoss and Matryoshka2dLoss cannot go around a cached loss: give them "
                "MultipleNegativesRankingLoss"
            )
        matryoshka = vars(self).get("calculate_loss")
        if matryoshka is not None:
            if 0 < matryoshka.n_dims_per_step < len(matryoshka.matryoshka_dims):
                raise ValueError(
                    "MatryoshkaLoss(n_dims_per_step=...) draws other dimensions on each rank: leave it out"
                )
            self.cosine = True  # as MatryoshkaLoss cuts embeddings
            self.loss.objective = replace(
                self.objective,
                matryoshka_dims=matryoshka.matryoshka_dims,
                matryoshka_weights=matryoshka.matryoshka_weights,
            )
        return self._cached(self._embed, self._of_columns, sentence_features, labels)


@dataclass
class Collator(SentenceTransformerDataCollator):
    """Batches for the losses above, with an id for each text as labels [B, columns] int64; equal texts are one.

        SentenceTransformerTrainer(..., data_collator=Collator(model.preprocess, ids={"positive": "doc_id"}))

    ids: text column -> the column with its ids, integers or strings; that is then no text. Other texts are hashed,
    without their prompts. A data set with labels for another loss keeps them.
    Raises ValueError for prompts, router_mapping or max_length in the training arguments that are not given here too:
    the trainer would not use them.
    """

    ids: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.preprocess_fn, nn.Module):
            raise ValueError("Collator takes a model's preprocess: give Collator(model.preprocess)")
        if not isinstance(self.ids, Mapping):
            raise ValueError(f"Collator: ids must be text column -> column of ids, got {self.ids!r}")

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        card = getattr(getattr(self.preprocess_fn, "__self__", None), "model_card_data", None)
        arguments = getattr(card, "all_hyperparameters", {})  # of the training that has begun
        for name in ("prompts", "router_mapping", "max_length"):
            if arguments.get(name) and not getattr(self, name, None):
                raise ValueError(
                    f"the training arguments have {name}, which a trainer gives to no collator but its own: give them "
                    f"to Collator(..., {name}=...) too"
                )
        apart = {*self.ids.values(), *self.valid_label_columns, "dataset_name"}
        missing = [name for name in (*self.ids, *self.ids.values()) if features and name not in features[0]]
        if missing:
            raise ValueError(f"Collator: no column {', '.join(missing)} in the data set, which has {list(features[0])}")
        for column in self.ids.values():
            wrong = [row[column] for row in features if isinstance(row[column], (float, list, dict, type(None)))]
            if wrong:
                raise ValueError(f"Collator: {column} has the id {wrong[0]!r}: expected integers or strings")
        texts = [name for name in features[0] if name not in apart] if features else []
        rows = [
            [
                stable_id("id", str(row[self.ids[name]])) if name in self.ids else stable_id("text", str(row[name]))
                for name in texts
            ]
            for row in features
        ]
        kept = [{name: value for name, value in row.items() if name not in self.ids.values()} for row in features]
        return {"label": torch.tensor(rows, dtype=torch.int64), **super().__call__(kept)}

    def _get_task_for_column(
        self, column_name: str, column_position: int, router_mapping: dict[str, str]
    ) -> str | None:
        task = super()._get_task_for_column(column_name, column_position, router_mapping)
        if task is None and isinstance(getattr(self.preprocess_fn, "__self__", None), MultiVectorEncoder):
            return "document" if column_position else "query"  # as their collator for such models
        return task
