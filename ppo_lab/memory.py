"""What fits: passes halved when a GPU is full, a CPU's need known beforehand."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch
from torch import OutOfMemoryError

from ppo_lab.assembly import critic_start
from ppo_lab.config import Config, ModelCritic
from ppo_lab.errors import ConfigError
from ppo_lab.models.loading import choose_dtype, load_config
from ppo_lab.optim import is_8bit
from ppo_lab.plan.architecture import architecture_of, blueprint
from ppo_lab.plan.memory import (
    SHARE_OF_FREE,
    average_bytes,
    moment_bytes,
    standing_bytes,
    trained_whole,
)
from ppo_lab.plan.trace import peak_bytes
from ppo_lab.processes import launch
from ppo_lab.rewards.loading import classifier_bytes

T = TypeVar("T")
GIB = 2**30

# What an allocator keeps beside the tensors of a pass.
HOLES_BESIDE = 1.3

# What glibc is to keep of freed memory, and the smallest block that is given back by itself: the
# largest that it allows. By their numbers in malloc.h.
KEPT_WHEN_FREED, GIVEN_BACK = 64 * 2**20, 32 * 2**20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# Who sets them from outside means it.
SET_BY_OTHERS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


class Passes:
    """How many samples go through the model at once: what is asked for, until memory runs out.

    No number that is learnt from depends on it beyond rounding. It stays as small as it had to get.
    """

    def __init__(self, purpose: str, let_go: Callable[[], bool] = bool) -> None:
        """`purpose` says in the one warning what the passes are for. `let_go` gives back what was
        kept to be faster, and says whether there was any: passes are halved when there is none.
        """
        self.purpose, self.let_go = purpose, let_go
        self.most = 0

    def until_it_fits(
        self,
        attempt: Callable[[int], T],
        wanted: int,
        agree: Callable[[bool], bool] | None = bool,
    ) -> T:
        """`attempt(size)` with at most `wanted` samples a pass, half as many after each failure.

        `agree` tells whether memory ran out on any of several processes; None where they cannot
        try again together, because some would still be waiting inside of the failed attempt.

        Raises:
            OutOfMemoryError: not even a single sample fits, or there is no trying again.
        """
        while True:
            size = min(wanted, self.most or wanted)
            done, freed, result = False, False, None
            try:
                result, done = attempt(size), True
            except OutOfMemoryError:
                freed = self.let_go()
                if agree is None or (size == 1 and not freed):
                    raise
            # Outside of the handler, which would keep the failed attempt's tensors alive.
            if agree is None or not agree(not done):
                return result  # type: ignore[return-value]
            if not agree(freed):
                self._halve(size)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _halve(self, size: int) -> None:
        first, self.most = not self.most, size // 2
        if first:
            warnings.warn(
                f"GPU memory ran out with {size} samples a pass for {self.purpose}: done again "
                f"with {self.most}, or fewer where need be; the numbers stay the same",
                RuntimeWarning,
                stacklevel=3,
            )


def keep_freed_memory() -> bool:
    """Have this process keep the memory of small models' activations from pass to pass; whether it
    does, which it can with glibc alone.

    What is freed goes back to the system otherwise as soon as it is a few MB, and comes again with
    the next tensor, a fault a page.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or any(name in os.environ for name in SET_BY_OTHERS):
        return False
    kept = mallopt(M_TRIM_THRESHOLD, KEPT_WHEN_FREED)
    return bool(kept and mallopt(M_MMAP_THRESHOLD, GIVEN_BACK))


def check_fits(config: Config, device: str, *, processes: int = 1) -> None:
    """Nothing, if what the policy needs on a CPU is free, in each of the processes that share the
    machine; what rollouts need comes on top.

    Raises:
        ConfigError: it is not, with the figures and the ways out.
    """
    if device != "cpu" or config.model.trust_remote_code:
        return
    dtype = choose_dtype(config.model.dtype, torch.device("cpu"))
    model = blueprint(load_config(config.model), config.model, config.lora, dtype=dtype)
    sizes = architecture_of(model)
    need = standing_bytes(sizes, adam=config.ppo.adam)
    if config.ppo.ema_decay:
        need["moving average"] = average_bytes(sizes)
    if isinstance(config.critic, ModelCritic):
        need["critic"] = critic_bytes(config)
    free, total = free_bytes(), processes * sum(need.values())
    if total <= free:
        return
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in need.items())
    parts += f", in each of {processes} processes" if processes > 1 else ""
    ways = ["critic=head"] if "critic" in need else []
    ways += [] if config.lora.r else ["lora=r16"]
    ways += [] if config.model.dtype == "bfloat16" else ["model.dtype=bfloat16"]
    raise ConfigError(
        f"model.path={config.model.path}: needs {total / GIB:.1f} GiB of memory ({parts}) and "
        f"{free / GIB:.1f} GiB are free; "
        f"{', '.join([*ways, 'a smaller model or a GPU'])} would help"
    )


def ways_out(error: OutOfMemoryError) -> str:
    """What to do about a GPU that is too small even for one sample at a time."""
    said = " ".join(str(error).split())[:200]
    if launch.is_launched():
        return (
            f"GPU memory ran out in process {os.environ['RANK']} ({said}); several processes do "
            "not make smaller passes by themselves: ppo.micro_batch_tokens=N bounds those of the "
            "update, generation.batch_size=N those of sampling; a resumed run may change both"
        )
    return (
        f"GPU memory ran out with a single sample a pass ({said}); lora=r16, "
        "ppo.gradient_checkpointing=true, model.load_in_4bit=true, shorter prompts "
        "(data.max_prompt_tokens) or answers (generation.max_new_tokens) would help"
    )


def critic_bytes(config: Config) -> float:
    """Bytes of a critic of its own: its weights, their gradients and Adam's two moments."""
    assert isinstance(config.critic, ModelCritic)
    start = critic_start(config.critic, config.reward)
    if start.trust_remote_code:
        return 0  # nobody knows before its code has run
    dtype = getattr(torch, config.critic.dtype)
    size = classifier_bytes(start.path, revision=start.revision, dtype=dtype, key="critic.path")
    return trained_whole(size // dtype.itemsize, size, adam=config.ppo.adam)


def tokens_that_fit(
    work: Callable[[], object],
    *,
    tokens: int,
    optimizer: torch.optim.Optimizer,
    share: float = 1.0,
) -> int:
    """The most tokens of a forward and backward pass that this process's share of the free memory
    holds, given the forward `work` of so many; never fewer than those.
    """
    held = HOLES_BESIDE * peak_bytes(work) / tokens
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    room = share * free_on(parameters[0].device) - bytes_to_come(optimizer)
    return max(tokens, int(SHARE_OF_FREE * room / held))


def bytes_to_come(optimizer: torch.optim.Optimizer) -> float:
    """Bytes that gradients and Adam's moments will take and do not yet."""
    in_8_bits = is_8bit(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = sum(p.nbytes for p in parameters if p.grad is None)
    fresh = [p for p in parameters if p not in optimizer.state]
    return gradients + sum(moment_bytes(p.numel(), p.nbytes, in_8_bits=in_8_bits) for p in fresh)


def free_on(device: torch.device) -> float:
    """Bytes that tensors of this process may still take on a device."""
    if device.type != "cuda":
        return free_bytes()
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + kept)


def resident_bytes() -> float:
    """Bytes of memory that this process takes now."""
    return _status("VmRSS")


def peak_resident_bytes() -> float:
    """The most bytes of memory that this process has taken, since `forget_peak`.

    Not by getrusage, whose figure a process inherits from the one that started it.
    """
    if found := _status("VmHWM"):
        return found
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(used) * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    """From now on the peak, of this process and of its GPU, is that of what is to come: not of a
    sweep's run before, where the system lets it be forgotten.
    """
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def _status(name: str) -> float:
    """A figure of the Linux kernel about this process, in bytes; 0 elsewhere."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith(name))) * 1024
    return 0.0


def free_bytes() -> float:
    """Bytes that this process may still take: the machine's, or its control group's if less."""
    found = [float("inf")]
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(text for text in lines if text.startswith("MemAvailable:"))
        found.append(float(line.split()[1]) * 1024)
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):
        limit = float((group / "memory.max").read_text())
        used = float((group / "memory.current").read_text())
        found.append(limit - used + _reclaimable(group))
    return min(found)


def _reclaimable(group: Path) -> float:
    """Bytes of a control group that are cached files, which it gives back when asked."""
    rows = (row.split() for row in (group / "memory.stat").read_text().splitlines())
    return float(dict(row for row in rows if len(row) == 2).get("inactive_file", 0))
