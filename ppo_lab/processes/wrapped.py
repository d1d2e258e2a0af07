"""Models copied to every process (DDP), or sharded over them (FSDP2, DeepSpeed ZeRO)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ppo_lab.errors import ConfigError
from ppo_lab.processes import launch
from ppo_lab.processes.alone import Whole

if TYPE_CHECKING:
    from ppo_lab.processes.group import Group

T = TypeVar("T")


class Caller(nn.Module):
    """All models of a run as one module, whose forward is any function that calls them.

    Wrappers act before and after a module's forward. PPO calls decoder, head and value head by
    themselves, and so calls them through this, inside of which a wrapper has done its part.
    """

    def __init__(self, models: nn.ModuleDict) -> None:
        super().__init__()
        self.models = models
        # The blocks by whose class accelerate shards a model; transformers' models name theirs.
        named = [getattr(module, "_no_split_modules", None) for module in models.modules()]
        self._no_split_modules = sorted({name for names in named for name in names or ()})

    def forward(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """What the function returns."""
        return function(*args, **kwargs)


def wrap(group: Group, models: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> Whole:
    """The models as accelerate's configuration wants them: copied by default.

    Raises:
        ConfigError: a kind of sharding that is not supported.
    """
    if launch.sharding() == "deepspeed":
        from ppo_lab.processes.zero import Partitioned

        return Partitioned(group, Caller(models), optimizer)
    kind = Sharded if launch.sharding() == "fsdp" else Replicated
    return kind(group, Caller(models), optimizer)


def shard(model: nn.Module) -> Caller:
    """A frozen model sharded by torch's FSDP2, whatever the policy is: block by block."""
    caller = Caller(nn.ModuleDict({"model": model}))
    for module in list(model.modules()):
        if type(module).__name__ in caller._no_split_modules:
            fully_shard(module)
    fully_shard(caller)
    return caller


def each_once(make: Callable[[Tensor], Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `make` makes of the tensors; tied weights, which have several names, stay one."""
    made: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in made:
            made[id(tensor)] = make(tensor)
    return {name: made[id(tensor)] for name, tensor in tensors.items()}


class Replicated(Whole):
    """Models that every process holds whole; their gradients are summed by DDP."""

    def __init__(self, group: Group, caller: Caller, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer)
        self.group, self.caller = group, caller
        self.wrapped: Any = self._wrapped(caller)

    def _wrapped(self, caller: Caller) -> nn.Module:
        return self.group.accelerator.prepare_model(caller)

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """What the function returns, called inside of the wrapper where gradients are wanted."""
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with self.group.answering():
            return self.wrapped(function, *args, **kwargs)

    def rows(self, n: int) -> slice | list[int]:
        """This process's share of `n` samples; the first of all where that is empty."""
        share = self.group.share(n)
        return share if share.stop > share.start else slice(0, 1)

    def evened(self, passes: list[Tensor]) -> list[Tensor]:
        """The passes, or one without rows where there is none: DDP waits for every process."""
        return passes or [torch.empty(0, dtype=torch.long)]

    def accumulating(self, *, last: bool) -> Any:
        """A context for one pass: gradients go to the other processes after the last one."""
        return nullcontext() if last else self.group.accelerator.no_sync(self.wrapped)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this process's part of the loss; DDP takes means, not sums."""
        with self.group.answering():
            (loss * self.group.size).backward()


class Sharded(Replicated):
    """Models whose blocks are sharded over the processes by FSDP2, and gathered where they run.

    Every forward pass waits for the others, so that all make as many, whatever their share.
    """

    sharded = True

    def _wrapped(self, caller: Caller) -> nn.Module:
        accelerator = _as_fsdp(self.group.accelerator)
        wrapped, optimizer = accelerator.prepare(caller, self.optimizer)
        self.optimizer = optimizer.optimizer
        return wrapped

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """What the function returns, called inside of the wrapper."""
        with self.group.answering():
            try:
                return self.wrapped(function, *args, **kwargs)
            finally:
                if not torch.is_grad_enabled():
                    self.wrapped.reshard()  # FSDP2 keeps the root whole for a backward pass

    def rows(self, n: int) -> slice | list[int]:
        """This process's share of `n` samples, and the first of all where others have one more."""
        return self.group.evened(n)

    def all_ended(self, ended: bool) -> bool:
        """Whether sampling may end: where every process has ended, as a step waits for all."""
        return self.group.all(ended) if self.sharded else ended

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """A context in which blocks stay gathered from the first token to the last."""
        self.wrapped.set_reshard_after_forward(False)
        try:
            yield
        finally:
            self.wrapped.set_reshard_after_forward(True)
            self.wrapped.set_reshard_after_forward(False, recurse=False)
            for module in self.wrapped.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def evened(self, passes: list[Tensor]) -> list[Tensor]:
        """As many passes as the process with the most makes; those added have no rows."""
        most = int(self.group.each(torch.tensor([len(passes)])).max())
        return passes + [torch.empty(0, dtype=torch.long)] * (most - len(passes))

    def full(self, tensor: Tensor) -> Tensor:
        """A tensor that may be sharded, in full."""
        with self.group.answering():
            return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def state_of(self, model: nn.Module) -> dict[str, Tensor] | None:
        """A model's state in full, on the main process; None where it is so by itself."""
        return self.whole(model.state_dict(keep_vars=True)) if self.sharded else None

    def whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameters and buffers in full, on the main process; the others only help."""
        self.wrapped.reshard()
        return each_once(self._kept, tensors)

    def put(self, parameter: Tensor, whole: Tensor) -> None:
        """Set the part of a parameter that is here to its part of a tensor given in full."""
        parameter.copy_(_like(parameter, whole))

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state with its tensors in full, on the main process."""
        state = self.optimizer.state_dict()
        full = {
            number: {name: self._kept(value) for name, value in of_one.items()}
            for number, of_one in state["state"].items()
        }
        return {**state, "state": full}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Continue from a state whose tensors are in full."""
        of_each = {
            number: {name: _like(self.parameters[number], value) for name, value in one.items()}
            for number, one in state["state"].items()
        }
        self.optimizer.load_state_dict({**state, "state": of_each})

    def _kept(self, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        full = self.full(value.detach())
        return full.cpu() if self.group.is_main else torch.empty(0)


def _like(parameter: Tensor, value: Any) -> Any:
    """A tensor given in full, sharded as the parameter of its shape is; all else as it is."""
    if not isinstance(parameter, DTensor) or getattr(value, "shape", None) != parameter.shape:
        return value
    mesh = parameter.device_mesh
    return distribute_tensor(
        value.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None
    )


def _as_fsdp(accelerator: Any) -> Any:
    """The accelerator, which takes FSDP2 for something of accelerators alone; gloo will do.

    Raises:
        ConfigError: accelerate's configuration asks for FSDP's first version.
    """
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        state.distributed_type = DistributedType.FSDP
    if state.fsdp_plugin.fsdp_version != 2:
        raise ConfigError("accelerate's fsdp_version: must be 2 (see conf/accelerate/fsdp2.yaml)")
    return accelerator
