"""The comparison in the terminal: one line a run, or one a group of seeds."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ppo_lab.compare.comparison import Comparison
from ppo_lab.compare.groups import Group, short, shown

MOST_KEYS = 6
COLUMNS = {
    "objective": "objective",
    "eval/mean_reward": "held-out score",
    "eval/gold": "gold",
    "eval/kl": "held-out KL",
    "clip_fraction": "clip fraction",
}
COLOURS = {"finished": "green", "running": "cyan", "preempted": "yellow"}


def show(comparison: Comparison, remarks: Iterable[str], console: Console) -> None:
    """Print the table, then the remarks."""
    console.print(table(comparison))
    hidden = comparison.keys[MOST_KEYS:]
    if hidden:
        console.print(f"also different, see compare.csv: {', '.join(hidden)}", markup=False)
    for remark in remarks:
        console.print(f"• {remark}", markup=False, highlight=False, soft_wrap=True)


def table(comparison: Comparison) -> Table:
    """The groups, the best first; ± is the half width of a 95 % interval over seeds."""
    found = Table(title="", header_style="bold", box=None, pad_edge=False)
    keys = comparison.keys[:MOST_KEYS]
    columns = [name for name in COLUMNS if any(g.results[name].n for g in comparison.groups)]
    for key in keys:
        found.add_column(short(key), no_wrap=True)
    found.add_column("runs", min_width=10)
    for name in columns:  # in a narrow terminal, the interval goes below its mean
        found.add_column(COLUMNS[name], justify="right", min_width=7)
    if not keys:
        found.add_column("run", overflow="fold")
    for group in comparison.groups:
        found.add_row(*_cells(group, keys, columns))
    return found


def _cells(group: Group, keys: list[str], columns: list[str]) -> list[Text]:
    settings = [Text(shown(group.settings.get(key, "-"))) for key in keys]
    results = [Text(str(group.results[name])) for name in columns]
    names = [] if keys else [Text(", ".join(run.name for run in group.runs))]
    if keys and not group.settings:  # a stray: nothing but its name tells it
        settings[0] = Text(group.label, style="dim")
    return [*settings, _status(group), *results, *names]


def _status(group: Group) -> Text:
    kinds = {run.status for run in group.runs}
    colour = COLOURS.get(kinds.pop(), "red") if len(kinds) == 1 else "yellow"
    return Text(group.runs[0].status if len(group.runs) == 1 else group.status, style=colour)
