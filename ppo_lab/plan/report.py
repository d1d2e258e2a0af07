"""A plan as people read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ppo_lab.plan.counted import Phase
from ppo_lab.plan.estimate import Plan
from ppo_lab.plan.parallel import Way, fitting
from ppo_lab.summary import duration, number


@dataclass(frozen=True)
class Planned:
    """One run of a command: what it changes, how often it comes, its plan and ways to share it."""

    changes: Sequence[str]
    times: int
    plan: Plan
    ways: Sequence[Way]

    @property
    def chosen(self) -> Way | None:
        """How the run would be shared out."""
        return fitting(list(self.ways))

    @property
    def iteration_s(self) -> float:
        """Seconds of one iteration, shared out."""
        return self.chosen.seconds if self.chosen else self.plan.iteration_s

    @property
    def run_s(self) -> float:
        """Seconds of the run, shared out."""
        return self.plan.run_s * self.iteration_s / self.plan.iteration_s

    @property
    def device_hours(self) -> float:
        """Hours of all devices together, each time."""
        used = 1 if self.chosen and self.chosen.name == "one device" else self.plan.target.count
        return self.run_s * used / 3600


def show(runs: Sequence[Planned], console: Console) -> None:
    """Print one run's page, or a sweep's table and its first run's page."""
    console.print(page(runs[0]))
    if len(runs) > 1 or runs[0].times > 1:
        console.print(sweep(runs))


def page(run: Planned) -> RenderableType:
    """Memory, phases, ways, verdict."""
    plan = run.plan
    where = (
        plan.target.name if plan.target.count == 1 else f"{plan.target.count} x {plan.target.name}"
    )
    shared: list[RenderableType] = (
        [_heading("shared out"), _ways(run.ways)] if len(run.ways) > 1 else []
    )
    return Group(
        Text.assemble(("plan", "bold"), f"  {_weights(plan)}, {where}"),
        _heading("memory", "GB, on one device, at its highest"),
        _memory(plan),
        _heading("an iteration", "on one device" if plan.target.count > 1 else ""),
        _phases(plan),
        *shared,
        "",
        *(Text(f"{line}") for line in verdict(run)),
        *(Text(f"({note})", style="dim") for note in plan.notes),
    )


def verdict(run: Planned) -> list[str]:
    """What it comes to, a line each."""
    plan, way = run.plan, run.chosen
    longest = max(plan.phases, key=lambda name: plan.phases[name].seconds)
    lines = []
    if way is None:
        lines.append(
            f"does not fit: {_gb(min(w.bytes for w in run.ways))} GB of "
            f"{_gb(plan.room)} GB; memory capacity binds. {_ways_out(plan)}"
        )
    else:
        launch = f" (conf/accelerate/{way.file}.yaml)" if way.file else ""
        lines.append(f"fits: {way.name}{launch}, {_gb(way.bytes)} of {_gb(plan.room)} GB")
    lines.append(f"binds: {plan.phases[longest].binds}, in {longest}")
    hours = "GPU-hours" if plan.target.device or plan.room == 0 else "machine-hours"
    lines.append(
        f"{number(run.iteration_s)} s an iteration; the run, {plan.workload.iterations} iterations "
        f"and {plan.workload.evaluations} evaluations: {duration(run.run_s)}, "
        f"{number(run.device_hours)} {hours}"
    )
    return lines


def sweep(runs: Sequence[Planned]) -> RenderableType:
    """A line a run, and the total."""
    table = Table(title="", header_style="bold", box=None, pad_edge=False)
    shared = set.intersection(*(set(run.changes) for run in runs)) if len(runs) > 1 else set()
    for name in ("run", "GB", "s/iteration", "hours"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for run in runs:
        own = " ".join(text for text in run.changes if text not in shared) or "all"
        times = f"{run.times} x " if run.times > 1 else ""
        size = run.chosen.bytes if run.chosen else run.plan.memory.total
        hours = run.times * run.device_hours
        table.add_row(times + own, _gb(size), number(run.iteration_s), number(hours))
    count, total = sum(run.times for run in runs), sum(run.times * run.device_hours for run in runs)
    return Group(
        _heading("the sweep"),
        table,
        "",
        Text(f"{count} runs, {number(total)} hours of devices in all"),
    )


def _memory(plan: Plan) -> Table:
    table = _grid()
    for name, size in plan.memory.parts.items():
        table.add_row(f"  {name}", _gb(size))
    table.add_row(f"  total (in {plan.memory.largest_phase})", _gb(plan.memory.total))
    for name, size in plan.memory.elsewhere.items():
        table.add_row(f"  ({name}", f"{_gb(size)})")
    return table


def _phases(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 3, 0, 0))
    for name in ("", "TFLOP", "GB read and written", "seconds", "binds"):
        table.add_column(name, justify="left" if name in ("", "binds") else "right")
    for name, phase in plan.phases.items():
        table.add_row(f"  {name}", *_cells(phase))
    return table


def _cells(phase: Phase) -> tuple[str, str, str, str]:
    work = phase.work
    binds = phase.binds if phase.seconds else "-"
    return number(work.flops / 1e12), number(work.bytes / 1e9), number(phase.seconds), binds


def _ways(found: Sequence[Way]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 3, 0, 0))
    for name in ("", "GB a device", "s/iteration", "fits"):
        table.add_column(name, justify="left" if name in ("", "fits") else "right")
    for way in found:
        fits = "yes" if way.fits else "no"
        table.add_row(f"  {way.name}", _gb(way.bytes), number(way.seconds), fits)
    return table


def _ways_out(plan: Plan) -> str:
    """What would make a run smaller, as far as it is not done."""
    ways = [] if not plan.of.has_own_reference else ["lora=r16"]
    update = plan.memory.passing["update"].get("activations", 0.0)
    if update > plan.memory.total / 4:
        ways += ["ppo.micro_batch_tokens=-1", "ppo.gradient_checkpointing=true"]
    return f"{', '.join([*ways, 'more devices or a smaller model'])} would help"


def _weights(plan: Plan) -> str:
    of = plan.of
    share = "all trained" if of.has_own_reference else f"{number(of.trained / 1e6)} M trained"
    return f"{number(of.parameters / 1e6)} M weights, {share}, {of.layers} layers"


def _heading(title: str, note: str = "") -> Text:
    return Text.assemble("\n", (title, "bold yellow"), (f"  {note}" if note else "", "dim"))


def _grid() -> Table:
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    return table


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"
