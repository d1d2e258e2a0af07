"""One token a row from a softmax, with everything that its exponentials say taken once.

The log-probability and the entropy fall out of the exponentials e_v = exp(z_v - m) that the token
is chosen by, where m is the largest logit and S = sum_v e_v:

    log p(y)  =  z_y - m - log S
    H         =  m + log S - sum_v e_v z_v / S

Of a row's exponentials only sums over FAN are kept; those of the chosen sum are taken again. On a
GPU kernels do all of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ppo_lab.models.choice import FAN, branched, child, choose, depth
from ppo_lab.models.fast.kernels import kernels_for

# From here on a row's exponentials fill a core's cache, and a CPU takes row by row.
LARGE_VOCABULARY = 2**16


class Drawn(NamedTuple):
    """Tokens, and their log-probabilities and the distributions' entropies in nats."""

    tokens: Int[Tensor, " batch"]
    logprobs: Float[Tensor, " batch"]
    entropy: Float[Tensor, " batch"]


class Weighed(NamedTuple):
    """What is kept of a row: the largest logit, log of the exponentials' sum, entropy, and sums."""

    largest: Float[Tensor, " batch"]
    log_total: Float[Tensor, " batch"]
    entropy: Float[Tensor, " batch"]
    sums: Float[Tensor, "batch parents"]


def draw_from(
    products: Float[Tensor, "batch vocab"],
    uniforms: Float[Tensor, "batch levels"],
    *,
    scale: float = 1.0,
) -> Drawn:
    """One token a row at that row's uniform numbers in [0, 1), from softmax(scale * products)."""
    if (kernels := kernels_for(products.device)) is not None:
        return Drawn(*kernels.draw_rows(products, uniforms, scale))
    rows = _weighed(products, scale)
    parents, many = choose(rows.sums, uniforms), rows.sums.shape[1]
    members = parents[:, None] + many * torch.arange(FAN, device=products.device)
    beyond = members >= products.shape[1]
    z = _logits(products.gather(1, members.masked_fill(beyond, 0)), scale)
    terms = _terms(z, rows.largest[:, None])
    last = child(terms.masked_fill(beyond, 0.0), uniforms[:, depth(many)])
    chosen = z.gather(1, last[:, None])[:, 0]
    return Drawn(parents + many * last, chosen - rows.log_total, rows.entropy)


def _weighed(products: Float[Tensor, "batch vocab"], scale: float) -> Weighed:
    by_rows = products.shape[1] >= LARGE_VOCABULARY and products.device.type == "cpu"
    rows = products.split(1) if by_rows else [products]
    parts = [_weigh(_logits(part, scale)) for part in rows]
    return Weighed(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _weigh(logits: Float[Tensor, "batch vocab"]) -> Weighed:
    largest = logits.amax(1)
    terms = _terms(logits, largest[:, None])
    sums = branched(terms).sum(1)
    total = sums.sum(1, dtype=torch.float64)
    log_total = largest + total.log().float()
    mean = torch.linalg.vecdot(terms, logits) / total.float()
    return Weighed(largest, log_total, log_total - mean, sums)


def _logits(products: Tensor, scale: float) -> Tensor:
    return products.float() if scale == 1.0 else products.float() * scale


def _terms(logits: Tensor, largest: Tensor) -> Tensor:
    """The exponentials; near the smallest normal number they would be slow, so below 2e-35 they
    are 0.
    """
    return torch.threshold_((logits - largest).clamp_(min=-80.0).exp_(), 2e-35, 0.0)
