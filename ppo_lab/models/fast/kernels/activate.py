"""A feed-forward part's activation, gated or not, and its gradient, as Triton kernels.

    y = a(z)     or, gated,     y = a(z) u     dz = dy u a'(z)     du = dy a(z)

Each is bound by the walk through memory, once it takes no more arithmetic than it must: torch's
gelu by tanh spends as long on that tanh as on the walk, and a gate is a walk more in either
direction. Of the forward pass z and u are kept alone. Sums are float32; a(z) is rounded to the
precision of z before it is multiplied, as it is elsewhere.

Triton comes with torch's builds for CUDA. This module is imported where it is there alone.

Source: Hendrycks and Gimpel 2016, arXiv:1606.08415, for gelu; Shazeer 2020, arXiv:2002.05202, for
    gates.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from ppo_lab.models.fast.kernels.early import begin, launched_early

# Numbers of a program at the most, forward and backward.
BLOCK = 2048
BACK = 1024

# gelu by tanh is z sigmoid(A z + B z^3), as in `elementwise`; by erf, z (1 + erf(z / sqrt(2))) / 2,
# whose slope has the normal density. A nat is so many units of log 2, whose exponential a GPU has.
A = tl.constexpr(2.0 * math.sqrt(2.0 / math.pi))
B = tl.constexpr(2.0 * math.sqrt(2.0 / math.pi) * 0.044715)
NAT = tl.constexpr(1.0 / math.log(2.0))
HALF_ROOT = tl.constexpr(math.sqrt(0.5))
DENSITY = tl.constexpr(1.0 / math.sqrt(2.0 * math.pi))


def activate_rows(
    z: Float[Tensor, "rows width"], activation: str, u: Float[Tensor, "rows width"] | None = None
) -> Float[Tensor, "rows width"]:
    """a(z), or a(z) u; `activation` is the name of one of `elementwise`'s."""
    return _Activate.apply(z.contiguous(), None if u is None else u.contiguous(), activation)


def activate_halves(
    both: Float[Tensor, "rows twice_width"], activation: str
) -> Float[Tensor, "rows width"]:
    """a(z) u of the two halves of each row."""
    return _ActivateHalves.apply(both.contiguous(), activation)


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, u: Tensor | None, activation: str) -> Tensor:
        ctx.save_for_backward(z, u)
        ctx.activation = activation
        return _activated(z, u, torch.empty_like(z), activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, u = ctx.saved_tensors
        for_z, for_u = torch.empty_like(z), None if u is None else torch.empty_like(u)
        _pull_back(grads[0].contiguous(), z, u, for_z, for_u, ctx.activation)
        return for_z, for_u, None


class _ActivateHalves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(both)
        ctx.activation = activation
        z, u = both.chunk(2, 1)
        return _activated(z, u, both.new_empty(z.shape), activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (both,) = ctx.saved_tensors
        for_both = torch.empty_like(both)
        (z, u), (for_z, for_u) = both.chunk(2, 1), for_both.chunk(2, 1)
        _pull_back(grads[0].contiguous(), z, u, for_z, for_u, ctx.activation)
        return for_both, None


def _activated(z: Tensor, u: Tensor | None, y: Tensor, activation: str) -> Tensor:
    rows, width = z.shape
    block = min(BLOCK, triton.next_power_of_2(width))
    _forward[(rows, triton.cdiv(width, block))](
        z, z if u is None else u, y, z.stride(0),
        width=width, activation=activation, gated=u is not None, block=block,
        **launched_early(z.device),
    )  # fmt: skip
    return y


def _pull_back(
    grad: Tensor,
    z: Tensor,
    u: Tensor | None,
    for_z: Tensor,
    for_u: Tensor | None,
    activation: str,
) -> None:
    """The gradients, put in their places; they lie as what they are of."""
    rows, width = z.shape
    block = min(BACK, triton.next_power_of_2(width))
    _backward[(rows, triton.cdiv(width, block))](
        grad, z, z if u is None else u, for_z, z if for_u is None else for_u, z.stride(0),
        width=width, activation=activation, gated=u is not None, block=block,
        **launched_early(z.device),
    )  # fmt: skip


@triton.jit
def _forward(
    z_ptr, u_ptr, y_ptr, row_stride,
    width: tl.constexpr, activation: tl.constexpr, gated: tl.constexpr, block: tl.constexpr,
    early: tl.constexpr,
):  # fmt: skip
    begin(early)
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * block + tl.arange(0, block)
    inside, at = column < width, row * row_stride + column
    z = tl.load(z_ptr + at, mask=inside, other=0.0)
    y = activated(z.to(tl.float32), activation).to(z.dtype)
    if gated:
        u = tl.load(u_ptr + at, mask=inside, other=0.0)
        y = (y.to(tl.float32) * u.to(tl.float32)).to(z.dtype)
    tl.store(y_ptr + row * width + column, y, mask=inside)


@triton.jit
def _backward(
    grad_ptr, z_ptr, u_ptr, for_z_ptr, for_u_ptr, row_stride,
    width: tl.constexpr, activation: tl.constexpr, gated: tl.constexpr, block: tl.constexpr,
    early: tl.constexpr,
):  # fmt: skip
    begin(early)
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * block + tl.arange(0, block)
    inside, at = column < width, row * row_stride + column
    grad = tl.load(grad_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if gated:
        a = activated(z, activation).to(grad_ptr.dtype.element_ty).to(tl.float32)
        tl.store(for_u_ptr + at, (grad * a).to(for_u_ptr.dtype.element_ty), mask=inside)
        grad *= tl.load(u_ptr + at, mask=inside, other=0.0).to(tl.float32)
    for_z = grad * _slope(z, activation)
    tl.store(for_z_ptr + at, for_z.to(for_z_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp2(-NAT * z))


@triton.jit
def activated(z, activation: tl.constexpr):
    """a(z), given and made in float32."""
    if activation == "gelu":
        a = 0.5 * z * (1.0 + tl.math.erf(HALF_ROOT * z))
    elif activation == "gelu_new" or activation == "gelu_pytorch_tanh":
        a = z * _sigmoid(z * (A + B * z * z))
    elif activation == "silu" or activation == "swish":
        a = z * _sigmoid(z)
    else:
        tl.static_assert(activation == "relu", "no such activation")
        a = tl.where(z < 0.0, 0.0, z)  # which leaves what is not a number
    return a


@triton.jit
def _slope(z, activation: tl.constexpr):
    """a'(z)."""
    if activation == "gelu":
        slope = 0.5 * (1.0 + tl.math.erf(HALF_ROOT * z)) + z * DENSITY * tl.exp(-0.5 * z * z)
    elif activation == "gelu_new" or activation == "gelu_pytorch_tanh":
        s = _sigmoid(z * (A + B * z * z))
        slope = s + z * s * (1.0 - s) * (A + 3.0 * B * z * z)
    elif activation == "silu" or activation == "swish":
        s = _sigmoid(z)
        slope = s + z * s * (1.0 - s)
    else:
        tl.static_assert(activation == "relu", "no such activation")
        slope = tl.where(z > 0.0, 1.0, 0.0)
    return slope
