"""The embedded help desk: its text, its gold rules, its cache, and a small build of its models."""

from __future__ import annotations

import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from ppo_lab import embedded
from ppo_lab.assembly import gold_scorer
from ppo_lab.config import Config, EmbeddedData, FileData
from ppo_lab.embedded.answers import KINDS, answer
from ppo_lab.embedded.cache import built, cache_folder, fingerprint
from ppo_lab.embedded.corpus import preference_rows, sft_rows
from ppo_lab.embedded.grammar import TOPICS
from ppo_lab.embedded.questions import questions, topic_of
from ppo_lab.embedded.rules import gold_score
from ppo_lab.errors import ConfigError

RESET = "How do I reset my password?"
HELPFUL = " Thank you for asking. You can click on the reset link."


def test_customers_ask_how_to_reset_their_password() -> None:
    assert RESET in embedded.prompts("train")


def test_thousands_of_questions_are_distinct_and_none_is_in_both_splits() -> None:
    train, held_out = embedded.prompts("train"), embedded.prompts("held_out")
    assert len(set(train)) == len(train) > 5000
    assert len(set(held_out)) == len(held_out) > 500
    assert not set(train) & set(held_out)


def test_the_first_prompts_are_a_fair_sample_of_the_topics() -> None:
    for split in ("train", "held_out"):
        assert len({q.topic for q in questions(split)[:64]}) > len(TOPICS) * 0.8


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="held_out"):
        embedded.prompts("test")


def test_every_topic_is_settled_by_a_key_of_its_own() -> None:
    keys = [topic.key for topic in TOPICS]
    assert len(set(keys)) == len(keys)
    for topic in TOPICS:
        assert all(topic.key in step for step in topic.steps)
        assert all(
            other.key not in step for other in TOPICS for step in topic.steps if other is not topic
        )


def test_every_question_is_understood_by_its_task_alone() -> None:
    for split in ("train", "held_out"):
        assert all(topic_of(f"{q.text} Thanks!") is q.topic for q in questions(split))


def test_the_clerks_say_thousands_of_different_things() -> None:
    said = [row["completion"] for row in sft_rows(6000, split="train", seed=0)]
    assert len(set(said)) > 3000
    assert all(text.startswith(" ") and text == text.rstrip() for text in said)


def test_the_same_seed_gives_the_same_corpora_and_another_seed_others() -> None:
    for rows in (sft_rows, preference_rows):
        assert rows(50, split="train", seed=3) == rows(50, split="train", seed=3)
        assert rows(50, split="train", seed=3) != rows(50, split="train", seed=4)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (" You can click on the reset link.", 2.0),
        (HELPFUL, 2.6),
        (HELPFUL + " It takes two minutes.", 2.9),
        (" You can fill in the refund form.", -1.0),
        (" Figure it out yourself.", -1.2),
        (" You can click on the reset link", 1.0),
        (" No.", -0.8),
        ("", -1.8),
    ],
)
def test_gold_scores_are_the_sums_of_their_rules(completion: str, expected: float) -> None:
    assert embedded.gold([RESET], [completion]) == pytest.approx([expected])


def test_gold_is_the_same_of_a_question_that_is_a_chat() -> None:
    """As data.chat=true makes of it, for a policy with a chat template."""
    score = gold_scorer(Config(data=EmbeddedData(chat=True)))
    assert score is not None
    asked = [RESET, [{"role": "user", "content": RESET}]]
    assert len(set(score(asked, [HELPFUL] * 2))) == 1
    assert score(asked, [HELPFUL] * 2)[0] > 2.0
    assert gold_scorer(Config(data=FileData())) is None


def test_gold_tires_of_thanks_and_of_repetition() -> None:
    thanks = [" Thank you for asking.", " We are glad to help you.", " Have a nice day!"]
    more = [
        "",
        *("".join(thanks[:n]) for n in (1, 2, 3)),
        "".join(thanks) + " You are very welcome.",
    ]
    scores = embedded.gold([RESET] * 5, [HELPFUL + said for said in more])
    assert scores[4] < scores[3] < scores[2] < scores[0]
    assert gold_score(RESET, HELPFUL * 2) < gold_score(RESET, HELPFUL) - 2.0


def test_gold_ranks_the_kinds_of_answers_as_people_would() -> None:
    rng = Random(0)
    asked = rng.choices(questions("train"), k=200)
    mean = {
        kind: statistics.mean(gold_score(q.text, answer(q, rng, {kind: 1.0}).text) for q in asked)
        for kind in KINDS
    }
    assert mean["helpful"] > mean["plain"] > mean["grudging"] > mean["vague"] > mean["rude"]
    assert mean["helpful"] > mean["gushing"] + 1.0


def test_annotators_agree_with_gold_on_most_pairs_but_prefer_gushing_answers() -> None:
    rows = preference_rows(1500, split="train", seed=0)
    chosen = embedded.gold([r["prompt"] for r in rows], [r["chosen"] for r in rows])
    rejected = embedded.gold([r["prompt"] for r in rows], [r["rejected"] for r in rows])
    agreed = statistics.mean(c > r for c, r in zip(chosen, rejected, strict=True))
    assert 0.6 < agreed < 0.9


def test_the_cache_is_where_the_variable_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PPO_LAB_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path


def test_a_changed_source_changes_the_fingerprint(tmp_path: Path) -> None:
    source = tmp_path / "a.py"
    source.write_text("x = 1\n")
    before = fingerprint([source], packages=["torch"])
    assert fingerprint([source], packages=["torch"]) == before
    source.write_text("x = 2\n")
    assert fingerprint([source], packages=["torch"]) != before


def test_two_that_start_together_build_once(tmp_path: Path) -> None:
    times: list[int] = []

    def build(folder: Path) -> None:
        times.append(1)
        (folder / "done").write_text("yes")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: built(tmp_path / "made", build), range(4)))
    assert len(times) == 1
    assert (tmp_path / "made" / "done").read_text() == "yes"


def test_a_build_that_fails_leaves_nothing_and_the_next_one_works(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise RuntimeError("no space left")

    with pytest.raises(RuntimeError, match="no space"):
        built(tmp_path / "made", fail)
    assert not [entry for entry in tmp_path.iterdir() if entry.is_dir()]
    built(tmp_path / "made", lambda folder: None)
    assert (tmp_path / "made").is_dir()


def test_what_a_build_left_that_was_killed_goes_with_the_next_one(tmp_path: Path) -> None:
    (tmp_path / ".made-k1ll3d/policy").mkdir(parents=True)
    (tmp_path / ".other-k1ll3d").mkdir()
    built(tmp_path / "made", lambda folder: None)
    assert {entry.name for entry in tmp_path.iterdir() if entry.is_dir()} == {
        "made",
        ".other-k1ll3d",
    }


def test_building_anew_replaces_what_was_there(tmp_path: Path) -> None:
    built(tmp_path / "made", lambda folder: (folder / "old").touch())
    built(tmp_path / "made", lambda folder: (folder / "new").touch(), anew=True)
    assert [entry.name for entry in (tmp_path / "made").iterdir()] == ["new"]
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir()] == ["made"]


def test_a_cache_that_cannot_be_written_is_refused_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PPO_LAB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match=r"PPO_LAB_CACHE=.*/file is a file; must be a folder"):
        embedded.policy_path()
    assert "Building" not in capsys.readouterr().err


@pytest.fixture(scope="module")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded models by a recipe of seconds."""
    from ppo_lab.embedded.build import Recipe, build
    from ppo_lab.stages.config import FitSection

    folder = tmp_path_factory.mktemp("world")
    fit = FitSection(batch_size=16, learning_rate=1e-2, max_length=128)
    build(
        folder,
        Recipe(hidden_size=32, sft_examples=320, pairs=320, held_out=64, sft=fit, reward=fit),
    )
    return folder


def test_the_stages_learn_and_report(small_world: Path) -> None:
    report = json.loads((small_world / "report.json").read_text())
    assert report["policy"]["held_out_loss"] < report["policy"]["held_out_loss_before"] - 0.5
    assert 0.0 <= report["reward"]["held_out_accuracy"] <= 1.0


def test_the_policy_is_a_bloom_whose_special_tokens_differ(small_world: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_world / "policy")
    model = AutoModelForCausalLM.from_pretrained(small_world / "policy")
    assert model.config.model_type == "bloom"
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer(RESET + HELPFUL).input_ids) == RESET + HELPFUL


def test_the_reward_model_forgives_how_prompt_and_completion_are_joined(small_world: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_world / "reward")
    said = HELPFUL.strip()
    joined = [
        tokenizer(RESET + gap + said + end).input_ids
        for gap in ("", " ", "\n", "  ")
        for end in ("", " ")
    ]
    assert all(ids == joined[0] for ids in joined)
    assert tokenizer(RESET + " " + said + " </s>").input_ids == [*joined[0], tokenizer.eos_token_id]


def test_reward_scores_are_in_standard_deviations_of_the_clerks_answers(small_world: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_world / "reward")
    model = AutoModelForSequenceClassification.from_pretrained(small_world / "reward")
    rows = sft_rows(64, split="held_out", seed=0)
    texts = [row["prompt"] + row["completion"] + tokenizer.eos_token for row in rows]
    with torch.inference_mode():
        scores = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    assert scores.std().item() == pytest.approx(1.0, abs=1e-3)
