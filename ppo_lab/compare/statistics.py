"""Small statistics of runs: intervals over seeds, Pareto fronts, thinned curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean over `n` values and the half width of its 95 % interval, NaN for a single value."""

    mean: float
    half_width: float
    n: int

    def __str__(self) -> str:
        """As people read it: mean ± half width."""
        if not self.n:
            return "-"
        half = "" if np.isnan(self.half_width) else f" ± {self.half_width:.2g}"
        return f"{self.mean:.4g}{half}"


def t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t: 1.96 for many degrees of freedom, 12.7 for one."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.975))


def t_interval(values: Sequence[float]) -> Interval:
    """The mean of the finite values with its 95 % interval by Student's t: t s / sqrt(n)."""
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    n = len(finite)
    if n == 0:
        return Interval(np.nan, np.nan, 0)
    half = t_quantile(n - 1) * finite.std(ddof=1) / np.sqrt(n) if n > 1 else np.nan
    return Interval(float(finite.mean()), float(half), n)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rho over the finite pairs; NaN for fewer than three or a constant."""
    import pandas

    pairs = pandas.DataFrame({"x": x, "y": y}).replace([np.inf, -np.inf], np.nan).dropna().rank()
    if len(pairs) < 3 or pairs.nunique().min() < 2:
        return float("nan")
    return float(np.corrcoef(pairs.x, pairs.y)[0, 1])


def pareto_front(cost: Sequence[float], gain: Sequence[float]) -> list[int]:
    """The points that no other beats in both: lower cost and higher gain; by rising cost."""
    best, front = -np.inf, []
    for i in sorted(range(len(cost)), key=lambda i: (cost[i], -gain[i])):
        if np.isfinite(cost[i]) and gain[i] > best:
            best = gain[i]
            front.append(i)
    return front


def thinned(steps: np.ndarray, values: np.ndarray, *, most: int) -> tuple[np.ndarray, np.ndarray]:
    """A curve of at most `most` points: means over equal stretches of the measured ones."""
    measured = np.isfinite(values)
    if not measured.all():
        steps, values = steps[measured], values[measured]
    if len(values) <= most:
        return steps, values
    starts = np.linspace(0, len(values), most + 1).astype(int)[:-1]
    counts = np.diff([*starts, len(values)])
    return np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts
