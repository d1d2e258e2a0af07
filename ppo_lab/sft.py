"""`python -m ppo_lab.sft`: fine-tune a language model on texts, completions or chats."""

from __future__ import annotations

import sys

from ppo_lab import signals

PURPOSE = "Fine-tunes a language model on texts, completions or chats."


def main() -> None:
    """Run the stage, or say what it is."""
    signals.end_quietly()
    from ppo_lab.command_line import launch
    from ppo_lab.help import print_stage
    from ppo_lab.stages.config import SFTConfig, register_stages
    from ppo_lab.stages.jobs import problems, run_sft

    if {"--help", "-h"} & set(sys.argv[1:]):
        print_stage("ppo_lab.sft", PURPOSE, SFTConfig())
        return
    register_stages()
    launch(run_sft, check=problems, config_name="sft")


if __name__ == "__main__":
    main()
