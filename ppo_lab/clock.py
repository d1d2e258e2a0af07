"""Where the time of an iteration goes, and how much memory it took."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds by phase since the last reading."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._phases: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the seconds spent inside to `phase`; on a GPU, until its work is done."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._phases[phase] = self._phases.get(phase, 0.0) + time.perf_counter() - start

    def read(self, *, tokens: int) -> dict[str, float]:
        """Seconds by phase and in all, response tokens a second and peak memory; starts anew."""
        total = sum(self._phases.values())
        times = {f"time/{phase}": seconds for phase, seconds in self._phases.items()}
        self._phases = {}
        return {
            **times,
            "time/iteration": total,
            "tokens_per_second": tokens / total if total else 0.0,
            "peak_memory_gb": self.peak_memory_gb(),
        }

    def peak_memory_gb(self) -> float:
        """Peak memory in GiB: allocated on the GPU, or the process's resident set."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return kib / (2**30 if sys.platform == "darwin" else 2**20)
