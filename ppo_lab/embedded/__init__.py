"""The embedded default: a help desk in miniature, with its own text, models and gold score.

`prompts` and `gold` need nothing; `policy_path` and `reward_path` build their models on first use
and cache them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

REWARD_INPUT = "{prompt}{completion}</s>"
"""What the embedded reward model reads: prompt, completion, its tokenizer's EOS, nothing between.

A completion normally begins with a space. The tokenizer saved with the reward model puts one where
it is missing between sentences and takes any other white space for one, so that the answers of
other policies score the same with a space, a line break or nothing in front.
"""


def prompts(split: str) -> list[str]:
    """The customers' questions of a split: "train", or "held_out", which no stage has seen."""
    from ppo_lab.embedded.questions import questions

    return [question.text for question in questions(split)]


def gold(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The gold score of each completion, about -3 to 3.3: rules that neither model has seen."""
    from ppo_lab.embedded.rules import gold_score

    return [
        gold_score(prompt, completion)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def policy_path() -> Path:
    """The folder of the SFT policy, a small BLOOM with its tokenizer."""
    from ppo_lab.embedded.build import ensure

    return ensure() / "policy"


def reward_path() -> Path:
    """The folder of the reward model, a classifier with one output and its own tokenizer."""
    from ppo_lab.embedded.build import ensure

    return ensure() / "reward"
