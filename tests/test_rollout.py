"""Sampling: what is drawn, where it stops, and that nothing but the key decides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import EOS, PAD, QUERIES, VOCABULARY, policy, tokenizer
from torch.testing import assert_close

from ppo_lab.arrivals import Asked
from ppo_lab.models.choice import LEVELS
from ppo_lab.rollout import (
    AllEnded,
    Answers,
    NoiseKey,
    Sampling,
    StopStrings,
    draw,
    keep_likely,
    sample,
)
from ppo_lab.types import Tokens

WHOLE = Sampling(max_new_tokens=12, eos_ids=(EOS,), pad_id=PAD)
KEY = NoiseKey(11, 2)


def ending_policy(kind: str = "bloom") -> Any:
    """A policy that ends responses now and then."""
    model = policy(kind, tie_word_embeddings=False).eval()
    with torch.no_grad():
        model.trunk.model.get_output_embeddings().weight[EOS] *= 3.0
    return model


def drawn(model: Any, sampling: Sampling = WHOLE, key: NoiseKey = KEY, **extra: Any) -> Any:
    return sample(model, QUERIES, sampling=sampling, noise=key, **extra)


class Pinned:
    """A flag on the host that a GPU writes when it gets there."""

    on_their_way: list[Pinned]

    def __init__(self) -> None:
        self.flag, self.arrived = torch.tensor(False), False

    def copy_(self, flag: torch.Tensor, *, non_blocking: bool) -> None:
        assert non_blocking, "or the host would wait at once"
        self.flag = flag.clone()
        Pinned.on_their_way.append(self)

    def __bool__(self) -> bool:
        assert self.arrived, "the flag is looked at before it is there"
        return bool(self.flag)


class Event:
    """Passed by a GPU when everything before it has been done."""

    def record(self) -> None:
        self.before = list(Pinned.on_their_way)

    def synchronize(self) -> None:
        for flag in self.before:
            flag.arrived = True


def answers_come_late(patch: pytest.MonkeyPatch) -> None:
    """Whether all responses have ended is asked as of a GPU."""
    empty = torch.empty

    def pinned_or_not(*args: Any, pin_memory: bool = False, **named: Any) -> Any:
        return Pinned() if pin_memory else empty(*args, **named)

    patch.setattr(Pinned, "on_their_way", [], raising=False)
    patch.setattr(torch, "empty", pinned_or_not)
    patch.setattr(torch.cuda, "Event", Event)
    patch.setattr("ppo_lab.rollout.AllEnded", lambda _: AllEnded(torch.device("cuda")))


# --- the noise


@pytest.mark.parametrize("kind", ["bloom", "gpt2", "llama"])
def test_the_same_tokens_come_out_whatever_the_batch_is_split_into(kind: str) -> None:
    """S-02: and their log-probs, values and entropies."""
    model = ending_policy(kind)
    whole, seen = drawn(model)
    assert len({*whole.lengths.tolist()}) > 1
    for size in (1, 3):
        split, seen_split = drawn(model, replace(WHOLE, batch_size=size))
        for name in ("queries", "responses", "mask", "lengths", "ended"):
            assert torch.equal(getattr(split, name), getattr(whole, name))
        assert_close(seen_split.logprobs, seen.logprobs, rtol=1e-5, atol=1e-5)
        assert_close(seen_split.values, seen.values, rtol=1e-5, atol=1e-5)


def test_a_sample_is_keyed_by_its_place_and_not_by_its_neighbours() -> None:
    model = ending_policy()
    whole, _ = drawn(model)
    alone, _ = sample(model, QUERIES[2:], sampling=WHOLE, noise=replace(KEY, first_sample=2))
    assert alone.response_lists() == whole.response_lists()[2:]


def test_seed_stream_sample_and_position_each_give_other_noise() -> None:
    """C-09: and the global generators have no part in it."""
    one = NoiseKey(1, 2).uniforms(3, 4)
    torch.manual_seed(99)
    assert torch.equal(one, NoiseKey(1, 2).uniforms(3, 4))
    assert torch.equal(one[1:], NoiseKey(1, 2, first_sample=1).uniforms(2, 4))
    assert torch.equal(one[:, :2], NoiseKey(1, 2).uniforms(3, 2))
    others = (NoiseKey(2, 2), NoiseKey(1, 3), NoiseKey(1, 2**63), NoiseKey(2, 2**63))
    numbers = torch.cat([key.uniforms(3, 4).flatten() for key in (NoiseKey(1, 2), *others)])
    assert len(set(numbers.tolist())) == len(numbers)


@pytest.mark.parametrize("key", [NoiseKey(3, 5), NoiseKey(2, 2**63, first_sample=7)])
def test_each_sample_s_noise_is_a_generator_s_of_its_own(key: NoiseKey) -> None:
    """Philox's, at a counter that the sample's place is part of."""
    rows = [
        np.random.Philox(key=[key.seed, key.stream], counter=[0, key.first_sample + i, 0, 0])
        for i in range(3)
    ]
    alone = np.stack([np.random.Generator(row).random((7, LEVELS)) for row in rows])
    assert torch.equal(key.uniforms(3, 7), torch.from_numpy(alone))


def test_noise_is_uniform_and_unrelated_between_samples_and_positions() -> None:
    numbers = NoiseKey(0, 7).uniforms(4000, 4)
    assert ((numbers >= 0) & (numbers < 1)).all()
    numbers = numbers.flatten(1)[:, ::LEVELS]
    assert_close(numbers.mean(0), torch.full((4,), 0.5).double(), rtol=0, atol=0.02)
    assert_close(numbers.var(0), torch.full((4,), 1 / 12).double(), rtol=0, atol=0.005)
    correlations = torch.corrcoef(torch.cat([numbers[:-1].T, numbers[1:].T]))
    assert (correlations - torch.eye(8)).abs().max() < 0.07


# --- the distribution


def test_tokens_are_drawn_in_proportion_to_their_probability() -> None:
    """A chi-square test over a vocabulary of six, at three temperatures."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -torch.inf])
    n = 6000
    uniforms = NoiseKey(0, 0).uniforms(n, 1)[:, 0]
    for temperature in (0.5, 1.0, 2.0):
        tokens = draw(
            logits.expand(n, 6), uniforms, sampling=replace(WHOLE, temperature=temperature)
        )
        counts = torch.bincount(tokens, minlength=6).double()
        expected = n * (logits / temperature).softmax(0).double()
        assert counts[5] == 0
        chi_square = ((counts - expected)[:5] ** 2 / expected[:5]).sum()
        assert (
            chi_square < 18.5
        )  # 99.9 % of draws from the right distribution, 4 degrees of freedom


def test_whole_responses_are_drawn_in_proportion_to_their_probability() -> None:
    """Two tokens out of a vocabulary of four: sixteen responses and their exact probability."""
    model = policy("gpt2", vocab_size=4).eval()
    n, sampling = 1500, Sampling(max_new_tokens=2, eos_ids=(), pad_id=0)
    tokens, seen = sample(model, [[2, 3]] * n, sampling=sampling, noise=KEY)
    every = torch.cartesian_prod(torch.arange(4), torch.arange(4)).tolist()
    with torch.no_grad():
        exact = model.score(Tokens.pack([[2, 3]] * 16, every, pad_id=0), temperature=1.0)
    expected = n * exact.logprobs.sum(1).exp().double()
    assert expected.sum().item() == pytest.approx(n, rel=1e-4)
    counts = torch.bincount(tokens.responses @ torch.tensor([4, 1]), minlength=16).double()
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 37.7  # 99.9 %, 15 degrees of freedom
    likely = seen.logprobs.sum(1)[0]
    assert_close(likely, exact.logprobs.sum(1)[int(tokens.responses[0] @ torch.tensor([4, 1]))])


def test_temperature_zero_takes_the_likeliest_token() -> None:
    model = ending_policy()
    greedy = replace(WHOLE, temperature=0.0)
    one, two = (drawn(model, greedy, NoiseKey(seed, 0))[0] for seed in (1, 2))
    assert torch.equal(one.responses, two.responses)
    assert greedy.logprob_temperature == 1.0
    first = model.pretrained_model(torch.tensor([QUERIES[0]])).logits[0, -1].argmax()
    assert one.responses[0, 0] == first


def test_top_k_and_top_p_keep_the_likeliest_by_hand() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    kept = [
        [i for i, x in enumerate(keep_likely(logits, top_k=k, top_p=p)[0]) if x > -torch.inf]
        for k, p in (
            (0, 1.0),
            (1, 1.0),
            (3, 1.0),
            (9, 1.0),
            (0, 0.35),
            (0, 0.65),
            (0, 0.75),
            (2, 0.99),
        )
    ]
    assert kept == [[0, 1, 2, 3], [1], [1, 2, 3], [0, 1, 2, 3], [1], [1, 3], [1, 2, 3], [1, 3]]


@pytest.mark.parametrize("changes", [{"top_k": 3}, {"top_p": 0.6}, {"top_k": 5, "top_p": 0.5}])
def test_only_likely_tokens_are_drawn_under_top_k_and_top_p(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    logits, sampling = torch.randn(1, VOCABULARY), replace(WHOLE, **changes)
    tokens = draw(logits.expand(800, -1), KEY.uniforms(800, 1)[:, 0], sampling=sampling)
    limits = {"top_k": 0, "top_p": 1.0} | changes
    kept = keep_likely(logits, **limits)[0] > -torch.inf
    assert kept[tokens].all()
    assert len(tokens.unique()) == kept.sum()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.6},
        {"min_new_tokens": 4},
        {"temperature": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["bloom", "gpt2"])
def test_the_samplers_numbers_are_those_of_a_whole_forward(
    kind: str, changes: dict[str, Any]
) -> None:
    """N-03, N-04: log-probs of the raw distribution at the temperature, whatever was cut off it."""
    model, sampling = ending_policy(kind), replace(WHOLE, **changes)
    tokens, seen = drawn(model, sampling)
    with torch.no_grad():
        again = model.score(tokens, temperature=sampling.logprob_temperature, entropy=True)
    for name in ("logprobs", "values", "entropy"):
        assert_close(getattr(seen, name), getattr(again, name), rtol=1e-4, atol=2e-5)
    assert not seen.logprobs[~tokens.mask].any()


# --- where a response stops


def test_generation_stops_once_every_response_has_ended() -> None:
    """G-01: time goes with the real length, and `ended` comes from generation (N-14)."""
    model = ending_policy()
    calls = []
    model.trunk.model.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    tokens, _ = drawn(model, replace(WHOLE, max_new_tokens=200))
    assert tokens.ended.all()
    assert len(calls) == tokens.lengths.max() < 200
    assert tokens.responses.shape[1] == tokens.lengths.max()
    for row in tokens.response_lists():
        assert row.index(EOS) == len(row) - 1
    cut, _ = drawn(model, replace(WHOLE, max_new_tokens=2))
    assert cut.ended.tolist() == [EOS in row for row in cut.response_lists()]
    assert not cut.ended.all()


@pytest.mark.parametrize(
    "changes", [{}, {"batch_size": 3}, {"max_new_tokens": 2}, {"eos_ids": ()}], ids=str
)
def test_an_answer_that_comes_late_costs_a_token_and_changes_nothing(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sampling, calls = ending_policy(), replace(WHOLE, **changes), []
    wanted, seen = drawn(model, sampling)
    answers_come_late(monkeypatch)
    model.trunk.model.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    tokens, seen_late = drawn(model, sampling)
    for name in ("queries", "query_mask", "responses", "mask", "lengths", "ended"):
        assert torch.equal(getattr(tokens, name), getattr(wanted, name))
    for name in ("logprobs", "values", "entropy"):
        assert_close(getattr(seen_late, name), getattr(seen, name), rtol=1e-5, atol=1e-5)
    parts = wanted.lengths.split(sampling.batch_size or len(QUERIES))
    made = [min(int(part.max()) + 1, sampling.max_new_tokens) for part in parts]
    assert len(calls) == sum(made)


def test_a_question_about_a_gpu_s_rows_is_answered_by_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers_come_late(monkeypatch)
    there, here = AllEnded(torch.device("cuda")), AllEnded(torch.device("cpu"))
    rows = [[False, False], [True, False], [True, True], [True, True]]
    assert [there(torch.tensor(row)) for row in rows] == [False, False, False, True]
    assert [here(torch.tensor(row)) for row in rows] == [False, False, True, True]


def test_numbers_that_were_asked_for_are_those_of_then() -> None:
    numbers = torch.zeros(2)
    asked = Asked(numbers)
    numbers.add_(1.0)
    assert asked.read().tolist() == [0.0, 0.0]


@pytest.mark.parametrize("pad", [PAD, EOS, 7])
def test_which_token_pads_changes_nothing(pad: int) -> None:
    """G-02: pad may be EOS; masks come from lengths, and the EOS stays a token to learn."""
    model = ending_policy("gpt2")
    tokens, seen = drawn(model)
    other, seen_other = drawn(model, replace(WHOLE, pad_id=pad))
    assert other.response_lists() == tokens.response_lists()
    assert torch.equal(other.mask, tokens.mask)
    assert torch.equal(seen_other.logprobs, seen.logprobs)
    with torch.no_grad():
        assert_close(
            model.score(other, temperature=1.0).logprobs,
            model.score(tokens, temperature=1.0).logprobs,
        )


def test_a_prompt_that_holds_the_end_survives() -> None:
    """G-03: only responses are cut."""
    prompts = [[5, EOS, 6], [EOS]]
    tokens, _ = sample(ending_policy(), prompts, sampling=WHOLE, noise=KEY)
    kept = [q[m].tolist() for q, m in zip(tokens.queries, tokens.query_mask, strict=True)]
    assert kept == prompts
    assert all(len(row) > 0 for row in tokens.response_lists())


def test_any_of_several_tokens_ends_a_response() -> None:
    """G-04: and one whose id is 0 as well (G-11)."""
    model = policy("gpt2").eval()
    ends = (0, 3, 4, 5, 6, 7, 8, 9)
    tokens, _ = sample(
        model, [[5, 6]] * 16, sampling=replace(WHOLE, eos_ids=ends, max_new_tokens=60), noise=KEY
    )
    last = [
        row[-1] for row, done in zip(tokens.response_lists(), tokens.ended, strict=True) if done
    ]
    assert len(set(last)) > 1
    assert set(last) <= set(ends)
    for row in tokens.response_lists():
        assert not set(row[:-1]) & set(ends)


def test_without_an_end_every_response_is_as_long_as_allowed() -> None:
    """G-05: asked for by an empty set of ends, not by an id that no token has."""
    tokens, _ = drawn(ending_policy(), replace(WHOLE, eos_ids=()))
    assert tokens.lengths.tolist() == [12] * 4
    assert not tokens.ended.any()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_response_ends_before_the_least_number_of_tokens(temperature: float) -> None:
    model = ending_policy()
    free, _ = drawn(model, replace(WHOLE, temperature=temperature))
    held, _ = drawn(model, replace(WHOLE, temperature=temperature, min_new_tokens=9))
    assert free.lengths.min() < 9 or temperature == 0.0
    for row in held.response_lists():
        assert EOS not in row[:9]
        assert len(row) > 9


def test_a_response_may_end_with_the_first_token_after_the_least_number() -> None:
    ends = tuple(range(VOCABULARY // 2))
    tokens, _ = sample(
        policy("gpt2").eval(),
        [[5, 6]] * 32,
        sampling=replace(WHOLE, eos_ids=ends, min_new_tokens=3),
        noise=KEY,
    )
    assert int(tokens.lengths.min()) == 4


def test_a_stop_string_ends_a_response_with_the_token_that_completes_it() -> None:
    """G-09."""
    model, words = policy("gpt2").eval(), tokenizer()
    free, _ = drawn(model, replace(WHOLE, eos_ids=()), decode=words.decode)
    row = free.response_lists()[1]
    stop = words.decode(row[3:5])
    tokens, _ = drawn(model, replace(WHOLE, eos_ids=(), stop_strings=(stop,)), decode=words.decode)
    assert tokens.response_lists()[1] == row[:5]
    assert tokens.ended.tolist() == [stop in words.decode(r) for r in tokens.response_lists()]


def test_no_stop_string_counts_before_the_least_number_of_tokens() -> None:
    model, words = policy("gpt2").eval(), tokenizer()
    whole = replace(WHOLE, eos_ids=())
    free, _ = drawn(model, whole, decode=words.decode)
    row = free.response_lists()[1]
    stop = words.decode(row[3:5])
    assert words.decode(row).count(stop) == 1
    for least, length in ((3, 5), (4, 5), (5, len(row)), (9, len(row))):
        held = replace(whole, stop_strings=(stop,), min_new_tokens=least)
        tokens, _ = drawn(model, held, decode=words.decode)
        assert tokens.response_lists()[1] == row[:length]


PIECES = ["", "", "a", "b", "ab", "ba", "c", "\n", "\n\n", "abc", "xaby", " a", "<|e|>", "aa"]
STOPS = ["a", "ab", "\n\n", "aba", "abab", "<|e|>", "b\n", "aaa", "abcab"]


def said(ids: list[int]) -> str:
    return "".join(PIECES[i] for i in ids)


def ends_at(ids: list[int], stops: tuple[str, ...], least: int) -> int:
    """The place of the first token after which a stop string is there that did not end before."""
    held = len(said(ids[:least]))
    for place in range(least, len(ids)):
        text = said(ids[: place + 1])
        if any(
            text[i:].startswith(s) and i + len(s) > held for s in stops for i in range(len(text))
        ):
            return place
    return len(ids)


def stopped_at(ids: list[int], stops: tuple[str, ...], least: int) -> int:
    """The same, by what is asked after every token."""
    sampling = replace(WHOLE, min_new_tokens=least, stop_strings=stops)
    asked, answers = StopStrings(sampling, said), Answers.room(1, len(ids), torch.device("cpu"))
    answers.ended.fill_(False)
    answers.tokens.copy_(torch.tensor(ids)[:, None])
    for place in range(least, len(ids)):
        asked.end(answers, place)
        if answers.ended:
            return place
    return len(ids)


def test_stop_strings_are_found_where_the_whole_text_holds_them() -> None:
    """Though little of it is read: pieces that lie across, within and beyond a string, or say
    nothing.
    """
    draw = np.random.default_rng(0)
    for _ in range(400):
        ids = draw.integers(len(PIECES), size=draw.integers(1, 24)).tolist()
        stops = tuple(draw.choice(STOPS, size=draw.integers(1, 3)).tolist())
        least = int(draw.choice([0, 0, 1, 3, 6]))
        assert stopped_at(ids, stops, least) == ends_at(ids, stops, least), (ids, stops, least)
    spread = [2, *[0] * 5, 3, *[0] * 4, 2, 3]  # a, nothing, b, nothing, ab
    assert stopped_at(spread, ("abab",), 0) == ends_at(spread, ("abab",), 0) == len(spread) - 1


def test_what_departs_from_the_whole_distribution_is_named() -> None:
    """N-01."""
    assert WHOLE.departures == ()
    assert replace(WHOLE, temperature=0.5, stop_strings=("x",)).departures == ()
    assert replace(WHOLE, min_new_tokens=2, eos_ids=()).departures == ()
    names = replace(WHOLE, min_new_tokens=2, top_k=5, top_p=0.9, temperature=0.0).departures
    assert names == ("min_new_tokens=2", "temperature=0", "top_k=5", "top_p=0.9")


def test_sampling_leaves_no_gradient_behind() -> None:
    """M-02."""
    tokens, seen = drawn(policy().eval())
    assert not seen.logprobs.requires_grad
    assert not seen.values.requires_grad
    assert tokens.mask.any()
