"""Sweeps: each run in a folder of its own, what is missing goes on, what failed is told at the end.

A sweep's folder holds `multirun.yaml`, `sweep.jsonl` and a numbered folder a run. With
`resume=true` the same command launches the runs alone that have not finished, each in its folder.
"""

from __future__ import annotations

import atexit
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any, BinaryIO

import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write

from ppo_lab import gpus, sweep_index
from ppo_lab.config import Config
from ppo_lab.errors import ConfigError
from ppo_lab.processes.launch import is_main
from ppo_lab.record import to_stderr, write_atomically, write_summary
from ppo_lab.resume import sources
from ppo_lab.run_lock import in_use
from ppo_lab.run_state import (
    RECORD,
    RunState,
    common,
    key_of,
    overrides_in,
    read_summary,
    settings,
    work_in,
)
from ppo_lab.scheduler import join_processes
from ppo_lab.secrecy import reason_of
from ppo_lab.sweep_index import SWEEP_RECORD, states
from ppo_lab.typed import quoted, shell_path, unquoted

SWEEPS = f"outputs/multirun/*/*/{SWEEP_RECORD}"
GRID = f"{BasicSweeper.__module__}.{BasicSweeper.__name__}"
MOST_TOLD = 30  # runs that did not finish; `python -m ppo_lab.runs` lists them all
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_every_run = BasicSweeper.split_arguments

Job = list[str]  # the overrides of one run of a sweep


# ---- The command line of a sweep


def resumed_sweep(argv: Sequence[str]) -> list[str]:
    """The command line of a sweep with `resume=true`, in the folder where it was begun before.

    Raises:
        ConfigError: no such sweep was begun here, or this is none.
    """
    if not {"-m", "--multirun"} & set(argv):
        raise ConfigError(
            "resume=true: goes on with a sweep and needs -m; for a run, resume=FOLDER"
        )
    if any(key_of(text) == "hydra/sweeper" for text in argv):
        raise ConfigError("resume=true: a search goes on by hydra.sweeper.storage and study_name")
    # Hydra would overwrite the records of the runs, by which each knows whether it is the same.
    kept = [*argv, "hydra.output_subdir=null"]
    if any(key_of(text) == "hydra.sweep.dir" for text in argv):
        return kept
    for record in sorted(Path().glob(SWEEPS), key=lambda file: file.stat().st_mtime, reverse=True):
        if settings(overrides_in(record)) == settings(argv) and _is_of(record, argv):
            return [*kept, f"hydra.sweep.dir={quoted(record.parent)}"]
    raise ConfigError("resume=true: outputs/multirun holds no sweep by this command; leave it out")


def _is_of(record: Path, argv: Sequence[str]) -> bool:
    """Whether a sweep's configuration came from where a command line says: --config-name, say."""
    said = (text.partition("=") for text in argv if text.startswith("--config-"))
    asked = {
        f"{flag}={Path(value).absolute() if flag == '--config-dir' else value}"
        for flag, _, value in said
    } - {"--config-name=config"}
    found = yaml.load(record.read_bytes(), Loader=_LOADER)  # noqa: S506 (the safe loader, in C)
    return asked == set(sources(found["hydra"], ()))


def with_search_defaults(argv: Sequence[str], *, direction: str = "maximize") -> list[str]:
    """The command line of a search by Optuna, which takes a failed run for a trial, and goes where
    what the runs return gets better: `direction` is `minimize` where that is a loss.

    The plugin's own defaults minimise, and end the search at the first failure.
    """
    search = (f"hydra.sweeper.direction={direction}", "hydra.sweeper.max_failure_rate=1.0")
    stated = {key_of(text) for text in argv}
    if "hydra/sweeper=optuna" not in argv:
        return list(argv)
    return [*argv, *(text for text in search if key_of(text) not in stated)]


# ---- The runs of a sweep


def launch_missing_only(argv: Sequence[str]) -> None:
    """Have Hydra launch, of the resumed sweep that a command line says, only what is missing.

    Hydra would compose every run of it once more, minutes for a thousand, and hand all of them to
    the launcher: to Slurm, a job each that has nothing to do. Sweepers from outside of Hydra's own
    packages are refused, so that the one function is replaced that lists a sweep's runs.
    """
    stated = {key_of(text): text.partition("=")[2] for text in argv}
    sweep = Path(unquoted(stated["hydra.sweep.dir"]))
    numbered = "hydra.sweep.subdir" not in stated

    def missing(overrides: list[Any], max_batch_size: int | None) -> list[list[Job]]:
        jobs = chain.from_iterable(_every_run(overrides, None))
        left = list(unfinished(list(jobs), states(sweep), numbered=numbered))
        size = max_batch_size or max(1, len(left))
        return [left[i : i + size] for i in range(0, len(left), size)]

    # Hydra runs its plugins' modules anew when it looks for them: the class is not that imported.
    sweeper: Any = Plugins.instance().class_name_to_class[GRID]
    sweeper.split_arguments = staticmethod(missing)


def unfinished(jobs: Sequence[Job], found: Iterable[RunState], *, numbered: bool) -> Iterator[Job]:
    """The runs still to be made, each with the folder where it is to go on, or to begin.

    A run is known by its settings, not by its number: a sweep may have grown in between. One that
    somebody is at work on is left alone, and said.
    """
    begun: dict[tuple[str, ...], list[RunState]] = defaultdict(list)
    for state in found:
        if state.status != "missing":
            begun[settings(state.overrides)].append(state)
    taken = {state.run for alike in begun.values() for state in alike}
    spare = (str(n) for n in count(len(jobs)) if str(n) not in taken)
    for number, job in enumerate(jobs):
        alike = begun[settings(job)]
        if not alike:
            name = next(spare) if str(number) in taken else str(number)
            yield [*job, f"hydra.sweep.subdir={name}"] if numbered else job
            continue
        state = alike.pop(0)
        if state.status == "running":
            to_stderr(f"sweep: run {state.run} is left alone, somebody is at work: {state.reason}")
        elif state.status != "finished":
            yield [*job, f"hydra.sweep.subdir={quoted(Path(state.run))}"]


def what_is_missing(config: Config, folder: Path, overrides: Iterable[str] = ()) -> Config | float:
    """How a run of a resumed sweep goes on in its folder; the objective of one that is finished.

    Of several processes it is the main one that says so, which the others follow.

    Raises:
        ConfigError: another run of the sweep has that folder, by these overrides of this one.
    """
    begun, own = set(overrides_in(folder / RECORD / "overrides.yaml")), set(overrides)
    theirs = settings(begun - own)
    if begun and own and work_in(folder) and (theirs or settings(own - begun)):
        raise ConfigError(
            f"{folder}: holds the run of other settings ({' '.join(theirs) or 'none'}); "
            "hydra.sweep.subdir must name a folder of its own for every run of the sweep"
        )
    summary = read_summary(folder)
    if summary.get("status") == "finished":
        found = summary.get("objective")
        return math.nan if found is None else float(found)
    return replace(config, resume=str(folder) if work_in(folder) and is_main() else "")


def record_hydra(folder: Path) -> None:
    """Write Hydra's own settings down for a run that begins in a resumed sweep, as Hydra would."""
    file = folder / RECORD / "hydra.yaml"
    if is_main() and not file.exists():
        with suppress(OSError):
            write_atomically(file, OmegaConf.to_yaml(HydraConfig.instance().cfg))


def planned(hydra: Mapping[str, Any]) -> list[Job]:
    """The overrides of every run that a sweep by these settings of Hydra's makes; of a search, [].

    A sweep over what a `glob` finds has no plan either: it is known to Hydra alone.
    """
    sweeper = hydra["sweeper"]
    if sweeper["_target_"] != GRID:
        return []
    texts = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    with suppress(Exception):  # the grammar's errors are of many kinds, and Hydra will tell them
        overrides = OverridesParser.create().parse_overrides(texts + hydra["overrides"]["task"])
        return list(chain.from_iterable(_every_run(overrides, None)))
    return []


def plan_again(sweep: Path) -> None:
    """Put the plan of a sweep, as Hydra's record of it says, into an index that has none."""
    with suppress(OSError, yaml.YAMLError, KeyError, TypeError):
        text = (sweep / SWEEP_RECORD).read_bytes()
        if GRID.encode() in text and sweep_index.read(sweep)[1] is None:
            record = yaml.load(text, Loader=_LOADER)  # noqa: S506 (the safe loader, in C)
            sweep_index.plan(sweep, planned(record["hydra"]))


# ---- Hydra's hooks


def by_main_process(name: str) -> str | None:
    """The folder for Hydra's records of a run; none in a process that is not to write them, nor
    where they lie already, of a run that goes on or of another.

    Hydra resolves it in the process that makes the run, before it asks anything of ours.
    """
    join_processes()
    hydra: Any = HydraConfig.instance().cfg
    place = OmegaConf.select(hydra, "hydra.runtime.output_dir") if hydra else None
    return name if is_main() and not (place and work_in(Path(place))) else None


OmegaConf.register_new_resolver("by_main_process", by_main_process, replace=True)


class Sweep(Callback):
    """Hydra's hook: what a sweep is to make, who has which GPU, and what became of each run."""

    def __init__(self) -> None:
        self._turn: BinaryIO | None = None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Write the plan down; tell at the end, also when Hydra ends by the error of one run."""
        sweep = Path(config.hydra.sweep.dir).absolute()
        sweep.mkdir(parents=True, exist_ok=True)
        jobs = planned(OmegaConf.to_container(config.hydra))  # type: ignore[arg-type]
        sweep_index.plan(sweep, jobs)
        with read_write(config.hydra.launcher):
            handed_out = gpus.offer(config.hydra.launcher)
        on = f", a GPU each in turn: {', '.join(handed_out)}" if handed_out else ""
        to_stderr(f"sweep: {_counted(len(jobs))}, in {sweep}{on}")
        atexit.register(_tell_failures, sweep)

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Wait for a GPU, where GPUs are handed out."""
        self._turn = gpus.take_turn(Path(config.hydra.sweep.dir))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Write down why a run failed that came too short a way to do so itself."""
        if self._turn:
            self._turn.close()
        folder = Path(config.hydra.runtime.output_dir)
        failed = job_return.status is JobStatus.FAILED and is_main()
        # Whoever trains there, or whose work lies there, is not the run that was refused.
        if failed and not in_use(folder) and not work_in(folder) and not read_summary(folder):
            error = job_return._return_value  # `return_value` raises it
            with suppress(OSError):
                write_summary(folder, {"status": "failed", "reason": reason_of(error)})
            sweep_index.note(folder)


# ---- The last word of a sweep


def _tell_failures(sweep: Path) -> None:
    found = states(sweep)
    if not found:
        return
    counts = Counter(state.status for state in found)
    begun = [state for state in found if state.status != "missing"]
    done = f"sweep: {counts['finished']} of {_counted(len(found))} finished, in {sweep}"
    rest = [state for state in begun if state.status != "finished"]
    shared = common(begun)
    lines = [_told(state, shared) for state in rest[:MOST_TOLD]]
    more = [f"  and {len(rest) - MOST_TOLD} more"] if len(rest) > MOST_TOLD else []
    missing = [f"  {counts['missing']} not begun"] if counts["missing"] else []
    again = ["the same command with resume=true runs what is missing"]
    listing = [f"python -m ppo_lab.runs {shell_path(sweep)} lists all"]
    left = again + listing if counts["finished"] < len(found) else []
    print("\n".join([done, *lines, *more, *missing, *left]), file=sys.stderr, flush=True)


def _counted(runs: int) -> str:
    return "a search" if not runs else "1 run" if runs == 1 else f"{runs} runs"


def _told(state: RunState, shared: frozenset[str]) -> str:
    """A line for a run that did not finish: its folder, what is special about it, and why."""
    own = [text for text in state.overrides if text not in shared]
    return "  ".join(["", state.run, *own, f"{state.status}: {state.reason or 'no word of why'}"])
