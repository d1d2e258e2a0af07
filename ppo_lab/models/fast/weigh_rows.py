"""What `draws` keeps of rows of logits, by two Triton kernels that read each logit once.

In torch's own operations a row of a large vocabulary is read and written ten times, in float32,
which on a GPU takes longer than the product that makes it. Here the products are read as they are,
in half precision where they are in it, first for the largest, then for all sums.

Triton comes with torch's builds for CUDA. This module is imported where it is there alone.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from ppo_lab.models.choice import FAN

# Logits, and parents of FAN logits, of one program.
CHUNK = 4096
PARENTS = 256


def weigh_rows(
    products: Float[Tensor, "batch vocab"], scale: float
) -> tuple[
    Float[Tensor, " batch"],
    Float[Tensor, "batch blocks"],
    Float[Tensor, "batch blocks"],
    Float[Tensor, "batch parents"],
]:
    """Of z = scale * products: the largest; of e = exp(z - largest) the sums of e and of e z over
    blocks, and the sums over the FAN children of each parent.
    """
    batch, vocab = products.shape
    parents = -(-vocab // FAN)
    chunks, blocks = triton.cdiv(vocab, CHUNK), triton.cdiv(parents, PARENTS)
    empty = partial(torch.empty, dtype=torch.float32, device=products.device)
    largest_of = empty((batch, chunks))
    _largest[(batch, chunks)](products, products.stride(0), largest_of, vocab, scale, chunk=CHUNK)
    largest = largest_of.amax(1)
    totals, means = empty((batch, blocks)), empty((batch, blocks))
    sums = empty((batch, parents))
    _weigh[(batch, blocks)](
        products, products.stride(0), largest, totals, means, sums, vocab, parents, scale,
        fan=FAN, size=PARENTS,
    )  # fmt: skip
    return largest, totals, means, sums


@triton.jit
def _largest(products_ptr, row_stride, largest_ptr, vocab, scale, chunk: tl.constexpr):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = part * chunk + tl.arange(0, chunk)
    z = tl.load(products_ptr + row * row_stride + column, mask=column < vocab, other=-float("inf"))
    largest = tl.max(z.to(tl.float32) * scale, 0)
    tl.store(largest_ptr + row * tl.num_programs(1) + part, largest)


@triton.jit
def _weigh(
    products_ptr, row_stride, largest_ptr, totals_ptr, means_ptr, sums_ptr, vocab, parents, scale,
    fan: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    """The parents of one block: the children of parent p are p, p + parents, p + 2 parents, ..."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    parent = part * size + tl.arange(0, size)
    column = parent[None, :] + parents * tl.arange(0, fan)[:, None]
    real = (parent < parents)[None, :] & (column < vocab)
    z = tl.load(products_ptr + row * row_stride + column, mask=real, other=0.0)
    z = z.to(tl.float32) * scale
    term = tl.exp(tl.maximum(z - tl.load(largest_ptr + row), -80.0))
    term = tl.where(real & (term > 2e-35), term, 0.0)
    sums = tl.sum(term, 0)
    tl.store(sums_ptr + row * parents + parent, sums, mask=parent < parents)
    at = row * tl.num_programs(1) + part
    tl.store(totals_ptr + at, tl.sum(sums, 0))
    tl.store(means_ptr + at, tl.sum(tl.sum(term * z, 0), 0))
