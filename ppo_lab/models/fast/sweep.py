"""Log-probabilities of chosen tokens and their gradient in one walk through a large vocabulary.

With z = s (W h + b) / T and y the chosen token,

    log p(y)       =  -log sum_v exp(z_v - z_y)
    d log p(y)/dh  =  s / T (W_y - sum_v p_v W_v)

Both need sums over the vocabulary alone. While a tile of W is at hand, its terms of
sum exp(z_v - z_y) and of sum exp(z_v - z_y) W_v are added: two matrix products, no logits kept,
nothing computed again in backward. The head must be frozen. Shifting by z_y, known beforehand,
spares a running maximum; where the likeliest token is e^80 times likelier than y the sums would
overflow, and the caller is told.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ppo_lab.models.fast.gemm import computed_in, pulled_back, times

# Rows of the vocabulary at a time: tiles of z that stay in a core's cache. `sweep_rows` takes more
# on a GPU, and so many tokens.
TILE = 2048
GPU_TILE = 2**14
GPU_TOKENS = 2**12


def swept_logprobs(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, " vocab"] | None,
    targets: Int[Tensor, " tokens"],
    *,
    scale: float,
) -> Float[Tensor, " tokens"] | None:
    """log softmax(scale (W h + b)) of the targets, differentiable in h; None on overflow."""
    logprobs = _Sweep.apply(hidden.to(computed_in(weight.dtype)), weight, bias, targets, scale)
    return logprobs if bool(logprobs.isfinite().all()) else None


class _Sweep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        chosen = weight[targets].float()
        shift = (hidden.float() * chosen).sum(1)
        shift = shift if bias is None else shift + bias[targets].float()
        # Rounded as the products below are, or z_y - z_y would not be 0.
        shift = shift.to(hidden.dtype).float()[:, None]
        total = torch.zeros(len(targets))
        pulled = torch.zeros(hidden.shape) if wanted else None
        for start in range(0, len(weight), TILE):
            rows = weight[start : start + TILE].to(hidden.dtype)
            of_rows = None if bias is None else bias[start : start + TILE].to(rows.dtype)
            terms = times(hidden, rows, of_rows)
            terms = terms.float().sub_(shift)
            terms = (terms if scale == 1.0 else terms.mul_(scale)).exp_()
            total += terms.sum(1)
            if pulled is not None:
                # Summed over tiles in float32 whatever the precision of the product.
                across = not terms.is_contiguous()
                pulled += pulled_back(terms.to(rows.dtype), rows, across=across)
        if pulled is not None:
            slope = pulled.div_(total[:, None]).neg_().add_(chosen)
            ctx.save_for_backward(slope if scale == 1.0 else slope.mul_(scale))
        return -total.log()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (slope * grads[0][:, None]), None, None, None, None
