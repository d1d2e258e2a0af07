"""What a user is told to type means the path that it was made of."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from ppo_lab.typed import quoted, shell_override, shell_path, short_path, unquoted

NAMES = ["plain", "a b", "it's", 'say "so"', "$HOME", "a (2), [b]", "back\\slash", "größe=1", "~x"]
NAMES += ["größe", "文", "٣", "a\nb", "back\\", "back\\\\", "it\\'s", "'\\\\'\\"]


def test_paths_are_from_here_where_that_is_shorter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert short_path(tmp_path / "outputs" / "a") == "outputs/a"
    assert short_path(Path("/x")) == "/x"


@pytest.mark.parametrize("name", NAMES)
def test_a_shell_and_hydra_read_the_path_that_is_meant(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs" / name
    assert shlex.split(shell_path(folder)) == [f"outputs/{name}"]
    (word,) = shlex.split(shell_override("resume", folder))
    (override,) = OverridesParser.create().parse_overrides([word])
    assert override.value() == f"outputs/{name}"
    assert unquoted(quoted(folder)) == str(folder)


def test_what_needs_no_quotes_has_none(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert shell_override("resume", tmp_path / "outputs/1-2") == "resume=outputs/1-2"
