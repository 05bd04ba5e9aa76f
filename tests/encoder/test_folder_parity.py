"""Generated model folders: each has sentence-transformers' embeddings, or is refused by the name of its setting."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer

from inbatch import BiEncoderModel
from tests.tiny_models import CONFIGS, TEXTS, save_tiny

FOLDERS = int(os.environ.get("INBATCH_TEST_FOLDERS", "500"))
TRANSFORMER_FILES = [
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]
TOP, POOLING, NORMALIZE = "config_sentence_transformers.json", "1_Pooling/config.json", "2_Normalize/config.json"
LONG = "The DOG ran and THE cat sat on a red mat where the slow dog is fast and the cat is blue"
PAD = {"pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0, "pad_token": "<pad>"}


def ending(number: int, *, types: int = 0) -> dict:
    """A post-processor of tokenizer.json that ends texts with this id and gives them this token type."""
    token = {"id": "</s>", "ids": [number], "tokens": ["</s>"]}
    single = [{"Sequence": {"id": "A", "type_id": types}}, {"SpecialToken": {"id": "</s>", "type_id": types}}]
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {"</s>": token}}


# file -> setting -> values that are honoured or change nothing. "transformer" is the Transformer module's file.
HONOURED = {
    TOP: {
        "prompts": [{"query": "query "}, {"query": "the ", "document": "a dog is "}, {"other": "Red ", "query": None}],
        "default_prompt_name": [None, "query", "document"],
        "similarity_fn_name": [None, "cosine", "dot", "euclidean", "manhattan"],
        "truncate_dim": [None, 1, 5, 32, 100],
        "model_type": ["SentenceTransformer"],
        "requirements": [None, {}],
    },
    "transformer": {
        "max_seq_length": [None, 4, 9, 30],
        "do_lower_case": [None, False, True],
        "query_length": [None, 5, 11],
        "document_length": [None, 6, 12],
        "query_expansion": [None],
        "unpad_inputs": [None, False, True],
        "transformer_task": ["feature-extraction"],
        "tokenizer_name_or_path": [None],
        "model_args": [{}, {"trust_remote_code": True}],
        "config_args": [{}],
        "tokenizer_args": [
            {},
            {"model_max_length": 7},
            {"truncation_side": "left", "model_max_length": 6},
            {"padding_side": "right", "unk_token": "dog"},
            {"trust_remote_code": True},
        ],
        "processor_kwargs": [{"truncation_side": "left"}, {"model_max_length": 8}],
        "processing_kwargs": [
            {},
            {"text": {"padding": True}},
            {"chat_template": {"enable_thinking": True}, "image": {}},
        ],
        "modality_config": [{"text": {"method": "forward", "method_output_name": "last_hidden_state"}}],
    },
    POOLING: {
        "include_prompt": [True],
        "pooling_mode": ["mean", "cls", ["lasttoken"], "weightedmean"],
        "pooling_mode_lasttoken": [False, None],
        "pooling_mode_max_tokens": [False],
    },
    NORMALIZE: {"module_input_name": ["sentence_embedding"], "module_output_name": [None, "sentence_embedding"]},
    "modules": {"kwargs": [[], ["task"]], "idx": [0, 7]},
    "tokenizer_config.json": {
        "truncation_side": ["right", "left"],
        "model_max_length": [7, 12, 64, 10**30],
        "padding_side": ["right"],
        "model_input_names": [["input_ids", "attention_mask"], ["input_ids", "token_type_ids", "attention_mask"]],
        "pad_token": ["<pad>", "</s>"],
        "processor_class": [None],
        "chat_template": ["{{ messages }}"],
    },
    "tokenizer.json": {
        "truncation": [None, {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}],
        "padding": [None, {"strategy": {"Fixed": 40}, "direction": "Right"} | PAD],
        "normalizer": [None, {"type": "Lowercase"}, {"type": "Sequence", "normalizers": [{"type": "NFKC"}]}],
        "post_processor": [None, ending(2)],
    },
    "config.json": {
        "return_dict": [True, False],
        "output_hidden_states": [True, False],
        "auto_map": [{}],
        "processor_class": [None],
    },
}
REFUSED = {
    TOP: {
        "prompts": [{"query": 5}, ["query"], {"query": ["a"]}],
        "default_prompt_name": ["missing", 3],
        "similarity_fn_name": ["maxsim", 1],
        "truncate_dim": [0, -3, "7", 2.5, True],
        "model_type": ["SparseEncoder", "CrossEncoder", "ColBERT"],
        "requirements": [{"transformers": ">=4"}],
        "query_prefix": ["query: "],
    },
    "transformer": {
        "max_seq_length": [0, -1, "9", 9.0, True, [9]],
        "do_lower_case": ["false", 1],
        "query_length": [0, "5"],
        "document_length": [-4, 1.5],
        "query_expansion": [{"strategy": "fixed", "length": 8}],
        "transformer_task": ["fill-mask", "text-generation", None],
        "tokenizer_name_or_path": ["elsewhere"],
        "model_args": [{"dtype": "bfloat16"}, [1]],
        "model_kwargs": [{"attn_implementation": "eager"}],
        "config_args": [{"num_hidden_layers": 1}, {"layer_norm_eps": 1.0}],
        "config_kwargs": [{"is_causal": False}],
        "tokenizer_args": [{"model_max_length": 0}, {"truncation_side": "up"}, {"split_special_tokens": True}, 5],
        "processor_kwargs": [{"subfolder": "x"}],
        "processing_kwargs": [
            {"text": {"max_length": 5}},
            {"common": {"add_special_tokens": False}},
            {"text": {"truncation": False}},
            {"max_length": 5},
        ],
        "modality_config": [
            {"text": {"method": "forward", "method_output_name": ["hidden_states", 1]}},
            {"message": {"method": "forward", "method_output_name": "last_hidden_state"}},
        ],
        "pooling": ["cls"],
    },
    POOLING: {
        "include_prompt": [False, None, 1],
        "pooling_mode": ["max", ["mean", "cls"], [], None, "median", 4],
        "pooling_mode_lasttoken": ["yes"],
        "pooling_mode_max_tokens": [True],
        "layer": [-2],
    },
    NORMALIZE: {"module_input_name": ["token_embeddings"], "module_output_name": ["token_embeddings"], "eps": [1e-3]},
    "modules": {"kwargs": [{"a": 1}], "config": [{"pooling": "cls"}]},
    "tokenizer_config.json": {
        "truncation_side": ["middle"],
        "model_max_length": [0, "12", 7.5],
        "padding_side": ["up"],
        "model_input_names": [["input_ids"]],
        "processor_class": ["CLIPProcessor"],
    },
    "tokenizer.json": {"post_processor": [ending(24)]},
    "config.json": {"auto_map": [None], "processor_class": ["CLIPProcessor"]},
}
RIGHT, WRONG = ([(file, key) for file, keys in table.items() for key in keys] for table in (HONOURED, REFUSED))
# What a refusal calls a setting, where not by its name.
CALLED = {"post_processor": "largest id", "pooling_mode_max_tokens": "pooling mode"}


def base_folder(kind: str, folder: Path) -> Path:
    """A folder whose length limit is the tokenizer's own, so that every file can set one."""
    model = BiEncoderModel.from_pretrained(
        save_tiny(kind, folder / "backbone"), bidirectional=False if kind in DECODERS else None
    )
    model.max_seq_length = None
    model.save_pretrained(folder / "model")
    return folder / "model"


DECODERS = ("llama", "qwen3", "ministral3")


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("bases")
    return {kind: base_folder(kind, home / kind) for kind in CONFIGS}


Edits = list[tuple[str, str, Any]]


def draw(rng: random.Random) -> tuple[Edits, str | None]:
    """Up to four settings that are honoured, and perhaps one that is refused; its name."""
    wrong = rng.choice(WRONG) if rng.random() < 0.4 else None
    right = rng.sample([name for name in RIGHT if name != wrong], rng.randint(0, 4))
    # These two names of one setting are refused together, and override the tokenizer's file.
    names = [name for name in [wrong, *right] if name and name[1] in ("tokenizer_args", "processor_kwargs")]
    kept = names[: not (wrong and wrong[0] == "tokenizer_config.json")]
    right = [name for name in right if name not in names or name in kept]
    edits = [(file, key, rng.choice(HONOURED[file][key])) for file, key in right]
    if wrong is None:
        return edits, None
    file, key = wrong
    return [*edits, (file, key, rng.choice(REFUSED[file][key]))], CALLED.get(key, key.replace("_", " "))


def generate(base: Path, folder: Path, edits: Edits, rng: random.Random) -> None:
    """A copy of `base` with these settings, under one of the file names and layouts that are in use."""
    files = {file for file, _, _ in edits}
    shutil.copytree(base, folder, copy_function=os.link)
    renamed = rng.choice(TRANSFORMER_FILES)
    contents = {
        path.relative_to(folder).as_posix(): json.loads(path.read_text())
        for path in folder.rglob("*.json")
        if path.name != "tokenizer.json" or "tokenizer.json" in files
    }
    contents[renamed] = contents.pop("sentence_bert_config.json")
    (folder / "sentence_bert_config.json").unlink()
    if rng.random() < 0.2:
        contents["sentence_bert_config.json"] = {}  # sentence-transformers looks on
    modules = contents["modules.json"]
    if rng.random() < 0.5:
        names = iter(
            (
                "base.modules.transformer.Transformer",
                "sentence_transformer.modules.pooling.Pooling",
                "base.modules.normalize.Normalize",
            )
        )
        for module in modules:
            module["type"] = f"sentence_transformers.{next(names)}"
    if rng.random() < 0.4 and NORMALIZE not in files:
        modules.pop()
    for file, key, value in edits:
        if file == "modules":
            modules[0][key] = value
            continue
        contents[renamed if file == "transformer" else file][key] = value
        if key == "modality_config":
            contents[renamed]["module_output_name"] = "token_embeddings"
    if rng.random() < 0.3:
        modules[0]["path"] = "0_Transformer"
        inner = folder / "0_Transformer"
        inner.mkdir()
        for path in [*folder.iterdir()]:
            if path.is_file() and path.name not in ("modules.json", TOP):
                path.rename(inner / path.name)
        contents = {
            name if "/" in name or name in ("modules.json", TOP) else f"0_Transformer/{name}": value
            for name, value in contents.items()
        }
    for name, value in contents.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_text(json.dumps(value))


def theirs(model: SentenceTransformer, texts: list[str], task: str | None = None, **options) -> torch.Tensor:
    encode = {None: model.encode, "query": model.encode_query, "document": model.encode_document}[task]
    return encode(texts, convert_to_tensor=True, show_progress_bar=False, **options)


@torch.no_grad()
def require_equal(model: BiEncoderModel, reference: SentenceTransformer) -> None:
    texts = [*TEXTS, LONG]
    pairs = [(model.tokenize(texts), theirs(reference, texts, prompt=""))]
    pairs += [(model.tokenize(texts, task=task), theirs(reference, texts, task)) for task in ("query", "document")]
    if "other" in model.prompts:
        pairs.append((model.tokenize(texts, prompt="other"), theirs(reference, texts, prompt_name="other")))
    for batch, expected_BD in pairs:
        scale = max(1.0, expected_BD.abs().max().item())
        torch.testing.assert_close(model(batch), expected_BD, rtol=0, atol=1e-5 * scale)
    assert (model.similarity, model.embedding_dim) == (
        reference.similarity_fn_name,
        reference.get_embedding_dimension(),
    )
    assert model.default_prompt_name == reference.default_prompt_name


def test_generated_folders_have_their_embeddings_or_are_refused_by_name(bases, tmp_path):
    rng = random.Random(0)
    opened = refused = 0
    for number in range(FOLDERS):
        kind = rng.choice(list(bases))
        edits, wrong = draw(rng)
        folder = tmp_path / str(number)
        generate(bases[kind], folder, edits, rng)
        where = f"folder {number} ({kind}): {edits}"
        try:
            model = BiEncoderModel.from_pretrained(folder)
        except ValueError as error:
            message = str(error)
            assert wrong is not None, f"{where}: refused: {message}"
            assert wrong in message.lower().replace("_", " "), f"{where}: {message}"
            assert "\n" not in message
            refused += 1
        else:
            assert wrong is None, f"{where}: opened"
            try:
                require_equal(model, SentenceTransformer(str(folder)))
                if number % 8 == 0:
                    model.save_pretrained(folder / "again")
                    require_equal(model, SentenceTransformer(str(folder / "again")))
                    require_equal(BiEncoderModel.from_pretrained(folder / "again"), SentenceTransformer(str(folder)))
            except Exception as error:
                raise AssertionError(f"{where}: {error}") from error
            opened += 1
        shutil.rmtree(folder)
    assert min(opened, refused) >= FOLDERS / 4


@pytest.mark.parametrize("kind", CONFIGS)
def test_padding_on_the_left_opens_where_it_moves_nothing(bases, tmp_path, kind):
    """Learned positions, positions that scale and weighted means count sentence-transformers' padding."""
    folder = shutil.copytree(bases[kind], tmp_path / "model")
    set_key(folder / "tokenizer_config.json", padding_side="left")
    if kind in ("bert", "roberta", "ministral3"):
        with pytest.raises(ValueError, match="padding_side left shifts the positions"):
            BiEncoderModel.from_pretrained(folder)
        return
    require_equal(BiEncoderModel.from_pretrained(folder), SentenceTransformer(str(folder)))
    set_key(folder / POOLING, pooling_mode="weightedmean")
    with pytest.raises(ValueError, match="padding_side left shifts the weights"):
        BiEncoderModel.from_pretrained(folder)
    # Saved by us, it pads on the right.
    set_key(folder / POOLING, pooling_mode="mean")
    BiEncoderModel.from_pretrained(folder, pooling="weighted_mean").save_pretrained(folder)
    require_equal(BiEncoderModel.from_pretrained(folder), SentenceTransformer(str(folder)))


def test_token_types_are_refused(bases, tmp_path):
    folder = shutil.copytree(bases["bert"], tmp_path / "model")
    set_key(folder / "tokenizer_config.json", model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    set_key(folder / "tokenizer.json", post_processor=ending(2, types=1))
    with pytest.raises(ValueError, match="a token type other than 0 is not supported"):
        BiEncoderModel.from_pretrained(folder)


def set_key(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
