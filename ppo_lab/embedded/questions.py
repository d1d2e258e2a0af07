"""The customers' questions, split so that what is held out is never seen in any training."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache

from ppo_lab.embedded.grammar import CONTEXTS, QUESTIONS, TOPICS, Topic

HELD_OUT_SHARE = 0.1
SPLITS = ("train", "held_out")


@dataclass(frozen=True)
class Question:
    """A question as it is asked, with what it is about and the words that it uses for it."""

    text: str
    topic: Topic
    task: str


def _held_out(task: str, pattern: str) -> bool:
    """Whether this way of asking for this task is held out in all contexts; a stable coin."""
    if (task, pattern) == (TOPICS[0].tasks[0], QUESTIONS[0]):
        return False
    return _digest(f"{pattern}|{task}") / 2**32 < HELD_OUT_SHARE


def _digest(text: str) -> int:
    """A number below 2^32 that looks random and is the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


@cache
def questions(split: str) -> tuple[Question, ...]:
    """Every question of one split, "train" or "held_out", in a fixed order that mixes the topics.

    Whoever takes the first few, as an evaluation does, gets a fair sample.

    Raises:
        ValueError: for any other split.
    """
    if split not in SPLITS:
        raise ValueError(f"the help desk's splits are {' and '.join(SPLITS)}, not {split!r}")
    asked = [
        Question(pattern.format(task=task, context=context), topic, task)
        for topic in TOPICS
        for task in topic.tasks
        for pattern in QUESTIONS
        if _held_out(task, pattern) == (split == "held_out")
        for context in CONTEXTS
    ]
    return tuple(sorted(asked, key=lambda question: _digest(question.text)))


@cache
def _topics_by_text() -> dict[str, Topic]:
    return {question.text: question.topic for split in SPLITS for question in questions(split)}


def topic_of(prompt: str) -> Topic | None:
    """The topic of a prompt: by its exact text, else by a task named in it, else None."""
    known = _topics_by_text().get(prompt.strip())
    if known is not None:
        return known
    asked = prompt.lower()
    return next(
        (topic for topic in TOPICS if any(task.lower() in asked for task in topic.tasks)), None
    )
