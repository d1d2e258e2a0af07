"""The mathematics of PPO by numbers worked by hand, by identities, and by what must not matter.

Every test reaches the mathematics through the name `core` of this module, so that test_mutations
can put a broken copy in its place and see a test fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from ppo_lab import core

NAN = float("nan")
PROPERTY = settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate),
)
seeds = st.integers(0, 2**20)


def floats(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def mask_of(*rows: str) -> Tensor:
    """A mask drawn as text: `x` is a real token, `.` is padding."""
    return torch.tensor([[c == "x" for c in row] for row in rows])


def random_mask(seed: int) -> Tensor:
    """Up to four rows of up to seven tokens, holes inside, at least one real token a row."""
    g = torch.Generator().manual_seed(seed)
    batch, time = (int(torch.randint(1, n, (1,), generator=g)) for n in (5, 8))
    mask = torch.rand(batch, time, generator=g) < 0.6
    mask[torch.arange(batch), torch.randint(time, (batch,), generator=g)] = True
    return mask


def random_like(mask: Tensor, seed: int, n: int) -> list[Tensor]:
    """`n` standard normal float64 tensors of the mask's shape."""
    g = torch.Generator().manual_seed(seed + 1)
    return [torch.randn(mask.shape, generator=g, dtype=torch.float64) for _ in range(n)]


def dirtied(x: Tensor, mask: Tensor, dirt: float) -> Tensor:
    return x.masked_fill(~mask, dirt)


def leaves(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)  # type: ignore[call-overload]


# --- sums, means, variances


def test_sum_mean_and_variance_count_real_tokens_alone() -> None:
    x, mask = floats([1, 2, 99], [6, 99, 99]), mask_of("xx.", "x..")
    assert core.masked_sum(x, mask).item() == 9.0
    assert core.masked_mean(x, mask).item() == 3.0
    assert core.masked_var(x, mask).item() == pytest.approx((4 + 1 + 9) / 2)


def test_mean_and_variance_of_no_token_are_zero_and_of_one_token_are_finite() -> None:
    x = floats([5, 7])
    nothing, one = mask_of(".."), mask_of(".x")
    assert core.masked_mean(x, nothing).item() == 0.0
    assert core.masked_var(x, nothing).item() == 0.0
    assert core.masked_mean(x, one).item() == 7.0
    assert core.masked_var(x, one).item() == 0.0  # N-15


@PROPERTY
@given(seeds)
def test_mean_and_variance_are_those_of_the_compressed_tokens(seed: int) -> None:
    mask = random_mask(seed)
    (x,) = random_like(mask, seed, 1)
    assert_close(core.masked_mean(x, mask), x[mask].mean())
    if mask.sum() > 1:
        assert_close(core.masked_var(x, mask), x[mask].var())


# --- whitening


def test_whitening_by_hand() -> None:
    x, mask = floats([1, 3, 77], [5, 77, 77]), mask_of("xx.", "x..")
    assert_close(core.whiten(x, mask), floats([-1, 0, 0], [1, 0, 0]), atol=1e-8, rtol=0)
    assert_close(
        core.whiten(x, mask, shift_mean=False), floats([2, 3, 0], [4, 0, 0]), atol=1e-8, rtol=0
    )


def test_whitening_uses_given_moments_of_a_larger_rollout() -> None:
    x, mask = floats([1, 3, 77]), mask_of("xx.")
    mean, var = torch.tensor(5.0).double(), torch.tensor(4.0).double()
    whitened = core.whiten(x, mask, mean=mean, var=var)
    assert_close(whitened, floats([-2, -1, 0]), atol=1e-8, rtol=0)
    kept = core.whiten(x, mask, mean=mean, var=var, shift_mean=False)
    assert_close(kept, floats([3, 4, 0]), atol=1e-8, rtol=0)


def test_whitening_keeps_tiny_and_constant_and_single_values_finite() -> None:
    assert_close(core.whiten(floats([4, 4]), mask_of("xx")), floats([0, 0]))
    assert_close(core.whiten(floats([4, 9]), mask_of("x.")), floats([0, 0]))
    assert_close(core.whiten(floats([4, 9]), mask_of("x."), shift_mean=False), floats([4, 0]))
    assert_close(core.whiten(floats([4, 9]), mask_of("..")), floats([0, 0]))
    spread = core.whiten(floats([1e-4, -1e-4]), mask_of("xx"))  # var = 2e-8, so 1e-4 / sqrt(3e-8)
    assert_close(spread, floats([1, -1]) / math.sqrt(3))


@PROPERTY
@given(seeds)
def test_whitened_values_have_unit_variance_and_no_mean_unless_it_is_kept(seed: int) -> None:
    mask = random_mask(seed)
    (x,) = random_like(mask, seed, 1)
    if mask.sum() < 2 or x[mask].var() < 1e-2:
        return
    removed, kept = core.whiten(x, mask), core.whiten(x, mask, shift_mean=False)
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    assert_close(removed[mask].mean(), zero, atol=1e-9, rtol=0)
    assert_close(kept[mask].mean(), x[mask].mean())
    for whitened in (removed, kept):
        assert_close(whitened[mask].var(), one, atol=1e-5, rtol=0)
    assert_close(core.whiten(3 * x + 5, mask), removed, atol=1e-5, rtol=0)


# --- KL


def test_kl_estimates_by_hand() -> None:
    logprobs, ref, mask = floats([-1.0, -2.0, -9]), floats([-1.5, -1.0, -1]), mask_of("xx.")
    expected = {
        "kl": [0.5, -1.0, 0],
        "abs": [0.5, 1.0, 0],
        "mse": [0.125, 0.5, 0],
        "k3": [math.exp(-0.5) - 1 + 0.5, math.exp(1.0) - 1 - 1, 0],
    }
    for kl_penalty, numbers in expected.items():
        assert_close(core.kl_estimate(logprobs, ref, mask, kl_penalty=kl_penalty), floats(numbers))
    assert_close(core.kl_estimate(logprobs, ref, mask), floats(expected["kl"]))


def test_full_kl_penalty_is_the_given_exact_kl_without_padding() -> None:
    zeros, exact, mask = floats([0, 0, 0]), floats([0.3, 0.4, NAN]), mask_of("xx.")
    got = core.kl_estimate(zeros, zeros, mask, kl_penalty="full", full_kl=exact)
    assert_close(got, floats([0.3, 0.4, 0]))


def test_a_wrong_kl_penalty_or_a_missing_full_kl_is_an_assertion_with_a_sentence() -> None:
    x, mask = floats([0, 0]), mask_of("xx")
    with pytest.raises(AssertionError, match="not 'k2'"):
        core.kl_estimate(x, x, mask, kl_penalty="k2")
    with pytest.raises(AssertionError, match="needs the KL over the vocabulary"):
        core.kl_estimate(x, x, mask, kl_penalty="full")


def test_kl_penalties_are_the_documented_five() -> None:
    assert core.KL_PENALTIES == ("kl", "abs", "mse", "k3", "full")


def test_full_kl_by_hand() -> None:
    logits = torch.tensor([[[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]], dtype=torch.float64).log()
    ref_logits = torch.tensor([[[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]]], dtype=torch.float64).log()
    expected = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert_close(core.full_kl(logits + 3, ref_logits - 1), floats([expected, 0]))


@PROPERTY
@given(seeds)
def test_penalties_but_kl_are_never_negative_and_all_vanish_for_equal_policies(seed: int) -> None:
    mask = random_mask(seed)
    logprobs, ref = random_like(mask, seed, 2)
    vocab = torch.stack(random_like(mask, seed, 4), -1)
    exact = core.full_kl(vocab, vocab.roll(1, -1))
    for kl_penalty in core.KL_PENALTIES:
        kl = core.kl_estimate(logprobs, ref, mask, kl_penalty=kl_penalty, full_kl=exact)
        same = core.kl_estimate(
            logprobs, logprobs, mask, kl_penalty=kl_penalty, full_kl=core.full_kl(vocab, vocab)
        )
        assert kl_penalty == "kl" or (kl >= 0).all()  # N-02
        assert same.abs().max() == 0.0  # N-01: exactly


@PROPERTY
@given(seeds)
def test_k1_and_k3_average_to_the_exact_kl_over_a_small_vocabulary(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits, ref_logits = torch.randn(2, 1, 1, 5, generator=g, dtype=torch.float64)
    logp, ref_logp = logits.log_softmax(-1)[0], ref_logits.log_softmax(-1)[0]  # (1, 5): tokens
    everywhere = torch.ones(1, 5, dtype=torch.bool)
    exact = core.full_kl(logits[None, 0], ref_logits[None, 0]).squeeze()
    for kl_penalty in ("kl", "k3"):
        estimate = core.kl_estimate(logp, ref_logp, everywhere, kl_penalty=kl_penalty)
        assert_close((logp.exp() * estimate).sum(), exact)


def pushed(logits: Tensor, ref_logits: Tensor, kl_penalty: str) -> Tensor:
    """E[estimate grad log pi] of one decision, over every token: how the penalty moves logits."""
    logits = logits.clone().requires_grad_()
    logp, ref = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    tokens = torch.ones(len(logits), 1, dtype=torch.bool)
    exact = core.full_kl(logits[None], ref_logits[None]).expand(len(logits), 1)
    estimate = core.kl_estimate(
        logp[:, None], ref[:, None], tokens, kl_penalty=kl_penalty, full_kl=exact
    )
    (logp.exp() * estimate[:, 0]).detach().dot(logp).backward()
    assert logits.grad is not None
    return logits.grad


@PROPERTY
@given(seeds)
def test_in_the_reward_k1_alone_has_the_gradient_of_the_kl(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits, ref = torch.randn(2, 5, generator=g, dtype=torch.float64)
    free = logits.clone().requires_grad_()
    (forward,) = torch.autograd.grad(core.full_kl(free[None], ref[None]).sum(), free)
    (backward,) = torch.autograd.grad(core.full_kl(ref[None], free[None]).sum(), free)
    assert_close(pushed(logits, ref, "kl"), forward)
    assert_close(pushed(logits, ref, "k3"), forward - backward)
    assert_close(pushed(logits, ref, "full"), torch.zeros_like(ref))


def test_the_other_penalties_may_push_away_from_the_reference() -> None:
    """At (0.75, 0.25) against (0.6, 0.4) what is subtracted should lower the first."""
    logits, ref = torch.tensor([[0.75, 0.25], [0.6, 0.4]], dtype=torch.float64).log()
    assert pushed(logits, ref, "kl")[0] > 0
    for kl_penalty in ("abs", "mse", "k3"):
        assert pushed(logits, ref, kl_penalty)[0] < 0


# --- rewards


def test_last_token_is_the_last_real_one_whatever_lies_between() -> None:
    mask = mask_of("xxxx", "xx..", "x.x.", ".x.x", "....")
    expected = mask_of("...x", ".x..", "..x.", "...x", "....")
    assert torch.equal(core.last_token(mask), expected)


def test_the_score_lands_on_the_last_real_token_and_the_penalty_on_every_real_one() -> None:
    """N-12, N-26: ended, cut by the length limit, or with tokens of a tool inside."""
    kl, mask = floats([1, 2, NAN], [3, 4, 5], [6, NAN, 7]), mask_of("xx.", "xxx", "x.x")
    rewards = core.shape_rewards(torch.tensor([10.0, 20.0, 30.0]), kl, mask, kl_coef=0.1)
    assert_close(rewards, floats([-0.1, 9.8, 0], [-0.3, -0.4, 19.5], [-0.6, 0, 29.3]))


@PROPERTY
@given(seeds)
def test_rewards_add_up_to_the_score_less_beta_times_the_kl_of_the_sequence(seed: int) -> None:
    mask = random_mask(seed)
    kl, noise = random_like(mask, seed, 2)
    rewards = core.shape_rewards(noise[:, 0], kl, mask, kl_coef=0.3)
    assert_close(rewards.sum(1), noise[:, 0] - 0.3 * kl.masked_fill(~mask, 0.0).sum(1))


# --- generalised advantage estimation


def test_gae_by_hand() -> None:
    rewards, values = floats([1, 2, 3, NAN]), floats([4, 5, 6, NAN])
    got = core.gae(rewards, values, mask_of("xxx."), gamma=0.5, lam=0.5)
    a2 = 3 - 6.0
    a1 = 2 + 0.5 * 6 - 5 + 0.25 * a2
    a0 = 1 + 0.5 * 5 - 4 + 0.25 * a1
    assert_close(got.advantages, floats([a0, a1, a2, 0]))
    assert_close(got.returns, floats([a0 + 4, a1 + 5, a2 + 6, 0]))


def test_gae_defaults_to_gamma_one_and_lambda_ninety_five_hundredths() -> None:
    got = core.gae(floats([0, 1]), floats([0, 0]), mask_of("xx"))
    assert_close(got.advantages, floats([0.95, 1]))


def test_gae_passes_over_masked_tokens_inside_a_response() -> None:
    """N-27: the words of a tool neither decay the credit nor count as states of no value."""
    mask = mask_of("x.....x")
    rewards = floats([0, NAN, NAN, NAN, NAN, NAN, 1])
    got = core.gae(rewards, floats([0] * 7), mask, gamma=1.0, lam=0.95)
    assert_close(got.advantages[0, [0, 6]], torch.tensor([0.95, 1.0]).double())
    halves = floats([0.5, NAN, NAN, NAN, NAN, NAN, 0.5])
    got = core.gae(rewards, halves, mask, gamma=1.0, lam=0.95)
    assert_close(got.advantages[0, [0, 6]], torch.tensor([0.475, 0.5]).double())


def test_with_lambda_zero_the_advantage_of_the_last_token_holds_the_score() -> None:
    """N-10, N-12: there A = score - beta kl - V, in ended, cut and holed responses alike."""
    mask = mask_of("xx..", "xxxx", "x.x.")
    kl, values = torch.full((3, 4), 2.0), torch.full((3, 4), 0.25)
    rewards = core.shape_rewards(torch.tensor([1.0, 2.0, 3.0]), kl, mask, kl_coef=0.1)
    advantages = core.gae(rewards, values, mask, gamma=1.0, lam=0.0).advantages
    assert_close(advantages[core.last_token(mask)], torch.tensor([0.55, 1.55, 2.55]))


@PROPERTY
@given(seeds)
def test_lambda_one_gives_discounted_returns_and_lambda_zero_one_step_errors(seed: int) -> None:
    mask = random_mask(seed)
    rewards, values = random_like(mask, seed, 2)
    monte_carlo = core.gae(rewards, values, mask, gamma=0.9, lam=1.0)
    one_step = core.gae(rewards, values, mask, gamma=0.9, lam=0.0)
    for row in range(len(mask)):
        r, v = rewards[row][mask[row]], values[row][mask[row]]
        n = len(r)
        discounted = [sum(0.9 ** (k - t) * r[k] for k in range(t, n)) for t in range(n)]
        assert_close(monte_carlo.returns[row][mask[row]], torch.stack(discounted))
        following = torch.cat([v[1:], v.new_zeros(1)])
        assert_close(one_step.advantages[row][mask[row]], r + 0.9 * following - v)


@PROPERTY
@given(seeds)
def test_gae_is_that_of_the_compressed_tokens_and_returns_are_advantages_plus_values(
    seed: int,
) -> None:
    mask = random_mask(seed)
    rewards, values = random_like(mask, seed, 2)
    got = core.gae(rewards, values, mask, gamma=0.97, lam=0.8)
    assert_close(got.returns[mask], (got.advantages + values)[mask])
    for row in range(len(mask)):
        kept = mask[row]
        alone = core.gae(
            rewards[row][kept][None],
            values[row][kept][None],
            torch.ones(1, int(kept.sum()), dtype=torch.bool),
            gamma=0.97,
            lam=0.8,
        )
        assert_close(got.advantages[row][kept], alone.advantages[0])
        assert_close(got.returns[row][kept], alone.returns[0])


# --- policy loss

RATIOS = [0.5, 0.9, 1.0, 1.1, 1.5]


def losses_at(
    ratios: list[float], advantage: float, cliprange: float = 0.2, cliprange_high: float = 0.2
) -> tuple[list[float], list[bool], list[bool], list[float]]:
    """Loss, clipped_low, clipped_high and the gradient with respect to log pi at these ratios."""
    new = floats(ratios).log().requires_grad_()
    old, mask = torch.zeros_like(new), torch.ones(1, len(ratios), dtype=torch.bool)
    gain = torch.full_like(old, advantage)
    out = core.policy_loss(new, old, gain, mask, cliprange=cliprange, cliprange_high=cliprange_high)
    out.loss.sum().backward()
    assert new.grad is not None
    return (
        out.loss[0].tolist(),
        out.clipped_low[0].tolist(),
        out.clipped_high[0].tolist(),
        new.grad[0].tolist(),
    )


def test_policy_loss_by_hand_for_a_good_action() -> None:
    loss, low, high, gradient = losses_at(RATIOS, 2.0)
    assert loss == pytest.approx([-1.0, -1.8, -2.0, -2.2, -2.4])
    assert low == [False] * 5
    assert high == [False, False, False, False, True]
    assert gradient == pytest.approx([-1.0, -1.8, -2.0, -2.2, 0.0])


def test_policy_loss_by_hand_for_a_bad_action() -> None:
    loss, low, high, gradient = losses_at(RATIOS, -2.0)
    assert loss == pytest.approx([1.6, 1.8, 2.0, 2.2, 3.0])
    assert low == [True, False, False, False, False]
    assert high == [False] * 5
    assert gradient == pytest.approx([0.0, 1.8, 2.0, 2.2, 3.0])


def test_policy_loss_takes_another_range_for_the_upper_side() -> None:
    loss, low, high, _ = losses_at([0.75, 1.25, 1.5], 1.0, cliprange=0.1, cliprange_high=0.3)
    assert loss == pytest.approx([-0.75, -1.25, -1.3])
    assert high == [False, False, True]
    loss, low, high, _ = losses_at([0.75, 0.95, 1.5], -1.0, cliprange=0.1, cliprange_high=0.3)
    assert loss == pytest.approx([0.9, 0.95, 1.5])
    assert low == [True, False, False]


def test_the_range_is_two_tenths_and_symmetric_unless_told_otherwise() -> None:
    new, old, mask = floats([0.5, 1.5]).log(), floats([0, 0]), mask_of("xx")
    out = core.policy_loss(new, old, floats([-1, 1]), mask)
    assert_close(out.loss, floats([0.8, -1.2]))
    out = core.policy_loss(new, old, floats([-1, 1]), mask, cliprange=0.3)
    assert_close(out.loss, floats([0.7, -1.3]))


def test_a_token_counts_as_clipped_only_on_the_harmful_side_of_the_range() -> None:
    """Both far out of the range, but only one with A of the sign that the clip opposes."""
    new, old, mask = floats([0.5, 0.5, 2, 2]).log(), floats([0] * 4), mask_of("xxxx")
    out = core.policy_loss(new, old, floats([1, -1, 1, -1]), mask)
    assert out.clipped_low.tolist() == [[False, True, False, False]]
    assert out.clipped_high.tolist() == [[False, False, True, False]]


def test_the_ratio_is_new_over_old_and_one_on_padding() -> None:
    new, old = floats([-1.0, -2.0, NAN]), floats([-1.5, -1.0, NAN])
    out = core.policy_loss(new, old, floats([1, 1, NAN]), mask_of("xx."))
    assert_close(out.ratio, floats([math.exp(0.5), math.exp(-1.0), 1.0]))
    assert out.loss[0, 2] == 0.0


@PROPERTY
@given(seeds)
def test_the_surrogate_never_promises_more_than_the_plain_one_and_touches_it_inside(
    seed: int,
) -> None:
    mask = random_mask(seed)
    new, old, gain = random_like(mask, seed, 3)
    out = core.policy_loss(new, old, gain, mask, cliprange=0.2, cliprange_high=0.4)
    plain = -gain * (new - old).exp()
    assert (out.loss >= plain - 1e-12)[mask].all()
    free = mask & ~out.clipped_low & ~out.clipped_high
    assert_close(out.loss[free], plain[free])
    inside = mask & (out.ratio > 0.8) & (out.ratio < 1.4)
    assert not (inside & (out.clipped_low | out.clipped_high)).any()
    assert not (out.clipped_low & (gain >= 0)).any()
    assert not (out.clipped_high & (gain <= 0)).any()


# --- value loss


def test_value_loss_by_hand() -> None:
    new, old, returns = floats([1, 1, 3, 0.1]), floats([0] * 4), floats([2, 0, 0, 1])
    out = core.value_loss(new, old, returns, mask_of("xxxx"), cliprange_value=0.5)
    assert_close(out.loss, floats([1.5**2, 1, 9, 0.9**2]) / 2)
    assert out.clipped.tolist() == [[True, False, False, False]]


def test_value_loss_clips_downward_moves_too() -> None:
    out = core.value_loss(
        floats([-1.0]), floats([0.0]), floats([-2.0]), mask_of("x"), cliprange_value=0.5
    )
    assert_close(out.loss, floats([1.125]))
    assert out.clipped.item()


def test_a_value_clip_range_of_zero_is_off_and_the_default_is_two_tenths() -> None:
    new, old, returns = floats([1.0, 2.0]), floats([0.0, 0.0]), floats([2.0, 2.0])
    off = core.value_loss(new, old, returns, mask_of("x."), cliprange_value=0.0)
    assert_close(off.loss, floats([0.5, 0]))
    assert off.clipped.tolist() == [[False, False]]
    assert_close(core.value_loss(new, old, returns, mask_of("x.")).loss, floats([1.8**2 / 2, 0]))


def test_a_value_that_was_clipped_has_no_gradient() -> None:
    new = floats([1.0, 1.0]).requires_grad_()
    out = core.value_loss(new, floats([0, 0]), floats([2, 0]), mask_of("xx"))
    out.loss.sum().backward()
    assert new.grad is not None
    assert_close(new.grad, floats([0, 1]))


# --- explained variance


def test_explained_variance_is_one_zero_and_negative_as_the_values_deserve() -> None:
    returns, mask = floats([1, 2, 3, NAN]), mask_of("xxx.")
    assert core.explained_variance(floats([1, 2, 3, 0]), returns, mask).item() == 1.0
    assert core.explained_variance(floats([5, 6, 7, 0]), returns, mask).item() == 1.0  # a bias
    assert core.explained_variance(floats([2, 2, 2, 0]), returns, mask).item() == 0.0
    assert core.explained_variance(floats([3, 2, 1, 0]), returns, mask).item() == -3.0
    assert core.explained_variance(floats([1, 2, 2, 0]), returns, mask).item() == pytest.approx(
        2 / 3
    )


def test_explained_variance_of_constant_returns_is_zero() -> None:
    constant = floats([2, 2])
    assert core.explained_variance(floats([1, 5]), constant, mask_of("xx")).item() == 0.0
    small = core.explained_variance(floats([0, 0]), floats([1e-9, -1e-9]), mask_of("xx"))
    assert small.item() == 0.0


def test_returns_that_vary_by_rounding_alone_are_constant() -> None:
    """As sums of the same numbers come out: within eight times the precision of the largest."""
    eps, mask = torch.finfo(torch.float64).eps, mask_of("xx.")
    for size in (1e-3, 1.0, 1e4):
        within = floats([-size * (1 + 5 * eps), -size * (1 - 5 * eps), 9.0 * size])
        beyond = floats([-size * (1 + 6 * eps), -size * (1 - 6 * eps), 9.0 * size])
        assert core.explained_variance(floats([5, 1, 0]), within, mask).item() == 0.0
        assert core.explained_variance(beyond, beyond, mask).item() == 1.0


# --- what must not matter

CALLS: dict[str, tuple[int, Callable[..., object]]] = {
    "masked_sum": (1, lambda x, mask: core.masked_sum(x, mask)),
    "masked_mean": (1, lambda x, mask: core.masked_mean(x, mask)),
    "masked_var": (1, lambda x, mask: core.masked_var(x, mask)),
    "whiten": (1, lambda x, mask: core.whiten(x, mask)),
    "whiten rewards": (1, lambda x, mask: core.whiten(x, mask, shift_mean=False)),
    "kl": (2, lambda x, y, mask: core.kl_estimate(x, y, mask)),
    "abs": (2, lambda x, y, mask: core.kl_estimate(x, y, mask, kl_penalty="abs")),
    "mse": (2, lambda x, y, mask: core.kl_estimate(x, y, mask, kl_penalty="mse")),
    "k3": (2, lambda x, y, mask: core.kl_estimate(x, y, mask, kl_penalty="k3")),
    "full": (2, lambda x, y, mask: core.kl_estimate(x, x, mask, kl_penalty="full", full_kl=y)),
    "rewards": (
        1,
        lambda x, mask: core.shape_rewards(torch.arange(len(x)).double(), x, mask, kl_coef=0.2),
    ),
    "gae": (2, lambda x, y, mask: core.gae(x, y, mask, gamma=0.9, lam=0.8)),
    "policy_loss": (3, lambda x, y, z, mask: core.policy_loss(x, y, z, mask)),
    "value_loss": (3, lambda x, y, z, mask: core.value_loss(x, y, z, mask)),
    "value_loss unclipped": (
        3,
        lambda x, y, z, mask: core.value_loss(x, y, z, mask, cliprange_value=0.0),
    ),
    "explained_variance": (
        2,
        lambda x, y, mask: core.explained_variance(x.detach(), y.detach(), mask),
    ),
}


def results_and_gradients(
    call: Callable[..., object], inputs: list[Tensor], mask: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """What `call` returns, and the gradient of the sum of all its squares by each input."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    results = leaves(call(*inputs, mask))
    differentiable = [r for r in results if r.requires_grad]
    if differentiable:
        sum((r**2).sum() for r in differentiable).backward()  # type: ignore[union-attr]
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs]
    return [r.detach() for r in results], gradients


@PROPERTY
@given(seeds)
def test_padding_of_any_kind_changes_no_result_and_no_gradient(seed: int) -> None:
    """N-16, N-24."""
    mask = random_mask(seed)
    clean = random_like(mask, seed, 3)
    for n, call in CALLS.values():
        expected = results_and_gradients(call, clean[:n], mask)
        for dirt in (NAN, float("inf"), 1e6):
            dirty = [dirtied(x, mask, dirt) for x in clean[:n]]
            results, gradients = results_and_gradients(call, dirty, mask)
            assert_close(results, expected[0], rtol=0, atol=0)
            assert_close([g[mask] for g in gradients], [g[mask] for g in expected[1]])
            assert all((g[~mask] == 0).all() for g in gradients)


@PROPERTY
@given(seeds)
def test_results_hold_zeros_on_padding_the_ratio_one(seed: int) -> None:
    mask = random_mask(seed)
    clean = random_like(mask, seed, 3)
    for n, call in CALLS.values():
        result = call(*clean[:n], mask)
        for tensor in leaves(result):
            if tensor.shape == mask.shape:
                fill = 1.0 if tensor is getattr(result, "ratio", None) else 0.0
                assert (tensor[~mask] == fill).all()


@PROPERTY
@given(seeds)
def test_appended_padding_and_the_order_of_samples_change_nothing(seed: int) -> None:
    mask = random_mask(seed)
    clean = random_like(mask, seed, 3)
    order = torch.arange(len(mask)).flip(0)
    wide = [torch.nn.functional.pad(x, (0, 3), value=7.0) for x in clean]
    wide_mask = torch.nn.functional.pad(mask, (0, 3))
    for name, (n, call) in CALLS.items():
        expected = leaves(call(*clean[:n], mask))
        for got, want in zip(leaves(call(*wide[:n], wide_mask)), expected, strict=True):
            narrow = got[:, : mask.shape[1]] if got.dim() == 2 else got
            assert_close(narrow, want)
        if name == "rewards":  # its scores count up with the rows
            continue
        shuffled = leaves(call(*[x[order] for x in clean[:n]], mask[order]))
        for got, want in zip(shuffled, expected, strict=True):
            assert_close(got[order] if got.dim() == 2 else got, want)


def test_inputs_are_never_changed() -> None:
    mask = random_mask(11)
    inputs = random_like(mask, 11, 3)
    before, mask_before = [x.clone() for x in inputs], mask.clone()
    for n, call in CALLS.values():
        call(*inputs[:n], mask)
    core.last_token(mask)
    core.full_kl(torch.stack(inputs, -1), torch.stack(inputs, -1))
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    assert torch.equal(mask, mask_before)


def test_shapes_and_dtypes_are_kept() -> None:
    mask = mask_of("xx.", "xxx")
    inputs = [x.float() for x in random_like(mask, 5, 3)]
    for n, call in CALLS.values():
        for tensor in leaves(call(*inputs[:n], mask)):
            assert tensor.shape in (mask.shape, ())
            assert tensor.dtype in (torch.float32, torch.bool)


def test_a_numpy_like_broadcast_is_refused_where_shapes_are_checked() -> None:
    """The suite runs with shape checks on `core`: a (batch, 1) mask must not broadcast."""
    if "jaxtyping" not in type(core.masked_sum).__module__ and not hasattr(
        core.masked_sum, "__wrapped__"
    ):
        pytest.skip("run with --jaxtyping-packages=ppo_lab.core,beartype.beartype")
    with pytest.raises(Exception, match=r"[Tt]ype"):
        core.masked_sum(torch.zeros(2, 3), torch.ones(2, 1, dtype=torch.bool))
