"""`python -m ppo_lab.compare PATHS...`: a table here; page, data and figures in a folder."""

from ppo_lab.signals import run_quietly

if __name__ == "__main__":
    run_quietly("ppo_lab.compare.command")
