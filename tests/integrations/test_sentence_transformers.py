"""The losses of sentence-transformers by ours: one import changed, equal losses and gradients; exact over processes."""

import os
from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Dropout,
    Normalize,
    Pooling,
    StaticEmbedding,
    Transformer,
)
from sentence_transformers.util import dot_score
from torch.utils.data import SequentialSampler

from inbatch import collectives
from inbatch.integrations import sentence_transformers as ours
from inbatch.integrations.multi_vector import MultiVectorMultipleNegativesRankingLoss
from inbatch.integrations.shared import micro_batch_tokens
from inbatch.testing import assert_gradient_parity
from tests.tiny_models import WORDS, save_tiny, tiny_tokenizer

MINI = {"mini_batch_num_tokens": 24}
GTE = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_tiny("bert", path / "backbone")
    SentenceTransformer(str(path / "backbone")).save(str(path / "st"))
    return str(path / "st")


def records(rows: int) -> dict[str, list[str]]:
    def text(number):
        return " ".join(WORDS[(number * k + k) % len(WORDS)] for k in range(1, 3 + number % 5))

    columns = {
        name: [text(n + 7 * c) for n in range(rows)] for c, name in enumerate(("anchor", "positive", "negative"))
    }
    columns["positive"][1] = columns["positive"][0]  # a copy: no negative
    return columns


def gradients(model, loss) -> dict[str, torch.Tensor]:
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_equal(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys() != set()
    scale = max(grad.abs().max() for grad in expected.values())
    for name, grad in expected.items():
        assert (found[name] - grad).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        (3, {}),
        (3, {"scale": 5.0, "similarity_fct": dot_score}),
        (2, {"directions": ("query_to_doc", "query_to_query", "doc_to_doc")}),
        (3, {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}),
        (3, {"hardness_mode": "all_negatives", "hardness_strength": 5.0}),
    ],
    ids=lambda value: str(value).split(" at 0x")[0],  # the same in every process
)
def test_values_and_gradients_are_theirs(folder, columns, options):
    model = SentenceTransformer(folder, device="cpu")
    features = [model.preprocess(texts) for texts in list(records(6).values())[:columns]]
    for matryoshka in (False, True):
        pairs = [
            (
                losses.MultipleNegativesRankingLoss(model, **options),
                ours.MultipleNegativesRankingLoss(model, **options),
            ),
            (
                losses.MultipleNegativesRankingLoss(model, **options),
                ours.CachedMultipleNegativesRankingLoss(model, **options, **MINI),
            ),
        ]
        if matryoshka:
            pairs = [tuple(losses.MatryoshkaLoss(model, one, [32, 8], [1, 0.5]) for one in pair) for pair in pairs]
        for theirs, mine in pairs:
            expected, value = theirs([dict(f) for f in features], None), mine([dict(f) for f in features], None)
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
            assert_equal(gradients(model, value), gradients(model, expected))


@pytest.mark.parametrize("kind", ["bert", "roberta", "qwen3"])
def test_without_padding_it_is_the_same(kind, tmp_path):
    save_tiny(kind, tmp_path / "backbone")
    modules = [Transformer(str(tmp_path / "backbone"))]
    modules += [Pooling(32, "lasttoken" if kind == "qwen3" else "mean"), Dense(32, 16), Normalize()]
    model = SentenceTransformer(modules=modules, device="cpu")
    features = [model.preprocess(texts) for texts in list(records(6).values())]
    for name, options in (("MultipleNegativesRankingLoss", {}), ("CachedMultipleNegativesRankingLoss", MINI)):
        padded = getattr(ours, name)(model, **options)
        expected = padded([dict(f) for f in features], None)
        expected_gradients = gradients(model, expected)
        packed = getattr(ours, name)(model, packed=True, **options)
        assert (packed.packed, padded.packed) == (True, False)
        found = packed([dict(f) for f in features], None)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert_equal(gradients(model, found), expected_gradients)
    with pytest.raises(ValueError, match="packed=True: the model goes on with Dropout"):
        ours.MultipleNegativesRankingLoss(SentenceTransformer(modules=[*modules, Dropout()]), packed=True)
    with pytest.raises(ValueError, match="packed=True: the model is Linear"):
        ours.MultipleNegativesRankingLoss(torch.nn.Linear(2, 2), packed=True)


DOCUMENTS = [0, 0, *range(1, 7)]  # of the positives: the first two are one


def in_order(dataset, **options):
    return DefaultBatchSampler(SequentialSampler(dataset), **options)


def by_their_trainer(name, options, accumulation, output, model, batch):
    """The loss and gradient of one step of a user's script, whose import of the loss is ours."""
    rows = [row for part in collectives.gather_objects(batch["rows"]) for row in part]
    found = {}

    class Trainer(SentenceTransformerTrainer):
        def _clip_grad_norm(self, model):
            found.update({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})
            return super()._clip_grad_norm(model)

    arguments = SentenceTransformerTrainingArguments(
        output_dir=output,
        max_steps=1,
        per_device_train_batch_size=len(rows) // accumulation // collectives.world_size(),
        gradient_accumulation_steps=accumulation,
        batch_sampler=in_order,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        ddp_backend="gloo",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        max_grad_norm=1e9,
    )
    data = Dataset.from_dict({**records(8), "doc": DOCUMENTS}).select(rows)
    collator = ours.Collator(model.preprocess, ids={"positive": "doc"})
    loss = getattr(ours, name)(model, **options)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, loss=loss, data_collator=collator)
    return trainer.train().training_loss, found


def by_formula(accumulation, model, batch):
    """The mean of the parts' losses, where copies of a positive and other positives of a query are no negatives."""
    texts, parts = records(8), torch.tensor(batch["rows"]).chunk(accumulation)
    losses = []
    for rows in (part.tolist() for part in parts):
        columns = [[column[row] for row in rows] for column in texts.values()]
        queries_BD, *passages = (
            torch.nn.functional.normalize(model(model.preprocess(column))["sentence_embedding"]) for column in columns
        )
        scores_BN = 20 * queries_BD @ torch.cat(passages).T
        for i, j in ((i, j) for i in range(len(rows)) for j in range(len(rows)) if i != j):
            if DOCUMENTS[rows[i]] == DOCUMENTS[rows[j]] or columns[0][i] == columns[0][j]:
                scores_BN[i, j] = -torch.inf
        losses.append(torch.nn.functional.cross_entropy(scores_BN, torch.arange(len(rows))))
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss


def parity(rank, folder, output):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", TORCHELASTIC_RUN_ID="0")  # the group is there
    batches = [{"rows": [0, 1, 2, 3]}, {"rows": [4, 5, 6, 7]}]
    for name, options in (("MultipleNegativesRankingLoss", {}), ("CachedMultipleNegativesRankingLoss", MINI)):
        for accumulation in (1, 2):
            try:
                report = assert_gradient_parity(
                    partial(by_their_trainer, name, options, accumulation, output),
                    SentenceTransformer(folder, device="cpu").eval(),
                    batches,
                    reference=partial(by_formula, accumulation),
                    wrap=None,
                )
            finally:
                AcceleratorState._reset_state(reset_partial_state=True)
            assert report.loss_ratio == pytest.approx(1, abs=1e-5)


def test_their_trainer_on_two_processes_has_the_gradient_of_one(pool, folder, tmp_path):
    pool.run(parity, 2, folder, str(tmp_path), timeout_s=200)


def test_ids_leave_out_copies_and_mistakes_are_named(folder):
    model = SentenceTransformer(folder, device="cpu")
    columns = records(4)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    batch = ours.Collator(model.preprocess)(rows)
    assert batch["label"].shape == (4, 3)
    assert batch["label"][0, 1] == batch["label"][1, 1]
    features = [model.preprocess(texts) for texts in columns.values()]
    loss = ours.MultipleNegativesRankingLoss(model)
    assert loss.get_config_dict() == {"temperature": 0.05, "negatives": "gather", "masks": "by ids"}
    assert loss([dict(f) for f in features], batch["label"]) < loss([dict(f) for f in features], None)
    scored = ours.Collator(model.preprocess)([{"s1": "cat", "s2": "dog", "score": 0.5}])  # for another loss
    assert scored["label"].tolist() == [0.5]
    with pytest.raises(ValueError, match="no column doc in the data set"):
        ours.Collator(model.preprocess, ids={"positive": "doc"})(rows)
    for wrong in (1.0, None, ["1"]):
        with pytest.raises(ValueError, match=r"doc has the id .*: expected integers or strings"):
            ours.Collator(model.preprocess, ids={"positive": "doc"})([{**rows[0], "doc": wrong}])
    with pytest.raises(ValueError, match=r"give Collator\(model.preprocess\)"):
        ours.Collator(model)
    with pytest.raises(ValueError, match="mini_batch_size needs a model that limits the length"):
        micro_batch_tokens(4, None, None)
    with pytest.raises(ValueError, match="mini_batch_size must be an integer of at least 1, or None, got 0"):
        ours.CachedMultipleNegativesRankingLoss(model, mini_batch_size=0)
    with pytest.raises(ValueError, match="scale must be a number above 0, got 0"):
        ours.MultipleNegativesRankingLoss(model, scale=0)
    with pytest.raises(ValueError, match="directions must be a tuple of some of query_to_doc"):
        ours.MultipleNegativesRankingLoss(model, directions="query_to_doc")
    with pytest.raises(ValueError, match="the loss takes a SentenceTransformer, got str"):
        ours.MultipleNegativesRankingLoss(folder)
    with pytest.raises(ValueError, match=r"are in inbatch\.integrations\.sentence_transformers"):
        MultiVectorMultipleNegativesRankingLoss(model)
    with pytest.raises(ValueError, match="similarity_fct must be cos_sim or dot_score"):
        ours.MultipleNegativesRankingLoss(model, similarity_fct=torch.cdist)
    with pytest.raises(ValueError, match="with a hardness_mode, and 0 without, got hardness_mode=None"):
        ours.MultipleNegativesRankingLoss(model, hardness_strength=5.0)
    with pytest.raises(ValueError, match="objective is directions, partition_mode, "):
        ours.MultipleNegativesRankingLoss(model, objective=GTE)
    with pytest.raises(ValueError, match="give one of them"):
        ours.MultipleNegativesRankingLoss(model, scale=20, temperature=0.05)
    static = SentenceTransformer(modules=[StaticEmbedding(tiny_tokenizer().backend_tokenizer, embedding_dim=4)])
    with pytest.raises(ValueError, match="a StaticEmbedding's inputs cannot be cut into rows"):
        ours.CachedMultipleNegativesRankingLoss(static)
    adaptive = losses.AdaptiveLayerLoss(model, ours.CachedMultipleNegativesRankingLoss(model, **MINI))
    with pytest.raises(ValueError, match="AdaptiveLayerLoss and Matryoshka2dLoss cannot go around a cached loss"):
        adaptive([dict(f) for f in features], None)
    with pytest.raises(ValueError, match="doc_to_doc"):
        ours.MultipleNegativesRankingLoss(model, directions=GTE)([dict(f) for f in features], None)


def test_prompts_are_given_to_the_collator(folder, tmp_path):
    model, columns = SentenceTransformer(folder, device="cpu"), records(4)
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=1, prompts={"anchor": "the "}, use_cpu=True, report_to=[], save_strategy="no"
    )
    trained = {"model": model, "args": arguments, "train_dataset": Dataset.from_dict(columns)}
    trained["loss"] = ours.MultipleNegativesRankingLoss(model)
    trainer = SentenceTransformerTrainer(**trained, data_collator=ours.Collator(model.preprocess))
    with pytest.raises(ValueError, match=r"the training arguments have prompts.*Collator\(\.\.\., prompts="):
        trainer.train()
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    batch = ours.Collator(model.preprocess, prompts={"anchor": "the "})(rows)
    plain = ours.Collator(SentenceTransformer(folder, device="cpu").preprocess)(rows)
    assert (batch["anchor_attention_mask"].sum(1) == plain["anchor_attention_mask"].sum(1) + 1).all()
    assert torch.equal(batch["label"], plain["label"])


def test_labels_that_are_no_ids_are_named_as_unused():
    loss = ours.MultipleNegativesRankingLoss(torch.nn.Identity())  # type: ignore[arg-type]
    columns = [{"sentence_embedding": torch.randn(3, 4)} for _ in range(2)]
    with pytest.warns(UserWarning, match=r"labels \(3,\) torch.float32 are no ids as Collator makes them, and are not"):
        found = loss(columns, torch.ones(3))
    torch.testing.assert_close(found, loss(columns))
