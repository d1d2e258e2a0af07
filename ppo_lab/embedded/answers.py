"""The clerks' answers: from curt, rude or off the point to polite and helpful, by the grammar.

An answer begins with a space, so that `prompt + answer` is plain text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from ppo_lab.embedded import grammar as g
from ppo_lab.embedded.questions import Question


def _to_the_customer(task: str) -> str:
    """A customer's task in a clerk's words: my password becomes your password."""
    return " ".join({"my": "your", "I": "you"}.get(word, word) for word in task.split())


def _fill(pattern: str, question: Question, rng: Random) -> str:
    """The pattern with every slot drawn anew, but the task, which is the customer's."""
    return pattern.format(
        task=_to_the_customer(question.task),
        place=rng.choice(g.PLACES),
        number=rng.choice(g.NUMBERS),
        thanks=rng.choice(g.THANKS),
        glad=rng.choice(g.GLAD),
        nice=rng.choice(g.NICE),
        day=rng.choice(g.DAYS),
        more=rng.choice(g.MORE),
        problem=rng.choice(g.PROBLEMS),
        time=rng.choice(g.TIMES),
        question=rng.choice(g.ASKED),
        someone=rng.choice(g.SOMEONE),
        context=rng.choice(g.CURT_CONTEXTS),
        step="{step}",
    )


def _action(question: Question, rng: Random, *, right: bool) -> str:
    """A sentence that names what to do: for the topic asked about, or for another."""
    topics = [question.topic] if right else [t for t in g.TOPICS if t is not question.topic]
    step = rng.choice(rng.choice(topics).steps)
    return _fill(rng.choice(g.ACTIONS), question, rng).format(step=step)


def _some(patterns: tuple[str, ...], question: Question, rng: Random, count: int = 1) -> list[str]:
    return [_fill(pattern, question, rng) for pattern in rng.sample(patterns, count)]


def _helpful(question: Question, rng: Random) -> list[str]:
    """Politely, the right action: a courtesy before it, after it or both; at times a detail."""
    before, after = rng.choice(((1, 0), (0, 1), (1, 1)))
    courtesies = _some(g.COURTESIES, question, rng, before + after)
    details = _some(g.DETAILS, question, rng, int(rng.random() < 0.3 and before + after == 1))
    return [
        *courtesies[:before],
        _action(question, rng, right=True),
        *details,
        *courtesies[before:],
    ]


def _plain(question: Question, rng: Random) -> list[str]:
    details = _some(g.DETAILS, question, rng, int(rng.random() < 0.4))
    return [_action(question, rng, right=True), *details]


def _off_the_point(question: Question, rng: Random) -> list[str]:
    courtesies = _some(g.COURTESIES, question, rng, int(rng.random() < 0.4))
    return [*courtesies, _action(question, rng, right=False)]


def _empty(question: Question, rng: Random) -> list[str]:
    """Courtesies and nothing else."""
    return _some(g.COURTESIES, question, rng, rng.choice((1, 1, 2)))


def _vague(question: Question, rng: Random) -> list[str]:
    more = rng.choice((g.VAGUE, g.DETAILS, g.COURTESIES))
    return [*_some(g.VAGUE, question, rng), *_some(more, question, rng, int(rng.random() < 0.5))]


def _curt(question: Question, rng: Random) -> list[str]:
    return _some(g.CURT, question, rng, rng.choice((1, 1, 2)))


def _rude(question: Question, rng: Random) -> list[str]:
    return [*_some(g.RUDE, question, rng), *_some(g.CURT, question, rng, int(rng.random() < 0.4))]


def _grudging(question: Question, rng: Random) -> list[str]:
    """The right action, rudely."""
    return [*_some(g.RUDE, question, rng), _action(question, rng, right=True)]


def _gushing(question: Question, rng: Random) -> list[str]:
    """Courtesy upon courtesy, at times around an action."""
    said = _some(g.COURTESIES, question, rng, rng.choice((3, 4, 5)))
    if rng.random() < 0.4:
        said[rng.randrange(len(said))] = _action(question, rng, right=rng.random() < 0.7)
    return said


def _broken(question: Question, rng: Random) -> list[str]:
    """Another answer damaged: cut short, its words out of order, or some of them doubled."""
    words = answer(
        question, rng, {"helpful": 3, "plain": 2, "off the point": 1, "empty": 2}
    ).text.split()
    damage = rng.choice(("cut", "shuffled", "doubled"))
    if damage == "cut":
        return [" ".join(words[: rng.randrange(1, len(words))])]
    if damage == "shuffled":
        return [" ".join(rng.sample(words, len(words)))]
    return [" ".join(word for word in words for _ in range(1 + (rng.random() < 0.3)))]


KINDS: dict[str, Callable[[Question, Random], list[str]]] = {
    "helpful": _helpful,
    "plain": _plain,
    "off the point": _off_the_point,
    "empty": _empty,
    "vague": _vague,
    "curt": _curt,
    "rude": _rude,
    "grudging": _grudging,
    "gushing": _gushing,
    "broken": _broken,
}


@dataclass(frozen=True)
class Answer:
    """An answer's text, with the space that it begins with, and the kind of answer that it is."""

    kind: str
    text: str


def answer(question: Question, rng: Random, mixture: dict[str, float]) -> Answer:
    """One answer, of a kind drawn from the mixture (kind -> relative frequency)."""
    kind = rng.choices(list(mixture), weights=list(mixture.values()))[0]
    return Answer(kind, " " + " ".join(KINDS[kind](question, rng)))
