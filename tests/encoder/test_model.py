"""BiEncoderModel: attention, padding, pooling, the empty batch, tokens, errors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import CONFIG_MAPPING, AutoModel, Gemma3TextConfig

from inbatch import BiEncoderModel
from inbatch.encoder.loading import BIDIRECTIONAL_DECODERS
from inbatch.encoder.pooling import POOLINGS, pool
from tests.tiny_models import CONFIGS, TEXTS, VOCABULARY, gradients, save_all, save_tiny, tiny_tokenizer

ENCODERS = ("bert", "roberta", "modernbert")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return save_all(tmp_path_factory.mktemp("models"))


def states(model: BiEncoderModel, ids_BT: torch.Tensor) -> torch.Tensor:
    return model.backbone(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).last_hidden_state


def repad(batch: dict, side: str, extra: int) -> dict:
    """The same texts, padded on `side` with `extra` columns more."""
    ids_BT, mask_BT = batch["input_ids"], batch["attention_mask"]
    width = ids_BT.shape[1] + extra
    new_ids_BT, new_mask_BT = ids_BT.new_full((len(ids_BT), width), 3), mask_BT.new_zeros(len(ids_BT), width)
    for row, (ids_T, mask_T) in enumerate(zip(ids_BT, mask_BT.bool(), strict=True)):
        n = int(mask_T.sum())
        columns = slice(width - n, width) if side == "left" else slice(0, n)
        new_ids_BT[row, columns], new_mask_BT[row, columns] = ids_T[mask_T], 1
    return {"input_ids": new_ids_BT, "attention_mask": new_mask_BT}


# ---- attention


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", BIDIRECTIONAL_DECODERS)
def test_a_later_token_changes_an_earlier_state_only_when_bidirectional(folders, kind, attention):
    ids_BT = torch.tensor([[0, 5, 6, 7, 8, 9], [0, 5, 6, 7, 8, 10]])
    for bidirectional in (None, True, False):
        model = BiEncoderModel.from_pretrained(
            folders[kind], bidirectional=bidirectional, attn_implementation=attention
        )
        with torch.no_grad():
            earlier_BTD = states(model, ids_BT)[:, :-1]
        moved_T = (earlier_BTD[0] - earlier_BTD[1]).abs().amax(-1)
        assert (moved_T > 1e-3).all() if bidirectional is not False else (moved_T == 0).all()


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_are_bidirectional_and_cannot_be_made_causal(folders, kind):
    model = BiEncoderModel.from_pretrained(folders[kind])
    with torch.no_grad():
        states_BTD = states(model, torch.tensor([[0, 5, 6, 2], [0, 5, 6, 7]]))
    assert (states_BTD[0, 0] - states_BTD[1, 0]).abs().max() > 1e-3
    with pytest.raises(ValueError, match=f"{kind} is an encoder"):
        BiEncoderModel.from_pretrained(folders[kind], bidirectional=False)


@pytest.mark.parametrize("kind", ["mistral", "stablelm", "bloom"])
def test_other_decoders_are_bidirectional_or_refused(tmp_path, kind):
    sizes = {"vocab_size": 24, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = CONFIG_MAPPING[kind](**sizes, num_hidden_layers=2)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    if kind != "stablelm":
        assert BiEncoderModel.from_pretrained(tmp_path).backbone.config.is_causal is False
        return
    with pytest.raises(ValueError, match=f"{kind} cannot be made bidirectional.*bidirectional=False"):
        BiEncoderModel.from_pretrained(tmp_path)
    BiEncoderModel.from_pretrained(tmp_path, bidirectional=False)


def test_a_decoder_that_says_it_is_bidirectional_keeps_its_own_masks(tmp_path):
    """EmbeddingGemma's: its window is another than that of is_causal=False, with which it would embed otherwise."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    own = {"head_dim": 8, "num_hidden_layers": 2, "initializer_range": 0.3, "sliding_window": 6}
    AutoModel.from_config(Gemma3TextConfig(**sizes, **own, use_bidirectional_attention=True)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = BiEncoderModel.from_pretrained(tmp_path, l2_normalize=False)
    batch = model.tokenize(TEXTS)
    theirs = SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(model(batch), theirs, rtol=0, atol=1e-5)
    packed = BiEncoderModel.from_pretrained(tmp_path, l2_normalize=False, packed=None)
    torch.testing.assert_close(packed(batch), theirs, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="bidirectional=False: gemma3_text is an encoder"):
        BiEncoderModel.from_pretrained(tmp_path, bidirectional=False)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", [*CONFIGS, "llama-causal", "ministral3-causal"])
def test_padding_on_either_side_changes_nothing(folders, kind, pooling):
    kind, _, causal = kind.partition("-")
    model = BiEncoderModel.from_pretrained(folders[kind], pooling=pooling, bidirectional=False if causal else None)
    batch = model.tokenize(TEXTS)
    with torch.no_grad():
        alone_BD = torch.cat([model(model.tokenize([text])) for text in TEXTS])
        for side in ("right", "left"):
            for extra in (0, 5):
                torch.testing.assert_close(model(repad(batch, side, extra)), alone_BD, rtol=0, atol=1e-5)
    assert causal or (alone_BD[0] - alone_BD[2]).abs().max() > 1e-2


# ---- pooling


def by_hand(states_BTD: torch.Tensor, mask_BT: torch.Tensor, pooling: str) -> torch.Tensor:
    rows = []
    for states_TD, mask_T in zip(states_BTD.double(), mask_BT, strict=True):
        real = [state_D for state_D, there in zip(states_TD, mask_T, strict=True) if there]
        n = len(real)
        weights = {
            "mean": [1 / n] * n,
            "cls": [1.0] + [0.0] * (n - 1),
            "last": [0.0] * (n - 1) + [1.0],
            "weighted_mean": [(t + 1) / (n * (n + 1) / 2) for t in range(n)],
        }[pooling]
        rows.append(sum(weight * state_D for weight, state_D in zip(weights, real, strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_is_the_formula_whatever_lies_at_the_padding(pooling, dtype):
    generator = torch.Generator().manual_seed(0)
    mask_BT = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]).bool()
    states_BTD = torch.randn(4, 5, 7, generator=generator, dtype=torch.float64).to(dtype)
    expected_BD = by_hand(states_BTD, mask_BT, pooling)
    states_BTD[~mask_BT] = torch.nan
    states_BTD.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        pooled_BD = pool(states_BTD, mask_BT, pooling)
    assert pooled_BD.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(pooled_BD.double(), expected_BD, rtol=1e-6, atol=1e-6)
    pooled_BD.sum().backward()
    assert states_BTD.grad.isfinite().all()
    assert (states_BTD.grad[~mask_BT] == 0).all()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_text_without_tokens_becomes_zero_with_finite_gradients(folders, tmp_path, pooling):
    model = BiEncoderModel.from_pretrained(
        save_tiny("llama", tmp_path, tokenizer=tiny_tokenizer(ends=False)), pooling=pooling
    )
    for texts in (["", "cat"], ["", ""]):
        embeddings_BD = model(model.tokenize(texts))
        assert (embeddings_BD[0] == 0).all()
        embeddings_BD.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model(model.tokenize(["", "cat"]))[1:], model(model.tokenize(["cat"])))


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_pooling_and_normalisation_are_float32_under_autocast(folders, kind):
    model = BiEncoderModel.from_pretrained(folders[kind])
    batch = model.tokenize(TEXTS)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        embeddings_BD = model(batch)
        mask_BT = batch["attention_mask"].bool()
        positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
        states_BTD = model.backbone(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=positions_BT
        ).last_hidden_state
    expected_BD = nn.functional.normalize(by_hand(states_BTD.float(), mask_BT, "mean"), dim=-1)
    assert embeddings_BD.dtype == torch.float32
    torch.testing.assert_close(embeddings_BD.double(), expected_BD, rtol=0, atol=1e-6)


# ---- training


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_empty_batch_reaches_every_parameter_with_a_zero_gradient(folders, kind):
    model = BiEncoderModel.from_pretrained(folders[kind]).train()
    assert not model(model.tokenize(TEXTS))._is_view(), "FSDP2 warns of views"
    used = set(gradients(model, model.tokenize(TEXTS)))
    assert used == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for empty in (model.tokenize([]), {key: torch.zeros(0, 9, dtype=torch.int64) for key in model.tokenize(["a"])}):
        assert model(empty).shape == (0, model.embedding_dim)
        assert not model(empty)._is_view()
        assert model(empty).dtype == torch.float32
        gradient = gradients(model, empty)
        assert set(gradient) == used
        assert all((value == 0).all() for value in gradient.values())


@pytest.mark.parametrize("kind", ["minilm", "qwen3", "modernbert"])
def test_gradient_checkpointing_recomputes_and_gives_the_same_gradients(folders, kind):
    model = BiEncoderModel.from_pretrained(folders[kind])
    batch = model.tokenize(TEXTS)
    expected = gradients(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=None)  # as transformers' Trainer calls it
    for train in (False, True):
        model.train(train)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.backbone.config.attention_probs_dropout_prob = 0.0
        for attention in (module for module in model.modules() if hasattr(module, "attention_dropout")):
            attention.attention_dropout = 0.0
        runs = []
        layer = next(module for module in model.modules() if isinstance(module, nn.ModuleList))[0]
        # Not of the layer itself: transformers 5.24 runs it again past its hooks.
        inside = next(module for module in layer.modules() if isinstance(module, nn.Linear))
        handle = inside.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        actual = gradients(model, batch)
        handle.remove()
        assert len(runs) == (2 if train else 1)
        assert actual.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-6)


def ddp_gradients(rank: int, folder: str, shares: list[list[str]]) -> dict[str, torch.Tensor]:
    model = BiEncoderModel.from_pretrained(folder)
    wrapped = DistributedDataParallel(model)
    weights_D = torch.linspace(-1, 1, model.embedding_dim)
    loss = (wrapped(model.tokenize(shares[rank])) @ weights_D).square().sum() * len(shares)
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_a_rank_without_texts_takes_part_under_ddp(folders, pool):
    for kind in ("minilm", "llama"):
        expected = gradients(model := BiEncoderModel.from_pretrained(folders[kind]), model.tokenize(TEXTS))
        for actual in pool.run(ddp_gradients, 2, str(folders[kind]), [TEXTS, []]):
            assert actual.keys() == expected.keys()
            for name in expected:
                torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-6)


def test_the_parameters_of_an_unused_pooler_are_frozen(folders):
    model = BiEncoderModel.from_pretrained(folders["minilm"])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"backbone.pooler.dense.weight", "backbone.pooler.dense.bias"}


def test_dtype_is_passed_on(folders):
    assert BiEncoderModel.from_pretrained(folders["llama"], dtype="bfloat16").backbone.dtype == torch.bfloat16
    model = BiEncoderModel.from_pretrained(folders["llama"], dtype=torch.float64)
    assert model(model.tokenize(["cat"])).dtype == torch.float64


# ---- tokenizer


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("max_length", [None, 4])
def test_tokens_are_padded_as_transformers_pads_them(folders, side, max_length):
    model = BiEncoderModel.from_pretrained(folders["bert"])
    model.tokenizer.padding_side, model.max_seq_length = side, None
    texts = ["", *TEXTS, "cat"]
    expected = model.tokenizer(
        texts, padding=True, truncation=max_length is not None, max_length=max_length, return_tensors="pt"
    )
    actual = model.tokenize(texts, max_length=max_length)
    assert {tensor.dtype for tensor in actual.values()} == {torch.int64}
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(actual[name], expected[name])


def test_tokenize(folders):
    model = BiEncoderModel.from_pretrained(folders["bert"], prompts={"query": "query "})
    batch = model.tokenize(["cat", "the cat sat"], prompt="query")
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    assert model.tokenizer.convert_ids_to_tokens(batch["input_ids"][0]) == [
        "<s>",
        "query",
        "cat",
        "</s>",
        "<pad>",
        "<pad>",
    ]
    assert batch["attention_mask"].sum(1).tolist() == [4, 6]
    assert model.tokenize(["cat " * 99])["input_ids"].shape == (1, 64)
    cut = model.tokenize(["cat " * 99], max_length=5)["input_ids"]
    assert model.tokenizer.convert_ids_to_tokens(cut[0]) == ["<s>", "cat", "cat", "cat", "</s>"]
    assert model.tokenize([])["input_ids"].shape == (0, 0)
    with pytest.raises(ValueError, match=r"unknown prompt 'passage'.*\['query'\]"):
        model.tokenize(["cat"], prompt="passage")
    with pytest.raises(ValueError, match="65 tokens exceeds the 64 positions"):
        model.tokenize(["cat"], max_length=65)
    with pytest.raises(ValueError, match="65 tokens exceeds the 64 positions"):
        BiEncoderModel.from_pretrained(folders["bert"], max_seq_length=65)
    for length in (0, -1, 8.0, True):
        with pytest.raises(ValueError, match=f"a length of {length} tokens; expected an integer of at least 1"):
            model.tokenize(["cat"], max_length=length)
    with pytest.raises(ValueError, match="2 tokens leaves none to a text beside the 2 special ones"):
        model.tokenize(["cat"], max_length=2)  # transformers cuts nothing at a length of 1
    with pytest.warns(UserWarning, match="the prompt 'query ' fills all 3 tokens that a text may have"):
        model.tokenize(["cat"], prompt="query", max_length=3)
    for texts in (("cat", "the cat sat"), np.array(["cat", "the cat sat"])):
        assert torch.equal(model.tokenize(texts, prompt="query")["input_ids"], batch["input_ids"])
    with pytest.raises(ValueError, match="one of the texts is None; expected strings"):
        model.tokenize(["cat", None])
    with pytest.raises(ValueError, match="a length of 0 tokens"):
        BiEncoderModel.from_pretrained(folders["bert"], max_seq_length=0)
    with pytest.raises(ValueError, match=r"texts is one string.*pass \['cat'\]"):
        model.tokenize("cat")
    with pytest.raises(ValueError, match=r"a list: expected .*, as tokenize\(texts\) gives"):
        model(["cat"])


# ---- errors


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_batches_that_cannot_be_encoded(folders, kind):
    model = BiEncoderModel.from_pretrained(folders[kind])
    ids_BT = torch.ones(2, 64, dtype=torch.int64)
    assert model({"input_ids": ids_BT, "attention_mask": ids_BT}).shape == (2, 32)
    for batch, message in (
        ({"input_ids": ids_BT}, "no 'attention_mask'"),
        ({"input_ids": ids_BT, "attention_mask": ids_BT[0]}, r"attention_mask must be \[B, T\]"),
        ({"input_ids": ids_BT[None], "attention_mask": ids_BT}, r"input_ids must be \[B, T\]"),
        ({"input_ids": ids_BT, "attention_mask": ids_BT[:, 1:]}, "same shape"),
        ({"input_ids": ids_BT.repeat(1, 2), "attention_mask": ids_BT.repeat(1, 2)}, "128 token positions.*only 64"),
    ):
        with pytest.raises(ValueError, match=message):
            model(batch)


def test_unknown_pooling(folders):
    with pytest.raises(ValueError, match="unknown pooling 'max'; choose one of mean, cls, last, weighted_mean"):
        BiEncoderModel.from_pretrained(folders["bert"], pooling="max")
