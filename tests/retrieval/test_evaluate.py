"""Embedding, measures, run files, evaluation and encoding to files."""

import itertools
import json
import math
import random
import resource
from contextlib import contextmanager, nullcontext
from pathlib import Path

import ir_measures
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import pytrec_eval
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from inbatch.data import RetrievalData, load_retrieval
from inbatch.data.files import claimed
from inbatch.retrieval import metrics
from inbatch.retrieval.embed import EmbedOptions, embed
from inbatch.retrieval.encode_file import encode_to_file
from inbatch.retrieval.evaluate import RetrieveOptions, evaluate, retrieve
from tests.data_files import write_jsonl
from tests.helpers import REPOSITORY, device


class LetterEncoder(nn.Module):
    """A bi-encoder small enough to follow by hand: the mean of its letters' vectors. It records what it is given."""

    prompts = {"query": "q"}  # noqa: RUF012
    similarity = "cosine"

    def __init__(self, dimension: int = 16, padding_side: str = "right"):
        super().__init__()
        self.embedding_dim, self.padding_side = dimension, padding_side
        self.letters = nn.Embedding(256, dimension)
        nn.init.normal_(self.letters.weight, generator=torch.Generator().manual_seed(0))
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Linear(1, 1).eval()
        self.seen: list[tuple[int, int]] = []

    def tokenize(self, texts, *, prefix="", task=None, max_length=None):
        codes = [list((prefix + text).encode())[:max_length] for text in texts]
        width = max(map(len, codes), default=0)
        pads = [[0] * (width - len(code)) for code in codes]
        left = self.padding_side == "left"
        ids = [pad + code if left else code + pad for code, pad in zip(codes, pads, strict=True)]
        return {"input_ids": torch.tensor(ids), "attention_mask": (torch.tensor(ids) > 0).long()}

    def to_device(self, batch):
        return {name: value.to(self.letters.weight.device) for name, value in batch.items()}

    def forward(self, batch):
        self.seen.append(tuple(batch["input_ids"].shape))
        weights = batch["attention_mask"].unsqueeze(2).float()
        states = self.dropout(self.letters(batch["input_ids"])) * weights
        return states.sum(1) / weights.sum(1).clamp_min(1)


@contextmanager
def no_file_above(size: int):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def some_texts(count: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    return ["".join(chance.choices("abcdefgh", k=chance.randint(1, 40))) for _ in range(count)]


def one_by_one(model, texts, prefix="", max_length=None):
    model.eval()
    with torch.no_grad():
        return torch.cat([model(model.tokenize([prefix + text], max_length=max_length)) for text in texts])


def small_data(documents: int = 60, queries: int = 11) -> RetrievalData:
    texts = some_texts(documents, 1)
    texts[documents // 2] = texts[3]  # an exact tie
    return RetrievalData(
        query_ids=[f"q{i}" for i in range(queries)],
        queries=[texts[i * 5][:-1] + "h" for i in range(queries)],
        doc_ids=[f"d{i}" for i in range(documents)],
        documents=texts,
        qrels={f"q{i}": {f"d{i * 5}": 1, f"d{i + 1}": 2} for i in range(queries)},
    )


# ---- measures


def test_measures_by_hand():
    qrels = {"q1": {"a": 1, "b": 2}, "q2": {"c": 1}, "q3": {"d": 1}}
    run = {
        "q1": {"x": 9.0, "b": 8.0, "a": 7.0},
        "q2": {f"x{i}": float(-i) for i in range(10)} | {"c": -10.0},
        "q9": {"a": 1.0},
    }
    figures = metrics.retrieval_metrics(run, qrels, ["nDCG@10", "recall@100", "MRR@10", "RR"])
    ndcg = (2 / math.log2(3) + 1 / math.log2(4)) / (2 + 1 / math.log2(3))
    # q2 finds its document at rank 11; q3 retrieved nothing and counts 0.
    assert figures == pytest.approx(
        {"nDCG@10": ndcg / 3, "recall@100": 2 / 3, "MRR@10": 0.5 / 3, "RR": (0.5 + 1 / 11) / 3}
    )
    assert list(figures) == ["nDCG@10", "recall@100", "MRR@10", "RR"]


def test_measures_equal_ir_measures_where_there_are_no_ties(tmp_path):
    chance = random.Random(0)
    documents = [f"d{i}" for i in range(200)]
    qrels = {f"q{i}": {d: chance.randint(0, 2) for d in chance.sample(documents, 20)} for i in range(15)}
    run = {f"q{i}": {d: chance.random() for d in chance.sample(documents, 100)} for i in range(14)}
    names = ["nDCG@10", "nDCG", "R@50", "RR@10", "AP", "P@5", "Success@1"]
    expected = ir_measures.calc_aggregate([ir_measures.parse_measure(name) for name in names], qrels, run)
    figures = metrics.retrieval_metrics(run, qrels, names)
    assert figures == pytest.approx({str(measure): value for measure, value in expected.items()}, abs=1e-12)
    path = tmp_path / "a.run"
    metrics.write_trec_run(path, run)
    from_file = ir_measures.calc_aggregate(
        [ir_measures.parse_measure(name) for name in names], qrels, ir_measures.read_trec_run(str(path))
    )
    assert figures == pytest.approx({str(measure): value for measure, value in from_file.items()}, abs=1e-12)


def test_ties_keep_the_order_given_in_every_measure_and_in_the_file(tmp_path):
    # Left to themselves, one provider puts "a" first among equals and the other "z".
    qrels = {"q": {"m": 1}}
    run = {"q": {"z": 0.5, "m": 0.5, "a": 0.5, "b": -0.25, "c": -0.25}}
    names = ["RR", "RR@10", "nDCG@10"]
    expected = {"RR": 0.5, "RR@10": 0.5, "nDCG@10": 1 / math.log2(3)}
    assert metrics.retrieval_metrics(run, qrels, names) == pytest.approx(expected)
    path = tmp_path / "a.run"
    metrics.write_trec_run(path, run, tag="mine")
    lines = [line.split(" ") for line in path.read_text().splitlines()]
    assert [line[:4] + line[5:] for line in lines] == [
        ["q", "Q0", document, str(rank), "mine"] for rank, document in enumerate("zmabc", start=1)
    ]
    scores = [float(line[4]) for line in lines]
    assert all(np.float32(left) > np.float32(right) for left, right in itertools.pairwise(scores))
    assert scores == pytest.approx([0.5, 0.5, 0.5, -0.25, -0.25], rel=1e-6)
    again = ir_measures.calc_aggregate(
        [ir_measures.parse_measure(name) for name in names], qrels, ir_measures.read_trec_run(str(path))
    )
    assert {str(measure): value for measure, value in again.items()} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "known_as"),
    [
        ("nDCG@10", "nDCG@10"),
        ("ndcg@10", "nDCG@10"),
        ("recall@100", "R@100"),
        ("Recall@5", "R@5"),
        ("MRR@10", "RR@10"),
        ("mrr", "RR"),
        ("MAP", "AP"),
        ("precision@3", "P@3"),
        ("Hit@3", "Success@3"),
        ("hit_rate@3", "Success@3"),
        ("ndcg_at_10", "nDCG@10"),
        ("accuracy@3", "Success@3"),
        ("Accuracy@3", "Accuracy@3"),
        ("P(rel=2)@5", "P(rel=2)@5"),
        ("iprec@0.1", "IPrec@0.1"),
        ("IPrec@0.0", "IPrec@0.0"),
    ],
)
def test_names_of_measures(name, known_as):
    assert str(metrics.parse_measure(name)) == known_as


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nDGC@10", r"did you mean nDCG@10\?"),
        ("ndcg10", r"did you mean nDCG@10\?"),
        ("nDCG-5", r"did you mean nDCG@5\?"),
        ("nDCG@ten", r"did you mean nDCG@10\?"),
        ("nDGC(dcg='exp-log2')@5", r"did you mean nDCG\(dcg='exp-log2'\)@5\?"),
        ("recal@100", "did you mean Recall@100"),
        ("recall@0", "cut-off of 0"),
        ("recall", "it may need a cut-off, as in Recall@10"),
        ("IPrec", "it may need a cut-off, as in IPrec@0.1"),
        ("recall@0.5", "cut-off of 0.5; expected at least 1"),
        ("recall@1.5", "invalid param"),
        ("P(bogus=3)@5", "option it does not take"),
        ("", "not a measure"),
    ],
)
def test_a_wrong_measure(name, message):
    with pytest.raises(ValueError, match=message):
        metrics.parse_measure(name)


def test_ids_of_any_kind_suit_every_measure():
    grades = {"a": 3, "b": 0, "c": 1}
    run = {"b": 3.0, "a": 2.0, "c": 1.0}
    gains = [0, 7 / 16, 1 / 16]  # (2^grade - 1) / 2^4
    err = sum(gains[i] / (i + 1) * math.prod(1 - gain for gain in gains[:i]) for i in range(3))
    for query, other in (("1", "2"), ("PLAIN-1", "PLAIN-2"), ("a-1", "b-1"), ("what is it", "who"), ("é", "一")):
        names = {d: f"{query} {d}" for d in grades}  # white space, too
        qrels = {query: {names[d]: grade for d, grade in grades.items()}, other: {"x": 1}}
        figures = metrics.retrieval_metrics({query: {names[d]: run[d] for d in run}}, qrels, ["ERR@10", "RR"])
        assert figures == pytest.approx({"ERR@10": err / 2, "RR": 0.25}, abs=1e-5)


def test_a_measure_that_fails_on_this_run_takes_no_other_with_it():
    qrels = {"q": {"a": 1, "b": 1, "c": 0}}
    run = {"q": {"a": 3.0, "b": 2.0, "c": 1.0}}
    message = r"'Accuracy@2' cannot be computed on this data \(float division by zero\).*Success@k"
    with pytest.warns(UserWarning, match=message):
        assert metrics.retrieval_metrics(run, qrels, ["Accuracy@2", "RR", "Accuracy@3"]) == {"RR": 1, "Accuracy@3": 1}
    with pytest.raises(ValueError, match=message):
        metrics.retrieval_metrics(run, qrels, ["Accuracy@2"])


def test_a_wrong_run(tmp_path):
    with pytest.raises(ValueError, match="no query of the run is judged"):
        metrics.retrieval_metrics({"1": {"a": 1.0}}, {"q1": {"a": 1}})
    with pytest.raises(ValueError, match="qrels are empty"):
        metrics.retrieval_metrics({"1": {"a": 1.0}}, {})
    with pytest.raises(ValueError, match="expected a list of names"):
        metrics.retrieval_metrics({"1": {"a": 1.0}}, {"1": {"a": 1}}, "nDCG@10")
    with pytest.raises(ValueError, match="'a b' cannot stand in a TREC run"):
        metrics.write_trec_run(tmp_path / "a.run", {"q": {"a b": 1.0}})
    with pytest.raises(ValueError, match="document 'b' for query 'q' is NaN"):
        metrics.write_trec_run(tmp_path / "a.run", {"q": {"a": 2.0, "b": math.nan, "c": 3.0}})
    with pytest.raises(ValueError, match="document 'b' for query 'q' is NaN"):
        metrics.retrieval_metrics({"q": {"a": 2.0, "b": math.nan, "c": 3.0}}, {"q": {"c": 1}})
    assert metrics.retrieval_metrics({"q": {"a": -math.inf, "c": math.inf}}, {"q": {"c": 1}}, ["RR"]) == {"RR": 1}
    assert not (tmp_path / "a.run").exists()
    assert metrics.retrieval_metrics({}, {"q": {"a": 1}}) == {"nDCG@10": 0, "R@100": 0, "RR@10": 0}


# ---- embed


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_tokens", [1, 100, 10**6])
def test_embed_restores_the_order_within_the_token_budget(side, batch_tokens, monkeypatch):
    monkeypatch.setattr("inbatch.retrieval.embed.WINDOW", 64)  # several windows
    model, texts = LetterEncoder(padding_side=side), ["", *some_texts(150, 0)]
    found = embed(model, texts, EmbedOptions(prefix="ab", max_length=30, batch_tokens=batch_tokens))
    seen, model.seen = model.seen, []
    assert torch.allclose(found, one_by_one(model, texts, "ab", 30), atol=1e-6)
    assert all(rows * width <= batch_tokens or rows == 1 for rows, width in seen)
    assert sum(rows for rows, _ in seen) == 151
    if batch_tokens == 100:
        padded = sum(rows * width for rows, width in seen)
        assert padded < 1.2 * sum(min(30, len(text) + 2) for text in texts)
    some = embed(model, texts, EmbedOptions(prefix="ab", max_length=30), rows=range(70, 90))
    assert torch.allclose(some, found[70:90], atol=1e-6)


def test_embed_leaves_the_model_as_it_was():
    model = LetterEncoder().train()
    model.frozen.eval()
    state = torch.get_rng_state()
    first = embed(model, some_texts(20, 0))
    assert torch.equal(first, embed(model, some_texts(20, 0)))  # no dropout
    assert torch.equal(state, torch.get_rng_state())
    assert [model.training, model.dropout.training, model.frozen.training] == [True, True, False]
    assert not first.requires_grad
    with pytest.raises(ZeroDivisionError):
        embed(model, [Trap()])  # type: ignore[list-item]
    assert [model.training, model.dropout.training, model.frozen.training] == [True, True, False]
    (first[:, 0] * model.letters.weight[0, 0]).sum().backward()  # an inference tensor could not be used so


class Trap:
    def __radd__(self, _):
        raise ZeroDivisionError


def test_embed_options():
    model, texts = LetterEncoder(), some_texts(20, 0)
    assert embed(model, []).shape == (0, 16)
    assert embed(model, texts, EmbedOptions(dtype=torch.bfloat16)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="batch_tokens is 0"):
        EmbedOptions(batch_tokens=0)
    with pytest.raises(ValueError, match=r"texts is one string.*pass \['abc'\]"):
        embed(model, "abc")
    with pytest.raises(ValueError, match="'fp8'; expected one of fp32, bf16"):
        EmbedOptions(precision="fp8")
    with pytest.raises(ValueError, match=r"int8; expected one of torch\.float32, torch\.float16, torch\.bfloat16"):
        EmbedOptions(dtype=torch.int8)


# ---- evaluate


def expected_run(data, similarity="cosine", k=100):
    model = LetterEncoder()
    queries = one_by_one(model, data.queries, "q").double()
    documents = one_by_one(model, data.documents).double()
    if similarity == "cosine":
        queries, documents = (nn.functional.normalize(rows, dim=1) for rows in (queries, documents))
    scores = (queries @ documents.T).float()
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return {query: {data.doc_ids[j]: float(scores[i, j]) for j in order[i]} for i, query in enumerate(data.query_ids)}


def _evaluate(rank, run_file, options):
    model = LetterEncoder().to(device()).train()
    wrapped = DistributedDataParallel(model)
    data, options = small_data(), RetrieveOptions(**options)
    figures = evaluate(wrapped, data, options, measures=["nDCG@10", "recall@20", "MRR@10"], run_file=run_file)
    return figures, retrieve(wrapped, data, options), model.training


@pytest.mark.parametrize("options", [{}, {"similarity": "dot", "query_prefix": "q", "top_k": 20}], ids=str)
def test_evaluate_is_the_same_on_any_number_of_ranks(pool, tmp_path, options):
    data = small_data()
    run = expected_run(data, options.get("similarity", "cosine"), options.get("top_k", 100))
    figures = metrics.retrieval_metrics(run, data.qrels, ["nDCG@10", "recall@20", "MRR@10"])
    assert 0.1 < figures["nDCG@10"] < 0.99
    for world_size in (1, 2, 3):
        path = tmp_path / "new folder" / f"{world_size}.run"
        for found, found_run, training in pool.run(_evaluate, world_size, path, options):
            assert found == pytest.approx(figures, abs=1e-12)
            assert training
            assert {query: list(documents) for query, documents in found_run.items()} == {
                query: list(documents) for query, documents in run.items()
            }
            for query in run:
                assert found_run[query] == pytest.approx(run[query], abs=1e-6)
        lines = path.read_text().splitlines()
        assert [line.split()[2] for line in lines] == [document for documents in run.values() for document in documents]


def test_evaluate_needs_no_process_group_and_keeps_half_precision():
    options = RetrieveOptions(embedding=EmbedOptions(dtype=torch.float16))
    figures = evaluate(LetterEncoder(), small_data(), options)
    assert figures == pytest.approx(evaluate(LetterEncoder(), small_data()), abs=0.02)
    assert list(figures) == ["nDCG@10", "R@100", "RR@10"]


def test_more_ranks_than_queries_and_documents(pool, tmp_path):
    for figures, run, _ in pool.run(_evaluate_tiny, 3):
        assert figures == {"nDCG@10": 1.0, "R@100": 1.0, "RR@10": 1.0}
        assert list(run) == ["q"]


def _evaluate_tiny(rank):
    data = RetrievalData(
        query_ids=["q"], queries=["ab"], doc_ids=["x", "y"], documents=["zz", "ab"], qrels={"q": {"y": 1}}
    )
    model = LetterEncoder().to(device())
    return evaluate(model, data, RetrieveOptions(similarity="dot")), retrieve(model, data), None


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"measures": ["nDGC@10"]}, "did you mean nDCG@10"),
        ({}, {"measures": ["R@1000"]}, "R@1000 looks at more documents than top_k=100"),
        ({}, {"top_k": 0, "measures": ["AP"]}, "top_k is 0; expected at least 1"),
        ({"query_ids": ["a b", *"cdefghijkl"]}, {"run_file": "never.run"}, "'a b' cannot stand in a TREC run"),
        ({}, {"similarity": "l2"}, "'l2'; expected one of cosine, dot"),
        ({}, {"embedding": EmbedOptions(prefix="ab")}, "embedding has the prefix 'ab', which .* give query_prefix"),
        ({"documents": [], "doc_ids": []}, {}, "no documents to evaluate with"),
        ({"queries": [], "query_ids": []}, {}, "no queries to evaluate with"),
        ({"documents": ["x"]}, {}, "1 documents but 60 ids"),
        ({"doc_ids": ["d0"] * 60}, {}, "59 of 60 documents have the id of another"),
        ({"qrels": {"q1": {"doc7": 1}}}, {}, "name no document of this data: they have document ids such as 'doc7'"),
        ({"qrels": {"Q1": {"d7": 1}}}, {}, "name no query of this data"),
        ({"qrels": {"q1": {"d7": 0, "d8": -1}}}, {}, "no score of the qrels is above 0, so nothing is relevant"),
    ],
)
def test_misuse_of_evaluate(change, options, message):
    data = RetrievalData(**(vars(small_data()) | change))
    where = {name: options.pop(name) for name in ("measures", "run_file") if name in options}
    with pytest.raises(ValueError, match=message):
        evaluate(LetterEncoder(), data, RetrieveOptions(**options), **where)


def test_a_measure_that_this_data_cannot_have_is_known_before_anything_is_embedded():
    model, data = LetterEncoder(), small_data()
    with pytest.raises(ValueError, match=r"'Accuracy@1' cannot be computed on this data .*Success@k"):
        evaluate(model, data, measures=["nDCG@10", "Accuracy@1"])
    data.qrels["q0"]["d0"] = 5  # above what ERR's program takes
    with pytest.raises(ValueError, match="'ERR@10' cannot be computed on this data"):
        evaluate(model, data, measures=["nDCG@10", "ERR@10"])
    assert not model.seen
    with pytest.warns(UserWarning, match="accuracy@1 is measured as Success@1, as sentence-transformers means it"):
        figures = evaluate(model, small_data(), measures=["accuracy@1", "Success@1"])
    assert figures["accuracy@1"] == figures["Success@1"] > 0


def test_training_knows_it_before_it_starts():
    from inbatch.train.config import EvalConfig  # here, as below
    from inbatch.train.setup import open_evaluation

    folder = str(REPOSITORY / "examples" / "pystdlib")
    with pytest.raises(ValueError, match="'Accuracy@1' cannot be computed on this data"):
        open_evaluation(EvalConfig(data=folder, measures=["nDCG@10", "Accuracy@1"]))
    assert open_evaluation(EvalConfig(data=folder, measures=["nDCG@10", "ERR@20"])) is not None


def arguments_data() -> RetrievalData:
    """As ArguAna: each query is a document of the corpus under the same id, and another document is relevant."""
    texts = some_texts(30, 2)
    ids = [f"test-{topic}-{side}" for topic in range(15) for side in ("pro", "con")]
    return RetrievalData(
        query_ids=ids[::2],
        queries=texts[::2],
        doc_ids=ids,
        documents=texts,
        qrels={ids[i]: {ids[i + 1]: 1} for i in range(0, 30, 2)},
    )


def _evaluate_arguments(rank, options):
    model = LetterEncoder().to(device())
    with pytest.warns(UserWarning, match="left out") if not options and rank == 0 else nullcontext() as caught:
        figures = evaluate(model, arguments_data(), RetrieveOptions(query_prefix="", **options))
    return figures, [str(warning.message) for warning in caught or []]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("identical", [True, False])
def test_a_folder_as_mteb_publishes_it_has_beir_s_figures(tmp_path, kind, identical):
    """Graded scores as 1.0 and a judged document that is in no corpus; `identical`: ArguAna, else queries of their own.

    BEIR gives pytrec_eval the best documents of each query without the one that has the query's id.
    """
    texts = some_texts(40, 5)
    corpus = [{"_id": f"d{n}", "title": f"T{n}" if n % 3 else "", "text": text} for n, text in enumerate(texts)]
    queries = [
        {"_id": f"d{n}" if identical else f"q{n}", "text": f"{corpus[n]['title']} {texts[n]}".strip()}
        for n in range(0, 40, 4)
    ]
    judged = {q["_id"]: {f"d{n + 1}": 2, f"d{(n + 7) % 40}": 1} for n, q in zip(range(0, 40, 4), queries, strict=True)}
    judged[queries[0]["_id"]]["gone"] = 1
    rows = [
        {"query-id": query_id, "corpus-id": doc_id, "score": float(score)}
        for query_id, of_query in judged.items()
        for doc_id, score in of_query.items()
    ]
    for name, table in (("corpus", corpus), ("queries", queries), ("qrels/test", rows)):
        if kind == "jsonl":
            write_jsonl(tmp_path / f"{name}.jsonl", table)
        else:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            pq.write_table(pa.Table.from_pylist(table), tmp_path / f"{name}.parquet")
    model = LetterEncoder()
    with pytest.warns(UserWarning, match=r"1 of 21 judged documents are not in|have the id of a document"):
        figures = evaluate(model, load_retrieval(tmp_path), measures=["nDCG@10", "R@10", "RR@10", "AP@10"])
    documents = nn.functional.normalize(
        one_by_one(model, [f"{d['title']} {d['text']}".strip() for d in corpus]).double(), dim=1
    )
    asked = nn.functional.normalize(one_by_one(model, ["q" + q["text"] for q in queries]).double(), dim=1)
    scores = asked @ documents.T
    run = {
        q["_id"]: {d["_id"]: float(x) for d, x in zip(corpus, row, strict=True) if d["_id"] != q["_id"]}
        for q, row in zip(queries, scores, strict=True)
    }
    names = {"nDCG@10": "ndcg_cut_10", "R@10": "recall_10", "AP@10": "map_cut_10"}
    theirs = pytrec_eval.RelevanceEvaluator(judged, set(names.values())).evaluate(run)
    for name, known_as in names.items():
        assert figures[name] == pytest.approx(sum(found[known_as] for found in theirs.values()) / len(judged), abs=1e-9)
    assert 0 < figures["nDCG@10"] < 1


def test_where_each_query_is_the_nearest_to_itself_beir_says_one(tmp_path):
    texts = ["aaaa", "aaab", "cccc", "cccd"]
    write_jsonl(tmp_path / "corpus.jsonl", [{"_id": f"{n}", "title": "", "text": t} for n, t in enumerate(texts)])
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "0", "text": texts[0]}, {"_id": "2", "text": texts[2]}])
    rows = [{"query-id": str(n), "corpus-id": str(n + 1), "score": 1.0} for n in (0, 2)]
    write_jsonl(tmp_path / "qrels" / "test.jsonl", rows)
    model, data = LetterEncoder(), load_retrieval(tmp_path)
    with pytest.warns(UserWarning, match="2 of 2 queries have the id of a document, which is left out"):
        assert evaluate(model, data, RetrieveOptions(query_prefix=""))["nDCG@10"] == 1.0
    kept = evaluate(model, data, RetrieveOptions(query_prefix="", keep_identical_ids=True))
    assert kept["nDCG@10"] == pytest.approx(1 / math.log2(3))  # 0.63


@pytest.mark.parametrize("world_size", [1, 3])
def test_queries_do_not_find_themselves_as_in_beir(pool, world_size):
    data, model = arguments_data(), LetterEncoder()
    vectors = nn.functional.normalize(one_by_one(model, data.documents).double(), dim=1)
    figures = {}
    for keep in (False, True):
        places = []
        for query, (relevant,) in zip(range(0, 30, 2), data.qrels.values(), strict=True):
            scores = {data.doc_ids[j]: float(vectors[query] @ vectors[j]) for j in range(30)}
            if not keep:  # BEIR: results[query_id].pop(query_id)
                del scores[data.query_ids[query // 2]]
            places.append(sorted(scores, key=lambda name: -scores[name]).index(relevant))
        figures[keep] = {
            "nDCG@10": sum(1 / math.log2(place + 2) for place in places if place < 10) / 15,
            "R@100": 1.0,
            "RR@10": sum(1 / (place + 1) for place in places if place < 10) / 15,
        }
    assert figures[False]["nDCG@10"] > figures[True]["nDCG@10"] + 0.01
    for keep in (False, True):
        options = {"keep_identical_ids": True} if keep else {}
        for rank, (found, warned) in enumerate(pool.run(_evaluate_arguments, world_size, options)):
            assert found == pytest.approx(figures[keep], abs=1e-9)
            expected = (
                "15 of 15 queries have the id of a document, which is left out of their results, as in BEIR and MTEB"
            )
            assert len(warned) == (not keep and rank == 0)
            assert all(message.startswith(f"{expected}; keep_identical_ids") for message in warned)


def test_the_similarity_of_the_model_is_used_unless_another_is_given():
    model, data = LetterEncoder(), small_data()
    cosine, dot = (evaluate(model, data, RetrieveOptions(similarity=name)) for name in ("cosine", "dot"))
    assert cosine != dot
    assert evaluate(model, data) == cosine
    model.similarity = "dot"
    assert evaluate(model, data) == dot
    model.similarity = "euclidean"
    with pytest.raises(ValueError, match="saved with similarity 'euclidean'; expected one of cosine, dot"):
        evaluate(model, data)


def test_a_run_file_that_cannot_be_written_is_known_before_anything_is_embedded(tmp_path):
    model = LetterEncoder()
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "a.run"):
        with pytest.raises(ValueError, match=f"{path} cannot be written"):
            evaluate(model, small_data(), run_file=path)
    assert not model.seen
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_the_figures_are_known_where_the_run_finds_no_room(tmp_path):
    figures = []
    with no_file_above(1000), pytest.raises(OSError, match="File too large"):
        evaluate(LetterEncoder(), small_data(), run_file=tmp_path / "a.run", report=figures.append)
    assert figures == [evaluate(LetterEncoder(), small_data())]
    assert not list(tmp_path.iterdir())


def _evaluate_with_trouble(rank, trouble):
    model = LetterEncoder(dimension=8 if trouble == "size" and rank == 1 else 16).to(device())
    if trouble == "nan":
        model.letters.weight.data[ord("a")] = torch.nan
    data = small_data()
    if trouble == "text" and rank == 1:
        data.documents[-1] = None  # type: ignore[index]
    try:
        evaluate(model, data)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize(
    ("trouble", "messages"),
    [
        ("size", ["rank 0 has (rows, 16) float32, rank 1 has (rows, 8) float32"] * 2),
        ("nan", ["hold NaN or infinity"] * 2),
        ("text", ["OtherRankError: rank 1: TypeError: can only", "TypeError: can only concatenate str"]),
    ],
)
def test_trouble_on_one_rank_ends_all(pool, trouble, messages):
    for found, message in zip(pool.run(_evaluate_with_trouble, 2, trouble), messages, strict=True):
        assert message in found


# ---- files


def _encode(rank, source, output, options):
    return encode_to_file(LetterEncoder().to(device()), source, output, EmbedOptions(**options))


@pytest.mark.parametrize("world_size", [1, 3])
def test_encode_to_file(pool, tmp_path, world_size):
    texts = some_texts(50, 0)
    (tmp_path / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": f"d{i}", "title": "", "text": text}) + "\n" for i, text in enumerate(texts))
    )
    (tmp_path / "texts.txt").write_text("\n\n".join(texts))
    expected = one_by_one(LetterEncoder(), texts, "ab")
    for source, dtype in (
        (tmp_path, "float32"),
        (tmp_path / "corpus.jsonl", "bfloat16"),
        (tmp_path / "texts.txt", "float16"),
    ):
        for kind in ("npy", "safetensors"):
            if (kind, dtype) == ("npy", "bfloat16"):
                continue
            output = tmp_path / "out" / f"{Path(source).name}-{dtype}.{kind}"
            shapes = pool.run(_encode, world_size, source, output, {"prefix": "ab", "dtype": getattr(torch, dtype)})
            assert shapes == [(50, 16)] * world_size
            found = torch.from_numpy(np.load(output)) if kind == "npy" else load_file(output)["embeddings"]
            assert found.dtype == getattr(torch, dtype)
            tolerance = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2}[dtype]
            assert torch.allclose(found.float(), expected, atol=tolerance, rtol=tolerance)
            ids = output.with_name(f"{output.name}.ids.txt")
            assert ids.exists() == (source != tmp_path / "texts.txt")
            if ids.exists():
                assert ids.read_text().split() == [f"d{i}" for i in range(50)]
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize(
    ("source", "output", "options", "message"),
    [
        ("missing.txt", "a.npy", {}, "missing.txt does not exist"),
        ("empty.txt", "a.npy", {}, "empty.txt is empty"),
        ("empty", "a.npy", {}, "holds no data: expected"),
        ("texts.txt", "a.csv", {}, "expected a name ending in .npy or .safetensors"),
        ("texts.txt", "a.npy", {"dtype": torch.bfloat16}, ".npy files cannot hold torch.bfloat16"),
        ("texts.tsv", "a.npy", {}, r"texts.tsv: no cell of the first line names a known column"),
        ("texts.CSV.gz", "a.npy", {}, "texts.CSV.gz is not a whole gzip file"),
        ("texts.parquet", "a.npy", {}, "texts.parquet is not a Parquet file"),
        ("bad.jsonl", "a.npy", {}, "line 2"),
        ("latin.txt", "a.npy", {}, r"latin\.txt, line 3 is not UTF-8 .*byte 0xe9"),
    ],
)
def test_misuse_of_encode_to_file(tmp_path, source, output, options, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").touch()
    for name in ("texts.txt", "texts.tsv", "texts.CSV.gz", "texts.parquet"):
        (tmp_path / name).write_text("a\n")
    (tmp_path / "latin.txt").write_text("a\n\ncaf\xe9\n", encoding="latin-1")
    (tmp_path / "bad.jsonl").write_text('{"_id": 1, "text": "a"}\n{"_id":\n')
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        encode_to_file(LetterEncoder(), tmp_path / source, tmp_path / output, EmbedOptions(**options))
    assert sorted(tmp_path.iterdir()) == before


def test_a_failed_or_another_encoding_leaves_no_ids_beside_embeddings_that_are_not_theirs(tmp_path):
    records = [
        json.dumps({"_id": name, "text": text}) + "\n" for name, text in (("d0", "bc"), ("d1", "cb"), ("d2", "a"))
    ]
    for name, lines in (
        ("good", records[:2]),
        ("nan", records),
        ("bad_id", [*records[:2], '{"_id": "x\\ny", "text": "b"}']),
    ):
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "texts.txt").write_text("b\nc\n")
    model, output, ids = LetterEncoder(), tmp_path / "out" / "e.npy", tmp_path / "out" / "e.npy.ids.txt"
    model.letters.weight.data[ord("a")] = torch.nan
    encode_to_file(model, tmp_path / "good.jsonl", output)
    before = output.read_bytes(), ids.read_bytes()
    for source, message in (
        ("bad_id.jsonl", r"'x\\ny' does not fit on a line"),
        ("nan.jsonl", r"nan\.jsonl: the embedding of text 3 holds NaN or infinity as torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            encode_to_file(model, tmp_path / source, output)
        assert (output.read_bytes(), ids.read_bytes()) == before
        assert sorted(output.parent.iterdir()) == [output, ids]
    (tmp_path / "out" / ".e.npy.ids.txt.partial").write_text("what a killed run left\n")
    encode_to_file(model, tmp_path / "texts.txt", output)
    assert list(output.parent.iterdir()) == [output]
    (tmp_path / "out.npy").mkdir()
    with pytest.raises(ValueError, match=r"out\.npy cannot be written, since it is not a file"):
        encode_to_file(model, tmp_path / "texts.txt", tmp_path / "out.npy")


def test_what_another_run_writes_is_left_alone(tmp_path):
    (tmp_path / "texts.txt").write_text("b\n")
    with claimed(tmp_path / "e.npy") as file:
        file.write(b"another run's")
        file.flush()
        before = sorted(tmp_path.iterdir())
        with pytest.raises(ValueError, match=r"e\.npy is being written by another run"):
            encode_to_file(LetterEncoder(), tmp_path / "texts.txt", tmp_path / "e.npy")
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / ".e.npy.partial").read_bytes() == b"another run's"


def test_an_encoding_for_which_there_is_no_room_leaves_nothing(tmp_path):
    (tmp_path / "texts.txt").write_text("b\n" * 500)
    with no_file_above(4096), pytest.raises(OSError, match="File too large"):
        encode_to_file(LetterEncoder(), tmp_path / "texts.txt", tmp_path / "e.npy")
    assert list(tmp_path.iterdir()) == [tmp_path / "texts.txt"]


# ---- a real encoder on real data


def test_a_real_encoder_on_a_slice_of_real_data(tmp_path):
    whole = load_retrieval(REPOSITORY / "examples" / "pystdlib", "test")
    query_ids = whole.query_ids[:25]
    wanted = {document for query in query_ids for document in whole.qrels[query]}
    rows = [i for i, document in enumerate(whole.doc_ids) if document in wanted or i % 40 == 0]
    data = RetrievalData(
        query_ids=query_ids,
        queries=whole.queries[:25],
        doc_ids=[whole.doc_ids[i] for i in rows],
        documents=[whole.documents[i] for i in rows],
        qrels={query: whole.qrels[query] for query in query_ids},
    )
    from inbatch.encoder.model import (
        BiEncoderModel,  # here, since the pool's workers import this module without need of it
    )
    from tests.tiny_models import minilm

    model = BiEncoderModel.from_pretrained(minilm())
    figures = evaluate(model, data, RetrieveOptions(query_max_len=32, passage_max_len=48), run_file=tmp_path / "a.run")
    model.eval()
    with torch.no_grad():
        queries, documents = (
            torch.cat([model.encode(model.tokenize([text], max_length=length)) for text in texts]).double()
            for texts, length in ((data.queries, 32), (data.documents, 48))
        )
    ranks = (queries @ documents.T).argsort(dim=1, descending=True)
    ndcg = reciprocal = 0.0
    for i, query in enumerate(query_ids):
        ranking = [data.doc_ids[j] for j in ranks[i]]
        places = sorted(ranking.index(document) for document in data.qrels[query])
        ideal = sum(1 / math.log2(place + 2) for place in range(min(10, len(places))))
        ndcg += sum(1 / math.log2(place + 2) for place in places if place < 10) / ideal
        reciprocal += (places[0] < 10) / (places[0] + 1)
    assert figures["nDCG@10"] == pytest.approx(ndcg / 25, abs=1e-9)
    assert figures["RR@10"] == pytest.approx(reciprocal / 25, abs=1e-9)
    assert 0.4 < figures["nDCG@10"] < 1
