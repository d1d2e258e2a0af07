"""`python -m ppo_lab.bench`: this project and those it replaces on the same work, in turn."""

from ppo_lab.signals import run_quietly

if __name__ == "__main__":
    run_quietly("ppo_lab.bench.command")
