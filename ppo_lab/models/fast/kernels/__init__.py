"""The kernels of this project's own that a device takes: Triton's on a GPU, where Triton is.

Before any is relied on, a trunk proves them with its own shapes; where they fail, as on a GPU that
Triton has no compiler for, they are left out, and torch's own operations do the same.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

log = logging.getLogger(__name__)

_left_out: list[str] = []


class Kernels(NamedTuple):
    """One function each; see the modules that they come from."""

    activate_halves: Any
    activate_rows: Any
    adapted_start: Any
    adapter_slopes: Any
    add_norm: Any
    attend_newest: Any
    attend_texts: Any
    few_rows: Any
    draw_rows: Any
    sweep_rows: Any


def kernels_for(device: torch.device) -> Kernels | None:
    """The kernels for tensors on a device; None where torch's own operations are taken."""
    return _kernels() if device.type == "cuda" and not _left_out else None


@contextmanager
def without_kernels() -> Iterator[None]:
    """A context in which torch's own operations are taken."""
    _left_out.append("for the while")
    try:
        yield
    finally:
        _left_out.pop()


def leave_out(why: str) -> None:
    """Take torch's own operations from now on, in this process."""
    log.warning("this project's kernels are left out: with them, layers %s", why)
    _left_out.append(why)


@functools.cache
def fast_memory(device: torch.device) -> int:
    """Bytes that a program's loads may lie in."""
    if device.type != "cuda":  # in Triton's interpreter
        return 2**17
    found = torch.cuda.get_device_properties(device)
    return int(getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block))


@functools.cache
def _kernels() -> Kernels | None:
    if find_spec("triton") is None:
        return None
    from ppo_lab.models.fast.kernels.activate import activate_halves, activate_rows
    from ppo_lab.models.fast.kernels.adapter import adapted_start, adapter_slopes
    from ppo_lab.models.fast.kernels.add_norm import add_norm
    from ppo_lab.models.fast.kernels.draw_rows import draw_rows
    from ppo_lab.models.fast.kernels.few_rows import few_rows
    from ppo_lab.models.fast.kernels.one_query import attend_newest
    from ppo_lab.models.fast.kernels.sweep_rows import sweep_rows
    from ppo_lab.models.fast.kernels.whole_texts import attend_texts

    functions = (
        activate_halves,
        activate_rows,
        adapted_start,
        adapter_slopes,
        add_norm,
        attend_newest,
        attend_texts,
        few_rows,
        draw_rows,
        sweep_rows,
    )
    return Kernels(*(_there(function) for function in functions))


def _there(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on the device of its first argument, where Triton would launch on the current
    one.
    """

    @functools.wraps(function)
    def on_device(x: torch.Tensor, *args: Any) -> Any:
        with torch.cuda.device_of(x):
            return function(x, *args)

    return on_device
