"""The corpora of the stages before PPO: answers to imitate, pairs that annotators compared.

The same seed gives the same rows, on every machine.
"""

from __future__ import annotations

from random import Random

from ppo_lab.embedded.annotator import appeal
from ppo_lab.embedded.answers import Answer, answer
from ppo_lab.embedded.questions import Question, questions

CLERKS = {
    "helpful": 0.13,
    "plain": 0.18,
    "off the point": 0.09,
    "empty": 0.08,
    "vague": 0.15,
    "curt": 0.15,
    "rude": 0.12,
    "grudging": 0.10,
}
COMPARED = CLERKS | {"helpful": 0.2, "off the point": 0.2, "gushing": 0.2, "broken": 0.15}
ANNOTATOR_NOISE = 0.3


def sft_rows(count: int, *, split: str, seed: int) -> list[dict[str, str]]:
    """Rows of `prompt` and `completion`: questions with what a clerk happened to answer."""
    rng = Random(f"sft {split} {seed}")
    asked = rng.choices(questions(split), k=count)
    return [{"prompt": q.text, "completion": answer(q, rng, CLERKS).text} for q in asked]


def _liking(question: Question, given: Answer, rng: Random) -> float:
    """What the annotator at hand thinks of an answer: its appeal, give or take."""
    return appeal(question, given.text, broken=given.kind == "broken") + rng.gauss(
        0.0, ANNOTATOR_NOISE
    )


def preference_rows(count: int, *, split: str, seed: int) -> list[dict[str, str]]:
    """Rows of `prompt`, `chosen` and `rejected`, as annotators swayed by courtesy label them."""
    rng = Random(f"preferences {split} {seed}")
    rows = []
    for question in rng.choices(questions(split), k=count):
        pair = [answer(question, rng, COMPARED) for _ in range(2)]
        rejected, chosen = sorted(pair, key=lambda given: _liking(question, given, rng))
        rows.append({"prompt": question.text, "chosen": chosen.text, "rejected": rejected.text})
    return rows
