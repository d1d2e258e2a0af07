"""BLOOM's decoder on a CPU: the same function as transformers', without what a CPU is slow at.

    x <- x + dense(attention(LN(x)))        attention: softmax(q k^T / sqrt(d) + alibi) v
    x <- x + W2 gelu(W1 LN(x))

Real tokens alone pass through the layers, one after the other whatever sample they are of; only
attention sees them as rectangles. Keys and values of earlier positions lie in one buffer.

Source: Le Scao et al. 2022, arXiv:2211.05100; Press et al. 2022, arXiv:2108.12409 (ALiBi).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ppo_lab.models.fast.products import is_plain, linear

# Rows of the matrix products come in multiples of this.
ROWS = 32


class KeysAndValues:
    """Keys and values of the positions seen so far, of every layer, in buffers made once."""

    def __init__(self, positions: int) -> None:
        """Room for so many positions, prompt included."""
        self.positions = positions
        self.seen = 0
        self._layers: list[tuple[Tensor, Tensor]] = []

    def add(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Those of all positions of a layer, these (batch, heads, new, size) the newest."""
        batch, heads, new, size = keys.shape
        if layer == len(self._layers):
            buffers = [keys.new_empty(batch, heads, self.positions, size) for _ in range(2)]
            self._layers.append((buffers[0], buffers[1]))
        end = self.seen + new
        both = self._layers[layer]
        for buffer, fresh in zip(both, (keys, values), strict=True):
            buffer[:, :, self.seen : end] = fresh
        return both[0][:, :, :end], both[1][:, :, :end]


class Places:
    """Where the real tokens of a rectangle lie; moves rows between the rectangle and those alone.

    Some padding is kept with them, so that their number is a multiple of ROWS: kernels are compiled
    for each number they meet, and like such ones. Either way is a plain selection of rows, and so
    is its gradient: much faster on a CPU than torch's own scatter.
    """

    def __init__(self, real: Bool[Tensor, "batch time"]) -> None:
        flat = real.flatten()
        padding = (~flat).nonzero().squeeze(1)
        kept = flat.clone()
        kept[padding[: -int(flat.sum()) % ROWS]] = True
        self.kept = kept.nonzero().squeeze(1)
        # Of what is not kept, the number of rows kept: the row of zeros behind them.
        self.inverse = torch.where(kept, kept.cumsum(0) - 1, len(self.kept))

    def spread(self, rows: Float[Tensor, "kept width"]) -> Float[Tensor, "all width"]:
        """The rows at their places, zeros elsewhere."""
        return _Spread.apply(rows, self)

    def gather(self, rows: Float[Tensor, "all width"]) -> Float[Tensor, "kept width"]:
        """The rows that are kept."""
        return _Gather.apply(rows, self)

    def select_all(self, rows: Tensor) -> Tensor:
        """`spread` without a gradient."""
        padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        return padded.index_select(0, self.inverse)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return places.select_all(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].index_select(0, ctx.places.kept), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return rows.index_select(0, places.kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.places.select_all(grads[0]), None


class FastBloom:
    """The decoder of one BLOOM model; holding no weights, it is always what the model is."""

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder
        self.slopes = _slopes(decoder.config.n_head)

    @staticmethod
    def fits(decoder: Any) -> bool:
        """Whether this decoder is a BLOOM on a CPU whose layers are all understood."""
        if type(decoder).__name__ != "BloomModel" or decoder.config.slow_but_exact:
            return False
        return all(is_plain(layer) for block in decoder.h for layer in _linears(block))

    def usable(self) -> bool:
        """Whether it is on a CPU now, with nothing on that only transformers' forward does."""
        weight = self.decoder.word_embeddings.weight
        on_cpu = weight.device.type == "cpu" and weight.dtype != torch.float16
        return on_cpu and not (self.decoder.gradient_checkpointing and self.decoder.training)

    def hidden(
        self,
        ids: Int[Tensor, "batch new"],
        attention: Bool[Tensor, "batch seen"],
        cache: KeysAndValues | None = None,
    ) -> Float[Tensor, "batch new hidden"]:
        """The last hidden states of `ids`, without meaning on padding; see `Trunk.hidden`."""
        real = attention[:, -ids.shape[1] :]
        places = None if bool(real.all()) else Places(real)
        flat = ids.flatten() if places is None else ids.flatten()[places.kept]
        x = self.decoder.word_embeddings_layernorm(self.decoder.word_embeddings(flat))
        bias = self._bias(attention, new=ids.shape[1], dtype=x.dtype)
        for index, block in enumerate(self.decoder.h):
            x = self._block(block, index, x, bias, places, cache)
        if cache is not None:
            cache.seen += ids.shape[1]
        x = self.decoder.ln_f(x)
        return (x if places is None else places.spread(x)).view(*ids.shape, -1)

    def _block(
        self,
        block: Any,
        index: int,
        x: Float[Tensor, "rows hidden"],
        bias: Tensor,
        places: Places | None,
        cache: KeysAndValues | None,
    ) -> Float[Tensor, "rows hidden"]:
        normed = block.input_layernorm(x)
        residual = normed if block.apply_residual_connection_post_layernorm else x
        attended = self._attention(block.self_attention, index, normed, bias, places, cache)
        x = residual + linear(block.self_attention.dense, attended)
        normed = block.post_attention_layernorm(x)
        residual = normed if block.apply_residual_connection_post_layernorm else x
        inner = F.gelu(linear(block.mlp.dense_h_to_4h, normed), approximate="tanh")
        return residual + linear(block.mlp.dense_4h_to_h, inner)

    def _attention(
        self,
        module: Any,
        index: int,
        x: Float[Tensor, "rows hidden"],
        bias: Float[Tensor, "batch heads new seen"],
        places: Places | None,
        cache: KeysAndValues | None,
    ) -> Float[Tensor, "rows hidden"]:
        batch, heads, new, _ = bias.shape
        fused = linear(module.query_key_value, x)
        fused = fused if places is None else places.spread(fused)
        q, k, v = fused.view(batch, new, heads, 3, -1).permute(3, 0, 2, 1, 4).unbind(0)
        if cache is not None:
            k, v = cache.add(index, k, v)
        if torch.is_grad_enabled():
            mixed = _attend(q, k, v, bias)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        rows = mixed.transpose(1, 2).reshape(batch * new, -1)
        return rows if places is None else places.gather(rows)

    def _bias(
        self, attention: Bool[Tensor, "batch seen"], *, new: int, dtype: torch.dtype
    ) -> Float[Tensor, "batch heads new seen"]:
        """What is added to attention's scores: slope times position, rounded as transformers does,
        or where a key is padding or lies ahead a huge negative number; infinity would make a
        padding query's row NaN.
        """
        seen = attention.shape[1]
        positions = (attention.cumsum(1) - 1) * attention
        alibi = (self.slopes[:, None] * positions[:, None, :]).to(dtype)
        ahead = torch.ones(new, seen, dtype=torch.bool).triu(seen - new + 1)
        hidden = (ahead | ~attention[:, None, :])[:, None]
        return torch.where(hidden, torch.finfo(dtype).min, alibi[:, :, None, :])


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(size) + bias) v, by plain products: their backward is the faster one."""
    batch, heads, new, size = q.shape
    flat = [t.reshape(batch * heads, -1, size) for t in (q, k, v)]
    scores = torch.baddbmm(
        bias.reshape(batch * heads, new, -1), flat[0], flat[1].mT, alpha=1.0 / math.sqrt(size)
    )
    return torch.bmm(scores.softmax(-1), flat[2]).view(batch, heads, new, size)


def _linears(block: Any) -> tuple[Any, ...]:
    attention, mlp = block.self_attention, block.mlp
    return (attention.query_key_value, attention.dense, mlp.dense_h_to_4h, mlp.dense_4h_to_h)


def _slopes(heads: int) -> Float[Tensor, " heads"]:
    """ALiBi's: 2^(-8 i / n), n the power of two below `heads`; then every other one of 2 n."""
    n = 2 ** math.floor(math.log2(heads))
    powers = [2.0 ** (-8.0 * i / n) for i in range(1, n + 1)]
    powers += [2.0 ** (-4.0 * i / n) for i in range(1, 2 * (heads - n) + 1, 2)]
    return torch.tensor(powers)
