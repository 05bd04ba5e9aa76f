"""Compiles variants of the Hopper kernel, which takes no GPU, and prints a JSON line about each."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.pop("TRITON_INTERPRET", None)

from triton import compile
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout

from inbatch.losses.triton.hopper import TILE, exp_kernel


def compiled(keys: int, *, limit: bool, count: bool, keep: bool):
    layout, half, names = NVMMASharedLayout(128, 16), TILE["BM"] // 2, exp_kernel.arg_names
    types = {"positive_ptr": "*i32", "counts": "*i32", "R": "i32", "C": "i32", "D": "i32"}
    types |= {f"{name}_ptr": "*fp32" for name in ("pivot", "scale", "limit", "partial")}
    for name, rows, width in (("rows", half, 64), ("columns", TILE["BN"], 64), ("exp", half, TILE["BN"] // 4)):
        types[name] = f"tensordesc<bf16[{rows}, {width}],{layout!r}>"
    constants = {"LIMIT": limit, "COUNT": count, "KEEP": keep, **TILE}
    signature = {name: types.get(name, "constexpr") for name in names}
    signature["keys"] = (("*i64", "*i64", "i32", "i32", "i32", "i32"),) * keys
    places = {(names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(exp_kernel, signature, places, {})
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


for keys, limit, count, keep in ((0, False, False, True), (1, False, True, False), (2, True, True, True)):
    kernel = compiled(keys, limit=limit, count=count, keep=keep)
    about = {"shared memory": kernel.metadata.shared, "tensor cores": "wgmma.mma_async" in kernel.asm["ptx"]}
    print(json.dumps({"keys": keys, **about}))
