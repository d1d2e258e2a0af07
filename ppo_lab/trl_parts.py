"""The one place that imports TRL: what ppo_lab builds on of its maintained parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ppo_lab.models.logprobs import Head


def chunked_logprobs(hidden: Tensor, head: Head, targets: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `targets` and entropies with their gradients, one tile of the vocabulary at a time."""
    from trl.kernels import ChunkedLogProbFunction

    tile = 32768 if hidden.is_cuda else 8192
    softcap = head.softcap or None
    outputs: Any = ChunkedLogProbFunction.apply(
        hidden, head.weight, head.bias, targets, temperature, tile, softcap, head.scale, ("entropy",)
    )
    return outputs[0].float(), outputs[1].float()
