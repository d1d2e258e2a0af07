"""Over-optimisation of the proxy: how far from the reference the gold score peaks.

With d = sqrt(KL(policy || reference)), both scores are fitted, as gains over the reference, by
    R(d) = d (alpha - beta log d),  R(0) = 0,
which peaks at d* = exp(alpha / beta - 1). It is linear in alpha and beta: least squares solve it.

Source: Gao, Schulman and Hilton 2022, arXiv:2210.10760, section 3.1 (reinforcement learning).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ppo_lab.compare.groups import draws
from ppo_lab.compare.outcomes import Evaluation, evaluations
from ppo_lab.compare.runs import Run

FEWEST_POINTS = 5
DRAWS = 1000


@dataclass(frozen=True)
class Curve:
    """A fitted R(d), with 95 % bootstrap intervals; `peak` is d*, NaN where the curve has no peak.

    `peak_interval` may reach infinity: then some draws of runs show no peak at all.
    """

    alpha: float
    beta: float
    peak: float
    alpha_interval: tuple[float, float]
    beta_interval: tuple[float, float]
    peak_interval: tuple[float, float]

    def at(self, d: np.ndarray) -> np.ndarray:
        """R(d), in the unit of the score."""
        return gain(d, alpha=self.alpha, beta=self.beta)

    @property
    def kl_at_peak(self) -> float:
        """The KL at which the score peaks, d*^2, nats per sequence."""
        return self.peak**2


@dataclass(frozen=True)
class Overoptimisation:
    """Gains over the reference of every evaluation, by d, with a curve through each score."""

    d: np.ndarray
    proxy_gain: np.ndarray
    gold_gain: np.ndarray
    proxy: Curve
    gold: Curve

    @property
    def peak_is_seen(self) -> bool:
        """Whether the gold score's peak lies within what was measured; else it is extrapolated."""
        return bool(self.d.min() <= self.gold.peak <= self.d.max())


def gain(d: np.ndarray, *, alpha: float, beta: float) -> np.ndarray:
    """R(d) = d (alpha - beta log d), 0 at d = 0."""
    return d * (alpha - beta * np.log(np.where(d > 0, d, 1.0)))


def peak_of(*, alpha: float, beta: float) -> float:
    """d* = exp(alpha / beta - 1), where alpha - beta log d - beta = 0; NaN unless a maximum."""
    exponent = alpha / beta - 1 if beta > 0 else np.inf
    return float(np.exp(exponent)) if exponent < 50 else np.nan


def fit_overoptimisation(runs: Sequence[Run], *, seed: int = 0) -> Overoptimisation | str:
    """The fit over all evaluations of these runs, or a sentence that says why there is none.

    Bootstrap draws are of whole runs: the evaluations of one run are not independent, nor are runs
    of the same settings and seed, which weigh as one.
    """
    points, owner, weights = _points(runs)
    count = round(weights.sum())
    if not any(np.isfinite(point.gold) for run in runs for point in evaluations(run)):
        return "no over-optimisation fit: no run has a gold score"
    if count < FEWEST_POINTS or len(set(owner)) < 2:
        begun = sum(not _begins(run) for run in runs)
        without = f"; {begun} runs lack the evaluation before training" if begun else ""
        return (
            f"no over-optimisation fit: {count} evaluations of {len(set(owner))} runs with a "
            f"gold score and KL above 0; it needs {FEWEST_POINTS} of 2 (set evaluation.every)"
            f"{without}"
        )
    d, proxy, gold = points.T
    curves = [
        _curve(_moments(d, gains, owner, weights), np.random.default_rng(seed))
        for gains in (proxy, gold)
    ]
    return Overoptimisation(d, proxy, gold, *curves)


def _points(runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(d, proxy gain, gold gain) of every evaluation off the reference, whose it is, its weight."""
    rows, owner, weights = [], [], []
    for number, same in enumerate(draws(runs)):
        paths = [path for run in same if (path := _path(run))]
        for path in paths:
            rows += path
            owner += [number] * len(path)
            weights += [1 / len(paths)] * len(path)
    return np.array(rows).reshape(-1, 3), np.array(owner), np.array(weights)


def _path(run: Run) -> list[tuple[float, float, float]]:
    """A run's own points, none where it is not known what it began from."""
    path = evaluations(run) if _begins(run) else []
    gains = [_gains(point, path[0]) for point in path[1:] if point.kl > 0]
    return [row for row in gains if np.isfinite(row).all()]


def _begins(run: Run) -> bool:
    """Whether it is known what a run began from, which one that crashed has not written down."""
    path = evaluations(run)
    return bool(path) and path[0].step == 0


def _gains(point: Evaluation, before: Evaluation) -> tuple[float, float, float]:
    return point.kl**0.5, point.mean_reward - before.mean_reward, point.gold - before.gold


def _curve(moments: np.ndarray, random: np.random.Generator) -> Curve:
    """The least-squares curve, its intervals from draws of whole runs with replacement."""
    runs = len(moments)
    counts = random.multinomial(runs, np.full(runs, 1 / runs), size=DRAWS)
    drawn = np.array([_solve(row) for row in counts @ moments])
    alpha, beta = _solve(moments.sum(axis=0))
    peaks = np.array([peak_of(alpha=a, beta=b) for a, b in drawn])
    intervals = [_middle(column) for column in (*drawn.T, np.where(np.isnan(peaks), np.inf, peaks))]
    return Curve(alpha, beta, peak_of(alpha=alpha, beta=beta), *intervals)


def _moments(
    d: np.ndarray, gains: np.ndarray, owner: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """The weighted sums uu, uv, vv, uR, vR of the columns u = d and v = -d log d, a row a run."""
    u, v = d, -d * np.log(d)
    runs, number = np.unique(owner, return_inverse=True)
    sums = np.zeros((len(runs), 5))
    products = np.stack([u * u, u * v, v * v, u * gains, v * gains], axis=1)
    np.add.at(sums, number, products * weights[:, None])
    return sums


def _solve(moments: np.ndarray) -> tuple[float, float]:
    """alpha and beta by the normal equations; the smallest ones where they are not determined."""
    uu, uv, vv, ur, vr = moments
    alpha, beta = np.linalg.lstsq(np.array([[uu, uv], [uv, vv]]), np.array([ur, vr]), rcond=None)[0]
    return float(alpha), float(beta)


def _middle(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of values, which may be infinite."""
    ordered = np.sort(values)
    low, high = int(0.025 * (len(ordered) - 1)), int(np.ceil(0.975 * (len(ordered) - 1)))
    return float(ordered[low]), float(ordered[high])
