"""Would a lossless compression of KV pay? Measured on the cache of the demo model after real text.

`python -m bench.memory.kv_compression` runs the repository's own pages through the engine, in fp32
and in bf16, and compresses what lies in the KV cache, block run by block run: as it is, and with
the bytes of each element's place put together ("planes"), with zlib, LZ4 and Zstandard at their
fast levels.
"""

from __future__ import annotations

import argparse
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import lz4.frame
import numpy as np
import torch
import zstandard

from bench.lib.card import Check, pin, report, table
from bench.lib.drive import drive
from bench.lib.models import DEMO_DIR, REPO_ROOT
from cluster.config import Config
from deployments.loading import ModelSource, load_engine, load_local_experts
from engine.text.tokenizer import Tokenizer

PAGES = ("README.md", "docs/architecture.md", "CONTRIBUTING.md", "docs/LOG.md")
NUM_TOKENS = 2048
DTYPES = ("float32", "bfloat16")

Codec = tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]
CODECS: dict[str, Codec] = {
    "zlib 1": (lambda data: zlib.compress(data, 1), zlib.decompress),
    "LZ4": (lz4.frame.compress, lz4.frame.decompress),
    "Zstandard 1": (zstandard.ZstdCompressor(1).compress, zstandard.ZstdDecompressor().decompress),
    "Zstandard -5": (
        zstandard.ZstdCompressor(-5).compress,
        zstandard.ZstdDecompressor().decompress,
    ),
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the card, return the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-keep", dest="keep", action="store_false", help="write no file")
    args = parser.parse_args(argv)
    pin(2)
    results = {
        dtype: measure(cache_contents(dtype), 4 if dtype == "float32" else 2) for dtype in DTYPES
    }
    best = max(
        min(one["pack_gb_per_s"], one["unpack_gb_per_s"])
        for by in results.values()
        for one in by.values()
        if one["ratio"] >= 1.2
    )
    check = Check("the fastest that saves a sixth, both ways", best, "GB/s", 1.5)
    return report("kv_compression", results, [check], card(results), num_threads=1, keep=args.keep)


def cache_contents(dtype: str) -> list[bytes]:
    """K and V of each layer that has any, after a prompt of real text."""
    torch.set_num_threads(2)
    config = Config.load(None, {"dtype": dtype, "experts.mode": "local"})
    source = ModelSource.open(config)
    engine: Any = load_engine(config, source, load_local_experts(config, source))
    text = "\n".join((REPO_ROOT / page).read_text() for page in PAGES)
    prompt = Tokenizer.load(DEMO_DIR).encode(text)[:NUM_TOKENS]
    drive(engine, [prompt], 1)
    contents = []
    for layer in engine.runner.kv_tensors.values():
        for tensor in layer.stored:
            written = tensor[tensor.flatten(1).ne(0).any(1)]  # [num_blocks, block_size, heads, dim]
            contents.append(written.contiguous().view(torch.uint8).numpy().tobytes())
    return contents


def measure(contents: Sequence[bytes], element_bytes: int) -> dict[str, dict[str, float]]:
    """Ratio and speeds of each codec, with and without planes; the planes' time counts."""
    found = {}
    for name, (pack, unpack) in CODECS.items():
        found[name] = _measure(contents, pack, unpack)
        found[f"{name}, planes"] = _measure(
            contents,
            lambda data, pack=pack: pack(planes(data, element_bytes)),  # type: ignore[misc]
            lambda data, unpack=unpack: elements(unpack(data), element_bytes),  # type: ignore[misc]
        )
    return found


def planes(data: bytes, element_bytes: int) -> bytes:
    """All first bytes, then all second bytes, and so on."""
    return np.frombuffer(data, np.uint8).reshape(-1, element_bytes).T.tobytes()


def elements(data: bytes, element_bytes: int) -> bytes:
    """The inverse of `planes`."""
    return np.frombuffer(data, np.uint8).reshape(element_bytes, -1).T.tobytes()


def _measure(
    contents: Sequence[bytes], pack: Callable[[bytes], bytes], unpack: Callable[[bytes], bytes]
) -> dict[str, float]:
    num_bytes = sum(map(len, contents))
    pack_s, unpack_s = [], []
    for _ in range(3):
        start = time.perf_counter()
        packed = [pack(data) for data in contents]
        middle = time.perf_counter()
        unpacked = [unpack(data) for data in packed]
        pack_s.append(middle - start)
        unpack_s.append(time.perf_counter() - middle)
        assert unpacked == list(contents)
    return {
        "ratio": num_bytes / sum(map(len, packed)),
        "pack_gb_per_s": num_bytes / min(pack_s) / 1e9,
        "unpack_gb_per_s": num_bytes / min(unpack_s) / 1e9,
        "mb": num_bytes / 1e6,
    }


def card(results: dict[str, Any]) -> list[str]:
    lines = []
    for dtype, by_codec in results.items():
        rows = [
            [
                name,
                f"{one['ratio']:.2f}",
                f"{one['pack_gb_per_s']:.2f}",
                f"{one['unpack_gb_per_s']:.2f}",
            ]
            for name, one in by_codec.items()
        ]
        size = next(iter(by_codec.values()))["mb"]
        lines += [
            f"{dtype}: {size:.1f} MB of KV",
            *table(["", "smaller by", "pack GB/s", "unpack GB/s"], rows),
        ]
    return lines


if __name__ == "__main__":
    main()
