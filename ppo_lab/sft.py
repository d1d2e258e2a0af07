"""`python -m ppo_lab.sft`: fine-tune a language model on texts, completions or chats."""

from __future__ import annotations

from ppo_lab.command_line import launch
from ppo_lab.stages.config import register_stages
from ppo_lab.stages.jobs import problems, run_sft


def main() -> None:
    """Run the stage."""
    register_stages()
    launch(run_sft, check=problems, config_name="sft")


if __name__ == "__main__":
    main()
