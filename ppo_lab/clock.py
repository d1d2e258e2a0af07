"""Where the time of an iteration goes, how much of the device it used, how much memory it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function

from ppo_lab.memory import peak_resident_bytes

now = time.perf_counter
"""What a clock reads, in seconds."""


class Clock:
    """Seconds by phase since the last reading.

    `peak_flops()` is what the device computes in a second at most, 0 where nobody knows; it is
    asked once, at the first reading.
    """

    def __init__(self, device: torch.device, peak_flops: Callable[[], float] = lambda: 0.0) -> None:
        self.device = device
        self._peak_flops: Callable[[], float] = peak_flops
        self._peak: float | None = None
        self._phases: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the seconds spent inside to `phase`, a range of that name in a profile; on a GPU,
        until its work is done.
        """
        start = now()
        try:
            with record_function(phase):
                yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._phases[phase] = self._phases.get(phase, 0.0) + now() - start

    def read(self, *, tokens: int, flops: float = 0.0) -> dict[str, float]:
        """Seconds by phase and in all, response tokens a second, model FLOP utilisation and peak
        memory; starts anew.
        """
        total = sum(self._phases.values())
        times = {f"time/{phase}": seconds for phase, seconds in self._phases.items()}
        self._phases = {}
        return {
            **times,
            "time/iteration": total,
            "tokens_per_second": tokens / total if total else 0.0,
            **self._utilisation(flops, total),
            "peak_memory_gb": self.peak_memory_gb(),
        }

    def peak_memory_gb(self) -> float:
        """Peak memory in GiB: allocated on the GPU, or the process's resident set."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return peak_resident_bytes() / 2**30

    def _utilisation(self, flops: float, seconds: float) -> dict[str, float]:
        """`mfu`; nothing where the device's peak rate is not known."""
        if self._peak is None:
            self._peak = self._peak_flops()
        return {"mfu": flops / seconds / self._peak} if self._peak and flops and seconds else {}
