"""Attention over rectangles of queries, keys and values, by plain products.

    softmax(scaling q k^T + bias) v

The bias holds ALiBi's slopes where there are some, and hides what lies ahead and what is padding.
Heads that share keys and values (grouped queries) are rows of one product with them.

Source: Vaswani et al. 2017, arXiv:1706.03762; Ainslie et al. 2023, arXiv:2305.13245, for groups.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor


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


def attention_bias(
    attention: Bool[Tensor, "batch seen"],
    *,
    new: int,
    heads: int,
    kv_heads: int,
    slopes: Float[Tensor, " heads"] | None,
    dtype: torch.dtype,
    rounded_to: torch.dtype,
) -> Float[Tensor, "batch_kv group_new seen"]:
    """What is added to the scores of the newest `new` positions: ALiBi's slope times position, and
    where a key is padding or lies ahead a huge negative number; infinity would make a padding
    query's row NaN.

    ALiBi's numbers are rounded to `rounded_to`, the precision in which transformers has them.
    """
    batch, seen = attention.shape
    ahead = torch.ones(new, seen, dtype=torch.bool).triu(seen - new + 1)
    hidden = (ahead | ~attention[:, None, :])[:, None]
    if slopes is None:
        bias = torch.zeros((), dtype=dtype)
    else:
        positions = (attention.cumsum(1) - 1) * attention
        bias = (slopes[:, None] * positions[:, None, :]).to(rounded_to).to(dtype)[:, :, None, :]
    bias = torch.where(hidden, torch.finfo(dtype).min, bias).expand(batch, heads, new, seen)
    return bias.reshape(batch * kv_heads, heads // kv_heads * new, seen)


def attend(
    q: Float[Tensor, "batch heads new size"],
    k: Float[Tensor, "batch kv_heads seen size"],
    v: Float[Tensor, "batch kv_heads seen size"],
    bias: Float[Tensor, "batch_kv group_new seen"],
    scaling: float,
) -> Float[Tensor, "batch heads new size"]:
    """Attention of every query."""
    batch, heads, new, size = q.shape
    kv_heads = k.shape[1]
    queries = q.reshape(batch * kv_heads, heads // kv_heads * new, size)
    keys, values = (x.reshape(batch * kv_heads, -1, size) for x in (k, v))
    mixed = _Attention.apply(queries, keys, values, bias, scaling)
    return mixed.view(batch, heads, new, size)


class _Attention(torch.autograd.Function):
    """With P = softmax(S), S = scaling Q K^T + bias, O = P V.

    The products whose result is as narrow as a head are made as the transposed of it: a batch of
    small products is up to four times faster so, since its rows are then as long as the text.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scaling: float) -> Tensor:
        p = torch.baddbmm(bias, q, k.mT, alpha=scaling).softmax(-1)
        ctx.save_for_backward(q, k, v, p)
        ctx.scaling = scaling
        return torch.bmm(v.mT, p.mT).mT.contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """dV = P^T dO, dP = dO V^T, dS = P (dP - sum(P dP)), dQ = scaling dS K, dK = ... dS^T Q."""
        q, k, v, p = ctx.saved_tensors
        for_p = torch.bmm(grads[0], v.mT)
        for_s = torch._softmax_backward_data(for_p, p, -1, p.dtype).mul_(ctx.scaling)
        for_v = torch.bmm(grads[0].mT, p).mT
        return torch.bmm(k.mT, for_s.mT).mT, torch.bmm(q.mT, for_s).mT, for_v, None, None
