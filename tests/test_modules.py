"""Modules and weights are found as torch finds them, with less said on the way."""

from __future__ import annotations

import pytest
import torch
from tiny_models import policy, ragged, step, trainer
from torch import nn

from ppo_lab import AutoModelForCausalLMWithValueHead
from ppo_lab.modules import modules_of, parameters_of, set_training


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["bloom", "gpt2", "llama"])
def test_modules_and_weights_are_those_that_torch_finds(kind: str, lora: bool) -> None:
    made = policy(kind, lora=lora)
    assert set(modules_of(made)) == set(made.modules())
    assert len(modules_of(made)) == len(set(made.modules()))
    assert {id(p) for p in parameters_of(made)} == {id(p) for p in made.parameters()}


def test_what_is_put_in_or_replaced_is_found_the_next_time() -> None:
    made = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    made[0].weight = nn.Parameter(torch.zeros(2, 2))
    made.append(made[0])  # shared
    made.append(nn.Linear(2, 1))
    assert any(p is made[0].weight for p in parameters_of(made))
    assert {id(p) for p in parameters_of(made)} == {id(p) for p in made.parameters()}
    made[1].bias = None
    assert len(modules_of(made)) == 4
    assert all(isinstance(p, torch.Tensor) for p in parameters_of(made))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_mode_is_for_what_recomputes(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, switched = policy("llama"), []
    train = AutoModelForCausalLMWithValueHead.train
    monkeypatch.setattr(
        AutoModelForCausalLMWithValueHead,
        "train",
        lambda model, mode=True: switched.append(mode) or train(model, mode),
    )
    if checkpointing:
        made.gradient_checkpointing_enable()
    made.pretrained_model.train()  # whoever left it so
    for on in (False, True, True, False):
        set_training(made, on)
        layers = made.trunk.decoder.layers
        assert all(layer.training is (on and checkpointing) for layer in layers)
        if not (on and checkpointing):
            assert not any(module.training for module in made.modules())
    assert switched == ([False, True, True, False] if checkpointing else [False])


def test_models_are_not_walked_through_to_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer without gradient checkpointing switches no module, iteration after iteration."""
    made = trainer(policy(lora=True))
    step(made)
    monkeypatch.setattr(nn.Module, "train", lambda *_: pytest.fail("modules are switched"))
    step(made)
    made.collect(ragged())
