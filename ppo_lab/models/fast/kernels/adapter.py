"""An adapter beside a frozen weight where its gradient is to come, as Triton kernels.

    h = x A^T       y  = s h B^T + b       + x W^T
    d = g B         dx = s d A             + g W        dA = s d^T x        dB = s g^T h

Rank is so small that each of these is bound by the walk through x, y or g, or by its launch: as
products of their own, with casts of A, B and their gradients, they are thirteen. One kernel makes
h or d, a second what of y or dx is the adapter's, onto which the product with W is then added, and
a third both gradients, in the precision of A and B. Sums are float32; h and d are rounded to the
precision of x before they go on.

Triton comes with torch's builds for CUDA. This module is imported where it is there alone.

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from ppo_lab.models.fast.kernels import fast_memory
from ppo_lab.models.fast.kernels.early import begin, launched_early

# Of the first kernel: rows and inputs of a program, inputs that are read at a time.
ROWS = 32
PART = 1024
STEP = 128
STAGES = 4

# Rows and outputs of a program of the second.
TALL = 64
WIDE = 128

# Columns of a program of the third, rows that are read at a time, and reads under way at the most.
COLUMNS = 64
LONG = 256
MOST = 4


def adapted_start(
    x: Float[Tensor, "rows inputs"],
    a: Float[Tensor, "rank inputs"],
    b: Float[Tensor, "outputs rank"] | None,
    scaling: float,
    bias: Float[Tensor, " outputs"] | None,
) -> tuple[Float[Tensor, "rows outputs"] | None, Float[Tensor, "rows rank"]]:
    """s x A^T B^T + bias, unless b is None, and x A^T."""
    (rows, inputs), rank = x.shape, len(a)
    parts, low = triton.cdiv(inputs, PART), max(16, triton.next_power_of_2(rank))
    sums = torch.empty(parts, rows, low, dtype=torch.float32, device=x.device)
    _inner[(triton.cdiv(rows, ROWS), parts)](
        x, a, sums, rows, *a.stride(),
        inputs=inputs, length=PART, rank=rank, low=low, held=ROWS, step=STEP,
        num_warps=4, num_stages=STAGES, **launched_early(x.device),
    )  # fmt: skip
    if b is None:
        return None, sums.sum(0)[:, :rank].to(x.dtype).contiguous()
    outputs = len(b)
    y, inner = x.new_empty(rows, outputs), x.new_empty(rows, rank)
    _start[(triton.cdiv(rows, TALL), triton.cdiv(outputs, WIDE))](
        sums, b, x if bias is None else bias, y, inner, scaling, rows, *b.stride(),
        outputs=outputs, parts=parts, rank=rank, low=low, biased=bias is not None,
        held=TALL, tile=WIDE, num_warps=4, **launched_early(x.device),
    )  # fmt: skip
    return y, inner


def adapter_slopes(
    x: Float[Tensor, "rows inputs"],
    grad: Float[Tensor, "rows outputs"],
    inner: Float[Tensor, "rows rank"],
    of_inner: Float[Tensor, "rows rank"],
    scaling: float,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "rank inputs"], Float[Tensor, "outputs rank"]]:
    """s d^T x and s g^T h, the gradients of A and B, given g, h = x A^T and d = g B."""
    (rows, inputs), outputs, rank = x.shape, grad.shape[1], inner.shape[1]
    for_a = torch.empty(rank, inputs, dtype=dtype, device=x.device)
    for_b = torch.empty(outputs, rank, dtype=dtype, device=x.device)
    tiles, low = triton.cdiv(outputs, COLUMNS), max(16, triton.next_power_of_2(rank))
    stage = (COLUMNS + low) * LONG * x.element_size()
    _slopes[(tiles + triton.cdiv(inputs, COLUMNS),)](
        x, grad, inner, of_inner, for_a, for_b, scaling, rows, tiles,
        inputs=inputs, outputs=outputs, rank=rank, low=low, held=COLUMNS, step=LONG,
        num_warps=4, num_stages=max(1, min(MOST, fast_memory(x.device) // stage)),
        **launched_early(x.device),
    )  # fmt: skip
    return for_a, for_b


@triton.jit
def _inner(
    x_ptr, a_ptr, sums_ptr, rows, a_rank, a_one,
    inputs: tl.constexpr, length: tl.constexpr, rank: tl.constexpr, low: tl.constexpr,
    held: tl.constexpr, step: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """The share of one part of the inputs in x A^T, for some rows."""
    begin(early)
    row, part = tl.program_id(0) * held + tl.arange(0, held), tl.program_id(1)
    there, rank_at = (row < rows)[:, None], tl.arange(0, low)
    row = row.to(tl.int64)[:, None]
    total = tl.zeros((held, low), tl.float32)
    for start in range(0, length, step):
        at = part * length + start + tl.arange(0, step)
        x = tl.load(x_ptr + row * inputs + at, mask=there & (at < inputs)[None, :], other=0.0)
        within = (rank_at < rank)[None, :] & (at < inputs)[:, None]
        a = tl.load(a_ptr + rank_at[None, :] * a_rank + at[:, None] * a_one, mask=within, other=0.0)
        total = tl.dot(x, a.to(x.dtype), total)
    at = sums_ptr + (part * rows + row) * low + rank_at[None, :]
    tl.store(at, total, mask=there)


@triton.jit
def _start(
    sums_ptr, b_ptr, bias_ptr, y_ptr, inner_ptr, scaling, rows, b_out, b_rank,
    outputs: tl.constexpr, parts: tl.constexpr, rank: tl.constexpr, low: tl.constexpr,
    biased: tl.constexpr, held: tl.constexpr, tile: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """A tile of s h B^T + bias, with h summed over its parts."""
    begin(early)
    row, out = tl.program_id(0) * held + tl.arange(0, held), tl.program_id(1) * tile
    out += tl.arange(0, tile)
    there, wanted, rank_at = (row < rows)[:, None], (out < outputs)[None, :], tl.arange(0, low)
    row = row.to(tl.int64)[:, None]
    inner = tl.zeros((held, low), tl.float32)
    for part in tl.static_range(parts):
        at = sums_ptr + (part * rows + row) * low + rank_at[None, :]
        inner += tl.load(at, mask=there, other=0.0)
    rounded = inner.to(inner_ptr.dtype.element_ty)
    within = (rank_at < rank)[None, :]
    if tl.program_id(1) == 0:
        tl.store(inner_ptr + row * rank + rank_at[None, :], rounded, mask=there & within)
    b_at = b_ptr + out[None, :] * b_out + rank_at[:, None] * b_rank
    b = tl.load(b_at, mask=(rank_at < rank)[:, None] & wanted, other=0.0).to(rounded.dtype)
    y = scaling * tl.dot(rounded, b)
    if biased:
        y += tl.load(bias_ptr + out, mask=out < outputs, other=0.0).to(tl.float32)[None, :]
    at = y_ptr + row * outputs + out[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=there & wanted)


@triton.jit
def _slopes(
    x_ptr, grad_ptr, inner_ptr, of_inner_ptr, for_a_ptr, for_b_ptr, scaling, rows, tiles,
    inputs: tl.constexpr, outputs: tl.constexpr, rank: tl.constexpr, low: tl.constexpr,
    held: tl.constexpr, step: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Some rows of B's gradient or, from program `tiles` on, columns of A's."""
    begin(early)
    number = tl.program_id(0)
    if number < tiles:
        _slope(
            grad_ptr, inner_ptr, for_b_ptr, number * held, scaling, rows, outputs, rank, 1,
            rank, low, held, step,
        )  # fmt: skip
    else:
        _slope(
            x_ptr, of_inner_ptr, for_a_ptr, (number - tiles) * held, scaling, rows, inputs,
            1, inputs, rank, low, held, step,
        )  # fmt: skip


@triton.jit
def _slope(
    wide_ptr, narrow_ptr, slope_ptr, first, scaling, rows,
    width: tl.constexpr, column_stride: tl.constexpr, rank_stride: tl.constexpr,
    rank: tl.constexpr, low: tl.constexpr, held: tl.constexpr, step: tl.constexpr,
):  # fmt: skip
    """s wide^T narrow of the columns from `first` on."""
    column, rank_at = first + tl.arange(0, held), tl.arange(0, low)
    wanted, within = (column < width)[:, None], (rank_at < rank)[None, :]
    total = tl.zeros((held, low), tl.float32)
    for start in range(0, rows, step):
        row = start + tl.arange(0, step)
        there, at = row < rows, row.to(tl.int64)
        wide_at = wide_ptr + at[None, :] * width + column[:, None]
        wide = tl.load(wide_at, mask=wanted & there[None, :], other=0.0)
        narrow_at = narrow_ptr + at[:, None] * rank + rank_at[None, :]
        narrow = tl.load(narrow_at, mask=within & there[:, None], other=0.0)
        total = tl.dot(wide, narrow, total)
    slope = (scaling * total).to(slope_ptr.dtype.element_ty)
    at = slope_ptr + column[:, None] * column_stride + rank_at[None, :] * rank_stride
    tl.store(at, slope, mask=wanted & within)
