"""Stable integer ids of strings. Needs Python alone."""

import hashlib


def stable_id(namespace: str, key: str) -> int:
    """Return a signed 64-bit id of ``key`` within ``namespace``: the same in every process and on every machine.

    The first 8 bytes of BLAKE2b over both parts (length-prefixed, so that ("ab", "c") and ("a", "bc") differ).
    Never -1, which means "unknown". Two of ten million keys collide with probability 3e-6.
    """
    space = namespace.encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(digest_size=8)
    digest.update(len(space).to_bytes(8, "little") + space + key.encode("utf-8", "surrogatepass"))
    value = int.from_bytes(digest.digest(), "little", signed=True)
    return value if value != -1 else -2
