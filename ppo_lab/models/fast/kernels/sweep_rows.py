"""`sweep` for a GPU: log-probabilities and their gradient in one walk through a large vocabulary.

    log p(y)       =  z_y - m - log sum_v exp(z_v - m)
    d log p(y)/dh  =  s (W_y - sum_v p_v W_v)

Tile by tile of the vocabulary, products of half precision go to a buffer, a Triton kernel brings
the running maximum m and the sums up to date and leaves exp(z - m) in the products' place, and one
more product adds that times W to sum_v exp(z_v - m) W_v, in float32. Nothing is computed again in
backward: two products a tile in place of three. Where a tile does not raise m, as most do not, the
sum of W_v is not touched. The head must be frozen.

Triton comes with torch's builds for CUDA. This module is imported where it is there alone.

Source: Milakov and Gimelshein 2018, arXiv:1805.02867, for the running maximum.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from ppo_lab.models.fast.kernels.early import begin, launched_early
from ppo_lab.models.fast.sweep import GPU_TILE, GPU_TOKENS

# Logits that a program looks at together.
BLOCK = 2048


def sweep_rows(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, " vocab"] | None,
    targets: Int[Tensor, " tokens"],
    scale: float,
) -> Float[Tensor, " tokens"]:
    """log softmax(scale (W h + b)) of the targets, differentiable in h."""
    return _Sweep.apply(hidden.to(weight.dtype), weight, bias, targets, scale)


class _Sweep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float
    ) -> Tensor:
        parts = [
            _swept(h, weight, bias, t, scale, pulls=ctx.needs_input_grad[0])
            for h, t in zip(hidden.split(GPU_TOKENS), targets.split(GPU_TOKENS), strict=True)
        ]
        ctx.dtype = hidden.dtype
        slopes = [slope for _, slope in parts if slope is not None]
        if slopes:
            ctx.save_for_backward(torch.cat(slopes))
        return torch.cat([logprobs for logprobs, _ in parts])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (slope * grads[0][:, None]).to(ctx.dtype), None, None, None, None


def _swept(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: float,
    *,
    pulls: bool,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities and, where asked for, their slopes in the hidden states."""
    tokens, width = hidden.shape
    zeros = partial(hidden.new_zeros, dtype=torch.float32)
    largest, total = zeros(tokens) - torch.inf, zeros(tokens)
    of_target = zeros(tokens)
    pulled = zeros((tokens, width)) if pulls else None
    buffer = hidden.new_empty(tokens, min(GPU_TILE, len(weight)))
    for start in range(0, len(weight), GPU_TILE):
        rows = weight[start : start + GPU_TILE]
        products = buffer[:, : len(rows)]
        if bias is None:
            torch.mm(hidden, rows.t(), out=products)
        else:
            torch.addmm(bias[start : start + GPU_TILE], hidden, rows.t(), out=products)
        _fold[(tokens,)](
            products, products.stride(0), targets, largest, total, of_target,
            total if pulled is None else pulled, start, len(rows), width, scale,
            keeps=pulls, block=BLOCK, num_warps=8, **launched_early(hidden.device),
        )  # fmt: skip
        if pulled is not None:
            _add_product(pulled, products, rows)
    slope = None
    if pulled is not None:
        mean = pulled.div_(total[:, None])
        slope = weight[targets].float().sub_(mean).mul_(scale)
    return of_target - largest - total.log(), slope


def _add_product(to: Tensor, a: Tensor, b: Tensor) -> None:
    """to += a b, summed in float32."""
    if a.dtype == torch.float32:
        to.addmm_(a, b)
    else:
        torch.addmm(to, a, b, out_dtype=torch.float32, out=to)


@triton.jit
def _fold(
    products_ptr, row_stride, targets_ptr, largest_ptr, total_ptr, of_target_ptr, pulled_ptr,
    first, columns, width, scale,
    keeps: tl.constexpr, block: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """One token's products of a tile, which begins at the row `first` of the vocabulary."""
    begin(early)
    token = tl.program_id(0).to(tl.int64)
    products_ptr += token * row_stride
    before = tl.load(largest_ptr + token)
    highest = tl.full((block,), -float("inf"), tl.float32)
    for start in range(0, columns, block):
        column = start + tl.arange(0, block)
        z = tl.load(products_ptr + column, mask=column < columns, other=-float("inf"))
        highest = tl.maximum(highest, z.to(tl.float32) * scale)
    largest = tl.maximum(before, tl.max(highest, 0))
    target = tl.load(targets_ptr + token) - first
    if (target >= 0) & (target < columns):
        z = tl.load(products_ptr + target).to(tl.float32) * scale
        tl.store(of_target_ptr + token, z)
    tl.debug_barrier()  # before terms take the place of products that another thread reads
    sums = tl.zeros((block,), tl.float32)
    for start in range(0, columns, block):
        column = start + tl.arange(0, block)
        z = tl.load(products_ptr + column, mask=column < columns, other=-float("inf"))
        term = tl.exp(z.to(tl.float32) * scale - largest)
        sums += term
        if keeps:
            tl.store(products_ptr + column, term.to(z.dtype), mask=column < columns)
    rescale = tl.exp(before - largest)
    tl.store(largest_ptr + token, largest)
    tl.store(total_ptr + token, tl.load(total_ptr + token) * rescale + tl.sum(sums, 0))
    if (rescale != 1.0) & keeps:
        for start in range(0, width, block):
            column = start + tl.arange(0, block)
            at, inside = pulled_ptr + token * width + column, column < width
            tl.store(at, tl.load(at, mask=inside, other=0.0) * rescale, mask=inside)
