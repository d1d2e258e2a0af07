"""The command line of `python -m ppo_lab.compare`: a table here, the rest in a folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ppo_lab.compare.comparison import Comparison, compare, frame, remarks
from ppo_lab.compare.runs import Run, read_runs
from ppo_lab.compare.terminal import show
from ppo_lab.console import Console

MOST_REMARKS_TOLD = 20
WITHOUT_A_TERMINAL = 160  # characters


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the runs that the command line names; 1 where there is none, or no room for it."""
    asked = _parser().parse_args(arguments)
    width = None if sys.stdout.isatty() else WITHOUT_A_TERMINAL
    console = Console(width=width, emoji=False)  # reward.target=rw:boom: is no 💥
    if not asked.paths and not asked.wandb:
        asked.paths = ["outputs"]
    runs = read_runs(asked.paths) + [
        run for path in asked.wandb for run in _from_wandb(path, console)
    ]
    if not any(run.config or run.history or run.summary for run in runs):
        for run in runs:
            console.print(f"{run.path}: {run.reason}", markup=False, soft_wrap=True)
        console.print(f"no runs in {' '.join([*asked.paths, *asked.wandb])}", markup=False)
        return 1
    comparison = compare(runs)
    said = remarks(comparison)
    show(comparison, _told(said), console)
    folder = asked.output or default_folder(asked.paths)
    title = " ".join([*asked.paths, *asked.wandb])
    try:
        written = write(comparison, said, folder, title=title)
    except OSError as error:  # a sweep of somebody else, a full disk, a file of that name
        console.print(
            f"{folder}: cannot be written ({error}); --output FOLDER puts all of it elsewhere",
            markup=False,
            soft_wrap=True,
        )
        return 1
    for file in written:
        console.print(f"wrote {file}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _told(said: Sequence[str]) -> list[str]:
    """The remarks that a terminal has room for: the first, how runs ended, among them."""
    if len(said) <= MOST_REMARKS_TOLD:
        return list(said)
    more = len(said) - MOST_REMARKS_TOLD
    rest = said[more + 1 :]
    return [said[0], f"({more} more remarks are on the page)", *rest]


def write(comparison: Comparison, said: Sequence[str], folder: Path, *, title: str) -> list[Path]:
    """The files written: page, tables and figures, in a folder that is made if need be."""
    from ppo_lab.compare.figures import save_figures
    from ppo_lab.compare.page import page

    folder.mkdir(parents=True, exist_ok=True)
    html, csv, parquet = (folder / f"compare.{kind}" for kind in ("html", "csv", "parquet"))
    html.write_text(page(comparison, said, title=f"ppo_lab: {title}"), "utf-8")
    table = frame(comparison)
    table.to_csv(csv, index=False)
    table.to_parquet(parquet, index=False)
    return [html, csv, parquet, *save_figures(comparison, folder)]


def default_folder(paths: Sequence[str]) -> Path:
    """The folder that was asked about, where it was one; else outputs/compare."""
    only = Path(paths[0]) if len(paths) == 1 else None
    return only if only and only.is_dir() else Path("outputs/compare")


def _from_wandb(path: str, console: Console) -> list[Run]:
    from ppo_lab.compare.wandb_runs import fetch_runs

    try:
        return fetch_runs(path)
    except Exception as error:  # no network, no account, no such project: W&B raises many kinds
        console.print(f"--wandb {path}: {type(error).__name__}: {error}", markup=False)
        return []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ppo_lab.compare",
        description="Runs side by side: a table here; a page, tables and figures in a folder.",
    )
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="run folders, sweep folders or globs; default: outputs",
    )
    parser.add_argument(
        "--wandb",
        action="append",
        default=[],
        metavar="ENTITY/PROJECT[/SWEEP]",
        help="read runs from Weights & Biases; may be given several times",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where to write; default: the one folder given, or outputs/compare",
    )
    return parser
