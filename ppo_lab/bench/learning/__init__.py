"""The benchmark of learning: what score trainers reach, at what KL, in how many seconds.

Every contestant trains the same model on the same prompts with the same reward model, number of
samples, optimizer steps and learning rate; a judge that knows none of them samples the models that
they leave.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Train, judge, show; 1 where a process fails."""
    from ppo_lab.bench.learning import command

    return command.main(arguments)
