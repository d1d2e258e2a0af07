"""Linear layers, frozen or adapted, as products that keep as little as their gradients need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ppo_lab.models.fast import gemm
from ppo_lab.models.fast.kernels import Kernels, kernels_for

# Products of at most so many rows, of inputs in multiples of this, with a half-precision weight of
# at most so many numbers are a kernel's on a GPU: of larger ones cuBLAS makes better use.
FEW_ROWS = 64
STEP = 128
LARGEST = 2**24
WIDEST_ADAPTER = 64

# Trained weights of fewer numbers, which stay in a core's cache, are left to torch everywhere.
SMALL = 2**16


def product(
    x: Float[Tensor, "rows inputs"], weight: Float[Tensor, "outputs inputs"], bias: Tensor | None
) -> Float[Tensor, "rows outputs"]:
    """x W^T + b in the precision of x, whatever the layout of the result."""
    if not torch.is_grad_enabled():
        return _times(x, weight, bias)
    if x.device.type == "cpu" and not _is_trained(weight, bias):
        return _Frozen.apply(x, weight, bias)
    if _is_worth_its_own(x, weight):
        return _Trained.apply(x, weight, bias)
    return F.linear(x, weight.to(x.dtype), bias if bias is None else bias.to(x.dtype))


def wide_product(
    x: Float[Tensor, "rows inputs"], weight: Float[Tensor, "outputs inputs"], bias: Tensor | None
) -> Float[Tensor, "rows outputs"]:
    """x W^T + b, contiguous, for few rows and many outputs."""
    if torch.is_grad_enabled() or x.device.type != "cpu":
        return product(x, weight, bias).contiguous()
    return gemm.wide(x, weight, bias)


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


class _Trained(torch.autograd.Function):
    """x W^T + b with the gradients g W of x, g^T x of W and sum(g) of b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _times(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            _pulled_back(grad, weight) if for_x else None,
            grad.t() @ x if for_weight else None,
            grad.sum(0) if for_bias else None,
        )


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


class _AdaptedByKernels(torch.autograd.Function):
    """`_Adapted` with one adapter, its matrices in whatever precision they are trained in."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scaling: float,
        a: Tensor,
        b: Tensor,
        kernels: Kernels,
    ) -> Tensor:
        y, inner = kernels.adapted_start(x, a, b, scaling, bias)
        y.addmm_(x, weight.t())
        ctx.save_for_backward(x, weight, a, b, inner)
        ctx.scaling, ctx.kernels = scaling, kernels
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight, a, b, inner), grad = ctx.saved_tensors, grads[0].contiguous()
        start = a.t() if ctx.needs_input_grad[0] else None
        for_x, of_inner = ctx.kernels.adapted_start(grad, b.t(), start, ctx.scaling, None)
        if for_x is not None:
            for_x.addmm_(grad, weight)
        slopes = ctx.kernels.adapter_slopes(x, grad, inner, of_inner, ctx.scaling, a.dtype)
        return for_x, None, None, None, *slopes, None


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


def _adapted_alone(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scalings: Sequence[float],
    matrices: Sequence[Tensor],
) -> Tensor:
    """W x + b + sum s B A x where no gradient is to come."""
    kernels = _for_few_rows(x, weight)
    if kernels is None or not _is_usual_adapter(scalings, matrices):
        return _adapted(x, weight, bias, scalings, matrices)[0]
    return kernels.few_rows(x, weight, bias, scalings[0], *matrices)


def activated(
    x: Float[Tensor, "rows inputs"],
    activation: str,
    up: Linear,
    gate: Linear | None,
    *,
    gate_in_up: bool,
) -> Float[Tensor, "rows outputs"] | None:
    """a(up(x)) or, gated, a(gate(x)) * up(x) by one kernel; None where none is made for it."""
    if torch.is_grad_enabled() or not _are_few(x):
        return None
    linears = up.halves() if gate_in_up else (up,) if gate is None else (gate, up)
    usual = all(_is_usual_adapter(linear.scalings, linear.matrices) for linear in linears)
    kernels = [_for_few_rows(x, linear.weight) for linear in linears]
    if not usual or kernels[0] is None or None in kernels:
        return None
    numbers = [
        (
            linear.weight,
            linear.bias,
            *(linear.scalings or (0.0,)),
            *(linear.matrices or (None,) * 2),
        )
        for linear in linears
    ]
    return kernels[0].few_rows(x, *numbers[0], activation, *numbers[1:])


def _is_usual_adapter(scalings: Sequence[float], matrices: Sequence[Tensor]) -> bool:
    """Whether there is none, or one that a kernel multiplies with its weight."""
    return not scalings or (len(scalings) == 1 and len(matrices[0]) <= WIDEST_ADAPTER)


def _scaled_product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """s a b in one kernel; what it is added to does not count."""
    return torch.addmm(a.new_empty(1), a, b, beta=0, alpha=scaling)


def _pairs(matrices: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """A and B of each adapter."""
    return list(zip(matrices[::2], matrices[1::2], strict=True))


def _is_worth_its_own(x: Tensor, weight: Tensor) -> bool:
    """Whether a trained weight is multiplied faster by another library than torch's choice."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != x.dtype:
        return False
    return weight.numel() >= SMALL and gemm.takes_onednn(x.dtype)


def _is_trained(weight: Tensor, bias: Tensor | None) -> bool:
    return weight.requires_grad or (bias is not None and bias.requires_grad)


def _pulled_back(grad: Tensor, weight: Tensor) -> Tensor:
    """g W, the gradient of x in x W^T."""
    if grad.device.type != "cpu":
        return grad @ weight.to(grad.dtype)
    return gemm.pulled_back(grad, weight)


def _times(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.device.type == "cpu":
        return gemm.times(x, weight, bias)
    if (kernels := _for_few_rows(x, weight)) is not None:
        return kernels.few_rows(x, weight, bias)
    return F.linear(x, weight.to(x.dtype), bias if bias is None else bias.to(x.dtype))


def _for_few_rows(x: Tensor, weight: Tensor) -> Kernels | None:
    """The kernels, where one of them is made for such a product."""
    if not _are_few(x) or weight.numel() > LARGEST or not _is_plain(x, weight):
        return None
    return kernels_for(x.device)


def _for_adapter(x: Tensor, linear: Linear) -> Kernels | None:
    """The kernels, where they are made for such an adapter's gradient."""
    if _is_trained(linear.weight, linear.bias) or not _is_usual_adapter(*linear[2:]):
        return None
    return kernels_for(x.device) if _is_plain(x, linear.weight) else None


def _are_few(x: Tensor) -> bool:
    return x.device.type != "cpu" and len(x) <= FEW_ROWS and x.shape[1] % STEP == 0


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    half = x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    return half and x.is_contiguous() and weight.is_contiguous()


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
        """That of a module, its adapters in a precision, or as they are."""
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

    def halves(self) -> tuple[Linear, Linear]:
        """What gives the first half of the outputs, and what gives the second."""
        biases = (None, None) if self.bias is None else self.bias.chunk(2)
        matrices = [(a, *b.chunk(2)) for a, b in _pairs(self.matrices)]
        first, second = (
            Linear(
                weight, bias, self.scalings, tuple(m for own in matrices for m in (own[0], own[i]))
            )
            for i, weight, bias in zip((1, 2), self.weight.chunk(2), biases, strict=True)
        )
        return first, second

    def __call__(self, x: Float[Tensor, "rows inputs"]) -> Float[Tensor, "rows outputs"]:
        """W x + b, and for each adapter + scaling B A x, all in the precision of x."""
        if not self.scalings:
            return product(x, self.weight, self.bias)
        weight, bias, scalings, matrices = self
        if torch.is_grad_enabled() and (kernels := _for_adapter(x, self)) is not None:
            return _AdaptedByKernels.apply(x, weight, bias, *scalings, *matrices, kernels)
        matrices = tuple(matrix.to(x.dtype) for matrix in matrices)
        if not torch.is_grad_enabled():
            return _adapted_alone(x, weight, bias, scalings, matrices)
        if not _is_trained(weight, bias):
            return _Adapted.apply(x, weight, bias, scalings, *matrices)
        y = product(x, weight, bias)
        for scaling, (a, b) in zip(scalings, _pairs(matrices), strict=True):
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
