"""Matrix products with frozen weights on a CPU: which library makes them, and how they lie.

torch multiplies float32 with MKL and bfloat16 with oneDNN. Either has to repack W first for x W^T,
which for a few hundred rows of x costs as much as the product; W x^T is the same numbers transposed
and repacks the small x instead. On a CPU with AMX, and by MKL, that is faster. The result is a
transposed view of it; elementwise operations do not mind.

MKL keeps its best for Intel's processors: on AMD's oneDNN is faster in float32 too, unless rows are
few and the weight small, and it takes x W^T and g W as they lie, as it does bfloat16 without AMX.

A large vocabulary times few rows is bound by the walk through W, which MKL takes faster as many
small products than as one large one.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

# Weights of this many elements are widened at a time: 2 MiB in float32, which a core's cache holds.
WIDENED = 2**19

# Outputs of each of the products that a wide one is made of, and how many make it wide.
SLICE = 256
WIDE = 2**12

# Products of so few rows with a float32 weight of fewer elements are MKL's everywhere.
THIN = 32
LARGE = 2**20


@functools.cache
def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The precision in which a CPU multiplies weights of this type: float32 where it has no
    instructions for bfloat16, since its emulation is many times slower than widening.
    """
    native = dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype if native else torch.float32


def times(
    x: Float[Tensor, "rows inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None = None,
) -> Float[Tensor, "rows outputs"]:
    """x W^T + b in the precision of x, whatever the layout of the result."""
    if weight.dtype != x.dtype:
        return _widened(x, weight, bias)
    thin = x.dtype == torch.float32 and len(x) <= THIN and weight.numel() < LARGE
    if takes_onednn(x.dtype) and not thin:
        return _by_onednn(x, weight, bias)
    if bias is None:
        return torch.mm(weight, x.t()).t()
    return torch.addmm(bias[:, None], weight, x.t()).t()


def pulled_back(
    grad: Float[Tensor, "rows outputs"],
    weight: Float[Tensor, "outputs inputs"],
    *,
    across: bool = False,
) -> Float[Tensor, "rows inputs"]:
    """g W, the gradient of x in x W^T; `across` where it may as well lie transposed."""
    if weight.dtype != grad.dtype:
        slope = grad.new_zeros(len(grad), weight.shape[1])
        for g, w in zip(*_tiles(grad, weight), strict=True):
            slope.addmm_(g, w.to(g.dtype))
        return slope
    if takes_onednn(grad.dtype):
        return _by_onednn(grad, weight.t())
    # Of a layer that narrows, it lies as the slope of the activation before it does.
    narrows = weight.shape[0] < weight.shape[1]
    return torch.mm(weight.t(), grad.t()).t() if narrows or across else torch.mm(grad, weight)


def wide(
    x: Float[Tensor, "rows inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None = None,
) -> Float[Tensor, "rows outputs"]:
    """x W^T + b, contiguous, for few rows and many outputs."""
    by_mkl = x.dtype == weight.dtype == torch.float32 and not takes_onednn(x.dtype)
    if not (by_mkl and len(weight) >= WIDE and weight.is_contiguous()):
        return times(x, weight, bias).contiguous()
    rows, inputs = x.shape
    slices = len(weight) // SLICE
    whole, rest = weight.split((slices * SLICE, len(weight) % SLICE))
    y = x.new_empty(rows, len(weight))
    parts = torch.bmm(x.expand(slices, -1, -1), whole.view(slices, SLICE, inputs).mT)
    y[:, : len(whole)].view(rows, slices, SLICE).copy_(parts.transpose(0, 1))
    torch.mm(x, rest.t(), out=y[:, len(whole) :])
    return y if bias is None else y.add_(bias)


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@functools.cache
def takes_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN's products with W as it lies are the fastest here."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype == torch.float32:
        return "AuthenticAMD" in _vendor()
    by_words = "AVX512" in torch.backends.cpu.get_cpu_capability()
    return dtype == torch.bfloat16 and by_words and not torch.cpu._is_amx_tile_supported()


def _vendor() -> str:
    """What says who made the processor, as far as the system tells."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        import platform

        return platform.processor()


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
