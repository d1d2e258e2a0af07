"""`python -m ppo_lab.reward_model`: train a reward model on compared answers."""

from ppo_lab.signals import run_quietly

if __name__ == "__main__":
    run_quietly("ppo_lab.stages.command", "reward_model")
