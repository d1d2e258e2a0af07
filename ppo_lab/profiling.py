"""Where the time of a few iterations goes, operation by operation: a trace for Perfetto."""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ppo_lab.memory import forget_peak
from ppo_lab.record import Say

FOLDER = "profile"
FIRST, LAST = 2, 4
SHOWN = 10

# Bytes at the end of a trace that is whole in which its last brace is.
ENDS_WITHIN = 64


def profiled(
    iterations: Iterator[dict[str, float]], folder: Path, say: Say, *, done: int = 0
) -> Iterator[dict[str, float]]:
    """The same iterations; the second to the fourth of them are traced, or as many as there are.

    The first one warms up: caches fill, kernels are chosen. The trace (Chrome's JSON, packed; the
    phases are ranges of their names) opens in Perfetto; what happens between the iterations, such
    as evaluations, is in it too. `done` iterations were made before, by a run that is resumed.
    """
    profiler, made, running = _profiler(), 0, False
    try:
        for metrics in iterations:
            made += 1
            if made == LAST:
                running = False
                _keep(profiler, folder / _name(done, made), say)
            yield metrics
            if made == FIRST - 1:
                profiler.start()
                running = True
        if running and made < FIRST:
            running = False
            profiler.stop()
            say("profile: none, since one iteration was left, and the first warms up")
    finally:
        if running:
            _keep(profiler, folder / _name(done, made), say)


def _name(done: int, made: int) -> str:
    return f"{FOLDER}/iterations-{done + FIRST}-{done + max(made, FIRST)}.json.gz"


def _profiler() -> Any:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its notes on starting and stopping
    import torch
    from torch.profiler import ProfilerActivity, profile

    gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    return profile(activities=[ProfilerActivity.CPU, *gpu], acc_events=True)


def _keep(profiler: Any, place: Path, say: Say) -> None:
    """End the trace, write it, and say what took longest."""
    profiler.stop()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _export(profiler, place)
        say(f"profile: {place} (open it at ui.perfetto.dev)")
    except (OSError, RuntimeError) as error:
        say(f"profile: {place} could not be written ({error}); the run goes on")
    say(table(profiler))
    forget_peak()  # the trace takes more than the run


def _export(profiler: Any, place: Path) -> None:
    """Put the trace in its place, whole or not at all.

    Raises:
        OSError: it cannot be written. Of a full disk torch does not say so: its text breaks off.
    """
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".") as beside:
        plain, packed = Path(beside) / "trace.json", Path(beside) / place.name
        profiler.export_chrome_trace(str(plain))
        if not _is_whole(plain):
            raise OSError("torch left no whole text of it: the disk may be full")
        with plain.open("rb") as text, gzip.open(packed, "wb") as file:
            shutil.copyfileobj(text, file)
        packed.replace(place)


def _is_whole(trace: Path) -> bool:
    """Whether a file of JSON ends with its last brace."""
    if not trace.exists():
        return False
    with trace.open("rb") as text:
        text.seek(max(trace.stat().st_size - ENDS_WITHIN, 0))
        return text.read().rstrip().endswith(b"}")


def table(profiler: Any) -> str:
    """The ten operations that took longest by themselves, a line each."""
    operations = [o for o in profiler.key_averages() if not o.is_user_annotation]
    on_gpu = any(o.self_device_time_total for o in operations)

    def own(operation: Any) -> float:
        microseconds = operation.self_device_time_total if on_gpu else operation.self_cpu_time_total
        return microseconds / 1e6

    total = sum(map(own, operations)) or 1.0
    largest = sorted(operations, key=own, reverse=True)[:SHOWN]
    lines = [
        f"{own(o):9.3f} s  {own(o) / total:5.1%}  {o.count:7} x  {o.key[:60]}" for o in largest
    ]
    return "\n".join([f"the {len(largest)} largest operations, by their own time:", *lines])
