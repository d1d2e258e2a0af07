"""Many machines: a scheduler's warnings, jobs that are requeued, and GPUs that are handed out."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from omegaconf import DictConfig, OmegaConf
from tiny_runs import outcome, tiny

from ppo_lab import checkpoint, gpus
from ppo_lab.config import Config, conf_folder
from ppo_lab.errors import ConfigError
from ppo_lab.experiment import run
from ppo_lab.folders import OneRun, OwnFolder, begin_in, check_new_sweep
from ppo_lab.multirun import Sweep, planned, unfinished, what_is_missing
from ppo_lab.run_lock import alone_in, in_use, owner
from ppo_lab.run_state import RunState, read_summary
from ppo_lab.scheduler import is_requeued, join_processes
from ppo_lab.signals import Preempted, Preemption

pytestmark = pytest.mark.filterwarnings(
    "ignore:Could not find a config file:UserWarning"  # PEFT, of a model that has no folder
)
GRID = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """What a handler that was there before has been told; it exits as submitit's does."""
    told: list[int] = []

    def requeue(number: int, _: Any) -> None:
        told.append(number)
        raise SystemExit(-1)

    watched = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
    before = {number: signal.signal(number, requeue) for number in watched}
    tiny_runs.fuses.clear()
    yield told
    for number, handler in before.items():
        signal.signal(number, handler)


def in_iteration_4(*numbers: int) -> None:
    """Have these signals come while the fourth iteration is scored."""

    def send() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    tiny_runs.fuses[7] = send


# ---- Warnings of a scheduler


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("straight")
    tiny_runs.fuses.clear()
    run(tiny(folder), folder / "run")
    return folder / "run"


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGUSR1,),
        (signal.SIGTERM, signal.SIGUSR2),  # as Slurm preempts
        (signal.SIGUSR2, signal.SIGTERM, signal.SIGTERM),
    ],
)
def test_a_warning_leaves_a_checkpoint_before_it_is_passed_on(
    straight: Path, tmp_path: Path, handled: list[int], numbers: tuple[int, ...]
) -> None:
    in_iteration_4(*numbers)
    with pytest.raises(SystemExit) as ended:
        run(tiny(tmp_path), tmp_path / "run")
    assert ended.value.code == -1
    warnings = [number for number in numbers if number != signal.SIGTERM]
    assert handled == warnings
    assert read_summary(tmp_path / "run")["reason"] == f"Preempted: {warnings[0].name}"
    assert read_summary(tmp_path / "run")["status"] == "preempted"
    assert max(checkpoint.all_in(tmp_path / "run"))[0] == 4
    run(replace(tiny(tmp_path), resume=str(tmp_path / "run")), tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(straight)


def test_a_warning_in_the_last_iteration_has_no_finished_run_requeued(
    tmp_path: Path, handled: list[int]
) -> None:
    tiny_runs.fuses[10] = lambda: os.kill(os.getpid(), signal.SIGUSR2)
    run(tiny(tmp_path), tmp_path / "run")
    assert handled == []
    assert read_summary(tmp_path / "run")["status"] == "finished"


def test_a_warning_before_anything_is_to_be_lost_is_passed_on_at_once(handled: list[int]) -> None:
    with pytest.raises(SystemExit) as ended, Preemption():
        os.kill(os.getpid(), signal.SIGUSR2)
    assert (ended.value.code, handled) == (-1, [signal.SIGUSR2])


def test_without_a_handler_a_warning_is_as_good_as_a_request_to_end() -> None:
    with pytest.raises(Preempted) as ended, Preemption():
        os.kill(os.getpid(), signal.SIGUSR2)
    assert ended.value.code == 75


def test_a_process_that_is_not_the_first_ends_as_if_all_were_well() -> None:
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    with pytest.raises(Preempted) as ended, Preemption():
        os.kill(os.getpid(), signal.SIGUSR2)
    signal.signal(signal.SIGUSR2, before)
    assert ended.value.code == 0


# ---- Jobs


def test_a_job_that_is_requeued_knows_the_run_that_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert not is_requeued(tmp_path)
    with alone_in(tmp_path):
        pass
    assert not is_requeued(tmp_path)  # a process of the same job, a moment later
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "99")  # Slurm may give an array's job another one
    assert is_requeued(tmp_path)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert not is_requeued(tmp_path)
    with alone_in(tmp_path):
        pass
    monkeypatch.delenv("SUBMITIT_EXECUTOR")  # a script of one's own, without submitit
    assert is_requeued(tmp_path)
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    assert not is_requeued(tmp_path)  # two runs by hand are no job that came back
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name)
    with alone_in(tmp_path):
        pass
    assert not is_requeued(tmp_path)


@pytest.mark.parametrize("kind", ["slurm", "local"])
def test_a_job_is_known_by_its_own_number_alone(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of Slurm's that is no array's, or one of submitit's on this machine."""
    name = "SLURM_JOB_ID" if kind == "slurm" else "SUBMITIT_LOCAL_JOB_ID"
    monkeypatch.setenv("SUBMITIT_EXECUTOR", kind)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv(name, "71")
    assert not is_requeued(tmp_path)
    with alone_in(tmp_path):
        pass
    assert is_requeued(tmp_path)
    monkeypatch.setenv(name, "72")
    assert not is_requeued(tmp_path)


@pytest.mark.parametrize("left", ["", "[]", "{", "\xff"])
def test_a_lock_whose_file_says_nothing_is_nobody_s(left: str, tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(left, encoding="latin-1")
    assert owner(tmp_path) == {}
    assert in_use(tmp_path) is None
    with alone_in(tmp_path):
        assert owner(tmp_path)["pid"] == os.getpid()


def test_a_run_that_wandb_hands_out_again_is_known_by_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named, chosen = tmp_path / "r1", tmp_path / "chosen"
    for folder in (named, chosen):
        folder.mkdir()
    (chosen / "wandb_run_id").write_text("r1\n")
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    assert not is_requeued(named)  # without an agent nothing resumes by accident
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    assert is_requeued(named)
    assert is_requeued(chosen)
    monkeypatch.setenv("WANDB_RUN_ID", "r2")
    assert not is_requeued(named)
    assert not is_requeued(chosen)


def test_processes_are_joined_by_submitit_alone_and_only_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    join_processes()
    assert "RANK" not in os.environ
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("RANK", "1")  # torchrun said so before
    join_processes()
    assert os.environ["RANK"] == "1"


def test_presets_for_slurm_and_ray_are_of_keys_that_their_plugins_know() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    from hydra import compose, initialize_config_dir

    from ppo_lab.config import register_schema

    register_schema()
    sizes = {"slurm_gpu": (1, 1, 1), "slurm_node": (1, 8, 8), "slurm_nodes": (2, 8, 8)}
    for name, size in sizes.items():
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            overrides = [f"hydra/launcher={name}", "hydra.launcher.partition=p"]
            config = compose("config", overrides, return_hydra_config=True)
        launcher = config.hydra.launcher
        assert (launcher.nodes, launcher.tasks_per_node, launcher.gpus_per_node) == size
        assert launcher.max_num_timeout > 0
        assert launcher._target_.endswith("SlurmLauncher")


def test_every_preset_says_what_it_is_for_and_builds_on_a_plugins_launcher() -> None:
    from ppo_lab.command_reader import PLUGINS

    files = sorted((conf_folder() / "hydra" / "launcher").glob("*.yaml"))
    assert [file.stem for file in files] == ["ray_gpu", "slurm_gpu", "slurm_node", "slurm_nodes"]
    for file in files:
        assert file.read_text().startswith("# ")
        assert file.stem in PLUGINS
        assert OmegaConf.load(file).defaults[0] in PLUGINS


# ---- Folders


def composed(dir: str, key: str = "run", **more: Any) -> DictConfig:
    """As much of Hydra's configuration as its hooks look at."""
    setup_globals()
    hydra = {key: {"dir": dir}, "overrides": {"hydra": []}, **more}
    return OmegaConf.create({"hydra": hydra})


def test_runs_that_start_at_the_same_moment_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    names = []
    for _ in range(3):
        config = composed(f"{tmp_path}/${{now:%Y}}")
        OwnFolder().on_run_start(config)
        names.append(Path(config.hydra.run.dir).name)
    year = time.strftime("%Y")
    assert names == [year, f"{year}-2", f"{year}-3"]
    config = composed(f"{tmp_path}/${{oc.env:WANDB_RUN_ID,${{now:%Y}}}}")  # without an agent
    OwnFolder().on_run_start(config)
    assert Path(config.hydra.run.dir).name == f"{year}-4"
    monkeypatch.setenv("WANDB_RUN_ID", "run1")
    config = composed(f"{tmp_path}/${{now:%Y}}")
    OwnFolder().on_run_start(config)
    assert Path(config.hydra.run.dir).name == f"{year}-5"


def test_sweeps_that_start_at_the_same_moment_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    year = time.strftime("%Y")
    for name in (year, f"{year}-2"):
        config = composed("outputs/${now:%Y}", "sweep")
        OwnFolder().on_multirun_start(config)
        assert config.hydra.sweep.dir == str(tmp_path / "outputs" / name)
        # Each run of it is composed from the overrides alone.
        assert config.hydra.overrides.hydra == [f"hydra.sweep.dir={tmp_path}/outputs/{name}"]


def test_a_folder_that_was_chosen_and_that_of_an_agents_run_are_taken_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed(str(tmp_path))
    OwnFolder().on_run_start(config)
    assert config.hydra.run.dir == str(tmp_path)
    monkeypatch.setenv("WANDB_RUN_ID", "run1")
    (tmp_path / "run1").mkdir()
    config = composed(f"{tmp_path}/${{oc.env:WANDB_RUN_ID,${{now:%Y}}}}")
    OwnFolder().on_run_start(config)
    assert config.hydra.run.dir == f"{tmp_path}/run1"


def test_a_folder_in_which_somebody_works_is_refused_before_there_is_any_work(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "0"
    folder.mkdir()
    with alone_in(folder):
        with pytest.raises(ConfigError, match=r"holds runs of a sweep already \(0\)"):
            check_new_sweep(tmp_path)
        with pytest.raises(ConfigError, match="another process is training"):
            begin_in(folder, new=True)
    check_new_sweep(tmp_path)


def test_a_job_that_is_requeued_may_go_on_in_the_folder_of_its_run_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    config = OmegaConf.merge(composed(str(tmp_path)), {"resume": ""})
    with pytest.raises(SystemExit):
        OneRun().on_run_start(config)
    assert "holds a run already (metrics.jsonl)" in capsys.readouterr().err
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "17")
    with pytest.raises(SystemExit):
        OneRun().on_run_start(config)
    with alone_in(tmp_path):  # as that job, the first time
        pass
    OneRun().on_run_start(config)
    assert in_use(tmp_path)
    with alone_in(tmp_path):
        pass


@pytest.mark.parametrize(
    ("resume", "subdir", "refused"),
    [("", "${hydra.job.num}", True), ("true", "${hydra.job.num}", False), ("", "${b}", False)],
)
def test_a_new_sweep_takes_no_numbered_folders_of_another(
    resume: str, subdir: str, refused: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor does a folder that is no run's, or is none of a sweep's numbers, stand in its way."""
    sweep = composed(str(tmp_path), "sweep")
    config = OmegaConf.merge(sweep, {"resume": resume, "b": "seed=0"})
    config.hydra.sweep.subdir = subdir
    for name in ("0", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes/metrics.jsonl").write_text("")
    OneRun().on_multirun_start(config)
    (tmp_path / "3").mkdir()
    (tmp_path / "3/metrics.jsonl").write_text("")
    if refused:
        with pytest.raises(SystemExit):
            OneRun().on_multirun_start(config)
        assert "holds runs of a sweep already (3);" in capsys.readouterr().err
    else:
        OneRun().on_multirun_start(config)


def test_of_the_processes_of_one_run_only_the_first_makes_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    OwnFolder().on_run_start(composed(f"{tmp_path}/${{now:%Y}}"))
    assert not list(tmp_path.iterdir())


# ---- The runs of a sweep


def test_the_plan_of_a_grid_is_that_of_hydra_and_a_search_has_none() -> None:
    hydra = {
        "sweeper": {"_target_": GRID, "params": {"seed": "0,1"}},
        "overrides": {"task": ["a=x,y", "b=1e-2"]},
    }
    assert planned(hydra) == [
        ["seed=0", "a=x", "b=0.01"],
        ["seed=0", "a=y", "b=0.01"],
        ["seed=1", "a=x", "b=0.01"],
        ["seed=1", "a=y", "b=0.01"],
    ]
    assert planned({**hydra, "sweeper": {"_target_": "optuna"}}) == []


def test_a_resumed_sweep_knows_its_runs_by_their_settings_though_it_has_grown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    jobs = [[f"seed={seed}", "resume=true"] for seed in (9, 0, 1, 2, 3)]
    found = [
        RunState("0", "finished", ("seed=0",)),
        RunState("1", "crashed", ("seed=1",)),
        RunState("2", "running", ("seed=2",), reason="on node7"),
        RunState("9", "missing", ("seed=3",)),
    ]
    left = list(unfinished(jobs, found, numbered=True))
    assert left == [
        ["seed=9", "resume=true", "hydra.sweep.subdir=5"],  # 0 is another run's folder
        ["seed=1", "resume=true", "hydra.sweep.subdir=1"],
        ["seed=3", "resume=true", "hydra.sweep.subdir=4"],
    ]
    assert "run 2 is left alone, somebody is at work: on node7" in capsys.readouterr().err


def test_a_new_run_of_a_resumed_sweep_takes_no_folder_of_a_sweep_that_was_larger() -> None:
    found = [RunState(str(n), "finished", (f"seed={n}",)) for n in range(3)]
    left = list(unfinished([["seed=9"], ["seed=8"]], found, numbered=True))
    assert left == [["seed=9", "hydra.sweep.subdir=3"], ["seed=8", "hydra.sweep.subdir=4"]]


def test_a_run_that_others_are_at_work_on_is_not_called_failed(tmp_path: Path) -> None:
    config = OmegaConf.create({"hydra": {"runtime": {"output_dir": str(tmp_path)}}})
    refused = JobReturn(status=JobStatus.FAILED)
    refused.return_value = ValueError("another process is training in this folder")
    with alone_in(tmp_path):
        Sweep().on_job_end(config, refused)
    assert read_summary(tmp_path) == {}


def test_a_requeued_run_that_had_not_begun_begins(tmp_path: Path) -> None:
    found = what_is_missing(Config(), tmp_path)
    assert isinstance(found, Config)
    assert found.resume == ""


# ---- GPUs

JOBLIB = {"_target_": "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"}
LOCAL = {"_target_": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher"}


@pytest.fixture(autouse=True)
def _no_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gpus.POOL, "")
    monkeypatch.setattr(gpus, "_own", -1)


@pytest.mark.parametrize(
    ("stated", "names"),
    [("0,1", ["0", "1"]), ("GPU-8f,MIG-3", ["GPU-8f", "MIG-3"]), ("", []), ("2,-1,3", ["2"])],
)
def test_the_pool_is_what_cuda_visible_devices_says(
    stated: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(gpus.VISIBLE, stated)
    assert gpus.visible() == names


@pytest.mark.parametrize(
    ("asked", "given"), [(-1, 2), (8, 2), (1, 1)], ids=["all cores", "more", "fewer"]
)
def test_joblib_has_no_more_workers_than_gpus(
    asked: int, given: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(gpus.VISIBLE, "4,7")
    launcher = {**JOBLIB, "n_jobs": asked}
    assert gpus.offer(launcher) == ["4", "7"]
    assert launcher["n_jobs"] == given
    assert os.environ[gpus.POOL] == "4,7"


def test_without_a_gpu_nothing_is_handed_out_and_nothing_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(gpus.VISIBLE, "")
    launcher = {**JOBLIB, "n_jobs": -1}
    assert gpus.offer(launcher) == []
    assert launcher["n_jobs"] == -1
    assert gpus.take_turn(tmp_path) is None
    assert os.environ[gpus.VISIBLE] == ""


def test_submitits_local_jobs_of_one_gpu_take_turns_and_others_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(gpus.VISIBLE, "0,1")
    assert gpus.offer({**LOCAL, "gpus_per_node": None, "tasks_per_node": 1}) == ["0", "1"]
    assert gpus.offer({**LOCAL, "gpus_per_node": 2, "tasks_per_node": 2}) == []
    assert gpus.offer({"_target_": "hydra_plugins.hydra_ray_launcher.ray_launcher.X"}) == []


def test_a_process_keeps_to_its_first_gpu_since_cuda_cannot_move_to_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(gpus.VISIBLE, "")
    monkeypatch.setenv(gpus.POOL, "4,7")
    other = gpus.take_turn(tmp_path)
    monkeypatch.setattr(gpus, "_own", -1)
    own = gpus.take_turn(tmp_path)
    assert other
    assert own
    assert os.environ[gpus.VISIBLE] == "7"
    other.close()
    own.close()
    again = gpus.take_turn(tmp_path)
    assert again
    assert os.environ[gpus.VISIBLE] == "7"
    again.close()


def _job(sweep: Path) -> tuple[str, int, float, float]:
    """One run in a worker: the GPU that it sees, the worker, and when it had the GPU."""
    with gpus.take_turn(sweep) or open(os.devnull):
        begun = time.monotonic()
        time.sleep(0.05)
        return os.environ[gpus.VISIBLE], os.getpid(), begun, time.monotonic()


def test_each_worker_has_a_gpu_of_its_own_and_more_runs_than_gpus_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(gpus.POOL, "3,GPU-5")
    with ProcessPoolExecutor(3, mp_context=get_context("fork")) as pool:
        found = list(pool.map(_job, [tmp_path] * 9))
    assert {gpu for gpu, *_ in found} == {"3", "GPU-5"}
    of_worker: dict[int, set[str]] = {}
    for gpu, worker, *_ in found:
        of_worker.setdefault(worker, set()).add(gpu)
    assert all(len(seen) == 1 for seen in of_worker.values())  # CUDA cannot move to another
    for gpu in ("3", "GPU-5"):
        turns = sorted((begun, ended) for name, _, begun, ended in found if name == gpu)
        assert all(turns[i][1] <= turns[i + 1][0] for i in range(len(turns) - 1))
