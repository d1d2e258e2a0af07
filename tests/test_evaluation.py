"""Evaluation on held-out prompts: numbers by hand, and nothing of training touched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import EOS, PAD, QUERIES, policy, step, timeless, train_adapter, trainer
from tiny_runs import tiny

from ppo_lab.evaluation import Evaluator, as_text, distinct
from ppo_lab.experiment import build
from ppo_lab.metric_names import METRICS, described
from ppo_lab.rollout import Sampling
from ppo_lab.rules import EVALUATED
from ppo_lab.types import Prompts, Scores

HELD_OUT = Prompts(QUERIES, [f"prompt {i}" for i in range(4)], {"wanted": [1, 2, 3, 4]})
SAMPLING = Sampling(max_new_tokens=6, eos_ids=(EOS,), pad_id=PAD)


def by_length(prompts: list[str], completions: list[str], wanted: list[int]) -> Scores:
    """Words of the completion beside the number that a column wants."""
    assert len(prompts) == len(completions) == len(wanted)
    raw = torch.tensor(
        [float(len(c.split()) - w) for c, w in zip(completions, wanted, strict=True)]
    )
    return Scores(-raw.abs(), {"length": raw})


def gold(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(len(c)) for c in completions]


def evaluator(model: Any = None, **changes: Any) -> Evaluator:
    made = trainer(model, reward=by_length)
    settings: dict[str, Any] = {"sampling": SAMPLING, "seed": 1, "kept": 3, "gold": gold}
    return Evaluator(made, HELD_OUT, **settings | changes)


def test_every_number_is_what_its_name_says() -> None:
    """E-01: reward, KL, length and variety, and the reward's own parts."""
    model = policy(lora=True)
    train = evaluator(model)
    train_adapter(model, size=1.0)
    found = train()
    tokens, seen = train.trainer.draw(train.prompts, train.sampling, train.noise)
    texts = train.trainer.responses(HELD_OUT, tokens)
    scores = by_length(HELD_OUT.texts, texts, HELD_OUT.columns["wanted"])
    reference = train.trainer.reference.logprobs(tokens, temperature=1.0)
    kl = ((seen.logprobs - reference) * tokens.mask).sum().item() / 4
    expected = {
        "mean_reward": scores.total.mean().item(),
        "std_reward": scores.total.std().item(),
        "kl": kl,
        "response_length": sum(len(r) for r in tokens.response_lists()) / 4,
        "eos_rate": sum(EOS in r for r in tokens.response_lists()) / 4,
        "distinct_2": distinct(texts, n=2),
        "reward/length": scores.parts["length"].mean().item(),
        "gold": sum(len(t) for t in texts) / 4,
        "objective": scores.total.mean().item() - 0.2 * kl,
    }
    assert found.metrics == pytest.approx(expected, rel=1e-5)
    assert abs(kl) > 0.01
    own = {name for name in found.metrics if not name.startswith("reward/")}
    assert own == {*EVALUATED, "gold"}  # what `objective` may name


def test_every_number_is_documented_with_its_unit() -> None:
    measured = {f"eval/{name}" for name in evaluator()().metrics}
    assert {name for name in METRICS if name.startswith("eval/")} < measured
    assert all(unit and meaning for unit, meaning in map(described, measured))
    assert described("reward/sad/vader") != described("eval/reward/sad/vader") != ("", "")
    assert described("loss") == described("eval/loss") == described("my/reward/x") == ("", "")


def test_policy_and_reference_answer_the_same_prompts_with_the_same_noise() -> None:
    """E-01: before any training the two answers are the same, afterwards they are not."""
    model = policy(lora=True)
    made = evaluator(model)
    first = made()
    assert [s.prompt for s in first.samples] == ["prompt 0", "prompt 1", "prompt 2"]
    for sample in first.samples:
        assert sample.response == sample.reference_response
        assert sample.score == sample.reference_score
        assert sample.gold == sample.reference_gold == len(sample.response)
    assert first.metrics["kl"] == pytest.approx(0.0, abs=1e-5)
    train_adapter(model, size=1.0)
    later = made()
    assert [s.reference_response for s in later.samples] == [s.response for s in first.samples]
    assert [s.response for s in later.samples] != [s.response for s in first.samples]


def test_an_evaluation_repeats_itself_and_follows_its_seed() -> None:
    """C-09."""
    one = evaluator()
    assert one().metrics == one().metrics
    assert one().samples == evaluator()().samples
    other = evaluator(seed=2)
    assert [s.response for s in other().samples] != [s.response for s in one().samples]


def test_at_a_temperature_the_reference_is_asked_at_the_same_one() -> None:
    """E-01: a policy that is still its reference has no KL, however it is sampled."""
    found = evaluator(policy(lora=True), sampling=replace(SAMPLING, temperature=0.5))()
    assert found.metrics["kl"] == pytest.approx(0.0, abs=1e-5)


def test_a_run_is_judged_by_prompts_that_it_is_not_trained_on(tmp_path: Path) -> None:
    """E-01."""
    lab = build(tiny(tmp_path), tmp_path / "run")
    judged, trained = lab.evaluator.prompts.texts, lab.stream.prompts.texts
    assert (len(judged), len(trained)) == (4, 18)
    assert not set(judged) & set(trained)


def test_training_goes_on_as_if_it_had_not_been_evaluated() -> None:
    """E-01: weights, noise, moments and sampling are those of training."""
    plain, watched = trainer(), evaluator(sampling=replace(SAMPLING, temperature=0.0, top_k=2))
    for _ in range(2):
        expected = timeless(step(plain))
        watched()
        assert timeless(step(watched.trainer)) == expected


def test_without_a_gold_scorer_and_samples_there_are_none() -> None:
    """E-01: it works with what there is."""
    found = evaluator(gold=None, kept=0)()
    assert "gold" not in found.metrics
    assert found.samples == []


def test_one_prompt_has_no_deviation() -> None:
    made = trainer(reward=by_length)
    found = Evaluator(made, HELD_OUT[:1], sampling=SAMPLING, seed=0, kept=1)()
    assert found.metrics["std_reward"] == 0.0


def test_distinct_counts_different_pairs_of_words_over_all_texts() -> None:
    assert distinct(["a b c", "A b d"], n=2) == pytest.approx(3 / 4)
    assert distinct(["a b c", "A b d"], n=1) == pytest.approx(4 / 6)
    assert distinct(["a", ""], n=2) == 0.0


def test_a_chat_is_shown_by_its_last_message() -> None:
    assert as_text("How?") == "How?"
    parts = [{"type": "text", "text": "How "}, {"type": "text", "text": "much?"}]
    assert as_text([{"role": "user", "content": parts}]) == "How much?"
    assert (
        as_text([{"role": "system", "content": "x"}, {"role": "user", "content": "How?"}]) == "How?"
    )


@pytest.mark.parametrize(("then", "now"), [(2, 4), (2, 99), (4, 2), (0, 2), (3, 3)])
def test_as_many_samples_are_kept_as_a_resumed_run_asks_for(then: int, now: int) -> None:
    before = evaluator(kept=then)
    before()
    resumed, fresh = evaluator(kept=now), evaluator(kept=now)
    resumed.load_state_dict(before.state_dict())
    drawn_before = resumed._reference
    assert resumed().samples == fresh().samples
    assert (resumed._reference is drawn_before) == (then >= now)


def test_of_the_reference_s_answers_only_those_shown_are_drawn() -> None:
    made = evaluator(kept=2)
    made()
    texts, scores, _ = made._reference_answers()
    assert len(texts) == len(scores.total) == 2
    assert [s.reference_response for s in evaluator(kept=4)().samples][:2] == texts
