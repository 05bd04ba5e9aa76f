"""Tokens once: the same tensors with and without the cache, whatever happened to its files."""

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from inbatch.data import open_examples
from inbatch.data.batches import Batches
from inbatch.data.collator import Collator
from inbatch.data.plan import Mixture
from inbatch.data.records import Example, Passage
from inbatch.data.token_cache import TokenCache, tokenizer_digest, with_memory
from tests.data_files import one_line, tokenize, write_jsonl
from tests.tiny_models import tiny_tokenizer

TEXTS = [f"{number} text " + "é" * (number % 50) for number in range(200)] + ["", "\U0001f600" * 3]


class Counted:
    """The tokenizer of characters; counts the texts that it was asked for."""

    def __init__(self, left: bool = False):
        self.texts, self._left = 0, left

    def __call__(self, texts: list[str], max_length: int) -> dict[str, torch.Tensor]:
        self.texts += len(texts)
        tokens = tokenize(texts, max_length)
        return {name: value.flip(1) for name, value in tokens.items()} if self._left else tokens


def cache(tokenizer, folder: Path, **options) -> TokenCache:
    return TokenCache(tokenizer, folder / "name", **{"texts": 500, "pad_id": 0} | options)


def files(folder: Path) -> dict[str, Path]:
    return {path.suffix: path for path in folder.iterdir()}


def assert_same(ours, expected) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor)


@pytest.mark.parametrize("left", [False, True])
def test_the_same_tensors_from_one_pass(tmp_path, left):
    counted = Counted(left)
    side = {"padding_side": "left" if left else "right"}
    first = cache(counted, tmp_path, **side)
    assert_same(first(TEXTS[:150], 30), counted(TEXTS[:150], 30))
    counted.texts = 0
    assert_same(first(TEXTS[100:], 30), Counted(left)(TEXTS[100:], 30))
    assert counted.texts == len(TEXTS) - 150  # only those that were not there
    counted.texts = 0
    again = cache(counted, tmp_path, **side)  # another run
    assert_same(again(TEXTS[::-1], 30), Counted(left)(TEXTS[::-1], 30))
    assert_same(again(["", ""], 30), {name: value[:, :0] for name, value in Counted()(["a", "a"], 30).items()})
    assert counted.texts == 0


def test_a_length_is_another_entry(tmp_path):
    counted = Counted()
    memory = cache(counted, tmp_path)
    for length in (5, 9, 5, 9):
        assert_same(memory(TEXTS, length), Counted()(TEXTS, length))
    assert counted.texts == 2 * len(TEXTS)


def truncate_tokens(folder: Path) -> None:
    os.truncate(files(folder)[".entries"], files(folder)[".entries"].stat().st_size // 2)


def truncate_table(folder: Path) -> None:
    os.truncate(files(folder)[".table"], files(folder)[".table"].stat().st_size // 2 + 5)


def without_tokens(folder: Path) -> None:
    files(folder)[".entries"].unlink()


def without_table(folder: Path) -> None:
    files(folder)[".table"].unlink()


def flip_tokens(folder: Path) -> None:
    data = np.fromfile(files(folder)[".entries"], np.uint8)
    (data ^ (np.arange(len(data)) % 7 == 0)).tofile(files(folder)[".entries"])


def shuffle_table(folder: Path) -> None:
    table = np.fromfile(files(folder)[".table"], np.uint64)
    np.random.default_rng(0).permutation(table).tofile(files(folder)[".table"])


def swap_places(folder: Path) -> None:
    """Every slot keeps its tag, and leads to another entry."""
    table = np.fromfile(files(folder)[".table"], np.uint64)
    used = np.flatnonzero(table)
    places = table[used] & np.uint64(2**48 - 1)
    table[used] = (table[used] >> np.uint64(48) << np.uint64(48)) | np.roll(places, 1)
    table.tofile(files(folder)[".table"])


@pytest.mark.parametrize(
    "damage",
    [truncate_tokens, truncate_table, without_tokens, without_table, flip_tokens, shuffle_table, swap_places],
)
@pytest.mark.parametrize("open_before", [False, True])
def test_broken_files_are_texts_that_are_not_there(tmp_path, damage, open_before):
    expected = Counted()(TEXTS, 30)
    counted = Counted()
    memory = cache(counted, tmp_path)
    memory(TEXTS, 30)
    damage(tmp_path)
    if not open_before:
        memory = cache(counted, tmp_path)
    for _ in range(3):
        assert_same(memory(TEXTS, 30), expected)
    counted.texts = 0
    mended = cache(counted, tmp_path)
    assert_same(mended(TEXTS, 30), expected)
    assert_same(mended(TEXTS, 30), expected)
    assert counted.texts <= len(TEXTS)


def test_a_full_table_makes_room(tmp_path):
    texts = [f"text {number}" for number in range(3000)]
    counted = Counted()
    memory = cache(counted, tmp_path, texts=10)
    for _ in range(2):
        assert_same(memory(texts, 30), Counted()(texts, 30))
    assert 3000 < counted.texts < 6000  # some are found


def test_a_folder_that_cannot_be_used_costs_the_memory_alone(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    memory = cache(Counted(), tmp_path / "file" / "below")
    for _ in range(2):
        assert_same(memory(TEXTS, 30), Counted()(TEXTS, 30))
    assert capsys.readouterr().err.count("tokens cannot be kept (Not a directory)") == 1


def test_a_full_disk_costs_the_memory_alone(capsys):
    if not os.access("/dev/full", os.W_OK):
        pytest.skip("there is no /dev/full here")
    memory = cache(Counted(), Path("/tmp"))
    tokens, table = memory._paths
    for path in (tokens, table):
        path.unlink()
        path.symlink_to("/dev/full")
    try:
        memory = cache(Counted(), Path("/tmp"))
        for _ in range(2):
            assert_same(memory(TEXTS, 30), Counted()(TEXTS, 30))
    finally:
        tokens.unlink()
        table.unlink()
    assert capsys.readouterr().err.count("tokens cannot be kept (No space left on device)") == 1


def _hammer(folder: Path, seed: int, failures) -> None:
    rng = np.random.default_rng(seed)
    memory = cache(Counted(), folder)
    for _ in range(40):
        texts = [TEXTS[i] for i in rng.integers(0, len(TEXTS), 50)]
        ours, expected = memory(texts, 30), Counted()(texts, 30)
        if not all(torch.equal(ours[name], expected[name]) for name in expected):
            failures.put(seed)


def test_several_processes_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    failures = context.SimpleQueue()
    processes = [context.Process(target=_hammer, args=(tmp_path, seed, failures)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    assert failures.empty()
    counted = Counted()
    cache(counted, tmp_path)(TEXTS, 30)
    assert counted.texts == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_with_and_without(tmp_path, workers):
    examples = [
        Example(query=f"q{i}", positives=(Passage(f"p{i}"), Passage(f"other {i}")), negatives=(Passage(f"n{i % 3}"),))
        for i in range(50)
    ]

    def steps(tokenizer):
        collate = Collator(tokenizer, query_max_len=30, passage_max_len=40)
        plan = Mixture(sizes=(len(examples),), global_batch_size=8)
        batches = Batches(examples, plan, collate, rank=0, world_size=1)
        return list(batches.ahead_from(0, 28, num_workers=workers))

    expected = steps(tokenize)
    counted = Counted()
    for _ in range(2):
        found = steps(cache(counted, tmp_path))
        for ours, theirs in zip(found, expected, strict=True):
            for part, other in zip(ours, theirs, strict=True):
                assert_same(part.batch.queries, other.batch.queries)
                assert_same(part.batch.passages, other.batch.passages)
    if not workers:
        assert counted.texts == 50 + 50 + 50 + 3


def test_where_tokens_are_kept(tmp_path):
    path = write_jsonl(tmp_path / "data" / "a.jsonl", [{"query": "the cat", "pos": "a dog"}] * 3)
    examples, tokenizer = open_examples(path), tiny_tokenizer()

    def memory(kept, *, repeats=True, tokenizer=tokenizer):
        return with_memory(tokenize, tokenizer, examples, kept, repeats=repeats)

    assert memory("off") is memory(False) is memory("auto", repeats=False) is tokenize
    assert not (path.parent / ".inbatch").exists()
    memory("auto")(["a"], 9)
    assert {p.suffix for p in (path.parent / ".inbatch").glob("a.jsonl.tokens-*")} == {".entries", ".table"}
    other = tiny_tokenizer()
    other.add_tokens(["newword"])
    for which in (tokenizer, tokenizer, other):
        memory(str(tmp_path / "given"), repeats=False, tokenizer=which)(["a"], 9)
    assert len(list((tmp_path / "given").iterdir())) == 4
    with pytest.raises(ValueError, match=r"data.token_cache is .*not a writable folder") as error:
        memory(str(path))
    one_line(error)


def test_a_tokenizers_digest_is_of_what_decides_the_tokens():
    tokenizer, other = tiny_tokenizer(), tiny_tokenizer()
    digest = tokenizer_digest(tokenizer)
    tokenizer(["a b c"], padding=True, truncation=True, max_length=2)
    assert tokenizer_digest(tokenizer) == tokenizer_digest(other) == digest
    other.truncation_side = "left"
    other.init_kwargs["truncation_side"] = "left"
    assert tokenizer_digest(other) != digest
    added = tiny_tokenizer()
    added.add_tokens(["newword"])
    assert tokenizer_digest(added) != digest
