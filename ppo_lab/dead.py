"""Settings that nothing would read: refused where the command line states them, with what switches
them on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from ppo_lab.config import (
    Config,
    EmbeddedData,
    EmbeddedReward,
    FileData,
    FunctionReward,
    HeadCritic,
    ModelCritic,
    ModelReward,
    ModelSection,
    WeightedReward,
)
from ppo_lab.data import judged_by
from ppo_lab.local_model import VALUE_HEAD_FILE


def dead_settings(config: Config, stated: Collection[str]) -> Iterator[str]:
    """Each setting of the command line that nothing would read, with what switches it on."""
    for keys, dead, reason in DEAD:
        if dead(config):
            yield from (f"{key}: has no effect, {reason}" for key in stated if matches(key, keys))


def matches(key: str, patterns: Collection[str]) -> bool:
    """Whether a dotted key is one of these, in which * stands for anything, or lies in a section
    that ends in a dot.
    """
    return any(fnmatchcase(key, f"{p}*" if p.endswith(".") else p) for p in patterns)


def greedy(config: Config) -> bool:
    """Whether evaluation takes the likeliest token, so that there is nothing to restrict."""
    return config.evaluation.temperature == 0


def is_here(path: str) -> bool:
    """Whether a model comes from no hub, but from a folder or with the package."""
    with suppress(OSError, RuntimeError):  # which the rules tell of
        return path == "embedded" or (bool(path) and Path(path).expanduser().is_dir())
    return False


def brings_value_head(model: ModelSection) -> bool:
    """Whether a trained value head lies beside a policy whose weights are read."""
    here = is_here(model.path) and model.weights != "random"
    with suppress(OSError):
        return here and (Path(model.path).expanduser() / VALUE_HEAD_FILE).is_file()
    return False


def starts_from_embedded(config: Config) -> bool:
    """Whether a critic of its own starts from the embedded reward model."""
    path = getattr(config.critic, "path", "")
    return path == "embedded" or (not path and isinstance(config.reward, EmbeddedReward))


def shown_by_evaluations(config: Config) -> bool:
    """Whether each iteration whose samples are asked for is one of an evaluation, which shows its
    own; W&B's tables come no more often than is asked for either way.
    """
    every = 0 if config.tracking.type == "wandb" else config.evaluation.every
    return every > 0 and config.tracking.samples_every % every == 0


DEAD: tuple[tuple[tuple[str, ...], Callable[[Config], bool], str], ...] = (
    (
        ("ppo.target", "ppo.horizon"),
        lambda c: not c.ppo.adap_kl_ctrl,
        "since beta is fixed; add ppo.adap_kl_ctrl=true",
    ),
    (
        ("ppo.target_kl",),
        lambda c: not c.ppo.early_stopping,
        "since epochs are never cut short; add ppo.early_stopping=true",
    ),
    (
        (
            "lora.alpha",
            "lora.dropout",
            "lora.target_modules",
            "lora.top_layers",
            "lora.use_rslora",
            "lora.use_dora",
            "lora.learning_rate_factor",
        ),
        lambda c: c.lora.r == 0,
        "since lora.r=0 trains the whole model; choose lora=r8, r16 or r64",
    ),
    (
        ("lora.dropout",),
        lambda c: c.lora.dropout > 0,
        "since PPO compares log-probs and switches dropout off; the stages before PPO use it",
    ),
    (
        ("data.prompt_column",),
        lambda c: isinstance(c.data, FileData) and bool(c.data.messages_column),
        "since data.messages_column is read",
    ),
    (
        ("data.held_out",),
        lambda c: isinstance(c.data, FileData) and judged_by(c.data) is not None,
        "since the run is judged by all prompts of data.held_out_path or held_out_split",
    ),
    (
        ("data.template_kwargs", "data.template_kwargs."),
        lambda c: isinstance(c.data, EmbeddedData) and not c.data.chat,
        "since no prompt is a chat; add data.chat=true",
    ),
    (
        ("reward.parts.*.name",),
        lambda c: isinstance(c.reward, WeightedReward),
        "since a part is called as its key is",
    ),
    (
        ("reward.retry_wait",),
        lambda c: isinstance(c.reward, FunctionReward) and c.reward.retries == 0,
        "since there are no further attempts; add reward.retries=1",
    ),
    (
        ("critic.v_head_init", "critic.v_head_init_std"),
        lambda c: isinstance(c.critic, HeadCritic) and brings_value_head(c.model),
        f"since the value head beside the model goes on; without {VALUE_HEAD_FILE} in model.path a "
        "new one is drawn",
    ),
    (
        ("critic.v_head_init_std",),
        lambda c: isinstance(c.critic, HeadCritic) and c.critic.v_head_init == "zero",
        "since the value head starts at zero; add critic.v_head_init=normal",
    ),
    (
        ("critic.warmup_steps", "critic.epochs", "critic.learning_rate"),
        lambda c: isinstance(c.critic, HeadCritic) and c.ppo.vf_coef == 0,
        "since ppo.vf_coef=0 teaches the value head nothing",
    ),
    (
        ("critic.revision",),
        lambda c: isinstance(c.critic, ModelCritic) and not c.critic.path,
        "since the critic starts from the reward's own model; add critic.path=HUB_ID",
    ),
    (
        ("critic.revision",),
        lambda c: isinstance(c.critic, ModelCritic) and is_here(c.critic.path),
        "since critic.path is no hub id",
    ),
    (
        ("critic.label",),
        lambda c: isinstance(c.critic, ModelCritic) and starts_from_embedded(c),
        "since the embedded reward model has one output",
    ),
    (
        ("reward.revision",),
        lambda c: isinstance(c.reward, ModelReward) and is_here(c.reward.path),
        "since reward.path is no hub id",
    ),
    (
        ("ppo.vf_coef",),
        lambda c: isinstance(c.critic, ModelCritic),
        "since a critic of its own has a loss of its own; critic.learning_rate is its step size",
    ),
    (
        ("model.revision", "model.trust_remote_code"),
        lambda c: c.model.path == "embedded",
        "since the embedded policy comes from no hub",
    ),
    (
        ("model.revision",),
        lambda c: c.model.path != "embedded" and is_here(c.model.path),
        "since model.path is no hub id",
    ),
    (
        ("evaluation.top_k", "evaluation.top_p", "evaluation.seed"),
        greedy,
        "since evaluation.temperature=0 takes the likeliest token",
    ),
    (
        ("generation.top_k", "generation.top_p"),
        lambda c: c.generation.temperature == 0,
        "since generation.temperature=0 takes the likeliest token",
    ),
    (
        (
            "tracking.mode",
            "tracking.project",
            "tracking.entity",
            "tracking.group",
            "tracking.name",
            "tracking.id",
            "tracking.tags",
            "tracking.notes",
            "tracking.log_model",
        ),
        lambda c: c.tracking.type != "wandb",
        "since nothing goes to W&B; choose tracking=wandb",
    ),
    (
        ("tracking.samples_every",),
        lambda c: c.tracking.samples_every > 0 and c.evaluation.samples == 0,
        "since evaluation.samples=0 keeps no samples, of training neither",
    ),
    (
        ("tracking.samples_every",),
        lambda c: c.tracking.samples_every > 0 and shown_by_evaluations(c),
        "since those iterations show the samples of their evaluation (evaluation.every)",
    ),
    (
        ("model.cuda_graphs",),
        lambda c: c.device == "cpu",
        "since a CPU has no CUDA graphs",
    ),
    (
        ("checkpoint.keep",),
        lambda c: c.checkpoint.every == 0,
        "since only the last state is kept; add checkpoint.every=10",
    ),
)
