"""Products of few rows with a frozen weight and its adapter, as one Triton kernel.

    y = x W^T + b + s (x A^T) B^T

A token's pass has a row a sample: of a product little more remains than to read W, and a kernel of
its own for each of the adapter's two small ones would take as long again. So they are made beside
the weight's, from the same tiles of x, by every program for itself: A is small. Sums are float32;
as elsewhere x A^T is rounded to the precision of x before it goes on.

Where outputs are too few to keep a GPU busy, several programs share a tile of them, each with a
part of the inputs; the last of them to be done adds the parts up, in their order, so that the sum
is the same every time.

Triton comes with torch's builds for CUDA. This module is imported where it is there alone.

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

# Inputs that are read at a time, and loads of them that are under way at once at the most.
STEP = 128
STAGES = 6
WARPS = 4

# Programs that keep a GPU busy, and the fewest inputs of one of them.
BUSY = 96
FEWEST = 1024


def few_rows(
    x: Float[Tensor, "rows inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None,
    scaling: float = 0.0,
    a: Float[Tensor, "rank inputs"] | None = None,
    b: Float[Tensor, "outputs rank"] | None = None,
) -> Float[Tensor, "rows outputs"]:
    """x W^T + b + s (x A^T) B^T, without a gradient."""
    (rows, inputs), outputs = x.shape, len(weight)
    y = x.new_empty(rows, outputs)
    rank = 0 if a is None else len(a)
    tile, parts = _shares(outputs, inputs, alone=rank > 0)
    tiles, held = triton.cdiv(outputs, tile), max(16, triton.next_power_of_2(rows))
    low = max(16, triton.next_power_of_2(rank))
    sums, done = _shared(x.device, tiles, parts * held * tile) if parts > 1 else (x, x)
    stage = (held + tile + (low if rank else 0)) * STEP * x.element_size()
    _product[(tiles, parts)](
        x, weight, x if bias is None else bias, x if a is None else a, x if b is None else b,
        y, sums, done, scaling, rows, outputs,
        inputs=inputs, rank=rank, low=low, biased=bias is not None,
        held=held, tile=tile, step=STEP, parts=parts,
        num_warps=WARPS, num_stages=max(1, min(STAGES, _fast_memory(x.device) // stage)),
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


@functools.cache
def _fast_memory(device: torch.device) -> int:
    """Bytes that a program's loads may lie in."""
    if device.type != "cuda":  # in Triton's interpreter
        return 2**17
    found = torch.cuda.get_device_properties(device)
    return int(getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block))


@triton.jit
def _product(
    x_ptr, w_ptr, bias_ptr, a_ptr, b_ptr, y_ptr, sums_ptr, done_ptr, scaling, rows, outputs,
    inputs: tl.constexpr, rank: tl.constexpr, low: tl.constexpr, biased: tl.constexpr,
    held: tl.constexpr, tile: tl.constexpr, step: tl.constexpr, parts: tl.constexpr,
):  # fmt: skip
    """One tile of the outputs of all rows, or a part of its sum."""
    number, part = tl.program_id(0), tl.program_id(1)
    row, out = tl.arange(0, held), number * tile + tl.arange(0, tile)
    rank_at = tl.arange(0, low)
    there, wanted = (row < rows)[:, None], (out < outputs)[None, :]
    total = tl.zeros((held, tile), tl.float32)
    inner = tl.zeros((held, low), tl.float32)
    length: tl.constexpr = inputs // parts
    for start in range(0, length, step):
        at = part * length + start + tl.arange(0, step)
        x = tl.load(x_ptr + row[:, None] * inputs + at[None, :], mask=there, other=0.0)
        w = tl.load(w_ptr + out[None, :] * inputs + at[:, None], mask=wanted, other=0.0)
        total = tl.dot(x, w, total)
        if rank > 0:
            within = (rank_at < rank)[None, :]
            a = tl.load(a_ptr + rank_at[None, :] * inputs + at[:, None], mask=within, other=0.0)
            inner = tl.dot(x, a, inner)
    if rank > 0:
        within = (rank_at < rank)[:, None] & wanted
        b = tl.load(b_ptr + out[None, :] * rank + rank_at[:, None], mask=within, other=0.0)
        total += scaling * tl.dot(inner.to(b.dtype), b)
    if parts > 1:
        place = row[:, None] * tile + tl.arange(0, tile)[None, :]
        base = sums_ptr + number * parts * held * tile
        tl.store(base + part * held * tile + place, total)
        tl.debug_barrier()
        if tl.atomic_add(done_ptr + number, 1, sem="acq_rel") == parts - 1:
            total = tl.zeros((held, tile), tl.float32)
            for each in range(parts):
                total += tl.load(base + each * held * tile + place, cache_modifier=".cg")
            _put(total, bias_ptr, y_ptr, row, out, there & wanted, outputs, biased)
            tl.store(done_ptr + number, 0)
    else:
        _put(total, bias_ptr, y_ptr, row, out, there & wanted, outputs, biased)


@triton.jit
def _put(total, bias_ptr, y_ptr, row, out, inside, outputs, biased: tl.constexpr):
    if biased:
        bias = tl.load(bias_ptr + out, mask=out < outputs, other=0.0)
        total += bias.to(tl.float32)[None, :]
    at = y_ptr + row[:, None] * outputs + out[None, :]
    tl.store(at, total.to(y_ptr.dtype.element_ty), mask=inside)
