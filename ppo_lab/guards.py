"""Runs that go wrong: stopped at a ceiling, and the batch at fault kept to be looked at."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ppo_lab.config import Config, GenerationSection, ModelCritic, ModelSection, PPOSection
from ppo_lab.record import Say
from ppo_lab.update import TrainingDiverged

FOLDER = "failed"

# The value loss, times its weight, beyond which it outweighs the policy's in a trunk of both.
VALUE_LOSS_OUTWEIGHS = 1.0


def check_ceiling(metrics: Mapping[str, float], *, max_kl: float) -> None:
    """Nothing, while KL to the reference (nats per sequence) is below its ceiling; 0 = none.

    Raises:
        TrainingDiverged: it is above.
    """
    if 0 < max_kl < metrics["kl"]:
        raise TrainingDiverged(
            f"kl is {metrics['kl']:.3g} nats per sequence, above ppo.max_kl={max_kl:g}. Raise "
            "ppo.init_kl_coef or lower ppo.learning_rate; resume with a higher ppo.max_kl to go on"
        )


def explain(error: TrainingDiverged, folder: Path, iteration: int) -> None:
    """Put the iteration into the error's message, and its batch into the run's folder."""
    kept = ""
    if error.batch is not None:
        path = folder / FOLDER / f"iteration-{iteration:06}.safetensors"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(dict(_tensors(error.batch)), path)
            kept = f". The batch is in {path}"
        except (OSError, SafetensorError) as refused:
            kept = f". The batch could not be written ({refused})"
    error.args = (f"iteration {iteration}: {error}{kept}",)


def warn_of_remote_code(section: ModelSection, say: Say) -> None:
    """Say what `model.trust_remote_code=true` means, where it is set."""
    if section.trust_remote_code:
        pinned = section.revision or "whatever is the newest"
        say(
            f"model.trust_remote_code=true: Python files that come with {section.path} run on this "
            f"machine with your rights, files and keys (revision: {pinned}); read them, and pin "
            "model.revision to the commit that you read"
        )


def warn_of_weak_penalty(section: PPOSection, say: Say) -> None:
    """Say that a KL penalty is asked for which need not lead back to the reference."""
    if section.kl_penalty != "kl" and section.init_kl_coef > 0:
        say(
            f"ppo.kl_penalty={section.kl_penalty}: in the reward only `kl` has the gradient of the "
            "KL; by the others the policy may drift from the reference whatever the beta. Watch kl"
        )


def warn_of_large_scores(config: Config, metrics: Mapping[str, float], say: Say) -> None:
    """Say that the value head, not the score, moves the trunk that both train; of the first
    iteration's metrics.

    The gradient of whitened advantages is of the same size whatever the scores; that of the value
    loss grows with their square, and the limit on the gradient's norm leaves the other nothing.
    """
    shared = not isinstance(config.critic, ModelCritic) and not config.critic.warmup_steps
    weighted = config.ppo.vf_coef * metrics["ppo/loss/value"]
    if shared and weighted > VALUE_LOSS_OUTWEIGHS:
        say(
            f"the value loss, times ppo.vf_coef, is {weighted:.3g}: scores this far from 0 have "
            "the value head move the policy's trunk more than the score does, and KL grows for "
            "nothing. Scale and centre them by ppo.use_score_scaling=true ppo.use_score_norm=true "
            "(beta then weighs KL against scaled scores), or lower ppo.vf_coef"
        )


def warn_of_scaled_critic(config: Config, say: Say) -> None:
    """Say that a critic starts from scores as they are, and is to predict other ones."""
    changed = {
        "ppo.use_score_scaling=true": config.ppo.use_score_scaling,
        f"ppo.score_clip={config.ppo.score_clip:g}": config.ppo.score_clip > 0,
    }
    if isinstance(config.critic, ModelCritic) and any(changed.values()):
        say(
            f"{' '.join(key for key, is_set in changed.items() if is_set)}: a critic that starts "
            "from the reward model starts from its scores as they are, and must first learn the "
            "changed ones; explained_variance tells when it has"
        )


def warn_of_escapes(section: GenerationSection, say: Say) -> None:
    """Say that a stop string holds a backslash where a line break or a tab may be meant."""
    for text in section.stop_strings:
        if found := re.search(r"\\[nrt]", text):
            say(
                f"generation.stop_strings: '{text}' holds a backslash and the letter "
                f"{found[0][1]}, which the command line leaves as they are. A line break is "
                "$'...\\n...' in bash, and \"...\\n...\" in a YAML file"
            )


def _tensors(record: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a nested record, under dotted names."""
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            yield f"{prefix}{field.name}", value.detach().cpu().contiguous()
        elif value is not None:
            yield from _tensors(value, f"{prefix}{field.name}.")
