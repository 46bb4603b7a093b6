"""Paged attention on a GPU by the Triton kernel: tiles of queries, splits of keys, and a check."""

from __future__ import annotations

import logging
import subprocess
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.errors import TritonError

from cluster.spec import AttentionKind
from engine.attention.interface import KVTensors, RequestRows, request_rows
from engine.attention.rotary import Rotary
from engine.attention.shared_kv import SharedKV
from engine.attention.torch_attention import FastAttention
from engine.attention.triton_kernel import attend
from engine.batch import Batch

logger = logging.getLogger(__name__)

MIN_ROWS = 16  # of a matrix product on a tensor core
# What fits the registers and the shared memory (99 KiB) of a consumer card at a head size of 512,
# by the bytes of an element: rows (queries x heads of a key head) of a tile, keys of a turn.
CHUNK_ROWS = {2: 32, 4: 16}
KEYS = {2: 32, 4: 16}
SPLIT_KEYS = 256  # a split of fewer keys doesn't pay
TOLERANCE = {2: 2e-2, 4: 1e-3}  # relative, against PyTorch, by the bytes of an element
PROGRAMS = 4  # per multiprocessor, that splits are made for


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Tiles of queries with the same number of rows."""

    tiles: Tensor  # [num_tiles, 5] int32, as the kernel wants them
    tokens: Tensor  # of the batch, those in the tiles, in order
    num_rows: int
    num_keys: int  # of the longest


class TritonAttention:
    """Implements engine.attention.Attention on a GPU, for head sizes that are powers of two.

    The layout `projection` isn't supported: forming their bits takes PyTorch's own norm.
    """

    def __init__(
        self, batch: Batch, kind: AttentionKind, window: int | None, block_size: int
    ) -> None:
        self._spans = request_rows(batch)
        self._table = batch.block_tables[kind].contiguous()
        self._window, self._block_size = window, block_size
        self._plans: dict[int, list[_Tiles]] = {}
        self._angles: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def __call__(self, query: Tensor, kv: KVTensors) -> Tensor:
        assert not kv.is_raw
        group = query.shape[1] // kv.value.shape[2]
        if group not in self._plans:
            self._plans[group] = self._plan(group, query.dtype.itemsize)
        query, out = query.contiguous(), torch.empty_like(query)
        for tiles in self._plans[group]:
            self._attend(tiles, query, kv, out)
        return out.flatten(1)

    def _plan(self, group: int, itemsize: int) -> list[_Tiles]:
        decodes = [span for span in self._spans if span.length == 1]
        chunks = [span for span in self._spans if span.length > 1]
        num_rows = max(MIN_ROWS, triton.next_power_of_2(group))
        plans = []
        if decodes:
            plans.append(self._tiles(decodes, num_rows, 1))
        if chunks:
            num_rows = max(num_rows, CHUNK_ROWS[itemsize])
            plans.append(self._tiles(chunks, num_rows, num_rows // group))
        return plans

    def _tiles(self, spans: list[RequestRows], num_rows: int, num_tokens: int) -> _Tiles:
        """The spans cut in tiles of at most `num_tokens`."""
        device = self._table.device
        tiles: list[tuple[int, ...]] = []
        tokens: list[int] = []
        for span in spans:
            for i in range(0, span.length, num_tokens):
                length, start = min(num_tokens, span.length - i), span.start + i
                tiles.append((span.request, start, span.position + i, length, len(tokens)))
                tokens += range(start, start + length)
        longest = max(span.position + span.length for span in spans)
        return _Tiles(
            torch.tensor(tiles, dtype=torch.int32).to(device, non_blocking=True),
            torch.tensor(tokens).to(device, non_blocking=True),
            num_rows,
            longest if self._window is None else min(longest, self._window + num_tokens),
        )

    def _attend(self, tiles: _Tiles, query: Tensor, kv: KVTensors, out: Tensor) -> None:
        num_outs, num_heads, head_dim = len(tiles.tokens), *query.shape[1:]
        num_kv_heads = kv.value.shape[2]
        num_keys = KEYS[query.dtype.itemsize]
        num_splits = _num_splits(len(tiles.tiles) * num_kv_heads, tiles.num_keys, query.device)
        log_sums = query.new_empty(num_splits, num_outs, num_heads, dtype=torch.float32)
        parts = log_sums.new_empty(*log_sums.shape, head_dim)
        weight, angles, rotating = kv.value, (kv.value,) * 4, MIN_ROWS
        if kv.shared_kv is not None:
            weight, rotating = kv.shared_kv.weight, num_pairs(kv.shared_kv.rotary)
            angles = self._rotations(kv.shared_kv.rotary, num_keys)
        attend[(len(tiles.tiles), num_kv_heads, num_splits)](
            query,
            kv.value if kv.key is None else kv.key,
            kv.value,
            weight,
            *angles,
            self._table,
            tiles.tiles,
            parts,
            log_sums,
            num_outs,
            num_kv_heads,
            self._table.shape[1],
            self._window or 0,
            GROUP=num_heads // num_kv_heads,
            HEAD_DIM=head_dim,
            ROTATING=rotating,
            BLOCK_SIZE=self._block_size,
            ROWS=tiles.num_rows,
            KEYS=num_keys,
            SHARED_KV=kv.shared_kv is not None,
            num_warps=8,
            num_stages=2,
        )
        joined = (parts * log_sums.softmax(0)[..., None]).sum(0) if num_splits > 1 else parts[0]
        out.index_copy_(0, tiles.tokens, joined.to(out.dtype))

    def _rotations(self, rotary: Rotary, num_keys: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """cos and sin of a key block's offsets, and of the blocks' first positions."""
        if self._angles is None:
            num_blocks = triton.cdiv(self._table.shape[1] * self._block_size, num_keys)
            offsets = torch.arange(num_keys, device=self._table.device)
            blocks = torch.arange(num_blocks, device=self._table.device) * num_keys
            self._angles = (*cos_sin(rotary, offsets), *cos_sin(rotary, blocks))
        return self._angles


def works(
    device: torch.device,
    dtype: torch.dtype,
    num_heads: int,
    shape: tuple[int, int],
    shared_kv: SharedKV | None,
) -> bool:
    """Return whether the kernel compiles for this GPU and computes what PyTorch computes.

    The log says why not. `shape` is num_kv_heads and head_dim of the layers.
    """
    num_kv_heads, head_dim = shape
    if head_dim != triton.next_power_of_2(head_dim) or head_dim < 2 * MIN_ROWS:
        logger.warning("No Triton kernel for heads of %d, so PyTorch attends.", head_dim)
        return False
    block_size, seq_lens, kind = 16, [3 * SPLIT_KEYS + 5, 70], AttentionKind.GLOBAL
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    width = triton.cdiv(seq_lens[0], block_size)
    key, value = (draw(2 * width, block_size, num_kv_heads, head_dim) for _ in range(2))
    kv = KVTensors(key if shared_kv is None else None, value, shared_kv)
    table = torch.arange(2 * width, device=device).view(2, width)
    positions = torch.cat(
        [torch.arange(end - n, end) for n, end in zip((1, 40), seq_lens, strict=True)]
    )
    nothing = torch.empty(0, dtype=torch.int64)
    batch = Batch(nothing, positions.to(device), [1, 40], seq_lens, {kind: table}, {}, nothing)
    query = draw(41, num_heads, head_dim) * head_dim**-0.5
    try:
        ours = TritonAttention(batch, kind, None, block_size)(query, kv)
    except (TritonError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        logger.warning("No Triton kernel, so PyTorch attends, more slowly: %s", error)
        return False
    expected = FastAttention(batch, kind, None, block_size, dtype)(query, kv)
    error_size = float((ours.float() - expected.float()).norm() / expected.float().norm())
    if error_size > TOLERANCE[dtype.itemsize]:
        logger.warning("The Triton kernel is off by %.1e here, so PyTorch attends.", error_size)
    return error_size <= TOLERANCE[dtype.itemsize]


def num_pairs(rotary: Rotary) -> int:
    """Pairs that the kernel rotates: a power of two, the last ones by nothing."""
    return max(MIN_ROWS, 1 << (len(rotary.frequencies) - 1).bit_length())


def cos_sin(rotary: Rotary, positions: Tensor) -> tuple[Tensor, Tensor]:
    """[num_positions, num_pairs] in fp32, from angles in fp64."""
    num_still = num_pairs(rotary) - len(rotary.frequencies)
    frequencies = F.pad(rotary.frequencies.double(), (0, num_still))
    angles = positions[:, None].double() * frequencies
    return angles.cos().float(), angles.sin().float()


def _num_splits(num_programs: int, num_keys: int, device: torch.device) -> int:
    """Return how many splits keep all multiprocessors busy, none of them short."""
    num_processors = 8  # of no GPU: the interpreter
    if device.type == "cuda":
        num_processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = PROGRAMS * num_processors // num_programs
    return max(1, min(wanted, -(-num_keys // SPLIT_KEYS)))
