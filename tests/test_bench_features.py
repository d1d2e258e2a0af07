"""How much a linear head could know: planted, on unseen answers, of the right tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bench_learning import small_task
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ppo_lab.bench.command import main
from ppo_lab.bench.features import Answers, collect, explained
from ppo_lab.bench.learning import judge as judging
from ppo_lab.bench.learning.task import Task, prompts_in
from ppo_lab.models.byte_tokenizer import byte_tokenizer


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return small_task(tmp_path_factory.mktemp("task"))


def answers(states: Tensor, scores: Tensor, tokens: int) -> Answers:
    """Answers of so many tokens each, the last of them late."""
    of = torch.arange(len(scores)).repeat_interleave(tokens)
    late = (torch.arange(tokens) == tokens - 1).repeat(len(scores))
    return Answers(scores, {"planted": states}, of, late)


def test_what_states_hold_of_the_score_is_explained() -> None:
    """The states of late tokens hold it all, those of the others nothing."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(400, generator=generator)
    states = torch.randn(1600, 3, generator=generator)
    found = answers(states, scores, 4)
    states[:, 1] = torch.where(found.late, scores[found.of], 0.0)
    states[:, 2] = found.late.float()
    every, late = explained(states, found, seed=0)
    assert late > 0.99
    assert abs(every - 0.25) < 0.05


def test_states_that_tell_answers_apart_explain_nothing_of_unseen_ones() -> None:
    """One number for each answer: tokens of one answer are never on both sides of the split."""
    scores = torch.randn(60, generator=torch.Generator().manual_seed(1))
    states = torch.eye(60).repeat_interleave(4, 0)
    share, _ = explained(states, answers(states, scores, 4), seed=0)
    assert share < 0.05


def test_the_share_is_of_the_variance() -> None:
    """Scores of a known and an unknown part, four to one in variance."""
    generator = torch.Generator().manual_seed(2)
    known, unknown = torch.randn(2, 4000, generator=generator)
    states = known[:, None]
    share, late = explained(states, answers(states, 2.0 * known + unknown + 7.0, 1), seed=0)
    assert abs(share - 0.8) < 0.03
    assert late == share


def test_each_token_is_given_the_states_that_predicted_it(task: Task) -> None:
    prompts = prompts_in(Path(task.prompts))[:5]
    with torch.inference_mode():
        found = collect(Path(task.model), Path(task.reward_model), prompts, new_tokens=6, seed=3)
        torch.manual_seed(3)
        tokenizer = byte_tokenizer()
        tokenizer.padding_side = "left"
        model = AutoModelForCausalLM.from_pretrained(task.model)
        ids, attention, real = judging.sample(model, tokenizer, prompts, 6)
        classifier = AutoModelForSequenceClassification.from_pretrained(task.reward_model)
        assert len(found.of) == int(real.sum())
        for row, prompt in enumerate(prompts):
            alone = ids[row][attention[row].bool()][None]
            first = len(tokenizer(prompt)["input_ids"]) - 1
            states = model(alone, output_hidden_states=True).hidden_states
            mine = found.of == row
            for name, expected in (
                ("embeddings", states[0]),
                ("after layer 1", states[1]),
                ("reward model", classifier.model(alone).last_hidden_state),
            ):
                given = found.states[name][mine]
                assert_close(given, expected[0, first:-1], rtol=1e-4, atol=1e-5)
            late = torch.arange(len(alone[0]) - 1 - first) >= 4.5
            assert found.late[mine].tolist() == late.tolist()


def test_the_table_is_shown_and_kept(
    task: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", task.model, "--reward-model", task.reward_model, "--prompts", task.prompts]
    given += ["--json", str(tmp_path / "kept.json")]
    assert main(["features", *given, "--new-tokens", "4", "--threads", "1"]) == 0
    kept = json.loads((tmp_path / "kept.json").read_text())
    shares = kept["explained of all and of late tokens, by split"]
    assert {"date", "machine", "versions", "git_commit"} <= kept.keys()
    assert list(shares) == ["embeddings", "after layer 1", "after layer 2", "reward model"]
    assert (kept["answers"], kept["tokens"]) == (40, 160)
    said = capsys.readouterr().out
    assert "reward model" in said
    assert "after layer 2" in said
    assert "40 answers of 160 tokens" in said
    assert max(map(len, said.splitlines())) <= 80


def test_too_few_prompts_are_refused(
    task: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "Why?"}\n' * 30)
    given = ["--model", task.model, "--reward-model", task.reward_model, "--prompts", str(few)]
    assert main(["features", *given]) == 1
    assert "1 distinct prompts; needs 16" in capsys.readouterr().out


def test_a_reward_model_of_another_vocabulary_is_refused(
    task: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other: Any = byte_tokenizer()
    other.add_tokens(["more"])
    AutoModelForSequenceClassification.from_pretrained(task.reward_model).save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    given = ["--model", task.model, "--reward-model", str(tmp_path), "--prompts", task.prompts]
    assert main(["features", *given, "--threads", "1"]) == 1
    assert "another vocabulary" in capsys.readouterr().out
