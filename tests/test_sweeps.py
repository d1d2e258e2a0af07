"""Sweeps: files that W&B's agent turns into commands that run, and Hydra's own multirun."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import several
import yaml
from tiny_runs import inputs, outcome

from ppo_lab.command_line import command_problems
from ppo_lab.compare.runs import read_runs
from ppo_lab.config import Config, register_schema
from ppo_lab.errors import ConfigError
from ppo_lab.multirun import (
    Sweep,
    resumed_sweep,
    what_is_missing,
    with_search_defaults,
)
from ppo_lab.rules import problems
from ppo_lab.run_lock import owner
from ppo_lab.run_state import read_summary
from ppo_lab.sweep_index import INDEX, states

ROOT = Path(__file__).resolve().parents[1]
SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))
AWAY = "the scorer is away"


def score(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """A reward that does, once, what a file says: fails, or kills the run at its n-th call."""
    fuse = Path(os.environ.get("PPO_LAB_TEST_FUSE", "/nowhere"))
    if fuse.exists():
        what, _, left = fuse.read_text().partition(" ")
        fuse.unlink()
        if what != "kill":
            raise ValueError(AWAY)
        if int(left) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        fuse.write_text(f"kill {int(left) - 1}")
    return [float(len(set(text))) for text in completions]


def seen(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """A reward that notes which GPU this process may use, and when."""
    notes = Path(os.environ["PPO_LAB_TEST_NOTES"])
    row = {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "pid": os.getpid(), "at": time.time()}
    with (notes / f"{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    return [float(len(set(text))) for text in completions]


def tiny(folder: Path, reward: str = "length") -> list[str]:
    """Overrides that make any run one of seconds."""
    model, data = inputs(folder / "in")
    function = "seen" if reward == "seen" else "score"
    target = ["reward=function", f"reward.target=test_sweeps:{function}"]
    return [
        *("model=local", f"model.path={model}", "model.weights=random", "lora=none", "device=cpu"),
        *("data=file", f"data.path={data}", "data.held_out=4", "ppo.steps=2", "ppo.batch_size=4"),
        *("ppo.mini_batch_size=4", "generation.max_new_tokens=6", "evaluation.prompts=2"),
        *([f"reward={reward}"] if reward == "length" else target),
    ]


def environment(home: Path, **more: str) -> dict[str, str]:
    """This process's environment without W&B's variables; the checkout is on the path."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    own["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    own["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), own["PATH"]])
    return {**own, "HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def ppo_lab(
    folder: Path, *overrides: str, module: str = "ppo_lab", **more: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *overrides],
        cwd=folder,
        env=environment(folder, **more),
        capture_output=True,
        text=True,
        timeout=280,
    )


# ---- W&B's sweep files ---------------------------------------------------------------------------


def settings(sweep: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The values of each run that a grid asks for; of a search, its corners."""
    choices = {
        name: parameter.get("values") or [parameter["min"], parameter["max"]]
        for name, parameter in sweep["parameters"].items()
    }
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def command_of(sweep: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """The command line that W&B's agent runs for these values, by the agent's own code."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    told = {"args": {name: {"value": value} for name, value in values.items()}}
    macros = create_sweep_command_args(told) | {"env": ["/usr/bin/env"]}
    pieces = create_sweep_command(list(sweep["command"]))
    return [
        word
        for piece in pieces
        for word in (macros[piece[2:-1]] if piece.startswith("${") else [piece])
    ]


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_every_command_of_a_sweep_file_is_one_that_runs(file: Path) -> None:
    register_schema()
    sweep = yaml.safe_load(file.read_text())
    runs = list(settings(sweep))
    assert len(runs) >= 8
    for values in runs:
        assert all(isinstance(value, int | float) for value in values.values())  # 1e-5 is a text
        start, overrides = command_of(sweep, values)[:4], command_of(sweep, values)[4:]
        assert start == ["/usr/bin/env", "python", "-m", "ppo_lab"]
        assert [f"{name}={value}" for name, value in values.items()] == overrides[: len(values)]
    corners = [runs[0], runs[-1]]
    found = [command_problems(command_of(sweep, v)[4:], check=problems) for v in corners]
    assert found == [[], []]


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_a_sweep_maximises_what_its_runs_are_asked_for(file: Path) -> None:
    sweep = yaml.safe_load(file.read_text())
    assert sweep["metric"]["goal"] == "maximize"
    assert f"objective={sweep['metric']['name']}" in sweep["command"]
    swept_beta = "ppo.init_kl_coef" in sweep["parameters"]
    assert sweep["metric"]["name"] == ("eval/gold" if swept_beta else "eval/objective")
    assert {"project", "name", "program"} <= set(sweep)


def test_the_sweeps_that_were_promised_are_there() -> None:
    swept = {f.stem: set(yaml.safe_load(f.read_text())["parameters"]) for f in SWEEPS}
    beta, epsilon = "ppo.init_kl_coef", "ppo.cliprange"
    assert swept["kl"] >= {beta}
    assert swept["clip"] >= {epsilon}
    assert swept["kl_clip"] >= {beta, epsilon, "seed"}
    assert swept["bayes"] == {beta, epsilon, "ppo.learning_rate"}


def test_a_command_of_a_sweep_file_runs(tmp_path: Path) -> None:
    sweep = yaml.safe_load((ROOT / "sweeps" / "clip.yaml").read_text())
    overrides = command_of(sweep, next(settings(sweep)))[4:]
    run = {"WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": "run1", "WANDB_MODE": "disabled"}
    done = ppo_lab(tmp_path, *overrides, *tiny(tmp_path), **run)
    assert done.returncode == 0, done.stderr
    (found,) = read_runs([str(tmp_path / "outputs" / "sweep1")])
    assert (found.name, found.status) == ("run1", "finished")
    assert found.config["ppo.cliprange"] == 0.05
    assert math.isfinite(found.summary["objective"])
    assert found.summary["objective"] == pytest.approx(found.history["eval/objective"][-1])


def test_a_run_that_wandbs_agent_starts_again_goes_on_and_with_other_settings_is_refused(
    tmp_path: Path,
) -> None:
    fixed = [*tiny(tmp_path, "function"), "checkpoint.every=1", "ppo.steps=4"]
    agents = {"WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": "run1", "WANDB_MODE": "offline"}
    (tmp_path / "fuse").write_text("kill 5")  # two calls come before the first iteration
    killed = ppo_lab(tmp_path, *fixed, **agents, PPO_LAB_TEST_FUSE=str(tmp_path / "fuse"))
    assert killed.returncode == -signal.SIGKILL
    (state,) = states(tmp_path / "outputs" / "sweep1")
    assert (state.run, state.status, state.steps) == ("run1", "crashed", 2)
    other = ppo_lab(tmp_path, *fixed, "ppo.learning_rate=0.5", **agents)
    assert other.returncode == 1
    assert "ppo.learning_rate=0.5: the run has ppo.learning_rate=" in other.stderr
    again = ppo_lab(tmp_path, *fixed, **agents)
    assert again.returncode == 0, again.stderr
    straight = ppo_lab(tmp_path, *fixed, "tracking=none", "hydra.run.dir=straight")
    assert straight.returncode == 0, straight.stderr
    assert outcome(tmp_path / "outputs" / "sweep1" / "run1") == outcome(tmp_path / "straight")


@pytest.fixture
def server(assets: Path) -> Iterator[Any]:
    """A stand-in for W&B's server on this machine."""
    file = assets.parent / "wandb" / "fake_wandb_server.py"
    if not file.exists():
        pytest.skip(f"needs the stand-in for a W&B server at {file}")
    module = loaded(file)
    with module.FakeWandbServer(api_key="0" * 40) as running:
        yield running
        assert not running.fake.errors
        assert not running.fake.unknown


def loaded(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec
    assert spec.loader
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_wandbs_own_clients_run_a_sweep_and_its_histories_arrive(
    server: Any, tmp_path: Path
) -> None:
    if shutil.which("wandb", path=environment(tmp_path)["PATH"]) is None:
        pytest.skip("needs the wandb command")
    env = environment(tmp_path, **server.client_env(home=str(tmp_path)))
    sweep = yaml.safe_load((ROOT / "sweeps" / "clip.yaml").read_text())
    sweep["parameters"] = {"ppo.cliprange": {"values": [0.1, 0.2]}, "seed": {"values": [0]}}
    sweep["command"] += tiny(tmp_path)
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    options: dict[str, Any] = {"cwd": tmp_path, "env": env, "timeout": 500, "check": True}
    subprocess.run(["wandb", "sweep", "sweep.yaml"], **options)
    ((sweep_id, _),) = server.recorded()["sweeps"].items()
    where = f"fake-entity/ppo_lab/{sweep_id}"
    subprocess.run(["wandb", "agent", where], **options)
    runs = server.recorded()["runs"]
    assert sorted(run["config"]["ppo"]["cliprange"] for run in runs.values()) == [0.1, 0.2]
    for run in runs.values():
        assert {"kl", "mean_reward", "clip_fraction", "eval/objective"} <= set(run["history_keys"])
        assert (run["state"], run["group"]) == ("finished", f"sweep-{sweep_id}")
        assert set(run["tags"]) == {"sweep", "clip"}
        assert "clip0." in run["name"]
    assert {f.name for f in (tmp_path / "outputs" / sweep_id).iterdir()} == {*runs, INDEX}
    told = subprocess.run(
        [sys.executable, "-m", "ppo_lab.compare", "--wandb", where, "--output", "compared"],
        **options,
        capture_output=True,
        text=True,
    ).stdout
    assert "cliprange" in told
    assert (tmp_path / "compared" / "compare.html").exists()
    table = (tmp_path / "compared" / "compare.csv").read_text().splitlines()
    assert len(table) == 3
    assert table[0].startswith("run,path,status,reason,group,seed,steps,ppo.cliprange,objective")
    assert all(",finished," in row and ",2,0." in row for row in table[1:])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_several_agents_share_a_sweep_and_each_keeps_to_its_gpu(
    server: Any, tmp_path: Path
) -> None:
    if shutil.which("wandb", path=environment(tmp_path)["PATH"]) is None:
        pytest.skip("needs the wandb command")
    (tmp_path / "notes").mkdir()
    notes = {"PPO_LAB_TEST_NOTES": str(tmp_path / "notes")}
    env = environment(tmp_path, **server.client_env(home=str(tmp_path)), **notes)
    sweep = yaml.safe_load((ROOT / "sweeps" / "clip.yaml").read_text())
    sweep["parameters"] = {"seed": {"values": [0, 1, 2, 3, 4]}}
    sweep["command"] += tiny(tmp_path, "seen")
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    options: dict[str, Any] = {"cwd": tmp_path, "timeout": 500, "check": True}
    subprocess.run(["wandb", "sweep", "sweep.yaml"], env=env, **options)
    ((sweep_id, _),) = server.recorded()["sweeps"].items()
    command = ["wandb", "agent", f"fake-entity/ppo_lab/{sweep_id}"]
    agents = [
        subprocess.Popen(command, cwd=tmp_path, env={**env, "CUDA_VISIBLE_DEVICES": gpu})
        for gpu in ("3", "5", "5")  # two of them on one GPU
    ]
    assert [agent.wait(timeout=600) for agent in agents] == [0, 0, 0]
    runs = server.recorded()["runs"]
    found = states(tmp_path / "outputs" / sweep_id)
    assert {(state.run, state.status) for state in found} == {(run, "finished") for run in runs}
    assert sorted(run["config"]["seed"] for run in runs.values()) == [0, 1, 2, 3, 4]
    rows = [file.read_text().splitlines() for file in (tmp_path / "notes").iterdir()]
    gpus = [{json.loads(line)["gpu"] for line in lines} for lines in rows]
    assert len(gpus) == 5
    assert all(used in ({"3"}, {"5"}) for used in gpus)
    assert {"3"} in gpus
    assert {"5"} in gpus


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_was_preempted_is_finished_by_the_next_agent(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("wandb", path=environment(tmp_path)["PATH"]) is None:
        pytest.skip("needs the wandb command")
    env = environment(tmp_path, **server.client_env(home=str(tmp_path)))
    sweep = yaml.safe_load((ROOT / "sweeps" / "clip.yaml").read_text())
    sweep["parameters"] = {"seed": {"values": [0]}}
    fixed = [*tiny(tmp_path), "ppo.steps=60", "checkpoint.every=1000"]
    sweep["command"] += fixed
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    options: dict[str, Any] = {"cwd": tmp_path, "env": env}
    subprocess.run(["wandb", "sweep", "sweep.yaml"], **options, check=True)
    ((sweep_id, _),) = server.recorded()["sweeps"].items()
    handed_out: list[dict[str, Any]] = []
    next_run = server.fake._next_run

    def queued_first(*asked: Any) -> dict[str, Any] | None:
        """As W&B's own server: what was preempted comes before what was not begun."""
        if [run["exitcode"] for run in server.recorded()["runs"].values()] == [1]:
            handed_out.append({**handed_out[0], "type": "resume"})
        elif given := next_run(*asked):
            handed_out.append(given)
        else:
            return None
        return handed_out[-1]

    monkeypatch.setattr(server.fake, "_next_run", queued_first)
    command = ["wandb", "agent", "--count", "1", f"fake-entity/ppo_lab/{sweep_id}"]
    agent = subprocess.Popen(command, **options)
    sweeps = tmp_path / "outputs" / sweep_id
    wait_for(lambda: any(file.read_bytes() for file in sweeps.glob("*/metrics.jsonl")))
    (run,) = (folder for folder in sweeps.iterdir() if folder.is_dir())
    os.kill(owner(run)["pid"], signal.SIGUSR1)
    assert agent.wait(timeout=300) == 0
    assert read_summary(run)["status"] == "preempted"
    assert subprocess.run(command, **options, timeout=500).returncode == 0
    assert [(told["type"], told["run_id"]) for told in handed_out] == [
        ("run", run.name),
        ("resume", run.name),
    ]
    (told,) = server.recorded()["runs"].values()
    assert (told["state"], told["exitcode"]) == ("finished", 0)
    assert [r["iteration"] for r in told["history"] if "kl" in r] == list(range(1, 61))
    own = ["seed=0", "objective=eval/objective", "evaluation.every=5", "tracking=none", *fixed]
    straight = ppo_lab(tmp_path, *own, "hydra.run.dir=straight")
    assert straight.returncode == 0, straight.stderr
    assert outcome(run) == outcome(tmp_path / "straight")


def test_the_saved_view_holds_the_three_metrics_and_the_frontier(
    server: Any, tmp_path: Path
) -> None:
    pytest.importorskip("wandb_workspaces")
    env = environment(tmp_path, **server.client_env(home=str(tmp_path)))
    command = [sys.executable, "-m", "ppo_lab.dashboard", "--entity", "fake-entity"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (view,) = server.recorded()["views"].values()
    for piece in ("kl", "mean_reward", "clip_fraction"):
        assert f'"metrics":["{piece}"]' in view["spec"]
    assert '"xAxis":"summary:eval/kl","yAxis":"summary:eval/mean_reward"' in view["spec"]
    assert "Parallel Coordinates Plot" in view["spec"]
    assert "ppo.value.init_kl_coef" in view["spec"]


# ---- Hydra's multirun ----------------------------------------------------------------------------


def recorded_sweep(folder: Path, *overrides: str) -> Path:
    """What Hydra leaves of a sweep by this command."""
    place = folder / "outputs" / "multirun" / "2026-01-02" / "03-04-05"
    place.mkdir(parents=True)
    record = {"hydra": {"overrides": {"task": list(overrides)}}}
    (place / "multirun.yaml").write_text(yaml.safe_dump(record))
    return place.relative_to(folder)


def test_the_same_command_finds_its_sweep_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = recorded_sweep(tmp_path, "seed=0,1", "ppo.steps=3")
    argv = ["-m", "ppo.steps=3", "seed=0,1", "resume=true"]
    assert resumed_sweep(argv) == [
        *argv,
        "hydra.output_subdir=null",
        f"hydra.sweep.dir={place}",
    ]
    with pytest.raises(ConfigError, match="holds no sweep by this command"):
        resumed_sweep(["-m", "seed=0,1,2", "ppo.steps=3", "resume=true"])


def test_a_sweep_of_another_configuration_is_not_the_same_command_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = recorded_sweep(tmp_path, "seed=0,1")
    file = place / "multirun.yaml"
    record = yaml.safe_load(file.read_text())
    record["hydra"]["job"] = {"config_name": "mine"}
    own = {"provider": "command-line", "path": str(tmp_path / "conf")}
    record["hydra"]["runtime"] = {"config_sources": [own]}
    file.write_text(yaml.safe_dump(record))
    flags = ["--config-name=mine", "--config-dir=conf"]
    command = ["-m", "seed=0,1", "resume=true"]
    assert resumed_sweep([*flags, *command])[-1] == f"hydra.sweep.dir={place}"
    for others in ([], flags[:1], ["--config-name=other", flags[1]]):
        with pytest.raises(ConfigError, match="holds no sweep by this command"):
            resumed_sweep([*others, *command])


def test_only_a_sweep_of_hydras_own_goes_on_by_resume_true() -> None:
    with pytest.raises(ConfigError, match="needs -m"):
        resumed_sweep(["resume=true"])
    with pytest.raises(ConfigError, match="storage"):
        resumed_sweep(["-m", "resume=true", "hydra/sweeper=optuna"])


def test_a_finished_run_is_passed_over_and_a_begun_one_goes_on(tmp_path: Path) -> None:
    config = Config(resume="true")
    new = what_is_missing(config, tmp_path)
    assert isinstance(new, Config)
    assert new.resume == ""
    (tmp_path / "metrics.jsonl").write_text("")
    begun = what_is_missing(config, tmp_path)
    assert isinstance(begun, Config)
    assert begun.resume == str(tmp_path)
    (tmp_path / "summary.json").write_text('{"status": "finished", "objective": 1.5}')
    assert what_is_missing(config, tmp_path) == 1.5


def test_a_finished_run_of_other_settings_does_not_count_for_one_that_is_missing(
    tmp_path: Path,
) -> None:
    """As where hydra.sweep.subdir leaves out what the sweep goes over."""
    folder = made_run(tmp_path / "swept" / "0.1")
    (folder / "summary.json").write_text('{"status": "finished", "objective": 1.5}')
    config = Config(resume="true")
    assert what_is_missing(config, folder, ["resume=True", "seed=7"]) == 1.5
    with pytest.raises(ConfigError, match=r"other settings \(seed=7\).*hydra.sweep.subdir"):
        what_is_missing(config, folder, ["seed=8", "resume=True"])


def test_a_run_that_failed_early_leaves_its_reason(tmp_path: Path) -> None:
    from hydra.core.utils import JobReturn, JobStatus
    from omegaconf import OmegaConf

    config = OmegaConf.create({"hydra": {"runtime": {"output_dir": str(tmp_path)}}})
    failed = JobReturn(status=JobStatus.FAILED)
    failed.return_value = ValueError("no such model")
    Sweep().on_job_end(config, failed)
    expected = {"status": "failed", "reason": "ValueError: no such model"}
    assert read_summary(tmp_path) == expected
    failed.return_value = ValueError("said later")
    Sweep().on_job_end(config, failed)
    assert read_summary(tmp_path) == expected


def test_a_search_maximises_and_goes_on_after_a_failure_unless_told_otherwise() -> None:
    assert with_search_defaults(["-m", "seed=0,1"]) == ["-m", "seed=0,1"]
    command = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.direction=minimize"]
    assert with_search_defaults(command) == [*command, "hydra.sweeper.max_failure_rate=1.0"]
    for direction in ("maximize", "minimize"):
        _, chosen, _ = with_search_defaults(["hydra/sweeper=optuna"], direction=direction)
        assert chosen == f"hydra.sweeper.direction={direction}"


def test_a_new_sweep_is_refused_in_the_folder_of_another(tmp_path: Path) -> None:
    swept = made_run(tmp_path / "swept" / "3").parent
    before = contents(swept)
    command = ["-m", *tiny(tmp_path), "tracking=none", "seed=0,1", "hydra.sweep.dir=swept"]
    refused = ppo_lab(tmp_path, *command)
    assert refused.returncode == 1
    assert f"{swept}: holds runs of a sweep already (3)" in refused.stderr
    assert "resume=true launches what is missing, another hydra.sweep.dir" in refused.stderr
    assert contents(swept) == before


def test_a_run_of_a_sweep_is_refused_in_a_folder_that_holds_another(tmp_path: Path) -> None:
    run = made_run(tmp_path / "swept" / "mine")
    before = contents(run)
    place = ["hydra.sweep.dir=swept", "hydra.sweep.subdir=mine"]
    refused = ppo_lab(tmp_path, "-m", *tiny(tmp_path), "tracking=none", *place)
    assert refused.returncode == 1
    assert f"{run}: holds a run already (metrics.jsonl)" in refused.stderr
    assert {name: text for name, text in contents(run).items() if name.name != ".lock"} == before


def made_run(folder: Path) -> Path:
    """A run that was killed after its first iteration."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("[seed=7]")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_a_failed_run_leaves_the_others_alone_and_runs_again(tmp_path: Path) -> None:
    fuse = tmp_path / "fuse"
    fuse.touch()
    command = ["-m", *tiny(tmp_path, "function"), "tracking=none", "ppo.init_kl_coef=0.1,0.2"]
    first = ppo_lab(tmp_path, *command, PPO_LAB_TEST_FUSE=str(fuse))
    assert first.returncode == 1
    assert "sweep: 1 of 2 runs finished" in first.stderr
    (line,) = [row for row in first.stderr.splitlines() if row.startswith("  0  ppo.init_kl")]
    assert AWAY in line
    (place,) = (tmp_path / "outputs" / "multirun").glob("*/*")
    kept = (place / "1" / "metrics.jsonl").stat().st_mtime_ns
    shutil.rmtree(place / "0")  # and now nothing of it is left
    again = ppo_lab(tmp_path, *command, "resume=true")
    assert again.returncode == 0, again.stderr
    assert "Launching 1 jobs" in again.stderr
    assert "sweep: 2 of 2 runs finished" in again.stderr
    assert (place / "1" / "metrics.jsonl").stat().st_mtime_ns == kept
    assert [state.status for state in states(place)] == ["finished", "finished"]
    # A run that began in a resumed sweep can be gone on with by itself, as any other.
    more = ppo_lab(tmp_path, f"resume={place / '0'}", "ppo.steps=3")
    assert more.returncode == 0, more.stderr
    assert read_summary(place / "0")["steps"] == 3


@pytest.mark.slow
def test_a_killed_run_of_a_sweep_goes_on_and_other_settings_are_another_run(
    tmp_path: Path,
) -> None:
    fixed = [*tiny(tmp_path, "function"), "tracking=none", "seed=0", "hydra.sweep.dir=swept"]
    command = ["-m", *fixed, "checkpoint.every=1", "ppo.steps=6"]
    fuse = tmp_path / "fuse"
    fuse.write_text("kill 5")  # two calls come before the first iteration
    killed = ppo_lab(tmp_path, *command, PPO_LAB_TEST_FUSE=str(fuse))
    assert killed.returncode == -signal.SIGKILL
    (state,) = states(tmp_path / "swept")
    assert (state.status, state.steps) == ("crashed", 2)
    other = ppo_lab(tmp_path, *command, "ppo.learning_rate=0.5", "resume=true")
    assert other.returncode == 0, other.stderr
    found = {state.run: state.status for state in states(tmp_path / "swept")}
    assert found == {"0": "crashed", "1": "finished"}
    done = ppo_lab(tmp_path, *command, "resume=true")
    assert done.returncode == 0, done.stderr
    straight = ppo_lab(tmp_path, *command[1:], "hydra.run.dir=straight")
    assert straight.returncode == 0, straight.stderr
    assert outcome(tmp_path / "swept" / "0") == outcome(tmp_path / "straight")


# ---- Launchers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "plugin"),
    [("joblib", "joblib"), ("submitit_local", "submitit"), ("ray", "ray")],
)
def test_a_sweep_runs_in_parallel_by_a_launcher(tmp_path: Path, launcher: str, plugin: str) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{plugin}_launcher")
    command = ["-m", f"hydra/launcher={launcher}", *tiny(tmp_path), "tracking=none"]
    done = ppo_lab(tmp_path, *command, "seed=0,1,2,3", "hydra.sweep.dir=swept")
    assert done.returncode == 0, done.stderr
    runs = read_runs([str(tmp_path / "swept")])
    assert [(run.name, run.status) for run in runs] == [(n, "finished") for n in "0123"]
    assert [state.status for state in states(tmp_path / "swept")] == ["finished"] * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "plugin", "more"),
    [
        ("joblib", "joblib", ["hydra.launcher.n_jobs=3"]),
        ("submitit_local", "submitit", []),
        ("ray_gpu", "ray", ["+hydra.launcher.ray.init.num_gpus=2"]),
    ],
)
def test_runs_side_by_side_have_a_gpu_each_in_turn(
    tmp_path: Path, launcher: str, plugin: str, more: list[str]
) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{plugin}_launcher")
    (tmp_path / "notes").mkdir()
    command = ["-m", f"hydra/launcher={launcher}", *more, *tiny(tmp_path, "seen"), "tracking=none"]
    pool = {"CUDA_VISIBLE_DEVICES": "4,6", "PPO_LAB_TEST_NOTES": str(tmp_path / "notes")}
    done = ppo_lab(tmp_path, *command, "seed=0,1,2,3,4", "hydra.sweep.dir=swept", **pool)
    assert done.returncode == 0, done.stderr
    assert len(states(tmp_path / "swept")) == 5
    gpus: dict[str, set[str]] = {}
    for file in (tmp_path / "notes").iterdir():
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        gpus[file.stem] = {row["gpu"] for row in rows}
    assert set().union(*gpus.values()) == {"4", "6"}
    assert all(len(used) == 1 for used in gpus.values())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_that_is_warned_is_requeued_and_ends_with_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    fixed = [*tiny(tmp_path), "tracking=none", "ppo.steps=60", "checkpoint.every=1000", "seed=0"]
    command = ["-m", "hydra/launcher=submitit_local", "hydra.sweep.dir=swept", *fixed]
    process = started(tmp_path, *command)
    lines, run = tmp_path / "swept" / "0" / "metrics.jsonl", tmp_path / "swept" / "0"
    wait_for(lambda: lines.exists() and lines.read_text().count("\n") >= 3)
    os.kill(owner(run)["pid"], submitit_signal())
    _, said = process.communicate(timeout=400)
    assert process.returncode == 0, said
    (log,) = (tmp_path / "swept" / ".submitit").glob("*/*_log.err")
    assert log.read_text().count("Requeued job") == 1
    known = (run.parent / INDEX).read_text()
    told = [json.loads(line).get("status") for line in known.splitlines()]
    assert told == [None, "running", "preempted", "running", "finished"]
    straight = ppo_lab(tmp_path, *fixed, "hydra.run.dir=straight")
    assert straight.returncode == 0, straight.stderr
    assert outcome(run) == outcome(tmp_path / "straight")


def submitit_signal() -> int:
    from submitit import JobEnvironment

    return getattr(signal, f"SIG{JobEnvironment.USR_SIG}")


def started(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ppo_lab", *overrides],
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], bool], seconds: float = 240) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_of_several_tasks_is_one_run_of_as_many_processes_and_is_requeued_as_one(
    tmp_path: Path,
) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    fixed = several.tiny(tmp_path, "ppo.steps=30", "checkpoint.every=1000", "seed=0")
    tasks = ["hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2"]
    process = started(tmp_path, "-m", *tasks, *fixed, "hydra.sweep.dir=swept")
    lines, run = tmp_path / "swept" / "0" / "metrics.jsonl", tmp_path / "swept" / "0"
    wait_for(lambda: lines.exists() and lines.read_text().count("\n") >= 3)
    os.kill(owner(run)["pid"], submitit_signal())
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    logs = [log.read_text() for log in (tmp_path / "swept" / ".submitit").glob("*/*_log.err")]
    assert sum(log.count("Requeued job") for log in logs) == 1
    assert [state.status for state in states(tmp_path / "swept")] == ["finished"]
    straight = several.run(2, tmp_path, *fixed)
    assert several.disagreements(run, straight) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_optuna_maximises_and_goes_on_with_its_study(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    study = [f"hydra.sweeper.storage=sqlite:///{tmp_path}/study.db", "hydra.sweeper.study_name=a"]
    search = ["hydra/sweeper=optuna", *study, "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1"]
    space = "ppo.init_kl_coef=tag(log, interval(0.01, 0.3))"
    command = ["-m", *search, *tiny(tmp_path), "tracking=none", space]
    for trials in (2, 4):  # each time in a folder of their own: trials are numbered anew
        done = ppo_lab(tmp_path, *command, f"hydra.sweep.dir=swept-{trials}")
        assert done.returncode == 0, done.stderr
        optuna = pytest.importorskip("optuna")
        found = optuna.load_study(study_name="a", storage=f"sqlite:///{tmp_path}/study.db")
        assert len(found.trials) == trials
        assert found.direction.name == "MAXIMIZE"


def test_a_search_over_fine_tuning_looks_for_the_smallest_loss(
    assets: Path, tmp_path: Path
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    texts = [json.dumps({"text": f"Once upon {i} times."}) for i in range(12)]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts))
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1"]
    model = ["model=local", f"model.path={assets / 'stories260K'}", "lora=none", "device=cpu"]
    space = "fit.learning_rate=tag(log, interval(1e-6, 1e-1))"
    data = ["data.path=texts.jsonl", "hydra.sweep.dir=swept"]
    done = ppo_lab(tmp_path, "-m", *search, *model, *data, space, module="ppo_lab.sft")
    assert done.returncode == 0, done.stderr
    reports = [json.loads(file.read_text()) for file in tmp_path.glob("swept/*/model/report.json")]
    found = yaml.safe_load((tmp_path / "swept/optimization_results.yaml").read_text())
    assert found["best_value"] == min(report["held_out_loss"] for report in reports)


def test_a_missing_launcher_names_the_extra_that_brings_it() -> None:
    if importlib.util.find_spec("hydra_plugins"):
        pytest.skip("plugins are installed here")
    register_schema()
    found = command_problems(["-m", "hydra/launcher=joblib", "seed=0,1"], check=problems)
    assert found == ["hydra/launcher=joblib: needs an extra: pip install 'ppo_lab[joblib]'"]
