"""One token a row from a softmax: exponentials taken once, sums by blocks.

The cumulative distribution is inverted in two steps: first over sums of blocks of the vocabulary,
then within the block that holds the number. The log-probability and the entropy fall out of the
same exponentials e_v = exp(z_v - m), where m is the largest logit and S = sum_v e_v:

    log p(y)  =  z_y - m - log S
    H         =  m + log S - sum_v e_v z_v / S

A token without mass is never drawn, not even by a number that rounding takes to the very end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 512

# From here on a row's exponentials fill a core's cache, and a CPU takes row by row.
LARGE_VOCABULARY = 2**16


class Drawn(NamedTuple):
    """Tokens, and their log-probabilities and the distributions' entropies in nats."""

    tokens: Int[Tensor, " batch"]
    logprobs: Float[Tensor, " batch"]
    entropy: Float[Tensor, " batch"]


def draw_from(logits: Float[Tensor, "batch vocab"], uniforms: Float[Tensor, " batch"]) -> Drawn:
    """One token a row at that row's uniform number in [0, 1), from softmax(logits)."""
    if logits.shape[1] < LARGE_VOCABULARY or logits.device.type != "cpu":
        return _draw(logits.float(), uniforms.double())
    pairs = zip(logits.float().split(1), uniforms.double().split(1), strict=True)
    rows = [_draw(z, u) for z, u in pairs]
    return Drawn(*map(torch.cat, zip(*rows, strict=True)))


def _draw(logits: Float[Tensor, "batch vocab"], uniforms: Float[Tensor, " batch"]) -> Drawn:
    largest = logits.amax(1, keepdim=True)
    # Exponentials near the smallest normal number would be slow; those below 2e-35 are 0.
    terms = torch.threshold_((logits - largest).clamp_(min=-80.0).exp_(), 2e-35, 0.0)
    mean = torch.linalg.vecdot(terms, logits)
    blocks = F.pad(terms, (0, -terms.shape[1] % BLOCK)).view(len(terms), -1, BLOCK)
    sums = blocks.sum(2).double().cumsum(1)
    threshold = uniforms[:, None] * sums[:, -1:]
    block = _first_beyond(sums, threshold)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0].double().cumsum(1)
    token = block * BLOCK + _first_beyond(inside, threshold - before)
    log_total = sums[:, -1].log().float()
    logprobs = (logits.gather(1, token) - largest)[:, 0] - log_total
    return Drawn(token[:, 0], logprobs, largest[:, 0] + log_total - mean / sums[:, -1].float())


def _first_beyond(
    sums: Float[Tensor, "batch parts"], threshold: Float[Tensor, "batch 1"]
) -> Int[Tensor, "batch 1"]:
    """The first part at which the sum exceeds the threshold, or the last one with mass."""
    last = torch.searchsorted(sums, sums[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(sums, threshold, right=True), last)
