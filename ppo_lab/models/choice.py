"""One of many by weight, such that weights that differ by rounding alone give the same one.

Inverting the cumulative distribution over a vocabulary is fragile: rounding moves every boundary
between two tokens, and there are as many as tokens. Weights of batches that are merely put together
otherwise then give another token in 10^4 draws out of 512 tokens, in 10^2 out of 250,000. Down a
tree of sums, with a number of its own at each branching, only FAN - 1 boundaries are met a level,
and the choice changes about as rarely as distributions so close must differ.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

FAN = 16  # children of a node
LEVELS = 5  # enough for 1,048,576 choices


def choose(
    weights: Float[Tensor, "batch choices"], uniforms: Float[Tensor, "batch levels"]
) -> Int[Tensor, " batch"]:
    """One choice a row, with a probability in proportion to its weight; never one of weight 0.

    `uniforms` are LEVELS numbers in [0, 1) for each row, the first for the topmost branching.
    """
    levels = [branched(weights)]
    while levels[-1].shape[2] > 1:
        levels.append(branched(levels[-1].sum(1)))
    rows = torch.arange(len(weights), device=weights.device)
    node = torch.zeros_like(rows)
    for level, number in zip(reversed(levels), uniforms.unbind(1), strict=False):
        node += level.shape[2] * child(level[rows, :, node], number)
    return node


def branched(weights: Float[Tensor, "batch nodes"]) -> Float[Tensor, "batch fan parents"]:
    """The nodes of a level by parent: node i is a child of node i modulo the number of parents."""
    missing = -weights.shape[1] % FAN
    padded = torch.nn.functional.pad(weights, (0, missing)) if missing else weights
    return padded.view(len(weights), FAN, -1)


def child(
    weights: Float[Tensor, "batch fan"], uniform: Float[Tensor, " batch"]
) -> Int[Tensor, " batch"]:
    """The child in whose part of the sum the number falls; at its very end the last that weighs."""
    sums = weights.double().cumsum(1)
    threshold = uniform.double()[:, None] * sums[:, -1:]
    found = torch.searchsorted(sums, threshold, right=True).squeeze(1)
    return torch.minimum(found, (sums < sums[:, -1:]).sum(1))


def depth(choices: int) -> int:
    """How many numbers a choice takes."""
    levels = 1
    while FAN**levels < choices:
        levels += 1
    return levels
