"""Models that only sentence-transformers opens: their embeddings before and after training."""

import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, StaticEmbedding, Transformer
from transformers import T5Config, T5EncoderModel

from inbatch import BiEncoderModel, cli
from inbatch.encoder.sentence_transformer import SentenceTransformerEncoder, open_encoder
from inbatch.retrieval.kept import model_digest
from inbatch.train.check import check
from inbatch.train.loop import train
from inbatch.train.run_folder import read_metrics
from tests.helpers import device
from tests.tiny_models import TEXTS, VOCABULARY, save_tiny, tiny_tokenizer
from tests.train.test_loop import folder, make_config  # noqa: F401


def build(kind: str, backbone: Path) -> SentenceTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if kind == "static":
            static = StaticEmbedding(tiny_tokenizer().backend_tokenizer, embedding_dim=16)
            return SentenceTransformer(modules=[static, Normalize()], device="cpu", prompts={"query": "query "})
        words = Transformer(str(backbone), max_seq_length=12)
        if kind == "two poolings":
            modules = [words, Pooling(32, pooling_mode=["cls", "max"])]
        else:
            modules = [words, Pooling(32), Dense(32, 24), Dense(24, 16), Normalize()]
        return SentenceTransformer(modules=modules, device="cpu", similarity_fn_name="dot")


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory) -> dict[str, Path]:  # noqa: F811
    root = tmp_path_factory.mktemp("theirs")
    for kind in ("dense", "static", "two poolings"):
        build(kind, folder / "model").save_pretrained(str(root / kind))
    return {path.name: path for path in root.iterdir()}


def assert_as_theirs(path: Path, *, atol: float = 1e-5) -> torch.Tensor:
    model, theirs = open_encoder(path), SentenceTransformer(str(path), device="cpu")
    assert isinstance(model, SentenceTransformerEncoder)
    expected = theirs.encode(TEXTS, convert_to_tensor=True)
    embeddings_BD = model(model.tokenize(TEXTS))
    torch.testing.assert_close(embeddings_BD, expected, rtol=0, atol=atol)
    assert embeddings_BD.shape == (len(TEXTS), model.embedding_dim)
    assert (model.similarity, model.prompts) == (theirs.similarity_fn_name, theirs.prompts)
    empty_0D = model(model.tokenize([]))
    assert empty_0D.shape == (0, model.embedding_dim)
    empty_0D.sum().backward()
    return embeddings_BD.detach()


def train_body(rank: int, config) -> None:
    train(config, device=device())


@pytest.mark.parametrize("kind", ["dense", "static", "two poolings"])
def test_any_modules_train_and_are_saved_by_sentence_transformers(pool, folder, saved, tmp_path, capsys, kind):  # noqa: F811
    """One process, DDP on two and, where there are layers to shard, FSDP2 on two: the same losses and model."""
    start_BD, losses = assert_as_theirs(saved[kind]), {}
    ways = [(1, "ddp"), (2, "ddp")] + ([(2, "fsdp2")] if kind == "dense" else [])
    for ranks, parallel in ways:
        config = make_config(
            folder, tmp_path / f"{ranks}{parallel}", model={"name_or_path": str(saved[kind])},
            data={"query_prefix": "what "}, optim={"lr": 0.01},
            train={"parallel": parallel, "micro_batch_tokens": 40, "keep_graph_mib": 0},
        )  # fmt: skip
        pool.run(train_body, ranks, config)
        trained_BD = assert_as_theirs(Path(config.train.output_dir) / "model")
        losses[ranks, parallel] = [line["loss"] for line in read_metrics(config.train.output_dir)]
        assert losses[ranks, parallel] == pytest.approx(losses[1, "ddp"], rel=1e-4, abs=1e-5)
        assert (trained_BD - start_BD).abs().max() > 1e-2
    model = SentenceTransformer(config.train.output_dir + "/model", device="cpu")
    assert [type(module).__name__ for module in model] == [type(m).__name__ for m in build(kind, folder / "model")]
    assert model.prompts["query"] == "what "
    assert "inbatch train" in (tmp_path / "1ddp" / "model" / "README.md").read_text()
    assert cli.run(["evaluate", str(tmp_path / "1ddp" / "model"), str(folder / "beir"), "--split", "dev"]) == 0
    assert "opened by sentence-transformers" in capsys.readouterr().err


def test_what_is_chosen_and_what_is_refused(folder, saved, tmp_path):  # noqa: F811
    model = open_encoder(folder / "model", backend="sentence-transformers")
    ours = BiEncoderModel.from_pretrained(folder / "model").eval()
    assert (type(open_encoder(folder / "model")), model.backend_because) == (BiEncoderModel, "model.backend says so")
    ours.l2_normalize = False  # what a folder without modules.json says nothing of
    batch = ours.tokenize(TEXTS)
    torch.testing.assert_close(model(model.tokenize(TEXTS)), ours(batch), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"module .*Dense .* is not supported"):
        open_encoder(saved["dense"], backend="inbatch")
    for name, value in (("pooling", "cls"), ("l2_normalize", False)):
        with pytest.raises(ValueError, match=rf"model\.{name} is for models that inbatch opens itself"):
            open_encoder(saved["dense"], **{name: value})
    config = make_config(folder, tmp_path / "lora", model={"name_or_path": str(saved["dense"])}, lora={"r": 2})
    with pytest.raises(ValueError, match=r"lora\.r is 2, which is for models that inbatch opens itself .*Dense"):
        train(config, device=torch.device("cpu"))
    config = make_config(
        folder, tmp_path / "fsdp", model={"name_or_path": str(saved["static"])}, train={"parallel": "fsdp2"}
    )
    with pytest.raises(ValueError, match=r"keeps its layers in no ModuleList: use train\.parallel ddp"):
        train(config, device=torch.device("cpu"))
    half = open_encoder(saved["dense"], dtype="bfloat16")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    static = open_encoder(saved["static"])
    with pytest.raises(ValueError, match="there is no transformer"):
        static.gradient_checkpointing_enable()
    theirs = build("dense", folder / "model")
    digest = model_digest(SentenceTransformerEncoder(theirs))
    theirs[1] = Pooling(32, "max")
    assert model_digest(SentenceTransformerEncoder(theirs)) != digest, "embeddings are kept apart"
    theirs[1].include_prompt = False
    with pytest.raises(ValueError, match="leaves out prompts"):
        SentenceTransformerEncoder(theirs)
    checked = check(make_config(folder, tmp_path / "check", model={"name_or_path": str(saved["static"])}))
    assert checked.memory["activations"] == 0
    assert checked.sources[0].tokens["query"].min() > 0


def test_an_encoder_without_its_decoder_and_lengths_that_are_no_limit(tmp_path):
    """T5's encoder has any length; RoBERTa's positions are two fewer than its config says."""
    T5EncoderModel(T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2)).save_pretrained(
        tmp_path / "t5"
    )
    tiny_tokenizer().save_pretrained(tmp_path / "t5")
    save_tiny("roberta", tmp_path / "roberta")
    for kind, length in (("t5", None), ("roberta", 64)):
        modules = [Transformer(str(tmp_path / kind)), Pooling(32, "max" if kind == "roberta" else "mean")]
        SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(tmp_path / f"{kind} saved"))
        assert_as_theirs(tmp_path / f"{kind} saved")
        model = open_encoder(tmp_path / f"{kind} saved")
        assert model.max_seq_length == length
        model.save_pretrained(tmp_path / f"{kind} again")
        assert_as_theirs(tmp_path / f"{kind} again")
    adapted = peft.get_peft_model(
        T5EncoderModel.from_pretrained(tmp_path / "t5"), peft.LoraConfig(r=2, target_modules=["q"])
    )
    adapted.save_pretrained(tmp_path / "adapter")
    # Theirs would put random numbers into the decoder's part of it.
    with pytest.raises(
        ValueError, match=r"the base model of its adapter cannot be opened: .* t5 is an encoder-decoder"
    ):
        open_encoder(tmp_path / "adapter")


def test_folders_that_sentence_transformers_would_open_and_get_wrong(folder, saved, tmp_path):  # noqa: F811
    """Each ends in one line: a module's file, another width, weights that are NaN, a tokenizer that is made up."""

    def no_tokenizer(path: Path) -> None:
        for file in path.glob("tokenizer*"):
            file.unlink()

    def left(path: Path) -> None:
        tiny_tokenizer(padding_side="left").save_pretrained(path)

    def nan(path: Path) -> None:
        weights = {name: value * float("nan") for name, value in load_file(path / "2_Dense/model.safetensors").items()}
        save_file(weights, path / "2_Dense/model.safetensors")

    def type_of(name: str) -> Callable[[Path], object]:
        text = (saved["dense"] / "modules.json").read_text()
        kind = "sentence_transformers.base.modules.dense.Dense"
        assert kind in text
        return lambda path: (path / "modules.json").write_text(text.replace(kind, name))

    for number, (change, message) in enumerate(
        (
            (lambda path: (path / "2_Dense/model.safetensors").unlink(), "sentence-transformers cannot open it: Could"),
            (lambda path: (path / "1_Pooling/config.json").write_text("{}"), "cannot open it: TypeError: .*Pooling"),
            (lambda path: shutil.rmtree(path / "3_Dense"), "sentence-transformers cannot open it"),
            (lambda path: shutil.copytree(path / "3_Dense", path / "2_Dense", dirs_exist_ok=True), "embeds no text"),
            (nan, "embeddings hold NaN"),
            (no_tokenizer, "has no vocabulary for its tokenizer|no tokenizer.json"),
            (left, "padding_side left shifts the positions"),
            (type_of("sentence_transformers.nothing.Dense"), "cannot open it: No module named"),
            (type_of("mine.Dense"), "cannot open it: .*executes third-party code"),
        )
    ):
        path = shutil.copytree(saved["dense"], tmp_path / str(number))
        change(path)
        with pytest.raises(ValueError, match=message) as error:
            open_encoder(path)
        assert "\n" not in str(error.value)


def test_what_was_changed_in_memory_is_saved(saved, tmp_path):
    """Its settings, and a state of another dtype than the weights on disk (as FSDP2 gathers it)."""
    open_encoder(saved["dense"], dtype="float16").save_pretrained(tmp_path / "half")
    model = open_encoder(tmp_path / "half", dtype=torch.float32)
    settings = {"truncate_dim": 8, "default_prompt_name": "query", "query_length": 7, "document_length": 9}
    for name, value in settings.items():
        setattr(model, name, value)
    state = {name: value + 1e-5 for name, value in model.state_dict().items()}
    for number, given in enumerate((None, state)):
        model.save_pretrained(tmp_path / str(number), state_dict=given)
        again = open_encoder(tmp_path / str(number))
        assert {name: getattr(again, name) for name in settings} == settings
        expected = model.state_dict() if given is None else given
        assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
