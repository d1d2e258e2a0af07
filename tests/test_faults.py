"""What a run survives, and how it ends where it cannot. The slow ones lie in tests/faults."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from safetensors.torch import load_file
from tiny_models import ragged, trainer
from tiny_runs import command, metrics, outcome, start, tiny

from ppo_lab import checkpoint, experiment, memory, secrecy
from ppo_lab.assembly import longest_prompt
from ppo_lab.compare.outcomes import outcomes
from ppo_lab.compare.runs import read_runs
from ppo_lab.config import (
    CheckpointSection,
    Config,
    GenerationSection,
    HeadCritic,
    ModelCritic,
    ModelSection,
    PPOSection,
)
from ppo_lab.errors import ConfigError
from ppo_lab.experiment import build, run
from ppo_lab.guards import (
    explain,
    warn_of_escapes,
    warn_of_large_scores,
    warn_of_remote_code,
    warn_of_scaled_critic,
    warn_of_weak_penalty,
)
from ppo_lab.memory import Passes, check_fits
from ppo_lab.rewards.scoring import RewardError
from ppo_lab.run_state import read_state
from ppo_lab.signals import EXIT_CODE, Preempted, Preemption, end_quietly, undisturbed
from ppo_lab.update import TrainingDiverged

pytestmark = pytest.mark.filterwarnings(
    "ignore:Could not find a config file:UserWarning"  # PEFT, of a model that has no folder
)

# Policy and reference are evaluated first, then the policy after every second iteration.
CALLS_BEFORE = {1: 2, 2: 3, 3: 5, 4: 6, 5: 8, 6: 9}


WATCHED: dict[str, Any] = {
    "checkpoint": {"best_metric": "eval/mean_reward", "every": 0},
    "evaluation": {"every": 1},
}


@pytest.fixture(autouse=True)
def _no_fuse_is_left() -> None:
    tiny_runs.fuses.clear()


def in_iteration(number: int, what: Callable[[], Any]) -> None:
    """Have the reward do that when it is called in this iteration."""
    tiny_runs.fuses[CALLS_BEFORE[number] + 1] = what


def raising(error: BaseException) -> Callable[[], Any]:
    def do() -> None:
        raise error

    return do


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("straight")
    tiny_runs.fuses.clear()
    run(tiny(folder), folder / "run")
    return folder / "run"


# ---- Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_iteration_leaves_a_checkpoint_and_the_run_goes_on_exactly(
    straight: Path, tmp_path: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    # A shell's jobs in the background ignore SIGINT, nohup's SIGHUP, and what they start does too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    in_iteration(4, lambda: os.kill(os.getpid(), number))
    try:
        with pytest.raises(Preempted) as stopped:
            run(tiny(tmp_path), tmp_path / "run")
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGHUP, hangup)
    assert stopped.value.code == EXIT_CODE == 75
    assert "once more stops at once" in capfd.readouterr().err
    assert summary(tmp_path / "run")["status"] == "preempted"
    assert max(checkpoint.all_in(tmp_path / "run"))[0] == 4
    run(replace(tiny(tmp_path), resume=str(tmp_path / "run")), tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(straight)


def test_under_an_agent_of_wandb_a_stopped_run_is_no_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    assert Preempted("SIGTERM").code == 0
    assert Preempted("SIGUSR1").code == EXIT_CODE  # which no agent sends


def test_a_signal_in_the_last_iteration_lets_the_run_finish(tmp_path: Path) -> None:
    in_iteration(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run(tiny(tmp_path), tmp_path / "run")
    assert summary(tmp_path / "run")["status"] == "finished"


def test_handlers_are_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run(tiny(tmp_path, ppo={"steps": 1}), tmp_path / "run")
    assert signal.getsignal(signal.SIGTERM) is before


STRUCK = """
import os, runpy, signal, sys

def strike(event, arguments):
    if when == (arguments[0] if event == "import" else event):
        os.kill(os.getpid(), number)

number, when, program = int(sys.argv.pop(1)), sys.argv.pop(1), sys.argv.pop(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
sys.addaudithook(strike)
runpy.run_module(program, run_name="__main__")
"""


def struck(
    folder: Path, number: signal.Signals, when: str, program: str, *words: str
) -> subprocess.CompletedProcess[str]:
    """`python -m PROGRAM`, which gets a signal when it imports something, or does what Python's
    audit calls so.
    """
    command = [sys.executable, "-c", STRUCK, str(int(number)), when, program, *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("program", "when"),
    [
        ("ppo_lab", "ppo_lab.command_line"),
        ("ppo_lab", "hydra"),
        ("ppo_lab", "torch"),
        ("ppo_lab.sft", "ppo_lab.command_line"),
        ("ppo_lab.sft", "trl"),
        ("ppo_lab.reward_model", "hydra"),
        ("ppo_lab.plan", "hydra"),
        ("ppo_lab.plan", "torch"),
        ("ppo_lab.compare", "rich.console"),
        ("ppo_lab.bench", "rich.console"),
        ("ppo_lab.bench", "torch"),
        ("ppo_lab.embedded", "ppo_lab.embedded.build"),
        ("ppo_lab.runs", "os.scandir"),
        ("ppo_lab.dashboard", "wandb_workspaces.workspaces"),
    ],
)
def test_ctrl_c_before_there_is_a_run_ends_with_a_line_and_no_traceback(
    tmp_path: Path, program: str, when: str
) -> None:
    rows = {"text": "Why so?", "prompt": "Why?", "chosen": " a", "rejected": " b"}
    words = {
        "ppo_lab.sft": stage(tmp_path, rows),
        "ppo_lab.reward_model": stage(tmp_path, rows),
        "ppo_lab.compare": ["."],
        "ppo_lab.bench": [],
        "ppo_lab.embedded": [],
        "ppo_lab.runs": ["."],
        "ppo_lab.dashboard": ["--entity", "nobody"],
    }
    if program == "ppo_lab.dashboard":
        pytest.importorskip("wandb_workspaces")
    asked = words[program] if program in words else [*command(tmp_path), "hydra.run.dir=run"]
    ended = struck(tmp_path, signal.SIGINT, when, program, *asked)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "ppo_lab: interrupted\n")


def stage(folder: Path, row: dict[str, str]) -> list[str]:
    """The command line of a stage before PPO on twenty such rows."""
    model, data = tiny_runs.inputs(folder)[0], folder / "rows.jsonl"
    rows = ({name: text + "." * i for name, text in row.items()} for i in range(20))
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return [f"model.path={model}", "model.weights=random", f"data.path={data}", "hydra.run.dir=run"]


@pytest.mark.parametrize(
    ("more", "run"),
    [(["hydra.run.dir=run"], "run"), (["hydra.sweep.dir=swept", "-m"], "swept/0")],
    ids=["a run", "a run of a sweep"],
)
def test_a_run_killed_while_it_imports_has_crashed(
    tmp_path: Path, more: list[str], run: str
) -> None:
    words = [*command(tmp_path), *more]
    struck(tmp_path, signal.SIGKILL, "ppo_lab.experiment", "ppo_lab", *words)
    assert (tmp_path / run / ".hydra/config.yaml").exists()
    assert read_state(tmp_path / run, run).status == "crashed"


def test_a_run_takes_the_programs_own_ending_for_none_and_puts_it_back(
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        end_quietly()
        with Preemption() as preemption:
            preemption.deferred = True
            os.kill(os.getpid(), signal.SIGINT)
        assert preemption.asked == "SIGINT"
        assert "once more stops at once" in capfd.readouterr().err
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130


def test_processes_that_a_reward_forks_can_be_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pooling.py").write_text(POOLING)
    monkeypatch.syspath_prepend(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run(tiny(tmp_path, ppo={"steps": 1}, reward={"target": "pooling:score"}), tmp_path / "run")
    finally:
        signal.signal(signal.SIGINT, before)
    assert summary(tmp_path / "run")["status"] == "finished"
    assert "is finished first" not in capfd.readouterr().err


POOLING = """
import multiprocessing, os, signal, time

def sleep():
    os.kill(os.getpid(), signal.SIGINT)  # as a terminal sends it to all: the run goes on
    time.sleep(60)

def score(completions):
    worker = multiprocessing.get_context("fork").Process(target=sleep)
    worker.start()
    worker.join(0.3)
    assert worker.exitcode is None
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == -signal.SIGTERM
    return [1.0] * len(completions)
"""


def test_a_second_ctrl_c_ends_the_run_of_a_notebook_and_not_the_notebook(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), Preemption() as preemption:
            preemption.deferred = True
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("first", [signal.SIGHUP, signal.SIGTERM])
def test_a_hangup_that_comes_again_ends_nothing_at_once(
    first: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    """The shell and the system each send one where a connection is lost."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with Preemption() as preemption:
            preemption.deferred = True
            for number in (first, signal.SIGHUP):
                os.kill(os.getpid(), number)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert preemption.asked == first.name
    assert capfd.readouterr().err.count("the iteration is finished first") == 1


def test_ctrl_c_is_told_of_what_was_done_undisturbed() -> None:
    done: list[str] = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), undisturbed():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("all of it")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with undisturbed():
            done.append("and more")
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for a shell's jobs in the background
        with undisturbed():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == ["all of it", "and more"]


def test_the_program_may_be_called_in_a_thread() -> None:
    """Handlers of signals are the main thread's alone to set."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(end_quietly).result()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


# ---- Runs that are refused while they are built


def test_a_run_refused_while_it_is_built_has_failed_and_says_why_and_may_be_begun_again(
    tmp_path: Path,
) -> None:
    good = tiny(tmp_path, ppo={"steps": 1}, lora={"r": 0})
    bad = replace(good, lora=replace(good.lora, r=4, target_modules=["nowhere"]))
    with pytest.raises(ConfigError):
        run(bad, tmp_path / "run")
    state = read_state(tmp_path / "run", "run")
    assert (state.status, state.steps) == ("failed", 0)
    assert state.reason.startswith("ConfigError: ")
    assert "nowhere" in state.reason
    run(good, tmp_path / "run")
    assert summary(tmp_path / "run")["status"] == "finished"
    assert "nowhere" not in (tmp_path / "run/.hydra/config.yaml").read_text()


def test_a_run_asked_to_stop_while_it_is_built_was_preempted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking = tiny(tmp_path, reward={"target": "going_away:score"})
    (tmp_path / "going_away.py").write_text("import os; os.kill(os.getpid(), 15)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Preempted):
        run(asking, tmp_path / "run")
    state = read_state(tmp_path / "run", "run")
    assert (state.status, state.reason) == ("preempted", "Preempted: SIGTERM")


def test_a_run_that_is_refused_when_it_is_to_go_on_keeps_its_summary(
    straight: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    before = summary(folder)
    config = tiny(straight.parent, ppo={"steps": 7})
    model = straight.parent / "model/config.json"
    kept = model.read_text()
    model.write_text(kept.replace("llama", "t5").replace("Llama", "T5"))
    try:
        with pytest.raises(ConfigError):
            run(replace(config, resume=str(folder)), folder)
    finally:
        model.write_text(kept)
    assert summary(folder) == before


# ---- Numbers that are none, and runs that lead nowhere


def test_updates_that_are_not_finite_are_skipped_and_counted_and_the_run_ends_well(
    tmp_path: Path,
) -> None:
    config = tiny(tmp_path, ppo={"steps": 2, "ratio_threshold": 1.0001, "learning_rate": 1.0})
    run(config, tmp_path / "run")
    skipped = [row["ppo/skipped_updates"] for row in metrics(tmp_path / "run")]
    assert sum(skipped) > 0
    found = summary(tmp_path / "run")
    assert found["status"] == "finished"
    assert found["train"]["skipped_updates"] == sum(skipped)
    assert found["train"]["skipped_iterations"] == sum(number > 0 for number in skipped)


def test_too_many_skipped_updates_stop_the_run_name_the_iteration_and_keep_the_batch(
    tmp_path: Path,
) -> None:
    wild = {"critic": HeadCritic(learning_rate=1e30)}
    config = tiny(tmp_path, ppo={"learning_rate": 1e30, "max_skipped_updates": 3}, **wild)
    with pytest.raises(TrainingDiverged, match=r"iteration 1: 3 optimizer steps in a row"):
        run(config, tmp_path / "run")
    batch = load_file(tmp_path / "run/failed/iteration-000001.safetensors")
    assert batch["tokens.responses"].shape == batch["logprobs"].shape == batch["advantages"].shape
    assert "iteration 1" in summary(tmp_path / "run")["reason"]


def test_a_batch_at_fault_that_the_disk_does_not_take_hides_no_reason(tmp_path: Path) -> None:
    batch = trainer().collect(ragged())
    wide = replace(batch, logprobs=torch.zeros(4, 10_000))
    error = TrainingDiverged("the loss is not finite", wide)
    with full_disk():
        explain(error, tmp_path, 7)
    assert str(error).startswith("iteration 7: the loss is not finite. The batch could not be writ")
    error = TrainingDiverged("the loss is not finite", wide)
    explain(error, tmp_path, 8)
    (kept,) = (tmp_path / "failed").iterdir()
    assert str(error) == f"iteration 8: the loss is not finite. The batch is in {kept}"
    assert load_file(kept)["logprobs"].shape == (4, 10_000)


def test_a_ceiling_of_kl_stops_the_run_which_can_go_on_with_a_higher_one(
    straight: Path, tmp_path: Path
) -> None:
    ceiling = max(row["kl"] for row in metrics(straight)[1:5]) - 1e-6
    assert ceiling > 0
    config = tiny(tmp_path, ppo={"max_kl": ceiling})
    with pytest.raises(TrainingDiverged, match=r"iteration \d: kl is .* above ppo.max_kl"):
        run(config, tmp_path / "run")
    stopped = len(metrics(tmp_path / "run"))
    assert stopped < 6
    assert summary(tmp_path / "run")["status"] == "failed"
    freed = replace(tiny(tmp_path), resume=str(tmp_path / "run"))
    run(freed, tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(straight)


def test_an_evaluation_before_training_is_no_outcome_of_a_run_that_ended_early(
    tmp_path: Path,
) -> None:
    in_iteration(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted):
        run(tiny(tmp_path, evaluation={"every": 0}), tmp_path / "run")
    left = summary(tmp_path / "run")
    assert 0 < left["steps"] < 6
    assert (list(left["eval"]), left["objective"]) == (["first"], None)
    (found,) = read_runs([str(tmp_path / "run")])
    assert math.isnan(outcomes(found)["objective"])
    assert math.isnan(outcomes(found)["eval/kl"])


# ---- Rewards


def test_a_reward_that_raises_ends_the_run_after_its_last_whole_iteration(
    straight: Path, tmp_path: Path
) -> None:
    in_iteration(5, raising(RuntimeError("the service is gone")))
    with pytest.raises(RewardError, match="the service is gone"):
        run(tiny(tmp_path), tmp_path / "run")
    assert summary(tmp_path / "run")["status"] == "failed"
    assert max(checkpoint.all_in(tmp_path / "run"))[0] == 4
    run(replace(tiny(tmp_path), resume=str(tmp_path / "run")), tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(straight)


def test_a_reward_that_draws_and_raises_leaves_no_trace_of_the_iteration_that_broke_off(
    tmp_path: Path,
) -> None:
    rewarded = {"reward": {"target": "tiny_runs:noisy"}, "checkpoint": {"every": 1}}
    run(tiny(tmp_path, **rewarded), tmp_path / "straight")
    in_iteration(4, raising(RuntimeError("the service is gone")))
    with pytest.raises(RewardError, match="the service is gone"):
        run(tiny(tmp_path, **rewarded), tmp_path / "run")
    run(replace(tiny(tmp_path, **rewarded), resume=str(tmp_path / "run")), tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "straight")


def evaluating_as(numbers: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations find these mean rewards, one after the other."""
    following, measure = iter(numbers), experiment.evaluate

    def measured(lab: Any, step: int, **_: Any) -> dict[str, float]:
        return measure(lab, step) | {"eval/mean_reward": next(following)}

    monkeypatch.setattr(experiment, "evaluate", measured)


def test_a_run_that_fails_keeps_its_best_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last checkpoint, which may be the best one, is not written again."""
    evaluating_as([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], monkeypatch)
    in_iteration(4, raising(RuntimeError("the service is gone")))
    with pytest.raises(RewardError, match="the service is gone"):
        run(tiny(tmp_path, **WATCHED), tmp_path / "run")
    last, folder = max(checkpoint.all_in(tmp_path / "run"))
    assert checkpoint.read(folder)["best"]["step"] == last
    assert (folder / "model").is_dir()


def test_the_best_is_what_the_disk_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C-08: of a checkpoint that could not be written, the next best need not be better."""
    save, evaluated = checkpoint.save, []

    def refusing(folder: Path, state: dict[str, Any], *, step: int, **how: Any) -> Path:
        evaluated.append(state["best"])
        if len(evaluated) == 1:
            raise OSError("No space left on device")
        return save(folder, state, step=step, **how)

    monkeypatch.setattr(checkpoint, "save", refusing)
    evaluating_as([0.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0], monkeypatch)
    run(tiny(tmp_path, **WATCHED), tmp_path / "run")
    assert [best["step"] for best in evaluated] == [1, 2, 2]
    assert (tmp_path / "run/checkpoints/step-000002/model").is_dir()


def test_the_longest_prompt_and_the_longest_response_just_fit_into_the_context(
    tmp_path: Path,
) -> None:
    """96 tokens, of which evaluations or training take the most for a response."""
    for training, evaluation in ((6, 6), (6, 20), (20, 6)):
        config = tiny(
            tmp_path,
            generation={"max_new_tokens": training},
            evaluation={"max_new_tokens": evaluation},
        )
        assert longest_prompt(config) == 96 - max(training, evaluation)
    assert longest_prompt(replace(config, data=replace(config.data, max_prompt_tokens=9))) == 9


def test_a_part_of_the_prompts_held_out_is_taken_from_all_over_the_file(tmp_path: Path) -> None:
    judged = [
        build(tiny(tmp_path, evaluation={"prompts": n}), tmp_path / f"run{n}").evaluator.prompts.ids
        for n in (2, 4)
    ]
    assert judged[0] == judged[1][::2]


@pytest.mark.parametrize(
    ("watched", "best"), [("eval/mean_reward", 2), ("eval/response_length", 7), ("", 2)]
)
def test_the_best_of_one_metric_is_not_held_against_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched: str, best: int
) -> None:
    """A run may be resumed with another best_metric, whose values may be smaller throughout."""
    evaluating_as([0.0, 3.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0], monkeypatch)
    config = tiny(tmp_path, **WATCHED)
    run(config, tmp_path / "run")
    keep = replace(config.checkpoint, best_metric=watched)
    longer = replace(config.ppo, steps=config.ppo.steps + 1)
    run(replace(config, resume=str(tmp_path / "run"), checkpoint=keep, ppo=longer), tmp_path)
    folder = checkpoint.latest(tmp_path / "run")
    assert folder is not None
    assert checkpoint.read(folder)["best"]["step"] == best
    assert checkpoint.has(tmp_path / "run", best)


def test_a_reward_that_hangs_is_given_up_after_its_time(straight: Path, tmp_path: Path) -> None:
    in_iteration(2, lambda: time.sleep(30))
    begun = time.monotonic()
    with pytest.raises(RewardError, match="timeout"):
        run(tiny(tmp_path, reward={"timeout": 0.5}), tmp_path / "run")
    assert time.monotonic() - begun < 20
    assert max(checkpoint.all_in(tmp_path / "run"))[0] == 1


def test_a_reward_that_fails_now_and_then_is_asked_again(straight: Path, tmp_path: Path) -> None:
    in_iteration(2, raising(ConnectionError("again, please")))
    run(tiny(tmp_path, reward={"retries": 2, "retry_wait": 0.01}), tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(straight)


def test_scores_that_are_no_numbers_end_the_run_with_the_sample(tmp_path: Path) -> None:
    config = tiny(tmp_path, reward={"target": "test_faults:not_a_number"})
    with pytest.raises(RewardError, match="nan"):
        run(config, tmp_path / "run")


def not_a_number(completions: list[str], **_: Any) -> list[float]:
    return [float("nan")] * len(completions)


# ---- The disk


def test_a_folder_deleted_under_way_is_made_again(tmp_path: Path) -> None:
    in_iteration(4, lambda: shutil.rmtree(tmp_path / "run"))
    run(tiny(tmp_path), tmp_path / "run")
    assert summary(tmp_path / "run")["status"] == "finished"
    assert [row["step"] for row in metrics(tmp_path / "run")] == [4, 5, 6]
    assert max(checkpoint.all_in(tmp_path / "run"))[0] == 6


def test_checkpoints_that_cannot_be_written_are_said_once_and_tried_again(
    straight: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "run" / checkpoint.FOLDER
    in_iteration(1, lambda: place.write_text("in the way"))
    in_iteration(4, place.unlink)
    run(tiny(tmp_path, checkpoint={"every": 1}), tmp_path / "run")
    said = capfd.readouterr()
    assert (said.out + said.err).count("could not be written") == 1
    assert max(checkpoint.all_in(tmp_path / "run"))[0] == 6
    assert metrics(tmp_path / "run") == metrics(straight)


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond what metrics and samples take; a whole model does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def whole_model(folder: Path, every: int) -> Config:
    """A run that trains every weight."""
    slower = {"learning_rate": 1e-3}
    return tiny(folder, lora={"r": 0}, ppo=slower, checkpoint={"every": every})


def test_a_disk_that_is_full_from_the_beginning_is_told_to_keep_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with full_disk(), pytest.raises(ConfigError, match="no checkpoint, so that nothing learnt is"):
        run(whole_model(tmp_path, every=1), tmp_path / "run")
    said = capfd.readouterr()
    assert "checkpoint of iteration 1 could not be written" in said.out + said.err
    assert "the run goes on without any" in said.out + said.err
    page = said.out.partition("in ")[2]
    assert "metrics.jsonl " in page
    assert not re.search(r"^  (model|checkpoints) ", page, re.MULTILINE), "none is there"
    assert not [entry.name for entry in (tmp_path / "run").iterdir() if "model" in entry.name]


def test_a_disk_that_fills_up_is_told_with_the_iteration_that_is_kept(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with ExitStack() as stack:
        in_iteration(4, lambda: stack.enter_context(full_disk()))
        with pytest.raises(ConfigError, match=r"up to iteration 3 is in the last checkpoint"):
            run(whole_model(tmp_path, every=3), tmp_path / "run")
    said = capfd.readouterr()
    assert "and that of iteration 3 is kept" in said.out + said.err
    assert re.search(r"^  checkpoints ", said.out, re.MULTILINE)


def test_a_model_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    config = whole_model(tmp_path, every=0)
    run(config, tmp_path / "run")
    before = outcome(tmp_path / "run")["files"]["model.safetensors"]
    longer = replace(config, resume=str(tmp_path / "run"), ppo=replace(config.ppo, steps=7))
    with full_disk(), pytest.raises(ConfigError, match="up to iteration 6"):
        run(longer, tmp_path / "run")
    assert outcome(tmp_path / "run")["files"]["model.safetensors"] == before


def test_metrics_that_cannot_be_written_wait_until_they_can(straight: Path, tmp_path: Path) -> None:
    file = tmp_path / "run/metrics.jsonl"

    def block() -> None:
        file.rename(file.with_suffix(".aside"))
        file.mkdir()

    def free() -> None:
        file.rmdir()
        file.with_suffix(".aside").rename(file)

    in_iteration(2, block)
    in_iteration(5, free)
    run(tiny(tmp_path), tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(straight)


# ---- Memory


@contextmanager
def room_for(model: torch.nn.Module, samples: int) -> Iterator[None]:
    """Passes of more samples than this run out of memory."""

    def check(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if len(kwargs["input_ids"]) > samples:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def test_passes_are_halved_when_memory_runs_out_and_the_numbers_stay(tmp_path: Path) -> None:
    rows = []
    for samples in (99, 1):
        # A step size for whole models: a larger one makes much of rounding.
        config = tiny(tmp_path, lora={"r": 0}, ppo={"learning_rate": 1e-3})
        lab = build(config, tmp_path / f"run{samples}")
        decoder = lab.trainer.policy.trunk.decoder
        with room_for(decoder, samples):
            if samples == 1:
                with pytest.warns(RuntimeWarning, match="done again with") as said:
                    rows.append([lab.trainer.iteration(lab.stream.next_batch()) for _ in range(2)])
                assert len(said) == 2  # once for sampling, once for training
            else:
                rows.append([lab.trainer.iteration(lab.stream.next_batch()) for _ in range(2)])
    for roomy, tight in zip(*rows, strict=True):
        for name, value in roomy.items():
            if not name.startswith(("time/", "tokens_per", "peak", "mfu", "ppo/policy/first")):
                assert tight[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def test_memory_for_not_even_one_sample_is_an_error() -> None:
    def attempt(size: int) -> None:
        raise torch.OutOfMemoryError(f"{size} do not fit")

    with pytest.raises(torch.OutOfMemoryError, match="1 do not fit"), pytest.warns(RuntimeWarning):
        Passes("a test").until_it_fits(attempt, 4)


class Room:
    """Room for so many samples, once what was kept to be faster is let go of."""

    def __init__(self, samples: int, *, kept: int) -> None:
        self.samples, self.kept = samples, kept
        self.tried: list[int] = []

    def let_go(self) -> bool:
        freed, self.kept = self.kept > 0, max(0, self.kept - 1)
        return freed

    def attempt(self, size: int) -> int:
        self.tried.append(size)
        if self.kept or size > self.samples:
            raise torch.OutOfMemoryError(f"{size} do not fit")
        return size


def test_what_is_kept_is_let_go_of_before_passes_are_halved() -> None:
    room = Room(2, kept=2)
    passes = Passes("a test", room.let_go)
    with pytest.warns(RuntimeWarning, match="with 8 samples a pass for a test: done again with 4"):
        assert passes.until_it_fits(room.attempt, 8) == 2
    assert room.tried == [8, 8, 8, 4, 2]
    assert passes.until_it_fits(room.attempt, 8) == 2  # and it stays as small


@pytest.mark.parametrize("size", [4, 1])
def test_where_letting_go_is_enough_passes_stay_as_large_without_a_word(size: int) -> None:
    room = Room(size, kept=1)
    passes = Passes("a test", room.let_go)
    assert passes.until_it_fits(room.attempt, size) == size
    assert room.tried == [size, size]
    assert passes.most == 0


def test_where_nothing_is_left_to_let_go_of_one_sample_is_the_last_try() -> None:
    room = Room(0, kept=1)
    with pytest.raises(torch.OutOfMemoryError, match="1 do not fit"):
        Passes("a test", room.let_go).until_it_fits(room.attempt, 1)
    assert room.tried == [1, 1]


@pytest.mark.parametrize("freed_elsewhere", [True, False])
def test_processes_try_again_together_and_halve_where_none_let_go_of_anything(
    freed_elsewhere: bool,
) -> None:
    """Here everything fits; another process ran out of memory in the first attempt."""
    asked: list[bool] = []
    answers = iter([True, freed_elsewhere, False])

    def agree(here: bool) -> bool:
        asked.append(here)
        return next(answers)

    room = Room(4, kept=0)
    passes = Passes("a test", room.let_go)
    with nullcontext() if freed_elsewhere else pytest.warns(RuntimeWarning, match="done again"):
        assert passes.until_it_fits(room.attempt, 4, agree) == (4 if freed_elsewhere else 2)
    assert asked == [False] * 3
    assert room.tried == ([4, 4] if freed_elsewhere else [4, 2])


def test_processes_that_cannot_try_again_together_do_not() -> None:
    room = Room(4, kept=1)
    with pytest.raises(torch.OutOfMemoryError, match="4 do not fit"):
        Passes("a test", room.let_go).until_it_fits(room.attempt, 4, None)
    assert room.tried == [4]


def test_processes_that_share_a_machine_need_its_memory_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path)
    monkeypatch.setattr(memory, "free_bytes", lambda: 1e9)
    check_fits(config, "cpu", processes=4)
    with pytest.raises(ConfigError, match=r"in each of 1000000 processes\)"):
        check_fits(config, "cpu", processes=1_000_000)


def test_a_model_that_memory_cannot_hold_is_refused_with_figures(tmp_path: Path) -> None:
    config = tiny(tmp_path, lora={"r": 0})
    tiny_runs.inputs(tmp_path, vocab_size=4_000_000_000, hidden_size=1024)
    with pytest.raises(ConfigError, match=r"needs \d+.\d GiB .*weights .*Adam.*are free.*lora"):
        check_fits(config, "cpu")
    check_fits(tiny(tmp_path), "cpu")


# ---- Odd texts and tokenizers


def test_odd_prompts_go_through_a_whole_run(tmp_path: Path) -> None:
    odd = [
        "😀🏳️‍🌈",
        "مرحبا بالعالم",
        "a\x00b",
        "\ud7ff\uffff",
        "x" * 500,
        " ",
        "ﬁ",
        "\u202eabc",
        "é",
    ]
    config = tiny(tmp_path, ppo={"steps": 1})
    tiny_runs.inputs(tmp_path, odd * 2)
    run(config, tmp_path / "run")
    assert summary(tmp_path / "run")["status"] == "finished"


@pytest.mark.parametrize("ends", ["at once", "never"])
def test_responses_that_end_at_once_or_never_are_learnt_from(tmp_path: Path, ends: str) -> None:
    lab = build(tiny(tmp_path), tmp_path / "run")
    eos = tuple(range(320)) if ends == "at once" else ()
    lab.trainer.sampling = replace(lab.trainer.sampling, eos_ids=eos)
    found = [lab.trainer.iteration(lab.stream.next_batch()) for _ in range(2)]
    length = 1 if ends == "at once" else 6
    assert all(row["tokens/responses_len_mean"] == length for row in found)
    assert all(row["tokens/eos_rate"] == (ends == "at once") for row in found)
    assert all(map(torch.isfinite, (torch.tensor(row["ppo/loss/total"]) for row in found)))


def test_padding_with_eos_changes_no_number(straight: Path, tmp_path: Path) -> None:
    config = tiny(tmp_path)
    lab = build(config, tmp_path / "run")
    eos = lab.trainer.sampling.eos_ids[0]
    lab.trainer.sampling = replace(lab.trainer.sampling, pad_id=eos)
    first = lab.trainer.iteration(lab.stream.next_batch())
    for name, value in metrics(straight)[0].items():
        if name in first:
            assert first[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_a_tokenizer_without_pad_bos_and_eos_will_do(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["?", "Question", ":", "why", "is", "so", "unknown"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="unknown"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(tmp_path / "words")
    config = tiny(tmp_path, model={"tokenizer": str(tmp_path / "words")}, ppo={"steps": 1})
    texts = ["Question why " * (i + 1) for i in range(12)]
    tiny_runs.inputs(tmp_path, texts, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    run(config, tmp_path / "run")
    assert metrics(tmp_path / "run")[0]["tokens/eos_rate"] == 0


# ---- Secrets

KEYS = {
    "WANDB_API_KEY": "f00dfeed" * 5,
    "HF_TOKEN": "hf_" + "Abcd1234" * 4,
    "MY_SERVICE_KEY": "hush-hush-123",
}


def test_secrets_reach_no_file_and_no_output_of_a_run(tmp_path: Path) -> None:
    words = command(tmp_path, "ppo.steps=1", "tracking=wandb", "tracking.mode=offline")
    words += ["reward=function", "reward.target=tiny_runs:variety", "hydra.run.dir=run"]
    words += ["+reward.kwargs.api_key='${oc.env:MY_SERVICE_KEY}'"]
    words.remove("reward=length")
    words.remove("reward.unit=characters")
    words.remove("tracking=none")
    process = start(tmp_path, *words, env={**KEYS, "WANDB_MODE": "offline"})
    output, _ = process.communicate(timeout=250)
    assert process.returncode == 0, output
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert any(file.suffix == ".wandb" for file in files)
    for name, secret in KEYS.items():
        assert secret not in output, name
        assert not [f for f in files if secret.encode() in f.read_bytes()], name


@pytest.mark.parametrize(
    "override",
    [
        "reward.kwargs.api_key=plainly",
        "+reward.kwargs.token=plainly",
        "+reward.kwargs={url: here, api_key: plainly}",
        "+reward.kwargs.service={'api_key': 'plainly', retries: 3}",
        "+reward.parts.judge.kwargs={headers: {x-token: plainly}}",
        "tracking.notes=hf_" + "Abcd1234" * 4,
        "model.path=https://me:plainly@example.org/model",
        "tracking.notes=hush-hush-123",
    ],
)
def test_a_secret_on_the_command_line_is_refused_without_being_repeated(
    override: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SERVICE_KEY", "hush-hush-123")
    (message,) = secrecy.secret_overrides(["ppo.steps=3", override])
    assert override.partition("=")[2] not in message
    assert "oc.env" in message


def test_ordinary_tokens_are_no_secrets() -> None:
    words = ["model.eos_token=</s>", "generation.max_new_tokens=32", "model.revision=" + "a1" * 20]
    words += ["+reward.kwargs.max_tokens=5", "+reward.kwargs={max_tokens: 5, api_key: ${oc.env:K}}"]
    words += ["+reward.kwargs.service={retries: 3, count_tokens: true, url: here}"]
    assert list(secrecy.secret_overrides(words)) == []


def test_secrets_are_blotted_out_of_what_is_uploaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_KEY", "hush-hush-123")
    kwargs = {"api_key": "x", "n": 3, "service": {"token": "x", "all": [{"secret": "x"}]}}
    config = {"reward": {"kwargs": kwargs}, "a": ["see hush-hush-123"]}
    blotted = {"token": "***", "all": [{"secret": "***"}]}
    assert secrecy.hidden(config) == {
        "reward": {"kwargs": {"api_key": "***", "n": 3, "service": blotted}},
        "a": ["see ***"],
    }


def test_code_of_a_model_is_announced_before_it_runs() -> None:
    said: list[str] = []
    warn_of_remote_code(ModelSection(path="some/model"), said.append)
    assert said == []
    warn_of_remote_code(ModelSection(path="some/model", trust_remote_code=True), said.append)
    assert "run on this machine with your rights" in said[0]


def test_a_penalty_that_need_not_lead_back_is_announced() -> None:
    said: list[str] = []
    warn_of_weak_penalty(PPOSection(), said.append)
    warn_of_weak_penalty(PPOSection(kl_penalty="k3", init_kl_coef=0.0), said.append)
    assert said == []
    warn_of_weak_penalty(PPOSection(kl_penalty="full"), said.append)
    assert "ppo.kl_penalty=full" in said[0]


def test_another_number_of_threads_is_announced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, own = tmp_path / "run", torch.get_num_threads()
    config = tiny(tmp_path, ppo={"steps": 1})
    run(config, folder)
    try:
        for threads in (own, own + 1):
            assert "goes on with" not in "".join(capsys.readouterr())
            torch.set_num_threads(threads)
            steps = config.ppo.steps + threads - own + 1
            longer = replace(config, ppo=replace(config.ppo, steps=steps), resume=str(folder))
            run(longer, folder)
    finally:
        torch.set_num_threads(own)
    said = "".join(capsys.readouterr())
    assert f"goes on with {own + 1} threads, where it had {own}" in said
    assert f"(OMP_NUM_THREADS={own} keeps them)" in said


def test_scores_whose_value_loss_outweighs_the_policy_s_are_announced() -> None:
    """A count of some forty characters: half its square, times vf_coef 0.1, is 80."""
    said: list[str] = []
    counted = {"ppo/loss/value": 0.5 * 40.0**2}
    warn_of_large_scores(Config(), {"ppo/loss/value": 0.5}, said.append)
    warn_of_large_scores(Config(ppo=PPOSection(vf_coef=1e-3)), counted, said.append)
    warn_of_large_scores(Config(critic=ModelCritic()), counted, said.append)
    warn_of_large_scores(Config(critic=HeadCritic(warmup_steps=3)), counted, said.append)
    assert said == []
    warn_of_large_scores(Config(), counted, said.append)
    assert "ppo.vf_coef, is 80: " in said[0]


def test_a_stop_string_with_a_backslash_for_a_line_break_is_announced() -> None:
    """Hydra leaves escapes on the command line as they are: such a string would stop nothing."""
    said: list[str] = []
    warn_of_escapes(GenerationSection(stop_strings=["\n\nHuman:", "C:\\Users"]), said.append)
    assert said == []
    (read,) = OverridesParser.create().parse_overrides([r'stop_strings=["\nHuman:"]'])
    warn_of_escapes(GenerationSection(stop_strings=list(map(str, read.value()))), said.append)
    assert r"'\nHuman:' holds a backslash and the letter n" in said[0]


@pytest.mark.parametrize(
    ("ppo", "named"),
    [({}, ""), ({"use_score_scaling": True}, "use_score"), ({"score_clip": 0.5}, "score_clip=0.5")],
)
def test_a_critic_that_starts_on_another_scale_than_it_is_to_learn_is_announced(
    ppo: dict[str, Any], named: str
) -> None:
    said: list[str] = []
    warn_of_scaled_critic(Config(ppo=PPOSection(**ppo)), said.append)
    assert said == []
    warn_of_scaled_critic(Config(ppo=PPOSection(**ppo), critic=ModelCritic()), said.append)
    assert [named in line for line in said] == ([True] if named else [])


# ---- Slow: real processes, really killed


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(tmp_path: Path) -> None:
    script = Path(__file__).parent / "faults/kill_many.py"
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "3", "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_two_signals_stop_a_process_at_once(tmp_path: Path) -> None:
    words = command(tmp_path, "ppo.steps=100000", "hydra.run.dir=run")
    process = start(tmp_path, *words)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run/checkpoints").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    process.communicate(timeout=20)
    assert time.monotonic() - begun < 10
    assert process.returncode in (-signal.SIGINT, -signal.SIGTERM)


@pytest.mark.parametrize("key", ["objective", "checkpoint.best_metric"])
def test_a_part_that_the_reward_does_not_have_is_refused_by_the_first_evaluation(
    tmp_path: Path, key: str
) -> None:
    wrong = "eval/reward/varieti"
    changes: dict[str, Any] = (
        {"objective": wrong} if key == "objective" else {"checkpoint": {"best_metric": wrong}}
    )
    config = tiny(tmp_path, **changes)
    with pytest.raises(ConfigError, match=f"{key}={wrong}: .* it has .*eval/reward/variety"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_part_that_is_watched_is_looked_for_when_a_run_goes_on_too(tmp_path: Path) -> None:
    good, wrong = (
        {"best_metric": f"eval/reward/{part}", "every": 0} for part in ("variety", "other")
    )
    folder = tmp_path / "run"
    run(tiny(tmp_path, checkpoint=good), folder)
    longer = tiny(tmp_path, ppo={"steps": 8}, checkpoint=wrong)
    with pytest.raises(ConfigError, match="best_metric=eval/reward/other: this run has no such"):
        run(replace(longer, resume=str(folder)), folder)
    run(replace(longer, checkpoint=CheckpointSection(**good), resume=str(folder)), folder)
    assert len(metrics(folder)) == 8
