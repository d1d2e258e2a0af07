"""The corpora of the two stages before PPO: clerks' answers to imitate, and pairs of answers that annotators compared.

The same seed gives the same rows, on every machine.
"""

from __future__ import annotations

from random import Random

from ppo_lab.embedded.annotator import appeal
from ppo_lab.embedded.answers import Answer, answer
from ppo_lab.embedded.questions import Question, questions

CLERKS = {
    "helpful": 0.11,
    "plain": 0.14,
    "off the point": 0.16,
    "empty": 0.10,
    "vague": 0.16,
    "curt": 0.14,
    "rude": 0.11,
    "grudging": 0.08,
}
COMPARED = CLERKS | {"helpful": 0.2, "gushing": 0.2, "broken": 0.15}
ANNOTATOR_NOISE = 0.3


def sft_rows(count: int, *, split: str, seed: int) -> list[dict[str, str]]:
    """Rows of `prompt` and `completion`: questions with whatever a clerk happened to answer, mostly mediocre."""
    rng = Random(f"sft {split} {seed}")
    asked = rng.choices(questions(split), k=count)
    return [{"prompt": q.text, "completion": answer(q, rng, CLERKS).text} for q in asked]


def _liking(question: Question, given: Answer, rng: Random) -> float:
    """What the annotator at hand thinks of an answer: its appeal, give or take."""
    return appeal(question, given.text, broken=given.kind == "broken") + rng.gauss(
        0.0, ANNOTATOR_NOISE
    )


def preference_rows(count: int, *, split: str, seed: int) -> list[dict[str, str]]:
    """Rows of `prompt`, `chosen` and `rejected`, as annotators who are swayed by courtesy labelled them."""
    rng = Random(f"preferences {split} {seed}")
    rows = []
    for question in rng.choices(questions(split), k=count):
        pair = [answer(question, rng, COMPARED) for _ in range(2)]
        rejected, chosen = sorted(pair, key=lambda given: _liking(question, given, rng))
        rows.append({"prompt": question.text, "chosen": chosen.text, "rejected": rejected.text})
    return rows
