"""The ledger of what went wrong in earlier PPO trainers: each row has a test that names it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

SECTIONS = {
    "N": 35,
    "G": 11,
    "P": 11,
    "C": 10,
    "D": 9,
    "M": 6,
    "S": 3,
    "L": 6,
    "T": 6,
    "R": 6,
    "Q": 3,
    "E": 1,
    "A": 3,
}
ROW = re.compile(r"\b([A-Z]-\d\d)\b")

# Rows that no test here can run, and why.
LEFT = {
    "Q-01": "4-bit weights need a GPU",
    "S-01": "how often sharded weights are gathered changes no number, and no time on one machine",
}
# Rows of which the ledger's remedy was not taken, each with what stands in its place.
OTHERWISE = {
    "N-07": "encoder-decoders are refused",
    "N-14": "GAE never bootstraps; `ended` comes from generation all the same",
    "R-03": "a score is one number a response; vectors are refused by name",
}


def rows() -> set[str]:
    return {f"{letter}-{i:02}" for letter, n in SECTIONS.items() for i in range(1, n + 1)}


def named_by(file: Path) -> Iterator[str]:
    """Rows that a file's tests name, in their docstrings or beside their names: what is said
    elsewhere in it tests nothing.
    """
    text = file.read_text()
    lines = text.splitlines()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            head = lines[node.lineno - 1 : node.body[0].lineno - 1]
            yield from ROW.findall("\n".join([*head, ast.get_docstring(node) or ""]))


def named() -> set[str]:
    files = Path(__file__).parent.glob("test_*.py")
    return {row for file in files for row in named_by(file) if row[0] in SECTIONS}


def test_every_row_is_tested_or_left_with_a_reason() -> None:
    assert len(rows()) == 110
    assert rows() - named() - LEFT.keys() == set()
    assert LEFT.keys() | OTHERWISE.keys() <= rows()
    assert all(LEFT.values())
    assert OTHERWISE.keys() <= named()


def test_no_row_is_left_that_a_test_names() -> None:
    assert LEFT.keys() & named() == set()


def test_no_test_names_a_row_that_there_is_not() -> None:
    assert named() <= rows()


def test_a_row_is_named_by_a_test_alone(tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text('"""N-01"""\nX = "N-02"  # N-03\ndef test_it():  # N-04\n    """N-05."""\n')
    assert sorted(named_by(file)) == ["N-04", "N-05"]
