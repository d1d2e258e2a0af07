"""Attention of one new token a row, as one Triton kernel over keys and values that stand still.

Attention's kernels for whole texts take a tile of queries at a time, of which here one is asked,
and read all columns, those to come included. This one reads the columns up to the newest alone,
each once, in float32 with the running maximum of Milakov and Gimelshein 2018, arXiv:1805.02867; it
also puts the newest key and value where they belong, and makes ALiBi's bias from column numbers.

Triton comes with torch's builds for CUDA. This module is imported where it is there alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

# Columns at a time, and warps of a program: the fastest of twelve pairs for heads of 64 on an H200.
BLOCK = 64
WARPS = 2


def attend_newest(
    q: Float[Tensor, "batch heads size"],
    k: Float[Tensor, "batch kv_heads size"],
    v: Float[Tensor, "batch kv_heads size"],
    keys: Float[Tensor, "batch kv_heads positions size"],
    values: Float[Tensor, "batch kv_heads positions size"],
    first: Int[Tensor, " batch"],
    column: Int[Tensor, " one"],
    slopes: Float[Tensor, " heads"] | None,
    scaling: float,
) -> Float[Tensor, "batch heads size"]:
    """What the queries mix of the columns from each row's `first` on to `column`, whose key and
    value are given, and are written in place among the others.

    `slopes` are ALiBi's; each bias is rounded to the precision of the queries, as it is elsewhere.
    """
    batch, heads, size = q.shape
    mixed = torch.empty(batch, heads, size, dtype=q.dtype, device=q.device)
    _attend[(batch, heads)](
        q, k, v, keys, values, mixed, first, column, q if slopes is None else slopes, scaling,
        *q.stride(), *k.stride(), *v.stride(), *keys.stride(), *values.stride(),
        heads=heads, group=heads // k.shape[1], size=size, width=triton.next_power_of_2(size),
        alibi=slopes is not None, block=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return mixed


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, mixed_ptr, first_ptr, column_ptr, slopes_ptr,
    scaling,
    q_batch, q_head, q_one, k_batch, k_head, k_one, v_batch, v_head, v_one,
    keys_batch, keys_head, keys_column, keys_one,
    values_batch, values_head, values_column, values_one,
    heads: tl.constexpr, group: tl.constexpr, size: tl.constexpr, width: tl.constexpr,
    alibi: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One row's one head."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    kv_head = head // group
    one = tl.arange(0, width)
    within = one < size
    first, column = tl.load(first_ptr + row), tl.load(column_ptr)

    q = tl.load(q_ptr + row * q_batch + head * q_head + one * q_one, mask=within, other=0.0)
    dtype = q.dtype
    q = q.to(tl.float32) * scaling
    k = tl.load(k_ptr + row * k_batch + kv_head * k_head + one * k_one, mask=within, other=0.0)
    v = tl.load(v_ptr + row * v_batch + kv_head * v_head + one * v_one, mask=within, other=0.0)
    keys_ptr += row * keys_batch + kv_head * keys_head
    values_ptr += row * values_batch + kv_head * values_head
    if head % group == 0:
        tl.store(keys_ptr + column * keys_column + one * keys_one, k, mask=within)
        tl.store(values_ptr + column * values_column + one * values_one, v, mask=within)

    slope = tl.load(slopes_ptr + head).to(tl.float32)  # read and left alone without ALiBi
    largest = tl.sum(q * k.to(tl.float32), 0)
    if alibi:
        largest += (slope * (column - first).to(tl.float32)).to(dtype).to(tl.float32)
    total = tl.sum(tl.where(one == 0, 1.0, 0.0), 0)
    mixed = v.to(tl.float32)
    for start in range((first // block) * block, column, block):
        columns = start + tl.arange(0, block)
        seen = (columns >= first) & (columns < column)
        tile = seen[:, None] & within[None, :]
        at = columns[:, None] * keys_column + one[None, :] * keys_one
        seen_keys = tl.load(keys_ptr + at, mask=tile, other=0.0).to(tl.float32)
        scores = tl.sum(seen_keys * q[None, :], 1)
        if alibi:
            scores += (slope * (columns - first).to(tl.float32)).to(dtype).to(tl.float32)
        scores = tl.where(seen, scores, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 0))
        rescale = tl.exp(largest - new_largest)
        terms = tl.exp(scores - new_largest)
        at = columns[:, None] * values_column + one[None, :] * values_one
        seen_values = tl.load(values_ptr + at, mask=tile, other=0.0).to(tl.float32)
        total = total * rescale + tl.sum(terms, 0)
        mixed = mixed * rescale + tl.sum(terms[:, None] * seen_values, 0)
        largest = new_largest
    at = (row * heads + head) * size + one
    tl.store(mixed_ptr + at, (mixed / total).to(dtype), mask=within)
