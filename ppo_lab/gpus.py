"""GPUs handed out to runs side by side on one machine: each has one to itself, in turn.

Joblib's workers, and the jobs that submitit starts on this machine, would otherwise all take the
first GPU (or, submitit, none). Which GPU is free is told by locks, which go with their processes.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, BinaryIO

POOL = "PPO_LAB_GPUS"  # the environment's word from a sweep's process to its runs
VISIBLE = "CUDA_VISIBLE_DEVICES"
SHARING = ("hydra_joblib_launcher.", "submitit_launcher.LocalLauncher")  # one machine, one GPU
ONE = (None, 0, 1)

_own = -1  # this process's place in the pool, once it had one: CUDA cannot move to another GPU


def visible() -> list[str]:
    """The GPUs that this process may use: as CUDA_VISIBLE_DEVICES names them, else by number."""
    stated = os.environ.get(VISIBLE)
    if stated is None:
        import torch

        return list(map(str, range(torch.cuda.device_count())))
    names = [name.strip() for name in stated.split(",")]
    end = next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))
    return names[:end]  # as CUDA reads it: nothing counts after a wrong name


def offer(launcher: MutableMapping[str, Any]) -> list[str]:
    """The GPUs that the runs of this launcher take turns on, made known to them; [] if it is none
    of ours to hand out.

    Of joblib's workers there are at most as many as GPUs.
    """
    target = str(launcher.get("_target_"))
    alone = launcher.get("gpus_per_node") in ONE and launcher.get("tasks_per_node", 1) == 1
    if not alone or not any(name in target for name in SHARING):
        return []
    pool = visible()
    if pool:
        os.environ[POOL] = ",".join(pool)
    if pool and "n_jobs" in launcher:
        asked = launcher["n_jobs"]
        launcher["n_jobs"] = min(asked, len(pool)) if asked > 0 else len(pool)
    return pool


def take_turn(sweep: Path) -> BinaryIO | None:
    """A GPU for this process alone, as soon as one is free; it is given back by closing the file.

    None where no GPUs are handed out.
    """
    global _own
    pool = [name for name in os.environ.get(POOL, "").split(",") if name]
    folder = _locks(sweep)
    while pool:
        for place in range(len(pool)) if _own < 0 else [_own]:
            file = (folder / str(place)).open("wb")
            if _free(file):
                _own = place
                os.environ[VISIBLE] = pool[place]
                return file
            file.close()
        time.sleep(0.2)
    return None


def _locks(sweep: Path) -> Path:
    """A folder of this machine's, whatever disk the sweep's folder lies on."""
    name = hashlib.sha256(os.fsencode(sweep.absolute())).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"ppo_lab-{os.getuid()}" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _free(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
