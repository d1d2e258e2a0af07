"""Products of few rows with a frozen weight and its adapter, as one Triton kernel.

    y = a(x W^T + b + s (x A^T) B^T)          gated: times the same of other numbers, without a

A token's pass has a row a sample: of a product little more remains than to read W, and a kernel of
its own for each of the adapter's two small ones would take as long again. So they are made beside
the weight's, from the same tiles of x, by every program for itself: A is small. Sums are float32;
as elsewhere x A^T is rounded to the precision of x before it goes on, and so is what an activation
is given and gives. For it a kernel of its own would take half as long as the product.

Where outputs are too few to keep a GPU busy, several programs share a tile of them, each with a
part of the inputs; the last of them to be done adds the parts up, in their order, so that the sum
is the same every time.

Triton comes with torch's builds for CUDA. This module is imported where it is there alone.

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from ppo_lab.models.fast.kernels import fast_memory
from ppo_lab.models.fast.kernels.activate import activated
from ppo_lab.models.fast.kernels.early import begin, launched_early

# Inputs that are read at a time, and loads of them that are under way at once at the most.
STEP = 128
STAGES = 6
WARPS = 4

# Programs that keep a GPU busy, and the fewest inputs of one of them.
BUSY = 96
FEWEST = 1024

# Loads under way at once where two weights are read: so few that two programs fit beside each
# other, since there are more of them than a GPU has places for one.
GATED_STAGES = 3


def few_rows(
    x: Float[Tensor, "rows inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None,
    scaling: float = 0.0,
    a: Float[Tensor, "rank inputs"] | None = None,
    b: Float[Tensor, "outputs rank"] | None = None,
    activation: str = "",
    factor: Sequence[Any] | None = None,
) -> Float[Tensor, "rows outputs"]:
    """x W^T + b + s (x A^T) B^T, without a gradient.

    `activation` is the name of one of `elementwise`'s that this goes through; `factor` are W, b, s,
    A and B of as many outputs, by which it is then multiplied.
    """
    (rows, inputs), outputs = x.shape, len(weight)
    y = x.new_empty(rows, outputs)
    ranks = [0 if m is None else len(m) for m in (a, factor[3] if factor else None)]
    tile, parts = _shares(outputs, inputs, alone=any(ranks) or factor is not None)
    tiles, held = triton.cdiv(outputs, tile), max(16, triton.next_power_of_2(rows))
    low = max(16, triton.next_power_of_2(max(ranks)))
    sums, done = _shared(x.device, tiles, parts * held * tile) if parts > 1 else (x, x)
    columns = (tile + (low if any(ranks) else 0)) * (2 if factor else 1)
    stage, most = (held + columns) * STEP * x.element_size(), GATED_STAGES if factor else STAGES
    other_weight, other_bias, other_scaling, *others = factor or (None, None, 0.0, None, None)
    given = (weight, bias, a, b, other_weight, other_bias, *others)
    _product[(tiles, parts)](
        x, *(x if one is None else one for one in given),
        y, sums, done, scaling, other_scaling, rows, outputs,
        inputs=inputs, rank=ranks[0], other_rank=ranks[1], low=low, biased=bias is not None,
        other_biased=other_bias is not None, activation=activation, gated=factor is not None,
        held=held, tile=tile, step=STEP, parts=parts,
        num_warps=WARPS, num_stages=max(1, min(most, fast_memory(x.device) // stage)),
        **launched_early(x.device),
    )  # fmt: skip
    return y


def _shares(outputs: int, inputs: int, *, alone: bool) -> tuple[int, int]:
    """Outputs of a tile, and how many programs share one unless each is to have it `alone`."""
    tile, parts = 32, 1
    while not alone and outputs * parts < BUSY * tile and inputs % (2 * parts * STEP) == 0:
        if inputs < 2 * parts * FEWEST:
            break
        parts *= 2
    return (tile if outputs * parts > BUSY * tile // 2 else 16), parts


@functools.cache
def _shared(device: torch.device, tiles: int, size: int) -> tuple[Tensor, Tensor]:
    """Where parts of sums are put, and how many of each tile are there; zero between products,
    which follow one another.
    """
    sums = torch.empty(tiles * size, dtype=torch.float32, device=device)
    return sums, torch.zeros(tiles, dtype=torch.int32, device=device)


@triton.jit
def _product(
    x_ptr, w_ptr, bias_ptr, a_ptr, b_ptr, other_w_ptr, other_bias_ptr, other_a_ptr, other_b_ptr,
    y_ptr, sums_ptr, done_ptr, scaling, other_scaling, rows, outputs,
    inputs: tl.constexpr, rank: tl.constexpr, other_rank: tl.constexpr, low: tl.constexpr,
    biased: tl.constexpr, other_biased: tl.constexpr, activation: tl.constexpr,
    gated: tl.constexpr,
    held: tl.constexpr, tile: tl.constexpr, step: tl.constexpr, parts: tl.constexpr,
    early: tl.constexpr,
):  # fmt: skip
    """One tile of the outputs of all rows, or a part of its sum."""
    number, part = tl.program_id(0), tl.program_id(1)
    row, out = tl.arange(0, held), number * tile + tl.arange(0, tile)
    there = (row < rows)[:, None]
    total = tl.zeros((held, tile), tl.float32)
    inner = tl.zeros((held, low), tl.float32)
    other_total = tl.zeros((held, tile), tl.float32)
    other_inner = tl.zeros((held, low), tl.float32)
    length: tl.constexpr = inputs // parts
    begin(early)
    for start in range(0, length, step):
        at = part * length + start + tl.arange(0, step)
        x = tl.load(x_ptr + row[:, None] * inputs + at[None, :], mask=there, other=0.0)
        total, inner = _further(x, total, inner, w_ptr, a_ptr, out, at, outputs, inputs, rank, low)
        if gated:
            other_total, other_inner = _further(
                x, other_total, other_inner, other_w_ptr, other_a_ptr, out, at, outputs, inputs,
                other_rank, low,
            )  # fmt: skip
    total = _adapted(total, inner, b_ptr, scaling, out, outputs, rank, low)
    at, inside = y_ptr + row[:, None] * outputs + out[None, :], there & (out < outputs)[None, :]
    if parts > 1:
        place = row[:, None] * tile + tl.arange(0, tile)[None, :]
        base = sums_ptr + number * parts * held * tile
        tl.store(base + part * held * tile + place, total)
        tl.debug_barrier()
        if tl.atomic_add(done_ptr + number, 1, sem="acq_rel") == parts - 1:
            total = tl.zeros((held, tile), tl.float32)
            for each in range(parts):
                total += tl.load(base + each * held * tile + place, cache_modifier=".cg")
            y = _made(total, x_ptr, bias_ptr, out, outputs, biased, activation)
            tl.store(at, y.to(y_ptr.dtype.element_ty), mask=inside)
            tl.store(done_ptr + number, 0)
    else:
        y = _made(total, x_ptr, bias_ptr, out, outputs, biased, activation)
        if gated:
            other_total = _adapted(
                other_total, other_inner, other_b_ptr, other_scaling, out, outputs, other_rank, low
            )
            y *= _made(other_total, x_ptr, other_bias_ptr, out, outputs, other_biased, "")
        tl.store(at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _further(
    x, total, inner, w_ptr, a_ptr, out, at, outputs,
    inputs: tl.constexpr, rank: tl.constexpr, low: tl.constexpr,
):  # fmt: skip
    """The sums of x W^T and x A^T with those of the inputs `at`."""
    wanted = (out < outputs)[None, :]
    w = tl.load(w_ptr + out[None, :] * inputs + at[:, None], mask=wanted, other=0.0)
    total = tl.dot(x, w, total)
    if rank > 0:
        rank_at = tl.arange(0, low)
        within = (rank_at < rank)[None, :]
        a = tl.load(a_ptr + rank_at[None, :] * inputs + at[:, None], mask=within, other=0.0)
        inner = tl.dot(x, a, inner)
    return total, inner


@triton.jit
def _adapted(total, inner, b_ptr, scaling, out, outputs, rank: tl.constexpr, low: tl.constexpr):
    """The sum with that of the adapter: s (x A^T) B^T."""
    if rank > 0:
        rank_at = tl.arange(0, low)
        within = (rank_at < rank)[:, None] & (out < outputs)[None, :]
        b = tl.load(b_ptr + out[None, :] * rank + rank_at[:, None], mask=within, other=0.0)
        total += scaling * tl.dot(inner.to(b.dtype), b)
    return total


@triton.jit
def _made(total, x_ptr, bias_ptr, out, outputs, biased: tl.constexpr, activation: tl.constexpr):
    """What becomes of a whole sum, rounded to the precision of x after every step."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if biased:
        total += tl.load(bias_ptr + out, mask=out < outputs, other=0.0).to(tl.float32)[None, :]
    z = total.to(dtype).to(tl.float32)
    if activation != "":
        z = activated(z, activation)
    return z.to(dtype).to(tl.float32)
