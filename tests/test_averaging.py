"""The policy's moving average: what it is, where it stands in, and that training never sees it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny_models import policy, ragged, step, timeless, trainer, weights
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from ppo_lab.averaging import MovingAverage
from ppo_lab.processes.alone import Whole


def test_an_average_by_hand_and_the_weights_back_in_their_place() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    average = MovingAverage(model, decay=0.15)
    expected = 1.0
    for weight, decay in (
        (3.0, 0.1),
        (5.0, 0.15),
        (2.0, 0.15),
    ):  # 1/10, then 2/11 and 3/12 are more
        nn.init.constant_(model.weight, weight)
        average.update()
        expected = decay * expected + (1 - decay) * weight
    with average.in_place():
        assert_close(model.weight.item(), expected, rtol=1e-6, atol=0.0)
    assert model.weight.item() == 2.0


def test_an_average_of_half_precision_weights_moves_by_less_than_their_rounding() -> None:
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.constant_(model.weight, 1.0)
    average = MovingAverage(model, decay=0.99)
    average.steps = 10_000  # from where on it is the decay that counts
    nn.init.constant_(model.weight, 1.0625)
    for _ in range(100):
        average.update()
    expected = 1.0625 - 0.0625 * 0.99**100
    assert_close(average.average["weight"].item(), expected, rtol=1e-5, atol=0.0)
    with average.in_place():
        assert_close(model.weight.item(), expected, rtol=2**-8, atol=0.0)
    assert model.weight.item() == 1.0625


def test_without_a_decay_there_is_no_average() -> None:
    made = trainer()
    step(made)
    before = weights(made.policy)
    with made.average.in_place():
        assert all(torch.equal(p, before[n]) for n, p in weights(made.policy).items())
    assert made.average.average == {}


@pytest.mark.parametrize("lora", [False, True])
def test_training_never_sees_the_average_and_what_is_saved_is_it(
    lora: bool, tmp_path: Path
) -> None:
    plain, averaged = (trainer(policy("gpt2", lora=lora), ema_decay=decay) for decay in (0.0, 0.5))
    for _ in range(3):
        assert timeless(step(plain)) == timeless(step(averaged))
    assert all(
        torch.equal(p, weights(averaged.policy)[n]) for n, p in weights(plain.policy).items()
    )
    own = averaged.collect(ragged()).logprobs
    with averaged.average.in_place():
        smooth = averaged.collect(ragged()).logprobs
    assert not torch.allclose(own, smooth, atol=1e-4)
    assert_close(averaged.collect(ragged()).logprobs, own)
    assert not any("v_head" in name for name in averaged.average.average)
    if not lora:
        averaged.save_pretrained(str(tmp_path))
        saved = AutoModelForCausalLM.from_pretrained(tmp_path)
        with averaged.average.in_place():
            for name, parameter in averaged.policy.pretrained_model.named_parameters():
                assert torch.equal(parameter, saved.get_parameter(name))


def test_a_run_goes_on_with_its_average() -> None:
    made = trainer(ema_decay=0.9)
    step(made)
    state = copy.deepcopy(made.state_dict())
    other = trainer(ema_decay=0.9)
    other.load_state_dict(state)
    for trained in (made, other):
        step(trained)
    assert other.average.steps == made.average.steps == 4
    for name, average in made.average.average.items():
        assert torch.equal(average, other.average.average[name])


@pytest.mark.parametrize("behind", [False, True])
def test_skipped_steps_count_whether_or_not_they_are_waited_for(
    behind: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The average moves on towards the weights, which stay where they are."""
    monkeypatch.setattr(Whole, "is_behind", behind)
    made = trainer(ema_decay=0.5, ppo_epochs=2)
    step(made)
    stood, before = weights(made.policy), copy.deepcopy(made.average.average)
    made.config.ratio_threshold = 1e-6
    assert step(made)["ppo/skipped_updates"] == 2
    assert made.average.steps == 4
    assert all(torch.equal(p, stood[name]) for name, p in weights(made.policy).items())
    for name, weight in made.average.weights.items():
        decays = 3 / 12 * 4 / 13
        expected = weight + decays * (before[name] - weight)
        assert_close(made.average.average[name], expected.detach())
