"""Recorded passes of updates and collection teach and say what launched ones do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_graphed import Tape
from tiny_models import policy, ragged, timeless, train_adapter, trainer, weights
from torch.testing import assert_close

from ppo_lab.models.fast.decoder import FastDecoder
from ppo_lab.models.trunk import Trunk
from ppo_lab.types import Scores

SCORED = Scores(torch.tensor([1.0, -0.5, 2.0, 0.25]))
SETTINGS: dict[str, Any] = {"mini_batch_size": 2, "gradient_accumulation_steps": 2, "ppo_epochs": 3}


@pytest.fixture
def a_gpu_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tape], None]:
    """Trunks believe to be on a GPU, and passes are recorded by the tape."""

    def take(tape: Tape) -> None:
        monkeypatch.setattr(Trunk, "_device", "cuda")
        monkeypatch.setattr(FastDecoder, "_passes_whole", lambda *_: True)
        monkeypatch.setattr("ppo_lab.recorded.Recorder", lambda _: tape)
        monkeypatch.setattr("ppo_lab.recorded.has_room", lambda _: True)

    return take


def learn(iterations: int = 2, **settings: Any) -> tuple[list[dict[str, float]], Any]:
    """Statistics of each iteration and moved weights, of an adapter that is trained already."""
    model = policy("bloom", lora=True)
    train_adapter(model)
    made = trainer(model, **SETTINGS | settings)
    stats = [made.learn(made.collect(ragged()), SCORED) for _ in range(iterations)]
    return [timeless(s) for s in stats], weights(model)


def assert_alike(one: Any, other: Any) -> None:
    for ours, theirs in zip(one[0], other[0], strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert_close(one[1], other[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"entropy_coef": 0.1}, {"kl_penalty": "full"}], ids=str)
def test_recorded_passes_learn_the_same(
    settings: dict[str, Any], a_gpu_with: Callable[[Tape], None]
) -> None:
    wanted, tape = learn(**settings), Tape()
    a_gpu_with(tape)
    assert_alike(learn(**settings), wanted)
    assert tape.played >= 10  # of 12 passes that learn, the first of each of few shapes are made
