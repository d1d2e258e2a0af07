"""Trainers run in turn, each in a process of its own, and what their reports say together."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

import ppo_lab
from ppo_lab.bench.shapes import Shape

WORKERS = Path(__file__).parent / "workers"
PHASES = ("generate", "score", "update")
OURS = "ppo_lab"


@dataclass(frozen=True)
class Contestant:
    """A trainer at a precision of the weights."""

    trainer: str
    precision: str
    python: Path

    @property
    def name(self) -> str:
        """As tables show it."""
        return f"{self.trainer} {self.precision}"


def ours_here(precision: str) -> Contestant:
    """This project, run by this interpreter."""
    return Contestant(OURS, precision, Path(sys.executable))


@dataclass(frozen=True)
class Result:
    """One process: seconds by phase (means over its measured iterations) and peak memory."""

    contestant: str
    round: int
    wall: dict[str, float]
    cpu: dict[str, float]
    peak_gb: float
    versions: dict[str, str]

    @property
    def wall_s(self) -> float:
        """Wall seconds of an iteration."""
        return sum(self.wall.values())

    @property
    def cpu_s(self) -> float:
        """CPU seconds (user and system) of an iteration."""
        return sum(self.cpu.values())


def interleaved(
    contestants: list[Contestant],
    shape: Shape,
    *,
    rounds: int,
    threads: int,
    seed: int,
    say: Callable[[str], None],
) -> Iterator[Result]:
    """A B C A B C ...: the result of each process as it ends.

    Raises:
        RuntimeError: a worker failed; the message holds the end of what it said.
    """
    for turn, contestant in product(range(rounds), contestants):
        result = run(contestant, shape, turn=turn, threads=threads, seed=seed)
        say(
            f"round {turn + 1} of {rounds}, {contestant.name}: {result.wall_s:.2f} s, "
            f"{result.cpu_s:.2f} CPU s, {result.peak_gb:.2f} GB"
        )
        yield result


def run(
    contestant: Contestant,
    shape: Shape,
    *,
    turn: int,
    threads: int,
    seed: int,
    more: Mapping[str, Any] | None = None,
) -> Result:
    """One process of one contestant; `more` goes into the worker's task."""
    spec = {**shape.spec(contestant.precision, threads=threads, seed=seed), **(more or {})}
    script = WORKERS / f"{contestant.trainer}_worker.py"
    command = [str(contestant.python), str(script), json.dumps(spec)]
    done = subprocess.run(  # noqa: S603
        command, capture_output=True, text=True, env=_environment(contestant, threads)
    )
    lines = done.stdout.splitlines()
    if done.returncode or not lines or not lines[-1].startswith("{"):
        said = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise RuntimeError(f"{contestant.name} failed ({_end_of(done.returncode)}):\n{said}")
    found = json.loads(lines[-1])
    if found["optimizer_steps"] != (steps := optimizer_steps(spec)):
        raise RuntimeError(
            f"{contestant.name} did other work than it was given: it took "
            f"{found['optimizer_steps']} optimizer steps, not {steps}"
        )
    return _result(contestant, turn, found)


def _end_of(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"exit code {code}"
    out_of_memory = ", as when memory runs out" if -code == signal.SIGKILL else ""
    return f"killed by {signal.Signals(-code).name}{out_of_memory}"


def optimizer_steps(spec: Mapping[str, Any]) -> int:
    """How many optimizer steps a worker has to take."""
    a_batch = math.ceil(len(spec["prompts"]) / spec["mini_batch_size"])
    return (spec["warm_up"] + spec["measured"]) * spec["ppo_epochs"] * a_batch


def pairwise(
    results: list[Result], ours: str, theirs: str, what: Callable[[Result], float]
) -> list[float]:
    """Theirs over ours in each round: how many times less ours takes."""
    of_ours = {r.round: what(r) for r in results if r.contestant == ours}
    return [
        what(r) / of_ours[r.round] for r in results if r.contestant == theirs and r.round in of_ours
    ]


def medians(results: list[Result], name: str) -> dict[str, Any]:
    """Medians over the rounds: wall and CPU seconds by phase and in all, and peak memory."""
    own = [r for r in results if r.contestant == name]
    return {
        "wall": {phase: median(r.wall[phase] for r in own) for phase in PHASES},
        "cpu": {phase: median(r.cpu[phase] for r in own) for phase in PHASES},
        "wall_s": median(r.wall_s for r in own),
        "cpu_s": median(r.cpu_s for r in own),
        "peak_gb": median(r.peak_gb for r in own),
    }


def _environment(contestant: Contestant, threads: int) -> dict[str, str]:
    """What the process sees: as many threads as asked for, no network, and our package if ours."""
    changed = {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if contestant.trainer == OURS:
        changed["PYTHONPATH"] = str(Path(ppo_lab.__file__).parents[1])
    return {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **changed}


def _result(contestant: Contestant, turn: int, said: dict[str, Any]) -> Result:
    def mean(kind: str) -> dict[str, float]:
        return {phase: fmean(i[phase][kind] for i in said["iterations"]) for phase in PHASES}

    return Result(
        contestant.name, turn, mean("wall_s"), mean("cpu_s"), said["peak_gb"], said["versions"]
    )
