"""Kernels that are brought up while the one before still works, on GPUs that can do it.

A kernel of a few microseconds begins about one after the last has ended, and waits for memory at
first. Launched as a dependent one, its programs take the places that are free as soon as all of the
one before have begun, and wait for the numbers of others with `begin`. Every program waits there,
so that what has ended before the one before has ended too. Before, nothing is written, and nothing
read that a kernel of this kind writes since the last one of another: kernels of others neither let
go early nor are launched early, so that all before them has ended.

Source: NVIDIA, CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl


@functools.cache
def launched_early(device: torch.device) -> dict[str, bool]:
    """What a kernel that calls `begin` is launched with besides its own arguments."""
    able = (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (9, 0)
        and hasattr(getattr(tl.extra, "cuda", None), "gdc_wait")
    )
    return {"early": True, "launch_pdl": True} if able else {"early": False}


@triton.jit
def begin(early: tl.constexpr):
    """Let the next kernel come up, and wait until all before have ended."""
    if early:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
