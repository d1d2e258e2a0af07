"""A decoder by the fewest operations: the same function as transformers', without what is slow.

On a CPU real tokens alone pass through products and norms; attention alone sees rectangles. Of the
last layer only what is asked for is computed. Keys and values of earlier positions lie in one
buffer. Where a processor does not compute in the weights' half precision, they are widened a tile
at a time, and everything between them is float32.

On a GPU padding passes too, since to leave it out the host would have to wait for its number; what
is spared are launches and elementwise passes over memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ppo_lab.models.fast.attention import (
    Block,
    KeysAndValues,
    Shown,
    attend,
    blocks_of,
    last_columns,
    parted,
    shown_of,
)
from ppo_lab.models.fast.elementwise import (
    added_and_normed,
    halves_activated,
    normed,
    rotated,
    rows_activated,
    spread_angles,
)
from ppo_lab.models.fast.families import read
from ppo_lab.models.fast.gemm import computed_in
from ppo_lab.models.fast.layers import Anatomy, Layer
from ppo_lab.models.fast.places import Everywhere, LastColumns, Places
from ppo_lab.models.fast.products import Linear, activated

# transformers' attention kernels that this road takes the place of; others were asked for.
KERNELS = ("eager", "sdpa")


Angles = tuple[Tensor, Tensor, int]

# States between layers, (rows, hidden), and what is still to be added to them: that and the norm
# that follows are one step.
Stream = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Pass:
    """What the layers of one pass share: where rows lie, who attends to what, how far they turn.

    `angles` are each rotary embedding's cosines and signed sines, (batch, time, heads, size) each,
    and the number of pairs that they turn.
    """

    places: Places
    blocks: tuple[Block, ...] | Tensor | Shown
    angles: Sequence[Angles]
    cache: KeysAndValues | None

    def turned(
        self, layer: Layer, x: Float[Tensor, "batch time heads size"]
    ) -> Float[Tensor, "batch time heads size"]:
        """Queries or keys as the layer's rotary embedding turns them."""
        if layer.turned_by is None:
            return x
        cos, sin, pairs = self.angles[layer.turned_by]
        heads = x.shape[2]
        return rotated(x, cos[:, :, :heads], sin[:, :, :heads], pairs)

    def read(self, module: Any, dtype: torch.dtype) -> Linear:
        """A linear layer of the model as it stands; over many passes it is read once.

        Where its adapter is to be learnt, that is not rounded yet.
        """
        if self.cache is None:
            return Linear.read(module, None if torch.is_grad_enabled() else dtype)
        if module not in self.cache.linears:
            self.cache.linears[module] = Linear.read(module, dtype)
        return self.cache.linears[module]

    def linear(self, module: Any, x: Float[Tensor, "rows inputs"]) -> Float[Tensor, "rows outputs"]:
        """What a linear layer of the model makes of the rows."""
        return self.read(module, x.dtype)(x)

    def rectangle(self, rows: Float[Tensor, "rows width"]) -> Float[Tensor, "batch time width"]:
        """The rows where they lie in the batch; elsewhere numbers without meaning."""
        return self.places.spread(rows).unflatten(0, self.places.real.shape)


class FastDecoder:
    """The decoder of one model; holding no weights, it is always what the model is."""

    def __init__(self, decoder: Any, anatomy: Anatomy, *, whole: bool | None = None) -> None:
        """`whole`: padding passes with the rest; by default on a GPU."""
        self.decoder, self.anatomy = decoder, anatomy
        self._whole = whole
        self._modules = list(decoder.modules())
        self._slopes: Tensor | None = None  # where the decoder is

    @classmethod
    def of(cls, decoder: Any) -> FastDecoder | None:
        """The fast road of a decoder; None where it has parts that are not understood."""
        anatomy = read(decoder)
        return None if anatomy is None else cls(decoder, anatomy)

    def usable(self) -> bool:
        """Whether it is where it may be, with nothing on that only transformers' forward does."""
        weight, config = self.decoder.get_input_embeddings().weight, self.decoder.config
        here = weight.device.type == "cuda" or (
            weight.device.type == "cpu" and weight.dtype != torch.float16
        )
        checkpoints = self.decoder.gradient_checkpointing and self.decoder.training
        kernel = getattr(config, "_attn_implementation", None) or "eager"
        # Which takes torch's own layers; of weights on `meta`, as a plan's, torch cannot tell.
        cast = here and torch.is_autocast_enabled(weight.device.type)
        plain = here and not checkpoints and not cast and kernel in KERNELS
        return plain and not _merged(self._modules) and not _hooked(self._modules)

    def hidden(
        self,
        ids: Int[Tensor, "batch new"],
        attention: Bool[Tensor, "batch seen"],
        cache: KeysAndValues | None = None,
        *,
        last: int = 0,
        below: Float[Tensor, "batch new hidden"] | None = None,
        start: int = 0,
    ) -> Float[Tensor, "batch columns hidden"]:
        """The last hidden states of `ids`, or those of their `last` columns alone; without meaning
        on padding. See `Trunk.hidden`. With `below`, the states that enter layer `start`, that
        layer and those above are passed alone.
        """
        x, shared = self._enter(ids, attention, cache, below)
        new, columns = ids.shape[1], last or ids.shape[1]
        *lower, final = enumerate(self.anatomy.layers)
        stream: Stream = (x, None)
        for index, layer in lower[start:]:
            stream = through(layer, index, stream, shared)
        end = None
        if columns < new and isinstance(shared.blocks, tuple):
            end = LastColumns(shared.places, columns)
            shared = replace(shared, blocks=last_columns(shared.blocks, new - columns))
        stream = through(final[1], final[0], stream, shared, end)
        _, x = added_and_normed(self.anatomy.norm, *stream)
        if cache is not None:
            cache.seen += new
        places = shared.places if end is None else end.places
        return places.spread(x).view(len(ids), -1, x.shape[1])[:, -columns:]

    @torch.no_grad()
    def below(
        self, ids: Int[Tensor, "batch new"], attention: Bool[Tensor, "batch new"], end: int
    ) -> Float[Tensor, "batch new hidden"]:
        """The hidden states that enter layer `end`; without meaning on padding."""
        x, shared = self._enter(ids, attention)
        stream: Stream = (x, None)
        for index, layer in enumerate(self.anatomy.layers[:end]):
            stream = through(layer, index, stream, shared)
        x, added = stream
        whole = x if added is None else x + added
        return shared.places.spread(whole).view(*ids.shape, -1)

    def first_trained(self) -> int:
        """The number of layers, from the first on, that nothing trained is in or under."""
        if any(p.requires_grad for part in self.anatomy.entrance for p in part.parameters()):
            return 0
        trained = [
            any(p.requires_grad for p in block.parameters()) for block in self.anatomy.blocks
        ]
        return trained.index(True) if True in trained else len(trained)

    def _enter(
        self,
        ids: Tensor,
        attention: Tensor,
        cache: KeysAndValues | None = None,
        below: Tensor | None = None,
    ) -> tuple[Float[Tensor, "rows hidden"], Pass]:
        """The rows that enter the first layer to be passed, and what the layers will share."""
        new = ids.shape[1]
        real, width = attention[:, -new:], self.anatomy.words.weight.shape[1]
        places = Everywhere(real) if self._passes_whole(real) else Places(real, width=width)
        positions = (attention.cumsum(1) - 1).clamp(min=0)[:, -new:]
        if below is None:
            x = embedded(self.anatomy, places.take(ids), places.take(positions))
        else:
            stored = self.anatomy.words.weight
            x = places.gather(below.flatten(0, 1)).to(_passed_in(stored))
        blocks = self._blocks(attention, new, x.dtype)
        return x, Pass(places, blocks, angles_of(self.anatomy, x, positions), cache)

    def _passes_whole(self, x: Tensor) -> bool:
        return x.device.type != "cpu" if self._whole is None else self._whole

    def _blocks(
        self, attention: Tensor, new: int, dtype: torch.dtype
    ) -> tuple[Block, ...] | Tensor | Shown:
        first, slopes = self.anatomy.layers[0], self.anatomy.slopes
        if self._passes_whole(attention):
            device = attention.device
            if slopes is not None and (self._slopes is None or self._slopes.device != device):
                self._slopes = slopes.to(device)
            return shown_of(attention, new=new, size=first.size, slopes=self._slopes, dtype=dtype)
        return blocks_of(
            attention,
            new=new,
            heads=first.heads,
            kv_heads=first.kv_heads,
            slopes=slopes,
            dtype=dtype,
            rounded_to=self.anatomy.words.weight.dtype,
        )


def embedded(
    anatomy: Anatomy, ids: Int[Tensor, " rows"], positions: Int[Tensor, " rows"]
) -> Float[Tensor, "rows hidden"]:
    """What the first layer reads, in the precision that the layers compute in."""
    return anatomy.embed(ids, positions).to(_passed_in(anatomy.words.weight))


def angles_of(
    anatomy: Anatomy, x: Float[Tensor, "rows hidden"], positions: Int[Tensor, "batch time"]
) -> list[Angles]:
    """How far each rotary embedding turns, as a `Pass` has it; x gives device and precision."""
    first, found = anatomy.layers[0], []
    for embedding in anatomy.rotary:
        cos, sin = (part.to(x.dtype) for part in embedding(x, positions))
        pairs = cos.shape[2] // 2
        spread = spread_angles(
            cos[..., :pairs], sin[..., :pairs], heads=first.heads, size=first.size
        )
        found.append((*spread, pairs))
    return found


def through(
    layer: Layer,
    index: int,
    stream: Stream,
    shared: Pass,
    end: LastColumns | None = None,
) -> Stream:
    """One layer; with `end`, its output in the last columns alone."""
    x, inner = added_and_normed(layer.norm, *stream)
    attended = shared.linear(layer.out, _attention(layer, index, inner, shared, end))
    attended = normed(layer.after_attention, attended)
    kept = inner if layer.after_norm else x
    kept = kept if end is None else end.pick(kept)
    if layer.parallel:
        fed = _feed_forward(layer, normed(layer.second_norm, kept), shared)
        return kept + attended, fed
    x, inner = added_and_normed(layer.second_norm, kept, attended)
    fed = normed(layer.after_feed_forward, _feed_forward(layer, inner, shared))
    return (inner if layer.after_norm else x), fed


def _attention(
    layer: Layer,
    index: int,
    x: Float[Tensor, "rows hidden"],
    shared: Pass,
    end: LastColumns | None,
) -> Float[Tensor, "rows_out hidden"]:
    """What the queries of the rows mix together."""
    q, k, v = (part.transpose(1, 2) for part in _queries_keys_values(layer, x, shared))
    places = shared.places
    if end is not None:
        places, q = end.places, q[:, :, -end.columns :]
    if shared.cache is None:
        mixed = attend(q, k, v, shared.blocks, layer.scaling)
    else:
        mixed = shared.cache.attend(index, q, k, v, shared.blocks, layer.scaling)
    return places.gather(mixed.flatten(0, 1))


def _queries_keys_values(
    layer: Layer, x: Float[Tensor, "rows hidden"], shared: Pass
) -> tuple[Tensor, ...]:
    """Each (batch, time, heads, size), queries and keys turned by their positions."""
    products = [shared.rectangle(shared.linear(projection, x)) for projection in layer.projections]
    if len(products) == 1 and layer.given_as_they_are and isinstance(shared.blocks, Shown):
        q, k, v = parted(products[0], layer.split)
    elif len(products) == 1:
        q, k, v = layer.split(products[0])
    else:
        q, k, v = (product.unflatten(2, (-1, layer.size)) for product in products)
    if layer.head_norms is not None:
        q, k = (_normed_heads(norm, x) for norm, x in zip(layer.head_norms, (q, k), strict=True))
    return shared.turned(layer, q), shared.turned(layer, k), v


def _normed_heads(
    norm: Any, x: Float[Tensor, "batch time heads size"]
) -> Float[Tensor, "batch time heads size"]:
    """Every head normed by itself or, by a norm that is as wide as all of them, together."""
    if len(norm.weight) == x.shape[3]:
        return normed(norm, x)
    return normed(norm, x.flatten(2)).view(x.shape)


def _feed_forward(
    layer: Layer, x: Float[Tensor, "rows hidden"], shared: Pass
) -> Float[Tensor, "rows hidden"]:
    return shared.linear(layer.down, _activated(layer, x, shared))


def _activated(
    layer: Layer, x: Float[Tensor, "rows hidden"], shared: Pass
) -> Float[Tensor, "rows inner"]:
    """a(up(x)) or, gated, a(gate(x)) * up(x)."""
    up = shared.read(layer.up, x.dtype)
    gate = None if layer.gate is None else shared.read(layer.gate, x.dtype)
    made = activated(x, layer.activation, up, gate, gate_in_up=layer.gate_in_up)
    if made is not None:
        return made
    if gate is None and layer.gate_in_up:
        return halves_activated(layer.activation, up(x))
    if gate is None:
        return rows_activated(layer.activation, up(x))
    return rows_activated(layer.activation, gate(x), up(x))


def _merged(modules: Sequence[Any]) -> bool:
    """Whether an adapter has been added to a weight, beside which it must not be added again."""
    return any(module.__dict__.get("merged_adapters") for module in modules)


def _hooked(modules: Sequence[Any]) -> bool:
    """Whether something is to happen around one of them that only its own call would do, or its
    call has been replaced.

    Hooks by which transformers captures outputs sleep outside of its own forward.
    """
    if any("_hf_hook" in m.__dict__ or "forward" in m.__dict__ for m in modules):
        return True
    with_hooks = [m for m in modules if m._forward_hooks or m._forward_pre_hooks]
    hooks = [
        h for m in with_hooks for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
    ]
    return any(not hook.__module__.startswith("transformers.") for hook in hooks)


def _passed_in(stored: Tensor) -> torch.dtype:
    """The precision that the layers of weights like these compute in, where they are."""
    return computed_in(stored.dtype) if stored.device.type == "cpu" else stored.dtype
