"""Where the real tokens of a rectangle lie, and the way from the rectangle to those rows and back.

Through products and norms real tokens go alone, one after the other whatever sample they are of;
attention alone sees them as rectangles. Every way is a plain selection of rows, and so is its
gradient: much faster on a CPU than torch's own scatter.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Rows of the matrix products come in multiples of this: kernels are compiled for each number of
# rows that they meet, and like such ones.
ROWS = 32

# Below this product of padding's share and the hidden states' width, moving rows about costs more
# than computing on padding.
WORTH_LEAVING_OUT = 12.0


class Places:
    """The real tokens of a (batch, time) rectangle, as rows.

    Some padding is kept with them, so that their number is a multiple of ROWS; all of it where that
    takes all, or where it is little and rows of `width` numbers are short. `rows` are their places
    in the rectangle; `numbers` gives each place its row, and `len(rows)` to those without.
    """

    def __init__(self, real: Bool[Tensor, "batch time"], *, width: int) -> None:
        self.real, self.width = real, width
        padding, all_places = int((~real).sum()), real.numel()
        little = padding / all_places * width < WORTH_LEAVING_OUT
        self.all_kept = little or padding <= -(all_places - padding) % ROWS
        self.rows: Int[Tensor, " kept"]
        self.numbers: Int[Tensor, " all"]
        if self.all_kept:
            self.rows = self.numbers = torch.arange(all_places, device=real.device)
        else:
            kept = _with_some_padding(real)
            self.rows = kept.nonzero().squeeze(1)
            self.numbers = torch.where(kept, kept.cumsum(0) - 1, len(self.rows))

    def take(self, rectangle: Tensor) -> Tensor:
        """Those kept of (batch, time) numbers that carry no gradient."""
        flat = rectangle.flatten()
        return flat if self.all_kept else flat[self.rows]

    def spread(self, rows: Float[Tensor, "kept width"]) -> Float[Tensor, "all width"]:
        """The rows at their places in the rectangle; elsewhere numbers without meaning."""
        if self.all_kept:
            return rows
        return _Move.apply(rows, self.numbers.clamp(max=len(self.rows) - 1), self.rows, False)

    def gather(self, rectangle: Float[Tensor, "all width"]) -> Float[Tensor, "kept width"]:
        """The rows that are kept of the rectangle."""
        return rectangle if self.all_kept else _Move.apply(rectangle, self.rows, self.numbers, True)


class Everywhere(Places):
    """All places of a rectangle, padding included, found without a look at it."""

    def __init__(self, rectangle: Tensor) -> None:
        self.real, self.all_kept = rectangle, True


class LastColumns:
    """The last columns of a rectangle: their own places, and the way from its rows to theirs."""

    def __init__(self, whole: Places, columns: int) -> None:
        time = whole.real.shape[1]
        self.columns, self.places = (
            columns,
            Places(whole.real[:, time - columns :], width=whole.width),
        )
        kept = self.places.rows
        numbers = whole.numbers[kept // columns * time + kept % columns + time - columns]
        # Padding that is kept here alone takes any row; that row's gradient does not come from it.
        self._there = numbers.clamp(max=len(whole.rows) - 1)
        back = torch.full((len(whole.rows) + 1,), len(kept))
        self._back = back.index_copy_(0, numbers, torch.arange(len(kept)))[:-1]

    def pick(self, rows: Float[Tensor, "kept width"]) -> Float[Tensor, "columns_kept width"]:
        """Of the rows of the whole those that are kept of the last columns."""
        return _Move.apply(rows, self._there, self._back, True)


class _Move(torch.autograd.Function):
    """Rows selected by their numbers; for the gradient, by the numbers that lead back.

    With `some_lost`, a number equal to the length of what is selected from stands for a row of
    zeros on the way back.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, there: Tensor, back: Tensor, some_lost: bool) -> Tensor:
        ctx.back, ctx.some_lost = back, some_lost
        return rows.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grads[0]
        if ctx.some_lost:
            grad = torch.cat([grad, grad.new_zeros(1, grad.shape[1])])
        return grad.index_select(0, ctx.back), None, None, None


def _with_some_padding(real: Bool[Tensor, "batch time"]) -> Bool[Tensor, " all"]:
    """The real tokens, and as much padding as makes their number a multiple of ROWS."""
    kept = real.flatten().clone()
    padding = (~kept).nonzero().squeeze(1)
    kept[padding[: -int(kept.sum()) % ROWS]] = True
    return kept
