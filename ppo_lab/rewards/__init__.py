"""What scores responses: a reward model, a Python function, a lexicon, a length, a constant, a
weighted mixture.

`build_reward` makes one from its section of the configuration; `problems` says beforehand, without
loading any weight, what would keep it from being made.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol

from ppo_lab.rewards.checks import kind, problems

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from ppo_lab.rewards.scoring import RewardError as RewardError
    from ppo_lab.rewards.scoring import Scorer
    from ppo_lab.types import Scores

__all__ = ["Reward", "RewardError", "build_reward", "check_columns", "problems"]


class Reward(Protocol):
    """Scores of responses, as the trainer asks for them.

    `prompts` are texts or lists of chat messages, `completions` texts; every column of the data set
    comes under its own name. The scores are float32 on the CPU, one a sample, all finite.

    Raises:
        RewardError: naming the reward and the sample, whenever that cannot be had.
    """

    name: str

    @property
    def fingerprints(self) -> dict[str, str]:
        """A digest of each reward model, by the part's name."""
        ...

    def __call__(
        self, /, prompts: list[Any], completions: list[str], **columns: list[Any]
    ) -> Scores:
        """The scores of these completions."""
        ...

    def check_prompts(self, prompts: Sequence[Any]) -> None:
        """Refuse prompts that a reward model cannot read."""
        ...


def check_columns(section: Any, columns: Collection[str]) -> None:
    """Nothing, where every function of a reward can be called with these columns of the data; no
    reward model is loaded.

    Raises:
        RewardError: a function needs another one.
    """
    from ppo_lab.rewards.function import function_scorer

    if kind(section) == "weighted":
        for part in section.parts.values():
            check_columns(part, columns)
    elif kind(section) == "function":
        given = ("prompts", "completions", "completion_ids", *columns)
        function_scorer(section, device="cpu").check_columns(given)


def build_reward(section: Any, *, device: str, processes: Any = None) -> Reward:
    """The reward that a section of the configuration describes; `device` is where a reward model
    lives. Several `processes` score together.

    Raises:
        ConfigError: the reward cannot be made: no such model or function, a missing extra, ...
            Most are RewardError, a kind of it.
    """
    from ppo_lab.processes.alone import Alone
    from ppo_lab.rewards.scoring import WeightedSum

    name = section.name or kind(section)
    processes = processes or Alone()
    parts = _parts(section, name, device, processes)
    return WeightedSum(name, weight=section.weight, parts=parts, processes=processes)


def _parts(section: Any, name: str, device: str, processes: Any) -> dict[str, tuple[float, Scorer]]:
    """The raw scorers of a section by name, each with its weight within the section."""
    if kind(section) != "weighted":
        return {name: (1.0, _scorer(section, device, processes))}
    parts: dict[str, tuple[float, Scorer]] = {}
    for key, inner in section.parts.items():
        below = _parts(inner, key, device, processes)
        prefix = f"{key}/" if kind(inner) == "weighted" else ""
        parts |= {
            prefix + n: (inner.weight * weight, scorer) for n, (weight, scorer) in below.items()
        }
    return parts


def _scorer(section: Any, device: str, processes: Any) -> Scorer:
    """The raw scorer of one kind of reward; each kind's imports wait until it is asked for."""
    module = importlib.import_module(f"ppo_lab.rewards.{_HOMES[kind(section)]}")
    several = {"processes": processes} if kind(section) == "model" else {}
    return getattr(module, f"{kind(section)}_scorer")(section, device=device, **several)


_HOMES = {
    "embedded": "classifier",
    "model": "classifier",
    "function": "function",
    "vader": "lexical",
    "length": "lexical",
    "constant": "lexical",
}


def __getattr__(name: str) -> Any:
    """`RewardError`, imported when first asked for: `problems` needs no torch."""
    if name == "RewardError":
        return importlib.import_module("ppo_lab.rewards.scoring").RewardError
    raise AttributeError(f"module 'ppo_lab.rewards' has no attribute {name!r}")
