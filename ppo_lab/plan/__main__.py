"""`python -m ppo_lab.plan`: what a run costs, told before it runs."""

from ppo_lab.signals import run_quietly

if __name__ == "__main__":
    run_quietly("ppo_lab.plan.command")
