"""FLOPs and bytes of an iteration, counted from the policy's sizes: what the planner, the
benchmark's floor and the metric `mfu` go by.

With M weights of the trunk's matrices, A of the adapter, H of the head, q the width of all layers'
queries; N tokens that pass through the trunk, P pairs of a query and a key, R response tokens:

    forward   2 (M + A) N + 4 q P + 2 H R
    backward  2 M N + 4 A N + 8 q P + 2 H R            to the activations, and of the adapter
              + 2 M' N + 2 H' R                        M', H' the weights trained among M and H

Backward, M and q are those of the layers from the first trained one on. A multiplication with the
addition after it counts as two. Norms, activations and embeddings are left out, and so are scans of
layers with a state and what is computed again to save memory, unless it is asked for; a window of
attention counts as the whole.

Source: Kaplan et al. 2020, arXiv:2001.08361, section 2.1; Chowdhery et al. 2022, arXiv:2204.02311,
    appendix B, for what counts towards utilisation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ppo_lab.plan.architecture import Architecture

# Bytes that Adam reads and writes a weight in float32: weight, gradient and both moments read, all
# but the gradient written; and the gradient's norm before it.
ADAM_BYTES = 32

# Bytes that the exact KL reads and writes an entry of the vocabulary, in float32: both heads'
# logits and their division by the temperature (6), both softmaxes (6), and what is made of them.
FULL_KL_BYTES = 4 * (6 + 6 + 9)


@dataclass(frozen=True)
class Work:
    """FLOPs, and the fewest bytes that pass between memory and processor."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.bytes * times)


class Amount(NamedTuple):
    """Tokens that pass through the trunk, pairs that attention looks at, response tokens."""

    tokens: int
    pairs: int
    scored: int

    @classmethod
    def of(cls, rows: Iterable[tuple[int, int]]) -> Amount:
        """Of rows, given as (prompt tokens, response tokens)."""
        seen = [(prompt + response - 1, response) for prompt, response in rows]
        return cls(
            sum(n for n, _ in seen),
            sum(n * (n + 1) // 2 for n, _ in seen),
            sum(response for _, response in seen),
        )


def forward_flops(
    of: Architecture, amount: Amount, *, adapter: bool = True, share: float = 1.0
) -> float:
    """One pass through trunk and head; `adapter` is off in the reference of a LoRA run, `share` is
    that of the layers that are passed.
    """
    matrices = share * of.matrices + (of.adapter if adapter else 0)
    attention = 4 * share * of.queries * amount.pairs
    return 2 * matrices * amount.tokens + attention + 2 * of.head * amount.scored


def backward_flops(of: Architecture, amount: Amount) -> float:
    """The gradients of what is trained, after one pass."""
    to_activations = of.reached_share * (
        2 * of.matrices * amount.tokens + 8 * of.queries * amount.pairs
    )
    to_weights = (4 * of.adapter + 2 * of.trained_matrices) * amount.tokens
    head = 2 * of.head * amount.scored
    return to_activations + to_weights + (2 * head if of.head_trained else head)


def learning_flops(of: Architecture, amount: Amount, *, share: float = 1.0) -> float:
    """One pass forward and backward; `share` as in `forward_flops`."""
    return forward_flops(of, amount, share=share) + backward_flops(of, amount)


def iteration_flops(
    of: Architecture, amount: Amount, *, epochs: int, cached: bool = False
) -> float:
    """One PPO iteration: sampling, the reference, and `epochs` passes forward and backward.

    Sampling passes every token once, and gives log-probs and values; responses from elsewhere cost
    the same pass. With `cached` the layers below the first trained one are passed once more, for
    reference and epochs together.
    """
    share = of.reached_share if cached else 1.0
    once = forward_flops(of, amount._replace(scored=0), adapter=False, share=1.0 - share)
    reference = forward_flops(of, amount, adapter=of.has_own_reference, share=share)
    learning = learning_flops(of, amount, share=share)
    return forward_flops(of, amount) + once + reference + epochs * learning


def full_kl_flops(of: Architecture, amount: Amount, *, cached: bool = False) -> float:
    """The exact KL: a pass of its own of policy and reference each, to the logits of both; `cached`
    as in `iteration_flops`.
    """
    share = of.reached_share if cached else 1.0
    reference = forward_flops(of, amount, adapter=of.has_own_reference, share=share)
    return forward_flops(of, amount, share=share) + reference


def generate(of: Architecture, rows: Sequence[tuple[int, int]], *, chunks: int = 1) -> Work:
    """Sampling: each step reads all weights, and the keys and values of what it has seen."""
    steps = max(response for _, response in rows)
    weights = (of.matrices + of.adapter + of.head) * of.bytes_per_weight
    cached = sum(
        (prompt + position) * of.cached * of.bytes_per_weight
        for prompt, response in rows
        for position in range(1, response)
    )
    return Work(forward_flops(of, Amount.of(rows)), chunks * steps * weights + cached)


def reference(of: Architecture, rows: Sequence[tuple[int, int]], *, passes: int = 1) -> Work:
    """The reference's log-probs of the responses; what updates keep of it costs nothing more."""
    weights = (of.matrices + of.head) * of.bytes_per_weight
    flops = forward_flops(of, Amount.of(rows), adapter=of.has_own_reference)
    return Work(flops, passes * weights)


def full_kl(
    of: Architecture, rows: Sequence[tuple[int, int]], *, passes: int = 1, cached: bool = False
) -> Work:
    """The exact KL beside the reference's log-probs: one more pass of the policy and one of the
    reference, and the whole vocabulary of both at every response token.
    """
    amount, share = Amount.of(rows), of.reached_share if cached else 1.0
    weights = (2 * share * of.matrices + of.adapter + 2 * of.head) * of.bytes_per_weight
    moved = passes * weights + FULL_KL_BYTES * amount.scored * of.vocabulary
    return Work(full_kl_flops(of, amount, cached=cached), moved)


def update(
    of: Architecture,
    rows: Sequence[tuple[int, int]],
    *,
    epochs: int,
    passes: int,
    steps: int,
    recomputed: bool = False,
    cached: bool = False,
) -> Work:
    """The clipped updates: `passes` forward and backward and `steps` of the optimizer an epoch.

    With `recomputed` activations the trunk's forward pass is made twice; with `cached` ones only
    from the first trained layer on.
    """
    amount = Amount.of(rows)
    share = of.reached_share if cached else 1.0
    flops = learning_flops(of, amount, share=share)
    flops += forward_flops(of, amount._replace(scored=0)) if recomputed else 0
    weights = (share * of.matrices + of.adapter + of.head) * of.bytes_per_weight
    gradients = 2 * 4 * of.trained
    moved = passes * (weights * (3 if recomputed else 2) + gradients)
    return Work(flops, moved + steps * ADAM_BYTES * of.trained) * epochs
