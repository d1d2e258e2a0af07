"""Decoding on a GPU, where launching the kernels of a token costs more than their work.

The pass of one token is some fifteen small kernels a layer, and drawing the next is some forty.
Here all that they read and write lies at addresses that stay: prompts are copied into their place,
and each pass leaves the column of the next, and the tokens, where that looks for them. So the
kernels of one token are those of every later one; they are recorded once, and from then on launched
together, in later generations of the same shape too.

Rows are padded on the left, and nowhere else. Where Triton is, one kernel attends; elsewhere
columns of padding and those to come are hidden by attention's bias.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ppo_lab.models.fast.attention import KeysAndValues, bias_of, shown_of
from ppo_lab.models.fast.decoder import Pass, Stream, angles_of, embedded, through
from ppo_lab.models.fast.elementwise import added_and_normed
from ppo_lab.models.fast.kernels import kernels_for
from ppo_lab.models.fast.layers import Anatomy
from ppo_lab.models.fast.places import Everywhere
from ppo_lab.models.fast.recording import KEPT, Recorded, Recorder, Results, rounded_up

Then = Callable[..., Results]

# Columns of prompts come in multiples of this, so that few shapes do; rows of attention's bias
# start at multiples of 8, as its kernels like them.
ALIGNED = 16

# Room for columns comes in multiples of this where those that are not there yet cost nothing.
ROOMY = 64

# Recording, which takes about as long as a pass, pays where so many tokens are still to come.
WORTH_RECORDING = 4


class Standing(KeysAndValues):
    """All that the passes of a generation read and write, in buffers that never move.

    The prompts take the first `width` columns; their tokens lie in `prompts`. The newest token of
    each row lies in `ids`, if it does not stand elsewhere, and its keys and values go to `column`.
    """

    def __init__(self, anatomy: Anatomy, batch: int, width: int, positions: int) -> None:
        """Room for so many positions, of which the prompts take the first `width`."""
        stored = anatomy.words.weight
        self.kernels = kernels_for(stored.device)
        super().__init__(rounded_up(positions, ALIGNED if self.kernels is None else ROOMY))
        self.anatomy, self.width = anatomy, width
        device = stored.device
        self.slopes = None if anatomy.slopes is None else anatomy.slopes.to(device)
        self.prompts = torch.zeros(batch, width, dtype=torch.long, device=device)
        self.ids = self.prompts.new_zeros(batch, 1)
        self.column = self.prompts.new_zeros(1)
        self.first = self.prompts.new_zeros(batch)
        self.real = torch.zeros(batch, self.positions, dtype=torch.bool, device=device)
        self._read_from = _where(_read(anatomy))
        dtype = embedded(anatomy, self.ids[:1, 0], self.ids[:1, 0]).dtype
        for layer in anatomy.layers:
            shape = (batch, layer.kv_heads, self.positions, layer.size)
            # Zeros, since what is hidden is multiplied by zero and must be a number.
            keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
            self._layers.append((keys, values))

    def begin(self, ids: Tensor, attention: Tensor) -> bool:
        """Put prompts in their place; False where the linear layers are no longer where those were
        that were read for the tokens before.
        """
        self.prompts.copy_(ids)
        self.real.fill_(False)
        self.real[:, : self.width].copy_(attention)
        self.first.copy_(attention.logical_not().sum(1))
        self._goes_to(self.width)
        return self._read_again()

    def place(self, ids: Tensor, there: Tensor, column: int) -> None:
        """Put the next tokens, and their column, where the next pass reads them."""
        if there is not ids:
            there.copy_(ids)
        if self._next != column:
            self._goes_to(column)
        self._next += 1  # as the pass does

    def _goes_to(self, column: int) -> None:
        self.column.fill_(column)
        self._next = column

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, blocks: Any, scaling: float
    ) -> Float[Tensor, "batch new heads_size"]:
        """What the newest queries mix, after their keys and values are in their places."""
        if self.kernels is None or q.shape[2] > 1:
            return super().attend(layer, q, k, v, blocks, scaling)
        newest = (x[:, :, 0] for x in (q, k, v))
        place = (*self._layers[layer], self.first, self.column, self.slopes)
        return self.kernels.attend_newest(*newest, *place, scaling).flatten(1)[:, None]

    def add(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Those of all columns that are looked at, these (batch, heads, new, size) among them."""
        of_prompts = keys.shape[2] > 1
        for buffer, new in zip(self._layers[layer], (keys, values), strict=True):
            if of_prompts:
                buffer[:, :, : self.width].copy_(new)
            else:
                buffer.index_copy_(2, self.column, new)
        all_keys, all_values = self._layers[layer]
        visible = self.width if of_prompts else self.positions
        return all_keys[:, :, :visible], all_values[:, :, :visible]

    def states_of_prompts(self) -> Float[Tensor, "batch hidden"]:
        """The hidden states of the prompts' last tokens."""
        real = self.real[:, : self.width]
        columns = torch.arange(self.width, device=real.device)
        positions = (columns - self.first[:, None]).clamp(min=0)
        shown = shown_of(
            real,
            new=self.width,
            size=self.anatomy.layers[0].size,
            slopes=self.slopes,
            dtype=self._dtype,
        )
        return self._states(self.prompts, positions, shown)

    def states(self, ids: Int[Tensor, "batch one"]) -> Float[Tensor, "batch hidden"]:
        """The hidden states of the newest tokens; later ones go to the next column."""
        shown: Any = ()
        if self.kernels is None:
            self.real.index_fill_(1, self.column, True)
            shown = bias_of(self.real, self.column, slopes=self.slopes, dtype=self._dtype)
        states = self._states(ids, self.column - self.first[:, None], shown)
        self.column.add_(1)
        return states

    @property
    def _dtype(self) -> torch.dtype:
        return self._layers[0][0].dtype

    def _states(self, ids: Tensor, positions: Tensor, shown: Any) -> Float[Tensor, "batch hidden"]:
        x = embedded(self.anatomy, ids.flatten(), positions.flatten())
        shared = Pass(
            places=Everywhere(ids),
            blocks=shown,
            angles=angles_of(self.anatomy, x, positions),
            cache=self,
        )
        stream: Stream = (x, None)
        for index, layer in enumerate(self.anatomy.layers):
            stream = through(layer, index, stream, shared)
        return added_and_normed(self.anatomy.norm, *stream)[1].view(*ids.shape, -1)[:, -1]

    def _read_again(self) -> bool:
        """Bring copies of the linear layers' adapters up to date, where they lie."""
        read = _read(self.anatomy)
        if self._read_from != _where(read):
            return False
        pairs = [
            (there, now)
            for module, linear in self.linears.items()
            for there, now in zip(linear.matrices, read[module][0][1:], strict=True)
            if there.data_ptr() != now.data_ptr()
        ]
        if pairs:
            copies, adapters = zip(*pairs, strict=True)
            torch._foreach_copy_(copies, adapters)
        return True


# What a linear layer is read from: its weight and its active adapters' matrices; their scalings.
Sources = tuple[list[Tensor], list[float]]


def _read(anatomy: Anatomy) -> dict[Any, Sources]:
    """What each linear layer is read from now, as `Linear.read` reads it.

    It is asked before every generation, while a GPU waits. So parts are taken from the dictionaries
    that modules hold them in: as attributes, they would take ten times as long to find.
    """
    return {m: _sources(m) for layer in anatomy.layers for m in layer.linears}


def _sources(module: Any) -> Sources:
    base = module._modules.get("base_layer", module)
    weight = base._parameters["weight"]
    if base is module or module.disable_adapters:
        return [weight], []
    parts, active = module._modules, module.active_adapters
    lora_a, lora_b = parts["lora_A"]._modules, parts["lora_B"]._modules
    names = [name for name in active if name in lora_a]
    matrices = [x[name]._parameters["weight"] for name in names for x in (lora_a, lora_b)]
    return [weight, *matrices], [module.scaling[name] for name in names]


def _where(read: dict[Any, Sources]) -> list[tuple[list[int], list[float]]]:
    """The addresses of all that linear layers are read from, and how adapters are scaled."""
    return [([x.data_ptr() for x in tensors], scales) for tensors, scales in read.values()]


class Graphed:
    """The passes of generations: each of its prompts first, then of a token a row at a time."""

    def __init__(self, anatomy: Anatomy, positions: int, recorder: Recorder | None = None) -> None:
        """Room for so many positions, prompt included; without a recorder nothing is recorded."""
        self.anatomy, self.positions, self.recorder = anatomy, positions, recorder
        self._standing: Standing | None = None
        # By whether it is of prompts, what follows the pass, and the tensors that stand.
        self._steps: dict[tuple[Any, ...], tuple[Recorded, Callable[[], Results]]] = {}
        self._placed: Results = ()
        self._begun, self._padding = False, 0

    def again(self, positions: int) -> None:
        """The next pass is of the prompts of another generation, with room for so many positions;
        the one before has ended.
        """
        self.positions, self._begun = positions, False

    def placed(self, *room: Tensor) -> Results:
        """See `Trunk.placed`."""
        if not _fit(self._placed, room):
            self._steps.clear()
            self._placed = room
        return self._placed

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
        on the numbers in its tensors alone; what was recorded is for the very tensors given.
        """
        of_prompts = not self._begun
        standing = self._begin(ids, attention) if of_prompts else self._standing
        assert standing is not None
        there = ids if any(ids is x for x in given) else standing.ids
        if not of_prompts:
            standing.place(ids, there, self._padding + attention.shape[1] - 1)
        key = (of_prompts, then, *map(id, (there, *given)))
        if key not in self._steps:
            if len(self._steps) >= KEPT:
                self._steps.clear()
            # Of the buffers, not of this: a cycle would keep them until the collector comes by.
            if of_prompts:
                step = lambda: then(standing.states_of_prompts(), *given)  # noqa: E731
            else:
                step = lambda: then(standing.states(there), *given)  # noqa: E731
            self._steps[key] = Recorded(self.recorder), step
        recorded, step = self._steps[key]
        worth_it = self.positions - attention.shape[1] >= WORTH_RECORDING
        return tuple(x.clone() for x in recorded(step, worth_it=worth_it))

    def _begin(self, ids: Tensor, attention: Tensor) -> Standing:
        """Buffers with these prompts in them: those of the generation before, where they fit."""
        batch, seen = ids.shape
        self._begun, self._padding = True, -seen % ALIGNED
        ids, attention = (F.pad(x, (self._padding, 0)) for x in (ids, attention))
        standing, room = self._standing, self._padding + self.positions
        fits = standing is not None and standing.prompts.shape == ids.shape
        if standing is None or not fits or standing.positions < room:
            standing = None
        if standing is None or not standing.begin(ids, attention):
            self._steps.clear()
            standing = self._standing = None  # before there are others
            standing = self._standing = Standing(self.anatomy, batch, ids.shape[1], room)
            standing.begin(ids, attention)
        return standing


def _fit(held: Results, wanted: Results) -> bool:
    """Whether there is a tensor held for each that is wanted, of at least its rows."""
    return len(held) == len(wanted) and all(
        x.dtype == y.dtype and x.shape[1:] == y.shape[1:] and len(x) >= len(y)
        for x, y in zip(held, wanted, strict=True)
    )
