"""From tensors to named numbers; `metric_names` says what each of them means."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ppo_lab import core
from ppo_lab.metric_names import METRICS
from ppo_lab.steps import UpdateStats
from ppo_lab.types import Batch, Rollout, Scores

__all__ = ["METRICS", "Shaped", "known_metrics", "update_metrics"]


@dataclass(frozen=True)
class Shaped:
    """What one iteration computed between sampling and updating, on the host."""

    rollout: Rollout
    batch: Batch
    scores: Float[Tensor, " batch"]
    penalty_kl: Float[Tensor, "batch time"]
    kl_coef: float


def known_metrics(shaped: Shaped, raw: Scores) -> dict[str, float]:
    """The metrics that no update has a part in, as floats."""
    tensors = {
        **_objective(shaped),
        **_scores(shaped, raw),
        **_values(shaped),
        **_lengths(shaped.rollout),
    }
    return {name: float(value) for name, value in tensors.items()}


def update_metrics(
    update: UpdateStats,
    *,
    returns_var: float,
    cliprange: float,
    vf_coef: float,
    entropy_coef: float,
) -> dict[str, float]:
    """The metrics of the clipped updates; `returns_var` is the variance of the returns."""
    clip_fraction = update.clipped_low + update.clipped_high
    return {
        "clip_fraction": clip_fraction,
        "clip_fraction/low": update.clipped_low,
        "clip_fraction/high": update.clipped_high,
        "cliprange": cliprange,
        "ppo/loss/policy": update.policy_loss,
        "ppo/loss/value": update.value_loss,
        "ppo/loss/total": update.policy_loss
        + vf_coef * update.value_loss
        - entropy_coef * update.entropy,
        "ppo/policy/approxkl": update.approxkl,
        "ppo/policy/policykl": update.policykl,
        "ppo/policy/clipfrac": clip_fraction,
        "ppo/policy/ratio": update.ratio,
        "ppo/policy/ratio_max": update.ratio_max,
        "ppo/policy/first_minibatch_ratio_error": update.first_ratio_error,
        "ppo/val/vpred": update.vpred,
        "ppo/val/error": update.value_error,
        "ppo/val/clipfrac": update.value_clipped,
        "ppo/val/var_explained": 1.0 - update.value_error / returns_var if returns_var > 0 else 0.0,
        "ppo/grad_norm": update.grad_norm,
        "ppo/val/grad_norm": update.critic_grad_norm,
        "ppo/skipped_updates": float(update.skipped),
        "ppo/epochs": float(update.epochs),
    }


def _objective(shaped: Shaped) -> dict[str, Tensor | float]:
    rollout, mask, n = shaped.rollout, shaped.rollout.tokens.mask, len(shaped.rollout)
    k1 = core.kl_estimate(rollout.logprobs, rollout.ref_logprobs, mask)
    k3 = core.kl_estimate(rollout.logprobs, rollout.ref_logprobs, mask, kl_penalty="k3")
    penalty = core.masked_sum(shaped.penalty_kl, mask) / n
    return {
        "kl": core.masked_sum(k1, mask) / n,
        "kl_per_token": core.masked_mean(k1, mask),
        "kl_coef": shaped.kl_coef,
        "objective/kl": penalty,
        "objective/kl_k3": core.masked_sum(k3, mask) / n,
        "objective/kl_coef": shaped.kl_coef,
        "objective/entropy": core.masked_sum(-rollout.logprobs, mask) / n,
        "objective/rlhf_reward": shaped.scores.mean() - shaped.kl_coef * penalty,
        "ppo/mean_non_score_reward": core.masked_mean(-shaped.kl_coef * shaped.penalty_kl, mask),
        **(
            {}
            if rollout.entropy is None
            else {"ppo/policy/entropy": core.masked_mean(rollout.entropy, mask)}
        ),
    }


def _scores(shaped: Shaped, raw: Scores) -> dict[str, Tensor]:
    mean, std = raw.total.mean(), _std(raw.total)
    parts = {f"reward/{name}": part.mean() for name, part in raw.parts.items()}
    return {
        "mean_reward": mean,
        "std_reward": std,
        "env/reward_mean": mean,
        "env/reward_std": std,
        "ppo/mean_scores": shaped.scores.mean(),
        "ppo/std_scores": _std(shaped.scores),
        **parts,
    }


def _values(shaped: Shaped) -> dict[str, Tensor]:
    batch, mask = shaped.batch, shaped.batch.tokens.mask
    return {
        "ppo/policy/advantages_mean": core.masked_mean(batch.advantages, mask),
        "ppo/returns/mean": core.masked_mean(batch.returns, mask),
        "ppo/returns/var": core.masked_var(batch.returns, mask),
        "ppo/val/mean": core.masked_mean(batch.values, mask),
        "ppo/val/var": core.masked_var(batch.values, mask),
        "ppo/val/explained_variance": core.explained_variance(batch.values, batch.returns, mask),
    }


def _lengths(rollout: Rollout) -> dict[str, Tensor]:
    lengths = rollout.tokens.lengths.float()
    return {
        "tokens/queries_len_mean": rollout.tokens.query_mask.sum(1).float().mean(),
        "tokens/responses_len_mean": lengths.mean(),
        "tokens/responses_len_std": _std(lengths),
        "tokens/eos_rate": rollout.tokens.ended.float().mean(),
    }


def _std(x: Tensor) -> Tensor:
    """The unbiased standard deviation; 0 of a single number."""
    return x.std() if len(x) > 1 else torch.zeros(())
