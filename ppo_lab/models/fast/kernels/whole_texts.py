"""Attention over whole texts with its gradient, as Triton kernels that keep no scores.

    P = softmax(S), S = scaling Q K^T + bias       O = P V

Torch's kernel reads the bias, which holds padding, causality and ALiBi, as a matrix for every head.
Here a bias is made where it is needed, blocks ahead of all of their queries are passed over, and
scores live in a program alone; for the gradient each is made again from L = log sum exp S:

    P = exp(S - L)     dV = P^T dO     dS = P (dO V^T - rowsum(dO O)) scaling     dQ = dS K ...

Products are of half precision and summed in float32, as in torch's kernel. Triton comes with
torch's builds for CUDA. This module is imported where it is there alone.

Source: Dao 2023, arXiv:2307.08691; Press et al. 2021, arXiv:2108.12409, for ALiBi.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

# Queries, and keys, of a block.
QUERIES = 64
KEYS = 64


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
        batch, heads, new, size = q.shape
        kv_heads, seen = k.shape[1:3]
        for_mixed = grads[0].contiguous().view(mixed.shape)
        inner = torch.empty_like(sums)
        # As (batch, time, heads, size), which is how products of the layer lie.
        for_q = q.new_empty(batch, new, heads, size)
        for_k, for_v = (q.new_empty(batch, seen, heads, size) for _ in range(2))
        given = (
            q, k, v, for_mixed, sums, inner, real, positions, real if slopes is None else slopes,
        )  # fmt: skip
        strides = (*q.stride(), *k.stride(), *v.stride(), *_by_head(for_mixed))
        shape = _shape(q, k, slopes)
        _backward_of_queries[(triton.cdiv(new, QUERIES) * batch * heads,)](
            *given, mixed, for_q, ctx.scaling, *strides, **shape
        )
        _backward_of_keys[(triton.cdiv(seen, KEYS) * batch * heads,)](
            *given, for_k, for_v, ctx.scaling, *strides, **shape
        )
        if kv_heads < heads:
            for_k, for_v = (x.unflatten(2, (kv_heads, -1)).sum(3) for x in (for_k, for_v))
        slopes_of = (x.transpose(1, 2) for x in (for_q, for_k, for_v))
        return *slopes_of, None, None, None, None


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
def _scores(
    q, k, query, key, real_ptr, positions_ptr, slope, scaling, new, seen, alibi: tl.constexpr
):
    """(queries, keys): scaled scores with their bias, and -inf where a query sees no key."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
    inside = key < seen
    shown = tl.load(real_ptr + key, mask=inside, other=0).to(tl.int1)
    if alibi:
        position = tl.load(positions_ptr + key, mask=inside, other=0.0)
        scores += (slope * position).to(q.dtype).to(tl.float32)[None, :]
    sees = (key[None, :] <= query[:, None] + (seen - new)) & shown[None, :]
    return tl.where(sees, scores, -float("inf"))


@triton.jit
def _p_and_slopes(
    q, k, v, grad, log_total, inner, query, key, real_ptr, positions_ptr, slope, scaling,
    new, seen, alibi: tl.constexpr,
):  # fmt: skip
    """(queries, keys): P = exp(S - L), and dS / scaling = P (dO V^T - rowsum(dO O))."""
    scores = _scores(q, k, query, key, real_ptr, positions_ptr, slope, scaling, new, seen, alibi)
    p = tl.exp(scores - log_total[:, None])
    for_p = tl.dot(grad, tl.trans(v), input_precision="ieee")
    return p, p * (for_p - inner[:, None])


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, mixed_ptr, sums_ptr, real_ptr, positions_ptr, slopes_ptr, scaling,
    q_batch, q_head, q_row, q_one, k_batch, k_head, k_row, k_one, v_batch, v_head, v_row, v_one,
    o_batch, o_head, o_row, o_one,
    new, seen, heads: tl.constexpr, group: tl.constexpr, size: tl.constexpr, width: tl.constexpr,
    alibi: tl.constexpr, queries: tl.constexpr, keys: tl.constexpr,
):  # fmt: skip
    """One block of one head's queries."""
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
    for start in range(0, end, keys):
        key = start + tl.arange(0, keys)
        k = _rows(k_ptr, k_row, start, seen, k_one, size, width, keys)
        v = _rows(v_ptr, v_row, start, seen, v_one, size, width, keys)
        scores = _scores(
            q, k, query, key, real_ptr, positions_ptr, slope, scaling, new, seen, alibi
        )
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        rescale = tl.exp(largest - new_largest)
        terms = tl.exp(scores - new_largest[:, None])
        total = total * rescale + tl.sum(terms, 1)
        product = tl.dot(terms.to(v.dtype), v, input_precision="ieee")
        mixed = mixed * rescale[:, None] + product
        largest = new_largest
    sees = total > 0.0
    mixed = mixed / tl.where(sees, total, 1.0)[:, None]
    _put_rows(
        mixed_ptr + sample * o_batch + head * o_head,
        mixed, o_row, first, new, o_one, size, width, queries,
    )  # fmt: skip
    # Where no key is seen, exp(S - L) is 0 for any L.
    log_total = tl.where(sees, largest + tl.log(tl.where(sees, total, 1.0)), 0.0)
    tl.store(sums_ptr + number * new + query, log_total, mask=query < new)


@triton.jit
def _backward_of_queries(
    q_ptr, k_ptr, v_ptr, grad_ptr, sums_ptr, inner_ptr, real_ptr, positions_ptr, slopes_ptr,
    mixed_ptr, for_q_ptr, scaling,
    q_batch, q_head, q_row, q_one, k_batch, k_head, k_row, k_one, v_batch, v_head, v_row, v_one,
    o_batch, o_head, o_row, o_one,
    new, seen, heads: tl.constexpr, group: tl.constexpr, size: tl.constexpr, width: tl.constexpr,
    alibi: tl.constexpr, queries: tl.constexpr, keys: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of one head's queries: the sum over keys of dS K; and the row sums
    of dO O, which the gradient of the keys needs too.
    """
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
    for start in range(0, end, keys):
        key = start + tl.arange(0, keys)
        k = _rows(k_ptr, k_row, start, seen, k_one, size, width, keys)
        v = _rows(v_ptr, v_row, start, seen, v_one, size, width, keys)
        _, for_s = _p_and_slopes(
            q, k, v, grad, log_total, inner, query, key, real_ptr, positions_ptr, slope, scaling,
            new, seen, alibi,
        )  # fmt: skip
        for_q += tl.dot(for_s.to(k.dtype), k, input_precision="ieee")
    for_q_ptr += (sample * new * heads + head) * size
    _put_rows(for_q_ptr, for_q * scaling, heads * size, first, new, 1, size, width, queries)


@triton.jit
def _backward_of_keys(
    q_ptr, k_ptr, v_ptr, grad_ptr, sums_ptr, inner_ptr, real_ptr, positions_ptr, slopes_ptr,
    for_k_ptr, for_v_ptr, scaling,
    q_batch, q_head, q_row, q_one, k_batch, k_head, k_row, k_one, v_batch, v_head, v_row, v_one,
    o_batch, o_head, o_row, o_one,
    new, seen, heads: tl.constexpr, group: tl.constexpr, size: tl.constexpr, width: tl.constexpr,
    alibi: tl.constexpr, queries: tl.constexpr, keys: tl.constexpr,
):  # fmt: skip
    """The gradients of one block of keys and values, by one head that reads them: the sums over
    queries of dS^T Q and P^T dO.
    """
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
    # The first block with a query that sees one of these keys.
    begin = tl.maximum(start - (seen - new), 0) // queries * queries
    for first in range(begin, new, queries):
        query = first + tl.arange(0, queries)
        q = _rows(q_ptr, q_row, first, new, q_one, size, width, queries)
        grad = _rows(grad_ptr, o_row, first, new, o_one, size, width, queries)
        inside = query < new
        log_total = tl.load(sums_ptr + number * new + query, mask=inside, other=float("inf"))
        inner = tl.load(inner_ptr + number * new + query, mask=inside, other=0.0)
        p, for_s = _p_and_slopes(
            q, k, v, grad, log_total, inner, query, key, real_ptr, positions_ptr, slope, scaling,
            new, seen, alibi,
        )  # fmt: skip
        for_v += tl.dot(tl.trans(p.to(grad.dtype)), grad, input_precision="ieee")
        for_k += tl.dot(tl.trans(for_s.to(q.dtype)), q, input_precision="ieee")
    for_k_ptr += (sample * seen * heads + head) * size
    for_v_ptr += (sample * seen * heads + head) * size
    _put_rows(for_k_ptr, for_k * scaling, heads * size, start, seen, 1, size, width, keys)
    _put_rows(for_v_ptr, for_v, heads * size, start, seen, 1, size, width, keys)
