"""Packed encoding gives what padded encoding gives: embeddings and gradients, every backbone and pooling."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING, AutoModel

from inbatch import BiEncoderModel
from inbatch.encoder import packing
from inbatch.encoder.packing import IMPLEMENTATION, PACKABLE, wish
from inbatch.encoder.pooling import POOLINGS
from tests.helpers import device
from tests.tiny_models import CONFIGS, TEXTS, gradients, save_all, save_tiny, tiny_tokenizer

# Runs of equally long texts, texts of one length apart, and one longer than every window.
MORE_TEXTS = [*TEXTS, "cat", "red", "the dog", "a mat", "who ran fast and sat on the mat of a slow blue dog"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return save_all(tmp_path_factory.mktemp("models"))


def both(folder: Path, **options) -> tuple[BiEncoderModel, BiEncoderModel]:
    padded = BiEncoderModel.from_pretrained(folder, **options).to(device())
    return padded, BiEncoderModel.from_pretrained(folder, packed=True, **options).to(device())


def tokens(model: BiEncoderModel, texts: list[str]) -> dict[str, torch.Tensor]:
    return {key: value.to(device()) for key, value in model.tokenize(texts).items()}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", [*CONFIGS, "minilm", "llama-causal", "qwen3-causal", "ministral3-causal"])
def test_packed_equals_padded(folders, kind, side):
    kind, _, causal = kind.partition("-")
    padded, packed = both(folders[kind], bidirectional=False if causal else None)
    padded.tokenizer.padding_side = side
    batch = tokens(padded, MORE_TEXTS)
    seen = []
    handle = packed.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    for pooling in POOLINGS:
        padded.pooling = packed.pooling = pooling
        torch.testing.assert_close(packed(batch), padded(batch), rtol=0, atol=1e-5)
    assert set(seen) == {(1, int(batch["attention_mask"].sum()))}
    handle.remove()
    expected, actual = gradients(padded, batch), gradients(packed, batch)
    assert actual.keys() == expected.keys()
    for name in expected:
        scale = expected[name].abs().max().clamp(min=1)
        torch.testing.assert_close(actual[name] / scale, expected[name] / scale, rtol=0, atol=1e-5)


class Waits(TorchDispatchMode):
    """Notes what would make the CPU wait for a GPU: operations whose result, or whose size, the CPU reads."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        by_mask = func is aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if by_mask or func in (aten._local_scalar_dense.default, aten.nonzero.default):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [*CONFIGS, "minilm", "llama-causal", "qwen3-causal", "ministral3-causal"])
def test_from_host_memory_no_pass_waits_for_the_device(folders, kind):
    kind, _, causal = kind.partition("-")
    _, packed = both(folders[kind], bidirectional=False if causal else None)
    batch = tokens(packed, MORE_TEXTS)  # by a tokenizer, on the host
    with Waits() as waits:
        expected_BD = packed(batch)
    assert waits.seen == ["aten.nonzero.default"]
    ready = packed.to_device(packed.tokenize(MORE_TEXTS))
    with Waits() as waits:
        embeddings_BD = packed(ready)
        embeddings_BD.sum().backward()
    assert waits.seen == []
    assert torch.equal(embeddings_BD, expected_BD)
    if device().type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            packed(ready).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_every_packable_backbone_is_tested():
    assert set(PACKABLE) == set(CONFIGS)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_text_does_not_see_its_neighbours(folders, kind):
    model = BiEncoderModel.from_pretrained(folders[kind], packed=True).to(device())
    with torch.no_grad():
        alone_BD = torch.cat([model(tokens(model, [text])) for text in MORE_TEXTS])
        torch.testing.assert_close(model(tokens(model, MORE_TEXTS)), alone_BD, rtol=0, atol=1e-5)


def test_sliding_layers_of_a_mixed_backbone(tmp_path):
    sliding = {"use_sliding_window": True, "sliding_window": 3, "layer_types": ["full_attention", "sliding_attention"]}
    save_tiny("qwen3", tmp_path, **sliding)
    for bidirectional in (True, False):
        padded, packed = both(tmp_path, bidirectional=bidirectional)
        batch = tokens(padded, MORE_TEXTS)
        with torch.no_grad():
            expected_BD = padded(batch)
            torch.testing.assert_close(packed(batch), expected_BD, rtol=0, atol=1e-5)
            padded.backbone.config.sliding_window = 99
            assert (padded(batch) - expected_BD).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_empty_batches_and_texts(tmp_path, kind):
    save_tiny(kind, tmp_path, tokenizer=tiny_tokenizer(ends=False))
    padded, packed = both(tmp_path)
    for texts in ([], [""], ["", ""], ["", "cat", "", "the dog"]):
        batch = tokens(padded, texts)
        torch.testing.assert_close(packed(batch), padded(batch), rtol=0, atol=1e-5)
    assert gradients(packed, tokens(packed, [])).keys() == gradients(padded, batch).keys()


@pytest.mark.parametrize("kind", ["llama", "ministral3", "modernbert"])
def test_no_mask_over_all_tokens_is_made(folders, kind, monkeypatch):
    model = BiEncoderModel.from_pretrained(folders[kind], packed=True)
    monkeypatch.setattr(packing, "sdpa_mask", lambda *_, **__: pytest.fail("a mask was made"))
    model(model.tokenize(MORE_TEXTS))


def test_with_gradient_checkpointing(folders):
    padded, packed = both(folders["ministral3"])
    packed.train().gradient_checkpointing_enable()
    batch = tokens(padded, MORE_TEXTS)
    expected, actual = gradients(padded, batch), gradients(packed, batch)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-4)


def test_attention_dropout_is_applied_and_replays(tmp_path):
    save_tiny("bert", tmp_path, attention_probs_dropout_prob=0.5)
    model = BiEncoderModel.from_pretrained(tmp_path, packed=True).to(device())
    batch = tokens(model, MORE_TEXTS)
    for half in (False, True):
        with torch.no_grad(), torch.autocast(device().type, torch.bfloat16, enabled=half):
            quiet_BD = model.eval()(batch)
            model.train()
            torch.manual_seed(1)
            first_BD = model(batch)
            torch.manual_seed(1)
            assert torch.equal(model(batch), first_BD)
            assert (first_BD - quiet_BD).abs().max() > 0.1


def spy(monkeypatch) -> list[tuple[str, torch.dtype]]:
    """The attention functions called from here on, with the dtype of their queries."""
    calls = []
    for name in ("_flash", "_efficient", "_repadded"):
        run = getattr(packing, name)
        note = partial(
            lambda name, run, query, *rest: calls.append((name, query.dtype)) or run(query, *rest), name, run
        )
        monkeypatch.setattr(packing, name, note)
    return calls


@pytest.mark.parametrize("kind", [*CONFIGS, "minilm", "llama-causal", "ministral3-causal"])
def test_half_precision_is_as_close_to_float32_as_padded_half_precision(folders, kind, monkeypatch):
    kind, _, causal = kind.partition("-")
    padded, packed = both(folders[kind], bidirectional=False if causal else None)
    batch = tokens(padded, MORE_TEXTS)
    calls = spy(monkeypatch)
    exact = gradients(padded, batch)
    with torch.no_grad():
        exact_BD = padded(batch)
    on_gpu = device().type == "cuda"
    embedding_errors, gradient_errors, kernels = [], [], []
    # On CUDA this is the test of both kernels: FlashAttention's, and that for short texts.
    for model, short in ((padded, 64), (packed, 64), *([(packed, 0)] if on_gpu else [])):
        monkeypatch.setattr(packing, "SHORT", short)
        calls.clear()
        with torch.autocast(device().type, torch.bfloat16):
            with torch.no_grad():
                embedding_errors.append(float((model(batch) - exact_BD).norm() / exact_BD.norm()))
            actual = gradients(model, batch)
        off = sum((actual[name] - exact[name]).square().sum() for name in exact)
        gradient_errors.append(float((off / sum(value.square().sum() for value in exact.values())).sqrt()))
        assert {dtype for _, dtype in calls} <= {torch.bfloat16}
        kernels.append({name for name, _ in calls})
    assert kernels[0] == set()
    # Layers with a window keep FlashAttention.
    assert ("_efficient" in kernels[1] or kind == "ministral3") if on_gpu else kernels[1] == {"_repadded"}
    assert kernels[2:] == [{"_flash"}] * on_gpu
    assert max(embedding_errors[1:]) <= 2 * embedding_errors[0]
    assert max(gradient_errors[1:]) <= 2 * gradient_errors[0]


def test_a_packed_model_encodes_padded_batches_too_and_saves_a_plain_folder(folders, tmp_path):
    padded, packed = both(folders["llama"], bidirectional=False)
    batch = tokens(padded, MORE_TEXTS)
    packed.packed = False
    torch.testing.assert_close(packed(batch), padded(batch), rtol=0, atol=1e-5)
    torch.testing.assert_close(packed(tokens(packed, ["a mat"])), padded(tokens(padded, ["a mat"])), rtol=0, atol=1e-5)
    packed.save_pretrained(tmp_path)
    assert IMPLEMENTATION not in (tmp_path / "config.json").read_text()


def test_what_cannot_be_packed(folders, tmp_path):
    with pytest.raises(ValueError, match="brings its own attention: leave out attn_implementation='sdpa'"):
        BiEncoderModel.from_pretrained(folders["llama"], packed=True, attn_implementation="sdpa")
    sizes = {"vocab_size": 24, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    grouped = {"num_key_value_heads": 2}
    for kind, extra, message in (
        ("mistral", grouped, None),
        ("distilbert", {}, None),
        ("mpnet", {}, "does not let its attention be replaced"),
        ("roformer", {}, "takes no position_ids"),
        ("lfm2", {**grouped, "layer_types": ["conv", "full_attention"]}, "mixes the tokens of different texts"),
        ("gemma2", grouped, "cannot be packed .packed attention has no softcap"),
    ):
        AutoModel.from_config(CONFIG_MAPPING[kind](**sizes, **extra)).save_pretrained(tmp_path / kind)
        tiny_tokenizer().save_pretrained(tmp_path / kind)
        bidirectional = False if kind == "lfm2" else None
        if message is None:
            padded, packed = both(tmp_path / kind)
            batch = tokens(padded, MORE_TEXTS)
            torch.testing.assert_close(packed(batch), padded(batch), rtol=0, atol=1e-5)
        else:
            with pytest.raises(ValueError, match=message):
                BiEncoderModel.from_pretrained(tmp_path / kind, packed=True, bidirectional=bidirectional)
            model, plain = (
                BiEncoderModel.from_pretrained(tmp_path / kind, packed=packed, bidirectional=bidirectional)
                for packed in (None, False)
            )
            assert not model.packed
            assert re.search(message, model.way)
            batch = tokens(plain, MORE_TEXTS)
            torch.testing.assert_close(model(batch), plain(batch), rtol=0, atol=0)


def test_packed_where_it_can_be(folders):
    assert [wish(None, torch.device(kind)) for kind in ("cpu", "cuda")] == [False, None]
    assert [wish(packed, torch.device("cuda")) for packed in (True, False)] == [True, False]
    assert wish(True, torch.device("cpu")) is True
    model = BiEncoderModel.from_pretrained(folders["minilm"], packed=None)
    assert (model.packed, model.way) == (True, "texts are encoded packed, without padding")
    model = BiEncoderModel.from_pretrained(folders["minilm"], packed=None, attn_implementation="sdpa")
    assert (model.packed, model.padded_because) == (False, "attn_implementation='sdpa' was given")
