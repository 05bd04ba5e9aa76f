"""Folders shared with sentence-transformers, and folders that are no model."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer import modules as st_models
from transformers import AutoModel, AutoModelForCausalLM, CanineTokenizer, T5Config

from inbatch import BiEncoderModel
from inbatch.encoder.loading import BIDIRECTIONAL_DECODERS, load_tokenizer
from inbatch.encoder.lora import add_lora
from inbatch.encoder.pooling import POOLINGS
from inbatch.encoder.sentence_transformer import open_encoder
from tests.tiny_models import TEXTS, gradients, minilm, save_all, save_tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return save_all(tmp_path_factory.mktemp("models"))


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
    if kind == "llama":
        model.tokenizer.padding_side = "left"
        model.tokenize(TEXTS)  # a tokenizer remembers what it did last
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


def test_lower_casing_that_the_tokenizer_itself_does_not_do(folders, tmp_path):
    BiEncoderModel.from_pretrained(folders["bert"]).save_pretrained(tmp_path)
    path = tmp_path / "sentence_bert_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_lower_case": True}))
    model = BiEncoderModel.from_pretrained(tmp_path)
    texts = ["THE Cat sat"]
    assert (ours(model, texts) - ours(BiEncoderModel.from_pretrained(folders["bert"]), texts)).abs().max() > 1e-3
    for again in ("once", "twice"):
        torch.testing.assert_close(
            ours(model, texts), st_encode(SentenceTransformer(str(tmp_path)), texts), rtol=0, atol=1e-5
        )
        model.save_pretrained(tmp_path := tmp_path / again)
        model = BiEncoderModel.from_pretrained(tmp_path)
    normalizer = json.loads((tmp_path / "tokenizer.json").read_text())["normalizer"]
    assert normalizer == {"type": "Lowercase"}


def test_a_saved_length_beyond_the_positions_is_cut_to_them(folders, tmp_path):
    BiEncoderModel.from_pretrained(folders["roberta"]).save_pretrained(tmp_path)
    path = tmp_path / "sentence_bert_config.json"
    path.write_text(json.dumps({"max_seq_length": 66}))  # the table's rows, two of which RoBERTa cannot use
    model = BiEncoderModel.from_pretrained(tmp_path)
    assert model.max_seq_length == 64
    assert ours(model, ["cat " * 99]).isfinite().all()


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


def test_what_is_saved_does_not_depend_on_what_was_tokenised(folders, tmp_path):
    model = BiEncoderModel.from_pretrained(folders["minilm"])
    model.save_pretrained(tmp_path / "first")
    model.tokenize(TEXTS, max_length=5)
    model.save_pretrained(tmp_path / "second")
    for path in (tmp_path / "first").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "second" / path.relative_to(tmp_path / "first")).read_bytes()
    saved, opened = (json.loads((folder / "tokenizer.json").read_text()) for folder in (tmp_path / "first", minilm()))
    assert saved["padding"] == opened["padding"]
    assert saved["truncation"] == {"direction": "Right"} | opened["truncation"]
    assert len({path.stat().st_mode for path in (tmp_path / "first").glob("*.*") if path.is_file()}) == 1


@pytest.mark.parametrize("bad", ["../../elsewhere", "/etc", "link"])
def test_paths_out_of_the_folder_are_refused(folders, tmp_path, bad):
    BiEncoderModel.from_pretrained(folders["bert"]).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "link").symlink_to("/etc")
    path = tmp_path / "model" / "modules.json"
    modules = json.loads(path.read_text())
    modules[1]["path"] = bad
    path.write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"(leads|lies) out(side)? of the model's folder"):
        BiEncoderModel.from_pretrained(tmp_path / "model")


def test_a_file_that_is_a_link_out_of_the_folder(folders, tmp_path):
    BiEncoderModel.from_pretrained(folders["bert"]).save_pretrained(tmp_path / "model")
    secret = tmp_path / "secret"
    secret.write_text("key = 5")
    (tmp_path / "model" / "1_Pooling" / "config.json").unlink()
    (tmp_path / "model" / "1_Pooling" / "config.json").symlink_to(secret)
    with pytest.raises(ValueError, match="lies outside of the model's folder") as error:
        BiEncoderModel.from_pretrained(tmp_path / "model")
    assert "key" not in str(error.value)


def test_a_snapshot_of_the_hub_s_cache_links_to_its_blobs(folders, tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "0123", tmp_path / "blobs"
    BiEncoderModel.from_pretrained(folders["bert"]).save_pretrained(snapshot)
    blobs.mkdir()
    for number, path in enumerate(path for path in [*snapshot.rglob("*")] if path.is_file()):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    assert ours(BiEncoderModel.from_pretrained(snapshot)).isfinite().all()


def test_custom_code_is_not_run_and_nobody_is_asked(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    shutil.copytree(folders["bert"], tmp_path / "model")
    (tmp_path / "model" / "modeling_mine.py").write_text("raise SystemExit('it ran')")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_mine.MyConfig", "AutoModel": "modeling_mine.MyModel"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"config\.json names custom code .*modeling_mine.*not run: transformers' own"):
        assert ours(BiEncoderModel.from_pretrained(tmp_path / "model")).isfinite().all()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"model_type": "mine"}))
    with pytest.raises(ValueError, match=r"custom code .*not run: read it, and pass trust_remote_code=True"):
        BiEncoderModel.from_pretrained(tmp_path / "model")
    BiEncoderModel.from_pretrained(folders["bert"]).save_pretrained(tmp_path / "modules")
    text = (tmp_path / "modules" / "modules.json").read_text()
    (tmp_path / "modules" / "modules.json").write_text(
        text.replace("sentence_transformers.models.Pooling", "mine.Pooling")
    )
    with pytest.raises(ValueError, match=r"module mine\.Pooling is custom code, which inbatch does not run"):
        BiEncoderModel.from_pretrained(tmp_path / "modules")


CUSTOM = """
from transformers import BertConfig, BertModel

class MyConfig(BertConfig):
    model_type = "mine"

class MyModel(BertModel):
    config_class = MyConfig

    def forward(self, *args, **options):
        output = super().forward(*args, **options)
        output.last_hidden_state = output.last_hidden_state.flip(-1)
        return output
"""


def test_custom_code_is_run_where_it_is_trusted(folders, tmp_path):
    plain = ours(BiEncoderModel.from_pretrained(folders["bert"]))
    folder = shutil.copytree(folders["bert"], tmp_path / "mine")
    (folder / "modeling_mine.py").write_text(CUSTOM)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "mine"}
    config["auto_map"] = {"AutoConfig": "modeling_mine.MyConfig", "AutoModel": "modeling_mine.MyModel"}
    (folder / "config.json").write_text(json.dumps(config))
    trusted = BiEncoderModel.from_pretrained(folder, trust_remote_code=True)
    torch.testing.assert_close(ours(trusted), plain.flip(-1))
    with pytest.raises(ValueError, match=r"modeling_mine\.py|custom code .*not run"):
        BiEncoderModel.from_pretrained(folder)


def test_a_whole_state_can_be_saved_in_place_of_the_parameters(folders, tmp_path):
    model = BiEncoderModel.from_pretrained(folders["llama"])
    state = {key: value * 0.5 for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    for name, value in BiEncoderModel.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(value, state[name])
    with pytest.raises(ValueError, match=r"no key that starts with 'backbone\.'"):
        model.save_pretrained(tmp_path, state_dict={"model.weight": torch.zeros(1)})


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


def test_files_of_a_folder_that_say_nothing(folders, tmp_path):
    BiEncoderModel.from_pretrained(folders["bert"]).save_pretrained(tmp_path / "whole")
    for number, (name, content, message) in enumerate(
        (
            ("1_Pooling/config.json", None, r"1_Pooling.config\.json is missing, which says how"),
            ("1_Pooling/config.json", "[]", r"1_Pooling.config\.json holds a list; expected a JSON object"),
            ("config.json", "[]", r"config\.json holds a list"),
            ("config.json", "null", r"config\.json holds a NoneType"),
            ("config_sentence_transformers.json", "[]", r"config_sentence_transformers\.json holds a list"),
            (
                "sentence_bert_config.json",
                '{"max_seq_length": "\xe9"}',
                r"sentence_bert_config\.json is not valid JSON",
            ),
            ("modules.json", "{}", r"modules\.json is not a list of modules"),
            ("modules.json", '[{"type": "Transformer"}]', r"modules\.json is not a list of modules"),
        )
    ):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / str(number))
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_text(content, encoding="latin-1")
        with pytest.raises(ValueError, match=message) as error:
            BiEncoderModel.from_pretrained(folder)
        assert "\n" not in str(error.value)


def test_paths_that_are_no_model(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    shutil.copytree(folders["bert"], tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"not weights")
    shutil.copytree(folders["bert"], tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    shutil.copytree(folders["bert"], tmp_path / "no-tokens")
    (tmp_path / "no-tokens" / "tokenizer.json").write_text("[]")
    (tmp_path / "nothing").mkdir()
    for tower in ("query", "passage"):
        BiEncoderModel.from_pretrained(folders["bert"]).save_pretrained(tmp_path / tower)
    for path, message in (
        (tmp_path / "missing", "missing is not a model: there is no such folder"),
        (tmp_path, "is not a model, but holds .*passage and .*query: name one of them"),
        (tmp_path / "nothing", "not a model: the folder has neither config.json"),
        ("nobody/no-such-model", "'nobody/no-such-model' is not a folder here, and cannot be had from the hub"),
        ("./here/nothing", "no such folder"),
        (tmp_path / "adapter", "names no base_model_name_or_path"),
        (tmp_path / "broken", "cannot be opened as a transformers model"),
        (tmp_path / "bare", "cannot be opened as a transformers model"),
        (tmp_path / "no-tokens", "no-tokens: its tokenizer cannot be opened: TypeError"),
    ):
        with pytest.raises(ValueError, match=message):
            BiEncoderModel.from_pretrained(path)


def test_missing_weights_are_not_made_up(folders, tmp_path):
    shutil.copytree(folders["llama"], tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights of LlamaModel are missing.*layers\.1\.mlp\.up_proj"):
        BiEncoderModel.from_pretrained(tmp_path)


def test_a_vocabulary_is_not_made_up(folders, tmp_path):
    shutil.copytree(folders["minilm"], tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "vocab.txt"))
    with pytest.raises(ValueError, match=r"no vocabulary .*BertTokenizer.*of the files tokenizer\.json, vocab\.txt"):
        BiEncoderModel.from_pretrained(tmp_path / "bare")
    # Either file will do, and characters need none.
    vocabulary = json.loads((folders["minilm"] / "tokenizer.json").read_text())["model"]["vocab"]
    (tmp_path / "bare" / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)))
    texts = ["the cat sat"]
    opened = BiEncoderModel.from_pretrained(tmp_path / "bare")
    torch.testing.assert_close(ours(opened, texts), ours(BiEncoderModel.from_pretrained(folders["minilm"]), texts))
    CanineTokenizer().save_pretrained(tmp_path / "characters")
    assert load_tokenizer(tmp_path / "characters", lower_case=False)("cat")["input_ids"][1:-1] == [*map(ord, "cat")]


def test_adapters_of_a_backbone_and_of_a_model_with_a_head_on_it(folders, tmp_path):
    """The unmerged model's embeddings, and a refusal where peft would go on with random numbers."""
    backbone = AutoModel.from_pretrained(folders["llama"])
    for kind, base in (("head", AutoModelForCausalLM.from_pretrained(folders["llama"])), ("bare", backbone)):
        options = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        options.task_type = "CAUSAL_LM" if kind == "head" else None
        adapted = peft.get_peft_model(base, options).eval()
        adapted.save_pretrained(tmp_path / kind)
        tiny_tokenizer().save_pretrained(tmp_path / kind)
        opened = BiEncoderModel.from_pretrained(tmp_path / kind, bidirectional=False)
        expected = BiEncoderModel.from_pretrained(folders["llama"], bidirectional=False)
        plain_BD = ours(expected)
        expected.backbone = adapted.model.model if kind == "head" else adapted
        torch.testing.assert_close(ours(opened), ours(expected), rtol=0, atol=1e-5)
        assert all(parameter.requires_grad for parameter in opened.parameters())
        assert (ours(opened) - plain_BD).abs().max() > 1e-2
    path = tmp_path / "bare" / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name: value for name, value in weights.items() if "layers.1.self_attn.q_proj" not in name}, path)
    with pytest.raises(ValueError, match=r"does not fit .*Found missing adapter keys .*layers\.1\.self_attn\.q_proj"):
        BiEncoderModel.from_pretrained(tmp_path / "bare")
    path.unlink()
    with pytest.raises(ValueError, match=r"bare has no adapter_model\.safetensors beside its adapter_config"):
        BiEncoderModel.from_pretrained(tmp_path / "bare")
    prompts = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="FEATURE_EXTRACTION")
    peft.get_peft_model(AutoModel.from_pretrained(folders["llama"]), prompts).save_pretrained(tmp_path / "prompts")
    with pytest.raises(ValueError, match="'PROMPT_TUNING' cannot be merged into the weights"):
        BiEncoderModel.from_pretrained(tmp_path / "prompts")
    for path in (tmp_path / "head").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"its tokenizer cannot be opened \(no tokenizer\.json: copy its files"):
        BiEncoderModel.from_pretrained(tmp_path / "head")


def test_where_an_adapter_and_its_base_model_lie(folders, tmp_path, monkeypatch):
    """In one folder, or in one that is named as it was seen from elsewhere; not on another adapter."""

    def with_adapter(base) -> BiEncoderModel:
        model = BiEncoderModel.from_pretrained(base)
        add_lora(model, r=2, alpha=4)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.1)
        return model

    shutil.copytree(folders["bert"], tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model = with_adapter("base")
    for place in ("apart", "base"):
        model.save_pretrained(place)
        monkeypatch.chdir("/")
        torch.testing.assert_close(ours(BiEncoderModel.from_pretrained(tmp_path / place)), ours(model))
        theirs = SentenceTransformer(str(tmp_path / place), device="cpu")
        torch.testing.assert_close(st_encode(theirs), ours(model), rtol=0, atol=1e-5)
        monkeypatch.chdir(tmp_path)
    second = with_adapter(tmp_path / "apart")
    with pytest.raises(ValueError, match=r"apart is an adapter, or .* set lora\.merge to true"):
        second.save_pretrained(tmp_path / "second")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ValueError, match=r"apart: the base model of its adapter cannot be opened: .*no such folder"):
        BiEncoderModel.from_pretrained(tmp_path / "apart")


def test_other_kinds_of_models_are_refused(folders, tmp_path):
    CrossEncoder(str(folders["bert"]), num_labels=1).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="model_type CrossEncoder is not a bi-encoder"):
        open_encoder(tmp_path)


def test_encoder_decoders_are_refused(tmp_path):
    AutoModel.from_config(T5Config(vocab_size=24, d_model=8, d_ff=8, num_layers=1, num_heads=1)).save_pretrained(
        tmp_path
    )
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="t5 is an encoder-decoder"):
        BiEncoderModel.from_pretrained(tmp_path)
