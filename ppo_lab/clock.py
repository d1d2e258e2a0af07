"""Where the time of an iteration goes, how much of the device it used, how much memory it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import record_function

from ppo_lab.memory import peak_resident_bytes

now = time.perf_counter
"""What a clock reads, in seconds."""


class Clock:
    """Seconds by phase since the last reading.

    `peak_flops()` is what the device computes in a second at most, 0 where nobody knows; it is
    asked once, at the first reading, and with `again=True` where that proves too low.
    """

    def __init__(
        self, device: torch.device, peak_flops: Callable[..., float] | None = None
    ) -> None:
        self.device = device
        self._peak_flops = peak_flops or _unknown
        self._peak: float | None = None
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the seconds spent inside to `phase`, a range of that name in a profile; on a GPU,
        until its work is done, for which the host does not wait. An iteration that is broken off
        counts for nothing.
        """
        start = self._moment()
        try:
            with record_function(phase):
                yield
        except BaseException:
            self._spans.clear()
            raise
        self._spans.append((phase, start, self._moment()))

    def _moment(self) -> Any:
        """Now, as the device reads it when it comes to this."""
        if self.device.type != "cuda":
            return now()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def read(self, *, tokens: int, flops: float = 0.0) -> dict[str, float]:
        """Seconds by phase and in all, response tokens a second, model FLOP utilisation and peak
        memory, once the device is done with all phases; starts anew.
        """
        phases: dict[str, float] = {}
        for phase, start, end in self._spans:
            phases[phase] = phases.get(phase, 0.0) + _seconds(start, end)
        total, self._spans = sum(phases.values()), []
        return {
            **{f"time/{phase}": seconds for phase, seconds in phases.items()},
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
        """`mfu`; nothing where the device's peak rate is not known. A rate above it shows that it
        was measured beside other work.
        """
        if self._peak is None:
            self._peak = self._peak_flops()
        if not (self._peak and flops and seconds):
            return {}
        rate = flops / seconds
        if rate > self._peak:
            self._peak = max(self._peak_flops(again=True), rate)
        return {"mfu": rate / self._peak}


def _unknown(**_: bool) -> float:
    return 0.0


def _seconds(start: Any, end: Any) -> float:
    """Between two moments of a clock."""
    if isinstance(end, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3
