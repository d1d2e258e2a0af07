"""The schema: every key, its default, its meaning, unit and legal range, once.

Hydra composes `conf/` against these dataclasses, so that a misspelt key or a wrong type is refused; `problems` says
everything that is wrong with a composed configuration, before anything is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def knob(
    default: Any,
    meaning: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A field with its meaning and legal range in its metadata, where the checks and the help page read them."""
    legal = {"at_least": at_least, "at_most": at_most, "above": above, "below": below, "choices": choices}
    metadata = {"meaning": meaning, **{name: bound for name, bound in legal.items() if bound is not None}}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class PPOSection:
    """`ppo`: the settings of the algorithm, under the names that TRL's classic PPOConfig gave them."""

    steps: int = knob(100, "PPO iterations", at_least=1)
    batch_size: int = knob(16, "samples an iteration, over all processes", at_least=1)
    mini_batch_size: int = knob(0, "samples a forward and backward pass; 0 = the whole batch", at_least=0)
    gradient_accumulation_steps: int = knob(1, "mini-batches an optimizer step", at_least=1)
    micro_batch_tokens: int = knob(
        0, "most tokens in one pass through the model; splits a mini-batch without changing its result; 0 = no limit", at_least=0
    )
    ppo_epochs: int = knob(4, "passes over each batch", at_least=1)
    learning_rate: float = knob(1.5e-5, "step size of Adam", above=0)
    value_learning_rate: float = knob(0.0, "step size of the value head; 0 = learning_rate", at_least=0)
    lr_schedule: str = knob("constant", "learning rate over the run", choices=("constant", "linear", "cosine"))
    warmup_steps: int = knob(0, "iterations over which the learning rate rises from 0", at_least=0)
    adam: str = knob("torch", "where Adam's epsilon stands: torch's, or TensorFlow 1's, outside the bias correction", choices=("torch", "tf"))
    adam_eps: float = knob(1e-8, "Adam's epsilon", above=0)
    weight_decay: float = knob(0.0, "decoupled weight decay (AdamW)", at_least=0)
    max_grad_norm: float = knob(1.0, "largest gradient norm, over all trained parameters; 0 = unlimited", at_least=0)
    init_kl_coef: float = knob(0.2, "beta: coefficient of the KL penalty", at_least=0)
    kl_penalty: str = knob("kl", "estimate of the KL in the reward", choices=("kl", "abs", "mse", "k3", "full"))
    adap_kl_ctrl: bool = knob(False, "adapt beta so that KL tends to `target`")
    target: float = knob(6.0, "KL that an adaptive beta aims at, nats per sequence", above=0)
    horizon: int = knob(10000, "samples over which an adaptive beta reacts", at_least=1)
    gamma: float = knob(1.0, "discount a token", at_least=0, at_most=1)
    lam: float = knob(0.95, "lambda of generalised advantage estimation", at_least=0, at_most=1)
    cliprange: float = knob(0.2, "epsilon: the policy ratio is clipped to [1 - epsilon, 1 + epsilon]", above=0, below=1)
    cliprange_high: float = knob(0.0, "another epsilon for the upper side; 0 = the same", at_least=0)
    cliprange_value: float = knob(0.2, "clip range of the value around the old value; 0 = off", at_least=0)
    vf_coef: float = knob(0.1, "weight of the value loss", at_least=0)
    entropy_coef: float = knob(0.0, "weight of the entropy bonus", at_least=0)
    whiten_rewards: bool = knob(False, "scale per-token rewards to unit variance, keeping their mean")
    whiten_advantages: bool = knob(True, "scale advantages to zero mean and unit variance")
    use_score_scaling: bool = knob(False, "divide scores by their running standard deviation")
    use_score_norm: bool = knob(False, "subtract the running mean too; needs use_score_scaling")
    score_clip: float = knob(0.0, "clip scores to [-score_clip, score_clip], after scaling; 0 = off", at_least=0)
    missing_eos_penalty: float = knob(0.0, "taken from the score of a response that no stop condition ended; 0 = off", at_least=0)
    early_stopping: bool = knob(False, "end an iteration's epochs when KL(pi_old || pi) exceeds 1.5 target_kl")
    target_kl: float = knob(0.1, "threshold of early_stopping, nats per token", above=0)
    ratio_threshold: float = knob(10.0, "skip an optimizer step whose mean ratio exceeds this; 0 = never", at_least=0)
    max_skipped_updates: int = knob(10, "optimizer steps skipped in a row (NaN, inf, ratio_threshold) before the run stops", at_least=1)
    gradient_checkpointing: bool = knob(False, "recompute activations in the backward pass: less memory, more time")


@dataclass
class PPOConfig(PPOSection):
    """The settings of `PPOTrainer` in Python: the `ppo` section and what a run keeps elsewhere.

    Raises:
        ValueError: naming every field whose value is not legal, all at once.
    """

    model_name: str = knob("", "name of the model, for logs and saved folders")
    seed: int = knob(0, "seed of the sampling, the shuffling and the weights made anew", at_least=0)
    log_with: str = knob("none", "where `log_stats` sends statistics", choices=("none", "wandb"))
    tracker_project_name: str = knob("ppo_lab", "project of the tracker")
