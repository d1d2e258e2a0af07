from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny_runs import tiny

from ppo_lab.config import TrackingSection
from ppo_lab.embedded.build import folder_of_this_version
from ppo_lab.experiment import build
from ppo_lab.record import JsonLines, read_json_lines
from ppo_lab.tracking import Composite, open_trackers
from ppo_lab.types import Sample
from ppo_lab.wandb_mirror import (
    FINISH_TIMEOUT,
    INIT_TIMEOUT,
    TABLE_TIMEOUT,
    ClassicRun,
    WandbTracker,
    run_id,
    run_name,
    uploaded_config,
)

CONFIG = {
    "name": "tiny-embedded",
    "seed": 3,
    "model": {"name": "tiny", "path": "x"},
    "ppo": {"init_kl_coef": 0.1, "cliprange": 0.2},
}
SUMMARY = {
    "eval": {"last": {"mean_reward": 1.25, "kl": 3.5}},
    "objective": 1.2,
    "versions": {"torch": "2"},
}
SAMPLES = [Sample("How?", "Like\x00 this \ud800", 1.0, "No", -1.0)]


@pytest.fixture(scope="session")
def fake_wandb(assets: Path) -> ModuleType:
    file = assets.parent / "wandb" / "fake_wandb_server.py"
    if not file.exists():
        pytest.skip(f"needs the stand-in for a W&B server at {file}")
    spec = importlib.util.spec_from_file_location("fake_wandb_server", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def logged_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nobody is logged in; the user's own W&B files are out of reach."""
    wandb = pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    wandb.teardown()  # a session that another test began would keep its own settings
    yield tmp_path / "run"
    wandb.teardown()


@pytest.fixture
def server(fake_wandb: ModuleType, logged_out: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """A W&B server on this machine at which the user is logged in."""
    with fake_wandb.FakeWandbServer(api_key="0" * 40) as running:
        for name, value in running.client_env().items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("WANDB_MODE")
        yield running
        assert not running.fake.errors
        assert not running.fake.unknown


def train(
    folder: Path,
    steps: Iterable[int],
    *,
    status: str = "finished",
    config: dict = CONFIG,
    overrides: tuple[str, ...] = (),
    resume_step: int | None = None,
    pause: float = 0.0,
    reason: str = "",
    **section: Any,
) -> tuple[list[str], float, float]:
    """What was said, the longest time that one iteration's logging took and that of the end."""
    said: list[str] = []
    record = JsonLines(folder, resume_step=resume_step, say=said.append)
    resumed = resume_step is not None
    mirror = WandbTracker(
        TrackingSection(**section),
        folder,
        config,
        overrides=overrides,
        resumed=resumed,
        say=said.append,
    )
    both, longest = Composite([record, mirror], say=said.append), 0.0
    for step in steps:
        start = time.perf_counter()
        both.log({"kl": step / 10, "mean_reward": 1.0, "clip_fraction": 0.1}, step)
        both.log_samples(SAMPLES, step)
        longest = max(longest, time.perf_counter() - start)
        time.sleep(pause)
    start = time.perf_counter()
    both.finish(status, {**SUMMARY, "reason": reason} if reason else SUMMARY)
    return said, longest, time.perf_counter() - start


def only_run(server: Any) -> dict[str, Any]:
    [run] = server.recorded()["runs"].values()
    return run


def arrived(run: dict[str, Any]) -> list[int]:
    return [row["iteration"] for row in run["history"] if "kl" in row]


def test_online_every_row_the_config_and_the_summary_arrive(server, logged_out):
    """L-05."""
    overrides = ("ppo.init_kl_coef=0.1", "model=tiny", "seed=3")
    said, _, _ = train(
        logged_out, range(1, 41), pause=0.05, overrides=overrides, tags=["a"], notes="why"
    )
    run = only_run(server)
    assert said == [f"W&B: online, {server.url}/fake-entity/ppo_lab/runs/{run['id']}"]
    assert arrived(run) == list(range(1, 41))
    assert run["config"]["ppo"]["init_kl_coef"] == run["config"]["beta"] == 0.1
    assert run["config"]["epsilon"] == 0.2
    assert (run["name"], run["tags"], run["notes"]) == ("tiny-embedded-kl0.1-s3", ["a"], "why")
    assert (run["state"], run["exitcode"]) == ("finished", 0)
    summary = run["summary"]
    assert (summary["eval/last/mean_reward"], summary["objective"]) == (1.25, 1.2)
    assert (summary["kl"], summary["status"]) == (4.0, "finished")
    tables = [row["iteration"] for row in run["history"] if "samples" in row]
    assert 1 <= len(tables) <= 5
    assert tables[-1] == 40


def test_the_iteration_is_the_x_axis_of_every_metric(server, logged_out):
    train(logged_out, range(1, 3))
    metrics = only_run(server)["wandb_config"]["m"]
    [axis] = [i for i, metric in enumerate(metrics, 1) if metric.get("1") == "iteration"]
    [everything] = [metric for metric in metrics if metric.get("2") == "*"]
    assert everything["5"] == axis


@pytest.mark.parametrize(
    ("status", "state", "code"), [("failed", "failed", 1), ("preempted", "failed", 1)]
)
def test_a_run_that_did_not_finish_is_not_marked_finished(server, logged_out, status, state, code):
    train(logged_out, range(1, 3), status=status)
    run = only_run(server)
    assert (run["state"], run["exitcode"]) == (state, code)
    assert run["summary"]["status"] == status


def test_a_resumed_run_sends_what_the_server_lacks_and_nothing_twice(server, logged_out):
    train(logged_out, range(1, 11), status="preempted")
    record = JsonLines(logged_out, resume_step=10)
    for step in range(11, 16):  # seen by the disk, lost on the way to the server
        record.log({"kl": step / 10}, step)
    train(logged_out, range(14, 21), resume_step=13)
    run = only_run(server)
    assert arrived(run) == list(range(1, 21))
    assert [row["step"] for row in read_json_lines(logged_out / "metrics.jsonl")] == list(
        range(1, 21)
    )


def test_a_checkpoint_older_than_the_server_doubles_no_row(server, logged_out):
    train(logged_out, range(1, 11), status="preempted")
    train(logged_out, range(6, 16), resume_step=5)
    assert arrived(only_run(server)) == list(range(1, 16))


def test_x_never_goes_back_however_late_a_table_comes_and_no_row_comes_twice(
    server, logged_out, monkeypatch
):
    from ppo_lab import wandb_mirror

    send = wandb_mirror._send_table

    def late(run, *table):
        time.sleep(0.5)  # as a server that takes its time; rows go on meanwhile
        send(run, *table)

    monkeypatch.setattr(wandb_mirror, "_send_table", late)
    train(logged_out, range(1, 11), status="failed", pause=0.02, samples_every=1)
    assert only_run(server)["summary"]["iteration"] == 10
    train(logged_out, range(6, 16), resume_step=5, pause=0.02, samples_every=1)
    train(logged_out, range(15, 16), resume_step=14, samples_every=1)
    run = only_run(server)
    assert arrived(run) == list(range(1, 16))
    x = [row["iteration"] for row in run["history"]]
    assert x == sorted(x)
    assert [row["iteration"] for row in run["history"] if "samples" in row][-1] == 15


def test_a_run_that_went_on_after_a_failure_does_not_keep_its_reason(server, logged_out):
    train(logged_out, range(1, 3), status="failed", reason="RewardError: NaN")
    assert only_run(server)["summary"]["reason"] == "RewardError: NaN"
    train(logged_out, range(3, 5), resume_step=2)
    summary = only_run(server)["summary"]
    assert summary["status"] == "finished"
    assert not summary["reason"]


def test_a_run_whose_server_was_out_of_reach_at_first_goes_online_later(
    server, logged_out, monkeypatch
):
    import wandb

    from ppo_lab import wandb_mirror

    monkeypatch.setattr(wandb_mirror, "INIT_TIMEOUT", 1.0)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    said, _, _ = train(logged_out, range(1, 4), status="preempted")
    assert "the server cannot be had" in said[0]
    assert any((logged_out / "wandb").glob("run-*"))
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    wandb.teardown()  # as a new process would begin
    said, _, _ = train(logged_out, range(4, 7), resume_step=3)
    assert said[0].startswith("W&B: online")
    assert arrived(only_run(server)) == list(range(1, 7))


def test_a_run_that_was_killed_and_resumed_offline_is_uploaded_whole(server, logged_out):
    killed = (
        "import os, sys; from pathlib import Path; from test_tracking import train\n"
        "def steps():\n    yield from range(1, 11)\n    import time\n"
        "    until = time.monotonic() + 60\n"
        "    files = Path(sys.argv[1]) / 'wandb'\n"
        "    while not list(files.glob('offline-run-*/*.wandb')) and time.monotonic() < until:\n"
        "        time.sleep(0.1)\n"
        "    time.sleep(4)\n"
        "    os.kill(os.getpid(), 9)\n"
        "train(Path(sys.argv[1]), steps(), mode='offline')"
    )
    path = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1])))
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", killed, str(logged_out)]
    assert subprocess.run(command, env=environment, capture_output=True).returncode == -9
    record = JsonLines(logged_out, resume_step=10)
    for step in (11, 12):  # as the client loses what it was told last
        record.log({"kl": step / 10}, step)
    train(logged_out, range(13, 16), resume_step=12, mode="offline")
    said, _, _ = train(logged_out, range(14, 18), resume_step=13, mode="offline")
    _, _, parts = said[0].partition("upload: wandb sync ")
    assert len(parts.split()) == 3
    upload = [sys.executable, "-m", "wandb", "sync", *parts.split()]
    subprocess.run(upload, env=environment, check=True, capture_output=True)
    run = only_run(server)
    assert arrived(run) == list(range(1, 18))
    x = [row["iteration"] for row in run["history"]]
    assert x == sorted(x)


def test_what_an_online_part_has_sent_of_an_offline_one_is_not_sent_again(server, logged_out):
    train(logged_out, range(1, 4), status="preempted", mode="offline")
    train(logged_out, range(4, 7), resume_step=3)
    assert arrived(only_run(server)) == list(range(1, 7))
    sync = [sys.executable, "-m", "wandb", "sync", str(logged_out / "wandb")]
    done = subprocess.run(sync, check=True, capture_output=True, text=True, timeout=60)
    assert arrived(only_run(server)) == list(range(1, 7)), done.stderr
    assert only_run(server)["state"] == "finished"


@pytest.mark.parametrize(("patience", "said_first"), [("", "offline"), ("20", "online")])
def test_a_slow_server_is_waited_for_as_long_as_the_environment_says(
    server, logged_out, monkeypatch, patience, said_first
):
    from ppo_lab import wandb_mirror

    monkeypatch.setattr(wandb_mirror, "INIT_TIMEOUT", 0.5)
    if patience:
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", patience)
    server.control(
        {"fault": {"kind": "slow", "seconds": 60, "delay": 2.0, "match": "UpsertBucket"}}
    )
    said, _, _ = train(logged_out, range(1, 4))
    assert said[0].startswith(f"W&B: {said_first}")


def test_what_did_not_arrive_in_time_is_left_to_be_sent(server, logged_out, monkeypatch):
    from ppo_lab import wandb_mirror

    monkeypatch.setattr(wandb_mirror, "FINISH_TIMEOUT", 1.0)
    train(logged_out, range(1, 4), status="preempted", mode="offline")
    blocked = {"kind": "http", "status": 500, "seconds": 60, "match": "file_stream"}
    server.control({"fault": blocked})
    train(logged_out, range(4, 7), resume_step=3)
    assert not list((logged_out / "wandb").glob("*/*.synced"))


def test_what_did_not_arrive_in_time_goes_up_by_the_command_that_is_said(
    server, logged_out, monkeypatch
):
    from ppo_lab import wandb_mirror

    monkeypatch.setattr(wandb_mirror, "FINISH_TIMEOUT", 1.0)
    blocked = {"kind": "http", "status": 500, "seconds": 60, "match": "file_stream"}
    server.control({"fault": blocked})
    said, _, _ = train(logged_out, range(1, 7))
    assert not arrived(only_run(server))
    server.control({"clear_faults": True})
    command, _, _ = said[-1].partition("upload: ")[2].partition(" (")
    subprocess.run([sys.executable, "-m", *command.split()], check=True, capture_output=True)
    assert arrived(only_run(server)) == list(range(1, 7))
    assert only_run(server)["state"] == "finished"


def test_what_did_not_arrive_in_time_follows_when_the_run_is_resumed(
    server, logged_out, monkeypatch
):
    import wandb

    from ppo_lab import wandb_mirror

    blocked = {"kind": "http", "status": 500, "seconds": 60, "match": "file_stream"}
    server.control({"fault": blocked})
    with monkeypatch.context() as context:
        context.setattr(wandb_mirror, "FINISH_TIMEOUT", 1.0)
        said, _, _ = train(logged_out, range(1, 4), status="preempted")
    assert said[-1].endswith("the rest follows when the run is resumed")
    server.control({"clear_faults": True})
    wandb.teardown()  # as a new process would begin
    train(logged_out, range(4, 7), resume_step=3)
    assert arrived(only_run(server)) == list(range(1, 7))


@pytest.mark.parametrize("broken", ["_prepare", "_send_last"])
def test_a_mirror_that_breaks_leaves_no_open_run_to_the_next(
    server, logged_out, monkeypatch, tmp_path, broken
):
    def breaks(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as context:
        context.setattr(WandbTracker, broken, breaks)
        said, _, _ = train(logged_out, range(1, 3))
    assert "RuntimeError: a bug" in said[-1]
    train(tmp_path / "next", range(1, 4), config={**CONFIG, "seed": 7})
    runs = server.recorded()["runs"].values()
    assert [arrived(run) for run in runs if run["config"]["seed"] == 7] == [[1, 2, 3]]


@pytest.mark.parametrize(("stated", "found"), [("", "from-env"), ("mine", "mine")])
def test_the_project_is_the_environment_s_where_none_is_named(
    server, logged_out, monkeypatch, stated, found
):
    monkeypatch.setenv("WANDB_PROJECT", "from-env")
    assert TrackingSection().project == ""
    train(logged_out, range(1, 3), **({"project": stated} if stated else {}))
    assert only_run(server)["project"] == found


def test_a_new_run_takes_no_other_run_s_id(server, logged_out, tmp_path):
    train(logged_out, range(1, 4), id="mine")
    said, _, _ = train(tmp_path / "other", range(1, 6), id="mine")
    assert said[0].startswith("W&B: offline")
    assert arrived(only_run(server)) == [1, 2, 3]
    train(logged_out, range(4, 6), id="mine", resume_step=3)
    assert arrived(only_run(server)) == [1, 2, 3, 4, 5]


def test_a_new_run_takes_no_other_run_s_id_from_the_environment(
    server, logged_out, monkeypatch, tmp_path
):
    monkeypatch.setenv("WANDB_RUN_ID", "mine")  # as whoever runs `-m` with it has it
    train(logged_out, range(1, 4))
    said, _, _ = train(tmp_path / "other", range(1, 6), config={**CONFIG, "seed": 7})
    assert said[0].startswith("W&B: offline")
    assert (arrived(only_run(server)), only_run(server)["config"]["seed"]) == ([1, 2, 3], 3)
    train(logged_out, range(4, 6), resume_step=3)
    assert arrived(only_run(server)) == [1, 2, 3, 4, 5]


def test_a_name_of_ones_own_goes_before_all_others(server, logged_out, monkeypatch):
    """L-03."""
    monkeypatch.setenv("WANDB_NAME", "another")
    train(logged_out, range(1, 3), overrides=("ppo.init_kl_coef=0.1",), name="mine")
    assert only_run(server)["name"] == "mine"


def test_inside_a_sweep_the_agent_names_the_run_and_the_group_is_the_sweeps(
    server, logged_out, monkeypatch
):
    monkeypatch.setenv("WANDB_SWEEP_ID", "sw33p")
    monkeypatch.setenv("WANDB_RUN_ID", "byagent1")
    monkeypatch.setenv("WANDB_PROJECT", "sweeps")
    train(logged_out, range(1, 4), status="preempted")
    run = only_run(server)
    assert (run["id"], run["project"], run["group"]) == ("byagent1", "sweeps", "sweep-sw33p")
    assert (run["state"], run["exitcode"]) == ("finished", 0)
    assert (logged_out / "wandb_run_id").read_text() == "byagent1\n"


def test_a_run_of_a_sweep_that_goes_on_by_hand_stays_in_its_project(
    server, logged_out, monkeypatch
):
    import wandb

    with monkeypatch.context() as agent:
        agent.setenv("WANDB_SWEEP_ID", "sw33p")
        agent.setenv("WANDB_RUN_ID", "byagent2")
        agent.setenv("WANDB_PROJECT", "sweeps")
        train(logged_out, range(1, 4), status="preempted")
    wandb.teardown()  # as a new process would begin
    said, _, _ = train(logged_out, range(4, 6), resume_step=3)
    assert said[0].startswith("W&B: online")
    run = only_run(server)
    assert (run["project"], arrived(run)) == ("sweeps", [1, 2, 3, 4, 5])


def test_a_run_of_a_sweep_whose_scheduler_warned_it_is_to_be_handed_out_again(
    server, logged_out, monkeypatch
):
    marked = []
    monkeypatch.setattr("wandb.Run.mark_preempting", lambda run: marked.append(run.id))
    monkeypatch.setenv("WANDB_SWEEP_ID", "sw33p")
    monkeypatch.setenv("WANDB_RUN_ID", "byagent1")
    train(logged_out, range(1, 4), status="preempted", reason="Preempted: SIGTERM")
    assert (only_run(server)["exitcode"], marked) == (0, [])
    train(logged_out, range(4, 6), resume_step=3, status="preempted", reason="Preempted: SIGUSR2")
    assert (only_run(server)["exitcode"], marked) == (1, ["byagent1"])


def test_a_sweep_over_a_group_does_not_lose_the_groups_settings(server, logged_out, monkeypatch):
    import wandb

    real = wandb.init

    def init_in_a_sweep(**options):
        run = real(**options)
        run.config.update({"model": "tiny"}, allow_val_change=True)  # as the agent's values do
        return run

    monkeypatch.setattr(wandb, "init", init_in_a_sweep)
    train(logged_out, range(1, 3))
    config = only_run(server)["config"]
    assert (config["model"], config["model_cfg"]) == ("tiny", CONFIG["model"])


def test_a_hand_written_loop_logs_its_statistics_and_texts(server, logged_out):
    import torch
    import wandb

    stats = {"objective/kl": 1.5, "ppo/mean_scores": torch.tensor([2.0]), "dist": torch.ones(4)}
    try:
        run = ClassicRun("classic", "tiny", {"seed": 3}, {"tags": ["a"]})
        wandb.log({"before": 1})  # as a script does beside the trainer
        run.log(stats, ["query", "reward"], [["q1", 1.0], ["q2", 3.0]], 0)
    finally:
        wandb.finish()
    assert only_run(server)["name"] == "tiny"
    assert only_run(server)["config"]["seed"] == 3
    before, row = only_run(server)["history"]
    assert before["before"] == 1
    assert (row["objective/kl"], row["ppo/mean_scores"]) == (1.5, 2.0)
    assert row["game_log"]["nrows"] == 2
    assert row["dist"]["_type"] == "histogram"


def test_a_hand_written_loop_leaves_nothing_where_wandb_is_disabled(logged_out, monkeypatch):
    import wandb

    logged_out.mkdir()
    monkeypatch.chdir(logged_out)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    try:
        run = ClassicRun("classic", "tiny", {"seed": 3}, {})
        run.log({"objective/kl": 1.5, "dist": [1.0, 2.0]}, ["query", "reward"], [["q1", 1.0]], 0)
    finally:
        wandb.finish()
    assert not list(logged_out.iterdir())


def test_the_trained_adapter_goes_up_when_asked_for(server, logged_out):
    (logged_out / "model").mkdir(parents=True)
    (logged_out / "model" / "adapter_model.safetensors").write_bytes(b"weights")
    train(logged_out, range(1, 3), log_model=True)
    names = [str(artifact) for artifact in server.recorded()["artifacts"].values()]
    assert any("model-" in name for name in names), names


def test_nobody_logged_in_means_offline_in_one_line_without_a_question(logged_out, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question"))
    said, _, _ = train(logged_out, range(1, 6), mode="auto")
    assert len(said) == 1
    assert said[0].startswith("W&B: offline, since nobody is logged in; upload: wandb sync ")
    [run] = (logged_out / "wandb").glob("offline-run-*")
    assert list(run.glob("run-*.wandb"))
    assert list((logged_out / "wandb" / "artifacts" / "staging").iterdir())
    assert "WANDB_DATA_DIR" not in os.environ


def test_online_asked_for_without_a_key_is_offline(logged_out):
    said, _, _ = train(logged_out, range(1, 3), mode="online")
    assert said[0].startswith("W&B: offline, since nobody is logged in")


def test_wandb_mode_of_the_environment_is_respected(logged_out, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    said, _, _ = train(logged_out, range(1, 3))
    assert said == ["W&B: none, by WANDB_MODE=disabled"]
    monkeypatch.setenv("WANDB_MODE", "offline")
    said, _, _ = train(logged_out / "another", range(1, 3))
    assert said[0].startswith("W&B: offline, by WANDB_MODE=offline")


@pytest.mark.parametrize("key", ["1" * 40, "short"])
def test_a_wrong_key_means_offline_and_training_goes_on(server, logged_out, monkeypatch, key):
    monkeypatch.setenv("WANDB_API_KEY", key)
    said, _, _ = train(logged_out, range(1, 6))
    assert len(said) == 1
    assert said[0].startswith("W&B: offline, since the ")
    assert len(read_json_lines(logged_out / "metrics.jsonl")) == 5
    assert not server.recorded()["runs"]


@pytest.mark.slow
def test_a_server_that_cannot_be_reached_costs_training_nothing(logged_out, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    said, longest, end = train(logged_out, range(1, 6))
    assert longest < 1.0
    assert end < INIT_TIMEOUT + FINISH_TIMEOUT + 5
    assert len(said) == 1
    assert said[0].startswith("W&B: offline, since the server cannot be had")
    assert len(read_json_lines(logged_out / "metrics.jsonl")) == 5


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "http", "status": 500, "seconds": 6},
        {"kind": "drop", "seconds": 6},
        {"kind": "lose", "count": 1, "match": "file_stream"},
    ],
)
@pytest.mark.slow
def test_a_server_that_fails_for_a_while_gets_every_row_in_the_end(server, logged_out, fault):
    def break_down() -> None:
        server.control({"fault": fault})

    said, longest, _ = train_with(logged_out, break_down)
    run = only_run(server)
    assert longest < 1.0
    assert arrived(run) == list(range(1, 101))
    assert run["conflicting_lines"] == 0
    assert said[0].startswith("W&B: online")


@pytest.mark.parametrize("fault", ["gone", "hang"])
@pytest.mark.slow
def test_a_server_that_never_comes_back_holds_up_the_end_for_seconds_alone(
    server, logged_out, fault
):
    def break_down() -> None:
        server.control(
            {"down_seconds": 200}
            if fault == "gone"
            else {"fault": {"kind": "hang", "seconds": 200}}
        )

    _, longest, end = train_with(logged_out, break_down)
    assert longest < 1.0
    assert end < TABLE_TIMEOUT + FINISH_TIMEOUT + 3
    assert len(read_json_lines(logged_out / "metrics.jsonl")) == 100


def train_with(folder: Path, break_down: Any) -> tuple[list[str], float, float]:
    """A hundred iterations in about five seconds, the trouble beginning after the twentieth."""

    def steps() -> Iterator[int]:
        for step in range(1, 101):
            if step == 20:
                time.sleep(3.0)  # the run is known to the server by now
                break_down()
            yield step

    return train(folder, steps(), pause=0.05)


def test_a_tracker_that_fails_is_said_once_and_stops_no_other(tmp_path):
    class Broken:
        def log(self, *_):
            raise RuntimeError("no such thing")

        log_samples = finish = log

    said: list[str] = []
    trackers = Composite([Broken(), JsonLines(tmp_path)], say=said.append)
    trackers.log({"kl": 1.0}, 1)
    trackers.log_samples(SAMPLES, 1)
    trackers.finish("finished", {})
    assert said == ["Broken failed (RuntimeError: no such thing); training goes on"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "metrics.jsonl",
        "samples.jsonl",
        "summary.json",
    ]


def test_without_wandb_a_run_leaves_its_record_and_no_wandb_folder(tmp_path, capsys):
    trackers = open_trackers(TrackingSection(type="none"), tmp_path, CONFIG, total_steps=2)
    trackers.log({"kl": 1.0}, 1)
    trackers.finish("finished", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "summary.json"]
    assert "iteration 1/2  kl 1" in capsys.readouterr().out


def test_names_tell_runs_apart():
    overrides = [
        "model=tiny",
        "ppo.init_kl_coef=0.1",
        "+ppo.cliprange=0.2",
        "lora=r8",
        "ppo.steps=5",
        "tracking.mode=offline",
        "hydra.run.dir=x",
        "seed=4",
    ]
    assert run_name("a", overrides, seed=4) == "a-kl0.1-clip0.2-r8-steps5-s4"


def test_a_long_name_keeps_its_beginning_its_end_and_its_seed():
    overrides = [f"generation.setting_{i}=value_{i}" for i in range(20)]
    names = [run_name("tiny", overrides, seed=seed) for seed in (1, 22)]
    assert [len(name) for name in names] == [128, 128]
    assert names[0].startswith("tiny-setting_0value_0-")
    assert names[0].endswith("-setting_19value_19-s1")
    assert names[1].endswith("-setting_19value_19-s22")
    assert run_name("", [], seed=3) == "s3"


def test_no_secret_is_part_of_a_name(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "hush-hush-123")
    overrides = ["ppo.steps=5", "+reward.kwargs.api_key=hush-hush-123", "lora=r8"]
    assert run_name("a", overrides, seed=1) == "a-steps5-r8-s1"


def test_where_a_machine_keeps_the_embedded_policy_is_no_setting_of_a_run(
    monkeypatch, logged_out, tmp_path
):
    monkeypatch.setenv("PPO_LAB_CACHE", str(tmp_path / "cache"))
    config = tiny(tmp_path, model={"path": "embedded"}, tracking={"type": "wandb"})
    policy = folder_of_this_version() / "policy"
    policy.parent.mkdir(parents=True)
    (tmp_path / "model").rename(policy)
    lab = build(config, tmp_path / "run")
    lab.trackers.finish("failed", {})
    (wandb,) = [tracker for tracker in lab.trackers.trackers if isinstance(tracker, WandbTracker)]
    assert wandb.config["model"]["path"] == "embedded"


def test_the_config_goes_up_nested_with_its_aliases():
    config = {"ppo": {"init_kl_coef": 0.0, "cliprange": 0.3}, "seed": 1}
    assert uploaded_config(config) == {**config, "beta": 0.0, "epsilon": 0.3}
    assert uploaded_config({"seed": 1}) == {"seed": 1}


def test_the_run_id_is_made_once_and_the_agents_own_wins(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    first = run_id(tmp_path)
    assert run_id(tmp_path) == first != run_id(tmp_path / "another")
    assert run_id(tmp_path, "chosen") == "chosen"
    monkeypatch.setenv("WANDB_RUN_ID", "agents")
    assert run_id(tmp_path, "chosen") == "agents"


def test_tensorboard_mirrors_every_metric_and_hides_what_a_resumed_run_makes_again(
    tmp_path: Path,
) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra `tensorboard`")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from ppo_lab.tensorboard_mirror import TensorBoardTracker

    first = TensorBoardTracker(tmp_path)
    for step in (1, 2, 3):
        first.log({"kl": step / 2, "mean_reward": -1.0}, step)
    first.log_samples([Sample("a | b", "<b>`c`</b>", 0.5)], 3)
    first.finish("preempted", {})
    again = TensorBoardTracker(tmp_path, resume_step=2)
    again.log({"kl": 9.0, "mean_reward": -1.0}, 3)
    again.finish("finished", {})

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("kl")] == [(1, 0.5), (2, 1.0), (3, 9.0)]
    assert {"kl", "mean_reward"} <= set(events.Tags()["scalars"])


def test_tensorboard_has_a_finished_runs_settings_beside_its_outcome(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra `tensorboard`")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    from ppo_lab.tensorboard_mirror import TensorBoardTracker

    config = {
        "seed": 3,
        "ppo": {"init_kl_coef": 0.05, "adap_kl_ctrl": False, "lam": 0.9},
        "generation": {"stop_strings": ["#"]},
        "tracking": {"type": "tensorboard"},
    }
    summary = {"objective": 0.25, "eval": {"last": {"kl": 2.0, "gold": None}}, "train": {}}
    stopped = TensorBoardTracker(tmp_path / "stopped", config)
    stopped.finish("preempted", summary)
    words = ["generation.stop_strings=[#]", "tracking=tensorboard", "+ppo.adap_kl_ctrl=false"]
    tracker = TensorBoardTracker(tmp_path / "run", config, overrides=words)
    tracker.log({"kl": 1.5}, 1)
    tracker.finish("finished", summary)

    folder = tmp_path / "run" / "tensorboard"
    assert [path for path in folder.iterdir() if path.is_dir()] == [], "one run, not two"
    events = EventAccumulator(str(folder)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("kl")] == [(1, 1.5)]
    assert {tag: events.Scalars(tag)[0].value for tag in ("end/objective", "end/kl")} == {
        "end/objective": 0.25,
        "end/kl": 2.0,
    }
    begun = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    found = HParamsPluginData.FromString(begun).session_start_info.hparams
    assert found["ppo.init_kl_coef"].number_value == 0.05
    assert found["generation.stop_strings"].string_value == "['#']"
    assert set(found) == {
        *("seed", "ppo.init_kl_coef", "ppo.adap_kl_ctrl", "generation.stop_strings"),
    }
    events = EventAccumulator(str(tmp_path / "stopped" / "tensorboard")).Reload()
    with pytest.raises(KeyError):
        events.PluginTagToContent("hparams")


def test_a_text_that_utf_8_cannot_hold_is_spelt_out_in_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra `tensorboard`")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from ppo_lab.tensorboard_mirror import ClassicTensorBoard, TensorBoardTracker

    ClassicTensorBoard(tmp_path / "loop").log({"kl": 1.0}, ["query"], [["a \ud800 b"]], 1)
    tracker = TensorBoardTracker(tmp_path)
    tracker.log_samples(SAMPLES, 1)
    tracker.finish("finished", {})
    for folder, tag in (("tensorboard", "samples"), ("loop", "game_log")):
        events = EventAccumulator(str(tmp_path / folder)).Reload()
        (text,) = events.Tensors(f"{tag}/text_summary")
        assert b"\\ud800" in text.tensor_proto.string_val[0]
