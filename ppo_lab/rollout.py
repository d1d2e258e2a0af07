"""Prompts and a policy in, responses out: the one place that samples, stops and slices.

The noise of every token is keyed by (seed, stream, sample, position): the same tokens come out
whatever the batch is split into and however many processes share it, but for one in some 10^5 whose
probabilities rounding has moved past a random number. Log-probabilities and values of the sampled
tokens fall out on the way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
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
    def may_end(self) -> bool:
        """Whether a response can be shorter than the most tokens."""
        return bool(self.eos_ids or self.stop_strings)

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
        """Numbers in [0, 1) for every sample and position, as many as a choice takes. The latest
        are kept: asked for while a device is at work, they are there when it waits for them.
        """
        return _uniforms(self, samples, positions)


@functools.lru_cache(maxsize=1)
def _uniforms(
    key: NoiseKey, samples: int, positions: int
) -> Float[Tensor, "samples positions levels"]:
    philox = np.random.Philox(key=[key.seed, key.stream])
    generator, state = np.random.Generator(philox), philox.state
    numbers = np.empty((samples, positions, LEVELS))
    for i in range(samples):  # one generator set anew: to make another takes longer
        state["state"]["counter"] = np.array([0, key.first_sample + i, 0, 0], np.uint64)
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
    trunk = trunk or policy.trunk
    packed = Tokens.pack(queries, [[]] * len(queries), pad_id=sampling.pad_id)
    device = trunk.head.weight.device
    ids, real = packed.queries.to(device), packed.query_mask.to(device)
    uniforms = noise.uniforms(len(queries), sampling.max_new_tokens)
    chunk = sampling.batch_size or len(queries)
    parts = []
    for first in range(0, len(queries), chunk):
        rows = slice(first, first + chunk)
        width = max(map(len, queries[rows]))
        given = ids[rows, -width:], real[rows, -width:], uniforms[rows]
        parts.append(_sample_chunk(policy, *given, sampling, decode, trunk, all_ended))
    return _join(parts, ids, real, sampling.pad_id)


def _sample_chunk(
    policy: Any,
    ids: Int[Tensor, "batch query"],
    real: Bool[Tensor, "batch query"],
    uniforms: Float[Tensor, "batch positions levels"],
    sampling: Sampling,
    decode: Callable[[list[int]], str] | None,
    trunk: Trunk,
    all_ended: Callable[[bool], bool],
) -> Part:
    """Responses to prompts that are padded on the left."""
    (batch, width), device, longest = ids.shape, ids.device, sampling.max_new_tokens
    cache = trunk.new_cache(width + longest)
    answers = Answers(*trunk.placed(cache, *Answers.room(batch, longest, device)))
    answers.begin(uniforms)
    # Every new column is seen by later ones; of a response that has ended, none is looked at.
    attention = F.pad(real, (0, longest), value=True)
    early, later = (Writing(Drawing(policy, trunk, sampling, bans)) for bans in (True, False))
    question = AllEnded(device)
    stops = StopStrings(sampling, decode) if sampling.stop_strings else None
    for position in range(longest):
        writes = early if position < sampling.min_new_tokens else later
        trunk.newest(ids, attention[:, : width + position], cache, writes, *answers)
        ids = answers.newest
        if stops is not None and position >= sampling.min_new_tokens:
            stops.end(answers, position)
        if all_ended(sampling.may_end and question(answers.ended)):
            break
    return answers.read(position + 1)


class Part(NamedTuple):
    """Responses of a chunk, and of every token its log-probability, value and entropy."""

    responses: Int[Tensor, "batch time"]
    lengths: Int[Tensor, " batch"]
    ended: Bool[Tensor, " batch"]
    seen: Float[Tensor, "three batch time"]


class Answers(NamedTuple):
    """Responses while they are written, by position, in tensors that are changed in place: so a
    pass that is recorded with what is drawn from it can be played again for every token.

    `position` is the next to be written, with its row of `uniforms`; `newest` are the tokens of the
    one before. `seen` holds log-probabilities, values and entropies, `padding` how many positions
    lie behind each response's end. There may be room for more positions than are written.
    """

    uniforms: Float[Tensor, "positions batch levels"]
    tokens: Int[Tensor, "positions batch"]
    seen: Float[Tensor, "positions three batch"]
    position: Int[Tensor, " one"]
    newest: Int[Tensor, "batch one"]
    ended: Bool[Tensor, " batch"]
    padding: Int[Tensor, " batch"]

    @classmethod
    def room(cls, batch: int, positions: int, device: torch.device) -> Answers:
        """Room for so many responses of so many tokens, with nothing in it."""
        empty = functools.partial(torch.empty, device=device)
        return cls(
            uniforms=empty(positions, batch, LEVELS, dtype=torch.float64),
            tokens=empty(positions, batch, dtype=torch.long),
            seen=empty(positions, 3, batch, dtype=torch.float32),
            position=empty(1, dtype=torch.long),
            newest=empty(batch, 1, dtype=torch.long),
            ended=empty(batch, dtype=torch.bool),
            padding=empty(batch, dtype=torch.long),
        )

    def begin(self, uniforms: Float[Tensor, "batch positions levels"]) -> None:
        """Nothing is written, and these are the numbers that will be drawn at."""
        self.uniforms[: uniforms.shape[1]].copy_(uniforms.transpose(0, 1))
        self.position.zero_()
        self.ended.fill_(False)
        self.padding.zero_()

    def read(self, positions: int) -> Part:
        """A copy of what was written at the first so many positions."""
        tokens, seen = self.tokens[:positions].t(), self.seen[:positions].permute(1, 2, 0)
        as_rows = torch.contiguous_format
        return Part(
            tokens.clone(memory_format=as_rows),
            positions - self.padding,
            self.ended.clone(),
            seen.clone(memory_format=as_rows),
        )


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
        before, self._asked = self._asked, Asked(ended)
        return before is not None and bool(before.read().all())


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
        # TRL's scripts say by an id that no token has that nothing ends a text.
        known = range(len(head.weight))
        banned = [token for token in sampling.eos_ids if token in known] if self.bans else []
        if sampling.takes_all and not banned and not head.softcap:
            scale = head.scale / sampling.temperature
            return draw_from(head.products(hidden), uniforms, scale=scale)
        logits = head.logits(hidden)
        token = draw(logits, uniforms, sampling=sampling, banned=banned)
        at = sampling.logprob_temperature
        logprobs, entropy = from_logits(logits, token, temperature=at, entropy=True)
        assert entropy is not None
        return token, logprobs, entropy


@dataclass(frozen=True)
class Writing:
    """A function of hidden states and `Answers`: what is drawn is written down in place, padding
    where a response has ended.
    """

    drawing: Drawing

    def __call__(self, hidden: Tensor, *answers: Tensor) -> tuple[()]:
        """All that is to be had is in the answers."""
        to, sampling = Answers(*answers), self.drawing.sampling
        uniforms = to.uniforms.index_select(0, to.position)[0]
        token, *of_token = self.drawing(hidden, uniforms)
        if sampling.may_end:
            token = token.masked_fill(to.ended, sampling.pad_id)
            to.padding.add_(to.ended)
        to.newest.copy_(token[:, None])
        to.tokens.index_copy_(0, to.position, token[None])
        to.seen.index_copy_(0, to.position, torch.stack(of_token).float()[None])
        for end in sampling.eos_ids:  # numbers, and no tensor of them; mostly there is one
            to.ended.logical_or_(token == end)
        to.position.add_(1)
        return ()


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


class StopStrings:
    """Ends responses that hold a stop string, of which the end comes after the tokens that must.

    Asked after every token, it reads little: of the responses alone whose newest token may complete
    a stop string, and of these as many tokens alone as the longest can be made of, and some more.
    """

    def __init__(self, sampling: Sampling, decode: Callable[[list[int]], str] | None) -> None:
        assert decode is not None, "stop strings need a tokenizer's decode"
        self.decode, self.strings = decode, sampling.stop_strings
        self.least = sampling.min_new_tokens
        # A token is a byte at least; those of no text at all have as much room again.
        self.longest = 2 * max(len(s.encode()) for s in self.strings) + 8
        self._may_complete: dict[int, bool] = {}

    def end(self, answers: Answers, position: int) -> None:
        """Note of those that hold one, now that this position is written, that they have ended."""
        newest = answers.tokens[position].tolist()
        asked = [i for i, token in enumerate(newest) if self._may_be_completed_by(token)]
        if not asked:
            return
        first = max(0, position + 1 - self.longest)
        written = answers.tokens[first : position + 1].t().tolist()
        found = torch.zeros(answers.ended.shape, dtype=torch.bool)
        for i in asked:
            found[i] = self._is_in(written[i], first)
        answers.ended.logical_or_(found.to(answers.ended.device))

    def _is_in(self, ids: list[int], first: int) -> bool:
        """Whether one is in the tokens from position `first` on."""
        before = max(0, self.least - first)
        text, held = self.decode(ids), len(self.decode(ids[:before])) if before else 0
        return any(text.find(s, max(held - len(s) + 1, 0)) >= 0 for s in self.strings)

    def _may_be_completed_by(self, token: int) -> bool:
        if token not in self._may_complete:
            text = self.decode([token])
            self._may_complete[token] = any(may_complete(text, s) for s in self.strings)
        return self._may_complete[token]


def may_complete(text: str, stop: str) -> bool:
    """Whether a token of this text may be the one that completes a stop string: it holds the string
    or begins with its end. What it begins with may be the rest of a character, and reads so; ASCII
    characters have no parts.
    """
    begins = any(text.startswith(stop[i:]) for i in range(len(stop)))
    return begins or stop in text or (text.startswith("\ufffd") and not stop.isascii())


def _join(
    parts: Sequence[Part],
    queries: Int[Tensor, "batch query"],
    query_mask: Bool[Tensor, "batch query"],
    pad_id: int,
) -> tuple[Tokens, Forward]:
    """The responses of all chunks, as wide as the longest, to these prompts."""
    lengths = _whole([part.lengths for part in parts])
    time = int(lengths.max())
    mask = torch.arange(time, device=lengths.device) < lengths[:, None]
    seen = _whole([_as_wide(part.seen, time, 0.0) for part in parts], 1)
    tokens = Tokens(
        queries=queries,
        query_mask=query_mask,
        responses=_whole([_as_wide(part.responses, time, pad_id) for part in parts]),
        mask=mask,
        lengths=lengths,
        ended=_whole([part.ended for part in parts]),
    )
    return tokens, Forward(*seen.masked_fill(~mask, 0.0))


def _as_wide(x: Shaped[Tensor, "... columns"], time: int, fill: float) -> Tensor:
    """With so many columns, those that are missing filled."""
    return F.pad(x, (0, missing), value=fill) if (missing := time - x.shape[-1]) else x


def _whole(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return torch.cat(list(parts), dim) if len(parts) > 1 else parts[0]
