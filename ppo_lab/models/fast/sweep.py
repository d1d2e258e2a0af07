"""Log-probabilities of chosen tokens and their gradients, tile by tile of a large vocabulary, on a
CPU: no more logits than a core's cache holds, whatever the vocabulary.

With a = W h + b, the logits z = c(a) and the chosen token y,

    log p(y)       =  -log S        S = sum_v exp(z_v - z_y)
    d log p(y)/dh  =  c'(a_y) W_y - sum_v p_v c'(a_v) W_v
    H              =  log S - sum_v p_v (z_v - z_y)

Each needs sums over the vocabulary alone. Of a frozen head both of the first are made in one walk
through W: while a tile is at hand, its terms of S and of the sum of the W_v are added, two matrix
products, and nothing is computed again in backward. What a trained head learns, and the slope of an
entropy, hang on S and on the gradient that comes back,

    d loss/dz_v  =  g ([v = y] - p_v) - g_H p_v (log p_v + H)

so that backward walks once more and makes each tile again, a product more than logits that are kept
would take. Shifting by z_y, known beforehand, spares a running maximum; where y is less likely than
e^-60 the sums come near to what float32 holds, and the caller is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ppo_lab.models.fast.gemm import computed_in, pulled_back, times

# Rows of the vocabulary at a time: tiles of z that stay in a core's cache. `sweep_rows` takes more
# on a GPU, and so many tokens.
TILE = 2048
GPU_TILE = 2**14
GPU_TOKENS = 2**12

# Log-probs below it are left to the caller: S is at most e^60, and so are its products with states
# and logits far from float32's largest number, e^88.
LEAST = -60.0


class Curve(NamedTuple):
    """From products to logits: z = softcap(scale a) / temperature, where softcap(u) is
    softcap tanh(u / softcap), or u if that is 0.
    """

    scale: float = 1.0
    softcap: float = 0.0
    temperature: float = 1.0

    @property
    def rate(self) -> float:
        """dz/da where nothing is capped."""
        return self.scale / self.temperature

    def logits_(self, products: Tensor) -> Tensor:
        """z, in the memory of a."""
        if not self.softcap:
            return products if self.rate == 1.0 else products.mul_(self.rate)
        capped = products.mul_(self.scale / self.softcap).tanh_()
        return capped.mul_(self.softcap / self.temperature)

    def bend(self, logits: Tensor) -> Tensor | None:
        """dz/da over the rate; None where it is 1."""
        if not self.softcap:
            return None
        return logits.mul(self.temperature / self.softcap).square_().neg_().add_(1.0)


def swept_logprobs(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, " vocab"] | None,
    targets: Int[Tensor, " tokens"],
    curve: Curve,
) -> Float[Tensor, " tokens"] | None:
    """log softmax of the targets in one walk, differentiable in h; None if one is below LEAST."""
    logprobs = _Once.apply(hidden.to(computed_in(weight.dtype)), weight, bias, targets, curve)
    return logprobs if bool((logprobs > LEAST).all()) else None


def swept_twice(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, " vocab"] | None,
    targets: Int[Tensor, " tokens"],
    curve: Curve,
    *,
    entropy: bool = False,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"] | None] | None:
    """log softmax of the targets, and the entropies if asked for, differentiable in h, W and b by
    a second walk; None where a log-prob is below LEAST.
    """
    hidden = hidden.to(computed_in(weight.dtype))
    logprobs, entropies = _Twice.apply(hidden, weight, bias, targets, curve, entropy)
    return (logprobs, entropies) if bool((logprobs > LEAST).all()) else None


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, curve: Curve
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        chosen = weight[targets].float()
        shift = _chosen_logits(hidden, weight, bias, targets, curve)
        total = torch.zeros(len(targets))
        pulled = torch.zeros(hidden.shape) if wanted else None
        for _, rows, logits in _tiles(hidden, weight, bias, curve):
            bend = curve.bend(logits) if wanted else None
            terms = logits.sub_(shift).exp_()
            total += terms.sum(1)
            if pulled is not None:
                terms = terms if bend is None else terms.mul_(bend)
                # Summed over tiles in float32 whatever the precision of the product.
                across = not terms.is_contiguous()
                pulled += pulled_back(terms.to(rows.dtype), rows, across=across)
        if pulled is not None:
            bend = curve.bend(shift)
            slope = (
                pulled.div_(total[:, None]).neg_().add_(chosen if bend is None else chosen * bend)
            )
            ctx.save_for_backward(slope if curve.rate == 1.0 else slope.mul_(curve.rate))
        return -total.log()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (slope * grads[0][:, None]), None, None, None, None


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        curve: Curve,
        entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        shift = _chosen_logits(hidden, weight, bias, targets, curve)
        total, moment = torch.zeros(len(targets)), torch.zeros(len(targets))
        for _, _, logits in _tiles(hidden, weight, bias, curve):
            above = logits.sub_(shift)
            if entropy:
                terms = above.exp()
                moment += above.mul_(terms).sum(1)
            else:
                terms = above.exp_()
            total += terms.sum(1)
        entropies = total.log() - moment / total if entropy else None
        ctx.save_for_backward(hidden, weight, bias, targets, shift, total, entropies)
        ctx.curve = curve
        ctx.set_materialize_grads(False)
        return -total.log(), entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, shift, total, entropies = ctx.saved_tensors
        curve, wanted = ctx.curve, ctx.needs_input_grad
        g, of_entropy = (None if x is None else (x * curve.rate)[:, None] for x in grads)
        g = torch.zeros_like(shift) if g is None else g
        # d loss/dz = exp(z - z_y) (level - slant (z - z_y)), but for the chosen token's own g
        level, slant = -g, None
        if of_entropy is not None:
            slant = of_entropy / total[:, None]
            level = level - of_entropy * (entropies - total.log())[:, None]
        level = level / total[:, None]

        slope = torch.zeros(hidden.shape) if wanted[0] else None
        of_weight = torch.empty_like(weight) if wanted[1] else None
        of_bias = torch.empty_like(bias) if wanted[2] else None
        for place, rows, logits in _tiles(hidden, weight, bias, curve):
            bend = curve.bend(logits)
            above = logits.sub_(shift)
            if slant is None:
                terms = above.exp_().mul_(level)
            else:
                terms = above.exp()
                terms.mul_(above.mul_(slant).neg_().add_(level))
            terms = (terms if bend is None else terms.mul_(bend)).to(rows.dtype)
            if slope is not None:
                slope += pulled_back(terms, rows, across=not terms.is_contiguous())
            if of_weight is not None:
                of_weight[place] = terms.t() @ hidden
            if of_bias is not None:
                of_bias[place] = terms.sum(0)

        bend = curve.bend(shift)
        g = g if bend is None else g * bend
        if slope is not None:
            slope = slope.addcmul_(weight[targets].float(), g).to(hidden.dtype)
        if of_weight is not None:
            of_weight.index_add_(0, targets, (hidden * g).to(of_weight.dtype))
        if of_bias is not None:
            of_bias.index_add_(0, targets, g[:, 0].to(of_bias.dtype))
        return slope, of_weight, of_bias, None, None, None


def _chosen_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, curve: Curve
) -> Float[Tensor, "tokens 1"]:
    products = (hidden.float() * weight[targets].float()).sum(1)
    products = products if bias is None else products + bias[targets].float()
    # Rounded as the products of the tiles are, or z_y - z_y would not be 0.
    return curve.logits_(products.to(hidden.dtype).float()[:, None])


def _tiles(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, curve: Curve
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The place of each tile, its rows of W in the precision of h, and its logits in float32."""
    for start in range(0, len(weight), TILE):
        place = slice(start, start + TILE)
        rows = weight[place].to(hidden.dtype)
        products = times(hidden, rows, None if bias is None else bias[place].to(rows.dtype))
        yield place, rows, curve.logits_(products.float())
