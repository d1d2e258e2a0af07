"""One process with whole models: what several processes must agree on, this one simply knows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ppo_lab.processes import launch
from ppo_lab.signals import Preempted
from ppo_lab.types import brought

T = TypeVar("T")

# Whether a step may be taken, given the norms of its gradients.
Judge = Callable[[Tensor], bool | Tensor]


@contextmanager
def joined(*, device: str, timeout: float) -> Iterator[Alone]:
    """This process among those that a launcher started, or alone where none did.

    Processes that end alike, well or with an error that all have, wait a moment for the main one,
    which writes; a process with an error of its own ends at once, and the launcher ends the rest.
    """
    if not launch.is_launched():
        yield Alone()
        return
    from ppo_lab.processes.group import Group, ProcessLost

    group = Group(device=device, timeout=timeout)
    try:
        yield group
    except ProcessLost:
        raise
    except BaseException as error:
        if isinstance(error, Preempted) or launch.is_shared(error):
            group.part()
        raise
    group.part()


class Alone:
    """The only process. `Group` is the same for several.

    Whatever is large is shared out, sample by sample, and whatever is small is gathered: after
    `gather` every process holds the same whole batch and computes the same numbers from it.
    """

    rank, size, here = 0, 1, 1
    device = "auto"

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    @cached_property
    def accelerator(self) -> Any:
        """accelerate's view of this process, for libraries that ask for one."""
        from accelerate import Accelerator

        return Accelerator()

    def share(self, n: int) -> slice:
        """The samples of this process out of `n`: contiguous, at most one more than another's."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def rows(self, n: int) -> list[int]:
        """The numbers of the samples in this process's share of `n`."""
        return list(range(n))[self.share(n)]

    def evened(self, n: int) -> list[int]:
        """The same, and the first sample of all where others have one more: `gather` drops it."""
        own = self.rows(n)
        return own + [0] * (-(-n // self.size) - len(own))

    def gather(self, record: T, n: int) -> T:
        """The record of all `n` samples, on every process, given that of this process's share."""
        return record

    def each(self, numbers: Tensor) -> Tensor:
        """A row of numbers from every process, in their order, on every process."""
        return numbers[None]

    def any(self, flag: bool) -> bool:
        """Whether it is so on any process."""
        return flag

    def all(self, flag: bool) -> bool:
        """Whether it is so on every process."""
        return flag

    def first(self, text: str) -> str:
        """The first text that is not empty, in the order of the processes."""
        return text

    def from_main(self, make: Callable[[], T]) -> T:
        """What the main process makes, on every process; so is the error that it raises."""
        return make()

    @contextmanager
    def together(self) -> Iterator[None]:
        """What raises on one process inside raises on all. Nothing inside may wait for another."""
        yield

    def shard(self, model: nn.Module) -> Callable[..., Any]:
        """Shard a frozen model over the processes; what functions that call it are called by."""
        return lambda function, *args: function(*args)

    def wrap(self, models: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> Whole:
        """The models of a run and the optimizer of what is trained in them, made ready."""
        return Whole(optimizer)


class Whole:
    """Models that each process holds whole and alone: every call is a plain one.

    The others give the same numbers from models that are copied or sharded over processes.
    """

    # Whether no process holds the models whole: a forward pass then waits for the other processes,
    # which must make as many.
    sharded = False

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer moves."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """What the function returns, which may call the models in any way."""
        return function(*args, **kwargs)

    def rows(self, n: int) -> slice | list[int]:
        """The samples that this process passes through the models, its share of `n` first.

        Others may follow, whose results are dropped, so that all processes make as many passes.
        """
        return slice(0, n)

    def sampling(self) -> Any:
        """A context in which many tokens are sampled, one after the other."""
        return nullcontext()

    def all_ended(self, ended: bool) -> bool:
        """Whether sampling may end, given whether it may here."""
        return ended

    def evened(self, passes: list[Tensor]) -> list[Tensor]:
        """As many passes as every process makes; those added have no rows."""
        return passes

    def accumulating(self, *, last: bool) -> Any:
        """A context for one pass of an optimizer step, forward and backward; gradients add up, and
        after the last one they are the sums over all processes.
        """
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this process's part of the loss."""
        loss.backward()

    @property
    def steps_late(self) -> bool:
        """Whether the device may be given an optimizer step before the host knows if it is taken:
        where torch's fused Adam asks the device, and nobody else is told of steps.
        """
        adam = self.optimizer
        if type(self) is not Whole or type(adam) not in (torch.optim.Adam, torch.optim.AdamW):
            return False
        told = adam._optimizer_step_pre_hooks or adam._optimizer_step_post_hooks
        return self.is_behind and not told and all(group["fused"] for group in adam.param_groups)

    @property
    def is_behind(self) -> bool:
        """Whether the device works off what the host tells it, which goes on meanwhile."""
        return self.parameters[0].device.type == "cuda"

    def step(
        self,
        judge: Judge,
        clipped_together: list[list[nn.Parameter]],
        *,
        max_norm: float,
    ) -> None:
        """An optimizer step with clipped gradients, if `judge` lets it pass, given their norms;
        where `steps_late`, its verdict may be a flag on the device.
        """
        limit, device = max_norm or math.inf, self.parameters[0].device
        norms = [torch.nn.utils.clip_grad_norm_(part, limit) for part in clipped_together]
        # That of no gradients at all is on the host.
        verdict = judge(torch.stack([brought(self.full(norm), device) for norm in norms]))
        if isinstance(verdict, Tensor):
            self._step_where(verdict)
        elif verdict:
            self.optimizer.step()

    def _step_where(self, verdict: Tensor) -> None:
        """The step, which the device leaves out where the flag is False: as torch's GradScaler
        tells a fused optimizer.
        """
        adam: Any = self.optimizer
        adam.found_inf = torch.logical_not(verdict, out=verdict.new_empty((), dtype=torch.float))
        try:
            adam.step()
        finally:
            del adam.found_inf

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def full(self, tensor: Tensor) -> Tensor:
        """A tensor that may be sharded, in full."""
        return tensor

    def state_of(self, model: nn.Module) -> dict[str, Tensor] | None:
        """A model's state in full; None where it is so by itself."""
        return None

    def whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameters and buffers in full, given them as they are here."""
        return tensors

    def put(self, parameter: Tensor, whole: Tensor) -> None:
        """Set a parameter, or the part of it that is here, to a tensor given in full."""
        parameter.copy_(whole)

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state as a process with whole models has it."""
        return self.optimizer.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Continue from `optimizer_state`, whoever wrote it."""
        self.optimizer.load_state_dict(state)
