"""BiEncoderModel: attention, padding, pooling, the empty batch, folders shared with sentence-transformers, errors."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as st_models
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from inbatch import BiEncoderModel
from inbatch._loading import BIDIRECTIONAL_DECODERS
from inbatch.pooling import POOLINGS, pool
from tests.tiny_models import CONFIGS, minilm, save_tiny, tiny_tokenizer

ENCODERS = ("bert", "roberta", "modernbert")
# Lengths from 2 special tokens and no word up, longer than the windows of the sliding layers.
TEXTS = [
    "the cat sat on the mat",
    "",
    "what is a red dog and where is the blue cat of the slow dog",
    "dog",
]


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("tiny")
    return {kind: save_tiny(kind, home / kind) for kind in CONFIGS} | {"minilm": minilm()}


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
    from transformers import CONFIG_MAPPING, AutoModel

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


def gradients(model: BiEncoderModel, batch: dict) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    weights_D = torch.linspace(-1, 1, model.embedding_dim)
    (model(batch) @ weights_D).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_empty_batch_reaches_every_parameter_with_a_zero_gradient(folders, kind):
    model = BiEncoderModel.from_pretrained(folders[kind]).train()
    used = set(gradients(model, model.tokenize(TEXTS)))
    assert used == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for empty in (model.tokenize([]), {key: torch.zeros(0, 9, dtype=torch.int64) for key in model.tokenize(["a"])}):
        assert model(empty).shape == (0, model.embedding_dim)
        assert model(empty).dtype == torch.float32
        gradient = gradients(model, empty)
        assert set(gradient) == used
        assert all((value == 0).all() for value in gradient.values())


@pytest.mark.parametrize("kind", ["minilm", "qwen3", "modernbert"])
def test_gradient_checkpointing_recomputes_and_gives_the_same_gradients(folders, kind):
    model = BiEncoderModel.from_pretrained(folders[kind])
    batch = model.tokenize(TEXTS)
    expected = gradients(model, batch)
    model.gradient_checkpointing_enable()
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
        handle = layer.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
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


# ---- folders shared with sentence-transformers


def st_encode(model: SentenceTransformer, texts=TEXTS, **options) -> torch.Tensor:
    return model.encode(texts, convert_to_tensor=True, show_progress_bar=False, **options)


@torch.no_grad()
def ours(model: BiEncoderModel, texts=TEXTS, **options) -> torch.Tensor:
    return model.eval()(model.tokenize(texts, **options))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", ["minilm", "bert", "modernbert", "roberta", "llama", "qwen3", "ministral3"])
def test_sentence_transformers_opens_what_we_save(folders, tmp_path, kind, pooling):
    prompts = {"query": "query : ", "passage": "document : ", "document": "document "}
    normalize = pooling != "cls"
    model = BiEncoderModel.from_pretrained(folders[kind], pooling=pooling, l2_normalize=normalize, prompts=prompts)
    model.tokenizer.padding_side = "left" if pooling in ("weighted_mean", "last") and kind == "llama" else "right"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.save_pretrained(tmp_path)
    theirs = SentenceTransformer(str(tmp_path))
    again = BiEncoderModel.from_pretrained(tmp_path)
    assert {name: theirs.prompts[name] for name in prompts} == again.prompts == prompts
    assert theirs.max_seq_length == again.max_seq_length == model.max_seq_length
    expected_BD = ours(model)
    torch.testing.assert_close(st_encode(theirs), expected_BD, rtol=0, atol=1e-5 * max(1, expected_BD.abs().max()))
    torch.testing.assert_close(ours(again), expected_BD, rtol=1e-5, atol=1e-6)
    for name in prompts:
        prompted_BD = ours(model, prompt=name)
        assert (prompted_BD - expected_BD).abs().max() > 1e-3
        atol = 1e-5 * max(1, prompted_BD.abs().max())
        torch.testing.assert_close(st_encode(theirs, prompt_name=name), prompted_BD, rtol=0, atol=atol)
        torch.testing.assert_close(ours(again, prompt=name), prompted_BD, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken", "weightedmean"])
@pytest.mark.parametrize("kind", ["minilm", "modernbert", "llama", "qwen3", "ministral3"])
def test_we_open_what_sentence_transformers_saves(folders, tmp_path, kind, pooling):
    transformer = st_models.Transformer(str(folders[kind]), max_seq_length=11, do_lower_case=True)
    modules = [transformer, st_models.Pooling(transformer.get_embedding_dimension(), pooling)]
    if pooling != "cls":
        modules.append(st_models.Normalize())
    theirs = SentenceTransformer(
        modules=modules, prompts={"query": "query "}, default_prompt_name="query", similarity_fn_name="dot"
    )
    theirs.save(str(tmp_path))
    model = BiEncoderModel.from_pretrained(tmp_path)
    texts = [*TEXTS, "THE Cat sat"]
    assert (model.max_seq_length, model.default_prompt_name, model.similarity) == (11, "query", "dot")
    assert model.prompts["query"] == "query "
    # What sentence-transformers runs is causal for a decoder, and so it stays until told otherwise.
    for options in ({"prompt_name": "query"}, {"prompt": ""}):
        expected_BD = st_encode(theirs, texts, **options)
        actual_BD = ours(model, texts, prompt=options.get("prompt_name"))
        torch.testing.assert_close(actual_BD, expected_BD, rtol=0, atol=1e-5 * max(1, expected_BD.abs().max()))
    assert torch.equal(ours(model, ["the cat sat"]), ours(model, ["THE Cat sat"]))
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(
        st_encode(SentenceTransformer(str(tmp_path / "again")), texts), st_encode(theirs, texts), rtol=0, atol=1e-5
    )
    if kind in BIDIRECTIONAL_DECODERS:
        both_ways = BiEncoderModel.from_pretrained(tmp_path, bidirectional=True)
        assert (ours(both_ways) - ours(model)).abs().max() > 1e-3


def test_minilm_as_published(folders):
    model = BiEncoderModel.from_pretrained(folders["minilm"])
    assert (model.pooling, model.l2_normalize, model.max_seq_length, model.embedding_dim) == ("mean", True, 256, 384)
    texts = ["A bi-encoder embeds queries and passages apart.", "snow " * 600, " Ünïcode, \n tabs\tand spaces  "]
    torch.testing.assert_close(
        ours(model, texts), st_encode(SentenceTransformer(str(minilm())), texts), rtol=0, atol=1e-6
    )
    assert model.tokenize(texts)["input_ids"].shape == (3, 256)
    assert model.tokenize(texts, max_length=300)["input_ids"].shape == (3, 300)


def test_a_saved_folder_keeps_what_nobody_asked_to_change(folders, tmp_path):
    first = BiEncoderModel.from_pretrained(folders["qwen3"], pooling="last", l2_normalize=False, max_seq_length=7)
    first.save_pretrained(tmp_path / "first")
    second = BiEncoderModel.from_pretrained(tmp_path / "first")
    assert (second.pooling, second.l2_normalize, second.max_seq_length) == ("last", False, 7)
    assert second.backbone.config.is_causal is False
    third = BiEncoderModel.from_pretrained(tmp_path / "first", pooling="mean", l2_normalize=True, bidirectional=False)
    third.save_pretrained(tmp_path / "third")
    fourth = BiEncoderModel.from_pretrained(tmp_path / "third")
    assert (fourth.pooling, fourth.l2_normalize, fourth.backbone.config.is_causal) == ("mean", True, True)
    torch.testing.assert_close(ours(fourth), ours(third), rtol=1e-5, atol=1e-6)


def test_a_whole_state_can_be_saved_in_place_of_the_parameters(folders, tmp_path):
    model = BiEncoderModel.from_pretrained(folders["llama"])
    state = {key: value * 0.5 for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    for name, value in BiEncoderModel.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(value, state[name])
    with pytest.raises(ValueError, match=r"no key that starts with 'backbone\.'"):
        model.save_pretrained(tmp_path, state_dict={"model.weight": torch.zeros(1)})


def test_dtype_is_passed_on(folders):
    assert BiEncoderModel.from_pretrained(folders["llama"], dtype="bfloat16").backbone.dtype == torch.bfloat16
    model = BiEncoderModel.from_pretrained(folders["llama"], dtype=torch.float64)
    assert model(model.tokenize(["cat"])).dtype == torch.float64


# ---- tokenizer


def test_a_tokenizer_without_padding_pads_with_eos_and_the_eos_embedding_still_learns(tmp_path):
    save_tiny("llama", tmp_path / "a", tokenizer=tiny_tokenizer(pad_token=None))
    model = BiEncoderModel.from_pretrained(tmp_path / "a", pooling="last")
    assert model.tokenizer.pad_token == "</s>"
    model.save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())["pad_token"] == "</s>"
    again = BiEncoderModel.from_pretrained(tmp_path / "b")
    torch.testing.assert_close(st_encode(SentenceTransformer(str(tmp_path / "b"))), ours(again), rtol=0, atol=1e-5)
    gradient = gradients(again, again.tokenize(TEXTS))["backbone.embed_tokens.weight"]
    assert gradient[2].abs().max() > 0
    save_tiny("llama", tmp_path / "c", tokenizer=tiny_tokenizer(ends=False, pad_token=None, eos_token=None))
    with pytest.raises(ValueError, match="neither a pad token nor an eos token"):
        BiEncoderModel.from_pretrained(tmp_path / "c")


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
    with pytest.raises(ValueError, match="max_length 65 exceeds the 64 positions"):
        model.tokenize(["cat"], max_length=65)


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


def test_paths_that_are_no_model(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    shutil.copytree(folders["bert"], tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"not weights")
    shutil.copytree(folders["bert"], tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    for path, message in (
        (tmp_path / "missing", "missing is no model: there is no such folder"),
        (tmp_path, "no model: the folder has neither config.json"),
        ("nobody/no-such-model", "'nobody/no-such-model' is no folder here, and the hub has no such model"),
        ("./here/nothing", "no such folder"),
        (tmp_path / "adapter", "LoRA adapter"),
        (tmp_path / "broken", "cannot be opened as a transformers model"),
        (tmp_path / "bare", "cannot be opened as a transformers model"),
    ):
        with pytest.raises(ValueError, match=message):
            BiEncoderModel.from_pretrained(path)


def test_missing_weights_are_not_made_up(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folders["llama"], tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights of LlamaModel are missing.*layers\.1\.mlp\.up_proj"):
        BiEncoderModel.from_pretrained(tmp_path)


def test_encoder_decoders_are_refused(tmp_path):
    from transformers import AutoModel, T5Config

    AutoModel.from_config(T5Config(vocab_size=24, d_model=8, d_ff=8, num_layers=1, num_heads=1)).save_pretrained(
        tmp_path
    )
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="t5 is an encoder-decoder"):
        BiEncoderModel.from_pretrained(tmp_path)


def test_unknown_pooling(folders):
    with pytest.raises(ValueError, match="unknown pooling 'max'; choose one of mean, cls, last, weighted_mean"):
        BiEncoderModel.from_pretrained(folders["bert"], pooling="max")


def test_sentence_transformers_modules_that_we_do_not_have(folders, tmp_path):
    transformer = st_models.Transformer(str(folders["bert"]))
    for number, (modules, message) in enumerate(
        (
            ([st_models.Pooling(32, "max")], "pooling max is not supported"),
            ([st_models.Pooling(32, ("mean", "cls"))], "pooling mean.cls is not supported"),
            ([st_models.Pooling(32, "mean", include_prompt=False)], "include_prompt=false"),
            ([st_models.Pooling(32, "mean"), st_models.Dense(32, 8)], r"module .*\.Dense \(folder '2_Dense'\)"),
            ([st_models.Pooling(32, "mean"), st_models.Normalize(), st_models.Normalize()], "expected Transformer,"),
        )
    ):
        folder = tmp_path / str(number)
        SentenceTransformer(modules=[transformer, *modules]).save(str(folder))
        with pytest.raises(ValueError, match=message):
            BiEncoderModel.from_pretrained(folder)
    (folder / "modules.json").write_text("[")
    with pytest.raises(ValueError, match=r"modules\.json is not valid JSON"):
        BiEncoderModel.from_pretrained(folder)


def test_the_parameters_of_an_unused_pooler_are_frozen(folders):
    model = BiEncoderModel.from_pretrained(folders["minilm"])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"backbone.pooler.dense.weight", "backbone.pooler.dense.bias"}
