"""What a run came to: the contents of summary.json, and the number that a sweep maximises."""

from __future__ import annotations

import subprocess
import time
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

from ppo_lab.errors import ConfigError
from ppo_lab.models.loading import resolved_revision

VERSIONED = ("ppo_lab", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "wandb")


def summarise(lab: Any) -> dict[str, Any]:
    """What summary.json holds; of a run that failed, as far as it came.

    The evaluation before training is never its outcome, where it ended before there was another.
    """
    first, later = lab.evaluations[:1], lab.evaluations[1:]
    tail = lab.history[-max(1, len(lab.history) // 10) :]
    summary: dict[str, Any] = {
        "status": "finished",
        "steps": lab.trainer.iterations_done,
        "eval": {
            name: evaluation.metrics
            for name, evaluation in zip(("first", "last"), first + later[-1:], strict=False)
        },
        "held_out_prompts": len(lab.evaluator.prompts),
        "train": {},
        "objective": None,
        "wall_s": time.monotonic() - lab.started,
        "peak_memory_gb": lab.trainer.clock.peak_memory_gb(),
        "layers": lab.trainer.policy.trunk.road,
        "seed": lab.config.seed,
        "versions": versions(),
        "git_commit": git_commit(),
        "revisions": {"model": resolved_revision(lab.config.model)},
    }
    if tail:
        summary["train"] = {
            "kl": fmean(m["kl"] for m in tail),
            "mean_reward": fmean(m["mean_reward"] for m in tail),
            "clip_fraction": fmean(m["clip_fraction"] for m in lab.history),
            "explained_variance": fmean(m["ppo/val/explained_variance"] for m in tail),
            "skipped_updates": sum(m["ppo/skipped_updates"] for m in lab.history),
            "skipped_iterations": sum(m["ppo/skipped_updates"] > 0 for m in lab.history),
        }
        # Tokens of all iterations over the time of all: slow ones count for as long as they took.
        summary["tokens_per_second"] = fmean(
            [m["tokens_per_second"] for m in lab.history],
            [m["time/iteration"] for m in lab.history],
        )
        summary["objective"] = objective(lab) if later else None
    return summary


def objective(lab: Any) -> float:
    """The number that a sweep maximises, out of the last evaluation.

    Raises:
        ConfigError: there is no such number in this run.
    """
    return _evaluated(lab, "objective", lab.config.objective)


def check_metrics(lab: Any) -> None:
    """Nothing, where the last evaluation has the metrics that the configuration names: of a
    reward's parts only an evaluation tells the names.

    Raises:
        ConfigError: otherwise.
    """
    objective(lab)
    if best := lab.config.checkpoint.best_metric:
        _evaluated(lab, "checkpoint.best_metric", best)


def _evaluated(lab: Any, key: str, metric: str) -> float:
    found = lab.evaluations[-1].metrics
    name = metric.removeprefix("eval/")
    if name not in found:
        raise ConfigError(
            f"{key}={metric}: this run has no such metric; it has "
            + ", ".join(f"eval/{name}" for name in sorted(found))
        )
    return found[name]


def versions() -> dict[str, str]:
    """The versions of what the numbers rest on."""
    found = {}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str:
    """The commit of this package's checkout, with `+` where files were changed; empty where it is
    installed, also into an environment that lies in somebody's own checkout.
    """
    here = Path(__file__).resolve().parent
    try:
        _git(here, "ls-files", "--error-unmatch", Path(__file__).name)
        commit = _git(here, "rev-parse", "HEAD")
        return commit + ("+" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)  # noqa: S603
    return done.stdout.strip()
