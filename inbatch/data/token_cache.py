"""The tokens of each text, kept in two files that all ranks, workers and runs share, so that it is tokenised once.

`NAME.entries` holds one entry a text, appended: a header (digest of text and length limit, checksum, number of tokens)
and the tokens. `NAME.table` is a hash table of their places, in buckets of eight. Nothing is locked: an entry counts
only if its header has the digest of the text asked for and its checksum is right. An entry that another process
overwrote, cut or did not finish counts as missing, and its text is tokenised again.

Shapes: B texts, T token positions.
"""

import errno
import hashlib
import json
import os
import struct
import sys
import tempfile
import weakref
import zlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inbatch.data.collator import Tokenize
from inbatch.data.index import places, writable
from inbatch.data.lines import Rows
from inbatch.data.records import Example

_ENTRY = struct.Struct("<16sIHH")  # digest, checksum of the tokens, how many, bytes of each
_BUCKET = struct.Struct("<8Q")  # tag << 48 | place of the entry + 1; 0 is free
_PLACE = (1 << 48) - 1


class TokenCache:
    """`tokenize(texts, max_length)` with a memory: the same tensors, bit for bit.

    tokenize: returns padded int64 `input_ids` and `attention_mask` [B, T], T the longest text's length, every row
    tokenised alone. path: the beginning of the files' names, which must tell tokenizers and their settings apart.
    texts: about their number. pad_id, padding_side: how rows are padded. If nothing can be written, tokenising goes on.
    """

    def __init__(self, tokenize: Tokenize, path: Path, *, texts: int, pad_id: int, padding_side: str = "right"):
        self._tokenize, self._pad_id, self._left = tokenize, pad_id, padding_side == "left"
        # Half full at most, so that hardly any bucket overflows.
        self._buckets = 1 << max(4, (max(1, texts) - 1).bit_length() - 2)
        name = f"{path.name}-{self._buckets}"
        self._paths = path.with_name(f"{name}.entries"), path.with_name(f"{name}.table")
        self._files: tuple[int, int] | None = None
        self._process = 0
        self._writes = True
        self._open()  # so that a folder that cannot be used is named once, before workers are forked

    def __call__(self, texts: list[str], max_length: int) -> dict[str, Tensor]:
        self._open()
        digests = [_digest(max_length, text) for text in texts]
        rows = {digest: self._find(digest, max_length) for digest in digests}
        missing = {digest: text for digest, text in zip(digests, texts, strict=True) if rows[digest] is None}
        if missing:
            tokens = self._tokenize(list(missing.values()), max_length)
            ids_BT, real_BT = tokens["input_ids"].numpy(), tokens["attention_mask"].bool().numpy()
            made = {digest: ids_BT[row][real_BT[row]] for row, digest in enumerate(missing)}
            rows |= made
            self._keep(made)
        return self._padded([rows[digest] for digest in digests])

    def _padded(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        lengths_B = np.array([len(row) for row in rows])
        width = int(lengths_B.max(initial=0))
        columns_T = np.arange(width)
        real_BT = columns_T >= width - lengths_B[:, None] if self._left else columns_T < lengths_B[:, None]
        ids_BT = np.full(real_BT.shape, self._pad_id, np.int64)
        ids_BT[real_BT] = np.concatenate(rows)
        return {"input_ids": torch.from_numpy(ids_BT), "attention_mask": torch.from_numpy(real_BT.astype(np.int64))}

    # ---- the files

    def _open(self) -> None:
        """Open the files in this process, for forked workers would share their positions."""
        if self._process == os.getpid() or not self._writes:
            return
        self._process, self._files = os.getpid(), None
        try:
            self._paths[0].parent.mkdir(parents=True, exist_ok=True)
            entries, table = (
                os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND * (path is self._paths[0]), 0o666)
                for path in self._paths
            )
        except OSError as error:
            self._complain(error)
            return
        self._files = entries, table
        for file in self._files:
            weakref.finalize(self, os.close, file)

    def _find(self, digest: bytes, max_length: int) -> np.ndarray | None:
        if self._files is None:
            return None
        entries, _ = self._files
        for slot in self._bucket(digest):
            if slot and slot >> 48 == _tag(digest):
                entry = os.pread(entries, _ENTRY.size + 4 * max_length, (slot & _PLACE) - 1)
                if len(entry) < _ENTRY.size:
                    continue
                known, checksum, count, itemsize = _ENTRY.unpack_from(entry)
                content = entry[_ENTRY.size : _ENTRY.size + count * itemsize]
                if known == digest and len(content) == count * itemsize and zlib.crc32(content) == checksum:
                    return np.frombuffer(content, f"<u{itemsize}")
        return None

    def _bucket(self, digest: bytes) -> tuple[int, ...]:
        assert self._files is not None
        data = os.pread(self._files[1], _BUCKET.size, self._bucket_place(digest))
        return _BUCKET.unpack(data.ljust(_BUCKET.size, b"\0"))

    def _bucket_place(self, digest: bytes) -> int:
        return int.from_bytes(digest[:8], "little") % self._buckets * _BUCKET.size

    def _keep(self, rows: Mapping[bytes, np.ndarray]) -> None:
        if self._files is None or not self._writes:
            return
        file, table = self._files
        entries = [_entry(digest, row) for digest, row in rows.items()]
        try:
            block = b"".join(entries)
            written = os.write(file, block)
            # The file is appended to as a whole, whoever else appends, and the position is behind what was written.
            place = os.lseek(file, 0, os.SEEK_CUR) - written
            if written < len(block):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for digest, entry in zip(rows, entries, strict=True):
                bucket = self._bucket(digest)
                # The first free slot; in a full bucket any other text makes room.
                free = bucket.index(0) if 0 in bucket else digest[8] % len(bucket)
                slot = _tag(digest) << 48 | (place + 1)
                os.pwrite(table, slot.to_bytes(8, "little"), self._bucket_place(digest) + 8 * free)
                place += len(entry)
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        self._writes = False
        print(f"{self._paths[0]}: tokens cannot be kept ({error.strerror}): tokenising goes on", file=sys.stderr)


def with_memory(
    tokenize: Tokenize, tokenizer: Any, examples: Rows[Example], kept: str | bool, *, repeats: bool
) -> Tokenize:
    """Return `tokenize`, a transformers tokenizer's, with a memory of the texts of `examples`.

    kept: a folder for it; "auto" (or True): with the index of the examples' files (see `inbatch.data.index`), if
    `repeats`, which says that texts will be asked for again; "off" (or False): no memory.
    """
    automatic = kept in ("auto", True)
    if kept in ("off", False) or (automatic and not (repeats and examples.files)):
        return tokenize
    named = "tokens", tokenizer_digest(tokenizer)
    if automatic:
        path = next((path for path in places(examples.files, *named) if writable(path.parent)), None)
        if path is None:
            return tokenize
    elif writable(Path(kept)):
        path = Path(kept) / "-".join(named)
    else:
        raise ValueError(f"data.token_cache is {kept!r}, which is not a writable folder: name another")
    first = examples[0]
    return TokenCache(
        tokenize,
        path,
        texts=len(examples) * (1 + len(first.positives) + len(first.negatives)),
        pad_id=tokenizer.pad_token_id,
        padding_side=tokenizer.padding_side,
    )


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a digest of a transformers tokenizer: of the files that it writes, its class and its library's version."""
    digest = hashlib.blake2b(f"{type(tokenizer)} {version('tokenizers')}".encode(), digest_size=16)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).iterdir()):
            content = path.read_bytes()
            if path.name == "tokenizer.json":  # which remembers how the last text was padded and cut
                state = json.loads(content)
                content = json.dumps({**state, "padding": None, "truncation": None}).encode()
            digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _digest(max_length: int, text: str) -> bytes:
    return hashlib.blake2b(f"{max_length} {text}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _tag(digest: bytes) -> int:
    return int.from_bytes(digest[-2:], "little")


def _entry(digest: bytes, row: np.ndarray) -> bytes:
    itemsize = 2 if row.max(initial=0) < 1 << 16 else 4
    content = row.astype(f"<u{itemsize}").tobytes()
    return _ENTRY.pack(digest, zlib.crc32(content), len(row), itemsize) + content
