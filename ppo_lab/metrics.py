"""From tensors to named numbers: every metric of a run, its unit and its meaning, once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ppo_lab import core
from ppo_lab.types import Batch, Rollout, Scores
from ppo_lab.update import UpdateStats

# name -> (unit, meaning). The classic names keep their TRL 0.11.4 definition, masked.
METRICS: dict[str, tuple[str, str]] = {
    "kl": ("nats/sequence", "KL(policy || reference), k1 estimate, mean over samples"),
    "kl_per_token": ("nats/token", "the same, mean over tokens"),
    "mean_reward": (
        "score",
        "mean score: with reward.weight, before scaling, clipping and penalties",
    ),
    "std_reward": ("score", "standard deviation of the scores over samples"),
    "clip_fraction": ("share of tokens", "where the clipped branch is the larger loss"),
    "clip_fraction/low": ("share of tokens", "clipped below 1 - epsilon, advantage negative"),
    "clip_fraction/high": ("share of tokens", "clipped above 1 + epsilon, advantage positive"),
    "kl_coef": ("score/nat", "beta in force this iteration"),
    "cliprange": ("ratio", "epsilon"),
    "objective/kl": (
        "nats/sequence",
        "the KL that the penalty used (`kl_penalty`), mean over samples",
    ),
    "objective/kl_k3": ("nats/sequence", "k3 estimate of KL(policy || reference)"),
    "objective/kl_coef": ("score/nat", "beta, under its classic name"),
    "objective/entropy": ("nats/sequence", "sampled negative log-likelihood, mean over samples"),
    "objective/rlhf_reward": ("score", "score less beta times KL, mean over samples"),
    "ppo/mean_non_score_reward": ("score/token", "mean KL penalty of a token"),
    "ppo/mean_scores": ("score", "mean score after scaling, clipping and the missing-EOS penalty"),
    "ppo/std_scores": ("score", "their standard deviation"),
    "ppo/loss/policy": ("score", "clipped surrogate loss"),
    "ppo/loss/value": ("score^2", "clipped value loss, before vf_coef"),
    "ppo/loss/total": ("-", "policy + vf_coef value - entropy_coef entropy"),
    "ppo/policy/entropy": (
        "nats/token",
        "entropy of the sampling policy's next-token distribution",
    ),
    "ppo/policy/approxkl": ("nats/token", "k2 estimate of KL(old policy || new policy)"),
    "ppo/policy/policykl": ("nats/token", "k1 estimate of the same"),
    "ppo/policy/clipfrac": ("share of tokens", "clip_fraction, under its classic name"),
    "ppo/policy/advantages_mean": ("-", "mean advantage after whitening"),
    "ppo/policy/ratio": ("ratio", "mean probability ratio new/old"),
    "ppo/policy/ratio_max": ("ratio", "largest probability ratio"),
    "ppo/policy/first_minibatch_ratio_error": (
        "ratio",
        "max |ratio - 1| before the first step: rounding alone",
    ),
    "ppo/returns/mean": ("score", "mean return"),
    "ppo/returns/var": ("score^2", "variance of the returns"),
    "ppo/val/vpred": ("score", "mean value while updating"),
    "ppo/val/error": ("score^2", "mean squared error of the value while updating"),
    "ppo/val/clipfrac": ("share of tokens", "where the clipped value loss is the larger"),
    "ppo/val/mean": ("score", "mean value at sampling time"),
    "ppo/val/var": ("score^2", "its variance"),
    "ppo/val/var_explained": ("share", "1 - val/error / returns/var: TRL's, after the updates"),
    "ppo/val/explained_variance": (
        "share",
        "variance of the returns that sampling-time values explain",
    ),
    "ppo/learning_rate": ("1", "step size of this iteration"),
    "ppo/grad_norm": ("-", "gradient norm before clipping, mean over optimizer steps"),
    "ppo/skipped_updates": (
        "steps",
        "optimizer steps not taken: not finite, or beyond ratio_threshold",
    ),
    "ppo/epochs": ("epochs", "passes over the batch that were made"),
    "env/reward_mean": ("score", "mean_reward, under its classic name"),
    "env/reward_std": ("score", "std_reward, under its classic name"),
    "tokens/queries_len_mean": ("tokens", "mean prompt length"),
    "tokens/responses_len_mean": ("tokens", "mean response length, EOS included"),
    "tokens/responses_len_std": ("tokens", "its standard deviation"),
    "tokens/eos_rate": ("share of samples", "responses that a stop condition ended"),
    "tokens_per_second": ("tokens/s", "response tokens over the whole iteration's time"),
    "time/generate": ("s", "sampling"),
    "time/score": ("s", "the reward"),
    "time/reference": (
        "s",
        "log-probs of the reference, and of the policy where sampling did not leave them",
    ),
    "time/update": ("s", "clipped updates"),
    "time/iteration": ("s", "one iteration"),
    "peak_memory_gb": ("GiB", "peak memory: the GPU's, or the process's resident set"),
}


@dataclass(frozen=True)
class Shaped:
    """What one iteration computed between sampling and updating."""

    rollout: Rollout
    batch: Batch
    scores: Float[Tensor, " batch"]
    penalty_kl: Float[Tensor, "batch time"]
    kl_coef: float


def iteration_metrics(
    shaped: Shaped,
    raw: Scores,
    update: UpdateStats,
    *,
    cliprange: float,
    vf_coef: float,
    entropy_coef: float,
) -> dict[str, float]:
    """Every metric of one iteration but its times, as floats."""
    tensors = {
        **_objective(shaped),
        **_scores(shaped, raw),
        **_values(shaped),
        **_lengths(shaped.rollout),
    }
    metrics = {name: float(value) for name, value in tensors.items()}
    clip_fraction = update.clipped_low + update.clipped_high
    returns_var = metrics["ppo/returns/var"]
    return {
        **metrics,
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
