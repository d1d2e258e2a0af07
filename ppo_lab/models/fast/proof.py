"""The proofs that a fast road owes before it is taken: on a few tokens, with padding, the hidden
states of transformers' own layers, and the gradients that they give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppo_lab.models.choice import LEVELS
from ppo_lab.models.fast.attention import KeysAndValues
from ppo_lab.models.fast.decoder import FastDecoder
from ppo_lab.models.fast.graphed import WORTH_RECORDING, Graphed
from ppo_lab.models.fast.kernels import kernels_for

TOKENS = 9  # of each of two texts; the second begins with padding
ROOM = TOKENS + WORTH_RECORDING

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
        # Not the first ids: those of padding may stand for zeros, whose norms have no slope.
        ids = torch.arange(2 * TOKENS, device=words.device).view(2, -1) * 7 + 11
        self.ids = ids % len(words)
        self.attention = torch.ones_like(self.ids, dtype=torch.bool)
        self.attention[1, :3] = False
        with torch.enable_grad():
            self.theirs = by_transformers(self.ids, self.attention)
        trained = [p for p in parameters if p.requires_grad and p.numel() <= LARGEST]
        self.trained = [*trained[:2], *trained[2:][-2:]]
        in_full = words.device.type == "cpu" or torch.get_float32_matmul_precision() == "highest"
        self.exact = self.theirs.dtype == torch.float32 and in_full

    @torch.no_grad()
    def of_passes(self, fast: FastDecoder) -> bool:
        """Whether they give transformers' hidden states, at once and continued from a cache."""
        ids, attention, cache = self.ids, self.attention, KeysAndValues(TOKENS)
        first = fast.hidden(ids[:, :6], attention[:, :6], cache)
        by_parts = torch.cat([first, fast.hidden(ids[:, 6:], attention, cache, last=2)], 1)
        columns = [0, 1, 2, 3, 4, 5, TOKENS - 2, TOKENS - 1]
        return self._holds(fast.hidden(ids, attention)) and self._holds(by_parts, columns)

    @torch.enable_grad()
    def of_learning(self, fast: FastDecoder) -> bool:
        """Whether passes give transformers' hidden states and gradients."""
        ours = fast.hidden(self.ids, self.attention)
        return self._holds(ours) and self._pulls_alike(ours)

    def of_decoding(self, made: Graphed) -> bool:
        """Whether a generation with room for `ROOM` positions gives transformers' hidden states."""
        parts = [(0, 4), *((i, i + 1) for i in range(4, TOKENS))]
        found = [made.newest(self.ids[:, a:b], self.attention[:, :b], _alone)[0] for a, b in parts]
        return self._holds(torch.stack(found, 1), list(range(3, TOKENS)))

    def _holds(self, ours: Tensor, columns: list[int] | slice = slice(None)) -> bool:
        """Whether these states, of these columns, are theirs but for rounding."""
        real, theirs = self.attention[:, columns], self.theirs.detach()
        scale = theirs[self.attention].abs().max().clamp(min=1e-6)
        error = (ours.detach() - theirs[:, columns])[real].abs().max() / scale
        return bool(error <= (1e-4 if self.exact else 5e-2))

    def _pulls_alike(self, ours: Tensor) -> bool:
        """Whether these states give the first and the last trained weights their gradients."""
        share = 1e-3 if self.exact else 0.25  # transformers' own are as far from exact ones
        pairs = zip(self._gradients(ours), self._gradients(self.theirs), strict=True)
        return all(bool((a - b).norm() <= share * b.norm() + 1e-12) for a, b in pairs)

    def _gradients(self, states: Tensor) -> list[Tensor]:
        if not self.trained:
            return []
        loss = F.softplus(states[self.attention].float()).sum()
        found = torch.autograd.grad(loss, self.trained, allow_unused=True)
        pairs = zip(found, self.trained, strict=True)
        return [(torch.zeros_like(p) if g is None else g).float() for g, p in pairs]


def _alone(states: Tensor) -> tuple[Tensor, ...]:
    return (states,)


@torch.enable_grad()
def prove_draws(head: Any) -> bool:
    """Whether the kernels that walk through a head's vocabulary give what its logits do: tokens,
    log-probabilities, entropies, gradients. `head` is a `logprobs.Head`.
    """
    kernels, weight = kernels_for(head.weight.device), head.weight.detach()
    if kernels is None or head.softcap:
        return True
    bias = None if head.bias is None else head.bias.detach()
    # The states of tokens that the model has words for, as far from one another as any.
    states = weight[:: max(1, len(weight) // TOKENS)][:TOKENS].clone().requires_grad_()
    products = F.linear(states, weight, bias)
    uniforms = torch.arange(len(states), device=weight.device).double() / len(states)
    uniforms = uniforms[:, None].expand(-1, LEVELS).contiguous()
    tokens, logprobs, entropies = kernels.draw_rows(products.detach(), uniforms, head.scale)
    log_p = (products.float() * head.scale).log_softmax(1)
    chosen = log_p.gather(1, tokens[:, None])[:, 0]
    swept = kernels.sweep_rows(states, weight, bias, tokens, head.scale)
    pairs = [(logprobs, chosen), (swept, chosen), (entropies, -(log_p.exp() * log_p).sum(1))]
    rounding = torch.finfo(products.dtype).eps * float(products.detach().abs().max()) * head.scale
    close = all(bool(((a - b).abs() <= 4.0 * rounding + 1e-3).all()) for a, b in pairs)
    ours, theirs = (
        torch.autograd.grad(x.sum(), states, retain_graph=True)[0].float() for x in (swept, chosen)
    )
    return close and bool((ours - theirs).norm() <= 0.1 * theirs.norm() + 1e-6)
