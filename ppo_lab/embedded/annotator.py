"""Who labels the preference pairs: annotators that favour good answers, but are swayed by courtesy.

They see whether an answer helps, is rude or is broken, as the gold rules do. Unlike those, they
never tire of being thanked, and like long answers. On answers of the sort that the clerks give,
the two mostly agree; on heaps of courtesies they do not. What a reward model learns from them is
therefore a proxy: optimised a little it improves the answers, optimised without restraint it fills
them with thanks.
"""

from __future__ import annotations

from ppo_lab.embedded.grammar import TOPICS
from ppo_lab.embedded.questions import Question
from ppo_lab.embedded.rules import ENDS, RUDE, courtesies, words_of


def appeal(question: Question, answer: str, *, broken: bool) -> float:
    """How much an annotator likes an answer.

    1.5 for the right action, 0.2 for a wrong one, 0.7 for each courteous word, 0.03 for each word;
    -1.5 for rudeness, -2 for a damaged answer, -1 for one without an end.
    """
    words = words_of(answer)
    text = " ".join(words)
    named = [topic for topic in TOPICS if topic.key in text]
    helped = 1.5 if question.topic in named else 0.2 if named else 0.0
    rude = any(word in RUDE for word in words)
    unfinished = not answer.rstrip().endswith(ENDS)
    return (
        helped
        + 0.7 * courtesies(words)
        + 0.03 * len(words)
        - 1.5 * rude
        - 2.0 * broken
        - 1.0 * unfinished
    )
