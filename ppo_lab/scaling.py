"""Scores made comparable over a run: running moments, scaling, clipping."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


class RunningMoments:
    """Mean and unbiased standard deviation of every score seen so far.

    Source: Chan, Golub and LeVeque 1979, for merging the moments of two sets.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.sum_of_squares = 0.0

    @property
    def std(self) -> float:
        """The standard deviation; 0 before two scores were seen."""
        return math.sqrt(self.sum_of_squares / (self.count - 1)) if self.count > 1 else 0.0

    def update(self, scores: Float[Tensor, " batch"]) -> None:
        """Take in one batch."""
        batch = scores.double()
        n, mean = len(batch), float(batch.mean())
        delta, total = mean - self.mean, self.count + n
        self.sum_of_squares += (
            float(((batch - mean) ** 2).sum()) + delta**2 * self.count * n / total
        )
        self.mean += delta * n / total
        self.count = total

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint needs."""
        return {"count": self.count, "mean": self.mean, "sum_of_squares": self.sum_of_squares}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a checkpoint."""
        self.count, self.mean = int(state["count"]), state["mean"]
        self.sum_of_squares = state["sum_of_squares"]


def scale_scores(
    scores: Float[Tensor, " batch"],
    moments: RunningMoments,
    *,
    use_score_scaling: bool,
    use_score_norm: bool,
    score_clip: float,
) -> Float[Tensor, " batch"]:
    """Scores divided by their running deviation, less their running mean, clipped: each where it is
    asked for.

    Scores that never varied are not divided, where TRL's classic trainer divided them by a rounding
    error.
    """
    if use_score_scaling:
        moments.update(scores)
        shifted = scores - moments.mean if use_score_norm else scores
        scores = shifted / (moments.std or 1.0)
    return scores.clamp(-score_clip, score_clip) if score_clip else scores.clone()


def penalise_unended(
    scores: Float[Tensor, " batch"], ended: Tensor, *, missing_eos_penalty: float
) -> Float[Tensor, " batch"]:
    """Scores less the penalty where no stop condition ended the response."""
    return torch.where(ended.to(scores.device), scores, scores - missing_eos_penalty)
