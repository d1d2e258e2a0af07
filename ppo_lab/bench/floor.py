"""The least time the same work can take: its FLOPs and bytes over this machine's own rates.

Counted as `ppo_lab.plan.work` counts: sampling passes every prompt token at once and then, step by
step, one token of each response, each step the longer of its FLOPs and reading the weights once;
the reference passes everything once, the updates forward and backward as often as there are epochs.
The adapter and the norms are left out.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from ppo_lab.bench.shapes import Shape
from ppo_lab.plan.architecture import Architecture
from ppo_lab.plan.machine import Rates
from ppo_lab.plan.machine import measure_rates as rates_of
from ppo_lab.plan.work import Amount, backward_flops, forward_flops

BYTES = {"fp32": 4, "bf16": 2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Floor:
    """Seconds of each phase, were every FLOP and byte at the machine's best."""

    generate: float
    score: float
    update: float

    @property
    def total(self) -> float:
        """Seconds of the iteration."""
        return self.generate + self.score + self.update

    def as_dict(self) -> dict[str, float]:
        """Phases and total, for the record."""
        return {**asdict(self), "total": self.total}


def floor(shape: Shape, precision: str, rates: Rates, *, seed: int) -> Floor:
    """The least seconds that this shape takes at these rates."""
    of = architecture(shape, BYTES[precision])
    prompts = list(map(len, shape.prompts(seed)))
    rows = Amount.of((length, shape.new_tokens) for length in prompts)
    first = Amount.of((length, 1) for length in prompts)
    one_pass = forward_flops(of, rows)
    steps = shape.new_tokens - 1
    decoding = (one_pass - forward_flops(of, first)) / rates.flops
    reading = steps * (of.matrices + of.head) * of.bytes_per_weight / rates.bytes
    return Floor(
        generate=forward_flops(of, first) / rates.flops + max(decoding, reading),
        score=one_pass / rates.flops,
        update=shape.epochs * (one_pass + backward_flops(of, rows)) / rates.flops,
    )


def architecture(shape: Shape, bytes_per_weight: int) -> Architecture:
    """A shape's sizes, its trunk and head frozen."""
    width = shape.n_layer * shape.hidden_size
    weights = shape.trunk_weights + shape.head_weights
    return Architecture(
        layers=shape.n_layer,
        hidden=shape.hidden_size,
        vocabulary=shape.vocab_size,
        matrices=shape.trunk_weights,
        head=shape.head_weights,
        queries=width,
        cached=2 * width,
        parameters=weights,
        trained=0,
        weight_bytes=weights * bytes_per_weight,
        bytes_per_weight=bytes_per_weight,
        reached=shape.n_layer,
    )


def measure_rates(precision: str, device: str) -> Rates:
    """What this machine multiplies and reads in a second at its best."""
    return rates_of(DTYPES[precision], device)
