"""Attention over rectangles of queries, keys and values, by plain products; on a GPU by one kernel.

    softmax(scaling q k^T + bias) v

The bias holds ALiBi's slopes where there are some, and hides what lies ahead and what is padding.
Heads that share keys and values (grouped queries) are rows of one product with them. Many queries
go in blocks of neighbouring columns: of the keys ahead of all of its queries a block reads none,
which spares up to half of the work and of the memory.

Source: Vaswani et al. 2017, arXiv:1706.03762; Ainslie et al. 2023, arXiv:2305.13245, for groups;
    Dao et al. 2022, arXiv:2205.14135, for blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ppo_lab.models.fast.kernels import kernels_for
from ppo_lab.models.fast.products import Linear

# Numbers in a block's scores, 8 MiB in float32: smaller blocks spare more work than they cost only
# on one core. And the fewest columns of a block, below which its products would be too thin.
SCORES = 2**21
COLUMNS = 16

# Heads of a Triton kernel are at most so wide: what a program works in must fit beside itself.
WIDEST = 128

# Heads narrower than this are slow to multiply as they lie.
NARROW = 32


@dataclass(frozen=True)
class Block:
    """Queries of the columns from `first` to before `end`, and what is added to their scores with
    the keys that they see: the first so many of all.
    """

    first: int
    end: int
    bias: Float[Tensor, "batch_kv group_columns keys"]

    @property
    def columns(self) -> slice:
        """Its queries' columns."""
        return slice(self.first, self.end)


class KeysAndValues:
    """Keys and values of the positions seen so far, of every layer, in buffers made once.

    `linears` are the model's linear layers as they were read for the first of those positions.
    """

    def __init__(self, positions: int) -> None:
        """Room for so many positions, prompt included."""
        self.positions = positions
        self.seen = 0
        self.linears: dict[Any, Linear] = {}
        self._layers: list[tuple[Tensor, Tensor]] = []

    def add(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Those of all positions of a layer, these (batch, heads, new, size) the newest."""
        batch, heads, new, size = keys.shape
        if layer == len(self._layers):
            buffers = [keys.new_empty(batch, heads, self.positions, size) for _ in range(2)]
            self._layers.append((buffers[0], buffers[1]))
        all_keys, all_values = (
            buffer.narrow(2, 0, self.seen + new) for buffer in self._layers[layer]
        )
        all_keys.narrow(2, self.seen, new).copy_(keys)
        all_values.narrow(2, self.seen, new).copy_(values)
        return all_keys, all_values

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, blocks: Any, scaling: float
    ) -> Float[Tensor, "batch new heads_size"]:
        """What the newest queries of a layer mix of all values, theirs (batch, heads, new, size)
        included.
        """
        return attend(q, *self.add(layer, k, v), blocks, scaling)


def blocks_of(
    attention: Bool[Tensor, "batch seen"],
    *,
    new: int,
    heads: int,
    kv_heads: int,
    slopes: Float[Tensor, " heads"] | None,
    dtype: torch.dtype,
    rounded_to: torch.dtype,
) -> tuple[Block, ...]:
    """The blocks of the newest `new` positions.

    To the scores are added ALiBi's slope times position, and where a key is padding or lies ahead a
    huge negative number; infinity would make a padding query's row NaN. ALiBi's numbers are rounded
    to `rounded_to`, the precision in which transformers has them.
    """
    batch, seen = attention.shape
    ahead = torch.ones(new, seen, dtype=torch.bool).triu(seen - new + 1)
    alibi = torch.zeros(seen, dtype=dtype)
    if slopes is not None:
        positions = (attention.cumsum(1) - 1) * attention
        alibi = (slopes[:, None] * positions[:, None, :]).to(rounded_to).to(dtype)[:, :, None, :]
    count = max(1, round(new / max(COLUMNS, SCORES // (batch * heads * seen))))
    found = []
    for first, end in pairwise(new * i // count for i in range(count + 1)):
        keys = seen - new + end
        hidden = (ahead[first:end, :keys] | ~attention[:, None, :keys])[:, None]
        bias = torch.where(hidden, torch.finfo(dtype).min, alibi[..., :keys])
        bias = bias.expand(batch, heads, end - first, keys)
        found.append(Block(first, end, bias.reshape(batch * kv_heads, -1, keys)))
    return tuple(found)


def last_columns(blocks: Sequence[Block], first: int) -> tuple[Block, ...]:
    """The same blocks without the queries of the columns before `first`."""
    found = []
    for block in blocks:
        before = max(0, first - block.first)
        if block.first + before < block.end:
            by_column = block.bias.unflatten(1, (-1, block.end - block.first))
            bias = by_column[:, :, before:].flatten(1, 2)
            found.append(Block(block.first + before - first, block.end - first, bias))
    return tuple(found)


def attend(
    q: Float[Tensor, "batch heads new size"],
    k: Float[Tensor, "batch kv_heads seen size"],
    v: Float[Tensor, "batch kv_heads seen size"],
    blocks: Sequence[Block] | Tensor | Shown,
    scaling: float,
) -> Float[Tensor, "batch new heads_size"]:
    """What every query mixes, the heads side by side; of a bias for all, by one kernel."""
    if isinstance(blocks, Shown):
        kernels = kernels_for(q.device)
        assert kernels is not None
        return kernels.attend_texts(q, k, v, blocks.real, blocks.positions, blocks.slopes, scaling)
    if isinstance(blocks, Tensor):
        return by_one_kernel(q, k, v, blocks, scaling)
    if torch.is_grad_enabled():
        return _Attention.apply(q, k, v, blocks, scaling)
    return _attended(q, k, v, blocks, scaling)[0]


def parted(
    fused: Float[Tensor, "batch time outputs"], split: Callable[[Tensor], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """What `split` makes of one product. The gradient of the kernel that takes all of its parts as
    they are is the product's as it lies, where torch's own way would put it together once more.
    """
    return _Parted.apply(fused, split) if torch.is_grad_enabled() else split(fused)


class _Parted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, fused: Tensor, split: Callable[[Tensor], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        parts = split(fused)
        ctx.split, ctx.layout = split, (fused.shape, fused.stride(), fused.storage_offset())
        ctx.layouts = [(part.stride(), part.storage_offset()) for part in parts]
        return parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        one = len({grad.untyped_storage().data_ptr() for grad in grads}) == 1
        if one and [(grad.stride(), grad.storage_offset()) for grad in grads] == ctx.layouts:
            return grads[0].as_strided(*ctx.layout), None
        whole = grads[0].new_empty(ctx.layout[0])
        for part, grad in zip(ctx.split(whole), grads, strict=True):
            part.copy_(grad)
        return whole, None


class _Attention(torch.autograd.Function):
    """With P = softmax(S), S = scaling Q K^T + bias, O = P V, block by block."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block], scaling: float
    ) -> Tensor:
        mixed, kept = _attended(q, k, v, blocks, scaling)
        ctx.save_for_backward(*kept)
        # Not the blocks: their bias would live as long as the graph.
        ctx.columns = [block.columns for block in blocks]
        ctx.scaling, ctx.shapes = scaling, (q.shape, k.shape)
        return mixed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """dV = P^T dO, dP = dO V^T, dS = P (dP - sum(P dP)), dQ = scaling dS K, dK = ... dS^T Q."""
        keys, values, *of_blocks = ctx.saved_tensors
        of_queries, of_keys = ctx.shapes
        batch, heads, new, size = of_queries
        for_mixed = grads[0].view(batch, new, heads, size).transpose(1, 2)
        for_q: list[Tensor] = []
        for_k, for_v = torch.empty(0), torch.empty(0)
        # From the last on, which sees every key.
        newest_first = zip(ctx.columns[::-1], of_blocks[-2::-2], of_blocks[::-2], strict=True)
        for columns, q, p in newest_first:
            seen, of_mixed = p.shape[2], _rows(for_mixed, columns, keys)
            for_p = torch.bmm(of_mixed, values[:, :seen].mT)
            for_s = torch._softmax_backward_data(for_p, p, -1, p.dtype)
            slope = _narrow_product(for_s, keys[:, :seen])
            for_q.insert(0, slope.reshape(batch, heads, -1, size))
            of_k, of_v = _narrow_product(for_s.mT, q), _narrow_product(p.mT, of_mixed)
            if len(for_q) == 1:
                for_k, for_v = of_k, of_v
            else:
                for_k[:, :seen] += of_k
                for_v[:, :seen] += of_v
        slopes = _joined(for_q, 2).mul_(ctx.scaling), for_k.mul_(ctx.scaling).view(of_keys)
        return *slopes, for_v.view(of_keys), None, None


def _attended(
    q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block], scaling: float
) -> tuple[Tensor, list[Tensor]]:
    """What the queries mix; and keys, values and each block's queries and probabilities."""
    batch, heads, _, size = q.shape
    keys, values = k.reshape(-1, *k.shape[2:]), v.reshape(-1, *v.shape[2:])
    mixed, kept = [], [keys, values]
    for block in blocks:
        seen, of_q = block.bias.shape[2], _rows(q, block.columns, keys)
        p = torch.baddbmm(block.bias, of_q, keys[:, :seen].mT, alpha=scaling).softmax(-1)
        out = _narrow_product(p, values[:, :seen])
        mixed.append(out.reshape(batch, heads, -1, size).transpose(1, 2))
        kept += [of_q, p]
    return _joined(mixed, 1).flatten(2), kept


def bias_of(
    real: Bool[Tensor, "batch keys"],
    columns: Int[Tensor, " new"],
    *,
    slopes: Float[Tensor, " heads"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "batch heads_or_one new keys"]:
    """What is added to the scores of the queries in these columns, as in `blocks_of`, at once."""
    ahead = torch.arange(real.shape[1], device=real.device) > columns[:, None]
    hidden = (ahead | ~real[:, None])[:, None]
    if slopes is None:
        return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
    positions = ((real.cumsum(1) - 1) * real)[:, None, None, :]
    alibi = (slopes[:, None, None] * positions).to(dtype)
    shape = (len(real), len(slopes), len(columns), real.shape[1])
    return alibi.expand(shape).masked_fill(hidden, torch.finfo(dtype).min)


@dataclass(frozen=True)
class Shown:
    """What queries see by the kernel that makes its biases itself: real columns up to their own."""

    real: Bool[Tensor, "batch seen"]
    positions: Float[Tensor, "batch seen"]
    slopes: Float[Tensor, " heads"] | None


def shown_of(
    real: Bool[Tensor, "batch seen"],
    *,
    new: int,
    size: int,
    slopes: Float[Tensor, " heads"] | None,
    dtype: torch.dtype,
) -> Shown | Tensor:
    """What the newest `new` columns see, as the kernel taken for heads of `size` wants it."""
    half = dtype in (torch.bfloat16, torch.float16)
    if half and size <= WIDEST and kernels_for(real.device) is not None:
        return Shown(real.contiguous(), ((real.cumsum(1) - 1) * real).float(), slopes)
    seen = real.shape[1]
    columns = torch.arange(seen - new, seen, device=real.device)
    return bias_of(real, columns, slopes=slopes, dtype=dtype)


def avoid_plans_of_attention() -> None:
    """Leave cuDNN's kernel out of torch's choice, in this process.

    For half precision with a mask torch takes it first, and it makes a plan for every new shape:
    about a second each on an H100, where texts of other lengths are other shapes.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def by_one_kernel(
    q: Float[Tensor, "batch heads new size"],
    k: Float[Tensor, "batch kv_heads seen size"],
    v: Float[Tensor, "batch kv_heads seen size"],
    bias: Float[Tensor, "batch heads_or_one new seen"],
    scaling: float,
) -> Float[Tensor, "batch new heads_size"]:
    """`attend` by torch's kernel: on a GPU one for everything, with scores in float32."""
    batch, heads, new, size = q.shape
    kv_heads, group = k.shape[1], heads // k.shape[1]
    if group > 1 and new == 1:
        q = q.reshape(batch, kv_heads, group, size)  # as many queries of one head
    elif group > 1:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scaling)
    return mixed.reshape(batch, heads, new, size).transpose(1, 2).flatten(2)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _rows(x: Tensor, columns: slice, keys: Tensor) -> Float[Tensor, "batch_kv group_columns size"]:
    """These columns of (batch, heads, new, size), heads that share keys together."""
    return x[:, :, columns].reshape(len(keys), -1, x.shape[3])


def _narrow_product(
    a: Float[Tensor, "batch_kv rows inner"], b: Float[Tensor, "batch_kv inner size"]
) -> Float[Tensor, "batch_kv rows size"]:
    """a b, whose rows are as wide as a head. Narrow ones are made as (b^T a^T)^T, up to four times
    faster, since the rows of that are as long as the text.
    """
    return torch.bmm(a, b) if b.shape[2] >= NARROW else torch.bmm(b.mT, a.mT).mT
