"""Prompts and a policy in, responses out: the one place that samples, stops and slices.

The noise of every token is keyed by (seed, stream, sample, position): the same tokens come out
whatever the batch is split into and however many processes share it, but for one in some 10^5 whose
probabilities rounding has moved past a random number. Log-probabilities and values of the sampled
tokens fall out on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ppo_lab.arrivals import Asked
from ppo_lab.models.choice import LEVELS, choose
from ppo_lab.models.fast.draws import draw_from
from ppo_lab.models.logprobs import from_logits
from ppo_lab.models.trunk import Trunk
from ppo_lab.types import Forward, Prompts, Tokens


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 leave the
    distribution whole.

    `min_new_tokens` tokens come before any end-of-sequence token is allowed, or a stop string that
    is complete counts; `batch_size` prompts are drawn at once (0 = all). A response ends with its
    first token out of `eos_ids`, or with the token that completes one of `stop_strings`; what ended
    it is part of it. `foreign` names settings that another sampler honoured.
    """

    max_new_tokens: int
    eos_ids: tuple[int, ...]
    pad_id: int
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_strings: tuple[str, ...] = ()
    batch_size: int = 0
    foreign: tuple[str, ...] = ()

    @property
    def takes_all(self) -> bool:
        """Whether any token can come, at its own probability."""
        return self.temperature > 0 and self.top_k == 0 and self.top_p == 1.0

    @property
    def logprob_temperature(self) -> float:
        """The temperature at which log-probabilities are taken: that of sampling, or 1 for greedy
        decoding.
        """
        return self.temperature or 1.0

    @property
    def departures(self) -> tuple[str, ...]:
        """The settings that move sampling away from the distribution that log-probs are of."""
        settings = {
            f"min_new_tokens={self.min_new_tokens}": self.min_new_tokens > 0 and bool(self.eos_ids),
            "temperature=0": self.temperature == 0.0,
            f"top_k={self.top_k}": self.top_k > 0,
            f"top_p={self.top_p}": self.top_p < 1.0,
        }
        return (*(name for name, departs in settings.items() if departs), *self.foreign)


@dataclass(frozen=True)
class NoiseKey:
    """What a sample's noise depends on beside its position: the run's seed, a stream (the
    iteration) and a place in it.
    """

    seed: int
    stream: int
    first_sample: int = 0

    def uniforms(self, samples: int, positions: int) -> Float[Tensor, "samples positions levels"]:
        """Numbers in [0, 1) for every sample and position, as many as a choice takes."""
        philox = np.random.Philox(key=[self.seed, self.stream])
        generator, state = np.random.Generator(philox), philox.state
        numbers = np.empty((samples, positions, LEVELS))
        for i in range(samples):  # one generator set anew: to make another takes longer
            state["state"]["counter"] = np.array([0, self.first_sample + i, 0, 0], np.uint64)
            philox.state = state
            generator.random(out=numbers[i])
        return torch.from_numpy(numbers)


@torch.no_grad()
def sample(
    policy: Any,
    prompts: Prompts | Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    noise: NoiseKey,
    decode: Callable[[list[int]], str] | None = None,
    trunk: Trunk | None = None,
    all_ended: Callable[[bool], bool] = bool,
) -> tuple[Tokens, Forward]:
    """Responses to `prompts` from `policy` (or from another `trunk`), with their log-probabilities
    and values.

    Log-probabilities are of the raw distribution at the temperature, whatever top-k or top-p took
    away from it. `decode` turns ids into text; stop strings need it. `all_ended` is told after each
    token whether every response here has ended, and says whether sampling may.
    """
    queries = prompts.ids if isinstance(prompts, Prompts) else [list(p) for p in prompts]
    uniforms = noise.uniforms(len(queries), sampling.max_new_tokens)
    chunk = sampling.batch_size or len(queries)
    parts = [
        _sample_chunk(
            policy,
            queries[i : i + chunk],
            uniforms[i : i + chunk],
            sampling,
            decode,
            trunk or policy.trunk,
            all_ended,
        )
        for i in range(0, len(queries), chunk)
    ]
    return _join(parts, queries, sampling.pad_id)


def _sample_chunk(
    policy: Any,
    queries: Sequence[Sequence[int]],
    uniforms: Tensor,
    sampling: Sampling,
    decode: Callable[[list[int]], str] | None,
    trunk: Trunk,
    all_ended: Callable[[bool], bool],
) -> list[Tensor]:
    """[responses, lengths, ended, logprobs, values, entropy] of one chunk."""
    device = trunk.head.weight.device
    packed = Tokens.pack(queries, [[sampling.pad_id]] * len(queries), pad_id=sampling.pad_id)
    ids, attention = packed.queries.to(device), packed.query_mask.to(device)
    uniforms = uniforms.to(device)
    eos = torch.tensor(sampling.eos_ids, dtype=torch.long, device=device)
    cache = trunk.new_cache(ids.shape[1] + sampling.max_new_tokens)
    ended = torch.zeros(len(queries), dtype=torch.bool, device=device)
    early, later = (Drawing(policy, trunk, sampling, bans) for bans in (True, False))
    may_end = bool(sampling.eos_ids or sampling.stop_strings)
    question = AllEnded(device)
    tokens, seen, alive = [], [], []
    for position in range(sampling.max_new_tokens):
        draws = early if position < sampling.min_new_tokens else later
        token, *of_token = trunk.newest(ids, attention, cache, draws, uniforms[:, position])
        alive.append(~ended)
        token = token.masked_fill(ended, sampling.pad_id)
        tokens.append(token)
        seen.append(of_token)
        ended = ended | torch.isin(token, eos) | _completes_stop(tokens, ended, sampling, decode)
        if all_ended(may_end and question(ended)):
            break
        ids = token[:, None]
        attention = torch.cat([attention, torch.ones_like(ids, dtype=torch.bool)], 1)
    real = torch.stack(alive, 1)
    return [
        torch.stack(tokens, 1),
        real.sum(1),
        ended,
        *(torch.stack(c, 1).masked_fill(~real, 0.0) for c in zip(*seen, strict=True)),
    ]


class AllEnded:
    """Whether every response has ended. A GPU is asked about one token and heard after the next, so
    that it never waits for the host: one token more is sampled, as padding.
    """

    def __init__(self, device: torch.device) -> None:
        self.late = device.type == "cuda"
        self._asked: Asked | None = None

    def __call__(self, ended: Bool[Tensor, " batch"]) -> bool:
        """The answer; about a GPU's row of flags, that to the last question."""
        if not self.late:
            return bool(ended.all())
        before, self._asked = self._asked, Asked(ended.all())
        return before is not None and bool(before.read())


@dataclass(frozen=True)
class Drawing:
    """A function of hidden states and uniform numbers: tokens, their log-probabilities, the values
    and the entropies. `bans` keeps end-of-sequence tokens from being drawn.
    """

    policy: Any
    trunk: Trunk
    sampling: Sampling
    bans: bool

    def __call__(self, hidden: Tensor, uniforms: Tensor) -> tuple[Tensor, ...]:
        """Each (batch,)."""
        token, logprobs, entropy = self._drawn(hidden, uniforms)
        return token, logprobs, self.policy.v_head(hidden), entropy

    def _drawn(self, hidden: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, their log-probabilities under the raw distribution, and its entropies."""
        head, sampling = self.trunk.head, self.sampling
        banned = sampling.eos_ids if self.bans else ()
        if sampling.takes_all and not banned and not head.softcap:
            scale = head.scale / sampling.temperature
            return draw_from(head.products(hidden), uniforms, scale=scale)
        logits = head.logits(hidden)
        token = draw(logits, uniforms, sampling=sampling, banned=banned)
        at = sampling.logprob_temperature
        logprobs, entropy = from_logits(logits, token, temperature=at, entropy=True)
        assert entropy is not None
        return token, logprobs, entropy


def draw(
    logits: Float[Tensor, "batch vocab"],
    uniforms: Float[Tensor, "batch levels"],
    *,
    sampling: Sampling,
    banned: Sequence[int] = (),
) -> Int[Tensor, " batch"]:
    """One token a row, at that row's uniform numbers."""
    if banned:
        logits = logits.clone()
        for token in banned:  # numbers, and no tensor of them, which would come from the host
            logits.select(1, token).fill_(-torch.inf)
    if sampling.temperature == 0.0:
        return logits.argmax(-1)
    logits = keep_likely(logits / sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
    return choose(logits.softmax(-1), uniforms)


def keep_likely(
    logits: Float[Tensor, "batch vocab"], *, top_k: int, top_p: float
) -> Float[Tensor, "batch vocab"]:
    """Logits with -inf outside the `top_k` most likely tokens (0 = all) and outside the nucleus of
    mass `top_p`.

    Source: Holtzman et al. 2020, arXiv:1904.09751, for the nucleus: the fewest tokens whose mass
        reaches `top_p`.
    """
    if 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(-1, descending=True)
        probabilities = ordered.softmax(-1)
        outside = probabilities.cumsum(-1) - probabilities >= top_p
        logits = logits.masked_fill(
            torch.zeros_like(outside).scatter(1, order, outside), -torch.inf
        )
    return logits


def _completes_stop(
    tokens: list[Tensor],
    ended: Tensor,
    sampling: Sampling,
    decode: Callable[[list[int]], str] | None,
) -> Bool[Tensor, " batch"]:
    """Which unfinished rows contain a stop string now that ends after the tokens that must come."""
    stops, before = sampling.stop_strings, sampling.min_new_tokens
    if not stops or len(tokens) <= before:
        return torch.zeros_like(ended)
    assert decode is not None, "stop strings need a tokenizer's decode"

    def stopped(row: list[int]) -> bool:
        text, held = decode(row), len(decode(row[:before])) if before else 0
        return any(text.find(s, max(held - len(s) + 1, 0)) >= 0 for s in stops)

    rows = zip(torch.stack(tokens, 1).tolist(), ended.tolist(), strict=True)
    return torch.tensor([not done and stopped(row) for row, done in rows], device=ended.device)


def _join(
    parts: list[list[Tensor]], queries: Sequence[Sequence[int]], pad_id: int
) -> tuple[Tokens, Forward]:
    time = max(int(part[1].max()) for part in parts)

    def column(i: int, fill: float) -> Tensor:
        padded = [
            torch.nn.functional.pad(p[i], (0, time - p[i].shape[1]), value=fill) for p in parts
        ]
        return torch.cat(padded)

    responses, lengths = column(0, pad_id), torch.cat([part[1] for part in parts])
    packed = Tokens.pack(queries, [[pad_id]] * len(queries), pad_id=pad_id)
    tokens = Tokens(
        queries=packed.queries.to(responses.device),
        query_mask=packed.query_mask.to(responses.device),
        responses=responses,
        mask=torch.arange(time, device=responses.device) < lengths[:, None],
        lengths=lengths,
        ended=torch.cat([part[2] for part in parts]),
    )
    return tokens, Forward(logprobs=column(3, 0.0), values=column(4, 0.0), entropy=column(5, 0.0))
