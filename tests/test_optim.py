"""Adam in two makes, and the learning rate over a run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from ppo_lab.errors import ConfigError
from ppo_lab.optim import TFAdam, advance, make_optimizer, make_schedule

GRADIENTS = (0.5, -2.0, 1.0)


def descend(make: Any, gradients: tuple[float, ...] = GRADIENTS) -> list[float]:
    """A single weight that starts at 1, after each of these gradients."""
    weight = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer, seen = make([weight]), []
    for gradient in gradients:
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        seen.append(weight.item())
    return seen


def test_tensorflows_adam_by_hand() -> None:
    """theta -= lr sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps)."""
    lr, b1, b2, eps = 0.1, 0.9, 0.999, 1e-3
    theta, m, v, expected = 1.0, 0.0, 0.0, []
    for t, g in enumerate(GRADIENTS, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        theta -= lr * math.sqrt(1 - b2**t) / (1 - b1**t) * m / (math.sqrt(v) + eps)
        expected.append(theta)
    assert descend(lambda w: TFAdam(w, lr=lr, eps=eps)) == pytest.approx(expected, rel=1e-12)
    # The first step: 0.1 sqrt(0.001) / 0.1 * 0.05 / (0.5 sqrt(0.001) + 0.001), by a calculator.
    assert 1.0 - expected[0] == pytest.approx(0.0940518, abs=1e-6)


def test_without_an_epsilon_to_speak_of_both_makes_agree() -> None:
    ours = descend(lambda w: TFAdam(w, lr=0.1, eps=1e-15))
    torchs = descend(lambda w: torch.optim.Adam(w, lr=0.1, eps=1e-15))
    assert ours == pytest.approx(torchs, rel=1e-9)


def test_tensorflows_epsilon_damps_the_first_steps_far_more() -> None:
    small = (1e-4,) * 3
    ours, torchs = (
        descend(make, small)[0]
        for make in (
            lambda w: TFAdam(w, lr=0.1, eps=1e-5),
            lambda w: torch.optim.Adam(w, lr=0.1, eps=1e-5),
        )
    )
    assert (1 - ours) / (1 - torchs) == pytest.approx(0.2642, abs=1e-3)


@pytest.mark.parametrize("adam", ["torch", "tf"])
def test_weights_whose_moments_would_fall_to_0_are_refused(adam: str) -> None:
    settings: dict[str, Any] = {"learning_rate": 1e-5, "value_learning_rate": 0.0, "eps": 1e-8}
    model, head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
    make_optimizer(model.bfloat16(), head, adam=adam, weight_decay=0.0, **settings)
    with pytest.raises(ConfigError, match="the trained weights are in float16"):
        make_optimizer(model.half(), head, adam=adam, weight_decay=0.0, **settings)


def test_weight_decay_is_decoupled() -> None:
    for gradient in (0.0, 0.5):
        plain, decayed = (
            descend(lambda w, d=d: TFAdam(w, lr=0.1, weight_decay=d), (gradient,))[0]
            for d in (0.0, 0.5)
        )
        assert plain - decayed == pytest.approx(0.05)


def test_tensorflows_adam_goes_on_from_its_state() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = TFAdam([weight], lr=0.1)
    for i, gradient in enumerate(GRADIENTS):
        if i == 2:
            state = optimizer.state_dict()
            optimizer = TFAdam([weight], lr=0.1)
            optimizer.load_state_dict(state)
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
    assert weight.item() == pytest.approx(descend(lambda w: TFAdam(w, lr=0.1))[-1], rel=1e-12)


@pytest.mark.parametrize("adam", ["torch", "tf"])
def test_frozen_weights_are_not_among_the_trained_and_the_head_has_its_own_group(adam: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    model[0].requires_grad_(False)
    settings: dict[str, Any] = {"eps": 1e-8, "weight_decay": 0.1, "learning_rate": 1e-3}
    optimizer = make_optimizer(model, model[2], adam=adam, value_learning_rate=0.0, **settings)
    trunk, head = optimizer.param_groups
    assert {id(p) for p in trunk["params"]} == {id(p) for p in model[1].parameters()}
    assert {id(p) for p in head["params"]} == {id(p) for p in model[2].parameters()}
    assert (trunk["lr"], head["lr"]) == (1e-3, 1e-3)
    assert (trunk["weight_decay"], head["weight_decay"]) == (0.1, 0.0)
    assert isinstance(optimizer, TFAdam) == (adam == "tf")


@pytest.mark.parametrize(
    ("course", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1]),
        ("constant", 2, [1 / 3, 2 / 3, 1, 1, 1]),
        ("linear", 0, [1, 3 / 4, 1 / 2, 1 / 4, 0]),
        ("linear", 2, [1 / 3, 2 / 3, 1, 1 / 2, 0]),
        ("cosine", 0, [1, 0.5 + 0.5 / math.sqrt(2), 0.5, 0.5 - 0.5 / math.sqrt(2), 0]),
    ],
)
def test_the_learning_rate_over_four_iterations(
    course: str, warmup: int, expected: list[float]
) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = make_schedule(optimizer, lr_schedule=course, warmup_steps=warmup, steps=4)
    rates = []
    for _ in expected:
        rates.append(optimizer.param_groups[0]["lr"] / 2.0)
        advance(schedule)
    assert_close(rates, [float(x) for x in expected], rtol=1e-9, atol=1e-9)
