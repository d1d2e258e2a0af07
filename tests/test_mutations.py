"""The tests of the mathematics, tested: break core.py or kl.py anywhere, and one of them fails."""

from __future__ import annotations

import mutate_core
import pytest

# Breaks that change no result, so that no test can notice them.
TURNED, TWO = "squared or its variance taken", "tensors have two dimensions"
HARMLESS = {
    "masked_var: centred = (masked_mean(x, mask) - x).masked_fill(~mask, 0.0)": TURNED,
    "masked_var: centred = (x - masked_mean(x, mask)).masked_fill(~mask, 1.0)": "summed masked",
    "whiten: x = x.masked_fill(~mask, 1.0)": "read masked",
    "last_token: real_tokens_from_here = mask.flip(-1).cumsum(1).flip(1)": TWO,
    "last_token: real_tokens_from_here = mask.flip(1).cumsum(-1).flip(1)": TWO,
    "last_token: real_tokens_from_here = mask.flip(1).cumsum(1).flip(-1)": TWO,
    "gae: time = values.shape[-1]": TWO,
    "gae: v, real = (values.unbind(-1), mask.unbind(1))": TWO,
    "gae: v, real = (values.unbind(1), mask.unbind(-1))": TWO,
    "gae: delta = "
    "(rewards + gamma * torch.stack(value[1:], -1) - values).masked_fill(~mask, 0.0)": TWO,
    "gae: steps, decays = (delta.unbind(-1), decay.unbind(1))": TWO,
    "gae: steps, decays = (delta.unbind(1), decay.unbind(-1))": TWO,
    "gae: advantages = torch.stack(advantage[:-1], -1).masked_fill(~mask, 0.0)": TWO,
    "value_loss: unclipped = (target - new) ** 2": TURNED,
    "value_loss: clipped = "
    "(target - new.clamp(old - cliprange_value, old + cliprange_value)) ** 2": TURNED,
    "explained_variance: rounding = -8 * torch.finfo(returns.dtype).eps * largest": TURNED,
    "explained_variance: return torch.where("
    "var > rounding ** 2, 1.0 - masked_var(values - returns, mask) / var, 0.0)": TURNED,
}

# The mistakes that trainers in the field have made, each as a change of the text of core.py.
MISTAKES = {
    "KL with its sign turned": ("d = (logprobs - ref_logprobs)", "d = (ref_logprobs - logprobs)"),
    "k2 without its half": ("0.5 * d**2", "d**2"),
    "KL rewarded, not penalised": ("(-kl_coef * kl)", "(kl_coef * kl)"),
    "score on every token": ("~last_token(mask)", "~mask"),
    "score on the last column": (
        "mask & (real_tokens_from_here == 1)",
        "mask.cumsum(1) == mask.shape[1]",
    ),
    "GAE through masked tokens": ("torch.where(real[t], v[t], value[t + 1])", "v[t]"),
    "GAE forwards in time": ("reversed(range(time))", "range(time)"),
    "no lambda in GAE": ("gamma * lam)", "gamma)"),
    "returns without values": ("(advantages + values).masked", "advantages.masked"),
    "biased variance": ("(mask.sum() - 1)", "mask.sum()"),
    "mean added back to advantages": ("if shift_mean else", "if not shift_mean else"),
    "padding whitened": ("whitened + mean).masked_fill(~mask, 0.0)", "whitened + mean)"),
    "optimistic clip": (
        "torch.maximum(unclipped, clipped), c",
        "torch.minimum(unclipped, clipped), c",
    ),
    "one range for both sides": ("1.0 + high", "1.0 + cliprange"),
    "two-sided clip fraction": ("bound & (ratio > 1.0)", "ratio > 1.0 + high"),
    "ratio turned over": ("(logprobs - old_logprobs)", "(old_logprobs - logprobs)"),
    "value clipped around the return": ("new.clamp(old -", "new.clamp(target -"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_the_field_turns_a_test_red(mistake: str) -> None:
    file, tests, names = mutate_core.targets()[0]
    source = (mutate_core.ROOT / file).read_text()
    old, new = MISTAKES[mistake]
    assert source.count(old) >= 1, "core.py has changed: say the mistake anew"
    mutant = mutate_core.Mutant("core", mistake, source.replace(old, new))
    assert mutate_core.killer(tests, names, mutant) not in (None, "import")


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_every_systematic_break_turns_a_test_red(every: int) -> None:
    alive, count = mutate_core.survivors(spared=HARMLESS, every=every)
    assert count > 300 // every
    assert alive == []


def test_an_unbroken_module_passes() -> None:
    """Else everything above would be no proof."""
    for file, tests, names in mutate_core.targets():
        same = mutate_core.Mutant("nothing", "unchanged", (mutate_core.ROOT / file).read_text())
        assert mutate_core.killer(tests, names, same) is None
