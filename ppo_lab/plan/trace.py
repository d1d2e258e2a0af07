"""How much memory a piece of work holds, told by the storages that its operations make.

Works on real tensors and on the meta device alike, so that a model of any size can be asked
without any memory for it. What the work is given (weights, inputs) is not counted; what an
operation needs inside of itself is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OUTSIDE = -1
WITHOUT_A_KERNEL = (
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
)
NUMBER_OF_A_TENSOR = torch.ops.aten._local_scalar_dense.default


@dataclass(frozen=True)
class Event:
    """A storage that was made (bytes above 0) or let go of (below 0)."""

    storage: int
    bytes: int


@dataclass
class Live:
    """The storages that a piece of work made and let go of, in their order; and how many of its
    operations are kernels to launch: all but views and those that only ask for memory.
    """

    events: list[Event] = field(default_factory=list)
    launches: int = 0

    @property
    def now(self) -> int:
        """Bytes that are held at the end."""
        return sum(event.bytes for event in self.events)

    @property
    def made(self) -> int:
        """Bytes of all storages that were made."""
        return sum(max(event.bytes, 0) for event in self.events)

    def peak(self, *, without: Collection[int] = ()) -> int:
        """The most bytes held at once, those of some storages left out."""
        held = most = 0
        for event in self.events:
            if event.storage not in without:
                held += event.bytes
                most = max(most, held)
        return most


class tracked(TorchDispatchMode):  # noqa: N801, it is used as a function: with tracked() as live
    """`with tracked() as live`: what the operations inside make and let go of.

    A number that is asked of a meta tensor is 0: a mask then counts as one that hides something.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = Live()
        self._names: dict[int, int] = {}

    def __enter__(self) -> Live:  # type: ignore[override]
        super().__enter__()
        return self.live

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation; what it returns and was not there before is new."""
        if func is NUMBER_OF_A_TENSOR and args[0].device.type == "meta":
            return 0
        for tensor in _tensors((args, kwargs)):
            self._know(tensor)
        result = func(*args, **(kwargs or {}))
        writes = func._schema.is_mutable
        for tensor in _tensors(result):
            if _address(tensor) not in self._names:
                self._add(tensor)
                writes = True
        if writes and func.overloadpacket not in WITHOUT_A_KERNEL:
            self.live.launches += 1
        return result

    def _know(self, tensor: Tensor) -> None:
        """Whatever an operation is given and no operation made came from outside."""
        if _address(tensor) not in self._names:
            self._names[_address(tensor)] = OUTSIDE
            weakref.finalize(tensor.untyped_storage(), self._drop, _address(tensor), 0)

    def _add(self, tensor: Tensor) -> None:
        storage, address = tensor.untyped_storage(), _address(tensor)
        name, size = len(self.live.events), storage.nbytes()
        self._names[address] = name
        self.live.events.append(Event(name, size))
        weakref.finalize(storage, self._drop, address, size)

    def _drop(self, address: int, size: int) -> None:
        name = self._names.pop(address, OUTSIDE)
        if name != OUTSIDE:
            self.live.events.append(Event(name, -size))

    def names(self, tensors: Iterable[Tensor]) -> set[int]:
        """The names under which the storages of these tensors stand in the events."""
        return {self._names.get(_address(t), OUTSIDE) for t in tensors}


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that a piece of work holds at once."""
    with tracked() as live:
        work()
    return live.peak()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
