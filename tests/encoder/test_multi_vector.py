"""Several vectors a text: the scores of sentence-transformers and PyLate, packed as padded, saved and opened again.

Shapes: B texts, T token positions, D dimension.
"""

import json
import os
import subprocess
import warnings
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from inbatch import BiEncoderModel
from inbatch.retrieval.embed import EmbedOptions, embed
from tests.tiny_models import minilm, save_tiny, tiny_tokenizer

# Of words that the vocabulary has: PyLate takes skip words that it lacks for the unknown token.
QUERIES = ["what is a red dog", "where is the cat and who sat on the mat of the slow dog"]
DOCUMENTS = ["a red dog of the cat", "", "the slow cat sat on the mat and ran fast " * 3]
SETTINGS = {
    "expanded": {},
    "attended": {"attend_to_expansion": True, "dim": 16},
    "short": {"query_expansion": False, "skip_words": ["the", "of"]},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    tokenizer = tiny_tokenizer(mask_token="fast")
    return save_tiny("bert", tmp_path_factory.mktemp("plain") / "bert", tokenizer=tokenizer)


def opened(plain: Path, **options) -> BiEncoderModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return BiEncoderModel.from_pretrained(plain, pooling="multi_vector", multi_vector=options).eval()


def vectors(model: BiEncoderModel, texts: list[str], task: str) -> list[Tensor]:
    embedded = embed(model, texts, EmbedOptions(task=task, prefix=model.prompts.get(task, ""),
                                                max_length=getattr(model, f"{task}_length")))  # fmt: skip
    return list(embedded.vectors.split(embedded.lengths.tolist()))


def scores(queries: list[Tensor], documents: list[Tensor]) -> Tensor:
    return torch.tensor([[float((q @ d.T).amax(1).sum()) for d in documents] for q in queries])


def our_scores(model: BiEncoderModel) -> Tensor:
    return scores(vectors(model, QUERIES, "query"), vectors(model, DOCUMENTS, "document"))


def their_scores(folder: Path) -> Tensor:
    theirs = pytest.importorskip("sentence_transformers").MultiVectorEncoder(str(folder), device="cpu")
    return theirs.similarity(theirs.encode_query(QUERIES), theirs.encode_document(DOCUMENTS))


@pytest.mark.parametrize("kind", SETTINGS)
def test_sentence_transformers_and_we_open_what_we_save(plain, tmp_path, kind):
    model = opened(plain, **SETTINGS[kind])
    model.query_length, model.document_length = 12, 20
    ours = our_scores(model)
    model.save_pretrained(tmp_path)
    again = BiEncoderModel.from_pretrained(tmp_path)
    assert (again.multi_vector, again.prompts, again.query_length) == (model.multi_vector, model.prompts, 12)
    torch.testing.assert_close(our_scores(again), ours, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(their_scores(tmp_path), ours, atol=1e-5, rtol=1e-5)
    same = embed(model, DOCUMENTS, EmbedOptions(task="document", prefix=model.prompts["document"]))
    assert torch.equal(same.vectors, torch.cat(vectors(model, DOCUMENTS, "document"))), "the task has its length"
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["head.layers.0.weight"] *= -1
    model.save_pretrained(tmp_path, state_dict=state)
    weight_DH = BiEncoderModel.from_pretrained(tmp_path).head.layers[0].weight
    torch.testing.assert_close(weight_DH, state["head.layers.0.weight"])


@pytest.mark.parametrize(("attend", "pool_factor"), [(False, 1), (True, 2)])
def test_we_open_what_sentence_transformers_saves(plain, tmp_path, attend, pool_factor):
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling, MultiVectorMask

    first = Transformer(
        str(plain), document_length=9, query_expansion={"strategy": "fixed", "length": 8, "attend": attend}
    )
    layers = [
        Dense(32, 24, bias=True, activation_function=torch.nn.Identity(), module_input_name="token_embeddings"),
        Dense(24, 8, bias=False, activation_function=torch.nn.Identity(), module_input_name="token_embeddings"),
    ]
    modules = [first, *layers, MultiVectorMask(["the", "dog"]), Normalize(module_input_name="token_embeddings")]
    if pool_factor > 1:
        modules.append(HierarchicalTokenPooling(pool_factor, num_protected_tokens=0))
    theirs = MultiVectorEncoder(modules=modules, device="cpu", prompts={"query": "query ", "document": "document "})
    theirs.save_pretrained(str(tmp_path))
    ours = BiEncoderModel.from_pretrained(tmp_path)
    expected = theirs.similarity(theirs.encode_query(QUERIES), theirs.encode_document(DOCUMENTS))
    torch.testing.assert_close(our_scores(ours), expected, atol=1e-5, rtol=1e-5)
    ours.save_pretrained(tmp_path / "again")
    if pool_factor == 1:
        torch.testing.assert_close(their_scores(tmp_path / "again"), expected, atol=1e-5, rtol=1e-5)
    assert BiEncoderModel.from_pretrained(tmp_path / "again").multi_vector == ours.multi_vector


_PYLATE = """
import json, sys
from pylate import models
queries, documents, folders = json.loads(sys.argv[1])
for number, folder in enumerate(folders):
    model = models.ColBERT(folder, device="cpu")
    sides = [model.encode(texts, is_query=texts is queries, convert_to_tensor=True) for texts in (queries, documents)]
    print("scores", json.dumps([[float((q @ d.T).amax(1).sum()) for d in sides[1]] for q in sides[0]]))
    model.save(folder + "-again")
"""


@pytest.mark.skipif("PYLATE_PYTHON" not in os.environ, reason="PYLATE_PYTHON names no interpreter that has PyLate")
def test_pylate_opens_what_we_save_and_we_what_it_saves(plain, tmp_path):
    models = {kind: opened(plain, **SETTINGS[kind]) for kind in SETTINGS}
    for kind, model in models.items():
        model.query_length, model.document_length = 12, 20
        model.save_pretrained(tmp_path / kind)
    argument = json.dumps([QUERIES, DOCUMENTS, [str(tmp_path / kind) for kind in models]])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [os.environ["PYLATE_PYTHON"], "-c", _PYLATE, argument]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    theirs = [torch.tensor(json.loads(line[7:])) for line in run.stdout.splitlines() if line.startswith("scores ")]
    for (kind, model), expected in zip(models.items(), theirs, strict=True):
        torch.testing.assert_close(our_scores(model), expected, atol=1e-5, rtol=1e-5)
        again = BiEncoderModel.from_pretrained(f"{tmp_path / kind}-again")
        torch.testing.assert_close(our_scores(again), expected, atol=1e-5, rtol=1e-5)


def test_packed_vectors_and_gradients_are_the_padded_ones(plain):
    """Also where mask tokens see a text that does not see them, which is encoded with padding."""
    for kind, task in product(("expanded", "attended"), ("query", "document")):
        found = []
        for packed in (False, True):
            model = opened(plain, **SETTINGS[kind])
            if packed:
                model = BiEncoderModel.from_pretrained(
                    plain, pooling="multi_vector", multi_vector=SETTINGS[kind], packed=True
                ).eval()
            batch = model.to_device(model.tokenize([*QUERIES, *DOCUMENTS], task=task))
            assert ("token_slots" in batch) == (packed and (kind, task) != ("expanded", "query"))
            vectors_BTD = model(batch)
            assert vectors_BTD.dtype == torch.float32
            assert torch.equal(vectors_BTD.any(-1), batch["token_roles"] > 0)
            (vectors_BTD @ torch.linspace(-1, 1, model.embedding_dim)).square().sum().backward()
            found.append([vectors_BTD, *(p.grad for p in model.parameters() if p.grad is not None)])
        for padded, packed in zip(*found, strict=True):
            torch.testing.assert_close(packed, padded, atol=2e-5, rtol=1e-4)
    empty = model.tokenize([], task="query")
    assert model(empty).shape[0] == 0
    assert model(empty).requires_grad


def test_a_new_projection_is_announced_and_the_same_in_every_process(plain):
    with pytest.warns(UserWarning, match="has no projection for a vector a token: a random one to 128 numbers"):
        model = BiEncoderModel.from_pretrained(plain, pooling="multi_vector")
    assert torch.equal(model.head.layers[0].weight, opened(plain).head.layers[0].weight)
    assert (model.embedding_dim, model.query_length, model.document_length) == (128, 32, 64)
    ids_BT = model.tokenize(["cat"], task="document")["input_ids"]
    assert model.tokenizer.convert_ids_to_tokens(ids_BT[0].tolist()) == ["<s>", "[D] ", "cat", "</s>"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"multi_vector": {"dim": 8}}, "set pooling to 'multi_vector'"),
        ({"pooling": "multi_vector", "l2_normalize": False}, "always normalised"),
        ({"pooling": "multi_vector", "multi_vector": {"size": 8}}, "multi_vector has no 'size'"),
        ({"pooling": "multi_vector", "multi_vector": {"dim": 0}}, "expected an integer of at least 1"),
        (
            {"pooling": "multi_vector", "multi_vector": {"query_expansion": False, "attend_to_expansion": True}},
            "means nothing without query_expansion",
        ),
    ],
)
def test_options_that_do_not_go_together(plain, options, message):
    with pytest.raises(ValueError, match=message):
        BiEncoderModel.from_pretrained(plain, **options)


def test_folders_that_say_what_is_not_supported(plain, tmp_path):
    opened(plain).save_pretrained(tmp_path)
    for name, key, value, message in (
        ("1_Dense/config.json", "use_residual", True, "use_residual true is not supported"),
        ("1_Dense/config.json", "activation_function", "torch.nn.modules.activation.Tanh", "activation_function"),
        ("sentence_bert_config.json", "query_expansion", {"strategy": "min", "length": 8}, 'strategy "min"'),
        ("config_sentence_transformers.json", "skiplist_words", 3, "skiplist_words is 3"),
        ("config_sentence_transformers.json", "pool_factor", 0, "pool_factor is 0; expected a positive integer"),
        ("config_sentence_transformers.json", "token_pooling", 2, "token_pooling"),
    ):
        before = (tmp_path / name).read_text()
        (tmp_path / name).write_text(json.dumps({**json.loads(before), key: value}))
        with pytest.raises(ValueError, match=message):
            BiEncoderModel.from_pretrained(tmp_path)
        (tmp_path / name).write_text(before)
    for options, message in (
        ({"pooling": "mean"}, "leave pooling out"),
        ({"multi_vector": {"dim": 8}}, "was saved with"),
    ):
        with pytest.raises(ValueError, match=message):
            BiEncoderModel.from_pretrained(tmp_path, **options)
    (tmp_path / "1_Dense/model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="its projection cannot be read"):
        BiEncoderModel.from_pretrained(tmp_path)


def test_a_real_model_scores_as_in_sentence_transformers(tmp_path):
    opened(minilm()).save_pretrained(tmp_path)
    torch.testing.assert_close(
        our_scores(BiEncoderModel.from_pretrained(tmp_path)), their_scores(tmp_path), atol=1e-5, rtol=1e-5
    )
