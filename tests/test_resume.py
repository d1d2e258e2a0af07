"""A run goes on from its checkpoint to the same numbers, or says why not."""

from __future__ import annotations

import json
import random
import shutil
import threading
import time
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch
import yaml
from tiny_runs import Killed, kill, metrics, outcome, tiny

from ppo_lab import checkpoint, typed
from ppo_lab.config import ConstantReward, FunctionReward, ModelReward, WeightedReward
from ppo_lab.continuation import (
    PIECES,
    random_state,
    restore,
    seed_random_state,
    set_random_state,
    state_of,
)
from ppo_lab.errors import ConfigError
from ppo_lab.experiment import build, make_trackers, run
from ppo_lab.models.byte_tokenizer import byte_tokenizer
from ppo_lab.record import read_json_lines
from ppo_lab.resume import (
    FREE_IN_WORDS,
    _already_done,
    check_new,
    differences,
    is_finished,
    record_again,
    resume_command,
    resumed_command,
)
from ppo_lab.run_lock import alone_in
from ppo_lab.run_state import WORK
from ppo_lab.wandb_mirror import THREAD_NAME, WandbTracker

pytestmark = pytest.mark.filterwarnings(
    "ignore:Could not find a config file:UserWarning"  # PEFT, of a model that has no folder
)

# Two evaluations come before the first iteration (policy and reference), one every two iterations.
CALLS_BEFORE_THE_FIFTH_ITERATION = 2 + 4 + 2
RESULTS = ("metrics.jsonl", "samples.jsonl", "summary.json")


@pytest.fixture(autouse=True)
def _nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_runs.fuses.clear()
    monkeypatch.setattr(typed, "shell_folder", None)


def killed_in_the_fifth_iteration(config: Any, folder: Path) -> None:
    tiny_runs.fuses[CALLS_BEFORE_THE_FIFTH_ITERATION + 1] = kill
    with pytest.raises(Killed):
        run(config, folder)
    assert len(metrics(folder)) == 4
    assert [step for step, _ in checkpoint.all_in(folder)] == [3]


@pytest.mark.parametrize("r", [4, 0], ids=["lora", "full"])
@pytest.mark.parametrize("adaptive", [False, True], ids=["fixed", "adaptive"])
def test_a_killed_run_ends_with_the_numbers_of_one_that_was_not(
    tmp_path: Path, r: int, adaptive: bool
) -> None:
    """C-01, C-02."""
    ppo = {"adap_kl_ctrl": adaptive, "horizon": 100, "lr_schedule": "cosine", "warmup_steps": 2}
    config = tiny(tmp_path, lora={"r": r}, ppo=ppo, reward={"target": "tiny_runs:noisy"})
    run(config, tmp_path / "straight")
    killed_in_the_fifth_iteration(config, tmp_path / "killed")
    run(replace(config, resume=str(tmp_path / "killed")), tmp_path / "elsewhere")
    expected, found = outcome(tmp_path / "straight"), outcome(tmp_path / "killed")
    assert found == expected
    assert len(expected["files"]) >= 3
    if adaptive:
        assert len({row["kl_coef"] for row in expected["metrics"]}) > 1
    assert not (tmp_path / "elsewhere").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six iterations with checkpoints after 3 and 6, not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    tiny_runs.fuses.clear()
    run(tiny(folder), folder / "run")
    return folder


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> tuple[Any, Path]:
    """A copy of that run as if it had been killed before its end, and what resumes it."""
    folder = tmp_path / "run"
    shutil.copytree(finished / "run", folder)
    (folder / "summary.json").unlink()
    return replace(tiny(finished), resume=str(folder)), folder


def test_a_torn_checkpoint_is_said_and_the_one_before_is_taken(
    again: tuple[Any, Path], finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, folder = again
    torn = folder / "checkpoints/step-000006" / checkpoint.TENSORS
    torn.write_bytes(torn.read_bytes()[:-100])
    run(config, folder)
    assert "iteration 6 is torn and passed over" in capfd.readouterr().err
    assert outcome(folder) == outcome(finished / "run")


def test_a_run_without_a_whole_checkpoint_does_not_begin_anew_in_silence(
    again: tuple[Any, Path],
) -> None:
    config, folder = again
    for place in (folder / "checkpoints").iterdir():
        (place / checkpoint.NUMBERS).unlink()
    with pytest.raises(ConfigError, match="no whole checkpoint is left"):
        run(config, folder)


@pytest.mark.parametrize("piece", ["optimizer", "kl_controller", "moments", "policy"])
def test_a_checkpoint_that_lacks_a_piece_is_refused(again: tuple[Any, Path], piece: str) -> None:
    """C-10."""
    config, folder = again
    state = checkpoint.read(checkpoint.latest(folder) or folder)
    del state["trainer"][piece]
    checkpoint.save(folder, state, step=6)
    with pytest.raises(ConfigError, match=piece):
        run(config, folder)


def test_whatever_piece_a_checkpoint_lacks_it_is_refused_by_name(tmp_path: Path) -> None:
    """C-10, C-01: also a single weight, and what only some settings ever change."""
    lab = build(tiny(tmp_path), tmp_path / "run")
    whole = state_of(lab)
    own = set(whole["trainer"]) - {"critic"}  # of a critic apart, which there is not
    assert len(own) >= 10
    for piece in (*PIECES, *own):
        state = {**whole, "trainer": dict(whole["trainer"])}
        del (state if piece in PIECES else state["trainer"])[piece]
        with pytest.raises(ConfigError, match=piece):
            restore(lab, state)
    for weight in whole["trainer"]["policy"]:
        rest = {n: w for n, w in whole["trainer"]["policy"].items() if n != weight}
        with pytest.raises(ConfigError, match=weight):
            restore(lab, {**whole, "trainer": {**whole["trainer"], "policy": rest}})


def test_every_global_generator_goes_on_between_two_numbers_of_a_pair() -> None:
    """C-01: normal numbers are drawn two at a time, and the second is kept for later."""

    def drawn() -> list[float]:
        return [random.gauss(0, 1), np.random.standard_normal(), float(torch.randn(()))]

    seed_random_state(3)
    first, state = drawn(), random_state()
    second = drawn()
    drawn()
    set_random_state(state)
    assert drawn() == second != first


def test_a_named_checkpoint_is_gone_on_from_and_later_ones_are_set_aside(
    again: tuple[Any, Path], finished: Path
) -> None:
    config, folder = again
    named = folder / "checkpoints/step-000003"
    run(replace(config, resume=str(named)), folder)
    assert outcome(folder) == outcome(finished / "run")
    assert (folder / "checkpoints/step-000006.old").is_dir()


def test_a_run_killed_before_its_first_checkpoint_begins_again(
    again: tuple[Any, Path], finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, folder = again
    shutil.rmtree(folder / "checkpoints")
    run(config, folder)
    assert "begins again" in capfd.readouterr().err
    assert outcome(folder) == outcome(finished / "run")


def test_samples_of_training_are_kept_where_there_are_none_of_an_evaluation(tmp_path: Path) -> None:
    config = tiny(tmp_path, ppo={"steps": 4})
    run(replace(config, tracking=replace(config.tracking, samples_every=1)), tmp_path / "run")
    rows = read_json_lines(tmp_path / "run/samples.jsonl")
    evaluated = [row["step"] for row in rows if row["reference_response"] is not None]
    trained = [row["step"] for row in rows if row["reference_response"] is None]
    assert sorted(set(evaluated)) == [0, 2, 4]
    assert sorted(set(trained)) == [1, 3]


def test_a_summary_holds_means_over_the_last_tenth_and_over_all(tmp_path: Path) -> None:
    ppo = {"steps": 20, "ppo_epochs": 1}
    run(tiny(tmp_path, ppo=ppo, evaluation={"every": 0}), tmp_path / "run")
    found = json.loads((tmp_path / "run/summary.json").read_text())
    rows = metrics(tmp_path / "run")
    for name in ("kl", "mean_reward"):
        assert found["train"][name] == pytest.approx((rows[-2][name] + rows[-1][name]) / 2)
    clipped = sum(row["clip_fraction"] for row in rows) / 20
    assert found["train"]["clip_fraction"] == pytest.approx(clipped)


def test_trackers_are_told_of_the_whole_configuration_and_of_all_iterations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """L-04, L-05: an iteration is counted as one, whatever its batches and epochs."""
    config = tiny(tmp_path, tracking={"type": "wandb", "mode": "disabled"})
    trackers = make_trackers(config, tmp_path / "run", (), None, is_main=True)
    (mirror,) = (t for t in trackers.trackers if isinstance(t, WandbTracker))
    assert mirror.config == asdict(config)
    trackers.log({"kl": 1.0}, 1)
    trackers.finish("finished", {})
    assert "iteration 1/6  kl 1" in capsys.readouterr().out


def test_a_clock_that_is_set_back_under_way_changes_no_duration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = time.time
    tiny_runs.fuses.clear()
    tiny_runs.fuses[3] = lambda: monkeypatch.setattr(time, "time", lambda: clock() - 3600)
    run(tiny(tmp_path, ppo={"steps": 2}), tmp_path / "run")
    assert time.time() < clock() - 3000
    assert 0 < json.loads((tmp_path / "run/summary.json").read_text())["wall_s"] < 600
    (kept,) = [folder for _, folder in checkpoint.all_in(tmp_path / "run")]
    assert 0 < checkpoint.read(kept)["elapsed_s"] < 600


def test_more_steps_go_on_where_a_finished_run_ended(again: tuple[Any, Path]) -> None:
    config, folder = again
    before = metrics(folder)
    run(replace(config, ppo=replace(config.ppo, steps=8)), folder)
    assert [row["step"] for row in metrics(folder)] == list(range(1, 9))
    assert metrics(folder)[:6] == before
    assert json.loads((folder / "summary.json").read_text())["steps"] == 8
    recorded = (folder / ".hydra/config.yaml").read_text()
    assert "steps: 8" in recorded


@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_that_is_cut_short_is_judged_as_it_is(again: tuple[Any, Path], steps: int) -> None:
    """Where it is resumed to end at its checkpoint, after which nothing was evaluated yet."""
    config, folder = again
    named = folder / "checkpoints/step-000003"
    run(replace(config, resume=str(named), ppo=replace(config.ppo, steps=steps)), folder)
    summary = json.loads((folder / "summary.json").read_text())
    before = metrics(folder)
    assert (summary["steps"], len(before)) == (3, 3)
    assert summary["eval"]["last"]["kl"] not in (0.0, before[1]["eval/kl"])
    assert summary["objective"] == summary["eval"]["last"]["mean_reward"]


def test_a_run_killed_after_its_last_checkpoint_is_not_evaluated_again(
    again: tuple[Any, Path], finished: Path
) -> None:
    config, folder = again
    run(config, folder)
    assert outcome(folder) == outcome(finished / "run")


def test_a_run_s_rate_is_of_all_its_tokens_over_all_its_time(finished: Path) -> None:
    """Of 10 tokens in 1 s and of 10 in 9 s it is 2 a second, where the mean of the rates is 5.6."""
    rows = read_json_lines(finished / "run/metrics.jsonl")
    seconds = sum(row["time/iteration"] for row in rows)
    tokens = sum(row["time/iteration"] * row["tokens_per_second"] for row in rows)
    summary = json.loads((finished / "run/summary.json").read_text())
    assert summary["tokens_per_second"] == pytest.approx(tokens / seconds)
    rates = [row["tokens_per_second"] for row in rows]
    assert summary["tokens_per_second"] != pytest.approx(sum(rates) / len(rates))


def test_the_objective_of_a_row_is_of_the_row_s_own_beta(tmp_path: Path) -> None:
    """Where beta adapts, it has moved on by the time of the evaluation."""
    config = tiny(tmp_path, ppo={"adap_kl_ctrl": True, "horizon": 10})
    run(config, tmp_path / "run")
    rows = [row for row in metrics(tmp_path / "run") if "eval/kl" in row]
    betas = [row["kl_coef"] for row in rows]
    assert len(set(betas)) == len(betas) > 1
    for row in rows:
        cost = row["kl_coef"] * row["eval/kl"]
        assert row["eval/objective"] == pytest.approx(row["eval/mean_reward"] - cost, abs=1e-9)


def test_a_finished_run_is_not_trained_again(finished: Path) -> None:
    config = replace(tiny(finished), resume=str(finished / "run"))
    assert is_finished(finished / "run")
    assert "has finished its 6 iterations" in differences(config)[0]
    with pytest.raises(ConfigError, match="above 6"):
        run(config, finished / "run")


def test_what_changes_the_numbers_is_refused_with_the_list_of_it(finished: Path) -> None:
    config = replace(
        tiny(finished, ppo={"cliprange": 0.1, "steps": 9}, lora={"r": 8}, evaluation={"every": 1}),
        resume=str(finished / "run"),
        seed=3,
    )
    found = differences(config)
    assert [line.partition(":")[0] for line in found[:-1]] == [
        "seed=3",
        "lora.r=8",
        "ppo.cliprange=0.1",
    ]
    assert "the run has ppo.cliprange=0.2" in found[2]
    assert "may change" in found[-1]


def other(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, list | dict):
        return ["other"] if isinstance(value, list) else {"other": 1}
    return (
        not value if isinstance(value, bool) else f"{value}x" if type(value) is str else value + 1
    )


def test_every_setting_is_refused_but_those_that_the_message_names(finished: Path) -> None:
    config, free = replace(tiny(finished), resume=str(finished / "run")), set()
    for section in fields(config):
        whole = getattr(config, section.name)
        for knob in fields(whole) if is_dataclass(whole) else [section]:
            inner = knob is not section
            value = other(getattr(whole, knob.name) if inner else whole)
            changed = replace(whole, **{knob.name: value}) if inner else value
            key = f"{section.name}.{knob.name}" if inner else section.name
            said = differences(replace(config, **{section.name: changed}))
            if key not in ("resume", "ppo.steps") and not any(key in line for line in said[:-1]):
                free.add(key)
    listed = set(FREE_IN_WORDS.removesuffix(" may change").replace(" and ", ", ").split(", "))
    sections = {name.partition(".")[0] for name in free} & listed
    named = {
        name.partition(".")[0] if name.partition(".")[0] in sections else name for name in free
    }
    assert named == listed


def test_a_reward_model_may_move_to_another_device(finished: Path, tmp_path: Path) -> None:
    """As it must, where it was sharded over processes, or on a GPU that is gone."""
    there, here = ModelReward(path="a", device="sharded"), ModelReward(path="a")
    for then, now in (there, here), (mixed(there), mixed(here)):
        record_again(tmp_path / "run", tiny(finished, reward=then), [])
        config = replace(tiny(finished, reward=now), resume=str(tmp_path / "run"))
        assert differences(config) == []


def mixed(part: ModelReward) -> WeightedReward:
    """A reward model among others."""
    return WeightedReward(parts={"inner": WeightedReward(parts={"model": part})})


def test_what_a_function_calls_its_device_may_not_change(finished: Path, tmp_path: Path) -> None:
    reward = FunctionReward(target="a:b", kwargs={"device": "x"})
    record_again(tmp_path / "run", tiny(finished, reward=reward), [])
    changed = tiny(finished, reward=replace(reward, kwargs={"device": "y"}))
    found = differences(replace(changed, resume=str(tmp_path / "run")))
    assert found[0].startswith("reward.kwargs.device=y")


@pytest.mark.parametrize(("rank", "own"), [(4, 2e-3), (0, 2e-4)])
def test_another_step_size_than_the_preset_had_for_the_run_is_refused(
    finished: Path, tmp_path: Path, rank: int, own: float
) -> None:
    """Hydra records what the preset says of both kinds of training."""
    config = tiny(finished, lora={"r": rank}, ppo={"learning_rate": own})
    record_again(tmp_path / "run", config, [])
    file = tmp_path / "run/.hydra/config.yaml"
    settings = yaml.safe_load(file.read_text())
    settings["ppo"]["learning_rate"] = "${by_training:2.0e-3,2.0e-4}"
    file.write_text(yaml.safe_dump(settings))
    config = replace(config, resume=str(tmp_path / "run"))
    assert differences(config) == []
    (line, _) = differences(replace(config, ppo=replace(config.ppo, learning_rate=0.5)))
    assert line == f"ppo.learning_rate=0.5: the run has ppo.learning_rate={own}"


def test_another_kind_of_reward_is_refused(finished: Path) -> None:
    config = replace(tiny(finished), resume=str(finished / "run"))
    found = differences(replace(config, reward=ConstantReward(name="variety")))
    assert any(line.startswith("reward.target=") for line in found)


@pytest.mark.parametrize("kwargs", [{"scale": 2.0}, {"scale": 2.0, "bonus": {"of": 1, "at": 2}}])
def test_what_is_added_to_a_mapping_is_refused(
    finished: Path, tmp_path: Path, kwargs: dict
) -> None:
    before = {"scale": 2.0, "bonus": {"of": 1}} if "bonus" in kwargs else {}
    config = tiny(finished, reward={"kwargs": before})
    record_again(tmp_path / "run", config, [])
    config = replace(config, resume=str(tmp_path / "run"))
    assert differences(config) == []
    (line, _) = differences(replace(config, reward=replace(config.reward, kwargs=kwargs)))
    key = "reward.kwargs.bonus.at" if before else "reward.kwargs.scale"
    assert line == f"{key}: the run has no such entry"


def test_a_part_more_in_a_sum_of_rewards_is_refused(finished: Path, tmp_path: Path) -> None:
    parts = {"a": ConstantReward(value=1.0)}
    config = tiny(finished, reward=WeightedReward(parts=dict(parts)))
    record_again(tmp_path / "run", config, [])
    config = replace(config, resume=str(tmp_path / "run"))
    assert differences(config) == []
    more = WeightedReward(parts={**parts, "b": ConstantReward(value=2.0)})
    assert differences(replace(config, reward=more))[0] == (
        "reward.parts.b: the run has no such entry"
    )


def test_more_steps_are_refused_where_the_learning_rate_is_tied_to_their_number(
    tmp_path: Path,
) -> None:
    config = tiny(tmp_path, ppo={"steps": 1, "lr_schedule": "linear"})
    run(config, tmp_path / "run")
    longer = replace(config, ppo=replace(config.ppo, steps=2), resume=str(tmp_path / "run"))
    assert "lr_schedule=linear" in differences(longer)[0]


def test_other_prompts_in_the_same_file_are_noticed(
    again: tuple[Any, Path], tmp_path: Path
) -> None:
    config, folder = again
    texts = [f"Other question {i}?" for i in range(22)]
    _, data = tiny_runs.inputs(tmp_path / "other", texts)
    recorded = folder / ".hydra/config.yaml"
    recorded.write_text(recorded.read_text().replace(config.data.path, str(data)))
    moved = replace(config, data=replace(config.data, path=str(data)))
    (folder / "summary.json").write_text('{"status": "preempted", "steps": 7}')
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7}\n')
    kept = {name: (folder / name).read_bytes() for name in RESULTS}
    with pytest.raises(ConfigError, match="the prompts are not those"):
        run(moved, folder)
    assert {name: (folder / name).read_bytes() for name in RESULTS} == kept


def test_other_answers_to_the_same_prompts_are_noticed(tmp_path: Path) -> None:
    config = tiny(tmp_path, ppo={"steps": 1})
    data, texts = Path(config.data.path), [f"Question {i}?" for i in range(22)]

    def write(**answers: Any) -> None:
        rows = [{"prompt": text, **answers} for text in texts]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(answer=1)
    run(config, tmp_path / "run")
    more = replace(config, ppo=replace(config.ppo, steps=2), resume=str(tmp_path / "run"))
    write(answer=2)
    with pytest.raises(ConfigError, match="the values of the column 'answer' are not those"):
        run(more, tmp_path / "run")
    write(answer=1, note="new")  # which nobody has read yet
    run(more, tmp_path / "run")
    assert len(metrics(tmp_path / "run")) == 2


def test_another_reward_model_in_the_same_folder_is_noticed(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, BloomConfig

    place = tmp_path / "reward"

    def write(seed: int, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(seed)
        sizes = BloomConfig(vocab_size=512, hidden_size=16, n_layer=1, n_head=2, num_labels=1)
        AutoModelForSequenceClassification.from_config(sizes).to(dtype).save_pretrained(place)
        byte_tokenizer().save_pretrained(place)

    write(1)
    section = ModelReward(name="model", path=str(place))
    config = tiny(tmp_path, ppo={"steps": 1}, reward=section)
    run(config, tmp_path / "run")
    more = replace(config, ppo=replace(config.ppo, steps=2), resume=str(tmp_path / "run"))
    write(2)
    with pytest.raises(ConfigError, match="the weights of the reward model 'model' are not those"):
        run(more, tmp_path / "run")
    write(1, torch.bfloat16)  # as a GPU has them
    run(more, tmp_path / "run")
    assert len(metrics(tmp_path / "run")) == 2


def test_a_run_that_may_not_go_on_after_all_leaves_wandb_to_the_next_in_the_process(
    again: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config, folder = again
    config = replace(config, tracking=replace(config.tracking, type="wandb"))
    monkeypatch.setattr("ppo_lab.experiment.restore", refused)
    with pytest.raises(ConfigError, match="not to be"):
        run(config, folder)
    assert THREAD_NAME not in {thread.name for thread in threading.enumerate()}
    assert not (folder / "wandb").exists()


def refused(*_: object) -> None:
    raise ConfigError("not to be")


def test_checkpoints_behind_a_link_are_refused(again: tuple[Any, Path], tmp_path: Path) -> None:
    config, folder = again
    (folder / "checkpoints").rename(tmp_path / "outside")
    (folder / "checkpoints").symlink_to(tmp_path / "outside")
    with pytest.raises(ConfigError, match="leads out of the run's folder"):
        run(config, folder)


def test_a_record_behind_a_link_is_refused(again: tuple[Any, Path], tmp_path: Path) -> None:
    config, folder = again
    (folder / ".hydra").rename(tmp_path / "outside")
    (folder / ".hydra").symlink_to(tmp_path / "outside")
    with pytest.raises(ConfigError, match="leads out of the run's folder"):
        run(config, folder)


def test_two_processes_do_not_train_in_one_folder(again: tuple[Any, Path]) -> None:
    config, folder = again
    with alone_in(folder), pytest.raises(ConfigError, match="another process"):
        run(config, folder)


def test_a_folder_in_use_is_refused_before_anything_is_written(
    again: tuple[Any, Path], tmp_path: Path
) -> None:
    _, folder = again
    with alone_in(folder):
        before = contents(folder)
        command = tiny_runs.command(tmp_path, "seed=9", f"hydra.run.dir={folder}")
        refused = tiny_runs.start(tmp_path, *command)
        said, _ = refused.communicate(timeout=60)
        assert contents(folder) == before
    assert refused.returncode == 1
    assert said.splitlines()[1:] == [f"  {folder}: another process is training in this folder"]


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("left", [*WORK, "summary.json"])
def test_a_new_run_is_refused_where_anything_of_another_lies(
    finished: Path, tmp_path: Path, left: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished / "run", folder)
    for name in {*WORK, "summary.json"} - {left}:
        one = folder / name
        shutil.rmtree(one) if one.is_dir() else one.unlink()
    with pytest.raises(ConfigError) as refused:
        run(tiny(finished), folder)
    assert f"holds a run already ({left})" in str(refused.value)
    assert resume_command(folder) in str(refused.value)
    assert "another hydra.run.dir" in str(refused.value)


def test_a_command_in_a_folder_that_holds_a_run_leaves_it_as_it_is(
    again: tuple[Any, Path], tmp_path: Path
) -> None:
    _, folder = again
    before = contents(folder)
    words = tiny_runs.command(tmp_path, "seed=9", f"hydra.run.dir={folder}")
    refused = tiny_runs.start(tmp_path, *words)
    said, _ = refused.communicate(timeout=60)
    assert refused.returncode == 1
    assert "holds a run already" in said
    assert contents(folder) == before


def test_a_new_run_may_begin_where_others_have_made_nothing(tmp_path: Path) -> None:
    check_new(tmp_path / "nowhere")
    check_new(tmp_path)
    with alone_in(tmp_path):  # what is left of a run that was refused, or killed, or by anybody
        (tmp_path / ".hydra").mkdir()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "summary.json").write_text('{"status": "failed", "reason": "no such model"}')
    check_new(tmp_path)
    (tmp_path / "summary.json").write_text('{"status": "fin')
    with pytest.raises(ConfigError, match=r"\(summary.json\)"):
        check_new(tmp_path)


def test_a_command_that_resumes_repeats_the_runs_own_overrides_before_its_own(
    again: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, folder = again
    monkeypatch.chdir(tmp_path)
    (folder / ".hydra/overrides.yaml").write_text("[model=gpt2, ppo.steps=6, resume=old]")
    (folder / ".hydra/hydra.yaml").write_text(f"hydra: {{runtime: {{cwd: {folder}}}}}")
    words = resumed_command([f"resume={folder}", "ppo.steps=9", "tracking=none"])
    assert words == [
        *("model=gpt2", "ppo.steps=9", "tracking=none", f"resume={folder}"),
        *(f"hydra.run.dir={folder}", "hydra.output_subdir=null"),
    ]
    assert Path.cwd() == folder
    assert resumed_command(["ppo.steps=9"]) == ["ppo.steps=9"]
    assert resumed_command(["resume="]) == ["resume="]
    assert resume_command(folder) == "python -m ppo_lab resume=run"  # from where the user is


def test_a_configuration_of_one_s_own_is_found_again(
    again: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, folder = again
    monkeypatch.chdir(tmp_path)
    (folder / ".hydra/overrides.yaml").write_text("[experiment=mine]")
    sources = "[{path: /main, provider: main}, {path: /own conf, provider: command-line}]"
    (folder / ".hydra/hydra.yaml").write_text(
        f"hydra: {{runtime: {{cwd: {folder}, config_sources: {sources}}}, "
        "job: {config_name: other}}"
    )
    words = resumed_command(["--cfg=job", f"resume={folder}", "ppo.steps=9"])
    assert words[:5] == [
        *("--cfg=job", "--config-name=other", "--config-dir=/own conf"),
        *("experiment=mine", "ppo.steps=9"),
    ]
    given = ["--config-dir=/new", "--config-name=config", f"resume={folder}"]
    assert resumed_command(given)[:3] == [*given[:2], "experiment=mine"]


def test_a_run_whose_learning_rate_came_to_its_end_is_not_said_to_go_on(
    finished: Path,
) -> None:
    config = tiny(finished)
    folder = finished / "run"
    for schedule, said in (("constant", "ppo.steps=N above 6 goes on"), ("linear", "to its end")):
        config = replace(config, ppo=replace(config.ppo, lr_schedule=schedule))
        (line,) = _already_done(config, folder)
        assert said in line


def test_a_sweep_cannot_resume_one_run(again: tuple[Any, Path]) -> None:
    _, folder = again
    with pytest.raises(ConfigError, match="without -m"):
        resumed_command(["-m", f"resume={folder}"])


@pytest.mark.parametrize("missing", [".hydra", ".hydra/overrides.yaml", ""])
def test_a_folder_that_holds_no_run_cannot_be_resumed(tmp_path: Path, missing: str) -> None:
    folder = tmp_path / "run"
    if missing:
        (folder / ".hydra").mkdir(parents=True)
        (folder / ".hydra/config.yaml").write_text("{}")
    with pytest.raises(ConfigError, match=r"no such folder|holds no run"):
        resumed_command([f"resume={folder}"])


@pytest.mark.parametrize("name", ["x" * 300, "~nobody-of-this-name/run"])
def test_a_folder_that_cannot_be_looked_at_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"resume={name}: cannot be read"):
        resumed_command([f"resume={name}"])


@pytest.mark.parametrize("name", ["overrides", "hydra", "config"])
def test_a_record_with_a_changed_byte_is_refused_by_name(
    again: tuple[Any, Path], name: str
) -> None:
    config, folder = again
    (folder / f".hydra/{name}.yaml").write_bytes(b"name: \xe5\n")
    said = f"{name}.yaml cannot be read"
    if name == "config":
        assert said in differences(config)[0]
    else:
        with pytest.raises(ConfigError, match=said):
            resumed_command([f"resume={folder}"])
