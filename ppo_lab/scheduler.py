"""A run as a scheduler's job: its processes know of each other, and it goes on when requeued, or
when W&B hands it out again.

Slurm starts every process of a job itself (`srun`), so that each gets the scheduler's signals at
first hand and none stands between; what torchrun would tell them, submitit reads off Slurm.
"""

from __future__ import annotations

import os
from pathlib import Path

from ppo_lab.run_lock import SLURM, job, owner
from ppo_lab.run_state import wandb_run_id


def join_processes() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, ... where submitit's job has several tasks.

    Every process sees all GPUs of its node, as under torchrun; LOCAL_RANK says which one is its.
    """
    if not os.environ.get("SUBMITIT_EXECUTOR") or "RANK" in os.environ:
        return
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    if JobEnvironment().num_tasks > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as under torchrun
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)


def is_requeued(folder: Path) -> bool:
    """Whether the run in this folder was begun by the very job that this process runs in, or is
    the very run that W&B told its agent to start.

    A job keeps its number when it is requeued: by submitit after a signal, or by Slurm itself after
    a node failed. Slurm counts; otherwise, of a job's processes that begin one after the other,
    the later ones would find their own number in the folder. W&B queues a run that was preempted,
    and gives it to an agent once more by its id.
    """
    if _is_an_agents(folder):
        return True
    number = job()
    first_time = os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
    if not number or (number.startswith(SLURM) and first_time):
        return False
    return owner(folder).get("job") == number


def _is_an_agents(folder: Path) -> bool:
    """Whether the folder is that of the run that W&B told its agent to start, begun or not."""
    run = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else ""
    return bool(run) and run in (folder.name, wandb_run_id(folder))
