"""Compiles the attention kernel for a GPU without one: `python -m
tests.support.engine.compile_kernels`.

Prints the most shared memory, in bytes, that any variant for the 26B's global layers takes.
"""

from __future__ import annotations

from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.attention.triton_attention import CHUNK_ROWS, KEYS, MIN_ROWS
from engine.attention.triton_kernel import attend

TARGET = GPUTarget("cuda", 89, 32)
ITEM_SIZES = {"bf16": 2, "fp32": 4}
POINTERS = {name: "*fp32" for name in ("offset_cos", "offset_sin", "block_cos", "block_sin")} | {
    "tables": "*i64",
    "tiles": "*i32",
    "out": "*fp32",
    "log_sums": "*fp32",
}
CACHE = ("query", "key", "value", "weight")
SIZES = ("num_outs", "num_kv_heads", "table_width", "window")


def shared_bytes(dtype: str, num_rows: int, shared_kv: bool) -> int:
    """Compile one variant. Raises a TritonError if it doesn't compile."""
    constants = {
        "GROUP": 8,
        "HEAD_DIM": 512,
        "ROTATING": 64,
        "BLOCK_SIZE": 16,
        "ROWS": num_rows,
        "KEYS": KEYS[ITEM_SIZES[dtype]],
        "SHARED_KV": shared_kv,
    }
    types = POINTERS | dict.fromkeys(CACHE, f"*{dtype}") | dict.fromkeys(SIZES, "i32")
    names = [parameter.name for parameter in attend.params]
    source = ASTSource(
        fn=attend,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names)
            if types.get(name, "").startswith("*")
        },
    )
    compiled = compile_kernel(source, target=TARGET, options={"num_warps": 8, "num_stages": 2})
    assert compiled.asm["cubin"]
    return int(compiled.metadata.shared)


if __name__ == "__main__":
    print(
        max(
            shared_bytes(dtype, num_rows, shared_kv)
            for dtype, size in ITEM_SIZES.items()
            for num_rows in {MIN_ROWS, CHUNK_ROWS[size]}
            for shared_kv in (True, False)
        )
    )
