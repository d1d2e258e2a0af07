"""The mathematics of PPO for language models: pure functions of tensors and keyword numbers.

Every (batch, time) tensor is aligned on response tokens; `mask` is True on real ones. What stands
on padding is never read, not even NaN, and every result holds zeros there (a ratio 1). Inputs are
never changed.

Notation: pi the policy, pi_old the policy that sampled, pi_ref the reference (SFT) policy, beta the
KL coefficient, epsilon the clip range, A advantages, V values, R returns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

KL_PENALTIES = ("kl", "abs", "mse", "k3", "full")


def masked_sum(
    x: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"]
) -> Float[Tensor, ""]:
    """The sum of `x` over the real tokens."""
    return x.masked_fill(~mask, 0.0).sum()


def masked_mean(
    x: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"]
) -> Float[Tensor, ""]:
    """The mean of `x` over the real tokens of the whole batch; 0 when there is none."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def masked_var(
    x: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"]
) -> Float[Tensor, ""]:
    """The unbiased variance of `x` over the real tokens; 0 when there are fewer than two."""
    # Filled before the square, whose gradient would be NaN times 0 on padding.
    centred = (x - masked_mean(x, mask)).masked_fill(~mask, 0.0)
    return masked_sum(centred**2, mask) / (mask.sum() - 1).clamp(min=1)


def whiten(
    x: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    shift_mean: bool = True,
    mean: Float[Tensor, ""] | None = None,
    var: Float[Tensor, ""] | None = None,
) -> Float[Tensor, "batch time"]:
    """`x` scaled to unit variance over the real tokens, less its mean unless `shift_mean` is False.

        (x - mean) / sqrt(var + 1e-8)

    `mean` and `var` are those of `x` unless given, as they are when the rollout spans several
    processes. Advantages lose their mean; per-token rewards keep it (`shift_mean=False`), since
    their sign is what they say.

    Source: Ziegler et al. 2019's released code, by the masked, unbiased variance of TRL.
    """
    x = x.masked_fill(~mask, 0.0)
    mean = masked_mean(x, mask) if mean is None else mean
    var = masked_var(x, mask) if var is None else var
    whitened = (x - mean) * torch.rsqrt(var + 1e-8)
    return (whitened if shift_mean else whitened + mean).masked_fill(~mask, 0.0)


def kl_estimate(
    logprobs: Float[Tensor, "batch time"],
    ref_logprobs: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    kl_penalty: str = "kl",
    full_kl: Float[Tensor, "batch time"] | None = None,
) -> Float[Tensor, "batch time"]:
    """The estimate of KL(pi || pi_ref) at each sampled token, in nats.

    With d = log pi - log pi_ref of the token that pi sampled:

        kl    d                   (k1: unbiased, any sign)
        abs   |d|                 (biased upwards)
        mse   d^2 / 2             (k2: biased, small variance)
        k3    exp(-d) - 1 + d     (k3: unbiased and never negative)
        full  sum_v pi(v) (log pi(v) - log pi_ref(v)), given as `full_kl`

    A good estimate need not be a good penalty. In the reward it is a number, which moves the policy
    by E[estimate grad log pi], and that is, for the token itself,

        kl    grad KL(pi || pi_ref), as is meant
        k3    grad KL(pi || pi_ref) - grad KL(pi_ref || pi): next to pi_ref they cancel
        full  0: the number is the same whichever token is drawn; only later tokens' are felt

    and of abs, mse and k3 it may point away from pi_ref: at pi = (0.75, 0.25) and
    pi_ref = (0.6, 0.4) the less likely token, which lost, has the larger estimate of each.

    Source: Schulman 2020, "Approximating KL divergence"; the names are TRL's. As penalties: Liu et
    al. 2025, arXiv:2510.01555; Shah et al. 2025, arXiv:2512.21852.
    """
    assert kl_penalty in KL_PENALTIES, f"kl_penalty is one of {KL_PENALTIES}, not {kl_penalty!r}"
    if kl_penalty == "full":
        assert full_kl is not None, "kl_penalty=full needs the KL over the vocabulary"
        return full_kl.masked_fill(~mask, 0.0)
    d = (logprobs - ref_logprobs).masked_fill(~mask, 0.0)
    if kl_penalty == "abs":
        return d.abs()
    if kl_penalty == "mse":
        return 0.5 * d**2
    if kl_penalty == "k3":
        return torch.expm1(-d) + d
    return d


def full_kl(
    logits: Float[Tensor, "*tokens vocab"], ref_logits: Float[Tensor, "*tokens vocab"]
) -> Float[Tensor, "*tokens"]:
    """The exact KL(pi || pi_ref) of each next-token distribution, in nats.

    sum_v pi(v) (log pi(v) - log pi_ref(v))
    """
    logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (logp.exp() * (logp - ref_logp)).sum(-1)


def last_token(mask: Bool[Tensor, "batch time"]) -> Bool[Tensor, "batch time"]:
    """True on the last real token of each response alone; nowhere in a row without real tokens."""
    real_tokens_from_here = mask.flip(1).cumsum(1).flip(1)
    return mask & (real_tokens_from_here == 1)


def shape_rewards(
    scores: Float[Tensor, " batch"],
    kl: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    kl_coef: float,
) -> Float[Tensor, "batch time"]:
    """The reward of each token: -beta * kl_t, plus the sample's score on its last real token.

    Source: Ziegler et al. 2019, arXiv:1909.08593, equation 2; Stiennon et al. 2020,
    arXiv:2009.01325, section 3.4.
    """
    penalty = (-kl_coef * kl).masked_fill(~mask, 0.0)
    score = scores[:, None].to(penalty).expand_as(penalty)
    return penalty + score.masked_fill(~last_token(mask), 0.0)


class Advantages(NamedTuple):
    """Advantages before whitening, and the returns that the value head regresses on."""

    advantages: Float[Tensor, "batch time"]
    returns: Float[Tensor, "batch time"]


def gae(
    rewards: Float[Tensor, "batch time"],
    values: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> Advantages:
    """Generalised advantage estimates over the real tokens, and returns A + V.

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t     = delta_t + gamma lam A_{t+1}

    t + 1 is the next *real* token: masked positions inside a response (the words of a tool, say)
    are passed over. After the last real token both V and A are 0: nothing is bootstrapped.

    Source: Schulman et al. 2015, arXiv:1506.02438, equations 11-16.
    """
    time = values.shape[1]
    v, real = values.unbind(1), mask.unbind(1)
    value, advantage = ([torch.zeros_like(values[:, 0])] * (time + 1) for _ in range(2))
    for t in reversed(range(time)):
        value[t] = torch.where(real[t], v[t], value[t + 1])
    delta = (rewards + gamma * torch.stack(value[1:], 1) - values).masked_fill(~mask, 0.0)
    decay = torch.full_like(values, gamma * lam).masked_fill(~mask, 1.0)
    steps, decays = delta.unbind(1), decay.unbind(1)
    for t in reversed(range(time)):
        advantage[t] = torch.addcmul(steps[t], decays[t], advantage[t + 1])
    advantages = torch.stack(advantage[:-1], 1).masked_fill(~mask, 0.0)
    return Advantages(advantages, (advantages + values).masked_fill(~mask, 0.0))


class PolicyLoss(NamedTuple):
    """The clipped surrogate, token by token, with what it says about epsilon."""

    loss: Float[Tensor, "batch time"]
    ratio: Float[Tensor, "batch time"]
    clipped_low: Bool[Tensor, "batch time"]
    clipped_high: Bool[Tensor, "batch time"]


def policy_loss(
    logprobs: Float[Tensor, "batch time"],
    old_logprobs: Float[Tensor, "batch time"],
    advantages: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    cliprange: float = 0.2,
    cliprange_high: float | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate loss of each token, to be minimised.

        ratio = exp(log pi - log pi_old)
        loss  = max(-A ratio, -A clip(ratio, 1 - epsilon, 1 + epsilon_high))

    epsilon_high is epsilon unless `cliprange_high` is given. A token counts as clipped where the
    clipped branch is the larger loss: below 1 - epsilon with A < 0 (`clipped_low`), above 1 +
    epsilon_high with A > 0 (`clipped_high`).

    Source: Schulman et al. 2017, arXiv:1707.06347, equation 7.
    """
    high = cliprange if cliprange_high is None else cliprange_high
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0)
    gain = advantages.masked_fill(~mask, 0.0)
    ratio = log_ratio.exp()
    unclipped, clipped = -gain * ratio, -gain * ratio.clamp(1.0 - cliprange, 1.0 + high)
    loss, bound = torch.maximum(unclipped, clipped), clipped > unclipped
    return PolicyLoss(loss, ratio, bound & (ratio < 1.0), bound & (ratio > 1.0))


class ValueLoss(NamedTuple):
    """The clipped squared error of the value head, and where the clipped branch is the larger."""

    loss: Float[Tensor, "batch time"]
    clipped: Bool[Tensor, "batch time"]


def value_loss(
    values: Float[Tensor, "batch time"],
    old_values: Float[Tensor, "batch time"],
    returns: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    cliprange_value: float = 0.2,
) -> ValueLoss:
    """Half the squared error of each value, pessimistic about moves beyond `cliprange_value`.

        loss = max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2

    A range of 0 is off: nothing is clipped.

    Source: Schulman et al.'s baselines implementation, as in Ziegler et al. 2019.
    """
    target = returns.masked_fill(~mask, 0.0)
    new, old = values.masked_fill(~mask, 0.0), old_values.masked_fill(~mask, 0.0)
    unclipped = (new - target) ** 2
    if cliprange_value == 0.0:
        return ValueLoss(0.5 * unclipped, torch.zeros_like(mask))
    clipped = (new.clamp(old - cliprange_value, old + cliprange_value) - target) ** 2
    return ValueLoss(0.5 * torch.maximum(unclipped, clipped), clipped > unclipped)


def explained_variance(
    values: Float[Tensor, "batch time"],
    returns: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
) -> Float[Tensor, ""]:
    """The share of the returns' variance that the values explain; 0 when the returns vary by
    rounding alone.

    1 - Var(R - V) / Var(R)
    """
    var, largest = masked_var(returns, mask), returns.masked_fill(~mask, 0.0).abs().max()
    rounding = 8 * torch.finfo(returns.dtype).eps * largest
    return torch.where(var > rounding**2, 1.0 - masked_var(returns - values, mask) / var, 0.0)
