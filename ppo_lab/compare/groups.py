"""Runs that differ in the seed alone, as one; and the keys in which runs differ at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeGuard

import numpy as np

from ppo_lab.compare.outcomes import OUTCOMES, outcomes
from ppo_lab.compare.runs import Run
from ppo_lab.compare.statistics import Interval, t_interval

# What tells nothing of the experiment: repetition, names, and where things go.
NOT_THE_EXPERIMENT = ("seed", "name", "resume", "device", "tracking.", "checkpoint.")
FIRST = ("ppo.init_kl_coef", "ppo.cliprange")
ABSENT = "-"
FEWEST_DIGITS, ALL_DIGITS = 6, 17  # of a setting: as shown by itself, and as a double holds


@dataclass
class Group:
    """Runs of one setting; `settings` holds the keys that tell it from the other groups, `digits`
    how many each takes to be told from theirs.
    """

    settings: dict[str, Any]
    runs: list[Run] = field(default_factory=list)
    digits: dict[str, int] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The settings on one line, keys without their sections."""
        told = " ".join(f"{short(key, self.settings)}={self.written(key)}" for key in self.settings)
        return told or self.runs[0].name

    def written(self, key: str) -> str:
        """A setting as people write it, unlike those of the other groups."""
        value = self.settings.get(key, ABSENT)
        return shown(value, self.digits.get(key, FEWEST_DIGITS))

    @property
    def status(self) -> str:
        """How many runs ended how: `2 finished, 1 failed`."""
        counts = Counter(run.status for run in self.runs).most_common()
        return ", ".join(f"{count} {status}" for status, count in counts)

    @cached_property
    def results(self) -> dict[str, Interval]:
        """The interval of each outcome over the seeds of the runs that count."""
        ends = [[outcomes(run) for run in same] for same in draws(settled(self.runs))]
        return {
            name: t_interval([_mean(one[name] for one in same) for same in ends])
            for name in OUTCOMES
        }


def _mean(values: Iterable[float]) -> float:
    return t_interval(list(values)).mean


def settled(runs: Sequence[Run]) -> list[Run]:
    """The runs that count: the finished ones, or all while there are none. The page has the same
    rule.
    """
    return [run for run in runs if run.status == "finished"] or list(runs)


def draws(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs of one setting and one seed together: those of a copied sweep are no further draw. Runs
    without a seed stand alone. The page has the same rule.
    """
    keys = ["seed", *differing_keys(runs)]
    found: dict[Any, list[Run]] = {}
    for run in runs:
        values = tuple(comparable(run.config.get(key, ABSENT)) for key in keys)
        identity = run.path if run.config.get("seed") is None else values
        found.setdefault(identity, []).append(run)
    return list(found.values())


def drawn(runs: Sequence[Run], name: str) -> list[float]:
    """An outcome of each draw among the runs that count, the mean where a draw has several runs."""
    return [_mean(outcomes(run)[name] for run in same) for same in draws(settled(runs))]


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """The keys of the experiment whose values differ between runs, beta and epsilon first."""
    differing = [key for key in all_differing_keys(runs) if _is_experiment(key)]
    return sorted(differing, key=lambda key: FIRST.index(key) if key in FIRST else len(FIRST))


def all_differing_keys(runs: Sequence[Run]) -> list[str]:
    """Every key whose values differ between runs: seeds, names and places too."""
    configs = [run.config for run in runs if run.config]
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if _differs(key, configs)]


def _is_experiment(key: str) -> bool:
    return not any(
        key == name or (name[-1] == "." and key.startswith(name)) for name in NOT_THE_EXPERIMENT
    )


def _differs(key: str, configs: Sequence[dict[str, Any]]) -> bool:
    first = comparable(configs[0].get(key, ABSENT))
    return any(comparable(config.get(key, ABSENT)) != first for config in configs)


def grouped(runs: Sequence[Run], keys: Sequence[str]) -> list[Group]:
    """Runs with the same values of these keys together, the highest objective first."""
    digits = {key: enough_digits(run.config.get(key) for run in runs) for key in keys}
    groups: dict[Any, Group] = {}
    for run in runs:
        settings = {key: run.config.get(key, ABSENT) for key in keys} if run.config else {}
        identity = tuple(map(comparable, settings.values())) if run.config else run.path
        groups.setdefault(identity, Group(settings, digits=digits)).runs.append(run)
    return sorted(groups.values(), key=_rank)


def _rank(group: Group) -> float:
    objective = group.results["objective"].mean
    return np.inf if np.isnan(objective) else -objective


def comparable(value: Any) -> Any:
    """A value that can be hashed and is equal for equal settings: 1 and 1.0, but not 1 and true."""
    if is_number(value):
        return float(value)
    return repr(value)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a setting is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def short(key: str, among: Iterable[str] = ()) -> str:
    """A key without its sections, but for those that tell it from the others of `among`."""
    parts, others = key.split("."), [f".{other}" for other in among if other != key]
    names = (".".join(parts[-count:]) for count in range(1, len(parts)))
    return next((n for n in names if not any(o.endswith(f".{n}") for o in others)), key)


def enough_digits(values: Iterable[Any]) -> int:
    """The digits, six at least, with which no two of the numbers among these look alike."""
    numbers = {value for value in values if isinstance(value, float)}
    for digits in range(FEWEST_DIGITS, ALL_DIGITS):
        if len({shown(number, digits) for number in numbers}) == len(numbers):
            return digits
    return ALL_DIGITS


def shown(value: Any, digits: int = FEWEST_DIGITS) -> str:
    """A setting as people write it."""
    rounded = isinstance(value, float) and digits < ALL_DIGITS
    return f"{value:.{digits}g}" if rounded else str(value)
