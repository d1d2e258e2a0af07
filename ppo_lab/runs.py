"""`python -m ppo_lab.runs [PATH ...]`: what became of each run, of a thousand in a second."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from ppo_lab import signals, sweep_index
from ppo_lab.run_state import RunState, common, is_run, is_stage, read_state, subfolders

STATUSES = (
    "finished",
    "running",
    "preempted",
    "failed",
    "crashed",
    "empty",
    "broken",
    "missing",
)
HEADINGS = ("run", "status", "objective", "steps", "settings", "why")


def main(arguments: Sequence[str] | None = None) -> int:
    """List the runs in the folders that the command line names; 1 where there is none."""
    asked = _parser().parse_args(arguments)
    found = [group for path in asked.paths for group in gathered(path.absolute())]
    with suppress(BrokenPipeError):  # whoever reads has seen enough
        for folder, runs in found:
            wanted = [state for state in runs if not asked.status or state.status in asked.status]
            lines = _as_json(folder, wanted) if asked.json else listing(folder, runs, wanted)
            if text := "\n".join(lines):
                print(text, flush=True)
    if not found:
        print(f"no runs in {' '.join(map(str, asked.paths))}", file=sys.stderr)
    return 0 if found else 1


def gathered(path: Path) -> Iterator[tuple[Path, list[RunState]]]:
    """The runs at a path and below it by the folders that hold them: those of sweeps by index."""
    if is_run(path):
        yield path.parent, [read_state(path, path.name)]
    elif sweep_index.is_sweep(path):
        if not any(map(is_stage, subfolders(path)[:1])):
            _complete(path)
            yield path, sweep_index.states(path)
    elif not is_stage(path):
        folders = subfolders(path)
        single = [folder for folder in folders if is_run(folder)]
        if single:
            yield path, [read_state(folder, folder.name) for folder in single]
        for folder in folders:
            if folder not in single:
                yield from gathered(folder)


def listing(folder: Path, runs: Sequence[RunState], shown: Sequence[RunState]) -> Iterator[str]:
    """The lines that tell of the runs in one folder: how many of which kind, then each shown."""
    if not runs:  # a search, say, before its first
        yield from (f"{_short(folder)}: no run has begun", "")
        return
    counts = Counter(state.status for state in runs)
    kinds = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
    yield f"{_short(folder)}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}: {kinds}"
    best = max((s for s in runs if _is_result(s)), key=lambda s: s.objective or 0.0, default=None)
    if best and len(runs) > 1:
        yield f"highest objective: {best.objective:.6g}, run {best.run}"
    shared = common(runs) if len(runs) > 1 else frozenset(runs[0].overrides)
    if shared:
        yield f"all with: {' '.join(text for text in runs[0].overrides if text in shared)}"
    yield from _table([HEADINGS, *(_row(state, shared) for state in shown)] if shown else [])
    yield ""


def _row(state: RunState, shared: frozenset[str]) -> tuple[str, ...]:
    objective = "" if state.objective is None else f"{state.objective:.6g}"
    own = " ".join(text for text in state.overrides if text not in shared)
    return (state.run, state.status, objective, str(state.steps or ""), own, state.reason)


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as what is in them; numbers on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            text.rjust(width) if name in ("objective", "steps") else text.ljust(width)
            for name, text, width in zip(HEADINGS, row, widths, strict=True)
        ]
        yield "  ".join(cells).rstrip()


def _as_json(folder: Path, runs: Iterable[RunState]) -> Iterator[str]:
    """A line of JSON for each run."""
    for state in runs:
        fields = asdict(state)
        del fields["mark"]
        path = "" if state.status == "missing" else str(folder / state.run)
        yield json.dumps({"path": path, **fields})


def _is_result(state: RunState) -> bool:
    return state.status == "finished" and state.objective is not None


def _complete(sweep: Path) -> None:
    """Have the plan in the index of a sweep of Hydra's, which alone can say what it is to make."""
    if (sweep / sweep_index.SWEEP_RECORD).exists() and sweep_index.read(sweep)[1] is None:
        from ppo_lab.multirun import plan_again

        plan_again(sweep)


def _short(folder: Path) -> str:
    """A folder as seen from here, where it lies below."""
    here = Path.cwd()
    return str(folder.relative_to(here)) if folder.is_relative_to(here) else str(folder)


def _statuses(text: str) -> list[str]:
    wanted = text.split(",")
    if wrong := [status for status in wanted if status not in STATUSES]:
        raise argparse.ArgumentTypeError(
            f"{', '.join(wrong)}: no such status; must be of {', '.join(STATUSES)}"
        )
    return wanted


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ppo_lab.runs",
        description="What became of each run: status, objective, settings, and why it did not end.",
    )
    parser.add_argument(
        "paths",
        nargs="*",
        type=Path,
        default=[Path("outputs")],
        metavar="PATH",
        help="sweep folders, run folders, or folders that hold them; default: outputs",
    )
    parser.add_argument(
        "--status",
        type=_statuses,
        metavar="STATUS[,...]",
        help=f"only runs of these: {', '.join(STATUSES)}",
    )
    parser.add_argument("--json", action="store_true", help="a line of JSON for each run")
    return parser


if __name__ == "__main__":
    signals.end_quietly()
    sys.exit(main())
