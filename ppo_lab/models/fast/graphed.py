"""Decoding on a GPU, where launching the kernels of a token costs more than their work.

The pass of one token is some fifteen small kernels a layer, and drawing the next is some forty.
Here all that they read and write lies at addresses that stay for a whole generation: the token and
its column are copied into their places, keys and values of columns to come are hidden by
attention's bias. So the kernels of one token are those of every later one; they are recorded once,
as a CUDA graph, and from then on launched together. Nothing among them asks the GPU for a number or
brings one from the host.

Where recording fails, the same is done kernel by kernel.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ppo_lab.models.fast.attention import KeysAndValues, bias_of
from ppo_lab.models.fast.decoder import Pass, angles_of, embedded, through
from ppo_lab.models.fast.elementwise import normed
from ppo_lab.models.fast.layers import Anatomy
from ppo_lab.models.fast.places import Everywhere

log = logging.getLogger(__name__)

Results = tuple[Tensor, ...]
Then = Callable[..., Results]

# Rows of attention's bias start at multiples of this, as its kernels like them.
ALIGNED = 8

# Recording, which takes about as long as a pass, pays where so many tokens are still to come.
WORTH_RECORDING = 4


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
            generator = torch.cuda.default_generators[device]
            generator.graphsafe_set_state(generator.clone_state())


class Recorded:
    """A function that is called again and again on tensors that lie where they lay: the first call
    prepares, the second is recorded, and from then on everything is launched at once.
    """

    def __init__(self, recorder: Recorder | None) -> None:
        self.recorder = recorder
        self._function: Callable[[], Results] | None = None
        self._launch: Callable[[], None] | None = None
        self._results: Results = ()

    def __call__(self, function: Callable[[], Results], *, worth_it: bool) -> Results:
        """What the function gives, in tensors that the next call writes over."""
        recorder = self.recorder
        if recorder is None or not recorder.works or not (worth_it or self._launch):
            return function()
        if function is not self._function:
            self._function, self._launch = function, None
            return recorder.warm(function)
        if self._launch is None:
            try:
                self._launch, self._results = recorder.record(function)
            except RuntimeError as error:
                log.warning("sampling is not recorded as a CUDA graph, and goes on: %s", error)
                recorder.works = False
                return function()
        self._launch()
        return self._results


class Standing(KeysAndValues):
    """All that the passes of a generation read and write, in buffers that never move.

    A pass reads `real` columns among the first `visible`, and writes keys and values at `columns`.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        ids: Int[Tensor, "batch seen"],
        attention: Bool[Tensor, "batch seen"],
        positions: int,
    ) -> None:
        """Room for so many positions, of which the prompts take the first."""
        super().__init__(-(-positions // ALIGNED) * ALIGNED)
        batch, seen = attention.shape
        self.anatomy = anatomy
        self.slopes = None if anatomy.slopes is None else anatomy.slopes.to(ids.device)
        self.real = attention.new_zeros(batch, self.positions)
        self.real[:, :seen].copy_(attention)
        self.columns, self.visible = torch.arange(seen, device=ids.device), seen
        self.ids = ids
        self.given: list[Tensor] = []

    def decode(self) -> None:
        """From now on passes are of one token a row, in the column that `place` names."""
        self.ids = self.ids.new_zeros(len(self.ids), 1)
        self.columns, self.visible = self.columns.new_zeros(1), self.positions

    def place(self, ids: Tensor, attention: Tensor, given: Sequence[Tensor]) -> None:
        """Put the next tokens, and what is given with them, where the next pass reads them."""
        column = attention.shape[1] - 1
        self.ids.copy_(ids)
        self.columns.fill_(column)
        self.real[:, column].copy_(attention[:, -1])
        self.given = self.given or [x.clone() for x in given]
        for there, new in zip(self.given, given, strict=True):
            there.copy_(new)

    def add(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Those of all visible columns of a layer, these (batch, heads, new, size) among them."""
        if layer == len(self._layers):
            batch, heads, _, size = keys.shape
            # Zeros, since what is hidden is multiplied by zero and must be a number.
            whole = keys.new_zeros(2, batch, heads, self.positions, size)
            self._layers.append((whole[0], whole[1]))
        for buffer, new in zip(self._layers[layer], (keys, values), strict=True):
            buffer.index_copy_(2, self.columns, new)
        all_keys, all_values = self._layers[layer]
        return all_keys[:, :, : self.visible], all_values[:, :, : self.visible]

    def states(self) -> Float[Tensor, "batch hidden"]:
        """The hidden states of the last of the columns that `ids` stand in."""
        real = self.real[:, : self.visible]
        positions = (real.cumsum(1) - 1).clamp(min=0)
        newest = positions.index_select(1, self.columns)
        x = embedded(self.anatomy, self.ids.flatten(), newest.flatten())
        shared = Pass(
            places=Everywhere(self.ids),
            blocks=bias_of(real, self.columns, slopes=self.slopes, dtype=x.dtype),
            angles=angles_of(self.anatomy, x, newest),
            cache=self,
        )
        for index, layer in enumerate(self.anatomy.layers):
            x = through(layer, index, x, shared)
        return normed(self.anatomy.norm, x).view(*self.ids.shape, -1)[:, -1]


class Graphed:
    """The passes of one generation: of its prompts first, then of a token a row at a time."""

    def __init__(self, anatomy: Anatomy, positions: int, recorder: Recorder | None = None) -> None:
        """Room for so many positions, prompt included; without a recorder nothing is recorded."""
        self.anatomy, self.positions = anatomy, positions
        self._recorded = Recorded(recorder)
        self._standing: Standing | None = None
        self._then: Then | None = None

    @torch.no_grad()
    def newest(
        self,
        ids: Int[Tensor, "batch new"],
        attention: Bool[Tensor, "batch seen"],
        then: Then,
        *given: Tensor,
    ) -> Results:
        """What `then(states, *given)` makes of the hidden states (batch, hidden) of the newest
        column; see `Trunk.newest`. It is recorded with the pass, so that what it does must depend
        on the numbers in its tensors alone.
        """
        if self._standing is None:
            self._standing = Standing(self.anatomy, ids, attention, self.positions)
            states = self._standing.states()
            self._standing.decode()
            return then(states, *given)
        standing = self._standing
        standing.place(ids, attention, given)
        if then is not self._then:
            # Of the buffers, not of this: a cycle would keep them until the collector comes by.
            self._then, self._step = then, lambda: then(standing.states(), *standing.given)
        worth_it = self.positions - attention.shape[1] >= WORTH_RECORDING
        results = self._recorded(self._step, worth_it=worth_it)
        return tuple(x.clone() for x in results)
