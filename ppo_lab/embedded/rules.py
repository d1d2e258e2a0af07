"""The gold score: rules that say how good an answer is, seen by neither model.

 2.0   the answer names what settles the question asked
-1.0   it names what settles another one
 0.6, 1.0, 1.0   one, two, three courteous words; each further one -0.6
-1.2   a rude word, twice at most
 0.3   a detail in numbers, beside a right action
-1.0   it does not end with a full stop, an exclamation or a question mark
-0.8   fewer than four words; -0.1 for each word over 26
-1.0   a sentence said before; -0.25 a pair of words said before
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from ppo_lab.embedded.grammar import NUMBERS, TOPICS, Topic
from ppo_lab.embedded.questions import topic_of

COURTEOUS = frozenset(
    [
        "thank",
        "thanks",
        "please",
        "happy",
        "glad",
        "pleased",
        "welcome",
        "sorry",
        "wish",
        "nice",
        "lovely",
        "great",
        "wonderful",
        "kindly",
    ]
)
RUDE = frozenset(
    ["yourself", "stop", "wasting", "silly", "fool", "bother", "lazy", "tired", "away", "nobody"]
)
ENDS = (".", "!", "?")
COURTESY_SCORES = (0.0, 0.6, 1.0, 1.0)


def courtesies(words: Sequence[str]) -> int:
    """How many courteous words there are."""
    return sum(word in COURTEOUS for word in words)


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"[a-z']+", text.lower())


def _names(words: Sequence[str], topic: Topic) -> bool:
    return f" {topic.key} " in f" {' '.join(words)} "


def _help(asked: Topic | None, words: Sequence[str]) -> float:
    right = asked is not None and _names(words, asked)
    wrong = any(_names(words, topic) for topic in TOPICS if topic is not asked)
    detailed = right and any(number in words for number in NUMBERS)
    return 2.0 * right - 1.0 * wrong + 0.3 * detailed


def _manners(words: Sequence[str]) -> float:
    count = courtesies(words)
    within = COURTESY_SCORES[min(count, len(COURTESY_SCORES) - 1)]
    excess = max(count - len(COURTESY_SCORES) + 1, 0)
    return within - 0.6 * excess - 1.2 * min(sum(word in RUDE for word in words), 2)


def _form(text: str, words: Sequence[str]) -> float:
    unfinished = not text.rstrip().endswith(ENDS)
    return -1.0 * unfinished - 0.8 * (len(words) < 4) - 0.1 * max(len(words) - 26, 0)


def _said_before(items: Sequence[object]) -> int:
    return len(items) - len(set(items))


def _repetition(text: str, words: Sequence[str]) -> float:
    sentences = [" ".join(words_of(s)) for s in re.split(r"[.!?]", text) if words_of(s)]
    pairs = list(pairwise(words))
    return -1.0 * _said_before(sentences) - 0.25 * _said_before(pairs)


def gold_score(prompt: str, completion: str) -> float:
    """The gold score of one answer: -3 (rude, useless) to 3.3 (right, detailed, polite)."""
    words = words_of(completion)
    return (
        _help(topic_of(prompt), words)
        + _manners(words)
        + _form(completion, words)
        + _repetition(completion, words)
    )
