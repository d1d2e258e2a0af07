"""Whether a device is one, and is here: nothing imports torch where no GPU has a driver."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

from ppo_lab.errors import suggestion
from ppo_lab.processes import launch

DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


def device_problem(key: str, device: str) -> Iterator[str]:
    """What is wrong with one device."""
    if launch.is_launched() and key == "device" and device.startswith("cuda:"):
        yield f"{key}={device}: each of several processes has a GPU of its own; must be auto or cpu"
    elif device == "sharded" and key != "device":
        if not launch.is_launched():
            yield f"{key}=sharded: this is one process; launch several, or leave it auto"
    elif not DEVICE.fullmatch(device):
        near = suggestion(device, ("auto", "cpu", "cuda"))
        yield f"{key}={device}: must be auto, cpu, cuda or cuda:N{near}"
    elif device.startswith("cuda"):
        count, number = cuda_devices(), int(device[5:] or 0)
        if number >= count:
            here = f"the GPUs here are 0 to {count - 1}" if count else "there is no CUDA GPU here"
            yield f"{key}={device}: {here}; device=auto takes what there is"


def cuda_devices() -> int:
    """The number of CUDA GPUs here. Slow where there is a driver: imports torch."""
    if not has_driver():
        return 0
    import torch

    return torch.cuda.device_count()


def has_driver() -> bool:
    """Whether a driver of NVIDIA's, or of AMD's, is here: without one torch finds no GPU."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Path("/dev/kfd").exists()
    return True
