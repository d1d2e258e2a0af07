"""One iteration: rewards, penalties, controllers, invariants, and that it learns."""

from __future__ import annotations

import copy
import math
import resource
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import (
    EOS,
    PAD,
    QUERIES,
    SCORES,
    VOCABULARY,
    causal_lm,
    policy,
    ragged,
    step,
    tensors,
    timeless,
    train_adapter,
    trainer,
    weights,
)
from torch import Tensor
from torch.testing import assert_close

from ppo_lab.clock import Clock
from ppo_lab.config import LengthReward
from ppo_lab.core import KL_PENALTIES
from ppo_lab.evaluation import Evaluator
from ppo_lab.metrics import METRICS, known_metrics
from ppo_lab.rewards.function import FunctionScorer
from ppo_lab.rewards.lexical import length_scorer
from ppo_lab.rewards.scoring import WeightedSum
from ppo_lab.rollout import Sampling
from ppo_lab.scaling import RunningMoments, scale_scores
from ppo_lab.types import Prompts, Scores, brought_together, packed, tensors_of, unpacked

PROMPTS = Prompts(QUERIES * 4, ["?"] * 16)
SAMPLING = Sampling(max_new_tokens=6, eos_ids=(EOS,), pad_id=PAD)
LIKED = {f"w{i}" for i in range(2, 20)}


def likes_low_words(prompts: list[Any], completions: list[str]) -> Scores:
    """The share of words below w20."""
    words = [text.split() for text in completions]
    total = torch.tensor([sum(w in LIKED for w in row) / max(len(row), 1) for row in words])
    return Scores(total, {"low": total})


class Stream:
    """The same prompts again and again."""

    batches = 0

    def next_batch(self) -> Prompts:
        self.batches += 1
        return PROMPTS


def running(**settings: Any) -> Any:
    own = {"reward": likes_low_words, "sampling": SAMPLING, "batch_size": 16} | settings
    return trainer(own.pop("model", None), **own)


# --- KL


@pytest.mark.parametrize("kl_penalty", KL_PENALTIES)
@pytest.mark.parametrize("kind", ["bloom", "gpt2"])
@pytest.mark.parametrize("lora", [False, True])
def test_kl_is_zero_before_the_first_update_and_no_penalty_is_negative(
    kl_penalty: str, kind: str, lora: bool
) -> None:
    """N-01, N-02: exactly zero; afterwards k1 is logged beside what the penalty used."""
    made = trainer(policy(kind, lora=lora), kl_penalty=kl_penalty)
    made.drawn = replace(made.sampling, temperature=0.7)
    first, second = step(made), step(made)
    assert first["kl"] == first["objective/kl"] == first["objective/kl_k3"] == 0.0
    assert second["kl"] != 0.0
    if kl_penalty == "kl":
        assert second["objective/kl"] == pytest.approx(second["kl"])
    else:
        assert second["objective/kl"] > 0.0
        assert second["objective/kl"] != pytest.approx(second["kl"])


def test_kl_of_sampled_responses_is_zero_within_rounding_in_an_iteration() -> None:
    """N-03, N-04: the sampler's log-probs are those of a whole forward, at any temperature."""
    for kind in ("bloom", "gpt2", "llama"):
        made = running(model=policy(kind), sampling=replace(SAMPLING, temperature=0.7))
        stats = made.iteration(PROMPTS)
        assert abs(stats["kl"]) < 1e-4
        assert stats["ppo/policy/first_minibatch_ratio_error"] < 1e-4


def test_everything_that_is_collected_is_at_the_temperature_of_sampling() -> None:
    warm = replace(SAMPLING, temperature=0.6)
    made = running(model=policy(lora=True), sampling=warm, kl_penalty="full")
    train_adapter(made.policy)
    tokens, seen = made.sample(PROMPTS)
    at = {"temperature": 0.6}
    assert_close(seen.logprobs, made.policy.score(tokens, **at).logprobs, rtol=1e-4, atol=1e-5)
    found = made.collect(tokens, seen)
    assert_close(found.ref_logprobs, made.reference.logprobs(tokens, **at))
    assert_close(found.full_kl, made.reference.full_kl(tokens, **at))
    assert float(found.full_kl.max()) > 0.01


@pytest.mark.parametrize("changes", [{"top_k": 5}, {"top_p": 0.8}, {"min_new_tokens": 2}], ids=str)
def test_what_biases_kl_is_named_once(changes: dict[str, Any]) -> None:
    """N-01."""
    ((name, value),) = changes.items()
    made = running(sampling=replace(SAMPLING, **changes))
    with pytest.warns(RuntimeWarning, match=f"drawn with {name}={value}, not from the whole"):
        made.iteration(PROMPTS)
    made.iteration(PROMPTS)  # a second warning would be an error


def test_a_setting_of_another_sampler_is_named_as_well() -> None:
    """N-01: forced endings and repetition penalties change the distribution too."""
    made = trainer()
    responses = made.generate(
        tensors(QUERIES), return_prompt=False, repetition_penalty=1.5, max_new_tokens=3
    )
    with pytest.warns(RuntimeWarning, match=r"repetition_penalty=1\.5"):
        step(made, responses=responses)


def test_a_model_that_changes_between_sampling_and_training_is_noticed() -> None:
    """N-05, N-22: first ratios off 1, and KL off 0 before any update, each said."""
    made = trainer()
    rollout = made.collect(ragged())
    with torch.no_grad():
        made.policy.trunk.model.get_input_embeddings().weight.mul_(1.5)
    with pytest.warns(RuntimeWarning, match="changed by .* before any update"):
        made.learn(rollout, Scores(torch.tensor(SCORES)))
    other = trainer()
    with torch.no_grad():
        other.policy.trunk.model.get_input_embeddings().weight.mul_(1.5)
    with pytest.warns(RuntimeWarning, match="KL to the reference is .* must be 0"):
        step(other)


def test_a_kl_that_is_no_number_before_the_first_update_is_noticed() -> None:
    made = trainer()
    with torch.no_grad():
        made.policy.trunk.model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.warns(RuntimeWarning, match="KL to the reference is nan .* must be 0"):
        step(made)


def test_a_reference_of_ones_own_may_be_anywhere() -> None:
    """A-03: its KL is no cause for a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert abs(step(trainer(policy(), causal_lm(seed=4)))["kl"]) > 0.1


def test_an_adaptive_beta_moves_by_the_penalty_s_kl_and_a_fixed_one_never() -> None:
    fixed, adaptive = trainer(), trainer(adap_kl_ctrl=True, target=6.0, horizon=10)
    for made in (fixed, adaptive):
        step(made)
    assert fixed.kl_controller.value == 0.2
    assert adaptive.kl_controller.value == pytest.approx(0.2 * (1 - 0.2 * 4 / 10))
    assert step(adaptive)["kl_coef"] == pytest.approx(0.2 * (1 - 0.2 * 4 / 10))


def test_an_adaptive_beta_stays_where_the_penalty_s_kl_is_the_target() -> None:
    twin = trainer(kl_penalty="mse")
    _, second = step(twin), step(twin)
    assert second["objective/kl"] != pytest.approx(second["kl"], rel=0.1)
    target = second["objective/kl"]
    adaptive = trainer(kl_penalty="mse", adap_kl_ctrl=True, target=target, horizon=10)
    step(adaptive)
    before = adaptive.kl_controller.value
    step(adaptive)
    assert adaptive.kl_controller.value == pytest.approx(before, rel=1e-5)


def test_the_learning_rate_that_is_told_is_the_policy_s() -> None:
    assert step(trainer(learning_rate=1e-3, value_learning_rate=1e-2))["ppo/learning_rate"] == 1e-3


# --- scores


def test_the_penalty_falls_on_responses_that_nothing_ended() -> None:
    """N-13: on two of the four; raw scores are shown without it."""
    stats = step(trainer(missing_eos_penalty=2.0))
    assert stats["mean_reward"] == pytest.approx(sum(SCORES) / 4)
    assert stats["ppo/mean_scores"] == pytest.approx((sum(SCORES) - 2 * 2.0) / 4)
    assert stats["tokens/eos_rate"] == 0.5


def test_a_stop_token_of_ones_own_counts_as_an_end() -> None:
    """N-13, N-14: the model's own EOS then does not."""
    made = trainer(missing_eos_penalty=2.0, sampling=replace(SAMPLING, eos_ids=(24,)))
    stats = step(made)  # the second response holds 24
    assert stats["tokens/eos_rate"] == 0.25
    assert stats["ppo/mean_scores"] == pytest.approx((sum(SCORES) - 3 * 2.0) / 4)


def test_ends_of_sampled_responses_come_from_sampling() -> None:
    """N-14: a response that fills its width and ends there has ended."""
    made = running(missing_eos_penalty=1.0)
    tokens, _ = made.sample(PROMPTS)
    rollout = made.collect(tokens)
    shaped = made.shape(rollout, Scores(torch.zeros(16)))
    held = torch.tensor([EOS in row for row in tokens.response_lists()])
    assert torch.equal(tokens.ended, held)
    assert torch.equal(shaped.scores, torch.where(held, 0.0, -1.0))


def test_an_answer_that_its_prompt_begins_is_shown_to_rewards_as_a_whole() -> None:
    chat = [{"role": "user", "content": "?"}]
    prompts = Prompts(QUERIES, [chat, chat, "?", "?"], prefills=["Well,", "", "", ""])
    assert trainer().responses(prompts, ragged()) == [
        "Well, w20 w21 w22",
        "w23 w24",
        " w25 w26 w27 w28 w29",
        " w30 w31",
    ]


def test_functions_are_shown_the_ids_of_responses_in_training_and_in_evaluations() -> None:
    seen: list[tuple[list[str], list[list[int]]]] = []

    def long(completions: list[str], completion_ids: list[list[int]]) -> list[float]:
        seen.append((completions, completion_ids))
        return [float(len(row)) for row in completion_ids]

    words = length_scorer(LengthReward(), device="cpu")
    parts = {"long": (1.0, FunctionScorer(long, name="long")), "words": (1.0, words)}
    made = running(reward=WeightedSum("mix", parts=parts))
    made.iteration(PROMPTS)
    assert made.latest is not None
    assert seen[0][1] == made.latest[1].response_lists()
    found = Evaluator(made, PROMPTS[:4], sampling=SAMPLING, seed=0, kept=2)()
    assert found.metrics["reward/long"] == found.metrics["response_length"]
    assert [len(texts) for texts, _ in seen] == [16, 4, 2]
    for texts, ids in seen:
        assert [made.decode(row).split() for row in ids] == [text.split() for text in texts]


def test_the_score_is_on_the_last_token_whether_or_not_it_is_an_end() -> None:
    """N-12: with lambda 0 the advantage of the last token holds it whole, of no other."""
    made = trainer(lam=0.0, whiten_advantages=False)
    rollout = made.collect(ragged())
    shaped = made.shape(rollout, Scores(torch.tensor(SCORES)))
    last = rollout.tokens.lengths - 1
    rows = torch.arange(4)
    got = (shaped.batch.advantages + rollout.values)[rows, last]
    assert_close(got, torch.tensor(SCORES))


@pytest.mark.parametrize("heard", [False, True])
def test_rewards_advantages_and_metrics_ask_a_device_once(
    heard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies on the device has no numbers; with `heard`, its tokens were asked for before."""
    scores, asked = Scores(torch.tensor(SCORES)), []
    settings = {"kl_penalty": "full", "whiten_rewards": True, "use_score_scaling": True}
    made, again = trainer(**settings), trainer(**settings)
    rollout = made.collect(ragged())
    expected = made.shape(rollout, scores)

    def arrived(given: list[Tensor]) -> list[Tensor]:
        asked.append(len([x for x in given if x.is_meta]))
        return tensors_of(rollout)

    monkeypatch.setattr("ppo_lab.types.on_host", arrived)
    there = rollout.to("meta")
    if heard:
        there = replace(there, tokens=replace(there.tokens, host=rollout.tokens))
    there = replace(there, tokens=replace(there.tokens, below=torch.empty(4, device="meta")))
    shaped = again.shape(there, scores)
    assert asked == [5 if heard else 11]
    assert shaped.batch.tokens.below is there.tokens.below
    assert torch.equal(shaped.batch.advantages, expected.batch.advantages)
    assert known_metrics(shaped, scores) == known_metrics(expected, scores)


def test_tensors_go_together_and_come_apart_as_they_were() -> None:
    """Each begins where a GPU reads 16 bytes at a time; what is elsewhere stays there."""
    tensors = [torch.rand(3, 5), torch.tensor(7), torch.rand(3) > 0.5, torch.zeros(0)]
    tensors += [torch.rand(2, 2, dtype=torch.bfloat16), torch.arange(6).reshape(2, 3).T]
    found = unpacked(packed(tensors), tensors)
    assert [x.data_ptr() % 16 for x in found if len(x.shape)] == [found[0].data_ptr() % 16] * 5
    for ours, theirs in zip(found, tensors, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    elsewhere = torch.empty(2, device="meta")
    one, other = brought_together([elsewhere, tensors[0]], torch.device("cpu"))
    assert one is elsewhere
    assert torch.equal(other, tensors[0])


def test_scores_are_scaled_by_running_moments_by_hand() -> None:
    """N-17: constant scores stay finite, half precision is scaled in float32."""
    moments, first, second = RunningMoments(), torch.tensor([1.0, 3.0]), torch.tensor([5.0])
    scale = {"use_score_scaling": True, "use_score_norm": True, "score_clip": 0.0}
    a = scale_scores(first, moments, **scale)
    assert_close(a, torch.tensor([-1.0, 1.0]) / math.sqrt(2))
    b = scale_scores(second, moments, **scale | {"use_score_norm": False})
    assert (moments.mean, moments.std) == pytest.approx((3.0, 2.0))
    assert_close(b, torch.tensor([2.5]))
    more = torch.tensor([-9.0, 0.1, 11.0])
    clipped = scale_scores(more, moments, **scale | {"score_clip": 0.5})
    every = torch.cat([first, second, more]).double()
    assert (moments.mean, moments.std) == pytest.approx((float(every.mean()), float(every.std())))
    assert_close(clipped, torch.tensor([-0.5, (0.1 - moments.mean) / moments.std, 0.5]))
    again = RunningMoments()
    again.load_state_dict(moments.state_dict())
    for found in (moments, again):
        found.update(more)
    assert (again.mean, again.std) == (moments.mean, moments.std)
    constant = scale_scores(torch.full((3,), 7.0), RunningMoments(), **scale)
    assert torch.equal(constant, torch.zeros(3))
    for count in (1, 3):
        same = torch.full((count,), 7.0)
        undivided = scale_scores(same, RunningMoments(), **scale | {"use_score_norm": False})
        assert torch.equal(undivided, same)
    made = trainer(use_score_scaling=True, use_score_norm=True)
    stats = step(made, scores=[torch.tensor(6e4, dtype=torch.float16)] * 4)
    assert math.isfinite(stats["ppo/mean_scores"])
    fine = step(trainer(), scores=[2049.0] * 4)  # which half precision rounds to 2048
    assert fine["ppo/mean_scores"] == 2049.0


def test_generate_goes_on_with_new_noise_where_the_state_was_left() -> None:
    first, second = trainer(), trainer()
    queries = [torch.tensor(query) for query in QUERIES]

    def drawn(made: Any) -> list[list[int]]:
        return [row.tolist() for row in made.generate(queries, max_new_tokens=8)]

    before = drawn(first)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    after = drawn(first)
    assert drawn(second) == after != before


def test_moments_travel_with_the_state() -> None:
    """N-17, C-01: and so do beta, schedule, optimizer and noise; the next numbers are the same."""
    settings = {
        "use_score_scaling": True,
        "adap_kl_ctrl": True,
        "lr_schedule": "linear",
        "steps": 5,
    }
    made = running(**settings)
    for _ in range(2):
        made.iteration(PROMPTS)
    state = copy.deepcopy(made.state_dict())
    other = running(**settings)
    other.load_state_dict(state)
    assert timeless(other.iteration(PROMPTS)) == timeless(made.iteration(PROMPTS))
    incomplete = {k: v for k, v in state.items() if k != "moments"}
    with pytest.raises(KeyError, match="moments"):
        other.load_state_dict(incomplete)


def test_updates_skipped_in_a_row_are_counted_on_where_the_state_was_left() -> None:
    """C-01: a run that is killed again and again would never say that it diverged."""
    made, other = trainer(), trainer()
    made.updates.skipped_in_a_row, made.updates.most_tokens = 2, 77
    other.load_state_dict(copy.deepcopy(made.state_dict()))
    assert (other.updates.skipped_in_a_row, other.updates.most_tokens) == (2, 77)


# --- statistics


def test_every_statistic_is_documented_and_every_documented_one_is_there() -> None:
    """L-06: with its unit and its meaning."""
    stats = running().iteration(PROMPTS)
    elsewhere = {"ppo/policy/sampler_gap"}  # where another engine samples
    elsewhere |= {name for name in METRICS if name.startswith("eval/")}
    own = {name for name in stats if not name.startswith("reward/")}
    assert own == METRICS.keys() - elsewhere
    assert all(unit and meaning for unit, meaning in METRICS.values())
    assert stats["reward/low"] == pytest.approx(stats["mean_reward"])


def test_entropies_are_not_negative_and_bounded_by_the_vocabulary() -> None:
    """N-23."""
    stats = step(trainer())
    assert 0 < stats["ppo/policy/entropy"] < math.log(VOCABULARY)
    assert stats["objective/entropy"] > 0


def test_statistics_of_one_sample_are_finite() -> None:
    """N-15, L-01: also of a single token."""
    made = trainer()
    stats = made.step(tensors([[5]]), tensors([[20]]), [1.0])
    assert all(math.isfinite(value) for value in stats.values())
    assert stats["ppo/std_scores"] == 0.0


def test_penalty_scores_and_rewards_add_up() -> None:
    """R-04: raw scores are logged beside those that were scaled, clipped and penalised."""
    made = trainer(score_clip=1.0, init_kl_coef=0.5)
    step(made)
    stats = step(made)
    clipped = [max(min(s, 1.0), -1.0) for s in SCORES]
    assert stats["mean_reward"] == stats["env/reward_mean"] == pytest.approx(sum(SCORES) / 4)
    assert stats["ppo/mean_scores"] == pytest.approx(sum(clipped) / 4)
    expected = stats["ppo/mean_scores"] - 0.5 * stats["objective/kl"]
    assert stats["objective/rlhf_reward"] == pytest.approx(expected, rel=1e-5)
    tokens = 14 / 4  # real tokens a sample
    assert stats["ppo/mean_non_score_reward"] == pytest.approx(
        -0.5 * stats["objective/kl"] / tokens, rel=1e-5
    )


def test_times_cover_the_iteration_and_start_anew() -> None:
    """S-02: generation has a time of its own."""
    made = running()
    for _ in range(2):
        stats = made.iteration(PROMPTS)
        phases = [stats[f"time/{p}"] for p in ("generate", "score", "reference", "update")]
        assert min(phases) > 0
        assert stats["time/iteration"] == pytest.approx(sum(phases))
        assert made.clock.read(tokens=0)["time/iteration"] == 0.0
    assert stats["peak_memory_gb"] > 0


def test_a_phase_that_comes_twice_takes_the_time_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 1.0, 5.0, 7.0, 7.0, 11.0])
    monkeypatch.setattr("ppo_lab.clock.now", lambda: next(moments))
    clock = Clock(torch.device("cpu"))
    for phase in ("score", "update", "score"):
        with clock(phase):
            pass
    found = clock.read(tokens=14)
    assert (found["time/score"], found["time/update"], found["time/iteration"]) == (5.0, 2.0, 7.0)
    assert found["tokens_per_second"] == 2.0
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB
    assert 0.2 * held < found["peak_memory_gb"] < 2 * held, "less where a run before is forgotten"


def test_what_was_broken_off_is_not_in_the_next_iteration_s_time() -> None:
    clock = Clock(torch.device("cpu"))
    with clock("generate"):
        pass
    with pytest.raises(KeyboardInterrupt), clock("update"):
        raise KeyboardInterrupt
    assert clock.read(tokens=0)["time/iteration"] == 0.0


def test_a_gpu_is_timed_by_its_own_events_and_waited_for_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moments, waited = iter([0.0, 1000.0, 1500.0, 4500.0]), []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            assert stream == "that of cuda:1"
            self.milliseconds = next(moments)

        def synchronize(self) -> None:
            waited.append(self)

        def elapsed_time(self, end: Event) -> float:
            assert end in waited, "it has not come there yet"
            return end.milliseconds - self.milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"that of {device}")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 3 * 2**30)
    clock = Clock(torch.device("cuda:1"))
    for phase in ("generate", "update"):
        with clock(phase):
            assert not waited
    assert not waited
    found = clock.read(tokens=8)
    assert (found["time/generate"], found["time/update"]) == (1.0, 3.0)
    assert (found["time/iteration"], found["tokens_per_second"]) == (4.0, 2.0)
    assert found["peak_memory_gb"] == 3.0


# --- training


def test_training_stops_at_steps() -> None:
    """T-03, L-04: and goes on from where it is, not from the beginning."""
    made, stream = running(steps=3, ppo_epochs=1), Stream()
    assert [len(m) > 0 for m in made.train(stream)] == [True] * 3
    assert (made.iterations_done, stream.batches) == (3, 3)
    assert list(made.train(stream)) == []


def test_a_tiny_run_learns_and_stays_near_its_reference() -> None:
    """N-31, N-28, E-01: the reward rises by far, KL stays bounded."""
    made = running(steps=14, ppo_epochs=4, learning_rate=2e-2, init_kl_coef=0.02)
    history = list(made.train(Stream()))
    first, last = (sum(m["mean_reward"] for m in part) / 3 for part in (history[:3], history[-3:]))
    assert last > first + 0.25
    assert history[-1]["kl"] < 30


def test_the_same_seed_gives_the_same_numbers() -> None:
    """C-09: another gives others; the global generators have no part in it."""
    runs = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        made = running(steps=2, seed=seed, mini_batch_size=4)
        torch.manual_seed(noise)
        runs.append([timeless(m) for m in made.train(Stream())])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_another_seed_draws_other_responses() -> None:
    """C-09: and not only another order of mini-batches."""
    one, again, other = (running(seed=s).sample(PROMPTS)[0].response_lists() for s in (0, 0, 1))
    assert one == again != other


def test_memory_does_not_grow_with_the_mini_batch_of_collection() -> None:
    """M-04, N-25: the reference of an adapter shares the trunk, and mini-batches change nothing."""
    shared = trainer(policy(lora=True))
    assert shared.reference._trunk is shared.policy.trunk
    one, all_at_once = (trainer(mini_batch_size=n, ppo_epochs=1) for n in (1, 4))
    a, b = one.collect(ragged()), all_at_once.collect(ragged())
    for name in ("logprobs", "values", "ref_logprobs"):
        assert_close(getattr(a, name), getattr(b, name), rtol=1e-5, atol=1e-5)
    assert weights(one.policy).keys() == weights(all_at_once.policy).keys()


def test_rewards_carry_no_gradient_into_training() -> None:
    """P-06."""
    made = trainer()
    rollout = made.collect(ragged())
    assert not rollout.logprobs.requires_grad
    shaped = made.shape(rollout, Scores(torch.tensor(SCORES)))
    assert not shaped.batch.advantages.requires_grad
