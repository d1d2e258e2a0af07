"""The KL controllers by TRL 0.11.4's golden numbers, their direction, and their state."""

from __future__ import annotations

import pytest

from ppo_lab.kl import AdaptiveKLController, FixedKLController


def after_one_update(kl: float, n_samples: int = 256) -> float:
    controller = AdaptiveKLController(0.2, target=6.0, horizon=10000)
    controller.update(kl, n_samples=n_samples)
    return controller.value


def test_golden_numbers_of_one_update() -> None:
    """256 samples, beta 0.2, target 6, horizon 10000; the error saturates at a fifth."""
    assert after_one_update(0.0) == pytest.approx(0.198976, rel=1e-9)
    assert after_one_update(4.8) == pytest.approx(0.198976, rel=1e-9)
    assert after_one_update(5.4) == pytest.approx(0.199488, rel=1e-9)
    assert after_one_update(6.0) == pytest.approx(0.2, rel=1e-9)
    assert after_one_update(6.6) == pytest.approx(0.200512, rel=1e-9)
    assert after_one_update(100.0) == pytest.approx(0.201024, rel=1e-9)


def test_golden_numbers_of_a_sequence_of_updates() -> None:
    """One controller that sees KL 0, 3, 6, 9 and 100 in turn, as TRL 0.11.4 was run."""
    controller = AdaptiveKLController(0.2, target=6.0, horizon=10000)
    betas = []
    for kl in (0.0, 3.0, 6.0, 9.0, 100.0):
        controller.update(kl, n_samples=256)
        betas.append(controller.value)
    assert betas == pytest.approx([0.198976, 0.197957, 0.197957, 0.198971, 0.199990], abs=5e-7)


def test_the_move_is_in_proportion_to_the_samples_seen() -> None:
    assert after_one_update(100.0, n_samples=512) == pytest.approx(0.2 * (1 + 0.2 * 512 / 10000))


def test_a_fixed_coefficient_never_moves() -> None:
    controller = FixedKLController(0.2)
    controller.update(1e9, n_samples=10**6)
    assert controller.value == 0.2


def test_an_adaptive_coefficient_of_zero_stays_zero() -> None:
    controller = AdaptiveKLController(0.0, target=6.0, horizon=100)
    controller.update(100.0, n_samples=50)
    assert controller.value == 0.0


@pytest.mark.parametrize(
    "make",
    [lambda: FixedKLController(0.2), lambda: AdaptiveKLController(0.2, target=6.0, horizon=100)],
)
def test_a_restored_controller_continues_to_the_same_numbers(make) -> None:
    whole, first = make(), make()
    whole.update(9.0, n_samples=16)
    first.update(9.0, n_samples=16)
    second = make()
    second.load_state_dict(first.state_dict())
    assert second.value == whole.value
    whole.update(1.0, n_samples=16)
    second.update(1.0, n_samples=16)
    assert second.value == whole.value
    assert isinstance(second.state_dict()["value"], float)
