"""Mutated model folders: each opens as a model that embeds, or ends in one ValueError line."""

import base64
import json
import os
import random
import shutil
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest

from inbatch import BiEncoderModel
from tests.tiny_models import TEXTS, save_tiny

MUTATIONS = int(os.environ.get("INBATCH_TEST_MUTATIONS", "1000"))
FILES = (
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    "2_Normalize/config.json",
    "config.json",
    "tokenizer_config.json",
    "tokenizer.json",
)
VALUES = [None, True, False, 0, -1, 1, 3, 10**6, 10**12, 10**30, 1.5, 1e-30, float("nan"), float("inf"), "", "x"]
VALUES += ["../..", "\u0000", "\ud800", [], [1], [None], {}, {"a": 1}, "a" * 5000, "</s>", "left"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("fuzz")
    BiEncoderModel.from_pretrained(save_tiny("bert", home / "backbone")).save_pretrained(home / "model")
    return home / "model"


def places(value: Any, path: tuple = ()) -> list[tuple]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, below in inner for place in places(below, (*path, key))]


def mutate(text: str, rng: random.Random) -> bytes:
    """A value changed, dropped, added or renamed; or the file's bytes cut, flipped or nested."""
    how = rng.random()
    if how < 0.15:
        data = bytearray(text.encode())
        for _ in range(rng.randint(1, 3)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)
    if how < 0.25:
        return rng.choice([text[: rng.randrange(len(text))], "[" * 100_000, '{"a":' * 5000, "9" * 6000, ""]).encode()
    value = json.loads(text)
    *parents, last = rng.choice(places(value) or [("new",)])
    holder = value
    for key in parents:
        holder = holder[key]
    if how < 0.35 and last in holder if isinstance(holder, dict) else False:
        del holder[last]
    elif how < 0.45 and isinstance(holder, dict):
        holder[f"{last}_x"] = holder.get(last)
    else:
        holder[last] = rng.choice(VALUES)
    return json.dumps(value).encode()


def test_a_mutated_folder_opens_or_ends_in_one_line(base, tmp_path):
    rng = random.Random(0)
    texts = {name: (base / name).read_text() for name in FILES}
    folder = shutil.copytree(base, tmp_path / "model")
    opened = 0
    for number in range(MUTATIONS):
        name = rng.choice(FILES)
        content = mutate(texts[name], rng)
        (folder / name).write_bytes(content)
        where = f"mutation {number} of {name}: {content[:2000]!r}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = BiEncoderModel.from_pretrained(folder)
            embeddings_BD = model(model.tokenize(TEXTS))
        except ValueError as error:
            message = str(error)
            if "\n" in message or str(folder) not in message or len(message) > 1500:
                raise AssertionError(f"{where}: {message}") from error
        except BaseException as error:
            raise AssertionError(f"{where}: {error!r}") from error
        else:
            assert embeddings_BD.isfinite().all(), where
            opened += 1
        (folder / name).write_text(texts[name])
    assert MUTATIONS / 10 < opened < MUTATIONS * 0.9


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "config.json",
            {"num_hidden_layers": 1_000_000},
            "num_hidden_layers is 1000000, more than its weights can hold",
        ),
        ("config.json", {"num_labels": 10**9}, "num_labels is 1000000000"),
        ("config.json", {"vocab_size": 10**11}, "config.json describes 3.2e.12 numbers"),
        ("config.json", {"max_position_embeddings": 10**10}, "config.json describes"),
        ("config.json", {"layer_norm_eps": "small"}, "layer_norm_eps|embeds no text"),
        ("config.json", {"hidden_size": 30}, "cannot be opened as a transformers model"),
        ("config.json", {"vocab_size": 23}, "cannot be opened|largest id"),
        ("sentence_bert_config.json", {"max_seq_length": [5]}, r"max_seq_length is \[5\]; expected a positive integer"),
    ],
)
def test_absurd_settings_end_at_once(base, tmp_path, name, changes, message):
    folder = shutil.copytree(base, tmp_path / "model")
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))
    with pytest.raises(ValueError, match=message) as error:
        BiEncoderModel.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_panics_at_a_text_ends_in_one_line(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "model")
    # The trie of its normalizer leads out of itself at the letter z alone, which is found where a text has one.
    units = [0] * 256
    units[ord("z")] = ord("z") | 1 << 8 | 0xFFFFF << 10
    trie = struct.pack("<257I", 4 * len(units), *units) + b"a\0"
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(trie).decode()}
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    model = BiEncoderModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="its tokenizer fails on one of 2 texts, the first of which is 'a'") as error:
        model.tokenize(["a", "zoo"])
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    settings["pre_tokenizer"] = {"type": "FixedLength", "length": 0}
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="its tokenizer takes no text: PanicException") as error:
        BiEncoderModel.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "model")
    model = BiEncoderModel.from_pretrained(folder)
    model.tokenizer.add_tokens(["zebra"])
    model.tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"largest id is 24 \('zebra'\), but the backbone embeds 24 ids"):
        BiEncoderModel.from_pretrained(folder)
