"""The least time the same work can take: its FLOPs and bytes over this machine's own rates.

For N prompt tokens and R response tokens over a batch, and weights W of the trunk and H of the head
(2 FLOPs a weight and token; attention, the adapter and the norms are left out):

    prefill    2 W N + 2 H batch
    decode     (T - 1) steps, each the longer of 2 (W + H) batch FLOPs and reading W + H once
    reference  2 W (N + R) + 2 H R
    update     2 epochs (2 W (N + R) + 2 H R): forward, and backward to the hidden states alone,
               since trunk and head are frozen
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from ppo_lab.bench.shapes import Shape

BYTES = {"fp32": 4, "bf16": 2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second: FLOPs in large matrix products, bytes read."""

    flops: float
    bytes: float


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
    trunk, head = 2 * shape.trunk_weights, 2 * shape.head_weights
    prompt_tokens = sum(map(len, shape.prompts(seed)))
    response_tokens = shape.batch * shape.new_tokens
    one_pass = trunk * (prompt_tokens + response_tokens) + head * response_tokens
    prefill = trunk * prompt_tokens + head * shape.batch
    read = (shape.trunk_weights + shape.head_weights) * BYTES[precision]
    step = max((trunk + head) * shape.batch / rates.flops, read / rates.bytes)
    return Floor(
        generate=prefill / rates.flops + (shape.new_tokens - 1) * step,
        score=one_pass / rates.flops,
        update=2 * shape.epochs * one_pass / rates.flops,
    )


def measure_rates(precision: str, device: str) -> Rates:
    """The best of several tries of one large product, and of reading one large array."""
    dtype = DTYPES[precision]
    a = torch.randn(1024, 4096, device=device).to(dtype)
    b = torch.randn(4096, 4096, device=device).to(dtype)
    array = torch.zeros(2**27, device=device)
    flops = 2 * 1024 * 4096 * 4096 / _best(lambda: a @ b.T, device)
    return Rates(flops, array.nbytes / _best(array.sum, device))


def _best(work: Callable[[], object], device: str, tries: int = 7) -> float:
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
