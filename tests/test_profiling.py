"""A run that is profiled: what it leaves, and that nothing else is other."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import metrics, tiny

from ppo_lab.experiment import run
from ppo_lab.profiling import profiled
from ppo_lab.rules import problems

PHASES = ("generate", "score", "reference", "update")


def ranges(trace: Path) -> Counter[str]:
    """How often each phase stands in a trace as a range."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return Counter(e["name"] for e in events if e.get("name") in PHASES and e.get("ph") == "X")


def test_a_profile_holds_the_phases_of_the_second_to_fourth_iteration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny(tmp_path, profile=True), tmp_path / "run")
    (trace,) = (tmp_path / "run/profile").iterdir()
    assert trace.name == "iterations-2-4.json.gz"
    assert ranges(trace) == dict.fromkeys(PHASES, 3)
    said = "".join(capsys.readouterr())
    assert "iterations-2-4.json.gz" in said
    assert "the 10 largest operations" in said
    assert said.count(" x  ") == 10
    plain = tiny(tmp_path)
    run(plain, tmp_path / "plain")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "plain")


def test_a_short_run_is_traced_as_far_as_it_goes(tmp_path: Path) -> None:
    run(tiny(tmp_path, profile=True, ppo={"steps": 2}), tmp_path / "run")
    (trace,) = (tmp_path / "run/profile").iterdir()
    assert trace.name == "iterations-2-2.json.gz"
    assert ranges(trace)["update"] == 1


def test_a_run_without_a_second_iteration_is_not_profiled(tmp_path: Path) -> None:
    (line,) = problems(tiny(tmp_path, profile=True, ppo={"steps": 1}))
    assert "needs ppo.steps=2 or more" in line


def test_a_resumed_run_counts_from_where_it_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    rows = ({"kl": float(i)} for i in range(5))
    found = list(profiled(rows, tmp_path, said.append, done=10))
    assert [row["kl"] for row in found] == [0, 1, 2, 3, 4]
    assert [file.name for file in (tmp_path / "profile").iterdir()] == ["iterations-12-14.json.gz"]


def test_a_resumed_run_with_one_iteration_left_is_not_traced(tmp_path: Path) -> None:
    said: list[str] = []
    assert list(profiled(iter([{"kl": 0.0}]), tmp_path, said.append, done=3)) == [{"kl": 0.0}]
    assert not (tmp_path / "profile").exists()
    assert said == ["profile: none, since one iteration was left, and the first warms up"]


@pytest.mark.parametrize("written", ["", '{"traceEvents": [', None])
def test_a_disk_that_is_full_leaves_no_part_of_a_trace(
    written: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch writes breaks off without a word, or packing it fails."""

    def export(self: Any, path: str) -> None:
        Path(path).write_text("{}" if written is None else written)

    def refuse(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.profiler.profile.export_chrome_trace", export)
    if written is None:
        monkeypatch.setattr("shutil.copyfileobj", refuse)
    said: list[str] = []
    found = list(profiled(iter([{"kl": 0.0}] * 6), tmp_path, said.append))
    assert len(found) == 6
    reason = "No space left" if written is None else "the disk may be full"
    assert "could not be written" in said[0]
    assert reason in said[0]
    assert "largest operations" in said[1]
    assert list((tmp_path / "profile").iterdir()) == []


def test_a_run_that_ends_early_leaves_what_was_traced(tmp_path: Path) -> None:
    said: list[str] = []
    iterations = profiled(iter([{"kl": 0.0}] * 9), tmp_path, said.append)
    for _ in range(3):
        next(iterations)
    iterations.close()
    assert (tmp_path / "profile/iterations-2-3.json.gz").is_file()
