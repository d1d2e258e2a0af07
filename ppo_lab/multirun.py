"""Sweeps on this machine: what is missing goes on, and what failed is told at the end.

A sweep's folder holds `multirun.yaml` and a numbered folder a run. The same command numbers its
runs alike every time, so that with `resume=true` each run finds its own folder again.
"""

from __future__ import annotations

import atexit
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from ppo_lab.config import Config
from ppo_lab.errors import ConfigError
from ppo_lab.record import brief, write_atomically
from ppo_lab.secrecy import hidden_text

SWEEPS = "outputs/multirun/*/*/multirun.yaml"
SEARCH = ("hydra.sweeper.direction=maximize", "hydra.sweeper.max_failure_rate=1.0")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def resumed_sweep(argv: Sequence[str]) -> list[str]:
    """The command line of a sweep with `resume=true`, in the folder where it was begun before.

    Raises:
        ConfigError: no such sweep was begun here, or this is none.
    """
    if not {"-m", "--multirun"} & set(argv):
        raise ConfigError(
            "resume=true: goes on with a sweep and needs -m; for a run, resume=FOLDER"
        )
    if any(_key(text) == "hydra/sweeper" for text in argv):
        raise ConfigError("resume=true: a search goes on by hydra.sweeper.storage and study_name")
    if any(_key(text) == "hydra.sweep.dir" for text in argv):
        return list(argv)
    for record in sorted(Path().glob(SWEEPS), key=lambda file: file.stat().st_mtime, reverse=True):
        if _settings(_overrides_in(record)) == _settings(argv):
            return [*argv, f"hydra.sweep.dir={record.parent}"]
    raise ConfigError("resume=true: outputs/multirun holds no sweep by this command; leave it out")


def with_search_defaults(argv: Sequence[str]) -> list[str]:
    """The command line of a search by Optuna, which maximises and takes a failed run for a trial.

    The plugin's own defaults minimise, and end the search at the first failure.
    """
    stated = {_key(text) for text in argv}
    if "hydra/sweeper=optuna" not in argv:
        return list(argv)
    return [*argv, *(text for text in SEARCH if _key(text) not in stated)]


def what_is_missing(config: Config, folder: Path) -> Config | float:
    """How a run of a resumed sweep goes on in its folder; the objective of one that is finished."""
    summary = read_summary(folder)
    if summary.get("status") == "finished":
        return float(summary["objective"])
    begun = (folder / "metrics.jsonl").exists()
    return replace(config, resume=str(folder) if begun else "")


class Sweep(Callback):
    """Hydra's hook: at the end of a sweep, how many runs finished, and why the others did not."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Tell at the end, also when Hydra ends by the error of one run."""
        atexit.register(_tell_failures, Path(config.hydra.sweep.dir).absolute())

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Write down why a run failed that came too short a way to do so itself."""
        folder = Path(config.hydra.runtime.output_dir)
        if job_return.status is JobStatus.FAILED and not read_summary(folder):
            error = job_return._return_value  # `return_value` raises it
            reason = hidden_text(f"{type(error).__name__}: {brief(error)}")
            with suppress(OSError):
                text = json.dumps({"status": "failed", "reason": reason}, indent=2)
                write_atomically(folder / "summary.json", text + "\n")


def read_summary(folder: Path) -> dict[str, Any]:
    """A run's summary.json; empty where there is none that can be read."""
    with suppress(OSError, ValueError):
        found = json.loads((folder / "summary.json").read_bytes())
        return found if isinstance(found, dict) else {}
    return {}


def _tell_failures(sweep: Path) -> None:
    runs = sorted(
        (file.parent.parent for file in sweep.glob("*/.hydra/overrides.yaml")), key=_place
    )
    if not runs:
        return
    own = {run: _overrides_in(run / ".hydra" / "overrides.yaml") for run in runs}
    shared = set.intersection(*map(set, own.values())) if len(runs) > 1 else set()
    unfinished = [
        line for run in runs for line in _unfinished(run, [o for o in own[run] if o not in shared])
    ]
    done = (
        f"sweep: {len(runs) - len(unfinished)} of {len(runs)} runs begun are finished, in {sweep}"
    )
    again = ["the same command with resume=true runs what is missing"] if unfinished else []
    print("\n".join([done, *unfinished, *again]), file=sys.stderr, flush=True)


def _place(run: Path) -> tuple[int, str]:
    return (int(run.name) if run.name.isdecimal() else 0, run.name)


def _unfinished(run: Path, settings: Sequence[str]) -> Iterator[str]:
    """A line for a run that did not finish: its folder, what is special about it, and why."""
    summary = read_summary(run)
    status = summary.get("status", "unfinished")
    if status != "finished":
        reason = summary.get("reason", "no word of why")
        yield "  ".join(["", run.name, *settings, f"{status}: {reason}"])


def _overrides_in(file: Path) -> list[str]:
    """The overrides that Hydra wrote down, of a run or of a sweep."""
    with suppress(OSError, yaml.YAMLError, KeyError, TypeError):
        found = yaml.load(file.read_bytes(), Loader=_LOADER)  # noqa: S506 (the safe loader, in C)
        return found if isinstance(found, list) else list(found["hydra"]["overrides"]["task"])
    return []


def _settings(texts: Sequence[str]) -> list[str]:
    """What a command line says of the runs themselves."""
    return sorted(
        text
        for text in texts
        if not text.startswith("-")
        and not _key(text).startswith("hydra")
        and _key(text) != "resume"
    )


def _key(text: str) -> str:
    return text.lstrip("+~").partition("=")[0]
