"""Functions recorded as CUDA graphs: what they launch on a GPU is launched at once from then on.

A small model's pass is hundreds of kernels that take less time than launching them one by one.
Where the same kernels work on the same addresses again and again, they are recorded once. Nothing
among them may ask the GPU for a number or bring one from the host; what differs from call to call
is copied into places that never move.

Where recording fails, the same is done kernel by kernel.
"""

from __future__ import annotations

import gc
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ppo_lab.types import packed, unpacked

log = logging.getLogger(__name__)

Results = tuple[Tensor, ...]

# Recordings that are kept at a time, the latest used: an iteration's policy, critic and reference,
# each in the few shapes that texts of all lengths are padded to.
KEPT = 32

# Nothing is kept for later where less of a GPU is free than this share of it.
ROOM = 0.5


class Recorder:
    """Records what a function launches on the GPU, on a stream of its own.

    The last graph is kept until the next is recorded: they share a memory pool, which lives as long
    as a graph that uses it.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.last: torch.cuda.CUDAGraph | None = None
        self.works = True

    def let_go(self) -> None:
        """Give back the pool once no graph uses it; later graphs share another."""
        self.last, self.pool = None, torch.cuda.graph_pool_handle()

    def warm(self, function: Callable[[], Any]) -> Any:
        """What the function gives, with all prepared that recording must not meet unprepared."""
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            result = function()
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
        return result

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """A function that launches what this one did, and where the results will then lie.

        Raises:
            RuntimeError: something in it cannot be recorded.
        """
        graph = torch.cuda.CUDAGraph()

        def recorded() -> Any:
            # Not torch.cuda.graph(): that empties the allocator's cache, which costs more than a
            # generation.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                result = function()
            except BaseException:  # the cause is to be seen, not that recording cannot end
                self._give_up(graph)
                raise
            graph.capture_end()
            return result

        with _no_garbage_collected():
            result = self.warm(recorded)
        self.last = graph
        return graph.replay, result

    def _give_up(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a recording that failed. Where it was broken by a wait for the GPU, torch stops
        before it has undone what a recording does to its allocator and its random numbers.
        """
        try:
            graph.capture_end()
        except RuntimeError:
            device = self.stream.device.index
            torch._C._cuda_endAllocateToPool(device, self.pool)
            torch._C._cuda_releasePool(device, self.pool)
            generator = torch.cuda.default_generators[device]
            generator.graphsafe_set_state(generator.clone_state())


@contextmanager
def _no_garbage_collected() -> Iterator[None]:
    """What a collector would destroy, another recording say, must not be destroyed in one."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Recorded:
    """A function that is called again and again on tensors that lie where they lay: the first call
    prepares, the second is recorded, and from then on everything is launched at once.
    """

    def __init__(self, recorder: Recorder | None) -> None:
        self.recorder = recorder
        self._function: Callable[[], Results] | None = None
        self._launch: Callable[[], None] | None = None
        self._results: Results = ()

    @property
    def launches(self) -> bool:
        """Whether calls launch a recording."""
        return self._launch is not None

    def __call__(self, function: Callable[[], Results], *, worth_it: bool) -> Results:
        """What the function gives, in tensors that the next call writes over."""
        recorder = self.recorder
        if recorder is None or not recorder.works or not (worth_it or self._launch):
            return function()
        if function is not self._function:
            self._function, self._launch = function, None
            return recorder.warm(function)
        if self._launch is None and not self._record(recorder, function):
            return function()
        assert self._launch is not None
        self._launch()
        return self._results

    def _record(self, recorder: Recorder, function: Callable[[], Results]) -> bool:
        """Whether the function could be recorded.

        What the allocator keeps of earlier passes it can neither use nor give back while recording:
        where memory runs out, it gives that back first, and recording is tried once more.
        """
        problem = self._tried(recorder, function)
        if isinstance(problem, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            problem = self._tried(recorder, function)
        if problem is not None:
            log.warning("passes are not recorded as CUDA graphs, and go on: %s", problem)
            recorder.works = False
        return problem is None

    def _tried(self, recorder: Recorder, function: Callable[[], Results]) -> RuntimeError | None:
        try:
            self._launch, self._results = recorder.record(function)
        except RuntimeError as error:
            # Without its traceback, which holds the tensors of what failed.
            return error.with_traceback(None)
        return None


class ByShape:
    """Functions of tensors, recorded for every shape that they are called with more than once.

    The tensors are given on the host, and go to the device in one transfer.
    """

    def __init__(self, recorder: Recorder, device: torch.device | str = "cpu") -> None:
        self.recorder, self.device = recorder, device
        self._made: OrderedDict[Hashable, tuple[Tensor, Recorded, Callable[[], Results]]]
        self._made = OrderedDict()
        self.was_recorded = False  # the last call, and not launched kernel by kernel

    def __call__(self, key: Hashable, function: Callable[..., Results], *given: Tensor) -> Results:
        """What `function(*given)` gives, in tensors that the next call writes over.

        `key` stands for all that the function does: of calls with the same key and shapes, the
        first one's function is taken.
        """
        key = (key, *((x.shape, x.dtype) for x in given))
        if key not in self._made:
            place = torch.empty_like(packed(given), device=self.device)
            there = unpacked(place, given)
            self._made[key] = place, Recorded(self.recorder), lambda: function(*there)
            while len(self._made) > KEPT:
                self._made.popitem(last=False)
        self._made.move_to_end(key)
        place, recorded, step = self._made[key]
        sent = packed(given)
        # From memory that the host will not write over, so that it need not wait.
        place.copy_(sent.pin_memory() if place.is_cuda else sent, non_blocking=True)
        results = recorded(step, worth_it=True)
        self.was_recorded = recorded.launches
        return results

    def __len__(self) -> int:
        return len(self._made)

    def forget(self) -> None:
        """Let go of all recordings, and of the memory that they work in."""
        self._made.clear()


def rounded_up(n: int, step: int) -> int:
    """The next multiple of a step, so that few shapes are many."""
    return -(-n // step) * step


def has_room(device: torch.device) -> bool:
    """Whether enough of a GPU is free to keep what passes work in from one to the next."""
    free, total = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + kept >= ROOM * total
