"""The moving average of the policy over a run: what is evaluated and saved, if so wished."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class MovingAverage:
    """The exponential moving average of trained weights over optimizer steps.

        average <- d average + (1 - d) weights,   d = min(decay, (1 + n) / (10 + n)) after n steps

    What single batches made the policy do by chance goes out of it, and with that KL which bought
    no score. Training goes on from the weights themselves. With `decay` 0 it is the weights. A step
    that was skipped counts too, since nobody need then wait to hear of it. The average is float32
    whatever the weights are: in half precision its small steps would all be lost to rounding.

    Source: Polyak and Juditsky 1992, SIAM J. Control Optim. 30(4); Ramé et al. 2024,
        arXiv:2406.16768, for policies under a KL penalty.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self.decay, self.steps = decay, 0
        trained = model.named_parameters() if decay else ()
        self.weights = {name: p for name, p in trained if p.requires_grad}
        self.average = {
            name: p.detach().to(torch.float32, copy=True) for name, p in self.weights.items()
        }

    def update(self) -> None:
        """Take in the weights after an optimizer step, taken or skipped."""
        if not self.weights:
            return
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        averages, weights = list(self.average.values()), list(self.weights.values())
        if all(p.dtype == torch.float32 for p in weights):
            get_ema_multi_avg_fn(decay)(averages, [p.detach() for p in weights], self.steps)
        else:
            for average, p in zip(averages, weights, strict=True):  # widened one at a time
                average.lerp_(p.detach().float(), 1.0 - decay)
        self.steps += 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average stands in the model for the while, then the weights again."""
        own = {name: p.detach().clone() for name, p in self.weights.items()}
        self._put(self.average)
        try:
            yield
        finally:
            self._put(own)

    def state_dict(self) -> dict[str, object]:
        """What a checkpoint needs."""
        return {"steps": self.steps, "average": self.average}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue from a checkpoint."""
        self.steps = int(state["steps"])  # type: ignore[call-overload]
        for name, average in self.average.items():
            average.copy_(state["average"][name])  # type: ignore[index]

    @torch.no_grad()
    def _put(self, source: dict[str, Tensor]) -> None:
        for name, parameter in self.weights.items():
            parameter.copy_(source[name])
