"""The GPU kernel of paged attention: it forms keys from cached values, or reads both.

Long contexts are split over programs (flash-decoding): each gives its share of the output and the
logarithm of its sum of exponentials. Where they share a projection, K = rotate(w * V) is never
stored. For the dimensions that stay still, w goes to the query. For those that rotate, a position
is the first of its key block plus an offset: the keys of every block are rotated by the same
offsets, which stay in registers, and the query is turned back by the block's first position.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend(
    query,  # [num_tokens, num_heads, HEAD_DIM]
    key,  # [num_blocks, BLOCK_SIZE, num_kv_heads, HEAD_DIM]; unused with SHARED_KV
    value,  # the same
    weight,  # [HEAD_DIM]; this and the four below are for SHARED_KV
    offset_cos,  # [KEYS, ROTATING], of the positions in a key block
    offset_sin,
    block_cos,  # [num_key_blocks, ROTATING], of their first positions
    block_sin,
    tables,  # [num_requests, table_width] int64
    tiles,  # [num_tiles, 5] int32: request, first token, its position, tokens, first row of out
    out,  # [num_splits, num_outs, num_heads, HEAD_DIM] fp32
    log_sums,  # [num_splits, num_outs, num_heads] fp32
    num_outs,
    num_kv_heads,
    table_width,
    window,  # 0: none
    GROUP: tl.constexpr,  # heads that share a key head
    HEAD_DIM: tl.constexpr,
    ROTATING: tl.constexpr,  # pairs
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SHARED_KV: tl.constexpr,
):
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    request = tl.load(tiles + tile * 5).to(tl.int64)
    first_token = tl.load(tiles + tile * 5 + 1)
    first_position = tl.load(tiles + tile * 5 + 2)
    tile_tokens = tl.load(tiles + tile * 5 + 3)
    first_out = tl.load(tiles + tile * 5 + 4)

    row, dim = tl.arange(0, ROWS), tl.arange(0, HEAD_DIM)
    token = row // GROUP
    is_row = token < tile_tokens
    position = first_position + token  # [ROWS]
    heads = num_kv_heads * GROUP
    head = kv_head * GROUP + row % GROUP
    at = (first_token + token).to(tl.int64) * heads + head
    q = tl.load(query + at[:, None] * HEAD_DIM + dim, mask=is_row[:, None], other=0.0)

    if SHARED_KV:
        pair = tl.arange(0, ROTATING)
        half: tl.constexpr = HEAD_DIM // 2
        first = query + at[:, None] * HEAD_DIM + pair
        qx = tl.load(first, mask=is_row[:, None], other=0.0).to(tl.float32)
        qy = tl.load(first + half, mask=is_row[:, None], other=0.0).to(tl.float32)
        wx, wy = tl.load(weight + pair).to(tl.float32), tl.load(weight + half + pair).to(tl.float32)
        offset = tl.arange(0, KEYS)[:, None] * ROTATING + pair
        cos, sin = tl.load(offset_cos + offset), tl.load(offset_sin + offset)
        still = tl.load(weight + dim).to(tl.float32) * (dim % half >= ROTATING)
        q = (q.to(tl.float32) * still).to(q.dtype)

    # This split's share of the keys that the tile sees.
    end = first_position + tile_tokens
    begin = tl.where(window > 0, tl.maximum(first_position - window + 1, 0), 0) // KEYS
    share = tl.cdiv(tl.cdiv(end, KEYS) - begin, tl.num_programs(2))
    begin += split * share
    stop = tl.minimum(begin + share, tl.cdiv(end, KEYS))

    best = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for block in range(begin, stop):
        at_key = block * KEYS + tl.arange(0, KEYS)
        is_key = at_key < end
        entry = tables + request * table_width + at_key // BLOCK_SIZE
        slot = tl.load(entry, mask=is_key, other=0) * BLOCK_SIZE + at_key % BLOCK_SIZE
        start = (slot * num_kv_heads + kv_head) * HEAD_DIM
        v = tl.load(value + start[:, None] + dim, mask=is_key[:, None], other=0.0)
        if SHARED_KV:
            from_x = value + start[:, None] + pair
            x = tl.load(from_x, mask=is_key[:, None], other=0.0).to(tl.float32) * wx
            y = tl.load(from_x + half, mask=is_key[:, None], other=0.0).to(tl.float32) * wy
            kx, ky = (x * cos - y * sin).to(v.dtype), (y * cos + x * sin).to(v.dtype)
            c = tl.load(block_cos + block * ROTATING + pair)
            s = tl.load(block_sin + block * ROTATING + pair)
            turned_x, turned_y = (qx * c + qy * s).to(v.dtype), (qy * c - qx * s).to(v.dtype)
            scores = tl.dot(q, tl.trans(v), input_precision="ieee")
            scores = tl.dot(turned_x, tl.trans(kx), scores, input_precision="ieee")
            scores = tl.dot(turned_y, tl.trans(ky), scores, input_precision="ieee")
        else:
            k = tl.load(key + start[:, None] + dim, mask=is_key[:, None], other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        sees = at_key[None, :] <= position[:, None]
        sees &= (window == 0) | (at_key[None, :] > position[:, None] - window)
        scores = tl.where(sees, scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        decay = tl.exp(best - new_best)
        weights = tl.exp(scores - new_best[:, None])
        total = total * decay + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        best = new_best

    to = (split * num_outs + first_out + token).to(tl.int64) * heads + head
    some = tl.where(total > 0, total, 1.0)  # a row may see nothing of this split
    tl.store(out + to[:, None] * HEAD_DIM + dim, acc / some[:, None], mask=is_row[:, None])
    tl.store(log_sums + to, best + tl.log(some), mask=is_row)
