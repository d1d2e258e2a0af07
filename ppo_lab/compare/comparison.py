"""All that is known of several runs together: what differs, groups of seeds, fits, remarks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas

from ppo_lab.compare.groups import (
    FIRST,
    Group,
    comparable,
    differing_keys,
    drawn,
    draws,
    enough_digits,
    grouped,
    is_number,
    settled,
    short,
    shown,
)
from ppo_lab.compare.outcomes import OUTCOMES, outcomes
from ppo_lab.compare.overoptimisation import Overoptimisation, fit_overoptimisation
from ppo_lab.compare.runs import Run
from ppo_lab.compare.statistics import rank_correlation, t_interval

BINDS_FROM = (
    0.01  # share of tokens; a smaller clip fraction means that epsilon changes next to nothing
)
OF_A_RUN = ("run", "path", "status", "reason", "group", "seed", "steps")
TASK = ("model.", "reward.", "data.")
# Keys of a reward that say how it is computed, not what it comes to.
ONLY_HOW = {"batch_size", "dtype", "device", "timeout", "retries", "retry_wait"}


@dataclass(frozen=True)
class Comparison:
    """Runs with the keys in which they differ, in groups of seeds, the best first.

    `fits` holds the over-optimisation of each task (model, reward, data) among the runs, or a
    sentence that says why it cannot be had.
    """

    runs: list[Run]
    keys: list[str]
    groups: list[Group]
    fits: dict[str, Overoptimisation | str]


def compare(runs: Sequence[Run]) -> Comparison:
    """What these runs say together."""
    keys = differing_keys(runs)
    return Comparison(list(runs), keys, grouped(runs, keys), _fits(runs, keys))


def _fits(runs: Sequence[Run], keys: Sequence[str]) -> dict[str, Overoptimisation | str]:
    tasks = grouped(
        [run for run in runs if run.config], [key for key in keys if key.startswith(TASK)]
    )
    return {task.label if task.settings else "": fit_overoptimisation(task.runs) for task in tasks}


def frame(comparison: Comparison) -> pandas.DataFrame:
    """One row a run: where it is, what became of it, the keys that differ, what it came to.

    A key that is called like another column, as `objective` is, has `config.` before its name.
    """
    taken = {*OF_A_RUN, *OUTCOMES}
    columns = {key: f"config.{key}" if key in taken else key for key in comparison.keys}
    number = {id(run): i for i, group in enumerate(comparison.groups) for run in group.runs}
    rows = [
        {
            "run": run.name,
            "path": run.path,
            "status": run.status,
            "reason": run.reason,
            "group": number[id(run)],
            "seed": run.config.get("seed"),
            "steps": run.steps,
            **{column: run.config.get(key) for key, column in columns.items()},
            **outcomes(run),
        }
        for run in comparison.runs
    ]
    table = pandas.DataFrame(rows)
    for name in columns.values():  # a column of several types has no place in Parquet
        if table[name].map(type).nunique() > 1 and not _all_numbers(table[name]):
            table[name] = table[name].map(str)
    return table


def _all_numbers(column: pandas.Series) -> bool:
    return all(map(is_number, column.dropna()))


def remarks(comparison: Comparison) -> list[str]:
    """What stands out, a sentence each."""
    return [
        *_unfinished(comparison),
        *_repeated_seeds(comparison),
        *_different_scores(comparison),
        *_rank_correlations(comparison),
        *_epsilon_that_never_binds(comparison),
        *(describe(fit, task) for task, fit in comparison.fits.items()),
    ]


def _unfinished(comparison: Comparison) -> Iterator[str]:
    counts = Counter(run.status for run in comparison.runs)
    if set(counts) - {"finished"}:
        yield ", ".join(f"{n} {status}" for status, n in counts.most_common()) + " runs"
    yield from (
        f"{run.name}: {run.status}, {run.reason}"
        for run in comparison.runs
        if run.reason and run.status != "running"
    )


def _repeated_seeds(comparison: Comparison) -> Iterator[str]:
    """Groups in which a seed stands more than once."""
    found = [group for group in comparison.groups if _has_a_seed_twice(settled(group.runs))]
    if found:
        yield (
            f"{len(found)} of {len(comparison.groups)} settings have runs of the same seed, as "
            f"{found[0].label}: copies, or a run from its folder and from W&B too? They count as "
            "one run, by their mean"
        )


def _different_scores(comparison: Comparison) -> Iterator[str]:
    """Rewards that differ: no order between their scores means anything."""
    rewards = [key for key in comparison.keys if key.startswith("reward.")]
    if found := [short(key) for key in rewards if short(key) not in ONLY_HOW]:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        yield (
            f"the rewards differ (by {', '.join(found[:3])}{more}), and with them what a score "
            "means: the order of the runs, Pareto fronts and means over settings compare unlike "
            "things. Choose the runs of one reward to compare them"
        )


def _has_a_seed_twice(runs: Sequence[Run]) -> bool:
    seeds = [comparable(run.config["seed"]) for run in runs if "seed" in run.config]
    return len(set(seeds)) < len(seeds)


def _rank_correlations(comparison: Comparison) -> Iterator[str]:
    """How monotonically the two headline metrics answer to the two knobs they are about."""
    for key, metric, what in zip(
        FIRST, ("kl", "clip_fraction"), ("final kl", "clip_fraction"), strict=True
    ):
        pairs = _finished_pairs(comparison, key, metric)
        rho = rank_correlation([x for x, _ in pairs], [y for _, y in pairs])
        if not np.isnan(rho):
            levels = _level_means(pairs)
            way = "falls" if np.all(np.diff(levels) < 0) else "does not fall"
            yield (
                f"{what} {way} monotonically with {short(key, comparison.keys)} "
                f"(means over {len(levels)} values; "
                f"Spearman's rho over {len(pairs)} runs: {rho:.2f})"
            )


def _finished_pairs(comparison: Comparison, key: str, metric: str) -> list[tuple[float, float]]:
    finished = [run for run in comparison.runs if run.status == "finished"]
    found = [(same[0].config.get(key), drawn(same, metric)[0]) for same in draws(finished)]
    return [(float(x), y) for x, y in found if is_number(x) and np.isfinite(y)]


def _level_means(pairs: Sequence[tuple[float, float]]) -> list[float]:
    return [float(np.mean(ys)) for ys in by_level(pairs).values()]


def by_level(pairs: Iterable[tuple[float, float]]) -> dict[float, list[float]]:
    """The second numbers of pairs by the first, which rise."""
    found: dict[float, list[float]] = {}
    for x, y in sorted(pairs):
        found.setdefault(x, []).append(y)
    return found


def clip_fraction_by_epsilon(comparison: Comparison) -> dict[float, list[float]]:
    """The mean clip fraction of every run that counts among those of its epsilon, which rises."""
    found: dict[float, list[Run]] = {}
    for run in comparison.runs:
        if is_number(epsilon := run.config.get(FIRST[1])):
            found.setdefault(float(epsilon), []).append(run)
    pairs = [(epsilon, y) for epsilon, runs in found.items() for y in drawn(runs, "clip_fraction")]
    return by_level((epsilon, y) for epsilon, y in pairs if np.isfinite(y))


def _epsilon_that_never_binds(comparison: Comparison) -> Iterator[str]:
    found = clip_fraction_by_epsilon(comparison)
    digits = enough_digits(found)
    for epsilon, fractions in found.items():
        mean = t_interval(fractions).mean
        if mean < BINDS_FROM:
            yield (
                f"cliprange={shown(epsilon, digits)} hardly ever binds: it clips {mean:.2%} of the "
                "tokens. A sweep over it shows next to nothing; more ppo_epochs or a higher "
                "learning_rate would change that"
            )


def describe(fit: Overoptimisation | str, task: str = "") -> str:
    """The over-optimisation fit in a sentence."""
    where = f"{task}: " if task else ""
    if isinstance(fit, str):
        return where + fit
    gold = fit.gold
    curve = f"gold gain R(d) = d ({gold.alpha:.3g} - {gold.beta:.3g} log d), d = sqrt(KL)"
    ranges = f"95 %: alpha {_range(gold.alpha_interval)}, beta {_range(gold.beta_interval)}"
    if np.isnan(gold.peak):
        return f"{where}{curve} ({ranges}); it does not peak"
    kl = f"KL = {gold.kl_at_peak:.3g} nats (95 %: {_range([d**2 for d in gold.peak_interval])})"
    least, most = (f"{end**2:.3g}" for end in (fit.d.min(), fit.d.max()))
    beside = f"beyond the largest KL measured, {most}"
    if gold.peak < fit.d.min():
        beside = f"below the smallest KL measured, {least}"
    seen = "" if fit.peak_is_seen else f", {beside}"
    return f"{where}{curve} ({ranges}); it peaks at d* = {gold.peak:.3g}, {kl}{seen}"


def _range(ends: Sequence[float]) -> str:
    return f"{ends[0]:.4g} to {ends[1]:.4g}"
