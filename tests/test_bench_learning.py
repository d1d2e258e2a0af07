"""The benchmark of learning: a judge that is right, a frontier by hand, a record that goes on."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
import transformers
from rich.console import Console
from test_config import refused
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ppo_lab.bench.command import main
from ppo_lab.bench.learning import judge as judging
from ppo_lab.bench.learning import report
from ppo_lab.bench.learning.command import parser
from ppo_lab.bench.learning.runs import (
    CONTESTANTS,
    HERE,
    Cell,
    Cost,
    Record,
    cells,
    judge,
    overrides,
    run,
    train_and_judge,
    variant,
)
from ppo_lab.bench.learning.task import Task
from ppo_lab.models.byte_tokenizer import byte_tokenizer

COST = Cost(1.0, 2.0, 0.5)
VERDICT = {"score": 1.0, "kl": 2.0}


def model_folder(folder: Path, kind: Any, seed: int) -> Path:
    """A tiny Llama with the tokenizer of bytes."""
    architecture = {k: v for k, v in tiny_runs.ARCHITECTURE.items() if k != "model_type"}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 1}
    config = transformers.LlamaConfig(**architecture | special)
    torch.manual_seed(seed)
    kind.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def small_task(folder: Path) -> Task:
    """A task of seconds."""
    prompts = folder / "prompts.jsonl"
    lines = [{"prompt": f"Why {'so ' * (i % 4)}{i % 25}?"} for i in range(40)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    start = model_folder(folder / "start", AutoModelForCausalLM, 0)
    scorer = model_folder(folder / "scorer", AutoModelForSequenceClassification, 1)
    sizes = {"iterations": 1, "batch": 4, "mini_batch": 2, "new_tokens": 5, "held_out": 6}
    return Task(str(start), str(scorer), str(prompts), **sizes)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return small_task(tmp_path_factory.mktemp("task"))


# --- the judge


def test_the_start_judged_by_itself_has_no_kl(task: Task, tmp_path: Path) -> None:
    _, prompts = task.split(tmp_path)
    asked = {"start": task.model, "reward_model": task.reward_model, "prompts": str(prompts)}
    verdict = judging.judge(model=task.model, new_tokens=5, **asked)
    assert verdict["kl"] == 0.0
    assert verdict["answers"] == 6
    assert verdict == judging.judge(model=task.model, new_tokens=5, **asked)


def test_the_judge_s_kl_and_scores_are_those_of_plain_sums(task: Task, tmp_path: Path) -> None:
    """Row by row, without padding: log-probs of each token, the classifier on the text with EOS."""
    trained = AutoModelForCausalLM.from_pretrained(task.model)
    torch.manual_seed(4)
    with torch.no_grad():
        trained.model.embed_tokens.weight.add_(0.3 * torch.randn(320, 16))
    tokenizer, prompts = byte_tokenizer(), ["Why so?", "Why?"]
    tokenizer.padding_side = "left"
    torch.manual_seed(0)
    with torch.inference_mode():
        ids, attention, real = judging.sample(trained, tokenizer, prompts, 9)
        batched = judging.logprobs(trained, ids, attention)[:, -real.shape[1] :]
        for row, prompt in enumerate(prompts):
            alone = ids[row][attention[row].bool()]
            logits = trained(alone[None]).logits[0]
            new = len(alone) - len(tokenizer(prompt)["input_ids"])
            each = logits.log_softmax(-1)[:-1].gather(1, alone[1:, None]).squeeze(1)[-new:]
            assert new == int(real[row].sum())
            assert_close(batched[row][real[row]], each, rtol=1e-4, atol=1e-5)
        classifier = AutoModelForSequenceClassification.from_pretrained(task.reward_model)
        texts = ["Why so much?", "No."]
        ends = [[*tokenizer(t)["input_ids"], tokenizer.eos_token_id] for t in texts]
        expected = [float(classifier(torch.tensor([row])).logits[0, 0]) for row in ends]
        got = judging.score(classifier, tokenizer, texts)
    assert_close(got, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_an_answer_keeps_the_space_before_its_first_word(assets: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(assets / "stories260K", padding_side="left")
    inputs = tokenizer(
        ["Once upon a time there was", "A dog was"], return_tensors="pt", padding=True
    )
    kept = inputs["attention_mask"].bool()
    found = judging.answered(tokenizer, inputs["input_ids"], kept, new=2)
    assert found == [" there was", "g was"]


def test_an_answer_is_real_up_to_its_first_eos(monkeypatch: pytest.MonkeyPatch, task: Task) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(task.model)
    eos = tokenizer.eos_token_id
    drawn = [[9, 9, 9], [9, eos, eos], [eos, 9, 9]]

    def generate(input_ids: Any, **_: Any) -> Any:
        return torch.cat([input_ids, torch.tensor(drawn)], 1)

    model.generate = generate
    _, attention, real = judging.sample(model, tokenizer, ["a", "abc", "ab"], 3)
    assert real.tolist() == [[True] * 3, [True, True, False], [True, False, False]]
    assert attention[:, -3:].bool().tolist() == real.tolist()


def test_the_judge_knows_nothing_of_this_project() -> None:
    assert "ppo_lab" not in (HERE / "judge.py").read_text()


@pytest.mark.slow
def test_the_judge_runs_in_a_process_of_its_own(task: Task, tmp_path: Path) -> None:
    _, prompts = task.split(tmp_path)
    verdict = judge(task, Path(task.model), prompts, threads=1)
    assert verdict["kl"] == 0.0


# --- the frontier


def test_a_frontier_and_what_it_reaches_by_hand() -> None:
    best = report.frontier([(5.0, 3.0), (2.0, 2.0), (6.0, 2.5), (2.0, 1.0), (10.0, 3.5)])
    assert best == [(2.0, 2.0), (5.0, 3.0), (10.0, 3.5)]
    assert report.reached(best, 3.5) == 2.5
    assert report.reached(best, 5.0) == 3.0
    assert report.reached(best, 99.0) == 3.5
    assert report.reached(best, 1.0) == float("-inf")


def test_places_are_means_over_seeds_and_margins_against_all_others() -> None:
    runs = [
        {"contestant": name, "beta": 0.1, "seed": seed, "score": s, "kl": kl, "wall_s": 10.0 + seed}
        for name, seed, s, kl in (
            ("ppo_lab", 0, 3.0, 4.0),
            ("ppo_lab", 1, 3.2, 6.0),
            ("trl112", 0, 2.0, 4.0),
            ("rloo", 0, 3.0, 6.0),
        )
    ]
    found = {place.contestant: place for place in report.places(runs)}
    ours = found["ppo_lab"]
    assert (ours.score, ours.kl, ours.wall_s) == pytest.approx((3.1, 5.0, 10.5))
    assert (ours.score_sd, ours.kl_sd) == pytest.approx((0.02**0.5, 2**0.5))
    (line,) = report.margins(list(found.values()), "ppo_lab")
    assert "+0.60 against the others' frontier" in line
    console = Console(record=True, width=160)
    report.show({"runs": runs}, console, ours="ppo_lab")
    assert "3.10±0.14 at 5.0±1.4" in console.export_text()


# --- the runs


def test_contestants_take_turns() -> None:
    order = list(cells(["a", "b"], [0.1, 1.0], [0, 1]))
    assert [c.contestant for c in order] == ["a", "b"] * 4
    assert order[0] == Cell("a", 0.1, 0)
    assert order[-1] == Cell("b", 1.0, 1)


def test_judged_prompts_are_never_trained_on(task: Task, tmp_path: Path) -> None:
    train, judged = (set(file.read_text().splitlines()) for file in task.split(tmp_path))
    assert len(judged) == 6
    assert len(train) > 20
    assert not train & judged


def test_a_record_goes_on_and_refuses_other_work(task: Task, tmp_path: Path) -> None:
    file = tmp_path / "kept.json"
    record = Record(file, task, {})
    record.add(Cell("rloo", 0.3, 1), COST, VERDICT)
    again = Record(file, task, {})
    assert again.has(Cell("rloo", 0.3, 1))
    assert not again.has(Cell("rloo", 0.3, 2))
    other = Task(task.model, task.reward_model, task.prompts, iterations=3)
    with pytest.raises(RuntimeError, match="another task"):
        Record(file, other, {})


def test_a_file_that_is_no_record_is_left_alone(task: Task, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    for text in ("", "[]", '{"task": {}}'):
        file.write_text(text)
        with pytest.raises(RuntimeError, match="no record of this benchmark"):
            Record(file, task, {})


@pytest.mark.parametrize("which", ["start", "scorer"])
def test_another_model_of_the_same_shape_is_another_task(tmp_path: Path, which: str) -> None:
    task = small_task(tmp_path)
    before = task.fingerprint()
    assert task.fingerprint() == before
    (weights,) = (tmp_path / which).glob("*.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert task.fingerprint() != before


def test_a_run_that_was_not_kept_is_made_in_an_empty_folder(task: Task, tmp_path: Path) -> None:
    left = tmp_path / "ppo_lab-beta0.3-seed1" / "checkpoints"
    left.mkdir(parents=True)
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ntest -e {left} && echo something is left; exit 1\n")
    python.chmod(0o755)
    todo, record = iter([Cell("ppo_lab", 0.3, 1)]), Record(None, task, {})
    with pytest.raises(RuntimeError, match="ppo_lab failed") as failed:
        train_and_judge(
            *(todo, CONTESTANTS, task, {"ppo_lab": python}, record),
            folder=tmp_path,
            threads=1,
            say=print,
        )
    assert "something is left" not in str(failed.value)


def test_a_process_is_measured_and_its_failure_said() -> None:
    said, cost = run([sys.executable, "-c", "print(sum(range(10**6)))"], name="sum", threads=1)
    assert said.strip() == str(sum(range(10**6)))
    assert cost.wall_s >= 0.0
    assert 0 < cost.cpu_s < 60
    assert 0.001 < cost.peak_gb < 10
    with pytest.raises(RuntimeError, match=r"(?s)sum failed \(exit code 1\).*ZeroDivision"):
        run([sys.executable, "-c", "1/0"], name="sum", threads=1)


def test_every_contestant_has_its_worker_or_is_a_run_of_ours(task: Task, tmp_path: Path) -> None:
    scripts = {p.name.removesuffix("_worker.py") for p in (HERE / "workers").glob("*_worker.py")}
    assert scripts == {name for name, c in CONTESTANTS.items() if not c.is_ours}
    train, _ = task.split(tmp_path)
    spec = task.spec(prompts=train, beta=0.3, seed=1, threads=1) | {"output": str(tmp_path / "o")}
    for contestant in CONTESTANTS.values():
        if contestant.is_ours:
            assert refused(*overrides(spec), *contestant.overrides) == []


def test_a_variant_is_ours_with_more_overrides(task: Task, tmp_path: Path) -> None:
    found = variant("critic=head  ppo.lam=1")
    train, _ = task.split(tmp_path)
    spec = task.spec(prompts=train, beta=0.3, seed=1, threads=1) | {"output": str(tmp_path / "o")}
    plain = CONTESTANTS["ppo_lab"].command(Path("python"), spec)
    assert found.command(Path("python"), spec) == [*plain, "critic=head", "ppo.lam=1"]
    assert found.name == "ppo_lab critic=head ppo.lam=1"
    assert found.folder == "ppo_lab_critic_head_ppo.lam_1"


def test_a_wrong_variant_is_refused_before_anything_is_trained(
    task: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", task.model, "--reward-model", task.reward_model, "--prompts", task.prompts]
    kept = ["--folder", str(tmp_path / "runs"), "--json", str(tmp_path / "kept.json")]
    wrong = ["--variant", "ppo.lam=2 ppo.vf_coeff=1", "--variant", "ppo.lam=1"]
    assert main(["learning", *given, *kept, "--contestants", "none", *wrong]) == 1
    said = capsys.readouterr().out
    assert "ppo.lam=2" in said
    assert "did you mean ppo.vf_coef" in said
    assert not list(tmp_path.iterdir())


def test_the_benchmark_s_command_line_refuses_what_is_not_there(
    task: Task, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", task.model, "--reward-model", task.reward_model, "--prompts", task.prompts]
    asked = parser().parse_args(
        [*given, "--betas", "0.1,1", "--seeds", "3", "--contestants", "rloo"]
    )
    assert (asked.betas, asked.seeds, asked.contestants) == ([0.1, 1.0], [3], ["rloo"])
    for wrong in (
        ["--contestants", "trl113"],
        ["--model", "nowhere"],
        ["--prompts", "nowhere"],
        ["--betas", "low"],
        ["--seeds", "-1"],
        ["--iterations", "0"],
        ["--json", "/proc/nowhere/kept.json"],
    ):
        with pytest.raises(SystemExit):
            main(["learning", *given, *wrong])
        assert wrong[1] in capsys.readouterr().err


def test_names_of_any_length_leave_room_for_the_scores() -> None:
    said, name = io.StringIO(), "ppo_lab critic=head critic.learning_rate=0.003 ppo.vf_coef=0.01"
    runs = [
        {"contestant": c, "beta": b, "score": 3.25, "kl": 11.5, "wall_s": 9.0}
        for c in (name, "rloo")
        for b in (0.05, 0.3, 1.0)
    ]
    report.show({"runs": runs}, Console(file=said, width=80), ours="ppo_lab")
    table = said.getvalue().partition("against")[0].splitlines()[:-1]
    assert sum(line.count("3.25 at 11.5") for line in table) == 6
    assert "…" not in said.getvalue()
