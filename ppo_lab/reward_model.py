"""`python -m ppo_lab.reward_model`: train a reward model on compared answers."""

from __future__ import annotations

from ppo_lab.command_line import launch
from ppo_lab.stages.config import register_stages
from ppo_lab.stages.jobs import problems, run_reward_model


def main() -> None:
    """Run the stage."""
    register_stages()
    launch(run_reward_model, check=problems, config_name="reward_model")


if __name__ == "__main__":
    main()
