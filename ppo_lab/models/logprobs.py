"""Log-probabilities of chosen tokens straight from hidden states, without keeping logits of the
whole vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ppo_lab.core import full_kl
from ppo_lab.models.fast.gemm import computed_in
from ppo_lab.models.fast.kernels import kernels_for
from ppo_lab.models.fast.products import wide_product
from ppo_lab.models.fast.sweep import Curve, swept_logprobs, swept_twice

# Logits of at most this many (token, vocabulary) pairs are built at once, where no walk through the
# vocabulary is to be had: 128 MiB in float32, of which the loss keeps two to three, and with
# entropies six.
TILE = 2**25

# From here on the vocabulary is walked through once, where the head allows it; twice, on a CPU, for
# the gradients of more pairs than these.
SWEPT_VOCABULARY = 2**12
WALKED_TWICE = 2**21


class Head(NamedTuple):
    """A language model's head: logits = softcap(scale * (hidden @ weight^T + bias)).

    `softcap` 0 means none; with it, softcap(z) = softcap * tanh(z / softcap).
    """

    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, " vocab"] | None = None
    scale: float = 1.0
    softcap: float = 0.0

    def products(self, hidden: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows vocab"]:
        """hidden @ weight^T + bias, in the precision that the weights are computed in."""
        on_cpu = self.weight.device.type == "cpu"
        dtype = computed_in(self.weight.dtype) if on_cpu else self.weight.dtype
        # Contiguous: transformers' sliced views make a CPU copy the head once a row.
        return wide_product(hidden.to(dtype).contiguous(), self.weight, self.bias)

    def logits(self, hidden: Float[Tensor, "... hidden"]) -> Float[Tensor, "... vocab"]:
        """The logits in float32."""
        z = self.products(hidden.flatten(0, -2)).float()
        z = z.view(*hidden.shape[:-1], len(self.weight))
        z = z * self.scale if self.scale != 1.0 else z
        return self.softcap * torch.tanh(z / self.softcap) if self.softcap else z


def token_logprobs(
    hidden: Float[Tensor, "tokens hidden"],
    head: Head,
    targets: Int[Tensor, " tokens"],
    *,
    temperature: float,
    entropy: bool = False,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"] | None]:
    """log softmax(logits / temperature) of each target, and the distributions' entropies when asked
    for, in nats.

    Memory does not grow with tokens x vocabulary: a large one is walked through in tiles.
    """
    if (swept := _swept(hidden, head, targets, temperature, entropy=entropy)) is not None:
        return swept
    if len(targets) * len(head.weight) <= TILE:
        return from_logits(head.logits(hidden), targets, temperature=temperature, entropy=entropy)
    if not torch.is_grad_enabled() and not hidden.is_cuda:
        return _by_rows(hidden, head, targets, temperature=temperature, entropy=entropy)
    from ppo_lab.trl_parts import chunked_logprobs

    logprobs, entropies = chunked_logprobs(hidden, head, targets, temperature=temperature)
    return logprobs, entropies if entropy else None


def token_full_kl(
    hidden: Float[Tensor, "tokens hidden"],
    ref_hidden: Float[Tensor, "tokens hidden"],
    head: Head,
    ref_head: Head,
    *,
    temperature: float,
) -> Float[Tensor, " tokens"]:
    """The exact KL of each next-token distribution to the reference's, in nats, a few rows at a
    time.
    """
    rows = max(1, TILE // (4 * len(head.weight)))  # seven such tensors at a time
    pairs = zip(hidden.split(rows), ref_hidden.split(rows), strict=True)
    return torch.cat(
        [full_kl(head.logits(h) / temperature, ref_head.logits(r) / temperature) for h, r in pairs]
    )


def from_logits(
    logits: Float[Tensor, "tokens vocab"],
    targets: Int[Tensor, " tokens"],
    *,
    temperature: float,
    entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """`token_logprobs` where the logits are there already."""
    logits = logits if temperature == 1.0 else logits / temperature
    logprobs = -F.cross_entropy(logits, targets, reduction="none")
    if not entropy:
        return logprobs, None
    return logprobs, logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


def walks_twice(head: Head, tokens: int) -> bool:
    """Whether gradients of log-probs of so many tokens are made in two walks on a CPU, if it takes
    more than one: where the head is trained, or entropies are asked for.
    """
    return len(head.weight) >= SWEPT_VOCABULARY and tokens * len(head.weight) > WALKED_TWICE


def _swept(
    hidden: Tensor, head: Head, targets: Tensor, temperature: float, *, entropy: bool
) -> tuple[Tensor, Tensor | None] | None:
    """Log-probabilities and entropies by walks through the vocabulary; None where these would not
    pay, or this device or head has none.
    """
    if len(head.weight) < SWEPT_VOCABULARY:
        return None
    frozen = not (head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad))
    once = not entropy and (frozen or not torch.is_grad_enabled())
    weight, bias = head.weight, head.bias
    if once and not head.softcap and (kernels := kernels_for(weight.device)) is not None:
        rate = head.scale / temperature
        swept = kernels.sweep_rows(hidden, weight, bias, targets, rate)
        return None if swept is None else (swept, None)
    if hidden.device.type != "cpu" or weight.dtype == torch.float16:
        return None
    curve = Curve(head.scale, head.softcap, temperature)
    if once:
        swept = swept_logprobs(hidden, weight, bias, targets, curve)
        return None if swept is None else (swept, None)
    if walks_twice(head, len(targets)):
        return swept_twice(hidden, weight, bias, targets, curve, entropy=entropy)
    return None


def _by_rows(
    hidden: Tensor, head: Head, targets: Tensor, *, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    rows = max(1, TILE // len(head.weight))
    parts = [
        from_logits(head.logits(h), t, temperature=temperature, entropy=entropy)
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    entropies = torch.cat([e for _, e in parts if e is not None]) if entropy else None
    return torch.cat([logprobs for logprobs, _ in parts]), entropies
