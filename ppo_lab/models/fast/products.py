"""Matrix products with frozen weights, laid out as a CPU's kernels like them.

F.linear(x, W) computes x W^T and must first repack W, which for a few hundred rows of x costs as
much as the product. W x^T is the same numbers transposed, takes W as it lies in memory and repacks
the small x instead: 1.2 to 1.6 times faster on a CPU with AMX, 1.2 to 1.5 times on two cores with
AVX2. The result is a transposed view of it; elementwise operations do not mind.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# Weights of this many elements are widened at a time: 2 MiB in float32, which a core's cache holds.
WIDENED = 2**19


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
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if x.device.type != "cpu" or (trained and torch.is_grad_enabled()):
        return F.linear(x, weight.to(x.dtype), bias if bias is None else bias.to(x.dtype))
    return _Frozen.apply(x, weight, bias) if torch.is_grad_enabled() else _times(x, weight, bias)


class _Frozen(torch.autograd.Function):
    """x W^T + b with the gradient of x alone, which is g W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _times(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        if weight.dtype == grads[0].dtype:
            return grads[0] @ weight, None, None
        slope = grads[0].new_zeros(len(grads[0]), weight.shape[1])
        for g, w in zip(*_tiles(grads[0], weight), strict=True):
            slope.addmm_(g, w.to(g.dtype))
        return slope, None, None


def _times(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
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
    """Whether `linear` knows this module: a linear layer, or LoRA of the usual kind on one."""
    if type(module) in (nn.Linear, Conv1D):
        return True
    return type(module).__name__ == "Linear" and _is_usual_lora(module)


def linear(module: Any, x: Float[Tensor, "rows inputs"]) -> Float[Tensor, "rows outputs"]:
    """W x + b, and for each active adapter + scaling B A x, all in the precision of x."""
    base = module.base_layer if hasattr(module, "base_layer") else module
    # GPT-2's layers hold the transposed weight.
    weight = base.weight.t() if isinstance(base, Conv1D) else base.weight
    y = product(x, weight, base.bias)
    if base is module or module.disable_adapters:
        return y
    for name in module.active_adapters:
        if name in module.lora_A:
            a, b = (weights[name].weight.to(x.dtype) for weights in (module.lora_A, module.lora_B))
            y = torch.addmm(y, F.linear(x, a), b.t(), alpha=module.scaling[name])
    return y


def _is_usual_lora(module: Any) -> bool:
    """LoRA on a linear layer: no variant such as DoRA, nothing merged, no dropout, no bias."""
    base = type(getattr(module, "base_layer", None))
    if not hasattr(module, "lora_A") or base not in (nn.Linear, Conv1D):
        return False
    dropouts = [m for m in module.lora_dropout.values() if getattr(m, "p", 0.0)]
    biased = [m for m in module.lora_B.values() if m.bias is not None]
    return not (module.merged or module.lora_variant or dropouts or biased)
