"""What stands between the products: activations, the root-mean-square norm, rotary embeddings.

Each is the formula of its source with as few passes over memory as its gradient allows: on a CPU
these cost as much as the products of a small model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ppo_lab.models.fast.kernels import kernels_for

# gelu by tanh: x sigmoid(A x + B x^3), since (1 + tanh(u)) / 2 = sigmoid(2 u).
A = 2.0 * math.sqrt(2.0 / math.pi)
B = A * 0.044715


def gelu_tanh(x: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2.

    In float32 by one sigmoid, whose exponential is three times faster on a CPU than torch's tanh;
    coarser types would lose digits between the steps.

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return F.gelu(x, approximate="tanh")
    return _GeluTanh.apply(x) if torch.is_grad_enabled() else _gate(x).mul_(x)


class _GeluTanh(torch.autograd.Function):
    """With s the sigmoid, x s and the slope s + s (x - x s) (A + 3 B x^2), which is kept in place
    of x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        s = _gate(x)
        if not ctx.needs_input_grad[0]:
            return s.mul_(x)
        y = x * s
        inner = torch.addcmul(x.new_tensor(A), x, x, value=3.0 * B).mul_(x - y)
        ctx.save_for_backward(s.addcmul_(s, inner))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return grads[0] * slope


def _gate(x: Tensor) -> Tensor:
    return torch.addcmul(x.new_tensor(A), x, x, value=B).mul_(x).sigmoid_()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}


def rows_activated(
    activation: str, z: Float[Tensor, "rows width"], u: Float[Tensor, "rows width"] | None = None
) -> Float[Tensor, "rows width"]:
    """a(z) or, gated, a(z) u."""
    if (kernels := kernels_for(z.device)) is not None:
        return kernels.activate_rows(z, activation, u)
    y = ACTIVATIONS[activation](z)
    return y if u is None else y * u


def halves_activated(
    activation: str, both: Float[Tensor, "rows twice_width"]
) -> Float[Tensor, "rows width"]:
    """a(z) u of the halves z and u of each row."""
    if (kernels := kernels_for(both.device)) is not None:
        return kernels.activate_halves(both, activation)
    return rows_activated(activation, *both.chunk(2, 1))


# Rows that a kernel holds at once are at most so wide.
WIDEST = 2**14

# From so many numbers on torch's own root-mean-square norm, which makes a tensor of every step, is
# the slower one on a CPU.
LARGE = 2**16

# Norms whose factor is 1 + w, multiplied before the result is rounded.
AROUND_ONE = ("GemmaRMSNorm", "Gemma3RMSNorm")


def normed(module: Any, x: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
    """What a norm of the model gives: a layer norm's, or else a root-mean-square norm's. Without
    one, x.
    """
    if module is None:
        return x
    if type(module).__name__ in AROUND_ONE:
        return _scaled_to_one(x.float(), 1.0 + module.weight.float(), module.eps).to(x.dtype)
    weight = module.weight.to(x.dtype)
    if isinstance(module, torch.nn.LayerNorm):
        bias = None if module.bias is None else module.bias.to(x.dtype)
        return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
    return _scaled_to_one(x, weight, module.variance_epsilon)


def added_and_normed(
    module: Any, x: Float[Tensor, "rows width"], y: Float[Tensor, "rows width"] | None
) -> tuple[Float[Tensor, "rows width"], Float[Tensor, "rows width"]]:
    """x + y, or x where there is nothing to add, and what a norm gives for it."""
    if y is None:
        return x, normed(module, x)
    kernels = kernels_for(x.device)
    if kernels is None or not _is_frozen_and_usual(module, x):
        x = x + y
        return x, normed(module, x)
    centred = isinstance(module, torch.nn.LayerNorm)
    eps = module.eps if centred else module.variance_epsilon
    return kernels.add_norm(x, y, module.weight, getattr(module, "bias", None), eps, centred)


def _is_frozen_and_usual(module: Any, x: Tensor) -> bool:
    """Whether a kernel knows a norm, and nothing in it is to be learnt now."""
    if module is None or type(module).__name__ in AROUND_ONE or x.shape[1] > WIDEST:
        return False
    return not (torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()))


def _scaled_to_one(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.contiguous()  # products lie the other way round
    if torch.is_grad_enabled() and x.device.type == "cpu":
        return _RootMeanSquare.apply(x, weight, eps)
    if x.device.type != "cpu" or x.numel() < LARGE:
        return F.rms_norm(x, weight.shape, weight, eps)
    return _unit(x, eps)[0].mul_(weight)


def _unit(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps), and the factors of its rows."""
    wide = x.float()
    mean = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    scale = mean.add_(eps).rsqrt_()
    return (wide * scale).to(x.dtype), scale


class _RootMeanSquare(torch.autograd.Function):
    """w x / sqrt(mean(x^2) + eps). Source: Zhang and Sennrich 2019, arXiv:1910.07467."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        unit, scale = _unit(x, eps)
        ctx.save_for_backward(unit, weight, scale)
        return unit * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """With u = x / sqrt(...): (w g - u mean(w g u)) / sqrt(...), and sum(g u) for w."""
        unit, weight, scale = ctx.saved_tensors
        grad, wide, factor = grads[0].float(), unit.float(), weight.float()
        product = grad * wide
        for_weight = None
        if ctx.needs_input_grad[1]:
            for_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
        inner = (product @ factor)[..., None].div_(-unit.shape[-1])
        slope = (grad * factor).addcmul_(wide, inner).mul_(scale)
        return slope.to(unit.dtype), for_weight, None


def rotated(
    x: Float[Tensor, "... heads size"],
    cos: Float[Tensor, "... heads size"],
    sin: Float[Tensor, "... heads size"],
    half: int,
) -> Float[Tensor, "... heads size"]:
    """Each pair (x_i, x_{i + half}) turned by its angle; what lies beyond the pairs stays.

        x cos + swapped(x) sin

    `cos` and `sin` are given for every number, as `spread_angles` makes them.

    Source: Su et al. 2021, arXiv:2104.09864, the halves paired as GPT-NeoX pairs them.
    """
    if not torch.is_grad_enabled():
        return _turned(x, cos, sin, half)
    return _Turn.apply(x, cos, sin, half)


def spread_angles(
    cos: Float[Tensor, "... pairs"], sin: Float[Tensor, "... pairs"], *, heads: int, size: int
) -> tuple[Tensor, Tensor]:
    """The cosines and signed sines (..., heads, size) of every number of every head."""
    beyond = cos.new_zeros(*cos.shape[:-1], size - 2 * cos.shape[-1])
    both = torch.cat([cos, cos, beyond + 1.0], -1), torch.cat([-sin, sin, beyond], -1)
    wide, signed = (x[..., None, :].expand(*x.shape[:-1], heads, size).contiguous() for x in both)
    return wide, signed


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, half: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.half = half
        return _turned(x, cos, sin, half)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """The turn back: by the negative angle."""
        cos, sin = ctx.saved_tensors
        turned = (grads[0] * cos).addcmul_(_swapped(grads[0], ctx.half), sin, value=-1.0)
        return turned, None, None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, half: int) -> Tensor:
    # Products lie the other way round than angles do, and many strided passes cost more than one.
    x = x.contiguous()
    return torch.addcmul(x * cos, _swapped(x, half), sin)


def _swapped(x: Tensor, half: int) -> Tensor:
    return torch.cat([x[..., half : 2 * half], x[..., :half], x[..., 2 * half :]], -1)
