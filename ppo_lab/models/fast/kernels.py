"""The kernels of this project's own that a device takes: Triton's on a GPU, where Triton is."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch


class Kernels(NamedTuple):
    """One function each; see the modules that they come from."""

    attend_newest: Any
    weigh_rows: Any


def kernels_for(device: torch.device) -> Kernels | None:
    """The kernels for tensors on a device; None where torch's own operations are taken."""
    return _kernels() if device.type == "cuda" else None


@functools.cache
def _kernels() -> Kernels | None:
    if find_spec("triton") is None:
        return None
    from ppo_lab.models.fast.one_query import attend_newest
    from ppo_lab.models.fast.weigh_rows import weigh_rows

    return Kernels(attend_newest, weigh_rows)
