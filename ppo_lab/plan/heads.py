"""What the output head takes, on this machine: seconds and bytes of logits, draws and log-probs.

Seconds go with the vocabulary and with the number of tokens, so that a slice of the vocabulary and
some of the tokens tell them. Bytes depend on the road that the log-probs take, and that on
vocabulary and tokens alone, so that a head of few columns tells them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppo_lab.models.choice import LEVELS
from ppo_lab.models.fast.draws import draw_from
from ppo_lab.models.fast.sweep import Curve, swept_twice
from ppo_lab.models.logprobs import Head, token_full_kl, token_logprobs, walks_twice
from ppo_lab.plan.machine import seconds_of
from ppo_lab.plan.trace import tracked

# Entries of a slice of the vocabulary, and products, that are measured at most.
SLICE = 2**14
MOST_FLOPS = 8e9
MOST_DRAWN = 2**22

FEW_COLUMNS = 8


@dataclass(frozen=True)
class HeadShape:
    """A head, whether it is trained itself, and where it is to be measured."""

    vocabulary: int
    hidden: int
    trained: bool
    dtype: torch.dtype
    device: str = "cpu"


def sampling_seconds(head: HeadShape, rows: int) -> float:
    """Seconds of the logits of so many rows, and of drawing a token for each."""
    weight, hidden = _slice(head, rows)
    whole = Head(weight)
    with torch.no_grad():
        logits = seconds_of(lambda: whole.logits(hidden)) * head.vocabulary / len(weight)
        some = max(1, min(rows, MOST_DRAWN // head.vocabulary))
        z = torch.randn(some, head.vocabulary, device=head.device)
        uniforms = _uniforms(head, some)
        return logits + seconds_of(lambda: draw_from(z, uniforms)) * rows / some


def logprob_seconds(head: HeadShape, tokens: int, *, gradients: bool) -> float:
    """Seconds of the log-probs of so many tokens, and of their gradients."""
    columns = min(head.vocabulary, SLICE)
    some = max(1, min(tokens, int(MOST_FLOPS / (6 * columns * head.hidden))))
    weight, hidden = _slice(head, some)
    weight.requires_grad_(gradients and head.trained)
    hidden.requires_grad_(gradients)
    targets = torch.arange(some, device=head.device) % columns
    whole = Head(torch.empty(head.vocabulary, 0, device="meta"))
    twice = gradients and head.trained and walks_twice(whole, tokens)

    def work() -> None:
        with torch.set_grad_enabled(gradients):
            found = (_twice if twice else _any_road)(hidden, Head(weight), targets)
            if gradients:
                found.backward(torch.ones_like(found))
                weight.grad = hidden.grad = None

    return seconds_of(work) * head.vocabulary / columns * tokens / some


@torch.no_grad()
def full_kl_seconds(head: HeadShape, tokens: int) -> float:
    """Seconds of the exact KL of so many tokens, the logits of policy and reference included."""
    columns = min(head.vocabulary, SLICE)
    some = max(1, min(tokens, int(MOST_FLOPS / (4 * columns * head.hidden))))
    weight, hidden = _slice(head, some)
    whole = Head(weight)
    seconds = seconds_of(lambda: token_full_kl(hidden, hidden, whole, whole, temperature=1.0))
    return seconds * head.vocabulary / columns * tokens / some


def logprob_bytes(head: HeadShape, tokens: int, *, gradients: bool) -> int:
    """The most that log-probs of so many tokens hold, the head's own gradient left out."""
    weight = torch.zeros(head.vocabulary, FEW_COLUMNS, dtype=head.dtype, device=head.device)
    weight.requires_grad_(gradients and head.trained)
    hidden = torch.zeros(tokens, FEW_COLUMNS, requires_grad=gradients, device=head.device)
    targets = torch.zeros(tokens, dtype=torch.long, device=head.device)
    tracker = tracked()
    with torch.set_grad_enabled(gradients), tracker as live:
        found = _any_road(hidden, Head(weight), targets)
        if gradients:
            found.backward(torch.ones_like(found))
    own = [t.grad for t in (weight, hidden) if t.grad is not None]
    states = 3 * tokens * (head.hidden - FEW_COLUMNS) * hidden.element_size()
    return live.peak(without=tracker.names(own)) + states


def sampling_bytes(head: HeadShape, rows: int) -> int:
    """The most that drawing a token for each row holds, logits included."""
    at: Any = {"dtype": head.dtype, "device": head.device}
    hidden, uniforms = torch.zeros(rows, FEW_COLUMNS, **at), _uniforms(head, rows)
    whole = Head(torch.zeros(head.vocabulary, FEW_COLUMNS, **at))
    with torch.no_grad(), tracked() as live:
        draw_from(whole.logits(hidden), uniforms)
    return live.peak()


def _slice(head: HeadShape, rows: int) -> tuple[Tensor, Tensor]:
    """A part of the head's weight, and hidden states: small numbers, and no two rows alike."""
    block = torch.randn(256, head.hidden, device=head.device) * 0.02
    columns = min(head.vocabulary, SLICE)
    weight = block.repeat(-(-columns // 256), 1)[:columns].to(head.dtype)
    return weight, torch.randn(rows, head.hidden, device=head.device)


def _uniforms(head: HeadShape, rows: int) -> Tensor:
    return torch.full((rows, LEVELS), 0.5, dtype=torch.float64, device=head.device)


def _any_road(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    return token_logprobs(hidden, head, targets, temperature=1.0)[0]


def _twice(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    found = swept_twice(hidden, head.weight, None, targets, Curve())
    assert found is not None  # by `_slice` no logit is large
    return found[0]
