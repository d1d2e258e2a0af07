"""One token a row out of a large vocabulary: exponentials taken once, sums by blocks.

The cumulative distribution is inverted in two steps: first over sums of blocks of the vocabulary,
then within the block that holds the number. The log-probability and the entropy fall out of the
same exponentials e_v = exp(z_v - m), where m is the largest logit and S = sum_v e_v:

    log p(y)  =  z_y - m - log S
    H         =  m + log S - sum_v e_v z_v / S
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 512


class Drawn(NamedTuple):
    """Tokens, and their log-probabilities and the distributions' entropies in nats."""

    tokens: Int[Tensor, " batch"]
    logprobs: Float[Tensor, " batch"]
    entropy: Float[Tensor, " batch"]


def draw_by_blocks(
    logits: Float[Tensor, "batch vocab"], uniforms: Float[Tensor, " batch"]
) -> Drawn:
    """One token a row at that row's uniform number in [0, 1), from softmax(logits).

    Rows go one by one: a row's exponentials fit into a core's cache, a batch's do not.
    """
    rows = [_draw(z, u) for z, u in zip(logits.float(), uniforms.double(), strict=True)]
    tokens, logprobs, entropy = zip(*rows, strict=True)
    return Drawn(torch.stack(tokens), torch.stack(logprobs), torch.stack(entropy))


def _draw(logits: Float[Tensor, " vocab"], uniform: Float[Tensor, ""]) -> tuple[Tensor, ...]:
    largest = logits.amax()
    # Exponentials near the smallest normal number would be slow; those below 2e-35 are 0.
    terms = torch.threshold_((logits - largest).clamp_(min=-80.0).exp_(), 2e-35, 0.0)
    sums = _block_sums(terms).double().cumsum(0)
    threshold = uniform * sums[-1]
    found = torch.searchsorted(sums, threshold, right=True)
    block = int(found.clamp(max=int((sums < sums[-1]).sum())))
    before = sums[block - 1] if block else 0.0
    inside = terms[block * BLOCK : (block + 1) * BLOCK].double().cumsum(0)
    place = torch.searchsorted(inside, threshold - before, right=True)
    # Rounding between the two sums may ask for more than the block holds: its last token, then.
    token = block * BLOCK + place.clamp(max=int((inside < inside[-1]).sum()))
    log_total = sums[-1].log().float()
    mean = torch.dot(terms, logits) / sums[-1].float()
    return token, logits[token] - largest - log_total, largest + log_total - mean


def _block_sums(terms: Float[Tensor, " vocab"]) -> Float[Tensor, " blocks"]:
    whole = len(terms) - len(terms) % BLOCK
    sums = terms[:whole].view(-1, BLOCK).sum(1)
    return sums if whole == len(terms) else torch.cat([sums, terms[whole:].sum(0, keepdim=True)])
