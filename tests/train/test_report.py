"""What a run says of its candidates and of settings that look wrong."""

from dataclasses import replace

import torch

from inbatch.data import Mixture, TrainBatch
from inbatch.data.batches import Part
from inbatch.train import report
from inbatch.train.config import (
    Config,
    DataConfig,
    DistillConfig,
    EvalConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from inbatch.train.report import FirstBatch


def make_config(loss: dict | None = None, **train) -> Config:
    return Config(
        model=ModelConfig(name_or_path="m"),
        data=DataConfig(train="d"),
        loss=LossConfig(**(loss or {})),
        train=TrainConfig(output_dir="o", **train),
    )


def first(**changes) -> FirstBatch:
    return replace(FirstBatch(queries=[128, 128], passages=[256, 256], duplicates=0.0, tokens=50_000), **changes)


def plan(examples: int, **changes) -> Mixture:
    return Mixture(sizes=(examples,), global_batch_size=256, **changes)


def test_candidates_and_what_they_are_made_of():
    (line,) = report.candidates(make_config(), first(), plan(256 * 3))
    assert line == "each query sees 512 candidates: its positive and 511 negatives (2 ranks x 128 queries x 2 passages)"
    lines = report.candidates(make_config(), first(queries=[7, 6], passages=[9, 10]), plan(256 * 3 + 5))
    assert lines[0].endswith("its positive and 18 negatives (2 ranks x 6 to 7 queries x 1.46 passages on average)")
    assert lines[1] == "the last step of an epoch has 5 queries, and so fewer candidates"
    assert len(report.candidates(make_config(), first(), plan(256 * 3 + 5, drop_last=True))) == 1
    (line,) = report.candidates(make_config(), first(queries=[4], passages=[4]), plan(256))
    assert line == "each query sees 4 candidates: its positive and 3 negatives (4 queries x 1 passage)"


def test_what_takes_candidates_away():
    (line,) = report.candidates(make_config(loss={"negatives": "local"}), first(), plan(256))
    assert "each query sees 256 candidates" in line
    lines = report.candidates(make_config(), first(duplicates=0.125), plan(256))
    assert "12.5% of the first batch's queries" in lines[1]


def test_what_adds_candidates():
    lines = report.candidates(make_config(loss={"objective": "gte"}), first(), plan(256))
    assert "loss.objective gte adds scores in other directions" in lines[1]
    assert len(report.candidates(make_config(loss={"objective": "clip"}), first(), plan(256))) == 1


def test_settings_that_look_wrong():
    def warnings(
        config: Config, batch: FirstBatch | None = None, *, l2_normalize=True, multi_vector=False, gpus=0
    ) -> list[str]:
        options = {"l2_normalize": l2_normalize, "multi_vector": multi_vector, "gpus": gpus}
        return list(report.warnings(config, batch or first(), **options).values())

    assert warnings(make_config()) == []
    (line,) = warnings(make_config(loss={"mask_duplicates": False}), first(duplicates=0.12))
    assert line.startswith("12.0% of the queries have a duplicate of their positive in the batch")
    assert "set loss.mask_duplicates to true" in line
    own = replace(make_config(), data=DataConfig(train=[{"path": "d", "negatives": "own"}]))
    assert warnings(replace(own, loss=LossConfig(mask_duplicates=False)), first(duplicates=0.12)) == []
    (line,) = report.candidates(own, first(), plan(256))
    assert line == "each query sees its record's 2 passages alone: data.train has negatives: own"
    detached = make_config(loss={"detach_remote": True, "mask_duplicates": "positive"})
    (line,) = warnings(detached)
    assert "cosine 0.62" in line
    assert warnings(detached, first(queries=[4], passages=[4])) == []
    idle = {"lora": LoraConfig(alpha=8), "optim": OptimConfig(schedule="constant", min_lr=1e-6, warmup_ratio=0.2)}
    (line,) = warnings(replace(make_config(), **idle, eval=EvalConfig(every_steps=9, measures=["R@1"])))
    assert line == (
        "lora.alpha is 8.0, which is not used: lora.r is null; optim.min_lr is 1e-06, which is not used: "
        "optim.schedule is constant; eval.measures is ['R@1'], which is not used: eval.data is null; "
        "eval.every_steps is 9, which is not used: nothing is evaluated"
    )
    alone = DistillConfig(weight=1, kind="mse", teacher="t", teacher_temperature=0.1, contrastive_weight=0)
    idle = {"optim": OptimConfig(warmup_steps=0, init_lr=1e-6), "distill": alone, "loss": LossConfig(margin=0.1)}
    (line,) = warnings(replace(make_config(), **idle, eval=EvalConfig(at_start=False, split="test")))
    assert line == (
        "optim.init_lr is 1e-06, which is not used: there is no warm-up; distill.teacher_temperature is 0.1, which is "
        "not used: distill.kind is mse; loss.margin is 0.1, which is not used: distill.contrastive_weight is 0; "
        "eval.at_start is false, which is not used: nothing is evaluated; eval.split is test, which is not used: "
        "nothing is evaluated"
    )
    two = DataConfig(train=[{"path": "a", "weight": 1.0}, {"path": "b", "weight": 1.0}], source_weights="equal")
    (line,) = warnings(replace(make_config(max_steps=3, epochs=2), data=two))
    assert line == (
        "data.source_weights is equal, which is not used: the sources have weights; train.epochs is 2, which is not "
        "used: train.max_steps is given"
    )
    (line,) = warnings(replace(make_config(), data=DataConfig(train=[{"path": "a", "weight": 2.0}])))
    assert line == "the weight of a source is not used: data.train is one"
    local = make_config(loss={"negatives": "local"})
    (line,) = warnings(local)
    assert "255 of 511 available negatives are used; set it to gather" in line
    assert warnings(local, first(queries=[4], passages=[4])) == []
    (line,) = warnings(make_config(accumulation_steps=2))
    assert "accumulation_steps 2 adds no negatives: set it to 1" in line
    (line,) = warnings(make_config(), l2_normalize=False)
    assert "not normalised and loss.temperature is 0.02" in line
    assert warnings(make_config(loss={"temperature": 1.0}), l2_normalize=False) == []
    (line,) = warnings(make_config(), multi_vector=True)
    assert "scores are sums of up to 64 cosines" in line
    assert warnings(make_config(loss={"temperature": 1.0}), multi_vector=True) == []
    (line,) = warnings(make_config(), first(queries=[4], passages=[4]), gpus=4)
    assert "add --nproc-per-node 4, or start with torchrun" in line
    (line,) = warnings(make_config(micro_batch_tokens=60_000))
    assert "60000 holds the whole batch (50000 tokens)" in line
    assert warnings(make_config(micro_batch_tokens=4096)) == []


def look_body(rank: int) -> FirstBatch:
    # Passage 7 is on both ranks: one query of each has its positive twice. Rank 2 is empty.
    passages = [[7, 1, 2], [7, 3], []][rank]
    positives = [[0, 2], [0, 1], []][rank]
    queries, count = len(positives), len(passages)
    batch = TrainBatch(
        queries={"input_ids": torch.zeros(queries, 3)},
        passages={"input_ids": torch.zeros(count, 4)},
        positives=torch.tensor(positives, dtype=torch.int64),
        query_ids=torch.arange(queries),
        passage_ids=torch.tensor(passages, dtype=torch.int64),
        positive_ids=torch.zeros(queries, 1, dtype=torch.int64),
    )
    return report.look_at(Part(batch, 1.0))


def test_the_first_batch_is_seen_whole_from_every_rank(pool):
    for rank, seen in enumerate(pool.run(look_body, 3)):
        tokens = [3 * 2 + 4 * 3, 3 * 2 + 4 * 2, 0][rank]
        assert seen == FirstBatch(queries=[2, 2, 0], passages=[3, 2, 0], duplicates=0.5, tokens=tokens)
