"""Attention over whole texts with its gradient, as Triton kernels that keep no scores.

    P = softmax(S), S = scaling Q K^T + bias       O = P V

Torch's kernel reads the bias, which holds padding, causality and ALiBi, as a matrix for every head.
Here a bias is made where it is needed, blocks ahead of all of their queries are passed over, and
scores live in a program alone; for the gradient each is made again from L = log sum exp S:

    P = exp(S - L)     dV = P^T dO     dS = P (dO V^T - rowsum(dO O)) scaling     dQ = dS K ...

What takes time is the arithmetic of single scores. So a key's bias, minus infinity where it is
padding, is made for all queries at once; scores are in units of log 2, whose exponential a GPU has;
and which queries a key is ahead of is asked in the blocks alone where there are some. Products are
of half precision and summed in float32, as in torch's kernel. Triton comes with
torch's builds for CUDA. This module is imported where it is there alone.

Source: Dao 2023, arXiv:2307.08691; Press et al. 2021, arXiv:2108.12409, for ALiBi.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

from ppo_lab.models.fast.kernels.early import begin, launched_early

# Queries, and keys, of a block.
QUERIES = 64
KEYS = 64

# A nat in units of log 2.
NAT = tl.constexpr(1.0 / math.log(2.0))


def attend_texts(
    q: Float[Tensor, "batch heads new size"],
    k: Float[Tensor, "batch kv_heads seen size"],
    v: Float[Tensor, "batch kv_heads seen size"],
    real: Bool[Tensor, "batch seen"],
    positions: Float[Tensor, "batch seen"],
    slopes: Float[Tensor, " heads"] | None,
    scaling: float,
) -> Float[Tensor, "batch new heads_size"]:
    """What each query, the newest `new` of all columns, mixes of the real columns up to its own;
    zeros where there is none. ALiBi's bias, slope times the key's position, is rounded to the
    precision of the queries.
    """
    return _Attention.apply(q, k, v, real, positions, slopes, scaling)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        real: Tensor,
        positions: Tensor,
        slopes: Tensor | None,
        scaling: float,
    ) -> Tensor:
        batch, heads, new, size = q.shape
        mixed = torch.empty(batch, new, heads, size, dtype=q.dtype, device=q.device)
        sums = torch.empty(batch, heads, new, dtype=torch.float32, device=q.device)
        _forward[(triton.cdiv(new, QUERIES) * batch * heads,)](
            q, k, v, mixed, sums, real, positions, real if slopes is None else slopes,
            scaling, *q.stride(), *k.stride(), *v.stride(), *_by_head(mixed),
            **_shape(q, k, slopes),
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, mixed, sums, real, positions, slopes)
        ctx.scaling = scaling
        return mixed.flatten(2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mixed, sums, real, positions, slopes = ctx.saved_tensors
        batch, heads, new, _ = q.shape
        kv_heads, seen = k.shape[1:3]
        for_mixed = grads[0].contiguous().view(mixed.shape)
        inner = torch.empty_like(sums)
        for_q, for_k, for_v = _room_for_slopes(q, k, v)
        given = (
            q, k, v, for_mixed, sums, inner, real, positions, real if slopes is None else slopes,
        )  # fmt: skip
        strides = (*q.stride(), *k.stride(), *v.stride(), *_by_head(for_mixed))
        shape = _shape(q, k, slopes)
        _backward_of_queries[(triton.cdiv(new, QUERIES) * batch * heads,)](
            *given, mixed, for_q, ctx.scaling, *strides, *for_q.stride(), **shape
        )
        _backward_of_keys[(triton.cdiv(seen, KEYS) * batch * heads,)](
            *given, for_k, for_v, ctx.scaling, *strides, *for_k.stride(), *for_v.stride(), **shape
        )
        if kv_heads < heads:
            for_k, for_v = (x.unflatten(1, (kv_heads, -1)).sum(2) for x in (for_k, for_v))
        return for_q, for_k, for_v, None, None, None, None


def _room_for_slopes(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Room for their gradients, those of keys and values for every head (batch, heads, time, size).

    Where all are parts of one product, so are these, in the same places; else each is as products
    of the layer lie, (batch, time, heads, size).
    """
    storage, heads = q.untyped_storage(), q.shape[1]
    of_one = all(x.untyped_storage().data_ptr() == storage.data_ptr() for x in (k, v))
    if of_one and k.shape[1] == heads:
        whole = q.new_empty(storage.nbytes() // q.itemsize)
        return [whole.as_strided(x.shape, x.stride(), x.storage_offset()) for x in (q, k, v)]
    shapes = [(len(x), x.shape[2], heads, x.shape[3]) for x in (q, k, v)]
    return [q.new_empty(shape).transpose(1, 2) for shape in shapes]


def _by_head(x: Float[Tensor, "batch time heads size"]) -> tuple[int, ...]:
    """The strides of (batch, heads, time, size)."""
    return x.transpose(1, 2).stride()


def _shape(q: Tensor, k: Tensor, slopes: Tensor | None) -> dict[str, Any]:
    heads, size = q.shape[1], q.shape[3]
    return {
        "new": q.shape[2],
        "seen": k.shape[2],
        "heads": heads,
        "group": heads // k.shape[1],
        "size": size,
        "width": max(16, triton.next_power_of_2(size)),
        "alibi": slopes is not None,
        "queries": QUERIES,
        "keys": KEYS,
        "num_warps": 4,
        "num_stages": 1,
        **launched_early(q.device),
    }


@triton.jit
def _place(columns, step: tl.constexpr):
    """The number of this program's sample and head, and the first column of its block.

    One dimension of programs, since CUDA's others end at 65,535.
    """
    blocks = tl.cdiv(columns, step)
    return (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * step


@triton.jit
def _rows(base_ptr, stride, first, number, one_stride, size, width: tl.constexpr, n: tl.constexpr):
    """(n, width): n rows of a head from `first` on, zeros beyond `number` rows."""
    row, one = first + tl.arange(0, n), tl.arange(0, width)
    at = base_ptr + row[:, None] * stride + one[None, :] * one_stride
    return tl.load(at, mask=(row < number)[:, None] & (one < size)[None, :], other=0.0)


@triton.jit
def _put_rows(
    base_ptr, x, stride, first, number, one_stride, size, width: tl.constexpr, n: tl.constexpr
):
    row, one = first + tl.arange(0, n), tl.arange(0, width)
    at = base_ptr + row[:, None] * stride + one[None, :] * one_stride
    inside = (row < number)[:, None] & (one < size)[None, :]
    tl.store(at, x.to(base_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _biases(real_ptr, positions_ptr, key, slope, seen, dtype: tl.constexpr, alibi: tl.constexpr):
    """(keys,): what is added to the scores of all queries, in units of log 2."""
    shown = tl.load(real_ptr + key, mask=key < seen, other=0).to(tl.int1)
    bias = tl.zeros_like(key).to(tl.float32)
    if alibi:
        position = tl.load(positions_ptr + key, mask=key < seen, other=0.0)
        bias = (slope * position).to(dtype).to(tl.float32) * NAT
    return tl.where(shown, bias, -float("inf"))


@triton.jit
def _unmasked(first, new, seen, keys: tl.constexpr):
    """How many keys, in whole blocks, are ahead of none of the queries from `first` on."""
    return tl.minimum(first + 1 + seen - new, seen) // keys * keys


@triton.jit
def _seen(
    q, k_ptr, v_ptr, real_ptr, positions_ptr, slope, scale, query, start,
    k_row, k_one, v_row, v_one, new, seen, size,
    width: tl.constexpr, alibi: tl.constexpr, keys: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """A block of keys, their values, and what queries score of them, (queries, keys)."""
    key = start + tl.arange(0, keys)
    k = _rows(k_ptr, k_row, start, seen, k_one, size, width, keys)
    v = _rows(v_ptr, v_row, start, seen, v_one, size, width, keys)
    bias = _biases(real_ptr, positions_ptr, key, slope, seen, q.dtype, alibi)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias[None, :]
    if masked:
        ahead = key[None, :] > query[:, None] + (seen - new)
        scores = tl.where(ahead, -float("inf"), scores)
    return k, v, scores


@triton.jit
def _fold(
    largest, total, mixed, q, k_ptr, v_ptr, real_ptr, positions_ptr, slope, scale, query, start,
    k_row, k_one, v_row, v_one, new, seen, size,
    width: tl.constexpr, alibi: tl.constexpr, keys: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """A block of keys taken into running maxima, sums and mixtures of values."""
    _k, v, scores = _seen(
        q, k_ptr, v_ptr, real_ptr, positions_ptr, slope, scale, query, start,
        k_row, k_one, v_row, v_one, new, seen, size, width, alibi, keys, masked,
    )  # fmt: skip
    new_largest = tl.maximum(largest, tl.max(scores, 1))
    rescale = tl.exp2(largest - new_largest)
    terms = tl.exp2(scores - new_largest[:, None])
    total = total * rescale + tl.sum(terms, 1)
    product = tl.dot(terms.to(v.dtype), v, input_precision="ieee")
    return new_largest, total, mixed * rescale[:, None] + product


@triton.jit
def _pull_queries(
    for_q, q, grad, log_total, inner, k_ptr, v_ptr, real_ptr, positions_ptr, slope, scale, query,
    start, k_row, k_one, v_row, v_one, new, seen, size,
    width: tl.constexpr, alibi: tl.constexpr, keys: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of queries with the part of a block of keys."""
    k, v, scores = _seen(
        q, k_ptr, v_ptr, real_ptr, positions_ptr, slope, scale, query, start,
        k_row, k_one, v_row, v_one, new, seen, size, width, alibi, keys, masked,
    )  # fmt: skip
    p = tl.exp2(scores - log_total[:, None])
    for_p = tl.dot(grad, tl.trans(v), input_precision="ieee")
    for_s = p * (for_p - inner[:, None])
    return for_q + tl.dot(for_s.to(k.dtype), k, input_precision="ieee")


@triton.jit
def _pull_keys(
    for_k, for_v, k, v, bias, key, q_ptr, grad_ptr, sums_ptr, inner_ptr, scale, first,
    q_row, q_one, o_row, o_one, new, seen, size,
    width: tl.constexpr, queries: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of keys and of values with the part of a block of queries.

    Scores are (keys, queries) here, so that products take them as they are.
    """
    query = first + tl.arange(0, queries)
    q = _rows(q_ptr, q_row, first, new, q_one, size, width, queries)
    grad = _rows(grad_ptr, o_row, first, new, o_one, size, width, queries)
    log_total = tl.load(sums_ptr + query, mask=query < new, other=float("inf"))
    inner = tl.load(inner_ptr + query, mask=query < new, other=0.0)
    scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale + bias[:, None]
    if masked:
        ahead = key[:, None] > query[None, :] + (seen - new)
        scores = tl.where(ahead, -float("inf"), scores)
    p = tl.exp2(scores - log_total[None, :])
    for_v += tl.dot(p.to(grad.dtype), grad, input_precision="ieee")
    for_p = tl.dot(v, tl.trans(grad), input_precision="ieee")
    for_s = p * (for_p - inner[None, :])
    return for_k + tl.dot(for_s.to(q.dtype), q, input_precision="ieee"), for_v


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, mixed_ptr, sums_ptr, real_ptr, positions_ptr, slopes_ptr, scaling,
    q_batch, q_head, q_row, q_one, k_batch, k_head, k_row, k_one, v_batch, v_head, v_row, v_one,
    o_batch, o_head, o_row, o_one,
    new, seen, heads: tl.constexpr, group: tl.constexpr, size: tl.constexpr, width: tl.constexpr,
    alibi: tl.constexpr, queries: tl.constexpr, keys: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """One block of one head's queries."""
    begin(early)
    number, first = _place(new, queries)
    sample, head = number // heads, number % heads
    query = first + tl.arange(0, queries)
    q_ptr += sample * q_batch + head * q_head
    k_ptr += sample * k_batch + (head // group) * k_head
    v_ptr += sample * v_batch + (head // group) * v_head
    real_ptr += sample * seen
    positions_ptr += sample * seen
    slope = tl.load(slopes_ptr + head).to(tl.float32) if alibi else 0.0
    q = _rows(q_ptr, q_row, first, new, q_one, size, width, queries)
    largest = tl.full((queries,), -1e30, tl.float32)
    total = tl.zeros((queries,), tl.float32)
    mixed = tl.zeros((queries, width), tl.float32)
    end = tl.minimum(seen, first + queries + seen - new)
    unmasked = _unmasked(first, new, seen, keys)
    for start in range(0, unmasked, keys):
        largest, total, mixed = _fold(
            largest, total, mixed, q, k_ptr, v_ptr, real_ptr, positions_ptr, slope, scaling * NAT,
            query, start, k_row, k_one, v_row, v_one, new, seen, size, width, alibi, keys, False,
        )  # fmt: skip
    for start in range(unmasked, end, keys):
        largest, total, mixed = _fold(
            largest, total, mixed, q, k_ptr, v_ptr, real_ptr, positions_ptr, slope, scaling * NAT,
            query, start, k_row, k_one, v_row, v_one, new, seen, size, width, alibi, keys, True,
        )  # fmt: skip
    sees = total > 0.0
    mixed *= (1.0 / tl.where(sees, total, 1.0))[:, None]
    _put_rows(
        mixed_ptr + sample * o_batch + head * o_head,
        mixed, o_row, first, new, o_one, size, width, queries,
    )  # fmt: skip
    # In units of log 2; where no key is seen, exp(S - L) is 0 for any L.
    log_total = tl.where(sees, largest + tl.log2(tl.where(sees, total, 1.0)), 0.0)
    tl.store(sums_ptr + number * new + query, log_total, mask=query < new)


@triton.jit
def _backward_of_queries(
    q_ptr, k_ptr, v_ptr, grad_ptr, sums_ptr, inner_ptr, real_ptr, positions_ptr, slopes_ptr,
    mixed_ptr, for_q_ptr, scaling,
    q_batch, q_head, q_row, q_one, k_batch, k_head, k_row, k_one, v_batch, v_head, v_row, v_one,
    o_batch, o_head, o_row, o_one, dq_batch, dq_head, dq_row, dq_one,
    new, seen, heads: tl.constexpr, group: tl.constexpr, size: tl.constexpr, width: tl.constexpr,
    alibi: tl.constexpr, queries: tl.constexpr, keys: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of one head's queries: the sum over keys of dS K; and the row sums
    of dO O, which the gradient of the keys needs too.
    """
    begin(early)
    number, first = _place(new, queries)
    sample, head = number // heads, number % heads
    query = first + tl.arange(0, queries)
    q_ptr += sample * q_batch + head * q_head
    k_ptr += sample * k_batch + (head // group) * k_head
    v_ptr += sample * v_batch + (head // group) * v_head
    grad_ptr += sample * o_batch + head * o_head
    mixed_ptr += sample * o_batch + head * o_head
    real_ptr += sample * seen
    positions_ptr += sample * seen
    slope = tl.load(slopes_ptr + head).to(tl.float32) if alibi else 0.0
    q = _rows(q_ptr, q_row, first, new, q_one, size, width, queries)
    grad = _rows(grad_ptr, o_row, first, new, o_one, size, width, queries)
    inside = query < new
    log_total = tl.load(sums_ptr + number * new + query, mask=inside, other=float("inf"))
    mixed = _rows(mixed_ptr, o_row, first, new, o_one, size, width, queries)
    inner = tl.sum(grad.to(tl.float32) * mixed.to(tl.float32), 1)
    tl.store(inner_ptr + number * new + query, inner, mask=inside)
    for_q = tl.zeros((queries, width), tl.float32)
    end = tl.minimum(seen, first + queries + seen - new)
    unmasked = _unmasked(first, new, seen, keys)
    for start in range(0, unmasked, keys):
        for_q = _pull_queries(
            for_q, q, grad, log_total, inner, k_ptr, v_ptr, real_ptr, positions_ptr, slope,
            scaling * NAT, query, start, k_row, k_one, v_row, v_one, new, seen, size,
            width, alibi, keys, False,
        )  # fmt: skip
    for start in range(unmasked, end, keys):
        for_q = _pull_queries(
            for_q, q, grad, log_total, inner, k_ptr, v_ptr, real_ptr, positions_ptr, slope,
            scaling * NAT, query, start, k_row, k_one, v_row, v_one, new, seen, size,
            width, alibi, keys, True,
        )  # fmt: skip
    for_q_ptr += sample * dq_batch + head * dq_head
    _put_rows(for_q_ptr, for_q * scaling, dq_row, first, new, dq_one, size, width, queries)


@triton.jit
def _backward_of_keys(
    q_ptr, k_ptr, v_ptr, grad_ptr, sums_ptr, inner_ptr, real_ptr, positions_ptr, slopes_ptr,
    for_k_ptr, for_v_ptr, scaling,
    q_batch, q_head, q_row, q_one, k_batch, k_head, k_row, k_one, v_batch, v_head, v_row, v_one,
    o_batch, o_head, o_row, o_one,
    dk_batch, dk_head, dk_row, dk_one, dv_batch, dv_head, dv_row, dv_one,
    new, seen, heads: tl.constexpr, group: tl.constexpr, size: tl.constexpr, width: tl.constexpr,
    alibi: tl.constexpr, queries: tl.constexpr, keys: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """The gradients of one block of keys and values, by one head that reads them: the sums over
    queries of dS^T Q and P^T dO.
    """
    begin(early)
    number, start = _place(seen, keys)
    sample, head = number // heads, number % heads
    key = start + tl.arange(0, keys)
    q_ptr += sample * q_batch + head * q_head
    k_ptr += sample * k_batch + (head // group) * k_head
    v_ptr += sample * v_batch + (head // group) * v_head
    grad_ptr += sample * o_batch + head * o_head
    real_ptr += sample * seen
    positions_ptr += sample * seen
    slope = tl.load(slopes_ptr + head).to(tl.float32) if alibi else 0.0
    k = _rows(k_ptr, k_row, start, seen, k_one, size, width, keys)
    v = _rows(v_ptr, v_row, start, seen, v_one, size, width, keys)
    for_k = tl.zeros((keys, width), tl.float32)
    for_v = tl.zeros((keys, width), tl.float32)
    bias = _biases(real_ptr, positions_ptr, key, slope, seen, k.dtype, alibi)
    sums_ptr += number * new
    inner_ptr += number * new
    # The first block with a query that sees one of these keys, and the first whose queries see all.
    begun = tl.maximum(start - (seen - new), 0) // queries * queries
    unmasked = tl.cdiv(tl.maximum(start + keys - 1 - (seen - new), 0), queries) * queries
    for first in range(begun, tl.minimum(unmasked, new), queries):
        for_k, for_v = _pull_keys(
            for_k, for_v, k, v, bias, key, q_ptr, grad_ptr, sums_ptr, inner_ptr, scaling * NAT,
            first, q_row, q_one, o_row, o_one, new, seen, size, width, queries, True,
        )  # fmt: skip
    for first in range(tl.maximum(begun, unmasked), new, queries):
        for_k, for_v = _pull_keys(
            for_k, for_v, k, v, bias, key, q_ptr, grad_ptr, sums_ptr, inner_ptr, scaling * NAT,
            first, q_row, q_one, o_row, o_one, new, seen, size, width, queries, False,
        )  # fmt: skip
    for_k_ptr += sample * dk_batch + head * dk_head
    for_v_ptr += sample * dv_batch + head * dv_head
    _put_rows(for_k_ptr, for_k * scaling, dk_row, start, seen, dk_one, size, width, keys)
    _put_rows(for_v_ptr, for_v, dv_row, start, seen, dv_one, size, width, keys)
