"""The proof that a fast road owes before it is taken: on a few tokens, with padding, the hidden
states of transformers' own layers, and the gradients that they give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKENS = 9  # of each of two texts; the second begins with padding

# Gradients of larger weights are not looked at: an embedding's alone would take gigabytes.
LARGEST = 2**24


class Proof:
    """A few tokens and what transformers makes of them."""

    def __init__(
        self,
        by_transformers: Callable[[Tensor, Tensor], Tensor],
        parameters: Iterable[nn.Parameter],
        words: Tensor,
    ) -> None:
        """`by_transformers` gives hidden states of ids and attention; `words` is the embedding."""
        self.ids = (torch.arange(2 * TOKENS, device=words.device).view(2, -1) * 7) % len(words)
        self.attention = torch.ones_like(self.ids, dtype=torch.bool)
        self.attention[1, :3] = False
        self.theirs = by_transformers(self.ids, self.attention)
        trained = [p for p in parameters if p.requires_grad and p.numel() <= LARGEST]
        self.trained = [*trained[:2], *trained[2:][-2:]]
        in_full = words.device.type == "cpu" or torch.get_float32_matmul_precision() == "highest"
        self.exact = self.theirs.dtype == torch.float32 and in_full

    def holds(self, ours: Tensor, columns: list[int] | slice = slice(None)) -> bool:
        """Whether these states, of these columns, are theirs but for rounding."""
        real, theirs = self.attention[:, columns], self.theirs.detach()
        scale = theirs[self.attention].abs().max().clamp(min=1e-6)
        error = (ours.detach() - theirs[:, columns])[real].abs().max() / scale
        return bool(error <= (1e-4 if self.exact else 5e-2))

    def pulls_alike(self, ours: Tensor) -> bool:
        """Whether these states give the first and the last trained weights their gradients."""
        share = 1e-3 if self.exact else 0.1
        pairs = zip(self._gradients(ours), self._gradients(self.theirs), strict=True)
        return all(bool((a - b).norm() <= share * b.norm() + 1e-12) for a, b in pairs)

    def _gradients(self, states: Tensor) -> list[Tensor]:
        if not self.trained:
            return []
        loss = F.softplus(states[self.attention].float()).sum()
        found = torch.autograd.grad(loss, self.trained, allow_unused=True)
        pairs = zip(found, self.trained, strict=True)
        return [(torch.zeros_like(p) if g is None else g).float() for g, p in pairs]
