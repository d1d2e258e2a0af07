"""Rewards that need no model: sentiment by a lexicon, length, a constant."""

from __future__ import annotations

from typing import Any

from ppo_lab.rewards.conversation import joined
from ppo_lab.rewards.scoring import RewardError, Scorer


def vader_scorer(section: Any, *, device: str) -> Scorer:
    """VADER's compound sentiment, in [-1, 1], of the response alone or with its prompt before it.

    Source: Hutto and Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis".

    Raises:
        RewardError: the vaderSentiment package is not installed.
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise RewardError(VADER_MISSING) from error
    analyzer = SentimentIntensityAnalyzer()
    with_prompt = section.text == "prompt_and_completion"

    def score(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
        texts = map(joined, prompts, completions) if with_prompt else completions
        return [analyzer.polarity_scores(text)["compound"] for text in texts]

    return score


VADER_MISSING = (
    "reward=vader needs the vaderSentiment package, an extra that is not installed: "
    "pip install 'ppo_lab[vader]' (or pip install vaderSentiment)."
)


def length_scorer(section: Any, *, device: str) -> Scorer:
    """The response's length in words or characters; with an `ideal`, -|length - ideal| / ideal."""
    words, ideal = section.unit == "words", section.ideal

    def score(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
        lengths = [len(text.split()) if words else len(text) for text in completions]
        return [-abs(n - ideal) / ideal if ideal else float(n) for n in lengths]

    return score


def constant_scorer(section: Any, *, device: str) -> Scorer:
    """The same score for every response."""
    value = float(section.value)
    return lambda prompts, completions, **columns: [value] * len(completions)
