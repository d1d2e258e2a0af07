"""The benchmark of learning: what score trainers reach, at what KL, in how many seconds.

Every contestant trains the same model on the same prompts with the same reward model, number of
samples, optimizer steps and learning rate; a judge that knows none of them samples the models that
they leave.
"""

from __future__ import annotations

import argparse


def main(asked: argparse.Namespace) -> int:
    """Train, judge, show.

    Raises:
        RuntimeError: a process fails, or there is nothing to compare on.
    """
    from ppo_lab.bench.learning import command

    command.compare(asked)
    return 0
