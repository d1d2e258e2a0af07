"""Optimizer steps as numbers: what they sum over tokens, whether they may be taken, and what those
of an iteration say together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppo_lab.arrivals import Asked

# What is summed over real tokens while updating, in the order of the vector that holds it.
SUMS = (
    "tokens",
    "policy_loss",
    "value_loss",
    "entropy",
    "approxkl",
    "policykl",
    "clipped_low",
    "clipped_high",
    "ratio",
    "vpred",
    "value_error",
    "value_clipped",
    "critic_tokens",
)
# Where the smallest and the largest ratio come after them.
LOW, HIGH = len(SUMS), len(SUMS) + 1
# Those of the sums that count in the passes alone in which the critic learns.
OF_VALUES = ("value_loss", "vpred", "value_error", "value_clipped", "critic_tokens")


@dataclass(frozen=True)
class UpdateStats:
    """What the clipped updates of one iteration did: means over real tokens of every pass that was
    made; of what concerns values, of every pass in which the critic learnt.

    `ratio_max` is the largest ratio seen; `first_ratio_error` is max |ratio - 1| before the first
    optimizer step, which only rounding can move from 0; `grad_norm` is the policy's mean norm
    before clipping (with its value head), `critic_grad_norm` that of a critic apart; `skipped`
    counts the optimizer steps not taken, `epochs` the passes over the batch that were.
    """

    policy_loss: float
    value_loss: float
    entropy: float
    approxkl: float
    policykl: float
    clipped_low: float
    clipped_high: float
    ratio: float
    vpred: float
    value_error: float
    value_clipped: float
    ratio_max: float
    first_ratio_error: float
    grad_norm: float
    critic_grad_norm: float
    skipped: int
    epochs: int


class OptimizerStep:
    """One optimizer step as numbers, which are waited for when they are first looked at: token
    sums, ratio extremes, the gradients' norms (the policy's, and that of a critic apart), whether
    it was taken.
    """

    def __init__(
        self, asked: Asked, each: Callable[[Tensor], Tensor], ratio_threshold: float
    ) -> None:
        """`asked` are one process's sums and extremes, and the norms of all gradients; `each` gives
        those of all processes.
        """
        self._asked, self._each, self._ratio_threshold = asked, each, ratio_threshold

    @cached_property
    def _numbers(self) -> Tensor:
        """Those of all processes together, in the same order."""
        rows = self._each(self._asked.read())
        sums, smallest, largest, norms = rows.tensor_split([len(SUMS), LOW + 1, HIGH + 1], 1)
        return torch.cat([sums.sum(0), smallest.amin(0), largest.amax(0), norms[0]])

    @property
    def sums(self) -> Tensor:
        """Over the real tokens, in the order of SUMS."""
        return self._numbers[: len(SUMS)]

    @property
    def ratio(self) -> float:
        """The mean ratio."""
        return float(_mean_ratio(self._numbers))

    @cached_property
    def _listed(self) -> list[float]:
        return self._numbers.tolist()

    @property
    def ratio_min(self) -> float:
        """The smallest ratio of a token."""
        return self._listed[LOW]

    @property
    def ratio_max(self) -> float:
        """The largest."""
        return self._listed[HIGH]

    @property
    def grad_norm(self) -> float:
        """Of the policy's gradient before clipping."""
        return self._listed[HIGH + 1]

    @property
    def critic_grad_norm(self) -> float:
        """Of that of a critic apart, or else the policy's."""
        return self._listed[-1]

    @cached_property
    def taken(self) -> bool:
        """Whether weights were moved."""
        return bool(may_be_taken(self._numbers, ratio_threshold=self._ratio_threshold))


def may_be_taken(numbers: Tensor, *, ratio_threshold: float) -> Bool[Tensor, ""]:
    """Whether loss and gradient of a step are finite, and its mean ratio is at most the threshold
    (0 = whatever it is), wherever its numbers are.
    """
    zero = (numbers * 0.0).sum()  # or NaN, which equals and is below nothing
    if ratio_threshold <= 0:
        return zero == 0.0
    return _mean_ratio(numbers) + zero <= ratio_threshold


def _mean_ratio(numbers: Tensor) -> Tensor:
    return numbers[SUMS.index("ratio")] / numbers[0].clamp(min=1)


def sums_of(steps: list[OptimizerStep]) -> Float[Tensor, " sums"]:
    """The sums of several steps together."""
    return torch.stack([step.sums for step in steps]).sum(0)


def summary(epochs: list[list[OptimizerStep]]) -> UpdateStats:
    """What the steps of all epochs did."""
    steps = [step for epoch in epochs for step in epoch]
    totals, first = sums_of(steps), steps[0]
    sums = dict(zip(SUMS, totals.tolist(), strict=True))
    tokens, of_values = (max(sums.pop(name), 1.0) for name in ("tokens", "critic_tokens"))
    means = {
        name: total / (of_values if name in OF_VALUES else tokens) for name, total in sums.items()
    }
    return UpdateStats(
        **means,
        ratio_max=max(step.ratio_max for step in steps),
        first_ratio_error=max(abs(first.ratio_max - 1.0), abs(first.ratio_min - 1.0)),
        grad_norm=sum(step.grad_norm for step in steps) / len(steps),
        critic_grad_norm=sum(step.critic_grad_norm for step in steps) / len(steps),
        skipped=sum(not step.taken for step in steps),
        epochs=len(epochs),
    )
