"""Matrix products with frozen weights, laid out as a CPU's kernels like them.

F.linear(x, W) computes x W^T and must first repack W, which for a few hundred rows of x costs as
much as the product. W x^T is the same numbers transposed, takes W as it lies in memory and repacks
the small x instead: 1.2 to 1.6 times faster on a CPU with AMX, 1.2 to 1.5 times on two cores with
AVX2. The result is a transposed view of it; elementwise operations do not mind.

Few rows times a whole vocabulary is bound by the walk through W, which many small products take
faster than one large one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# Weights of this many elements are widened at a time: 2 MiB in float32, which a core's cache holds.
WIDENED = 2**19

# Outputs of each of the products that a wide one is made of, and how many make it wide.
SLICE = 256
WIDE = 2**12


@functools.cache
def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The precision in which a CPU multiplies weights of this type: float32 where it has no
    instructions for bfloat16, since its emulation is many times slower than widening.
    """
    native = dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype if native else torch.float32


def product(
    x: Float[Tensor, "rows inputs"], weight: Float[Tensor, "outputs inputs"], bias: Tensor | None
) -> Float[Tensor, "rows outputs"]:
    """x W^T + b in the precision of x, whatever the layout of the result."""
    if not torch.is_grad_enabled():
        return _times(x, weight, bias)
    if x.device.type == "cpu" and not _is_trained(weight, bias):
        return _Frozen.apply(x, weight, bias)
    return F.linear(x, weight.to(x.dtype), bias if bias is None else bias.to(x.dtype))


def wide_product(
    x: Float[Tensor, "rows inputs"], weight: Float[Tensor, "outputs inputs"], bias: Tensor | None
) -> Float[Tensor, "rows outputs"]:
    """x W^T + b, contiguous, for few rows and many outputs."""
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    wide = len(weight) >= WIDE and weight.is_contiguous()
    if torch.is_grad_enabled() or not (plain and wide):
        return product(x, weight, bias).contiguous()
    rows, inputs = x.shape
    slices = len(weight) // SLICE
    whole, rest = weight.split((slices * SLICE, len(weight) % SLICE))
    y = x.new_empty(rows, len(weight))
    parts = torch.bmm(x.expand(slices, -1, -1), whole.view(slices, SLICE, inputs).mT)
    y[:, : len(whole)].view(rows, slices, SLICE).copy_(parts.transpose(0, 1))
    torch.mm(x, rest.t(), out=y[:, len(whole) :])
    return y if bias is None else y.add_(bias)


class _Frozen(torch.autograd.Function):
    """x W^T + b with the gradient of x alone, which is g W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _times(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _pulled_back(grads[0], weight), None, None


class _Adapted(torch.autograd.Function):
    """y = W x + b + sum s B A x over the adapters, W and b frozen:

        dx = W^T g + sum s A^T B^T g        dA = s (B^T g) x^T        dB = s g (A x)^T

    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scalings: Sequence[float],
        *matrices: Tensor,
    ) -> Tensor:
        y, inner = _adapted(x, weight, bias, scalings, matrices)
        ctx.save_for_backward(x, weight, *matrices, *inner)
        ctx.scalings = scalings
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), many = grads, len(ctx.scalings)
        x, weight, *rest = ctx.saved_tensors
        for_x = _pulled_back(grad, weight) if ctx.needs_input_grad[0] else None
        for_matrices = []
        for scaling, (a, b), inner in zip(
            ctx.scalings, _pairs(rest[: 2 * many]), rest[2 * many :], strict=True
        ):
            of_inner = _scaled_product(grad, b, scaling)
            for_matrices += [of_inner.t() @ x, _scaled_product(grad.t(), inner, scaling)]
            if for_x is not None:
                for_x.addmm_(of_inner, a)
        return for_x, None, None, None, *for_matrices


def _adapted(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scalings: Sequence[float],
    matrices: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """W x + b + sum s B A x given A and B of each adapter in turn; and A x of each."""
    y, inner = _times(x, weight, bias), []
    for scaling, (a, b) in zip(scalings, _pairs(matrices), strict=True):
        inner.append(F.linear(x, a))
        if y.is_contiguous():
            y.addmm_(inner[-1], b.t(), alpha=scaling)
        else:
            y.t().addmm_(b, inner[-1].t(), alpha=scaling)
    return y, inner


def _scaled_product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """s a b in one kernel; what it is added to does not count."""
    return torch.addmm(a.new_empty(1), a, b, beta=0, alpha=scaling)


def _pairs(matrices: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """A and B of each adapter."""
    return list(zip(matrices[::2], matrices[1::2], strict=True))


def _is_trained(weight: Tensor, bias: Tensor | None) -> bool:
    return weight.requires_grad or (bias is not None and bias.requires_grad)


def _pulled_back(grad: Tensor, weight: Tensor) -> Tensor:
    """g W, the gradient of x in x W^T."""
    if grad.device.type != "cpu":
        return grad @ weight.to(grad.dtype)
    if weight.dtype == grad.dtype:
        # Of a layer that narrows, it lies as the slope of the activation before it does.
        narrows = weight.shape[0] < weight.shape[1]
        return torch.mm(weight.t(), grad.t()).t() if narrows else torch.mm(grad, weight)
    slope = grad.new_zeros(len(grad), weight.shape[1])
    for g, w in zip(*_tiles(grad, weight), strict=True):
        slope.addmm_(g, w.to(g.dtype))
    return slope


def _times(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.device.type != "cpu":
        return F.linear(x, weight.to(x.dtype), bias if bias is None else bias.to(x.dtype))
    if weight.dtype != x.dtype:
        return _widened(x, weight, bias)
    if bias is None:
        return torch.mm(weight, x.t()).t()
    return torch.addmm(bias[:, None], weight, x.t()).t()


def _widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product with each tile of the weight widened just before it is needed."""
    y = x.new_empty(len(weight), len(x))
    for part, w in zip(*_tiles(y.t(), weight), strict=True):
        torch.mm(w.to(x.dtype), x.t(), out=part.t())
    return y.t() if bias is None else y.t().add_(bias.to(x.dtype))


def _tiles(y: Tensor, weight: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Columns of the result, and the rows of the weight that make them."""
    rows = max(1, WIDENED // weight.shape[1])
    return y.split(rows, 1), weight.split(rows)


def is_plain(module: Any) -> bool:
    """Whether `Linear` can read this module: a linear layer, or LoRA of the usual kind on one."""
    if type(module) in (nn.Linear, Conv1D):
        return True
    return type(module).__name__ == "Linear" and _is_usual_lora(module)


class Linear(NamedTuple):
    """A linear layer as it stands: W, b, and of each active adapter the scaling, A and B."""

    weight: Float[Tensor, "outputs inputs"]
    bias: Float[Tensor, " outputs"] | None
    scalings: tuple[float, ...] = ()
    matrices: tuple[Tensor, ...] = ()

    @classmethod
    def read(cls, module: Any, dtype: torch.dtype | None = None) -> Linear:
        """That of a module, its adapters in the precision that they are computed in, or as they
        are.
        """
        base = module.base_layer if hasattr(module, "base_layer") else module
        # GPT-2's layers hold the transposed weight.
        weight = base.weight.t() if isinstance(base, Conv1D) else base.weight
        if base is module or module.disable_adapters:
            return cls(weight, base.bias)
        names = [name for name in module.active_adapters if name in module.lora_A]
        matrices = [part[name].weight for name in names for part in (module.lora_A, module.lora_B)]
        return cls(
            weight,
            base.bias,
            tuple(module.scaling[name] for name in names),
            tuple(matrix.to(dtype or matrix.dtype) for matrix in matrices),
        )

    def __call__(self, x: Float[Tensor, "rows inputs"]) -> Float[Tensor, "rows outputs"]:
        """W x + b, and for each adapter + scaling B A x, all in the precision of x."""
        if not self.scalings:
            return product(x, self.weight, self.bias)
        if not torch.is_grad_enabled():
            return _adapted(x, *self)[0]
        if not _is_trained(self.weight, self.bias):
            return _Adapted.apply(x, self.weight, self.bias, self.scalings, *self.matrices)
        y = product(x, self.weight, self.bias)
        for scaling, (a, b) in zip(self.scalings, _pairs(self.matrices), strict=True):
            y = torch.add(y, F.linear(F.linear(x, a), b), alpha=scaling)
        return y


def _is_usual_lora(module: Any) -> bool:
    """LoRA on a linear layer: no variant such as DoRA, nothing merged, no dropout, no bias."""
    base = type(getattr(module, "base_layer", None))
    if not hasattr(module, "lora_A") or base not in (nn.Linear, Conv1D):
        return False
    dropouts = [m for m in module.lora_dropout.values() if getattr(m, "p", 0.0)]
    biased = [m for m in module.lora_B.values() if m.bias is not None]
    return not (module.merged or module.lora_variant or dropouts or biased)
