"""The ledger of what went wrong in earlier PPO trainers: each row has a test that names it."""

from __future__ import annotations

import re
from pathlib import Path

SECTIONS = {
    "N": 35,
    "G": 11,
    "P": 11,
    "L": 6,
    "T": 6,
    "R": 6,
    "Q": 3,
    "E": 1,
    "A": 3,
    "M": 6,
    "S": 3,
}
ROW = re.compile(r"\b([A-Z])-(\d\d)\b")

# Rows without a test that can run on a CPU in seconds, and why.
LEFT = {
    "L-02": "one process writes one table; rows of several processes come with those",
    "L-03": "names of runs are tested with the tracker",
    "L-05": "the nested config is tested with the tracker",
    "T-01": "texts and conversations are tested with the data",
    "Q-01": "4-bit weights need a GPU",
    "Q-03": "weights offloaded to CPU or disk are not offered",
    "M-05": "there are no aliases of config keys",
    "S-01": "gathering the weights of several GPUs comes with several processes",
    "S-03": "a second model for the values is not offered; the head is on the trunk",
}
# Rows of which the ledger's remedy was not taken, each with what stands in its place.
OTHERWISE = {
    "N-07": "encoder-decoders are refused",
    "N-14": "GAE never bootstraps; `ended` comes from generation all the same",
    "R-03": "a score is one number a response; vectors are refused by name",
}


def rows() -> set[str]:
    return {f"{letter}-{i:02}" for letter, n in SECTIONS.items() for i in range(1, n + 1)}


def named() -> set[str]:
    """Rows that a test's text names, this file left out."""
    texts = [f.read_text() for f in Path(__file__).parent.glob("test_*.py") if f != Path(__file__)]
    return {f"{letter}-{number}" for text in texts for letter, number in ROW.findall(text)}


def test_every_row_is_tested_or_left_with_a_reason() -> None:
    assert rows() - named() - LEFT.keys() == set()
    assert LEFT.keys() | OTHERWISE.keys() <= rows()
    assert all(LEFT.values())
    assert OTHERWISE.keys() <= named()


def test_no_test_names_a_row_that_there_is_not() -> None:
    letters = {row for row in named() if row[0] in SECTIONS}
    assert letters <= rows()
