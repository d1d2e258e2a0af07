"""What became of a run, and a sweep's index: right whoever writes and whatever is torn or lost."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import yaml
from made_up_runs import make_run
from scale.thousand_runs import measured

from ppo_lab import sweep_index
from ppo_lab.compare.runs import read_runs
from ppo_lab.errors import ConfigError
from ppo_lab.folders import claimed
from ppo_lab.run_lock import LOCK, alone_in, early_lock, in_use, owner, take_early
from ppo_lab.run_state import (
    RunState,
    fate,
    last_step,
    read_state,
    settings,
    subfolders,
    work_in,
)
from ppo_lab.runs import main
from ppo_lab.sweep_index import INDEX, append, indexed, plan, read, states, sweep_of

ROOT = Path(__file__).resolve().parents[1]
HOLDER = """
import sys, time
from pathlib import Path
from ppo_lab.run_lock import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def begun(folder: Path, *overrides: str) -> Path:
    """A run that has logged two iterations, and nothing of how it ended."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text("seed: 0\n")
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "kl": 0.')
    return folder


def ended(folder: Path, *overrides: str, **summary: object) -> Path:
    """A run that has left its summary."""
    begun(folder, *overrides)
    found = {"status": "finished", "objective": 1.0, "steps": 2, **summary}
    (folder / "summary.json").write_text(json.dumps(found))
    return folder


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process that trains in this folder."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def of_another_machine(folder: Path) -> None:
    """Have the lock's file say that somebody elsewhere held it last."""
    (folder / LOCK).write_text(json.dumps({**owner(folder), "machine": "another"}))


# ---- Folders


def _claim(folder: Path) -> str:
    return claimed(folder).name


def test_however_many_want_a_folder_of_one_name_each_has_its_own(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4, mp_context=get_context("fork")) as pool:
        names = list(pool.map(_claim, [tmp_path / "d" / "12-00-00-000001"] * 40))
    assert len(set(names)) == 40
    assert {"12-00-00-000001", "12-00-00-000001-2", "12-00-00-000001-40"} <= set(names)


def test_a_stage_before_ppo_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in (tmp_path / "a-stage", tmp_path / "sweep" / "0"):
        (stage / ".hydra").mkdir(parents=True)
        (stage / ".hydra" / "config.yaml").write_text("seed: 0\nfit:\n  epochs: 1\n")
        (stage / "model").mkdir()
    (tmp_path / "sweep" / "multirun.yaml").write_text("hydra: {}\n")
    assert main([str(tmp_path)]) == 1
    assert [run.path for run in read_runs([str(tmp_path)])] == [str(tmp_path)]  # nothing in it
    ended(tmp_path / "run")
    assert main([str(tmp_path)]) == 0
    assert ": 1 run: 1 finished" in capsys.readouterr().out
    assert [run.name for run in read_runs([str(tmp_path)])] == ["run"]


# ---- Locks


def test_a_run_at_work_is_running_and_one_that_was_killed_has_crashed(tmp_path: Path) -> None:
    run = begun(tmp_path / "0")
    process = holder(run)
    assert in_use(run)
    assert owner(run)["pid"] == process.pid
    assert fate(run, {})[0] == "running"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert in_use(run) is False
    status, why = fate(run, {})
    assert status == "crashed"
    assert "its process is gone" in why


def test_a_lock_that_was_taken_early_is_the_runs_and_goes_with_it(tmp_path: Path) -> None:
    take_early(tmp_path)
    take_early(tmp_path)
    assert in_use(tmp_path)
    with alone_in(tmp_path):
        assert in_use(tmp_path)
        with pytest.raises(ConfigError, match="another process"):
            take_early(tmp_path)
    assert in_use(tmp_path) is False


def test_a_lock_that_was_taken_early_is_let_go_where_no_run_begins(tmp_path: Path) -> None:
    with early_lock(tmp_path):
        assert in_use(tmp_path)
    assert in_use(tmp_path) is False
    with alone_in(tmp_path), early_lock(tmp_path):
        pass  # whoever cannot have it is told so when the run is to begin
    assert owner(tmp_path)["pid"] == os.getpid()


def test_of_a_run_on_another_machine_the_age_of_its_files_tells(tmp_path: Path) -> None:
    run = begun(tmp_path / "0")
    with alone_in(run):
        pass
    assert in_use(run) is False
    of_another_machine(run)
    assert in_use(run) is None
    assert fate(run, {})[0] == "running"
    for file in (run / "metrics.jsonl", run / ".hydra" / "config.yaml"):
        os.utime(file, (time.time() - 1000, time.time() - 1000))
    assert fate(run, {}) == (
        "crashed",
        "no summary.json, and nothing written for 17 min",
    )


@pytest.mark.parametrize("older", ["metrics.jsonl", ".hydra/config.yaml"])
def test_what_was_written_last_tells_the_age_of_a_run_on_another_machine(
    older: str, tmp_path: Path
) -> None:
    """Its lines, or what Hydra wrote when it was begun once more; clocks may be ahead of ours."""
    run = begun(tmp_path / "0")
    os.utime(run / older, (0, 0))
    assert fate(run, {}) == ("running", "last written 0 s ago")
    for file in (run / "metrics.jsonl", run / ".hydra" / "config.yaml"):
        os.utime(file, (time.time() + 500, time.time() + 500))
    assert fate(run, {}) == ("running", "last written 0 s ago")
    (run / "metrics.jsonl").unlink()
    (run / ".hydra" / "config.yaml").unlink()
    assert fate(run, {}) == ("empty", "nothing was written")


def test_a_run_that_goes_on_is_running_whatever_its_old_summary_says(tmp_path: Path) -> None:
    run = ended(tmp_path / "0", status="preempted")
    with alone_in(run):
        assert read_state(run, "0").status == "running"
    assert read_state(run, "0").status == "preempted"


def test_asking_who_trains_in_a_folder_keeps_nobody_from_training(tmp_path: Path) -> None:
    with (tmp_path / LOCK).open("w") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        threading.Timer(0.2, lambda: fcntl.flock(asking, fcntl.LOCK_UN)).start()
        with alone_in(tmp_path):
            assert in_use(tmp_path)
    assert owner(tmp_path)["pid"] == os.getpid()


def test_a_summary_that_cannot_be_read_is_told_and_the_last_whole_line_counts(
    tmp_path: Path,
) -> None:
    run = ended(tmp_path / "0")
    (run / "summary.json").write_text('{"status": "fini')
    state = read_state(run, "0")
    assert (state.status, state.reason) == ("broken", "summary.json cannot be read")
    assert last_step(run) == 2


def test_work_is_whatever_a_run_has_left_or_a_summary_that_counts_steps(tmp_path: Path) -> None:
    summary = tmp_path / "summary.json"
    assert work_in(tmp_path) == []
    for text, found in (
        ('{"status": "failed"}', []),  # of a run that was refused
        ('{"status": "failed", "steps": 0}', ["summary.json"]),
        ('{"status": "fini', ["summary.json"]),
        ("[]", ["summary.json"]),
        ("", ["summary.json"]),
    ):
        summary.write_text(text)
        assert work_in(tmp_path) == found, text
    summary.unlink()
    (tmp_path / "model").symlink_to(tmp_path / "gone")
    assert work_in(tmp_path) == ["model"]


def test_folders_below_are_listed_by_number_without_links_and_hidden_ones(tmp_path: Path) -> None:
    for name in ("10", "9", "b", ".hydra"):
        (tmp_path / name).mkdir()
    (tmp_path / "1").symlink_to(tmp_path / "9")
    (tmp_path / "2").write_text("")
    assert [folder.name for folder in subfolders(tmp_path)] == ["b", "9", "10"]
    assert subfolders(tmp_path / "gone") == []


# ---- The index


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep of four runs: one finished, one failed, one killed, one not begun."""
    (tmp_path / "multirun.yaml").write_text("hydra: {}")
    plan(tmp_path, [["a=1", f"seed={n}"] for n in range(4)])
    with indexed(ended(tmp_path / "0", "a=1", "seed=0", objective=0.5)):
        pass
    with indexed(ended(tmp_path / "1", "a=1", "seed=1", status="failed", reason="NaN")):
        pass
    begun(tmp_path / "2", "a=1", "seed=2")
    with indexed(tmp_path / "2"), alone_in(tmp_path / "2"):
        pass
    return tmp_path


FATES = {"0": "finished", "1": "failed", "2": "crashed", "3": "missing"}


def fates(sweep: Path) -> dict[str, str]:
    return {state.run: state.status for state in states(sweep)}


def test_a_sweep_tells_what_became_of_each_run_and_which_are_missing(sweep: Path) -> None:
    assert fates(sweep) == FATES
    found = {state.run: state for state in states(sweep)}
    assert (found["0"].objective, found["0"].steps) == (0.5, 2)
    assert found["1"].reason == "NaN"
    assert found["3"].overrides == ("a=1", "seed=3")


def test_of_two_runs_of_the_same_settings_one_folder_makes_one(tmp_path: Path) -> None:
    plan(tmp_path, [["seed=0"], ["seed=0"]])
    ended(tmp_path / "0", "seed=0")
    assert fates(tmp_path) == {"0": "finished", "1": "missing"}


def test_what_the_index_has_is_not_read_again_from_the_folders(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states(sweep)
    asked = []
    monkeypatch.setattr(sweep_index, "read_state", lambda *a: asked.append(a) or read_state(*a))
    assert fates(sweep) == FATES
    assert [folder.name for folder, *_ in asked] == ["2"]  # a run without a summary is looked at


def test_an_index_that_is_gone_is_made_again_but_for_the_plan(sweep: Path) -> None:
    (sweep / INDEX).unlink()
    assert fates(sweep) == {run: FATES[run] for run in "012"}
    assert set(read(sweep)[0]) == {"0", "1"}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace(b'"failed"', b'"finished"'),
        lambda text: text.replace(b'"objective": 0.5', b'"objective": 9.5'),
        lambda text: text + b'{"run": "1", "status": "finished", "overrides": [], "mark": []}\n',
        lambda text: text + b"[1]\nnull\n\xff\n{}\n",
        lambda text: text.replace(b"\n", b""),
    ],
)
def test_lines_that_are_torn_or_changed_are_not_believed(sweep: Path, spoil) -> None:
    (sweep / INDEX).write_bytes(spoil((sweep / INDEX).read_bytes()))
    found = {state.run: state for state in states(sweep)}
    assert {run: found[run].status for run in "012"} == {run: FATES[run] for run in "012"}
    assert found["0"].objective == 0.5


def test_a_folder_that_says_otherwise_is_believed_and_the_index_put_right(sweep: Path) -> None:
    states(sweep)
    (sweep / "1" / "summary.json").write_text('{"status": "finished", "objective": 3.0}')
    (sweep / "0" / "summary.json").unlink()
    found = {state.run: state for state in states(sweep)}
    assert (found["1"].status, found["1"].objective) == ("finished", 3.0)
    assert found["0"].status == "running"  # its files are young, and nobody ever held its lock
    assert read(sweep)[0]["1"].status == "finished"


def test_a_run_seen_as_it_goes_on_and_killed_before_it_logs_is_not_running(tmp_path: Path) -> None:
    (tmp_path / "multirun.yaml").write_text("hydra: {}")
    folder = ended(tmp_path / "0", "seed=0", status="failed", reason="NaN")
    append(tmp_path, [RunState("0", "running", ("seed=0",))])
    with holder(folder) as process:  # whose summary is still that of before
        assert fates(tmp_path) == {"0": "running"}
        process.kill()
    assert fates(tmp_path) == {"0": "failed"}


def test_after_a_torn_line_the_next_one_is_whole(tmp_path: Path) -> None:
    append(tmp_path, [RunState("0", "finished")])
    with (tmp_path / INDEX).open("ab") as file:
        file.write(b'{"run": "1", "sta')
    append(tmp_path, [RunState("2", "failed")])
    assert set(read(tmp_path)[0]) == {"0", "2"}


def _write_many(sweep: Path, writer: int) -> None:
    for number in range(50):
        append(sweep, [RunState(f"{writer}-{number}", "finished", ("x=1",) * 100)])


def test_many_writers_lose_and_tear_no_line(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4, mp_context=get_context("fork")) as pool:
        list(pool.map(_write_many, [tmp_path] * 8, range(8)))
    assert len(read(tmp_path)[0]) == 400
    assert (tmp_path / INDEX).read_bytes().count(b"\n") == 400


def test_a_run_outside_of_a_sweep_writes_no_index(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text("a user's own file\n")
    with indexed(ended(tmp_path / "run")):
        pass
    assert (tmp_path / INDEX).read_text() == "a user's own file\n"


def test_a_run_belongs_to_the_sweep_that_is_three_folders_up_at_most(tmp_path: Path) -> None:
    (tmp_path / "multirun.yaml").write_text("hydra: {}")
    deep = tmp_path / "beta=0.1/epsilon=0.2/seed=0"
    assert sweep_of(tmp_path / "0") == sweep_of(deep) == tmp_path
    assert sweep_of(deep / "outputs") is None


def test_runs_of_an_agent_of_wandb_are_in_the_index_of_their_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    with indexed(ended(tmp_path / "sweep1" / "run1", "seed=3")):
        assert read(tmp_path / "sweep1")[0]["run1"].status == "running"
    assert fates(tmp_path / "sweep1") == {"run1": "finished"}


def test_settings_are_the_same_in_any_order_and_hydras_own_do_not_count() -> None:
    assert settings(["seed=0", "resume=true", "hydra.sweep.subdir=3", "a=1", "-m"]) == (
        "a=1",
        "seed=0",
    )


# ---- The listing


def test_the_listing_tells_counts_objectives_settings_and_reasons(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(sweep)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0].endswith("4 runs: 1 finished, 1 failed, 1 crashed, 1 missing")
    assert lines[1:4] == [
        "highest objective: 0.5, run 0",
        "all with: a=1",
        "run status objective steps settings why",
    ]
    assert lines[4] == "0 finished 0.5 2 seed=0"
    assert lines[5] == "1 failed 1 2 seed=1 NaN"
    assert lines[6].startswith("2 crashed 2 seed=2 its process is gone")
    assert lines[7] == "3 missing seed=3 not begun"


def test_runs_are_listed_by_number_and_the_highest_objective_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "multirun.yaml").write_text("hydra: {}")
    for number, objective in ((10, -1.0), (9, 2.5), (2, 0.5)):
        ended(tmp_path / str(number), f"seed={number}", objective=objective)
    main([str(tmp_path)])
    said = capsys.readouterr().out
    assert "highest objective: 2.5, run 9\n" in said
    rows = [line.split()[0] for line in said.splitlines() if "seed=" in line]
    assert rows == ["2", "9", "10"]
    main([str(tmp_path / "9")])
    assert "highest" not in capsys.readouterr().out


def test_a_search_before_its_first_run_is_listed_beside_the_others(
    sweep: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path_factory.mktemp("search")
    plan(empty, [])
    assert main([str(empty), str(sweep)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("search0: no run has begun")
    assert said[2].endswith("1 finished, 1 failed, 1 crashed, 1 missing")
    assert main(["--json", str(empty)]) == 0
    assert capsys.readouterr().out == ""


def test_the_listing_can_be_narrowed_and_read_by_programs(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(sweep), "--json", "--status", "failed,missing"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["run"], row["status"]) for row in rows] == [("1", "failed"), ("3", "missing")]
    assert rows[0]["path"] == str(sweep / "1")
    with pytest.raises(SystemExit):
        main([str(sweep), "--status", "finnished"])
    assert "no such status" in capsys.readouterr().err


def test_sweeps_and_single_runs_are_found_below_a_folder(
    sweep: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    top = tmp_path_factory.mktemp("outputs")
    sweep.rename(top / "swept")
    make_run(top / "2026-01-02" / "10-00-00", steps=5)
    assert main([str(top)]) == 0
    said = capsys.readouterr().out
    assert "2026-01-02: 1 run: 1 finished" in said
    assert "swept: 4 runs" in said
    assert not (top / "2026-01-02" / INDEX).exists()
    assert main([str(top / "nowhere")]) == 1


# ---- A thousand


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_runs_are_listed_compared_and_gone_on_with_in_seconds(tmp_path: Path) -> None:
    found = measured(tmp_path, 1000)  # of the processor: the clock's depend on who else works
    assert found["listing, the index gone"].cpu < 2
    assert found["listing, by the index"].cpu < 2
    assert found["compare"].cpu < 60
    assert found["resume=true, nothing is missing"].cpu < 10
    assert found["resume=true, one run is missing"].cpu < 30
    assert "Launching 1 jobs" in found["resume=true, one run is missing"].said
