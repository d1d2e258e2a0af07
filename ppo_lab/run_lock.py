"""Whose a run's folder is: one process at a time, by a lock that goes with the process.

The lock's file says who took it last. On the same machine the lock itself then tells whether that
process is still there; what another machine holds, a shared disk may or may not pass on.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from ppo_lab.errors import ConfigError
from ppo_lab.processes.launch import is_main

LOCK = ".lock"
SLURM = "slurm"  # before the number of a job of its
PATIENCE = 1.0  # seconds; whoever only asks holds the lock for an instant
_taken_early: dict[Path, BinaryIO] = {}  # by folder; until a run goes on with the lock


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Nobody else trains in this folder meanwhile; the lock goes with the process, however it ends.

    Raises:
        ConfigError: somebody does.
    """
    take_early(folder)
    with _taken_early.pop(folder.resolve(), nullcontext()):
        yield


def take_early(folder: Path) -> None:
    """Lock a folder in which a run is about to begin, whose `alone_in` then goes on with the lock.

    Raises:
        ConfigError: another process trains there.
    """
    if folder.resolve() in _taken_early:
        return
    try:
        file = (folder / LOCK).open("a+b")  # emptied when the lock is held, not before
    except OSError:  # a folder that cannot be written is complained of elsewhere
        return
    if not _taken(file):
        file.close()
        raise occupied(folder)
    with suppress(OSError):
        file.truncate(0)
        file.write(json.dumps(owner_now()).encode() + b"\n")
        file.flush()
    _taken_early[folder.resolve()] = file


@contextmanager
def early_lock(folder: Path) -> Iterator[None]:
    """The folder is locked while a run is being prepared, which is refused where it cannot be."""
    if is_main():
        with suppress(ConfigError):
            take_early(folder)
    try:
        yield
    finally:
        if file := _taken_early.pop(folder.resolve(), None):
            file.close()


def occupied(folder: Path) -> ConfigError:
    """What is said to whoever wants a folder in which somebody trains."""
    return ConfigError(f"{folder}: another process is training in this folder")


def in_use(folder: Path) -> bool | None:
    """Whether a process trains in this folder; None where that cannot be told from here."""
    try:
        file = (folder / LOCK).open("rb")
    except OSError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return None
    return False if owner(folder).get("machine") == machine() else None


def owner(folder: Path) -> dict[str, Any]:
    """Who trained in this folder last, as `owner_now` put it; empty where nobody said."""
    with suppress(OSError, ValueError):
        found = json.loads((folder / LOCK).read_bytes())
        return found if isinstance(found, dict) else {}
    return {}


def owner_now() -> dict[str, Any]:
    """What a process leaves in the lock's file: machine, host, process and the scheduler's job."""
    return {"machine": machine(), "host": socket.gethostname(), "pid": os.getpid(), "job": job()}


@cache
def machine() -> str:
    """What tells this machine, since it was last started, from every other.

    Host names will not do: machines are copied with them, and containers on one machine, which
    share its locks, have names of their own.
    """
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def job() -> str:
    """The scheduler's job that this process runs in, the same after it was requeued; else empty."""
    get = os.environ.get
    if get("SUBMITIT_EXECUTOR") == "local":
        return f"{machine()} {get('SUBMITIT_LOCAL_JOB_ID')}"
    if get("SLURM_ARRAY_JOB_ID"):
        return f"{SLURM} {get('SLURM_ARRAY_JOB_ID')}_{get('SLURM_ARRAY_TASK_ID')}"
    return f"{SLURM} {get('SLURM_JOB_ID')}" if get("SLURM_JOB_ID") else ""


def _taken(file: BinaryIO) -> bool:
    """Whether the lock could be had, or there are none on this file system."""
    begun = time.monotonic()
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() - begun > PATIENCE:
                return False
            time.sleep(0.02)
        except OSError:
            return True
        else:
            return True
