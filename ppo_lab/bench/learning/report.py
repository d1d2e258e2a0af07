"""What the benchmark of learning shows: score at KL by contestant and beta, and the frontier."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median, stdev
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Point = tuple[float, float]

NAME = 26  # letters of a contestant's name on one line


@dataclass(frozen=True)
class Place:
    """A contestant at one beta: means over seeds, standard deviations, and median seconds."""

    contestant: str
    beta: float
    seeds: int
    score: float
    score_sd: float
    kl: float
    kl_sd: float
    wall_s: float

    def __str__(self) -> str:
        """As tables show it."""
        if self.seeds == 1:
            return f"{self.score:.2f} at {self.kl:.1f}"
        return f"{self.score:.2f}±{self.score_sd:.2f} at {self.kl:.1f}±{self.kl_sd:.1f}"


def places(runs: Iterable[dict[str, Any]]) -> list[Place]:
    """Every contestant at every beta that it has runs at."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["contestant"], run["beta"]), []).append(run)
    return [_place(name, beta, group) for (name, beta), group in groups.items()]


def frontier(points: Iterable[Point]) -> list[Point]:
    """The (KL, score) pairs that no other pair beats with as little KL, by rising KL."""
    best: list[Point] = []
    for kl, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or score > best[-1][1]:
            best.append((kl, score))
    return best


def reached(frontier: Sequence[Point], kl: float) -> float:
    """The score that a frontier has at this KL: straight lines between its points, its last score
    beyond them, and -inf below the first.
    """
    if not frontier or kl < frontier[0][0]:
        return float("-inf")
    for (left, low), (right, high) in pairwise(frontier):
        if kl <= right:
            return low + (high - low) * (kl - left) / (right - left)
    return frontier[-1][1]


def show(kept: dict[str, Any], console: Console, *, ours: str) -> None:
    """The record as a table, and how far each place of ours lies above the others' frontier."""
    found = places(kept["runs"])
    betas = sorted({place.beta for place in found})
    table = Table(
        title="score at KL (nats a sequence) on unseen prompts, by beta; mean±sd of seeds",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    table.add_column("trainer", max_width=NAME, overflow="fold")
    for name in (*(f"beta {beta:g}" for beta in betas), "seconds"):
        table.add_column(name, justify="right")
    for contestant in dict.fromkeys(place.contestant for place in found):
        own = {place.beta: place for place in found if place.contestant == contestant}
        cells = [str(own[beta]) if beta in own else "-" for beta in betas]
        table.add_row(contestant, *cells, f"{median(p.wall_s for p in own.values()):.0f}")
    console.print(table)
    for line in margins(found, ours):
        console.print(line, highlight=False, soft_wrap=True)


def margins(found: Sequence[Place], ours: str) -> list[str]:
    """How far each place of ours lies above what all others together reach at its KL, a line each;
    none where there are no others.
    """
    others = frontier((p.kl, p.score) for p in found if not p.contestant.startswith(ours))
    if not others:
        return []
    lines = []
    for place in (p for p in found if p.contestant.startswith(ours)):
        theirs = reached(others, place.kl)
        by = "no other has so little KL" if theirs == float("-inf") else ""
        said = by or f"{place.score - theirs:+.2f} against the others' frontier"
        lines.append(f"{place.contestant}, beta {place.beta:g}: {place} nats: {said}")
    return lines


def _place(name: str, beta: float, runs: list[dict[str, Any]]) -> Place:
    def spread(key: str) -> float:
        return stdev(run[key] for run in runs) if len(runs) > 1 else 0.0

    return Place(
        name,
        beta,
        len(runs),
        fmean(run["score"] for run in runs),
        spread("score"),
        fmean(run["kl"] for run in runs),
        spread("kl"),
        median(run["wall_s"] for run in runs),
    )
