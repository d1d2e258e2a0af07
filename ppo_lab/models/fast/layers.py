"""The layers of a decoder as the fast road sees them: which modules, in which order, of what kind.

    x <- x + out(attention(norm(x)))        a = activation
    x <- x + down(a(up(norm(x))))           or, gated, down(a(gate(norm(x))) * up(norm(x)))

Nothing is copied: a layer here holds the model's own modules, so that it is always what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """One layer: its modules, and what of its shape they do not say.

    `projections` are those of queries, keys and values, or one for all three, whose output is then
    ordered `by_head` (heads, three, size) or else one kind after the other. `gate` is None where
    the feed-forward part has none, and where `gate_in_up` it is the first half of what `up` gives.
    `size` is a head's width, `scaling` multiplies attention's scores.
    Norms are None where there are none: of what each part reads, and, `after_attention` and
    `after_feed_forward`, of what it gives. `parallel`: both parts read the layer's input.
    `after_norm`: the residual is the normed input (BLOOM's option). `head_norms` are those of each
    query and each key, or of all of a token's at once.
    `turned_by` is the number of the rotary embedding that turns queries and keys, None for none.
    """

    norm: Any
    projections: tuple[Any, ...]
    out: Any
    second_norm: Any
    gate: Any
    up: Any
    down: Any
    activation: str
    heads: int
    kv_heads: int
    size: int
    scaling: float
    by_head: bool = False
    parallel: bool = False
    after_norm: bool = False
    gate_in_up: bool = False
    head_norms: tuple[Any, Any] | None = None
    after_attention: Any = None
    after_feed_forward: Any = None
    turned_by: int | None = None

    @property
    def linears(self) -> tuple[Any, ...]:
        """Every linear layer in it."""
        gate = () if self.gate is None else (self.gate,)
        return (*self.projections, self.out, *gate, self.up, self.down)

    @property
    def given_as_they_are(self) -> bool:
        """Whether attention is of queries and keys as products give them, one for every head."""
        as_they_are = self.head_norms is None and self.turned_by is None
        return as_they_are and self.kv_heads == self.heads

    def split(self, fused: Float[Tensor, "batch time outputs"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (batch, time, heads, size) out of one product for all three."""
        if self.by_head:
            q, k, v = fused.unflatten(2, (self.heads, 3, self.size)).unbind(3)
        else:
            counts = [self.heads, self.kv_heads, self.kv_heads]
            q, k, v = fused.unflatten(2, (-1, self.size)).split(counts, 2)
        return q, k, v


@dataclass(frozen=True)
class Anatomy:
    """A decoder: its embedding, its layers, its last norm, and where positions enter.

    `blocks` are the modules that the layers were read from. Positions are learned vectors, of which
    that of position 0 is the one numbered `first_position`; angles that each of the `rotary`
    embeddings gives for hidden states and positions; or ALiBi's slopes of each head.
    Some layers may see the last `window` positions alone (0 = all see all); of more, nothing here
    knows.
    """

    blocks: tuple[Any, ...]
    layers: tuple[Layer, ...]
    words: Any
    norm: Any
    first_norm: Any = None
    learned: Any = None
    first_position: int = 0
    rotary: tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], ...] = ()
    slopes: Float[Tensor, " heads"] | None = None
    window: int = 0

    def covers(self, positions: int) -> bool:
        """Whether every layer sees all of so many positions."""
        return not self.window or positions <= self.window

    @property
    def entrance(self) -> tuple[Any, ...]:
        """The modules before the first layer."""
        parts = (self.words, self.first_norm, self.learned)
        return tuple(part for part in parts if part is not None)

    def embed(
        self, ids: Int[Tensor, " rows"], positions: Int[Tensor, " rows"]
    ) -> Float[Tensor, "rows hidden"]:
        """What the first layer reads."""
        x = self.words(ids)
        if self.learned is not None:
            x = x + F.embedding(positions + self.first_position, self.learned.weight)
        return x if self.first_norm is None else self.first_norm(x)
