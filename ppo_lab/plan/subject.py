"""The run that is planned, as far as it is known without loading anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from ppo_lab.assembly import pick_device
from ppo_lab.config import Config
from ppo_lab.errors import ConfigError
from ppo_lab.models.fast.families import read
from ppo_lab.models.loading import check_vocabulary, load_tokenizer
from ppo_lab.models.trunk import Trunk
from ppo_lab.plan.architecture import (
    Architecture,
    architecture_of,
    blueprint,
    classifier_blueprint,
)
from ppo_lab.plan.devices import Device
from ppo_lab.plan.heads import HeadShape
from ppo_lab.plan.known import (
    Classifier,
    critic_model,
    policy_dtype,
    reward_models,
    with_known_models,
)
from ppo_lab.plan.workload import Row, Workload, workload_of
from ppo_lab.processes.alone import Alone


@dataclass(frozen=True)
class Target:
    """Where a run is to be: so many of a device of the table, or of this machine's own."""

    device: Device | None = None
    count: int = 1

    @property
    def name(self) -> str:
        """As a report calls it."""
        return "this machine, measured" if self.device is None else self.device.name


@dataclass(frozen=True)
class Subject:
    """The run that is planned, as far as it is known without loading anything.

    `critic_is_known`: there is no critic of its own, or its layers are known one by one.
    `processes` share the workload's batches, of which it has this one's share.
    """

    config: Config
    model: PreTrainedConfig
    dtype: torch.dtype
    of: Architecture
    workload: Workload
    rewards: tuple[Architecture, ...]
    critic: Architecture | None
    critic_is_known: bool = True
    processes: int = 1

    @property
    def head(self) -> HeadShape:
        """The shape of the policy's head."""
        return HeadShape(self.of.vocabulary, self.of.hidden, self.of.head_trained, self.dtype)

    @property
    def largest_pass(self) -> tuple[Row, ...]:
        """The rows of the largest forward and backward pass."""
        return max(self.workload.passes(), key=seen)


def subject_of(config: Config, target: Target, *, response_tokens: int = 0) -> Subject:
    """What is known of a run.

    Raises:
        ConfigError: nobody here knows its models, or a run would refuse them.
    """
    device = (
        torch.device("cpu") if target.device else torch.device(pick_device(config.device, Alone()))
    )
    config, model = with_known_models(config)
    dtype = (
        _published_dtype(config, target.device) if target.device else policy_dtype(config, device)
    )
    critic = critic_model(config, device)
    own = None if critic is None else classifier_blueprint(critic.config, dtype=critic.dtype)
    policy = blueprint(model, config.model, config.lora, dtype=dtype)
    Trunk(policy).check_cache()
    _check_tokenizer(config, policy)
    return Subject(
        config=config,
        model=model,
        dtype=dtype,
        of=architecture_of(policy),
        workload=workload_of(config, response_tokens=response_tokens),
        rewards=tuple(_sizes(found) for found in reward_models(config, device)),
        critic=None if own is None else architecture_of(own),
        critic_is_known=own is None or read(Trunk(own).decoder) is not None,
    )


def _check_tokenizer(config: Config, policy: Any) -> None:
    """Refuse a tokenizer that is not the model's, as a run does; one that is not here is passed."""
    try:
        tokenizer = load_tokenizer(config.model)
    except ConfigError:
        return
    check_vocabulary(tokenizer, policy)


def _published_dtype(config: Config, device: Device) -> torch.dtype:
    """The precision of the weights on a device of the table, as a run there chooses it."""
    if config.model.dtype != "auto":
        return getattr(torch, config.model.dtype)
    return torch.bfloat16 if config.lora.r and device.bfloat16 else torch.float32


def _sizes(found: Classifier) -> Architecture:
    return architecture_of(classifier_blueprint(found.config, dtype=found.dtype))


def seen(rows: Sequence[Row]) -> int:
    """Tokens that a pass of these rows sees."""
    return sum(row.seen for row in rows)
