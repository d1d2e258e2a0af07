"""One token a row from its logits, by two Triton kernels: `draws` for a GPU.

In torch's own operations a row of a large vocabulary is read and written ten times, in float32, and
its tree of sums is walked by some fifty small ones; on a GPU that takes longer than the product
that makes the logits. Here products are read once, as they are, in half precision where they are in
it: each program takes exponentials of its block from the largest there. Then one program a row
brings all blocks to the largest of all, and walks down the tree.

Triton comes with torch's builds for CUDA. This module is imported where it is there alone.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from ppo_lab.models.choice import FAN, LEVELS

# Parents of FAN logits of one program; parents of FAN sums that are made at once.
PARENTS = 1024
NODES = 512

# No block's largest is lower; minus infinity would not be a number when it is subtracted from
# itself.
LOWEST = tl.constexpr(-1e30)


def draw_rows(
    products: Float[Tensor, "batch vocab"], uniforms: Float[Tensor, "batch levels"], scale: float
) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Tokens from softmax(z), z = scale * products, at uniform numbers in float64, one a level of
    `choice`'s tree; their log-probabilities; the rows' entropies in nats.
    """
    batch, vocab = products.shape
    sizes = [-(-vocab // FAN)]
    while len(sizes) == 1 or sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // FAN))
    assert len(sizes) <= LEVELS <= uniforms.shape[1], "more choices than the tree has levels for"
    blocks = triton.cdiv(sizes[0], PARENTS)
    empty = partial(torch.empty, dtype=torch.float32, device=products.device)
    parts, sums = empty((3, batch, blocks)), empty((batch, sizes[0]))
    tree, found = empty((batch, sum(sizes[1:]))), empty((2, batch))
    tokens = torch.empty(batch, dtype=torch.long, device=products.device)
    row = products.stride(0)
    _weigh[(batch, blocks)](
        products, row, parts, sums, vocab, sizes[0], scale, fan=FAN, size=PARENTS,
    )  # fmt: skip
    _walk[(batch,)](
        products, row, uniforms, uniforms.stride(0), parts, sums, tree, tokens, found,
        vocab, scale, blocks, tree.shape[1], *sizes, *[0] * (LEVELS - len(sizes)),
        steps=len(sizes) - 1, fan=FAN, size=PARENTS, nodes=NODES,
        most_blocks=triton.next_power_of_2(blocks),
    )  # fmt: skip
    return tokens, found[0], found[1]


@triton.jit
def _term(z, largest):
    """The exponential, 0 below 2e-35 as in `draws`."""
    term = tl.exp(tl.maximum(z - largest, -80.0))
    return tl.where(term > 2e-35, term, 0.0)


@triton.jit
def _weigh(
    products_ptr, row_stride, parts_ptr, sums_ptr, vocab, parents, scale,
    fan: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    """The parents of one block: the children of parent p are p, p + parents, p + 2 parents, ...

    Of the block as a whole: the largest, and from it the sums of e and of e z.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    parent = part * size + tl.arange(0, size)
    column = parent[None, :] + parents * tl.arange(0, fan)[:, None]
    real = (parent < parents)[None, :] & (column < vocab)
    z = tl.load(products_ptr + row * row_stride + column, mask=real, other=-float("inf"))
    z = z.to(tl.float32) * scale
    largest = tl.maximum(tl.max(tl.max(z, 0), 0), LOWEST)
    term = tl.where(real, _term(z, largest), 0.0)
    sums = tl.sum(term, 0)
    tl.store(sums_ptr + row * parents + parent, sums, mask=parent < parents)
    blocks, rows = tl.num_programs(1), tl.num_programs(0)
    at = parts_ptr + row * blocks + part
    tl.store(at, largest)
    tl.store(at + rows * blocks, tl.sum(sums, 0))
    products = term * tl.where(term > 0.0, z, 0.0)
    tl.store(at + 2 * rows * blocks, tl.sum(tl.sum(products, 0), 0))


@triton.jit
def _walk(
    products_ptr, row_stride, uniforms_ptr, uniforms_stride, parts_ptr, sums_ptr,
    tree_ptr, tokens_ptr, found_ptr, vocab, scale, blocks, tree_stride,
    n0, n1, n2, n3, n4,
    steps: tl.constexpr, fan: tl.constexpr, size: tl.constexpr, nodes: tl.constexpr,
    most_blocks: tl.constexpr,
):  # fmt: skip
    """One row. Level 0 of the tree are the sums, of n0 nodes; level i, of n_i, sums level i - 1."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    part = tl.arange(0, most_blocks)
    there, factors = part < blocks, parts_ptr + row * blocks
    of_blocks = tl.load(factors + part, mask=there, other=LOWEST)
    largest = tl.max(of_blocks, 0)
    factor = tl.exp(of_blocks - largest)
    total = tl.load(factors + rows * blocks + part, mask=there, other=0.0) * factor
    total = tl.sum(total.to(tl.float64), 0)
    mean = tl.load(factors + 2 * rows * blocks + part, mask=there, other=0.0) * factor
    mean = tl.sum(mean, 0)
    tl.debug_barrier()  # before factors take the place of what another thread reads
    tl.store(factors + part, factor, mask=there)
    tl.debug_barrier()

    level0 = sums_ptr + row * n0
    level1 = tree_ptr + row * tree_stride
    level2, level3 = level1 + n1, level1 + n1 + n2
    if steps > 1:
        _sum_children(level0, n0, level1, n1, factors, fan, size, nodes)
    if steps > 2:
        _sum_children(level1, n1, level2, n2, factors, fan, 0, nodes)
    if steps > 3:
        _sum_children(level2, n2, level3, n3, factors, fan, 0, nodes)
    number, node = uniforms_ptr + row * uniforms_stride, 0
    if steps > 3:
        node = _child(level3, n3, n4, node, tl.load(number + steps - 4), factors, fan, 0)
    if steps > 2:
        node = _child(level2, n2, n3, node, tl.load(number + steps - 3), factors, fan, 0)
    if steps > 1:
        node = _child(level1, n1, n2, node, tl.load(number + steps - 2), factors, fan, 0)
    node = _child(level0, n0, n1, node, tl.load(number + steps - 1), factors, fan, size)

    column = node + n0 * tl.arange(0, fan)
    real = column < vocab
    z = tl.load(products_ptr + row * row_stride + column, mask=real, other=0.0)
    z = z.to(tl.float32) * scale
    terms = tl.where(real, _term(z, largest), 0.0)
    chosen = _which(terms, tl.load(number + steps))

    log_total = largest + tl.log(total).to(tl.float32)
    z_chosen = tl.sum(tl.where(tl.arange(0, fan) == chosen, z, 0.0), 0)
    tl.store(tokens_ptr + row, node + n0 * chosen)
    tl.store(found_ptr + row, z_chosen - log_total)
    tl.store(found_ptr + rows + row, log_total - mean / total.to(tl.float32))


@triton.jit
def _sum_children(
    from_ptr, n, to_ptr, parents, factors_ptr,
    fan: tl.constexpr, size: tl.constexpr, nodes: tl.constexpr,
):  # fmt: skip
    for start in range(0, parents, nodes):
        parent = start + tl.arange(0, nodes)
        column = parent[None, :] + parents * tl.arange(0, fan)[:, None]
        real = (parent < parents)[None, :] & (column < n)
        sums = tl.sum(_weights(from_ptr, column, real, factors_ptr, size), 0)
        tl.store(to_ptr + parent, sums, mask=parent < parents)
    tl.debug_barrier()  # others read what this thread wrote


@triton.jit
def _child(
    level_ptr, n, parents, node, uniform, factors_ptr, fan: tl.constexpr, size: tl.constexpr
):
    """The child of a node, by its number in its own level."""
    column = node + parents * tl.arange(0, fan)
    weights = _weights(level_ptr, column, column < n, factors_ptr, size)
    return node + parents * _which(weights, uniform)


@triton.jit
def _weights(level_ptr, column, real, factors_ptr, size: tl.constexpr):
    """Nodes of a level; those of level 0, in blocks of `size`, as from the largest of all."""
    weights = tl.load(level_ptr + column, mask=real, other=0.0)
    if size > 0:
        weights *= tl.load(factors_ptr + column // size, mask=real, other=0.0)
    return weights


@triton.jit
def _which(weights, uniform):
    """As `choice.child`: in whose part of the sum the number falls."""
    sums = tl.cumsum(weights.to(tl.float64), 0)
    total = tl.max(sums, 0)
    found = tl.sum((sums <= uniform * total).to(tl.int32), 0)
    return tl.minimum(found, tl.sum((sums < total).to(tl.int32), 0))
