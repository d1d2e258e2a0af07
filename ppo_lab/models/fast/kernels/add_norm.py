"""The sum that a part of a layer leaves, and its norm for the next part, as one Triton kernel.

    s = x + y    n = w (s - mean(s)) / sqrt(var(s) + eps) + b    or n = w s / sqrt(mean(s^2) + eps)

On a GPU each is bound by the walk through memory, or for few rows by its launch. With frozen w and
b one more kernel takes their gradient together; u are the states before w and b, and g = w dn:

    dx = dy = ds + (g - mean(g) - u mean(g u)) / sqrt(...)     without mean(g) for the second

Triton comes with torch's builds for CUDA. This module is imported where it is there alone.

Source: Ba et al. 2016, arXiv:1607.06450; Zhang and Sennrich 2019, arXiv:1910.07467.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from ppo_lab.models.fast.kernels.early import begin, launched_early


def add_norm(
    x: Float[Tensor, "rows width"],
    y: Float[Tensor, "rows width"],
    weight: Float[Tensor, " width"],
    bias: Float[Tensor, " width"] | None,
    eps: float,
    centred: bool,
) -> tuple[Float[Tensor, "rows width"], Float[Tensor, "rows width"]]:
    """x + y, and its layer norm where `centred`, else its root-mean-square norm.

    Differentiable in x and y alone.
    """
    return _AddNorm.apply(x.contiguous(), y.contiguous(), weight, bias, eps, centred)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        centred: bool,
    ) -> tuple[Tensor, Tensor]:
        rows, width = x.shape
        total, normed = torch.empty_like(x), torch.empty_like(x)
        means, scales = x.new_empty((2, rows), dtype=torch.float32)
        _forward[(rows,)](
            x, y, weight, weight if bias is None else bias, total, normed, means, scales, eps,
            width=width, centred=centred, biased=bias is not None,
            **_launched(width), **launched_early(x.device),
        )  # fmt: skip
        ctx.save_for_backward(total, weight, means, scales)
        ctx.centred = centred
        return total, normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        for_total, for_normed = (grad.contiguous() for grad in grads)
        total, weight, means, scales = ctx.saved_tensors
        slope = torch.empty_like(total)
        _backward[(len(total),)](
            for_total, for_normed, total, weight, means, scales, slope,
            width=total.shape[1], centred=ctx.centred, **_launched(total.shape[1]),
            **launched_early(total.device),
        )  # fmt: skip
        return slope, slope, None, None, None, None


def _launched(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"block": block, "num_warps": min(16, max(1, block // 512))}


@triton.jit
def _forward(
    x_ptr, y_ptr, weight_ptr, bias_ptr, total_ptr, normed_ptr, means_ptr, scales_ptr, eps,
    width: tl.constexpr, centred: tl.constexpr, biased: tl.constexpr, block: tl.constexpr,
    early: tl.constexpr,
):  # fmt: skip
    begin(early)
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    inside = column < width
    at = row * width + column
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    rounded = (x + y).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + at, rounded, mask=inside)
    s = rounded.to(tl.float32)
    mean = 0.0
    if centred:
        mean = tl.sum(s, 0) / width
        s = tl.where(inside, s - mean, 0.0)
        tl.store(means_ptr + row, mean)
    scale = 1.0 / tl.sqrt(tl.sum(s * s, 0) / width + eps)
    tl.store(scales_ptr + row, scale)
    normed = s * scale * tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if biased:
        normed += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed_ptr + at, normed.to(normed_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    for_total_ptr, for_normed_ptr, total_ptr, weight_ptr, means_ptr, scales_ptr, slope_ptr,
    width: tl.constexpr, centred: tl.constexpr, block: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    begin(early)
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    inside = column < width
    at = row * width + column
    unit = tl.load(total_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scales_ptr + row)
    if centred:
        unit = tl.where(inside, unit - tl.load(means_ptr + row), 0.0)
    unit = unit * scale
    g = tl.load(for_normed_ptr + at, mask=inside, other=0.0).to(tl.float32)
    g = g * tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    slope = g - unit * (tl.sum(g * unit, 0) / width)
    if centred:
        slope -= tl.sum(g, 0) / width
    slope = slope * scale + tl.load(for_total_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(slope_ptr + at, slope.to(slope_ptr.dtype.element_ty), mask=inside)
