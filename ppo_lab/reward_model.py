"""`python -m ppo_lab.reward_model`: train a reward model on compared answers."""

from __future__ import annotations

import sys

from ppo_lab import signals

PURPOSE = "Trains a reward model on compared answers."


def main() -> None:
    """Run the stage, or say what it is."""
    signals.end_quietly()
    from ppo_lab.command_line import launch
    from ppo_lab.help import print_stage
    from ppo_lab.stages.config import RewardModelConfig, register_stages
    from ppo_lab.stages.jobs import problems, run_reward_model

    if {"--help", "-h"} & set(sys.argv[1:]):
        print_stage("ppo_lab.reward_model", PURPOSE, RewardModelConfig())
        return
    register_stages()
    launch(run_reward_model, check=problems, config_name="reward_model")


if __name__ == "__main__":
    main()
