"""Several processes as one run: who has which samples, what all must know, who has failed."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from ppo_lab.errors import ConfigError
from ppo_lab.processes import launch
from ppo_lab.processes.alone import Alone, Whole
from ppo_lab.processes.launch import shared

T = TypeVar("T")

# Seconds that processes which end together wait for the one that still writes.
PARTING = 60.0
# What gloo's and NCCL's errors say when a peer is gone or late; gloo's have no type of their own.
SIGNS = ("gloo", "NCCL", "Connection closed", "Connection reset", "Timed out", "timed out")


class ProcessLost(ConfigError):
    """Another process is gone, or has not answered in time; one of those left says so."""

    shared = True


class Group(Alone):
    """The processes that a launcher started, joined by NCCL on GPUs and by gloo on CPUs.

    What is agreed on goes over gloo in either case. Every wait ends after `timeout` seconds with
    `ProcessLost`; the launcher ends all processes when one has ended.
    """

    def __init__(self, *, device: str, timeout: float) -> None:
        self.timeout = timedelta(seconds=timeout)
        cpu = device == "cpu" or not torch.cuda.is_available()
        self.accelerator = _accelerator(cpu=cpu, timeout=self.timeout)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.here = launch.processes_here()
        self.device = str(self.accelerator.device)
        self._talk = dist.new_group(backend="gloo", timeout=self.timeout)
        if not self.is_main:
            _be_silent()

    def gather(self, record: Any, n: int) -> Any:
        """The record of all `n` samples, on every process, given that of this process's share."""
        share = self.share(n)
        own = record[: share.stop - share.start]
        parts = [part for part in self._exchange(own.to("cpu")) if len(part)]
        device = _device(record)
        if isinstance(record, Tensor):
            return torch.cat(parts).to(device)
        return type(record).join(parts).to(device)

    def each(self, numbers: Tensor) -> Tensor:
        """A row of numbers from every process, in their order, on every process."""
        own = numbers.detach().cpu()
        rows = [torch.empty_like(own) for _ in range(self.size)]
        with self.answering():
            dist.all_gather(rows, own, group=self._talk)
        return torch.stack(rows)

    def any(self, flag: bool) -> bool:
        """Whether it is so on any process."""
        return bool(self.each(torch.tensor([flag], dtype=torch.uint8)).any())

    def all(self, flag: bool) -> bool:
        """Whether it is so on every process."""
        return bool(self.each(torch.tensor([flag], dtype=torch.uint8)).all())

    def first(self, text: str) -> str:
        """The first text that is not empty, in the order of the processes."""
        return next((said for said in self._exchange(text) if said), "")

    def from_main(self, make: Callable[[], T]) -> T:
        """What the main process makes, on every process; so is the error that it raises."""
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = make()
            except Exception as error:
                box[1] = error
        sent = [box[0], None if box[1] is None else _portable(box[1])]
        try:
            with self.answering("" if self.is_main else "the main process"):
                dist.broadcast_object_list(sent, src=0, group=self._talk)
        except ProcessLost as lost:
            lost.shared = self.rank != 1  # who speaks for all is the one that is lost
            raise
        if sent[1] is not None:
            raise shared(box[1] or sent[1])
        return box[0] if self.is_main else sent[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What raises on one process inside raises on all. Nothing inside may wait for another."""
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        found = self._exchange(None if own is None else _portable(own))
        first = next((error for error in found if error is not None), None)
        if first is not None:
            raise shared(own or first) from None

    def shard(self, model: nn.Module) -> Callable[..., Any]:
        """Shard a frozen model over the processes; what functions that call it are called by."""
        from ppo_lab.processes.wrapped import shard

        return shard(model)

    def wrap(self, models: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> Whole:
        """The models of a run and the optimizer of what is trained in them, made ready."""
        from ppo_lab.processes.wrapped import wrap

        with self.answering():
            return wrap(self, nn.ModuleDict(models), optimizer)

    @contextmanager
    def answering(self, whom: str = "") -> Iterator[None]:
        """What communication raises inside, said in words; `whom` is waited for, or any other.

        Raises:
            ProcessLost: another process is gone, or late by more than the time limit.
        """
        try:
            yield
        except (RuntimeError, ConnectionError) as error:
            if not _is_of_communication(error):
                raise
            said = " ".join(str(error).split())[:200]
            raise ProcessLost(
                f"{whom or f'another of the {self.size} processes'} has ended, or has not answered "
                f"for processes.timeout={self.timeout.total_seconds():g} seconds ({said}); the "
                "launcher's message says which"
            ) from error

    def part(self) -> None:
        """Let the main process finish what it writes, for a while, before this one ends."""
        limit = timedelta(seconds=PARTING)
        try:
            dist.monitored_barrier(group=self._talk, timeout=limit)
        except RuntimeError:  # it takes longer, or is gone
            return
        dist.destroy_process_group()

    def _exchange(self, own: T) -> list[T]:
        """An object from every process, in their order."""
        objects: list[Any] = [None] * self.size
        with self.answering():
            dist.all_gather_object(objects, own, group=self._talk)
        return objects


def _be_silent() -> None:
    """What libraries have to say, the main process says."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def _portable(error: Exception) -> Exception:
    """An error that can be sent to another process, with the same words."""
    if isinstance(error, ConfigError):
        return type(error)(error.problems)
    return RuntimeError(f"{type(error).__name__}: {error}")


def _device(record: Any) -> torch.device:
    while not isinstance(record, Tensor):
        record = getattr(record, next(iter(record.__dataclass_fields__)))
    return record.device


def _is_of_communication(error: Exception) -> bool:
    return isinstance(error, dist.DistError | ConnectionError) or any(
        sign in str(error) for sign in SIGNS
    )


def _accelerator(*, cpu: bool, timeout: timedelta) -> Accelerator:
    """accelerate's entry to the process group, whose weights stay in the precision they have."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Some passes may leave parameters without a gradient, such as a head that nothing reads.
    copies = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    time_limit = InitProcessGroupKwargs(timeout=timeout)
    return Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[copies, time_limit])
