from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from ppo_lab import outcome
from ppo_lab.record import JsonLines, read_json_lines, write_atomically
from ppo_lab.types import Sample


def steps(folder: Path, name: str = "metrics.jsonl") -> list[int]:
    return [row["step"] for row in read_json_lines(folder / name)]


def test_every_iteration_is_one_line_on_disk_before_the_next_begins(tmp_path):
    record = JsonLines(tmp_path)
    for step in (1, 2, 3):
        record.log({"kl": step / 2, "mean_reward": -1.0}, step)
        lines = (tmp_path / "metrics.jsonl").read_text().split("\n")
        assert len(lines) == step + 1
        assert lines[-2] == json.dumps({"step": step, "kl": step / 2, "mean_reward": -1.0})


def test_numbers_of_torch_and_numpy_are_numbers_and_nan_is_null(tmp_path):
    record = JsonLines(tmp_path)
    record.log({"a": torch.tensor(1.5), "b": np.float32(2.5), "c": math.nan, "d": -math.inf}, 1)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"step": 1, "a": 1.5, "b": 2.5, "c": None, "d": None}
    assert "NaN" not in text


def test_any_text_a_model_writes_survives_as_one_line(tmp_path):
    wild = "a\nb\x00\x1b[31m\u2028\u0085\ud800 é 🙂"
    JsonLines(tmp_path).log_samples([Sample(wild, wild, 1.0), Sample("p", "r", 2.0)], 4)
    text = (tmp_path / "samples.jsonl").read_text()
    assert len(text.splitlines()) == 2
    first = json.loads(text.splitlines()[0])
    assert (first["step"], first["prompt"], first["score"]) == (4, wild, 1.0)


def test_resuming_drops_later_rows_and_a_torn_last_line(tmp_path):
    record = JsonLines(tmp_path)
    for step in range(1, 8):
        record.log({"kl": float(step)}, step)
        record.log_samples([Sample("p", "r", float(step))], step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "kl": 0.')
    resumed = JsonLines(tmp_path, resume_step=5)
    for step in range(6, 9):
        resumed.log({"kl": float(step)}, step)
    assert steps(tmp_path) == list(range(1, 9))
    assert steps(tmp_path, "samples.jsonl") == [1, 2, 3, 4, 5]


def test_a_new_record_is_not_begun_over_an_old_one(tmp_path):
    JsonLines(tmp_path).log({"kl": 1.0}, 1)
    with pytest.raises(AssertionError, match="would lose these rows"):
        JsonLines(tmp_path)
    assert read_json_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "kl": 1.0}]


def test_the_summary_is_strict_json_with_the_status_and_leaves_no_scraps(tmp_path):
    record = JsonLines(tmp_path)
    record.finish("finished", {"eval": {"last": {"kl": math.nan, "mean_reward": 1.0}}})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == {
        "eval": {"last": {"kl": None, "mean_reward": 1.0}},
        "status": "finished",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_a_disk_that_is_full_when_a_run_goes_on_costs_no_earlier_row(tmp_path, monkeypatch):
    record = JsonLines(tmp_path)
    for step in range(1, 8):
        record.log({"kl": float(step)}, step)
        record.log_samples([Sample("p", "r", float(step))], step)

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    said: list[str] = []
    with monkeypatch.context() as refusing:
        refusing.setattr("ppo_lab.record.write_atomically", full)
        resumed = JsonLines(tmp_path, resume_step=5, say=said.append)
        resumed.log({"kl": 6.0}, 6)
        assert steps(tmp_path) == list(range(1, 8))
    resumed.log({"kl": 7.0}, 7)
    resumed.finish("finished", {})
    assert steps(tmp_path) == list(range(1, 8))
    assert steps(tmp_path, "samples.jsonl") == [1, 2, 3, 4, 5]
    assert len(said) == 1


def test_a_resumed_run_has_no_summary_until_it_ends(tmp_path):
    JsonLines(tmp_path).finish("preempted", {})
    JsonLines(tmp_path, resume_step=0)
    assert not (tmp_path / "summary.json").exists()


def test_an_atomic_write_that_fails_leaves_the_old_text(tmp_path):
    path = tmp_path / "summary.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_a_folder_deleted_under_way_comes_back_and_training_goes_on(tmp_path):
    said: list[str] = []
    record = JsonLines(tmp_path / "run", say=said.append)
    record.log({"kl": 1.0}, 1)
    shutil.rmtree(tmp_path / "run")
    record.log({"kl": 2.0}, 2)
    record.finish("finished", {})
    assert steps(tmp_path / "run") == [2]
    assert (tmp_path / "run" / "summary.json").exists()


def test_rows_that_the_disk_refused_are_written_when_it_recovers(tmp_path):
    said: list[str] = []
    folder = tmp_path / "run"
    record = JsonLines(folder, say=said.append)
    record.log({"kl": 1.0}, 1)
    kept = folder.rename(tmp_path / "moved")
    folder.write_text("a file where the folder was")
    for step in (2, 3):
        record.log({"kl": float(step)}, step)
    assert len(said) == 1
    assert "cannot write" in said[0]
    folder.unlink()
    kept.rename(folder)
    record.log({"kl": 4.0}, 4)
    assert steps(folder) == [1, 2, 3, 4]


def test_a_row_that_a_full_disk_tore_is_neither_torn_nor_doubled_afterwards(tmp_path):
    record = JsonLines(tmp_path)
    record.log({"kl": 1.0}, 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "k')
    record.log({"kl": 2.0}, 2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_said_once_and_the_lost_rows_are_counted_at_the_end(tmp_path):
    said: list[str] = []
    record = JsonLines(tmp_path, say=said.append)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    for step in (1, 2, 3):
        record.log({"kl": 1.0}, step)
    record.finish("finished", {})
    assert len(said) == 2
    assert "No space left" in said[0]
    assert said[1].startswith("3 rows")
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "finished"


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """Somebody's checkout with the package inside, of which nothing is committed yet."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]

    def run(*words):
        return subprocess.run([*git, *words], check=True, capture_output=True, text=True).stdout

    run("init", "--quiet")
    run("commit", "--quiet", "--allow-empty", "--message", "theirs")
    installed = tmp_path / ".venv/ppo_lab/outcome.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("")
    monkeypatch.setattr(outcome, "__file__", str(installed))
    return run


def test_the_commit_is_the_package_s_own(foreign):
    """Installed into an environment in somebody's checkout, it has none."""
    assert outcome.git_commit() == ""
    foreign("add", ".venv")
    foreign("commit", "--quiet", "--message", "now it is part of the checkout")
    commit = foreign("rev-parse", "HEAD").strip()
    assert outcome.git_commit() == commit
    Path(outcome.__file__).write_text("changed")
    assert outcome.git_commit() == f"{commit}+"
