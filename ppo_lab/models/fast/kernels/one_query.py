"""Attention of one new token a row, as one Triton kernel over keys and values that stand still.

Attention's kernels for whole texts take a tile of queries at a time, of which here one is asked,
and read all columns, those to come included. This one reads the columns up to the newest alone,
each once; it also puts the newest key and value where they belong, and makes ALiBi's bias from
column numbers. Queries that share keys are `grouped_query`'s.

What it takes is waiting for memory, so that no thread waits for another while it reads: the few
threads that read a column together, 16 bytes each, keep a running maximum, a sum and a mixture of
their own columns, in float32, and all of these are put together at the end.

Triton comes with torch's builds for CUDA. This module is imported where it is there alone.

Source: Milakov and Gimelshein 2018, arXiv:1805.02867, for the running maximum; Dao et al. 2023,
    "Flash-Decoding for long-context inference", for parts that are put together at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from ppo_lab.models.fast.kernels.early import begin, launched_early
from ppo_lab.models.fast.kernels.grouped_query import attend_group

# Warps of a program, columns that each of its threads reads at a time, and bytes of one read.
WARPS = 2
COLUMNS = 4
READ = 16

# No score is lower; minus infinity would not be a number when it is subtracted from itself.
LOWEST = tl.constexpr(-1e30)


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
    if q.shape[1] > k.shape[1]:
        return attend_group(q, k, v, keys, values, first, column, slopes, scaling)
    batch, heads, size = q.shape
    mixed = torch.empty(batch, heads, size, dtype=q.dtype, device=q.device)
    width = triton.next_power_of_2(size)
    readers = readers_of(width, keys.dtype)
    _attend[(batch, heads)](
        q, k, v, keys, values, mixed, first, column, q if slopes is None else slopes, scaling,
        *q.stride(), *k.stride(), *v.stride(), *keys.stride(), *values.stride(),
        heads=heads, size=size, width=width,
        alibi=slopes is not None, readers=readers, each=COLUMNS, num_warps=WARPS,
        **launched_early(q.device),
    )  # fmt: skip
    return mixed


def readers_of(width: int, dtype: torch.dtype) -> int:
    """How many columns a program reads at the same time, where a key fills a power of two."""
    return max(1, WARPS * 32 * READ // (width * dtype.itemsize))


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, mixed_ptr, first_ptr, column_ptr, slopes_ptr,
    scaling,
    q_batch, q_head, q_one, k_batch, k_head, k_one, v_batch, v_head, v_one,
    keys_batch, keys_head, keys_column, keys_one,
    values_batch, values_head, values_column, values_one,
    heads: tl.constexpr, size: tl.constexpr, width: tl.constexpr,
    alibi: tl.constexpr, readers: tl.constexpr, each: tl.constexpr,
    early: tl.constexpr,
):  # fmt: skip
    """One row's one head; of the columns, those of every reader.

    The oldest are read before `begin`: they were written in the pass of an earlier token, and
    between two passes work kernels of others.
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, column = tl.load(first_ptr + row), tl.load(column_ptr)
    keys_ptr += row * keys_batch + head * keys_head
    values_ptr += row * values_batch + head * values_head
    one = tl.arange(0, width)
    within = one < size
    reader = tl.arange(0, readers)[:, None] + readers * tl.arange(0, each)[None, :]
    seen_keys, seen_values = _read(
        keys_ptr, values_ptr, first + reader, column, one, within,
        keys_column, keys_one, values_column, values_one,
    )  # fmt: skip
    begin(early)
    q = tl.load(q_ptr + row * q_batch + head * q_head + one * q_one, mask=within, other=0.0)
    k = tl.load(k_ptr + row * k_batch + head * k_head + one * k_one, mask=within, other=0.0)
    v = tl.load(v_ptr + row * v_batch + head * v_head + one * v_one, mask=within, other=0.0)
    slope = tl.load(slopes_ptr + head).to(tl.float32)  # read and left alone without ALiBi
    dtype = q.dtype
    q = q.to(tl.float32) * scaling

    largest = tl.full((readers,), LOWEST, tl.float32)
    total = tl.zeros((readers,), tl.float32)
    mixed = tl.zeros((readers, width), tl.float32)
    largest, total, mixed = _mix(
        largest, total, mixed, q, seen_keys, seen_values, first + reader, first, column, slope,
        dtype, alibi,
    )  # fmt: skip
    for start in range(first + readers * each, column, readers * each):
        seen_keys, seen_values = _read(
            keys_ptr, values_ptr, start + reader, column, one, within,
            keys_column, keys_one, values_column, values_one,
        )  # fmt: skip
        largest, total, mixed = _mix(
            largest, total, mixed, q, seen_keys, seen_values, start + reader, first, column, slope,
            dtype, alibi,
        )  # fmt: skip

    tl.store(keys_ptr + column * keys_column + one * keys_one, k, mask=within)
    tl.store(values_ptr + column * values_column + one * values_one, v, mask=within)
    newest = tl.sum(q * k.to(tl.float32), 0)
    if alibi:
        newest += _bias(slope, column - first, dtype)
    highest = tl.maximum(tl.max(largest, 0), newest)
    share, term = tl.exp(largest - highest), tl.exp(newest - highest)
    sums = tl.sum(total * share, 0) + term
    mean = (tl.sum(mixed * share[:, None], 0) + term * v.to(tl.float32)) / sums
    tl.store(mixed_ptr + (row * heads + head) * size + one, mean.to(dtype), mask=within)


@triton.jit
def _read(
    keys_ptr, values_ptr, columns, column, one, within,
    keys_column, keys_one, values_column, values_one,
):  # fmt: skip
    """(readers, each, width): keys and values of these columns, zeros from `column` on."""
    tile = (columns < column)[:, :, None] & within[None, None, :]
    at = columns[:, :, None] * keys_column + one[None, None, :] * keys_one
    keys = tl.load(keys_ptr + at, mask=tile, other=0.0)
    at = columns[:, :, None] * values_column + one[None, None, :] * values_one
    return keys, tl.load(values_ptr + at, mask=tile, other=0.0)


@triton.jit
def _mix(
    largest, total, mixed, q, keys, values, columns, first, column, slope,
    dtype: tl.constexpr, alibi: tl.constexpr,
):  # fmt: skip
    """A reader's maximum, sum and mixture with those of more columns."""
    scores = tl.sum(keys.to(tl.float32) * q[None, None, :], 2)
    if alibi:
        scores += _bias(slope, columns - first, dtype)
    scores = tl.where(columns < column, scores, -float("inf"))
    new_largest = tl.maximum(largest, tl.max(scores, 1))
    rescale = tl.exp(largest - new_largest)
    terms = tl.exp(scores - new_largest[:, None])
    total = total * rescale + tl.sum(terms, 1)
    mixed = mixed * rescale[:, None] + tl.sum(terms[:, :, None] * values.to(tl.float32), 1)
    return new_largest, total, mixed


@triton.jit
def _bias(slope, distance, dtype: tl.constexpr):
    return (slope * distance.to(tl.float32)).to(dtype).to(tl.float32)
