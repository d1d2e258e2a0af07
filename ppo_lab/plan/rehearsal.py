"""A run in small, on this machine: its own policy with one layer and with two, asked to sample, to
read and to train on a few rows of its own batch.

What the second layer adds, in seconds and in bytes, is what each further layer adds; what is left
is there once. Rows are left out until a pass takes a fraction of a second. All that happens is the
project's own code on products of the run's own shapes: whatever becomes faster or leaner there does
so here.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ppo_lab.models.policy import AutoModelForCausalLMWithValueHead
from ppo_lab.models.reference import Reference
from ppo_lab.plan.architecture import VOCABULARY_OF_A_MINIATURE
from ppo_lab.plan.machine import now, seconds_of
from ppo_lab.plan.trace import tracked
from ppo_lab.plan.workload import Row, tokens_of
from ppo_lab.rollout import NoiseKey, Sampling, sample
from ppo_lab.types import Tokens

# Products of a layer in one pass of a rehearsal: a tenth of a second on a core.
MOST_FLOPS = 8e9
MOST_FLOPS_SAMPLING = 2e10
MOST_ROWS = 64

# Tokens that are decoded one by one, and how often.
DECODED = 8
TRIES = 3


class ByDepth(NamedTuple):
    """What a model of one layer takes, and what each further layer adds."""

    first: float
    further: float

    def at(self, layers: int) -> float:
        """What a model of so many layers takes."""
        return self.first + (layers - 1) * self.further

    def times(self, factor: float) -> ByDepth:
        """The same of so many times as many rows."""
        return ByDepth(self.first * factor, self.further * factor)

    @classmethod
    def of(cls, one: float, two: float) -> ByDepth:
        """From what models of one and of two layers take."""
        return cls(one, max(0.0, two - one))


@dataclass(frozen=True)
class Held:
    """Bytes by depth: `kept` for the backward pass, `passing` on top of them for a moment,
    `churned` made and let go of in the forward pass, `reading` held by a pass without gradients.
    """

    kept: ByDepth
    passing: ByDepth
    churned: ByDepth
    reading: ByDepth

    def times(self, factor: float) -> Held:
        """The same of so many times as many rows."""
        return Held(*(part.times(factor) for part in vars(self).values()))


class Miniature:
    """A policy of one or two layers that trains, reads and samples."""

    def __init__(self, model: Any, *, checkpointing: bool, fast_layers: bool = True) -> None:
        self.policy = AutoModelForCausalLMWithValueHead(model)
        self.policy.trunk.fast_layers = fast_layers
        if checkpointing:
            self.policy.gradient_checkpointing_enable()
        self.reference = Reference(self.policy)

    def train(self, tokens: Tokens) -> None:
        """One forward and backward pass."""
        self.policy.train()
        _backward(self.forward(tokens))
        self.policy.zero_grad(set_to_none=True)

    def forward(self, tokens: Tokens) -> torch.Tensor:
        """A forward pass that a backward one may follow: log-probs and values."""
        seen = self.policy.score(tokens, temperature=1.0)
        return seen.logprobs + seen.values

    @torch.no_grad()
    def read(self, tokens: Tokens) -> None:
        """One pass of the reference."""
        self.policy.eval()
        self.reference.logprobs(tokens, temperature=1.0)

    def sample(self, lengths: Sequence[int]) -> tuple[float, float]:
        """Seconds until the first token of responses to prompts of these lengths, and of each
        further one.
        """
        self.policy.eval()
        watch: Any = _Stopwatch(self.policy.trunk)
        sampling = Sampling(max_new_tokens=1 + DECODED, eos_ids=(), pad_id=0)
        ids = [[3] * length for length in lengths]
        sample(self.policy, ids, sampling=sampling, noise=NoiseKey(0, 0), trunk=watch)
        first, *further = watch.laps()
        return first, min(further)

    def held(self, tokens: Tokens) -> tuple[int, int, int, int]:
        """Bytes kept, passing, churned and reading; see `Held`."""
        self.policy.train()
        tracker = tracked()
        with tracker as live:
            output = self.forward(tokens)
            kept, churned = live.now, live.made - live.now
            _backward(output)
        gradients = [p.grad for p in self.policy.parameters() if p.grad is not None]
        peak = live.peak(without=tracker.names(gradients))
        self.policy.zero_grad(set_to_none=True)
        with tracked() as reading:
            self.read(tokens)
        return kept, max(0, peak - kept), churned, reading.peak()


@dataclass(frozen=True)
class Rehearsal:
    """The two miniatures of a run; `layer_weights` bounds how many rows they are given."""

    one: Miniature
    two: Miniature
    layer_weights: int

    def held(self, rows: Sequence[Row]) -> Held:
        """What a pass over these rows holds."""
        some, factor = self._some(rows, passes=4)
        tokens = self._tokens_of(some)
        pairs = zip(self.one.held(tokens), self.two.held(tokens), strict=True)
        return Held(*(ByDepth.of(a, b) for a, b in pairs)).times(factor)

    def training(self, rows: Sequence[Row]) -> ByDepth:
        """Seconds of a forward and backward pass over these rows."""
        return self._timed(rows, Miniature.train, passes=6)

    def reading(self, rows: Sequence[Row]) -> ByDepth:
        """Seconds of a pass of the reference over these rows."""
        return self._timed(rows, Miniature.read, passes=2)

    def sampling(self, rows: Sequence[Row]) -> tuple[ByDepth, ByDepth]:
        """Seconds until the first token of each response, and of one token more halfway through.

        All rows are kept, for a few are multiplied at another rate; long prompts are shortened.
        """
        some = _spread_out(rows, MOST_ROWS)
        halfway = [row.prompt + row.response // 2 for row in some]
        most = MOST_FLOPS_SAMPLING / (2 * self.layer_weights * len(some))
        short = min(1.0, most / max(halfway))
        lengths = [max(2, round(short * length)) for length in halfway]
        found = [
            _least([mini.sample(lengths) for _ in range(TRIES)]) for mini in (self.one, self.two)
        ]
        first, further = (ByDepth.of(a, b) for a, b in zip(*found, strict=True))
        prompts = sum(row.prompt for row in rows) / sum(lengths)
        return first.times(prompts), further.times(len(rows) / len(some))

    def _timed(
        self, rows: Sequence[Row], work: Callable[[Miniature, Tokens], None], *, passes: int
    ) -> ByDepth:
        some, factor = self._some(rows, passes=passes)
        tokens = self._tokens_of(some)
        return self._both(lambda mini: work(mini, tokens)).times(factor)

    def _tokens_of(self, rows: Sequence[Row]) -> Tokens:
        """Tokens of these lengths, where the miniatures are."""
        return tokens_of(rows, VOCABULARY_OF_A_MINIATURE).to(self.one.policy.device)

    def _both(self, work: Callable[[Miniature], object]) -> ByDepth:
        one, two = (seconds_of(lambda mini=mini: work(mini)) for mini in (self.one, self.two))  # type: ignore[misc]
        return ByDepth.of(one, two)

    def _some(self, rows: Sequence[Row], *, passes: int) -> tuple[list[Row], float]:
        """A few rows that stand for all, and how many times as much all are."""
        tokens = max(row.seen for row in rows)
        most = max(1, int(MOST_FLOPS / (passes * self.layer_weights * tokens)))
        some = _spread_out(rows, most)
        return some, sum(row.seen for row in rows) / sum(row.seen for row in some)


class _Stopwatch:
    """A trunk that notes when it is asked for the newest hidden states."""

    def __init__(self, trunk: Any) -> None:
        self._trunk = trunk
        self._asked: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trunk, name)

    def newest(self, *args: Any, **kwargs: Any) -> Any:
        """What the trunk gives."""
        self._asked.append(now())
        return self._trunk.newest(*args, **kwargs)

    def laps(self) -> list[float]:
        """Seconds from each asking to the next, and from the last until now."""
        times = [*self._asked, now()]
        return [later - earlier for earlier, later in itertools.pairwise(times)]


def _least(found: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The least of each of two figures."""
    return min(first for first, _ in found), min(further for _, further in found)


def _spread_out(rows: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the rows, the longest among them, the others evenly from long to short."""
    ordered = sorted(rows, reverse=True)
    count = min(most, len(ordered))
    return [ordered[i * len(ordered) // count] for i in range(count)]


def _backward(output: torch.Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output.backward(torch.ones_like(output))
