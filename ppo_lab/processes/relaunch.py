"""`accelerate launch --num_processes N` on a machine without GPUs, made to mean what it says.

There accelerate starts a single process, whatever N is, unless --multi_gpu is given. That process
then starts the N itself, by torchrun.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

from ppo_lab.processes import launch

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def start_as_many_as_asked() -> None:
    """Nothing, unless accelerate was asked for several processes and started one: then this one
    becomes their launcher, and does not come back.
    """
    if launch.is_launched():
        # DDP's advice on parameters without a gradient, and the like; read when torch is imported.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    count = asked_of_accelerate() if _started_by_accelerate_alone() else 1
    if count > 1:
        _end_with_parent()
        from torch.distributed.run import main

        main(["--standalone", f"--nproc-per-node={count}", "-m", "ppo_lab", *sys.argv[1:]])
        sys.exit(0)


def asked_of_accelerate() -> int:
    """The number of processes in the command line of the parent, which is accelerate's launcher."""
    import psutil  # accelerate's own requirement

    return count_in(psutil.Process(os.getppid()).cmdline())


def count_in(command: Sequence[str]) -> int:
    """The number of processes that a command of accelerate's launcher asks for; 1 without one."""
    for before, word in zip(["", *command], command, strict=False):
        name, equals, value = word.replace("-", "_").partition("=")
        if name == "__num_processes" and equals and value.isdigit():
            return int(value)
        if before.replace("-", "_") == "__num_processes" and word.isdigit():
            return int(word)
    return 1


def _started_by_accelerate_alone() -> bool:
    """Whether accelerate's launcher of single processes started this one; it tells MASTER_ADDR
    where several were asked for.
    """
    told = {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= set(os.environ)
    return told and not {"RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"} & set(os.environ)


def _end_with_parent() -> None:
    """Have the system send SIGTERM when accelerate's launcher ends, which it does not pass on.

    Ctrl-C goes to the launcher alone: the SIGTERM that follows would otherwise be a second signal,
    at which a run stops in the middle of its iteration.
    """
    if sys.platform == "linux":
        os.setpgrp()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
