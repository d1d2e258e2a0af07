"""This machine, measured: seconds of a piece of work, what it multiplies and reads in a second."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from ppo_lab.embedded.cache import cache_folder
from ppo_lab.models.fast.gemm import computed_in, pulled_back
from ppo_lab.plan.devices import named
from ppo_lab.record import write_atomically

# A measurement goes on for so long, but not for fewer tries.
LONG_ENOUGH = 0.08
TRIES = 1

# A product that would take longer, in seconds, is measured by FEW of its rows.
TOO_LONG = 2.0
FEW = 8


@dataclass(frozen=True)
class Rates:
    """What a device does in a second: FLOPs in large matrix products, bytes read."""

    flops: float
    bytes: float


def peak_flops(device: str, dtype: torch.dtype, *, again: bool = False) -> float:
    """What a device computes in a second at most, in this precision: of a known GPU what is
    published, of a CPU what it reaches in a large product, measured once, and once more if asked
    for `again`, since other work may have slowed it; else 0.
    """
    kind = torch.device(device)
    if kind.type == "cuda":
        known = named(torch.cuda.get_device_name(kind))
        return known.flops(str(dtype).removeprefix("torch.")) if known else 0.0
    computed = computed_in(dtype)
    return _kept(f"best-{computed}", lambda: product_rate(computed, device), again=again)


def product_rate(dtype: torch.dtype, device: str) -> float:
    """FLOPs a second of a large product, by the library that is fastest, the best of several."""
    on_cpu = torch.device(device).type == "cpu"
    rows, width = (512, 2048) if on_cpu else (8192, 8192)
    # Not of ones: a GPU multiplies those faster than what models hold. And not by the global
    # generator: a run measures this once on a machine, and its rewards may draw from that one.
    draw = torch.Generator(device).manual_seed(0)
    a = torch.randn(rows, width, device=device, generator=draw).to(dtype)
    b = torch.randn(width, width, device=device, generator=draw).to(dtype)
    multiply = pulled_back if on_cpu else torch.mm
    # Most processors multiply float16 number by number: 512 rows take half a minute.
    if on_cpu and seconds_of(lambda: multiply(a[:FEW], b)) * rows / FEW > TOO_LONG:
        a = a[:FEW]
    return 2 * len(a) * width * width / seconds_of(lambda: multiply(a, b), tries=5)


def processor() -> str:
    """What the processor calls itself."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def kind_of_machine() -> tuple[str, ...]:
    """What seconds that were measured here depend on: a cache may lie on a disk of several
    machines.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return _kind_of_processor(), gpu


def _kind_of_processor() -> str:
    """Its name, what its instructions can do, and how many threads it is given."""
    return f"{processor()}-{torch.backends.cpu.get_cpu_capability()}-{torch.get_num_threads()}"


def _kept(name: str, measure: Callable[[], float], *, again: bool) -> float:
    """The largest number that was measured on processors of this kind, for so many threads."""
    kind = "".join(c if c.isalnum() else "-" for c in _kind_of_processor())
    place = cache_folder() / "plan" / f"{name}-{kind}-torch{torch.__version__}.json"
    found = 0.0
    with suppress(OSError, ValueError):
        found = float(json.loads(place.read_text()))
    if found and not again:
        return found
    found = max(found, measure())
    with suppress(OSError):
        write_atomically(place, json.dumps(found))
    return found


def measure_rates(dtype: torch.dtype, device: str) -> Rates:
    """The best of several tries of one large product, and of reading one large array."""
    on_cpu = torch.device(device).type == "cpu"
    array = torch.ones(2**25 if on_cpu else 2**28, device=device)
    flops = product_rate(computed_in(dtype) if on_cpu else dtype, device)
    return Rates(flops, array.nbytes / seconds_of(array.sum, tries=5))


def seconds_of(work: Callable[[], object], *, tries: int = TRIES) -> float:
    """The least seconds of several tries, after one that does not count."""
    found: list[float] = []
    work()
    while len(found) < tries or sum(found) < LONG_ENOUGH:
        start = now()
        work()
        found.append(max(now() - start, 1e-9))
    return min(found)


def now() -> float:
    """The time in seconds, a GPU's work done.

    With one thread it is the processor's time, in which other processes have no part.
    """
    finish_device_work()
    one = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time() if one else time.perf_counter()


def finish_device_work() -> None:
    """Wait until a GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
