"""What the benchmark prints and keeps: medians, pairwise ratios, distance to the floor."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ppo_lab.bench.equality import Gate
from ppo_lab.bench.floor import Floor, Rates
from ppo_lab.bench.runs import OURS, PHASES, Result, medians, pairwise
from ppo_lab.bench.shapes import Shape
from ppo_lab.outcome import git_commit, versions
from ppo_lab.plan.machine import processor

# The least share of its threads' time that a process had on a machine of its own: 0.90 to 1.00 in
# the recorded results but one.
UNDISTURBED = 0.85


def record(
    shape: Shape,
    results: list[Result],
    gates: list[Gate],
    floors: dict[str, tuple[Rates, Floor]],
    *,
    threads: int,
    seed: int,
) -> dict[str, Any]:
    """Everything, as JSON keeps it."""
    names = list(dict.fromkeys(r.contestant for r in results))
    tokens = shape.batch * shape.new_tokens

    def of(name: str) -> dict[str, Any]:
        found, least = medians(results, name), floors[name.split()[-1]][1].total
        rate, times = tokens / found["wall_s"], found["wall_s"] / least
        return {**found, "tokens_per_second": rate, "times_the_floor": times}

    return {
        **origin(threads),
        "seed": seed,
        "shape": asdict(shape),
        "equality": [{**asdict(gate), "passed": gate.passed} for gate in gates],
        "rates": {precision: asdict(rates) for precision, (rates, _) in floors.items()},
        "floor": {precision: least.as_dict() for precision, (_, least) in floors.items()},
        "versions": {r.contestant: r.versions for r in results},
        "medians": {name: of(name) for name in names},
        "ratios": [_ratio(results, *pair) for pair in pairs(results)],
        "results": [asdict(r) for r in results],
    }


def show(kept: dict[str, Any], console: Console) -> None:
    """The record as tables."""
    title = f"one PPO iteration, {kept['shape']['name']}: medians, wall seconds (CPU seconds)"
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("trainer", no_wrap=True)
    for column in (*PHASES, "total", "tokens/s", "peak GB", "/ floor"):
        table.add_column(column, justify="right", min_width=len(column))
    for name, m in kept["medians"].items():
        table.add_row(
            name,
            *(f"{m['wall'][p]:.2f} ({m['cpu'][p]:.1f})" for p in PHASES),
            f"{m['wall_s']:.2f} ({m['cpu_s']:.1f})",
            f"{m['tokens_per_second']:.1f}",
            f"{m['peak_gb']:.2f}",
            f"{m['times_the_floor']:.1f}",
        )
    console.print(table)
    if kept["ratios"]:
        console.print(_ratios(kept["ratios"]))
    if disturbed := _disturbed(kept):
        console.print(
            f"the machine was busy: {', '.join(disturbed)} of the processors. Threads that wait "
            "for each other lose more than that: measure again",
            style="bold red",
        )
    for precision, least in kept["floor"].items():
        rates = kept["rates"][precision]
        console.print(
            f"floor {precision}: {least['total']:.2f} s (generate {least['generate']:.2f}, "
            f"score {least['score']:.2f}, update {least['update']:.2f}) at "
            f"{rates['flops'] / 1e9:.0f} GFLOP/s and {rates['bytes'] / 1e9:.1f} GB/s",
            highlight=False,
            soft_wrap=True,
        )


def _disturbed(kept: dict[str, Any]) -> list[str]:
    """Processes on a CPU that got too little of it, each with the share that it had."""
    if kept["machine"].get("gpu"):
        return []
    found = []
    for result in kept["results"]:
        wall, cpu = (sum(result[kind].values()) for kind in ("wall", "cpu"))
        share = cpu / (wall * kept["machine"]["threads"])
        if share < UNDISTURBED:
            found.append(f"{result['contestant']} had {share:.0%} in round {result['round'] + 1}")
    return found


def show_gates(gates: Iterable[Gate], console: Console) -> None:
    """What was compared and how far apart it was."""
    for gate in gates:
        worst = max(gate.errors, key=lambda name: gate.errors[name])
        word = "passed" if gate.passed else "FAILED"
        console.print(
            f"equality gate {gate.precision} {word}: largest relative error "
            f"{gate.errors[worst]:.1e} ({worst}), tolerance {gate.tolerance:.0e}",
            highlight=False,
            soft_wrap=True,
        )


def pairs(results: list[Result]) -> list[tuple[str, str, str]]:
    """(ours, theirs, why): the same precision, best against best, best against as it comes."""
    names = list(dict.fromkeys(r.contestant for r in results))
    ours = [name for name in names if name.startswith(OURS)]
    same = [
        (mine, other, "same precision")
        for mine in ours
        for other in names
        if other not in ours and other.split()[-1] == mine.split()[-1]
    ]
    trainers = dict.fromkeys(name.split()[0] for name in names if name not in ours)
    best = [
        (_best(results, OURS), _best(results, trainer), "best against best")
        for trainer in trainers
        if ours
    ]
    as_it_comes = [
        (_best(results, OURS), f"{t} fp32", "our best against theirs as it comes")
        for t in trainers
        if ours and f"{t} fp32" in names
    ]
    return same + best + as_it_comes


def origin(threads: int) -> dict[str, Any]:
    """When, on what and by which code the numbers were measured."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(threads),
        "versions": versions(),
        "git_commit": git_commit(),
    }


def machine(threads: int) -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    return {
        "processor": processor(),
        "threads": threads,
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else [],
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _best(results: list[Result], trainer: str) -> str:
    """The precision at which a trainer was fastest."""
    names = {r.contestant for r in results if r.contestant.split()[0] == trainer}
    return min(names, key=lambda name: medians(results, name)["wall_s"])


def _ratio(results: list[Result], ours: str, theirs: str, why: str) -> dict[str, Any]:
    ratios = {
        "wall": pairwise(results, ours, theirs, lambda r: r.wall_s),
        "cpu": pairwise(results, ours, theirs, lambda r: r.cpu_s),
        "memory": pairwise(results, ours, theirs, lambda r: r.peak_gb),
    }
    found: dict[str, Any] = {
        kind: {"median": median(r), "range": [min(r), max(r)]} for kind, r in ratios.items() if r
    }
    return {"ours": ours, "theirs": theirs, "why": why, **found}


def _ratios(ratios: list[dict[str, Any]]) -> Table:
    """A row a pair, with every reason to look at it."""
    table = Table(
        title="theirs / ours in interleaved pairs: median (range)",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for column in ("ours", "theirs"):
        table.add_column(column, no_wrap=True)
    for column in ("wall", "CPU", "memory"):
        table.add_column(column, min_width=len("(1.23-1.45)"))
    table.add_column("compared as")
    pairs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for ratio in ratios:
        pairs.setdefault((ratio["ours"], ratio["theirs"]), []).append(ratio)
    for pair, found in pairs.items():
        shown = (
            "{:.2f} ({:.2f}-{:.2f})".format(found[0][kind]["median"], *found[0][kind]["range"])
            for kind in ("wall", "cpu", "memory")
        )
        table.add_row(*pair, *shown, "; ".join(ratio["why"] for ratio in found))
    return table
