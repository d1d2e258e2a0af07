"""The command lines of the stages before PPO."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from ppo_lab.command_line import launch
from ppo_lab.errors import ConfigError, refuse
from ppo_lab.help import print_stage
from ppo_lab.stages.config import RewardModelConfig, SFTConfig, register_stages
from ppo_lab.stages.jobs import problems, run_reward_model, run_sft


def sft() -> None:
    """`python -m ppo_lab.sft`."""
    purpose = "Fine-tunes a language model on texts, completions or chats."
    _run("sft", purpose, SFTConfig(), run_sft, direction="minimize")  # a loss


def reward_model() -> None:
    """`python -m ppo_lab.reward_model`."""
    purpose = "Trains a reward model on compared answers."
    _run("reward_model", purpose, RewardModelConfig(), run_reward_model)


def _run(
    name: str, purpose: str, settings: Any, job: Callable[..., Any], *, direction: str = "maximize"
) -> None:
    """Run the stage, or say what it is."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print_stage(f"ppo_lab.{name}", purpose, settings)
        return
    if given := [text for text in sys.argv[1:] if text.startswith("resume=")]:
        refuse(ConfigError(f"{given[-1]}: a stage is started anew; leave it out"))
    register_stages()
    launch(job, check=problems, config_name=name, direction=direction)
