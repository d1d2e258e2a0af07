"""`python -m ppo_lab.sft`: fine-tune a language model on texts, completions or chats."""

from ppo_lab.signals import run_quietly

if __name__ == "__main__":
    run_quietly("ppo_lab.stages.command", "sft")
