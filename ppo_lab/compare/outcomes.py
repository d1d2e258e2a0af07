"""What a run came to, as named numbers: from its summary, or else from its history."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ppo_lab.compare.runs import Run
from ppo_lab.record import flat

# column -> (where the summary keeps it, meaning)
OUTCOMES: dict[str, tuple[str, str]] = {
    "objective": ("objective", "what the run was asked to maximise"),
    "eval/mean_reward": ("eval.last.mean_reward", "held-out mean score at the end"),
    "eval/gold": ("eval.last.gold", "held-out gold score at the end"),
    "eval/kl": ("eval.last.kl", "held-out KL to the reference at the end, nats per sequence"),
    "kl": ("train.kl", "mean over the last tenth of the iterations, nats per sequence"),
    "mean_reward": ("train.mean_reward", "mean over the last tenth of the iterations"),
    "clip_fraction": ("train.clip_fraction", "mean over all iterations"),
    "tokens_per_second": ("tokens_per_second", "tokens of all iterations over their time"),
    "wall_s": ("wall_s", "seconds, from start to end"),
}


class Evaluation(NamedTuple):
    """One evaluation of a run on held-out prompts; NaN where there is no gold score."""

    step: int
    kl: float
    mean_reward: float
    gold: float


def outcomes(run: Run) -> dict[str, float]:
    """The numbers of OUTCOMES; NaN where a run has none. What the summary of a finished run states
    to be no number is none, whatever came before.
    """
    stated, measured = flat(run.summary), _from_history(run)
    finished = run.status == "finished"
    return {
        name: measured[name]
        if stated.get(key) is None and not (finished and key in stated)
        else _as_number(stated[key])
        for name, (key, _) in OUTCOMES.items()
    }


def _from_history(run: Run) -> dict[str, float]:
    """The same numbers as far as the run has come."""
    found = dict.fromkeys(OUTCOMES, np.nan)
    for name in ("eval/mean_reward", "eval/gold", "eval/kl"):
        found[name] = _last(run, name)
    found["objective"] = _last(run, str(run.config.get("objective", "eval/mean_reward")))
    for name in ("kl", "mean_reward"):
        found[name] = _mean(run, name, last=max(1, run.steps // 10))
    found["clip_fraction"] = _mean(run, "clip_fraction")
    found["tokens_per_second"] = _rate(run)
    return found


def evaluations(run: Run) -> list[Evaluation]:
    """Every evaluation of a run, the one before the first update included where it was kept."""
    names = ("mean_reward", "gold")
    first = flat(run.summary).get("eval.first.kl")
    path = []
    if first is not None:
        before = run.summary["eval"]["first"]
        path.append(Evaluation(0, _as_number(first), *(_as_number(before.get(n)) for n in names)))
    kl = run.history.get("eval/kl")
    if kl is not None:
        absent = np.full(len(kl), np.nan)
        table = [run.history["step"], kl, *(run.history.get(f"eval/{n}", absent) for n in names)]
        path += [
            Evaluation(int(step), *map(float, rest))
            for step, *rest in zip(*table, strict=True)
            if np.isfinite(rest[0])
        ]
    return path


def _column(run: Run, name: str) -> np.ndarray:
    values = run.history.get(name, np.array([]))
    return values[np.isfinite(values)]


def _last(run: Run, name: str) -> float:
    values = _column(run, name)
    return float(values[-1]) if len(values) else np.nan


def _mean(run: Run, name: str, *, last: int = 0) -> float:
    values = _column(run, name)[-last:]
    return float(values.mean()) if len(values) else np.nan


def _rate(run: Run) -> float:
    """Response tokens per second over all iterations, each counted for as long as it took."""
    rates = run.history.get("tokens_per_second", np.array([]))
    seconds = run.history.get("time/iteration", np.ones(len(rates)))
    known = np.isfinite(rates) & np.isfinite(seconds) & (seconds > 0)
    return float(np.average(rates[known], weights=seconds[known])) if known.any() else np.nan


def _as_number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else np.nan
