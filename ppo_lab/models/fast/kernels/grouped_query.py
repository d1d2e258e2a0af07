"""Attention of one new token a row where several queries share keys, as one Triton kernel.

`one_query` for each of them would read the same keys and values as often as there are queries that
share them. Here a program has all of these queries, padded to the 16 that tensor cores multiply at
a time, and walks once through their columns. It begins with the newest one, whose key and value it
is given and puts where they belong.

Products are of half precision where keys are, and summed in float32. Triton comes with torch's
builds for CUDA. This module is imported where it is there alone.

Source: Ainslie et al. 2023, arXiv:2305.13245, for groups; Milakov and Gimelshein 2018,
    arXiv:1805.02867, for the running maximum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from ppo_lab.models.fast.kernels.early import begin, launched_early

# Warps of a program, bytes of keys that it reads at a time, and reads that are under way at once.
WARPS = 4
READ = 2**14
STAGES = 2


def attend_group(
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
    """`one_query.attend_newest`."""
    (batch, heads, size), kv_heads = q.shape, k.shape[1]
    mixed = torch.empty(batch, heads, size, dtype=q.dtype, device=q.device)
    width, group = max(16, triton.next_power_of_2(size)), heads // kv_heads
    _attend[(batch, kv_heads)](
        q, k, v, keys, values, mixed, first, column, q if slopes is None else slopes, scaling,
        *q.stride(), *k.stride(), *v.stride(), *keys.stride(), *values.stride(),
        heads=heads, group=group, queries=max(16, triton.next_power_of_2(group)),
        size=size, width=width, alibi=slopes is not None,
        columns=columns_of(width, keys.dtype),
        num_warps=WARPS, num_stages=STAGES, **launched_early(q.device),
    )  # fmt: skip
    return mixed


def columns_of(width: int, dtype: torch.dtype) -> int:
    """How many columns a program reads at a time."""
    return max(16, READ // (width * dtype.itemsize))


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, mixed_ptr, first_ptr, column_ptr, slopes_ptr,
    scaling,
    q_batch, q_head, q_one, k_batch, k_head, k_one, v_batch, v_head, v_one,
    keys_batch, keys_head, keys_column, keys_one,
    values_batch, values_head, values_column, values_one,
    heads: tl.constexpr, group: tl.constexpr, queries: tl.constexpr,
    size: tl.constexpr, width: tl.constexpr, alibi: tl.constexpr, columns: tl.constexpr,
    early: tl.constexpr,
):  # fmt: skip
    """One row's queries of one head of keys."""
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, newest = tl.load(first_ptr + row), tl.load(column_ptr)
    keys_ptr += row * keys_batch + kv_head * keys_head
    values_ptr += row * values_batch + kv_head * values_head
    begin(early)
    one, query = tl.arange(0, width), tl.arange(0, queries)
    within, head = (one < size)[None, :], kv_head * group + query[:, None]
    asked = (query < group)[:, None] & within
    q_at = q_ptr + row * q_batch + head * q_head + one[None, :] * q_one
    q = tl.load(q_at, mask=asked, other=0.0)
    k_at = k_ptr + row * k_batch + kv_head * k_head + one[None, :] * k_one
    v_at = v_ptr + row * v_batch + kv_head * v_head + one[None, :] * v_one
    k, v = tl.load(k_at, mask=within, other=0.0), tl.load(v_at, mask=within, other=0.0)
    tl.store(keys_ptr + newest * keys_column + one[None, :] * keys_one, k, mask=within)
    tl.store(values_ptr + newest * values_column + one[None, :] * values_one, v, mask=within)

    largest = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * scaling
    if alibi:
        slope = tl.load(slopes_ptr + head, mask=(query < group)[:, None], other=0.0).to(tl.float32)
        largest += tl.sum((slope * (newest - first).to(tl.float32)).to(q.dtype).to(tl.float32), 1)
    total = tl.full((queries,), 1.0, tl.float32)
    mixed = tl.zeros((queries, width), tl.float32) + v.to(tl.float32)
    for start in range(first, newest, columns):
        column = start + tl.arange(0, columns)
        seen = column < newest
        tile = seen[:, None] & within
        at = column[:, None] * keys_column + one[None, :] * keys_one
        seen_keys = tl.load(keys_ptr + at, mask=tile, other=0.0)
        at = column[:, None] * values_column + one[None, :] * values_one
        seen_values = tl.load(values_ptr + at, mask=tile, other=0.0)
        scores = tl.dot(q, tl.trans(seen_keys), input_precision="ieee") * scaling
        if alibi:
            distance = (column - first).to(tl.float32)[None, :]
            scores += (slope * distance).to(q.dtype).to(tl.float32)
        scores = tl.where(seen[None, :], scores, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        rescale = tl.exp(largest - new_largest)
        terms = tl.exp(scores - new_largest[:, None])
        total = total * rescale + tl.sum(terms, 1)
        product = tl.dot(terms.to(seen_values.dtype), seen_values, input_precision="ieee")
        mixed = mixed * rescale[:, None] + product
        largest = new_largest
    at = mixed_ptr + (row * heads + head) * size + one[None, :]
    tl.store(at, (mixed / total[:, None]).to(q.dtype), mask=asked)
