"""Every metric of a run, its unit and its meaning, once; torch is not needed to read them."""

from __future__ import annotations

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
    "ppo/loss/total": (
        "-",
        "policy + vf_coef value - entropy_coef entropy; vf_coef is 1 for a critic of its own",
    ),
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
    "ppo/policy/sampler_gap": (
        "nats/token",
        "mean |difference| between another sampler's log-probs (vLLM) and the policy's",
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
    "ppo/val/grad_norm": ("-", "gradient norm of a critic apart; of a value head, ppo/grad_norm"),
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
    "mfu": (
        "share",
        "model FLOP utilisation: the iteration's FLOPs (recomputed ones left out) over its time, "
        "of the device's peak rate; absent where that is not known",
    ),
    "time/generate": ("s", "sampling"),
    "time/score": ("s", "the reward"),
    "time/reference": (
        "s",
        "log-probs of the reference, and of the policy where sampling did not leave them",
    ),
    "time/update": ("s", "clipped updates"),
    "time/iteration": ("s", "one iteration"),
    "peak_memory_gb": ("GiB", "the run's peak memory so far: the GPU's, or the resident set"),
    "eval/mean_reward": ("score", "mean score on held-out prompts, as mean_reward"),
    "eval/std_reward": ("score", "standard deviation of those scores over prompts"),
    "eval/kl": ("nats/sequence", "KL(policy || reference) on held-out prompts, k1 estimate"),
    "eval/objective": ("score", "held-out mean score less beta in force times held-out KL"),
    "eval/gold": (
        "score",
        "the embedded world's rules on held-out prompts; absent with other data",
    ),
    "eval/response_length": ("tokens", "mean length of held-out responses, EOS included"),
    "eval/eos_rate": ("share of samples", "held-out responses that a stop condition ended"),
    "eval/distinct_2": ("share", "distinct among all pairs of neighbouring words"),
}

# Beginning of a name that ends in a reward's own -> (unit, meaning).
OF_EACH_REWARD = {
    "reward/": ("score", "mean of what this reward gave, before any weight"),
    "eval/reward/": ("score", "the same on held-out prompts"),
}


def described(name: str) -> tuple[str, str]:
    """Unit and meaning of a metric; empty texts for one that is not ours."""
    prefix = name[: name.find("reward/") + len("reward/")]
    return METRICS.get(name) or OF_EACH_REWARD.get(prefix, ("", ""))
