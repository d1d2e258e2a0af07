"""The stages before PPO: what they read, what they refuse, and what they leave behind."""

from __future__ import annotations

import csv
import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hydra import compose, initialize_config_dir
from tiny_models import tokenizer

from ppo_lab.config import LoraSection, ModelSection, conf_folder, register_schema
from ppo_lab.errors import ConfigError
from ppo_lab.models.byte_tokenizer import BYTE_VOCABULARY
from ppo_lab.rewards.classifier import Classifier
from ppo_lab.rewards.conversation import joined
from ppo_lab.stages.config import (
    FitSection,
    PairDataSection,
    RewardModelConfig,
    SFTConfig,
    SFTDataSection,
    register_stages,
)
from ppo_lab.stages.examples import (
    chat_template,
    data_problems,
    merging_prompts,
    read_rows,
    split_rows,
)
from ppo_lab.stages.fitting import begun
from ppo_lab.stages.jobs import problems, run_reward_model, run_sft

CHAT = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
STORIES = "story_preferences"
FIT = FitSection(batch_size=8, learning_rate=5e-3, max_length=96)


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_the_format_follows_from_the_columns(tmp_path: Path) -> None:
    for row in (
        {"text": "a"},
        {"prompt": "a", "completion": " b"},
        {"text": "a", "prompt": "p", "completion": "c"},
    ):
        path = write(tmp_path, [row])
        wanted = row if "completion" not in row else {k: row[k] for k in ("prompt", "completion")}
        assert read_rows(SFTDataSection(path=path), render=str, seed=0) == [wanted]


def test_a_chat_stays_a_chat_or_becomes_lines_of_text(tmp_path: Path) -> None:
    section = SFTDataSection(path=write(tmp_path, [{"messages": CHAT}]))
    assert read_rows(section, render=str, seed=0) == [{"messages": CHAT}]
    assert read_rows(section, render=None, seed=0) == [{"text": "Hi?\nYes."}]


def test_compared_chats_become_text_as_rewards_read_them(tmp_path: Path) -> None:
    row = {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": "No."}
    section = PairDataSection(path=write(tmp_path, [row]))
    assert read_rows(section, render=None, seed=0) == [
        {"prompt": "Hi?\n", "chosen": "Yes.", "rejected": "No."}
    ]


def test_chats_as_json_in_a_csv_file_are_the_chats_that_they_hold(tmp_path: Path) -> None:
    """As `data=file` of a run reads them: policy and reward model would else see other texts."""
    file = tmp_path / "rows.csv"
    worse = [{"role": "assistant", "content": "No."}]
    rows: list[tuple[Any, dict[str, Any]]] = [
        (SFTDataSection, {"messages": CHAT}),
        (SFTDataSection, {"prompt": CHAT[:1], "completion": CHAT[1:]}),
        (PairDataSection, {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": worse}),
    ]
    for section, row in rows:
        with file.open("w", newline="") as out:
            csv.writer(out).writerows([list(row), [json.dumps(chat) for chat in row.values()]])
        assert read_rows(section(path=str(file)), render=str, seed=0) == [row]
    file.write_text("messages\nHi?\n")
    with pytest.raises(ConfigError, match=r"row 1 of column messages holds 'Hi\?'; must be a list"):
        read_rows(SFTDataSection(path=str(file)), render=str, seed=0)


def test_answers_that_are_whole_conversations_lose_their_prompt(tmp_path: Path) -> None:
    """As in UltraFeedback."""
    other = [CHAT[0], {"role": "assistant", "content": "No."}]
    for prompt in ("Hi?", CHAT[:1]):
        row = {"prompt": prompt, "chosen": CHAT, "rejected": other}
        section = PairDataSection(path=write(tmp_path, [row]))
        (found,) = read_rows(section, render=str, seed=0)
        assert found == {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": other[1:]}
    strange = [{"role": "user", "content": "Ho?"}, *CHAT[1:]]
    for answer, problem in (
        (strange, "does not go on from its prompt"),
        (CHAT[:1], "does not go on from its prompt"),
    ):
        row = {"prompt": "Hi?", "chosen": CHAT, "rejected": answer}
        section = PairDataSection(path=write(tmp_path, [row]))
        with pytest.raises(ConfigError, match=f"row 1: the rejected answer {problem}"):
            read_rows(section, render=str, seed=0)


def test_an_answer_that_its_prompt_begins_is_one_message(tmp_path: Path) -> None:
    """As PPO has it go on, and shows it to a reward model: two messages would be another text."""
    begun = [CHAT[0], {"role": "assistant", "content": "Well, "}]
    no = {"role": "assistant", "content": "Well, no."}
    whole = [*begun, {"role": "assistant", "content": "no."}]
    for answer in ("no.", whole[2:], whole):
        row = {"prompt": begun, "chosen": answer, "rejected": "yes."}
        section = PairDataSection(path=write(tmp_path, [row]))
        (found,) = read_rows(section, render=str, seed=0)
        assert (found["prompt"], found["chosen"]) == (CHAT[:1], [no])
        assert found["rejected"] == [{"role": "assistant", "content": "Well, yes."}]
        (plain,) = read_rows(section, render=None, seed=0)
        assert plain["prompt"] + plain["chosen"] == joined(CHAT[:1], "Well, no.")
    row = {"prompt": begun, "completion": "no."}
    section = SFTDataSection(path=write(tmp_path, [row]))
    assert read_rows(section, render=str, seed=0) == [{"prompt": CHAT[:1], "completion": [no]}]


def test_no_row_is_trained_on_and_held_out(caplog: pytest.LogCaptureFixture) -> None:
    """Of 24 rows three times over: a held-out row's copies would be learnt by heart."""
    rows = [{"prompt": f"p{i % 24}", "chosen": "a", "rejected": "b"} for i in range(72)]
    train, held_out = split_rows(rows, 0.25)
    assert len(held_out) == 18 == len({row["prompt"] for row in held_out})
    assert len(train) == 72 - 3 * 18
    assert not [row for row in train if row in held_out]
    assert "36 rows that are held out too are not trained on" in caplog.text
    assert split_rows(rows, 0) == (rows, [])
    assert len(split_rows(rows, 0.001)[1]) == 1
    with pytest.raises(ConfigError, match="of 72 rows, 24 of them distinct, none"):
        split_rows(rows, 24)


def test_a_chat_in_the_column_of_texts_is_a_chat(tmp_path: Path) -> None:
    section = SFTDataSection(path=write(tmp_path, [{"text": CHAT}, {"text": CHAT[:2]}]))
    assert {len(row["messages"]) for row in read_rows(section, render=str, seed=0)} == {
        len(CHAT),
        2,
    }
    assert all(isinstance(row["text"], str) for row in read_rows(section, render=None, seed=0))


def test_prompts_that_end_within_a_token_are_counted(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"Once {i}: ", "completion": "upon a time"} for i in range(12)]
    config = SFTConfig(
        model=ModelSection(path=str(assets / "stories260K")),
        lora=LoraSection(r=0),
        data=SFTDataSection(path=write(tmp_path, rows), held_out=2),
        fit=FitSection(epochs=0.1),
        device="cpu",
    )
    run_sft(config, tmp_path / "a", [])
    assert "10 of 10 end within a token" in capsys.readouterr().out
    apart = [{"prompt": row["prompt"][:-1], "completion": " upon a time"} for row in rows]
    write(tmp_path, apart)
    run_sft(config, tmp_path / "b", [])
    assert "within a token" not in capsys.readouterr().out
    chats = [{"prompt": CHAT[:1], "completion": CHAT[1:2]}, {"text": "a"}]
    assert merging_prompts(chats, tokenizer()) == 0


def test_pairs_that_share_answers_are_on_one_side_of_the_split(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = [
        {"prompt": f"{prompt}", "chosen": f"{better}", "rejected": f"{worse}"}
        for better, worse in ((0, 1), (0, 2), (1, 2))
        for prompt in range(10)
    ]
    train, held_out = split_rows(rows, 10)
    assert (len(held_out), len(train)) == (9, 21)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert not caplog.messages
    train, held_out = split_rows([{**row, "prompt": "", "id": i} for i, row in enumerate(rows)], 10)
    assert (len(held_out), len(train)) == (10, 20)
    assert caplog.messages == [
        "data: prompts are few, and some answers held out are trained on too"
    ]


def test_pairs_of_the_same_answer_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    same = {"prompt": "One day", "chosen": " a cat", "rejected": " a cat"}
    rows = [same, {**same, "rejected": " a dog"}, {**same, "rejected": " a cow"}]
    section = PairDataSection(path=write(tmp_path, rows), limit=2)
    read = read_rows(section, render=None, seed=0)
    assert {row["rejected"] for row in read} == {" a dog", " a cow"}
    assert caplog.messages == ["data: 1 pairs are left out, whose two answers are the same"]
    write(tmp_path, [same])
    with pytest.raises(ConfigError, match="of every pair is the rejected one"):
        read_rows(section, render=None, seed=0)


def test_half_a_surrogate_pair_is_replaced_as_in_a_run(tmp_path: Path) -> None:
    from datasets import Dataset

    half = "a \ud83d b"
    rows = [{"prompt": half, "completion": half}]
    rows.append({"prompt": [{"role": "user", "content": half}], "completion": half})  # type: ignore[dict-item]
    for row in rows:
        section = SFTDataSection(path=write(tmp_path, [row]))
        found = read_rows(section, render=str, seed=0)
        assert Dataset.from_list(found)[0]
        assert "a \ufffd b" in str(found)
        assert "\\ud83d" not in repr(found)


def test_texts_and_chats_are_not_mixed(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}] * 2
    rows.append({"prompt": CHAT[:1], "completion": "b"})
    section = SFTDataSection(path=write(tmp_path, rows))
    with pytest.raises(ConfigError, match="row 3 is a chat, and those before it are not"):
        read_rows(section, render=str, seed=0)
    assert len(read_rows(section, render=None, seed=0)) == 3


def test_a_row_whose_chat_a_template_refuses_is_named(tmp_path: Path) -> None:
    words = tokenizer()
    words.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    render = chat_template(words)
    system = [{"role": "system", "content": "Be kind."}, *CHAT]
    pair = {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": "No."}
    for rows, kind, part in (
        ([{"messages": CHAT}] * 3 + [{"messages": system}], SFTDataSection, "messages"),
        ([pair] * 3 + [{**pair, "prompt": system[:2]}], PairDataSection, "prompt"),
    ):
        section = kind(path=write(tmp_path, rows))
        with pytest.raises(ConfigError, match=rf"row 4: .*refuses its {part}: System role not"):
            read_rows(section, render=render, seed=0)
        assert len(read_rows(section, render=None, seed=0)) == 4
        write(tmp_path, rows[:3])
        assert len(read_rows(section, render=render, seed=0)) == 3


def test_answers_are_rendered_behind_their_prompt(tmp_path: Path) -> None:
    words, row = tokenizer(), {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": "No."}
    words.chat_template = (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    )
    section = PairDataSection(path=write(tmp_path, [row]))
    assert len(read_rows(section, render=chat_template(words), seed=0)) == 1
    assert chat_template(tokenizer()) is None


def test_a_row_without_text_is_named(tmp_path: Path) -> None:
    section = SFTDataSection(path=write(tmp_path, [{"text": "a"}, {"text": None}]))
    with pytest.raises(ConfigError, match="row 2 of column text"):
        read_rows(section, render=str, seed=0)


def test_a_missing_column_is_named_with_the_nearest(tmp_path: Path) -> None:
    section = PairDataSection(
        path=write(tmp_path, [{"prompt": "a", "chosn": "b", "rejected": "c"}])
    )
    (problem,) = data_problems(section)
    assert "data.chosen_column=chosen" in problem
    assert "chosn?" in problem


def test_the_split_keeps_every_row_once_and_refuses_to_keep_none() -> None:
    rows = [{"text": str(i)} for i in range(10)]
    train, held_out = split_rows(rows, 0.2)
    assert (len(train), len(held_out)) == (8, 2)
    assert sorted(r["text"] for r in train + held_out) == sorted(r["text"] for r in rows)
    assert len(split_rows(rows, 3)[1]) == 3
    with pytest.raises(ConfigError, match=r"data\.held_out"):
        split_rows(rows, 10)


def test_what_a_stage_does_not_read_is_refused(tmp_path: Path) -> None:
    config = SFTConfig(
        model=ModelSection(path="owner/name", load_in_4bit=True),
        lora=LoraSection(r=0),
        data=SFTDataSection(path=write(tmp_path, [{"text": "a"}])),
        fit=FitSection(epochs=0),
        output=str(tmp_path),
    )
    found = problems(config, {"ppo.steps", "lora.alpha", "critic.v_head_init"})
    for key in ("fit.epochs", "load_in_4bit", "output", "ppo.steps", "lora.alpha", "v_head_init"):
        assert any(key in line for line in found), key
    assert len(found) == 6


def test_several_processes_are_refused_a_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = SFTDataSection(path=write(tmp_path, [{"text": "a"}]))
    config = SFTConfig(model=ModelSection(path="owner/name"), data=data)
    assert problems(config) == []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    (found,) = problems(config)
    assert "several processes" in found


@pytest.mark.parametrize("output", ["/proc/1/model", "rows.jsonl/model", "rows.jsonl"])
def test_an_output_that_cannot_be_made_is_refused_before_anything_is_loaded(
    output: str, tmp_path: Path
) -> None:
    config = SFTConfig(
        model=ModelSection(path="owner/name"),
        data=SFTDataSection(path=write(tmp_path, [{"text": "a"}])),
        output=str(tmp_path / output),
    )
    (line,) = problems(config)
    assert line.startswith(f"output={config.output}: ")


@pytest.mark.parametrize("rank", [0, 4])
def test_sft_on_real_data_lowers_the_loss_and_leaves_a_model(
    assets: Path, tmp_path: Path, rank: int
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = SFTConfig(
        model=ModelSection(path=str(assets / "stories260K")),
        lora=LoraSection(r=rank),
        data=SFTDataSection(path=str(assets / "data/sentence_polarity.jsonl"), limit=120),
        fit=FIT,
        device="cpu",
    )
    run_sft(config, tmp_path, [])
    report = json.loads((tmp_path / "model/report.json").read_text())
    assert report["held_out_loss"] < report["held_out_loss_before"] - 0.1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    assert AutoTokenizer.from_pretrained(tmp_path / "model").eos_token == "<s>"


def test_the_held_out_loss_counts_tokens_whatever_the_batch_size(
    assets: Path, tmp_path: Path
) -> None:
    """Recomputed text by text from the saved model, where lengths differ widely."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [
        {"prompt": "Once", "completion": " upon a time" * (i if i % 2 else 20 + i)}
        for i in range(16)
    ]
    section = SFTDataSection(path=write(tmp_path, rows), held_out=12)
    found = []
    for size in (1, 5):
        config = SFTConfig(
            model=ModelSection(path=str(assets / "stories260K")),
            lora=LoraSection(r=0),
            data=section,
            fit=FitSection(batch_size=size, learning_rate=1e-12, max_length=256),
            output=str(tmp_path / f"model-{size}"),
            device="cpu",
        )
        run_sft(config, tmp_path, [])
        report = json.loads((tmp_path / f"model-{size}/report.json").read_text())
        found += [report["held_out_loss_before"], report["held_out_loss"]]
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model-1").eval()
    words: Any = AutoTokenizer.from_pretrained(tmp_path / "model-1")
    _, held_out = split_rows(read_rows(section, render=None, seed=0), 12)
    nats = tokens = 0.0
    for row in held_out:
        start = len(words(row["prompt"])["input_ids"])
        ids = torch.tensor(words(row["prompt"] + row["completion"] + words.eos_token)["input_ids"])
        with torch.no_grad():
            logits = model(ids[None]).logits[0, start - 1 : -1]
        nats += float(torch.nn.functional.cross_entropy(logits, ids[start:], reduction="sum"))
        tokens += len(ids) - start
    assert found == pytest.approx([nats / tokens] * 4, rel=1e-5)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_reward_model_learns_which_stories_are_happier(
    assets: Path, tmp_path: Path, rank: int
) -> None:
    from transformers import AutoModelForSequenceClassification

    config = RewardModelConfig(
        model=ModelSection(path=str(assets / "stories260K")),
        lora=LoraSection(r=rank),
        data=PairDataSection(
            path=str(assets / "data/story_preferences.jsonl"), limit=320, held_out=64
        ),
        fit=FIT,
        device="cpu",
    )
    accuracy = run_reward_model(config, tmp_path, [])
    assert accuracy > 0.65
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not loaded[1]["missing_keys"]
    assert loaded[0].config.num_labels == 1


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("stage", ["sft", "reward_model"])
def test_a_full_disk_is_a_message_and_leaves_nothing_half(
    assets: Path, tmp_path: Path, stage: str, exists: bool
) -> None:
    out = tmp_path / "out"
    if exists:
        out.mkdir()
    shared: dict[str, Any] = {
        "model": ModelSection(path=str(assets / "stories260K")),
        "lora": LoraSection(r=0),
        "fit": FitSection(epochs=0.1, max_length=96),
        "device": "cpu",
        "output": str(out),
    }
    texts, pairs = (str(assets / f"data/{n}.jsonl") for n in ("sentence_polarity", STORIES))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"out: cannot be written \(.*nothing was kept"):
            if stage == "sft":
                data = SFTDataSection(path=texts, limit=20)
                run_sft(SFTConfig(**shared, data=data), tmp_path, [])
            else:
                pair_data = PairDataSection(path=pairs, limit=20)
                run_reward_model(RewardModelConfig(**shared, data=pair_data), tmp_path, [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [entry.name for entry in tmp_path.iterdir()] == (["out"] if exists else [])
    assert not exists or not list(out.iterdir())


def test_an_architecture_that_cannot_do_what_is_asked_is_told_so(tmp_path: Path) -> None:
    sizes = {"n_embd": 16, "dff": 32, "n_layer": 1, "n_head": 2, "hidden_size": 16}
    sizes |= {"num_hidden_layers": 1, "vocab_size": BYTE_VOCABULARY}
    for kind in ("ctrl", "mamba"):
        config = transformers.AutoConfig.for_model(kind, **sizes)
        config.save_pretrained(tmp_path / kind)
    fit = FitSection(gradient_checkpointing=True)
    data = PairDataSection(path=write(tmp_path, [{"chosen": "a", "rejected": "b"}] * 4), held_out=0)
    for kind, problem in (
        ("ctrl", r"^fit\.gradient_checkpointing=true: this architecture"),
        ("mamba", r"^model\.path=.*mamba: transformers has no sequence classifier of mamba"),
    ):
        model = ModelSection(path=str(tmp_path / kind), weights="random")
        asked = RewardModelConfig(model=model, data=data, fit=fit, lora=LoraSection(r=0))
        with pytest.raises(ConfigError, match=problem):
            run_reward_model(asked, tmp_path, [])


def test_pairs_that_are_all_too_long_are_refused(assets: Path, tmp_path: Path) -> None:
    config = RewardModelConfig(
        model=ModelSection(path=str(assets / "stories260K")),
        lora=LoraSection(r=0),
        data=PairDataSection(path=str(assets / "data/story_preferences.jsonl"), limit=20),
        fit=FitSection(max_length=4),
        device="cpu",
    )
    with pytest.raises(ConfigError, match=r"fit\.max_length=4"):
        run_reward_model(config, tmp_path, [])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_stage_of_one_step_learns(assets: Path, tmp_path: Path, schedule: str) -> None:
    config = SFTConfig(
        model=ModelSection(path=str(assets / "stories260K")),
        lora=LoraSection(r=0),
        data=SFTDataSection(path=str(assets / "data/sentence_polarity.jsonl"), limit=12),
        fit=FitSection(learning_rate=5e-3, max_length=96, lr_schedule=schedule),
        device="cpu",
    )
    run_sft(config, tmp_path, [])
    report = json.loads((tmp_path / "model/report.json").read_text())
    assert report["steps"] == 1
    assert report["held_out_loss"] < report["held_out_loss_before"] - 0.01


def prompted(assets: Path, folder: Path, lengths: list[int]) -> SFTConfig:
    """A stage of prompts of so many words, at 64 tokens an example."""
    rows = [
        {"prompt": "once " * n, "completion": f"upon a time {i}"} for i, n in enumerate(lengths)
    ]
    return SFTConfig(
        model=ModelSection(path=str(assets / "stories260K")),
        lora=LoraSection(r=0),
        data=SFTDataSection(path=write(folder, rows), held_out=4),
        fit=FitSection(max_length=64),
        device="cpu",
    )


def test_prompts_that_are_all_too_long_are_refused(assets: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"fit\.max_length=64: all 20 prompts to train on"):
        run_sft(prompted(assets, tmp_path, [200] * 24), tmp_path, [])
    assert not (tmp_path / "model").exists()


def test_prompts_that_are_too_long_are_counted_and_not_as_examples(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_sft(prompted(assets, tmp_path, [3, 3, 200] * 8), tmp_path, [])
    report = json.loads((tmp_path / "model/report.json").read_text())
    assert report["examples_too_long"] > 0
    assert report["examples"] + report["examples_too_long"] == 20
    assert report["examples"] + report["held_out"] == 16
    assert f"{report['examples_too_long']} prompts as long as" in capsys.readouterr().out


@pytest.mark.parametrize("r", [0, 2])
def test_a_model_that_is_an_adapter_is_fine_tuned_on(assets: Path, tmp_path: Path, r: int) -> None:
    from ppo_lab.models.loading import load_causal_lm
    from ppo_lab.models.lora import wrap_lora

    config = prompted(assets, tmp_path, [3] * 24)
    wrapped = wrap_lora(load_causal_lm(config.model, device="cpu"), LoraSection(r=4))
    wrapped.save_pretrained(tmp_path / "adapter")
    config.model, config.lora = ModelSection(path=str(tmp_path / "adapter")), LoraSection(r=r)
    config.model.tokenizer = str(assets / "stories260K")
    run_sft(config, tmp_path, [])
    report = json.loads((tmp_path / "model/report.json").read_text())
    assert report["held_out_loss"] < report["held_out_loss_before"]


@pytest.mark.parametrize("stage", ["sft", "reward_model"])
def test_an_adapter_alone_learns_faster_by_its_factor(
    assets: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    rates: dict[str, float] = {}

    def watch(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        names = {id(p): name for name, p in trainer.model.named_parameters()}
        for group in trainer.optimizer.param_groups:
            rates.update({names[id(p)]: group["initial_lr"] for p in group["params"]})
        return step(trainer, *args, **kwargs)

    step = Trainer.training_step
    monkeypatch.setattr(Trainer, "training_step", watch)
    shared: dict[str, Any] = {
        "model": ModelSection(path=str(assets / "stories260K")),
        "lora": LoraSection(r=2, learning_rate_factor=10),
        "fit": FitSection(learning_rate=1e-3, max_length=96),
        "device": "cpu",
    }
    if stage == "sft":
        texts = SFTDataSection(path=str(assets / "data/sentence_polarity.jsonl"), limit=12)
        run_sft(SFTConfig(**shared, data=texts), tmp_path, [])
    else:
        pairs = PairDataSection(path=str(assets / f"data/{STORIES}.jsonl"), limit=12)
        run_reward_model(RewardModelConfig(**shared, data=pairs), tmp_path, [])
    heads = {name: rate for name, rate in rates.items() if "lora_" not in name}
    assert {round(rates[name], 9) for name in rates.keys() - heads} == {1e-2}
    assert [round(rate, 9) for rate in heads.values()] == ([] if stage == "sft" else [1e-3])


@pytest.mark.parametrize("stage", ["sft", "reward_model"])
def test_a_template_that_writes_the_day_writes_the_day_that_runs_have(
    assets: Path, tmp_path: Path, stage: str
) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(assets / "stories260K", folder)
    template = (
        "{% if strftime_now('%Y') != '2024' %}{{ raise_exception('another day') }}{% endif %}"
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    shared: dict[str, Any] = {
        "model": ModelSection(path=str(folder)),
        "lora": LoraSection(r=0),
        "output": str(out),
        "device": "cpu",
    }
    if stage == "sft":
        chats = SFTDataSection(path=write(tmp_path, [{"messages": CHAT}] * 4), held_out=0)
        run_sft(SFTConfig(**shared, data=chats), tmp_path, [])
    else:
        pair = {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": "No."}
        pairs = PairDataSection(path=write(tmp_path, [pair] * 4), held_out=0)
        run_reward_model(RewardModelConfig(**shared, data=pairs), tmp_path, [])
    assert (out / "chat_template.jinja").read_text() == template


def a_thinking_model(folder: Path, assets: Path) -> str:
    """The story model with a template that has a variable, and begins with a line break."""
    shutil.copytree(assets / "stories260K", folder)
    template = (
        "\n{% for m in messages %}{{ m['content'] }}{% if thinks %} Hm.{% endif %} {% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)


@pytest.mark.parametrize("stage", ["sft", "reward_model"])
def test_a_stage_renders_chats_by_the_template_variables_that_it_is_given(
    assets: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Any] = []

    def noticed(*args: Any, **settings: Any) -> Any:
        trainer = begun(*args, **settings)
        trained.append(trainer.train_dataset[0])
        return trainer

    monkeypatch.setattr(f"ppo_lab.stages.{stage}.begun", noticed)
    shared: dict[str, Any] = {
        "model": ModelSection(path=a_thinking_model(tmp_path / "model", assets)),
        "lora": LoraSection(r=0),
        "output": str(tmp_path / "out"),
        "device": "cpu",
    }
    variables = {"thinks": True, "name": "it's"}
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    wanted = words(chat_template(words, variables)(CHAT), add_special_tokens=False)["input_ids"]
    if stage == "sft":
        rows, kind = [{"messages": CHAT}] * 4, SFTDataSection
        data = kind(path=write(tmp_path, rows), template_kwargs=variables, held_out=0)
        run_sft(SFTConfig(**shared, data=data), tmp_path, [])
        assert trained[0]["input_ids"] == wanted
        return
    pairs = [{"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": "No."}] * 4
    section = PairDataSection(path=write(tmp_path, pairs), template_kwargs=variables, held_out=0)
    run_reward_model(RewardModelConfig(**shared, data=section), tmp_path, [])
    assert trained[0]["chosen_ids"] == wanted
    taught: Any = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    scorer = Classifier(taught, transformers.AutoTokenizer.from_pretrained(tmp_path / "out"))
    assert scorer._encode(CHAT[:1], CHAT[1]["content"]) == wanted  # by PPO, which is told nothing


def test_template_variables_that_no_row_reads_are_refused(assets: Path, tmp_path: Path) -> None:
    rows = write(tmp_path, [{"text": "One day."}] * 4)
    data = SFTDataSection(path=rows, template_kwargs={"thinks": True})
    config = SFTConfig(model=ModelSection(path=str(assets / "stories260K")), data=data)
    data.template_kwargs |= {"tokenize": True, "a-b": 1}
    assert problems(config) == [
        "data.template_kwargs.tokenize: is no variable of a template; leave it out",
        "data.template_kwargs.a-b: no template can name it; use letters, digits and _",
    ]
    data.template_kwargs = {"thinks": True}
    with pytest.raises(ConfigError, match=r"data\.template_kwargs: has no effect"):
        run_sft(config, tmp_path, [])


@pytest.mark.parametrize("stage", ["sft", "reward_model"])
def test_an_adapter_is_taught_in_larger_steps_than_all_weights(stage: str) -> None:
    register_schema()
    register_stages()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):

        def step_size(*overrides: str) -> float:
            return float(compose(stage, [*overrides]).fit.learning_rate)

        assert step_size() == step_size("lora=none") == FitSection().learning_rate == 1e-4
        assert step_size("lora=r8") == step_size("lora.r=2") == 1e-3
        assert step_size("lora=r8", "fit.learning_rate=0.5") == 0.5
