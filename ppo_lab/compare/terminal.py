"""The comparison in the terminal: one line a run, or one a group of seeds; where lines are too
short for that, one below the other.
"""

from __future__ import annotations

from collections.abc import Iterable

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.console import Group as RenderGroup
from rich.table import Table
from rich.text import Text

from ppo_lab.compare.comparison import Comparison
from ppo_lab.compare.groups import Group, short

MOST_KEYS = 6
GAP = 2  # characters between columns
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
    found = table(comparison)
    if narrowest(found) <= console.width:
        console.print(found)
    else:
        for group in comparison.groups:
            console.print(_entry(group, comparison), crop=False)
    hidden = comparison.keys[MOST_KEYS:]
    if hidden:
        console.print(f"also different, see compare.csv: {', '.join(hidden)}", markup=False)
    for remark in remarks:
        console.print(f"• {remark}", markup=False, highlight=False, soft_wrap=True)


def table(comparison: Comparison) -> Table:
    """The groups, the best first; ± is the half width of a 95 % interval over seeds."""
    keys, columns = comparison.keys[:MOST_KEYS], _measured(comparison)
    rows = [_cells(group, keys, columns) for group in comparison.groups]
    titles = [
        *(short(key, comparison.keys) for key in keys),
        "runs",
        *map(COLUMNS.__getitem__, columns),
    ]
    found = Table(title="", header_style="bold", box=None, pad_edge=False)
    for i, (name, *cells) in enumerate(zip(titles, *rows, strict=False)):
        texts = [name, *(cell.plain for cell in cells)]
        if i < len(keys):
            found.add_column(name, no_wrap=True, min_width=max(map(cell_len, texts)))
        else:  # in a narrow terminal, the interval goes below its mean
            words = [cell_len(word) for text in texts for word in text.split()]
            found.add_column(
                name, justify="right" if i > len(keys) else "left", min_width=max(words)
            )
    if not keys:
        found.add_column("run", overflow="fold", min_width=10)
    for row in rows:
        found.add_row(*row)
    return found


def narrowest(found: Table) -> int:
    """The characters in a line below which this table would be cut."""
    return sum(column.min_width or 0 for column in found.columns) + GAP * (len(found.columns) - 1)


def _measured(comparison: Comparison) -> list[str]:
    """The outcomes that any group has."""
    return [name for name in COLUMNS if any(g.results[name].n for g in comparison.groups)]


def _entry(group: Group, comparison: Comparison) -> RenderableType:
    """A group by itself: its settings, how its runs ended, an outcome a line."""
    label = Text(group.label, style="bold", overflow="fold")
    lines = Table.grid(padding=(0, GAP))
    lines.add_column(overflow="fold")
    lines.add_column(overflow="fold")
    lines.add_row("  runs", _status(group))
    for name in _measured(comparison):
        lines.add_row(f"  {COLUMNS[name]}", str(group.results[name]))
    return RenderGroup(label, lines)


def _cells(group: Group, keys: list[str], columns: list[str]) -> list[Text]:
    settings = [Text(group.written(key)) for key in keys]
    results = [Text(str(group.results[name])) for name in columns]
    names = [] if keys else [Text(", ".join(run.name for run in group.runs))]
    if keys and not group.settings:  # a stray: nothing but its name tells it
        settings[0] = Text(group.label, style="dim")
    return [*settings, _status(group), *results, *names]


def _status(group: Group) -> Text:
    kinds = {run.status for run in group.runs}
    colour = COLOURS.get(kinds.pop(), "red") if len(kinds) == 1 else "yellow"
    return Text(group.runs[0].status if len(group.runs) == 1 else group.status, style=colour)
