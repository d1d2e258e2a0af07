"""The main plots as PNG and SVG, for a paper: fixed sizes, text as text, legible in grey."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from ppo_lab.compare.comparison import BINDS_FROM, Comparison, clip_fraction_by_epsilon
from ppo_lab.compare.groups import (
    FIRST,
    Group,
    drawn,
    draws,
    enough_digits,
    is_number,
    short,
    shown,
)
from ppo_lab.compare.outcomes import evaluations
from ppo_lab.compare.overoptimisation import Overoptimisation
from ppo_lab.compare.runs import Run
from ppo_lab.compare.statistics import pareto_front, t_interval, thinned

HEADLINE = ("kl", "mean_reward", "clip_fraction")
MOST_IN_LEGEND = 12
MOST_POINTS = 300
MOST_CELLS = 30


def save_figures(comparison: Comparison, folder: Path) -> list[Path]:
    """The files written: each plot that these runs give, as `compare_<what>.png` and `.svg`."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    written = []
    with mpl.rc_context(
        {"svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.25}
    ):
        for name, size, drawing in _drawings(comparison):
            figure = Figure(figsize=size, layout="constrained")
            drawing(figure)
            for kind in ("png", "svg"):
                written.append(folder / f"compare_{name}.{kind}")
                figure.savefig(written[-1], dpi=160)
                figure.set_layout_engine("none")  # it is laid out: the second time is the same
    return written


Drawing = Callable[[Any], None]


def _drawings(comparison: Comparison) -> Iterator[tuple[str, tuple[float, float], Drawing]]:
    """Name, size in inches and function of every plot for which there is something to draw."""
    fits = [fit for fit in comparison.fits.values() if not isinstance(fit, str)]
    small = (4.6, 3.6)
    if any(run.history for run in comparison.runs):
        yield "curves", (11, 3.4), partial(_curves, comparison=comparison)
    if any(evaluations(run) for run in comparison.runs):
        yield "frontier", (9, 3.8), partial(_frontiers, comparison=comparison)
    if all(1 < len(levels) <= MOST_CELLS for levels in _levels(comparison)):
        yield "objective", small, partial(_heat, comparison=comparison)
    if clip_fraction_by_epsilon(comparison):
        yield "clip_fraction", small, partial(_clip, comparison=comparison)
    for number, fit in enumerate(fits):
        yield f"overoptimisation{number or ''}", small, partial(_fit, fit=fit)


def _levels(comparison: Comparison) -> list[list[Any]]:
    """The values of beta and of epsilon, rising; none where one does not differ between runs.
    What is no number has no place on an axis: a run that lacks the key is not drawn.
    """
    found = [[group.settings.get(key) for group in comparison.groups] for key in FIRST]
    return [sorted({value for value in values if is_number(value)}) for values in found]


def _colours(comparison: Comparison) -> dict[str, Any]:
    """A colour for each value, as shown, of the first differing key, in rising order; none for runs
    without an iteration. A value may be a list.
    """
    import matplotlib as mpl

    groups = [group for group in comparison.groups if any(run.steps for run in group.runs)]
    ordered = sorted(groups, key=lambda group: _place(group, comparison))
    names = list(dict.fromkeys(_coloured_by(group, comparison) for group in ordered))
    return dict(zip(names, mpl.colormaps["viridis"](np.linspace(0, 0.92, len(names))), strict=True))


def _coloured_by(group: Group, comparison: Comparison) -> str:
    """The first differing key's value, in words, since a list cannot be looked up."""
    return group.written(comparison.keys[0]) if comparison.keys else "all"


def _place(group: Group, comparison: Comparison) -> tuple[bool, float, str]:
    """Where a group's colour stands: numbers rise, words come after them."""
    value = group.settings.get(comparison.keys[0]) if comparison.keys else None
    number = value if is_number(value) else 0.0
    return not is_number(value), number, _coloured_by(group, comparison)


def _curves(figure: Any, comparison: Comparison) -> None:
    """A line a group, and a band where its runs have the same steps; all lines and all bands of a
    metric are one thing each, since drawing a thousand things takes long.
    """
    from matplotlib.collections import LineCollection, PolyCollection

    colours = _colours(comparison)
    for axes, metric in zip(figure.subplots(1, len(HEADLINE)), HEADLINE, strict=True):
        lines, shades, bands, tints = [], [], [], []
        for group in comparison.groups:
            colour = colours.get(_coloured_by(group, comparison), "C0")
            found, band = _lines(group.runs, metric)
            lines += found
            shades += [colour] * len(found)
            if band is not None:
                bands.append(band)
                tints.append(colour)
        axes.add_collection(PolyCollection(bands, facecolors=tints, alpha=0.2, linewidths=0))
        axes.add_collection(LineCollection(lines, colors=shades, linewidths=1))
        axes.autoscale_view()
        axes.set(xlabel="iteration", title=metric)
    _legend(figure, colours, comparison)


def _lines(runs: Sequence[Run], metric: str) -> tuple[list[np.ndarray], np.ndarray | None]:
    """The mean over seeds and the outline of their range; one line a run where steps differ."""
    seeds = draws([run for run in runs if metric in run.history])
    weights = [1 / len(same) for same in seeds for _ in same]
    curves = [
        thinned(run.history["step"], run.history[metric], most=MOST_POINTS)
        for same in seeds
        for run in same
    ]
    if len(curves) > 1 and all(np.array_equal(curves[0][0], steps) for steps, _ in curves):
        values, steps = np.stack([values for _, values in curves]), curves[0][0]
        low, high = (np.column_stack([steps, f(axis=0)]) for f in (values.min, values.max))
        mean = np.average(values, axis=0, weights=weights)
        return [np.column_stack([steps, mean])], np.concatenate([low, high[::-1]])
    return [np.column_stack(curve) for curve in curves], None


def _legend(figure: Any, colours: dict[str, Any], comparison: Comparison) -> None:
    from matplotlib.lines import Line2D

    if not comparison.keys or not 1 < len(colours) <= MOST_IN_LEGEND:
        return
    handles = [Line2D([], [], color=colour, label=value) for value, colour in colours.items()]
    figure.legend(
        handles=handles, title=short(comparison.keys[0], comparison.keys), loc="outside right upper"
    )


def _frontiers(figure: Any, comparison: Comparison) -> None:
    colours = _colours(comparison)
    for axes, name in zip(figure.subplots(1, 2), ("mean_reward", "gold"), strict=True):
        paths, shades = [], []
        for group in comparison.groups:
            found = [path for run in group.runs if (path := _path(run, name))]
            paths += found
            shades += [colours.get(_coloured_by(group, comparison), "C0")] * len(found)
        if paths:
            _draw_paths(axes, paths, shades)
        else:
            axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
        title = "held-out score" if name == "mean_reward" else "gold score"
        axes.set(xlabel="KL to the reference (nats/sequence)", title=title)
    _legend(figure, colours, comparison)


def _path(run: Run, name: str) -> list[tuple[float, float]]:
    """A run's way through training, as points of KL and score."""
    points = [(e.kl, getattr(e, name)) for e in evaluations(run)]
    return [point for point in points if isfinite(point[0]) and isfinite(point[1])]


def _draw_paths(axes: Any, paths: Sequence[list[tuple[float, float]]], shades: list[Any]) -> None:
    """Draw all paths as one thing (one line each takes seconds for a thousand), and the front."""
    from matplotlib.collections import LineCollection

    ends = [path[-1] for path in paths]
    kl, score = zip(*ends, strict=True)
    front = pareto_front(kl, score)
    axes.add_collection(LineCollection(paths, colors=shades, linewidths=0.6, alpha=0.6))
    axes.scatter(kl, score, c=shades, s=16)
    frontier = [ends[i] for i in front]
    axes.step(*zip(*frontier, strict=True), where="post", color="black", linewidth=1)
    axes.autoscale_view()


def objectives(comparison: Comparison) -> tuple[list[Any], list[Any], list[list[float]]]:
    """The values of beta, those of epsilon, and for each of these a row of mean objectives."""
    xs, ys = _levels(comparison)
    cells: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for group in comparison.groups:
        cells[tuple(group.settings.get(key) for key in FIRST)] += group.runs
    found = {place: drawn(runs, "objective") for place, runs in cells.items()}
    table = [[t_interval(found.get((x, y), [])).mean for x in xs] for y in ys]
    return xs, ys, table


def _heat(figure: Any, comparison: Comparison) -> None:
    xs, ys, table = objectives(comparison)
    axes = figure.subplots()
    image = axes.imshow(table, origin="lower", aspect="auto", cmap="viridis")
    figure.colorbar(image, label="objective")
    axes.grid(visible=False)
    axes.set(xlabel=short(FIRST[0]), ylabel=short(FIRST[1]), title="objective, mean over runs")
    axes.set_xticks(range(len(xs)), _marks(xs), rotation=45 if len(xs) > 8 else 0)
    axes.set_yticks(range(len(ys)), _marks(ys))


def _marks(values: Sequence[Any]) -> list[str]:
    digits = enough_digits(values)
    return [shown(value, digits) for value in values]


def _clip(figure: Any, comparison: Comparison) -> None:
    axes = figure.subplots()
    found = clip_fraction_by_epsilon(comparison)
    points = [(epsilon, fraction) for epsilon, some in found.items() for fraction in some]
    axes.plot(*zip(*points, strict=True), "o", color="#56b4e9", markersize=3, alpha=0.6)
    axes.plot(
        list(found), [t_interval(fractions).mean for fractions in found.values()], color="#0072b2"
    )
    axes.axhline(BINDS_FROM, color="#a40000", linestyle=":", linewidth=1)
    axes.set(
        xlabel="cliprange (epsilon)", ylabel="clip_fraction, mean over training", ylim=(0, None)
    )


def _fit(figure: Any, fit: Overoptimisation) -> None:
    axes = figure.subplots()
    grid = np.linspace(0, fit.d.max() * 1.1, 200)
    for curve, gains, name, colour in (
        (fit.proxy, fit.proxy_gain, "proxy", "#e69f00"),
        (fit.gold, fit.gold_gain, "gold", "#0072b2"),
    ):
        axes.plot(fit.d, gains, "o", color=colour, markersize=2.5, alpha=0.5, rasterized=True)
        axes.plot(grid, curve.at(grid), color=colour, label=name)
    if fit.gold.peak <= grid[-1]:
        axes.axvline(fit.gold.peak, color="#0072b2", linestyle="--", linewidth=1)
        axes.set_title(f"gold peaks at {fit.gold.kl_at_peak:.3g} nats")
    axes.set(xlabel="d = sqrt(KL), KL in nats/sequence", ylabel="gain over the reference")
    axes.legend(loc="upper left")
