"""What PPO takes for granted of a decoder, proved on a few tokens.

Sampling reads a text token by token with a cache, beside others that are padded on the left;
scoring reads it in one pass. Where the two do not see the same, a ratio means nothing. Layers that
are known one by one have a proof of their own; nobody has read how others mask, count and remember.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

TOKENS = 9  # of each of two texts
PADDING = 3  # columns before the second one's
PROMPT = 6  # columns that are read at once before the others come one by one

Passes = Callable[..., Tensor]
"""`passes(ids, attention, cache)` gives hidden states, without a cache where it is None."""


@torch.no_grad()
def what_fails(
    passes: Passes, new_cache: Callable[[], Any], words: Tensor, parameters: Iterable[nn.Parameter]
) -> str:
    """Which property a decoder lacks, "" where it has them all. `words` is its embedding.

    Seven passes of a few tokens each.
    """
    ids = (torch.arange(2 * TOKENS, device=words.device).view(2, -1) * 7 + 11) % len(words)
    real = torch.ones_like(ids, dtype=torch.bool)
    real[1, :PADDING] = False
    exact = _is_exact(parameters)
    whole = passes(ids, real, None)
    alone = passes(ids[1:, PADDING:], real[1:, PADDING:], None)
    if not _same(alone, whole[1:, PADDING:], real[1:, PADDING:], exact=exact):
        return "its states of a text are others when the text is padded on the left"
    before = real[:, :PROMPT]
    if not _same(passes(ids[:, :PROMPT], before, None), whole[:, :PROMPT], before, exact=exact):
        return "its states of a token change with the tokens that come after it"
    cache = new_cache()
    passes(ids[:, :PROMPT], before, cache)
    places = range(PROMPT, TOKENS)
    later = [passes(ids[:, i : i + 1], real[:, : i + 1], cache) for i in places]
    if not _same(torch.cat(later, 1), whole[:, PROMPT:], real[:, PROMPT:], exact=exact):
        return "its states with a cache, token by token, are others than those of one pass"
    return ""


def steady_context(config: Any) -> int | None:
    """The most tokens over which a rotary embedding turns each position by itself alone; None where
    it always does.

    Beyond that number `dynamic` and `longrope` turn all positions by other angles, those of a whole
    batch with its longest text, and not those that a cache holds already.
    """
    config = config.get_text_config(decoder=True)
    settings = getattr(config, "rope_parameters", None) or {}
    parts = [settings, *(part for part in settings.values() if isinstance(part, dict))]
    kinds = {str(part.get("rope_type")): part for part in parts}
    longest = [config.max_position_embeddings for kind in kinds if "dynamic" in kind]
    if "longrope" in kinds:
        own = kinds["longrope"].get("original_max_position_embeddings")
        longest.append(own or config.max_position_embeddings)
    return min(longest, default=None)


def _is_exact(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether passes of other shapes differ by the rounding of float32 alone."""
    kinds = {(p.dtype, p.device.type == "cpu") for p in parameters}
    in_full = torch.get_float32_matmul_precision() == "highest"
    return all(dtype == torch.float32 and (in_full or on_cpu) for dtype, on_cpu in kinds)


def _same(
    ours: Float[Tensor, "batch time hidden"],
    theirs: Float[Tensor, "batch time hidden"],
    real: Bool[Tensor, "batch time"],
    *,
    exact: bool,
) -> bool:
    """Whether states of real tokens are the same but for rounding.

    In half precision rounding may send a token to another expert, whose states are far off then:
    most tokens have to be near. What is wrong of an architecture is wrong of nearly all of them.
    """
    wanted = theirs[real].float()
    error = (ours[real].float() - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-6)
    return bool(error.max() <= 2e-4) if exact else bool(error.median() <= 0.2)
