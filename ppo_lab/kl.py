"""Controllers of the KL coefficient beta: fixed, or adapted towards a target KL."""

from __future__ import annotations

# Beyond it the error of KL, as a share of its target, counts as this.
LARGEST_ERROR = 0.2


class FixedKLController:
    """A coefficient beta that never changes."""

    def __init__(self, kl_coef: float) -> None:
        self.value = kl_coef

    def update(self, kl: float, *, n_samples: int) -> None:
        """Nothing: a sweep over beta must sweep beta."""

    def state_dict(self) -> dict[str, float]:
        """The coefficient, for a checkpoint."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a checkpoint's coefficient."""
        self.value = state["value"]


class AdaptiveKLController(FixedKLController):
    """A coefficient beta that rises while KL lies above its target and falls while it lies below.

        e = clip(KL / target - 1, -0.2, 0.2)
        beta <- beta * (1 + e * n_samples / horizon)

    `target` is in nats per sequence, `horizon` in samples.

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """

    def __init__(self, init_kl_coef: float, *, target: float, horizon: int) -> None:
        super().__init__(init_kl_coef)
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, *, n_samples: int) -> None:
        """Move beta by one iteration's KL: nats per sequence, mean over its `n_samples` samples."""
        error = min(max(kl / self.target - 1.0, -LARGEST_ERROR), LARGEST_ERROR)
        self.value *= 1.0 + error * n_samples / self.horizon
