"""A folder that is one run's, or one sweep's, alone: Hydra's hooks before anything is in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from ppo_lab.errors import ConfigError, refuse
from ppo_lab.processes.launch import is_main
from ppo_lab.resume import MISSING_ONLY, check_new
from ppo_lab.run_lock import in_use, occupied, take_early
from ppo_lab.run_state import subfolders, work_in
from ppo_lab.scheduler import is_requeued
from ppo_lab.typed import quoted

MOST_NAMED = 30  # runs of a sweep that is in the way


class OwnFolder(Callback):
    """Hydra's hook: a folder named by the clock is this run's, or this sweep's, and nobody else's.

    A folder that was chosen is taken as it is, and so is that which an agent of W&B's names.
    """

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Claim the folder of a run."""
        if _is_by_clock(config.hydra.run) and is_main():
            _put(config.hydra.run, "dir", str(claimed(Path(config.hydra.run.dir))))

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Claim the folder of a sweep, whose path is absolute from here on: its runs may be made by
        processes that were started elsewhere.
        """
        folder = Path(config.hydra.sweep.dir)
        place = (claimed(folder) if _is_by_clock(config.hydra.sweep) else folder).absolute()
        _put(config.hydra.sweep, "dir", str(place))
        # Hydra composes every run anew, from the overrides alone.
        with read_write(config), open_dict(config):
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir={quoted(place)}")


class OneRun(Callback):
    """Hydra's hook: a folder is locked, and holds no other run, before Hydra writes down in it what
    the run is to be.
    """

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Lock the folder of a run, or refuse the run; the lock goes with the process."""
        folder = Path(config.hydra.run.dir).absolute()
        if is_main():
            with refusing():
                begin_in(folder, new=not (config.resume or is_requeued(folder)))

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Refuse a new sweep whose numbered folders are another's, as a whole."""
        if config.resume in MISSING_ONLY or not _is_numbered(config.hydra.sweep):
            return
        sweep = Path(config.hydra.sweep.dir).absolute()
        with refusing():
            check_new_sweep(sweep)


def claimed(folder: Path) -> Path:
    """The folder, newly made; where one is there already, the first free of name-2, name-3, ...

    Whoever makes a folder has it: of two processes, on whatever machines that share the disk, the
    file system lets one only make it. A name made of the time alone cannot tell them apart.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        candidate = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            candidate.mkdir()
        except FileExistsError:
            continue
        return candidate
    raise AssertionError("there is always a next number")


@contextmanager
def refusing() -> Iterator[None]:
    """A ConfigError ends the process, where Hydra would make a warning of it and go on."""
    try:
        yield
    except ConfigError as error:
        refuse(error)


def check_new_sweep(sweep: Path) -> None:
    """Nothing, where a new sweep may begin in this folder.

    Raises:
        ConfigError: it holds runs, or somebody is at work on one.
    """
    numbered = [folder for folder in subfolders(sweep) if folder.name.isdecimal()]
    found = [folder.name for folder in numbered if work_in(folder) or in_use(folder)]
    if found:
        raise ConfigError(
            f"{sweep}: holds runs of a sweep already ({', '.join(found[:MOST_NAMED])}); its own "
            "command with resume=true launches what is missing, another hydra.sweep.dir=FOLDER "
            "takes a new one"
        )


def begin_in(folder: Path, *, new: bool) -> None:
    """Lock the folder in which a run is to begin, a new one or one that goes on.

    Raises:
        ConfigError: another process trains there, or it holds another run.
    """
    if in_use(folder):
        raise occupied(folder)
    if new:
        check_new(folder)
    with suppress(OSError):  # Hydra will say it
        folder.mkdir(parents=True, exist_ok=True)
    take_early(folder)


def _is_by_clock(node: DictConfig) -> bool:
    """Whether a folder's name is made of the time alone."""
    text = str(OmegaConf.to_container(node, resolve=False)["dir"])  # type: ignore[call-overload,index]
    named = "WANDB_RUN_ID" in text and os.environ.get("WANDB_RUN_ID")
    return "${now:" in text and not named


def _is_numbered(sweep: DictConfig) -> bool:
    """Whether the folders of a sweep's runs are named by their numbers alone."""
    text = OmegaConf.to_container(sweep, resolve=False)["subdir"]  # type: ignore[call-overload,index]
    return text == "${hydra.job.num}"


def _put(node: DictConfig, key: str, value: str) -> None:
    with read_write(node):
        node[key] = value
