"""Mined negatives against brute force, on any number of ranks."""

import json
import math
import os
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import CrossEncoder
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from inbatch.cli import run
from inbatch.data import open_examples
from inbatch.data.files import claimed
from inbatch.retrieval.evaluate import RetrieveOptions, embed_queries
from inbatch.retrieval.mine import MineOptions, MiningSet, choose, mine, open_mining_set, search_negatives
from tests.data_files import write_beir, write_jsonl
from tests.helpers import device
from tests.retrieval.test_evaluate import LetterEncoder, one_by_one, some_texts
from tests.tiny_models import WORDS, save_tiny, tiny_tokenizer


def some_set(documents: int, queries: int, seed: int) -> MiningSet:
    chance = random.Random(seed)
    rows = range(documents)
    return MiningSet(
        queries=some_texts(queries, seed),
        documents=some_texts(documents, seed + 1),
        positives=[sorted(chance.sample(rows, chance.randint(1, min(3, documents)))) for _ in range(queries)],
        same=[chance.sample(rows, chance.randint(0, 1)) for _ in range(queries)],
    )


def vectors(count: int, seed: int) -> torch.Tensor:
    """Many ties: few distinct directions."""
    return torch.randint(-1, 2, (count, 4), generator=torch.Generator().manual_seed(seed)).float() + 0.5


def brute_force(queries, documents, data, options):
    """Every score in float64, then the rules one document at a time: (row, score) of each query's negatives."""
    queries, documents = queries.double(), documents.double()
    scores = queries @ documents.T / (queries.norm(dim=1)[:, None] * documents.norm(dim=1))
    scores = scores.float().tolist()
    chosen = []
    for query, row in enumerate(scores):
        banned = {*data.positives[query], *data.same[query]}
        ranking = sorted((place for place in range(len(row)) if place not in banned), key=lambda i: (-row[i], i))
        lowest = min(row[place] for place in data.positives[query])
        kept = []
        for place in ranking[options.range_min : options.range_max]:
            too_high = (
                (options.relative_margin is not None and row[place] > lowest - options.relative_margin * abs(lowest))
                or (options.absolute_margin is not None and row[place] > lowest - options.absolute_margin)
                or (options.max_score is not None and row[place] > options.max_score)
            )
            if not too_high and not (options.min_score is not None and row[place] < options.min_score):
                kept.append((place, row[place]))
        chosen.append(kept)
    return chosen


def _search(rank, counts, documents, queries, data, depth):
    first = sum(counts[:rank])
    mine = vectors(documents, 1)[first : first + counts[rank]].to(device())
    _, scores, indices, positives = search_negatives(
        range(queries), vectors(queries, 0).to(device()), mine, data, depth
    )
    return scores.tolist(), indices.tolist(), positives


margins = st.one_of(st.none(), st.floats(0, 0.5))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_property_equals_brute_force(pool, data):
    counts = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=3).filter(lambda counts: sum(counts) >= 1))
    queries = data.draw(st.integers(1, 9))
    given_set = some_set(sum(counts), queries, data.draw(st.integers(0, 99)))
    low = data.draw(st.integers(0, 5))
    width = data.draw(st.integers(1, 60))
    options = MineOptions(
        num_negatives=width,
        range_min=low,
        range_max=low + width,
        relative_margin=data.draw(margins),
        absolute_margin=data.draw(margins),
        max_score=data.draw(margins),
        min_score=data.draw(st.one_of(st.none(), st.floats(-1, 0))),
    )
    expected = brute_force(vectors(queries, 0), vectors(sum(counts), 1), given_set, options)
    for found in pool.run(_search, len(counts), counts, sum(counts), queries, given_set, options.range_max):
        scores, indices, positives = found
        for query in range(queries):
            candidates = [place for place in indices[query] if place >= 0]
            places = choose(query, scores[query][: len(candidates)], positives[query], options, Counter())
            assert [candidates[place] for place in places] == [place for place, _ in expected[query]]


def test_random_sampling_is_a_function_of_the_seed_and_the_query():
    options = MineOptions(num_negatives=3, range_min=2, range_max=30, sampling="random", seed=1)
    scores = [1 - place / 40 for place in range(30)]
    first, again, other = (choose(query, scores, [1.0], options, Counter()) for query in (7, 7, 8))
    assert first == again == sorted(first)
    assert first != other
    assert len(set(first)) == 3
    assert min(first) >= 2
    drawn = {place for query in range(300) for place in choose(query, scores, [1.0], options, Counter())}
    assert drawn == set(range(2, 30))


def test_rules_are_counted():
    filtered = Counter()
    options = MineOptions(relative_margin=0.1, absolute_margin=0.25, max_score=0.5, min_score=0.1)
    # The lowest positive is 0.8: at most 0.72, then 0.55, then 0.5; at least 0.1.
    assert choose(0, [0.9, 0.73, 0.6, 0.52, 0.5, 0.1, 0.05], [0.9, 0.8], options, filtered) == [4, 5]
    assert filtered == {"relative_margin": 2, "absolute_margin": 1, "max_score": 1, "min_score": 1}
    assert choose(0, [-0.5, -0.54, -0.6], [-0.5], MineOptions(relative_margin=0.1), Counter()) == [2]


def beir_set(tmp_path):
    texts = some_texts(40, 3)
    corpus = [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts)]
    corpus += [{"_id": "copy", "text": texts[0]}, {"_id": "blank", "text": " "}, {"_id": "q1", "text": texts[5] + "a"}]
    qrels = [("q0", "d0", 1), ("q0", "d3", 2), ("q0", "d4", 0), ("q1", "d5", 1), ("q2", "d9", 0)]
    folder = write_beir(tmp_path / "beir", corpus=corpus, qrels={"train": qrels})
    write_jsonl(folder / "queries.jsonl", [{"_id": f"q{i}", "text": texts[i + 20]} for i in range(3)])
    return folder, texts


def _mine(rank, folder, output, options, retrieve, format):
    data = open_mining_set(folder, "train")
    model = LetterEncoder().to(device())
    return mine(model, data, output, MineOptions(**options), RetrieveOptions(**retrieve), format=format)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_mine_writes_what_training_reads(pool, tmp_path, world_size):
    folder, texts = beir_set(tmp_path)
    output = tmp_path / "new" / "mined.jsonl"
    reports = pool.run(_mine, world_size, folder, output, {"num_negatives": 4}, {"query_prefix": "ab"}, "lists")
    records = [json.loads(line) for line in output.read_text().splitlines()]
    documents = [*texts, texts[5] + "a"]
    model = LetterEncoder()
    scores = (
        nn.functional.normalize(one_by_one(model, texts[20:22], "ab").double(), dim=1)
        @ nn.functional.normalize(one_by_one(model, documents).double(), dim=1).T
    )
    # Not: positives (a copy of one under another id too), the query's own text, the document with the query's id.
    banned = [{0, 3, 20}, {5, 21, 40}]
    for record, row, without, query in zip(records, scores, banned, texts[20:22], strict=True):
        best = [i for i in row.argsort(descending=True).tolist() if i not in without][:4]
        assert record["query"] == query
        assert record["neg"] == [documents[i] for i in best]
        assert record["neg_scores"] == pytest.approx(row[best].tolist(), abs=1e-6)
    assert records[0]["pos"] == [texts[0], texts[3]]
    assert records[0]["pos_scores"] == pytest.approx(scores[0, [0, 3]].tolist(), abs=1e-6)
    counts = reports[0]["counts"]
    assert (counts["queries"], counts["negatives"], counts["candidates"]) == (2, 8, 38 + 38)
    assert all(report == reports[0] for report in reports)
    saved = json.loads((tmp_path / "new" / "mined.jsonl.report.json").read_text())
    assert saved.pop("examples") == records
    assert saved == reports[0]
    assert (tmp_path / "new" / "mined.jsonl.report.png").read_bytes().startswith(b"\x89PNG")
    examples = open_examples(output)
    assert [passage.text for passage in examples[0].positives] == records[0]["pos"]
    assert [passage.text for passage in examples[1].negatives] == records[1]["neg"]


def test_too_few_candidates_are_said_and_nothing_is_made_up(pool, tmp_path):
    passages = some_texts(4, 9)
    source = write_jsonl(
        tmp_path / "records.jsonl",
        [
            {"query": "ab", "positive": passages[0], "negative": passages[1]},
            {"query": "ab", "positive": passages[2], "negative": passages[0]},
            {"query": "cd", "positive": passages[3], "negative": "cd"},
        ],
    )
    data = open_mining_set(source)
    assert [list(data.documents), data.positives, data.same] == [
        [passages[0], passages[1], passages[2], passages[3], "cd"], [[0, 2], [3]], [[], [4]],
    ]  # fmt: skip
    output = tmp_path / "mined.jsonl"
    report = mine(LetterEncoder(), data, output, MineOptions(num_negatives=3), format="triplets")
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["anchor"], line["positive"]) for line in lines] == [
        ("ab", passages[0]), ("ab", passages[2]), ("cd", passages[3]),
    ]  # fmt: skip
    assert {text for name, text in lines[0].items() if name.startswith("negative")} == {passages[1], passages[3], "cd"}
    assert report["counts"]["queries with fewer negatives"] == 0
    report = mine(LetterEncoder(), data, output, MineOptions(num_negatives=4, max_score=-2.0))
    assert report["counts"]["queries without negatives"] == 2
    assert report["counts"]["max_score"] == 6
    assert [json.loads(line)["neg"] for line in output.read_text().splitlines()] == [[], []]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_negatives": 0}, "num_negatives is 0; expected at least 1"),
        ({"range_min": 100}, "range_min is 100 and range_max 100; expected 0 <= range_min < range_max"),
        ({"num_negatives": 11, "range_max": 10}, "num_negatives is 11; expected .* at most the 10 candidates"),
        ({"relative_margin": math.nan}, "relative_margin is nan; expected a number"),
        ({"relative_margin": 5}, "relative_margin is 5; expected a share of at most 1, such as 0.05"),
        ({"max_score": 0.1, "min_score": 0.9}, "min_score is 0.9 and max_score 0.1, between which is no score"),
        ({"sampling": "best"}, "sampling is 'best'; expected top or random"),
        ({"seed": 7}, "seed is 7, which sampling 'top' does not use: set sampling to random"),
        ({"seed": -1}, "seed is -1; expected at least 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        MineOptions(**options)


def test_records_are_not_replaced_by_what_is_mined_of_them_and_their_prompts_are_named(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"query": "ab", "pos": ["c"], "prompt": "Find: "}])
    with pytest.warns(UserWarning, match=r"a\.jsonl: the prompts of the records are not used: texts are embedded"):
        data = open_mining_set(source)
    model, folder = LetterEncoder(), beir_set(tmp_path / "beir")[0]
    for replaced, some in ((source, data), (folder / "corpus.jsonl", open_mining_set(folder))):
        before = replaced.read_bytes()
        with pytest.raises(ValueError, match="is read as the source, and would be replaced"):
            mine(model, some, replaced)
        assert replaced.read_bytes() == before
    with claimed(tmp_path / "mined.jsonl") as file:
        file.write(b"another run's")
        file.flush()
        with pytest.raises(ValueError, match="is being written by another run"):
            mine(model, data, tmp_path / "mined.jsonl")
    assert (tmp_path / ".mined.jsonl.partial").read_bytes() == b"another run's"
    assert not model.seen


def test_wrong_output_and_a_model_that_fails_leave_nothing(tmp_path):
    folder, _ = beir_set(tmp_path)
    data, model = open_mining_set(folder), LetterEncoder()
    with pytest.raises(ValueError, match=r"output 'a\.csv' in format 'lists'; expected a \.jsonl"):
        mine(model, data, tmp_path / "a.csv")
    with pytest.raises(ValueError, match="in format 'poems'"):
        mine(model, data, tmp_path / "a.jsonl", format="poems")
    for score, message in (([1.0, 2.0], r"of \d+ pairs are \(\d+, 2\); expected one each"), (torch.nan, "hold NaN")):
        teacher = SimpleNamespace(predict=lambda pairs, score=score, **_: [score] * len(pairs))
        with pytest.raises(ValueError, match=f"the teacher's scores {message}"):
            mine(model, data, tmp_path / "out" / "a.jsonl", teacher=teacher)
    model.letters.weight.data[ord("a")] = torch.nan
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        mine(model, data, tmp_path / "out" / "a.jsonl")
    assert not list((tmp_path / "out").iterdir())


class Pairs:
    """Scores a pair by the letters that both texts have, as a cross-encoder might."""

    def predict(self, pairs, show_progress_bar):
        return [len(set(query) & set(document)) / 10 for query, document in pairs]


def _mine_with(rank, folder, output, teacher, kept):
    data = open_mining_set(folder, "train")
    options = MineOptions(num_negatives=4, range_max=6)
    return mine(LetterEncoder().to(device()), data, output, options, teacher=teacher, kept=kept)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_teacher_ranks_the_best_candidates_anew(pool, tmp_path, world_size):
    folder, _ = beir_set(tmp_path)
    other = LetterEncoder()
    other.letters.weight.data.neg_().square_()
    written = {}
    for name, teacher in (("none", None), ("pairs", Pairs()), ("other", other.to(device())), ("same", LetterEncoder())):
        pool.run(_mine_with, world_size, folder, tmp_path / f"{name}.jsonl", teacher, tmp_path / "kept")
        written[name] = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    assert written["same"] == written["none"]
    for plain, pairs in zip(written["none"], written["pairs"], strict=True):
        scores = Pairs().predict([(pairs["query"], text) for text in pairs["neg"]], False)
        assert pairs["neg_scores"] == pytest.approx(scores)
        assert scores == sorted(scores, reverse=True)
        assert pairs["pos_scores"] == pytest.approx(Pairs().predict([(pairs["query"], t) for t in pairs["pos"]], False))
        assert plain["pos"] == pairs["pos"]
    assert written["other"] != written["none"]
    for record in written["other"]:
        truth = nn.functional.cosine_similarity(
            one_by_one(other.cpu(), [record["query"]], "q"), one_by_one(other, record["neg"])
        )
        assert record["neg_scores"] == pytest.approx(truth.tolist(), abs=1e-5)


def test_a_cross_encoder_of_sentence_transformers_scores_pairs(tmp_path):
    """A classifier's folder given to the command: positives and candidates have the scores of CrossEncoder.predict."""
    chance = random.Random(0)
    texts = [" ".join(chance.choices(WORDS, k=chance.randint(2, 9))) for _ in range(16)]
    write_beir(tmp_path / "beir", corpus=[{"_id": f"d{i}", "text": text} for i, text in enumerate(texts)])
    save_tiny("bert", tmp_path / "model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig.from_pretrained(tmp_path / "model", num_labels=1)
        BertForSequenceClassification(config).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer(model_max_length=64).save_pretrained(tmp_path / "teacher")
    options = ["--teacher", str(tmp_path / "teacher"), "--num-negatives", "4", "--range-max", "8", "--no-progress"]
    output = tmp_path / "mined.jsonl"
    assert run(["mine", str(tmp_path / "model"), str(tmp_path / "beir"), str(output), *options]) == 0
    teacher = CrossEncoder(str(tmp_path / "teacher"), device="cpu")
    for record in map(json.loads, output.read_text().splitlines()):
        assert record["neg_scores"] == sorted(record["neg_scores"], reverse=True)
        for role in ("pos", "neg"):
            scores = teacher.predict([(record["query"], text) for text in record[role]]).tolist()
            assert record[f"{role}_scores"] == pytest.approx(scores, abs=1e-5)
    assert len({score for line in output.read_text().splitlines() for score in json.loads(line)["neg_scores"]}) > 4


def test_kept_embeddings_are_found_again_and_completed(tmp_path):
    folder, _ = beir_set(tmp_path)
    model, data = LetterEncoder(), open_mining_set(folder, "train")

    def texts_seen(model) -> int:
        model.seen.clear()
        mine(model, data, tmp_path / "mined.jsonl", kept=tmp_path / "kept")
        return sum(rows for rows, _ in model.seen)

    everything, records = texts_seen(model), (tmp_path / "mined.jsonl").read_text()
    assert everything == len(data.queries) + len(data.documents)
    assert texts_seen(model) == len(data.queries)
    rows = next((tmp_path / "kept").glob("*.rows"))
    done = bytearray(rows.read_bytes())
    done[3:7], done[20] = b"\0" * 4, 0  # as a killed run leaves it
    rows.write_bytes(done)
    assert texts_seen(model) == len(data.queries) + 5
    assert (tmp_path / "mined.jsonl").read_text() == records
    for damage in (lambda path: path.unlink(), lambda path: os.truncate(path, 100)):
        damage(next((tmp_path / "kept").glob("*.embeddings")))
        assert texts_seen(model) == everything
        assert (tmp_path / "mined.jsonl").read_text() == records
    model.letters.weight.data += 1
    assert texts_seen(model) == everything


@pytest.mark.parametrize("same", [True, False])
def test_a_killed_run_goes_on_where_the_same_call_is_made(tmp_path, monkeypatch, same):
    folder, _ = beir_set(tmp_path)
    data = open_mining_set(folder, "train")
    monkeypatch.setattr("inbatch.retrieval.mine._QUERIES", 1)
    expected = mine(LetterEncoder(), data, tmp_path / "whole.jsonl", MineOptions(num_negatives=4))

    class Killed(BaseException):
        pass

    calls = 0

    def dying(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Killed
        return embed_queries(*arguments, **options)

    monkeypatch.setattr("inbatch.retrieval.mine.embed_queries", dying)
    model = LetterEncoder()
    with pytest.raises(Killed):
        mine(model, data, tmp_path / "mined.jsonl", MineOptions(num_negatives=4))
    assert not (tmp_path / "mined.jsonl").exists()
    if not same:
        model.letters.weight.data[0, 0] += 1
    calls = 10
    report = mine(model, data, tmp_path / "mined.jsonl", MineOptions(num_negatives=4))
    assert calls == (11 if same else 12), "queries that were done are not searched again"
    assert (tmp_path / "mined.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert report == expected
    assert not list(tmp_path.glob(".mined*"))


def test_options_of_retrieval_that_mean_nothing_here_are_refused(tmp_path):
    folder, _ = beir_set(tmp_path)
    for options in (RetrieveOptions(top_k=7), RetrieveOptions(keep_identical_ids=True)):
        with pytest.raises(ValueError, match="leave out top_k and keep_identical_ids"):
            mine(LetterEncoder(), open_mining_set(folder), tmp_path / "a.jsonl", retrieve=options)
