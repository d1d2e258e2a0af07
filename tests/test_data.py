"""Prompt sets and the stream of prompt batches."""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import httpx
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers import decoders as token_decoders
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ppo_lab import data
from ppo_lab.config import EmbeddedData, FileData, HubData
from ppo_lab.data import PromptStream, judging, load_prompts, problems, split_prompts
from ppo_lab.errors import ConfigError
from ppo_lab.prompt_tokens import PromptEncoder, continuation, written_by
from ppo_lab.rollout import Answers, Sampling, StopStrings
from ppo_lab.tables import read_hub
from ppo_lab.types import Prompts

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_tokenizer(*, wrap: bool = False, template: str = "") -> PreTrainedTokenizerFast:
    """An id for each byte; with `wrap` the tokenizer puts <s> before a text and </s> after it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate([*alphabet, "<s>", "</s>"])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = token_decoders.ByteLevel()
    if wrap:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
        )
    special = {"bos_token": "<s>", "eos_token": "</s>"} if wrap else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = template or None
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def jsonl(folder: Path, rows: list[Any]) -> str:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def numbered(count: int) -> Prompts:
    return Prompts(
        ids=[[i] for i in range(count)],
        texts=[str(i) for i in range(count)],
        columns={"square": [i * i for i in range(count)]},
        indices=list(range(count)),
    )


def rows_of(stream: PromptStream, batches: int) -> list[int]:
    return [row for _ in range(batches) for row in stream.next_batch().indices]


# ---- the stream


def test_every_epoch_holds_each_prompt_once_across_batch_borders() -> None:
    stream = PromptStream(numbered(7), batch_size=3, seed=1)
    rows = rows_of(stream, 14)
    assert len(rows) == 42
    epochs = [rows[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_batch_larger_than_the_data_holds_several_epochs() -> None:
    batch = PromptStream(numbered(3), batch_size=8, seed=0).next_batch()
    assert len(batch) == 8
    assert sorted(Counter(batch.indices).values()) == [2, 3, 3]


def test_the_order_depends_on_the_seed_and_on_nothing_global() -> None:
    first = rows_of(PromptStream(numbered(50), batch_size=10, seed=3), 5)
    np.random.seed(9)
    torch.manual_seed(9)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    assert rows_of(PromptStream(numbered(50), batch_size=10, seed=3), 5) == first
    assert rows_of(PromptStream(numbered(50), batch_size=10, seed=4), 5) != first
    assert (np.random.get_state()[1] == before[0]).all()
    assert torch.equal(torch.get_rng_state(), before[1])


def test_the_order_does_not_depend_on_the_batch_size() -> None:
    whole = rows_of(PromptStream(numbered(10), batch_size=20, seed=3), 1)
    assert rows_of(PromptStream(numbered(10), batch_size=4, seed=3), 5) == whole


@pytest.mark.parametrize("done", range(6))
def test_a_resumed_stream_goes_on_as_if_it_had_never_stopped(done: int) -> None:
    whole = PromptStream(numbered(7), batch_size=4, seed=5)
    rows_of(whole, done)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = PromptStream(numbered(7), batch_size=4, seed=5)
    resumed.load_state_dict(state)
    assert rows_of(resumed, 6) == rows_of(whole, 6)


def test_a_stream_over_other_prompts_cannot_be_resumed() -> None:
    state = PromptStream(numbered(7), batch_size=4, seed=5).state_dict()
    with pytest.raises(ValueError, match="prompts=7"):
        PromptStream(numbered(8), batch_size=4, seed=5).load_state_dict(state)
    with pytest.raises(ValueError, match="seed=5"):
        PromptStream(numbered(7), batch_size=4, seed=6).load_state_dict(state)


def test_without_shuffling_prompts_come_in_their_own_order() -> None:
    stream = PromptStream(numbered(4), batch_size=3, seed=5, shuffle=False)
    assert rows_of(stream, 3) == [0, 1, 2, 3, 0, 1, 2, 3, 0]


def test_columns_stay_beside_their_prompts() -> None:
    batch = PromptStream(numbered(9), batch_size=5, seed=0).next_batch()
    assert batch.columns["square"] == [i * i for i in batch.indices]
    assert batch.texts == [str(i) for i in batch.indices]


def test_an_empty_stream_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        PromptStream(numbered(0), batch_size=1, seed=0)


# ---- the split


def test_no_prompt_is_both_trained_on_and_held_out() -> None:
    prompts = Prompts(
        ids=[[i % 10] for i in range(100)], texts=list(range(100)), indices=list(range(100))
    )
    sets = split_prompts(prompts, held_out=4, seed=0)
    held = {ids[0] for ids in sets.held_out.ids}
    assert len(sets.held_out) == len(held) == 4
    assert held.isdisjoint(ids[0] for ids in sets.train.ids)
    assert len(sets.train) == 60


def test_a_share_is_held_out_by_seed() -> None:
    picks = [split_prompts(numbered(100), held_out=0.1, seed=s).held_out.indices for s in (0, 0, 1)]
    assert len(picks[0]) == 10
    assert picks[0] == picks[1] != picks[2]


@pytest.mark.parametrize(
    ("share", "count", "held_out"), [(0.1, 100, 10), (0.1, 101, 11), (0.07, 100, 7), (0.001, 50, 1)]
)
def test_a_share_is_rounded_up_and_by_no_more_than_it_is(
    share: float, count: int, held_out: int
) -> None:
    assert len(split_prompts(numbered(count), held_out=share, seed=0).held_out) == held_out


@pytest.mark.parametrize("count", [1, 7, 64, 199, 200, 300])
def test_a_run_is_judged_by_prompts_of_all_parts_of_a_sorted_file(count: int) -> None:
    held_out = split_prompts(numbered(1000), held_out=200, seed=0).held_out
    rows = judging(FileData(), held_out, count).indices
    assert rows == sorted(set(rows))
    assert len(rows) == min(count, 200)
    for part in range(5 if count > 7 else 1):  # none is left out
        assert any(1000 * part // 5 <= row < 1000 * (part + 1) // 5 for row in rows)
    assert judging(EmbeddedData(), held_out, count).indices == held_out.indices[:count]


def test_nothing_need_be_held_out() -> None:
    sets = split_prompts(numbered(3), held_out=0, seed=0)
    assert (len(sets.train), len(sets.held_out)) == (3, 0)


def test_holding_out_everything_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.held_out=5: .* at most 4, so that one is left"):
        split_prompts(numbered(5), held_out=5, seed=0)


@pytest.mark.parametrize("held_out", [0.1, 3])
def test_one_prompt_repeated_is_too_few_whatever_is_held_out(held_out: float) -> None:
    same = Prompts(ids=[[7]] * 20, texts=["a"] * 20, indices=list(range(20)))
    with pytest.raises(ConfigError, match=r"one distinct prompt; needs two or more") as error:
        split_prompts(same, held_out=held_out, seed=0)
    assert "0 = none" not in str(error.value), "a run may not hold out none"


def tables(folder: Path, train: list[Any], held_out: list[Any]) -> FileData:
    """Prompts in one file, and those to judge by in another."""
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    return FileData(path=jsonl(folder, train), held_out_path=str(folder / "test.jsonl"))


def test_prompts_of_a_file_of_their_own_judge_the_run_and_are_not_trained_on(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    train = [{"prompt": text, "n": n} for n, text in enumerate("abcab")]
    section = tables(tmp_path, train, [{"prompt": text, "n": 9} for text in "xbxyzv"])
    section.limit = 4  # of what is trained on alone
    sets = load_prompts(section, tokenizer)
    assert sets.train.texts == ["a", "c", "a"]
    assert sets.held_out.texts == [*"xbyzv"], "each once, all of them, in their order"
    assert sets.held_out.columns == {"n": [9] * 5}
    assert "1 prompts that are held out too are not trained on" in caplog.text
    with pytest.raises(ConfigError, match="every prompt is held out too"):
        load_prompts(tables(tmp_path, train[:1], train), tokenizer)


def test_bounds_and_cuts_hold_for_prompts_of_their_own_file(tmp_path: Path, tokenizer: Any) -> None:
    section = tables(tmp_path, [{"prompt": "a b c d e f"}], [{"prompt": "u v w x y z"}])
    section.cut_min_tokens, section.cut_max_tokens = 2, 3
    assert 2 <= len(load_prompts(section, tokenizer).held_out.ids[0]) <= 4  # with BOS
    section.cut_max_tokens, section.max_prompt_tokens = 0, 3
    section.path = jsonl(tmp_path, [{"prompt": "a"}])
    with pytest.raises(
        ConfigError, match=r"^data\.held_out_path=.*test\.jsonl: .*none of 1 prompts"
    ):
        load_prompts(section, tokenizer)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "x"}], "has no such column; it has text"),
        ([], "the file is empty"),
    ],
)
def test_what_is_wrong_with_that_file_is_said_of_it_before_a_run(
    tmp_path: Path, rows: list[Any], said: str
) -> None:
    found = problems(tables(tmp_path, [{"prompt": "a"}], rows))
    assert len(found) == 1
    assert said in found[0]
    assert "data.held_out_path=" in found[0]


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({"held_out_split": "test"}, ("o/n", "sub", "test", "v1")),
        ({"held_out_split": "test", "held_out_path": "o/n"}, ("o/n", "sub", "test", "v1")),
        ({"held_out_path": "o/m"}, ("o/m", "", "train", "")),
    ],
)
def test_a_split_or_another_set_of_the_hub_judges_the_run(
    settings: dict[str, str],
    asked: tuple[str, ...],
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[tuple[str, ...]] = []

    def read_hub(path: str, *, name: str, split: str, revision: str, limit: int) -> Any:
        read.append((path, name, split, revision))
        return {"prompt": ["a", "b"] if len(read) == 1 else ["c"]}

    monkeypatch.setattr(data, "read_hub", read_hub)
    section = HubData(path="o/n", subset="sub", revision="v1", **settings)
    sets = load_prompts(section, tokenizer)
    assert (sets.train.texts, sets.held_out.texts) == (["a", "b"], ["c"])
    assert read == [("o/n", "sub", "train", "v1"), asked]


@pytest.mark.parametrize(("limit", "rows"), [(0, 3), (2, 2), (9, 3)])
def test_the_hub_is_asked_for_the_split_and_revision_that_are_named(
    limit: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the cache alone, where the hub does not answer; afterwards it may be asked again."""
    asked: list[Any] = []

    def load(*names: Any, **settings: Any) -> Any:
        asked.append((names, settings, datasets.config.HF_HUB_OFFLINE))
        return datasets.Dataset.from_dict({"prompt": ["a", "b", "c"]})

    def silent(*_: Any, **__: Any) -> None:
        raise httpx.ConnectError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", silent)
    found = read_hub("o/n", name="sub", split="test", revision="v1", limit=limit)
    assert found == {"prompt": ["a", "b", "c"][:rows]}
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    read_hub("o/n")
    named, plain = {"split": "test", "revision": "v1"}, {"split": "train", "revision": None}
    assert asked == [(("o/n", "sub"), named, True), (("o/n", None), plain, False)]
    assert datasets.config.HF_HUB_OFFLINE is False


# ---- responses as texts


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Tokens of words hold the space before them, as SentencePiece's do."""
    words = ["<s>", "▁", "▁the", "▁cat", "s", "."]
    backend = Tokenizer(models.Unigram([(word, -float(i)) for i, word in enumerate(words)], 0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = token_decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


@pytest.mark.parametrize("response", [" the cat", "s.", " cats", ""])
def test_prompt_and_response_together_are_the_text_that_was_written(response: str) -> None:
    for made in (word_tokenizer(), byte_tokenizer()):
        query = made("the cat", add_special_tokens=False)["input_ids"]
        written = made(f"the cat{response}", add_special_tokens=False)["input_ids"]
        assert written[: len(query)] == query
        special = [] if made.bos_token_id is None else [made.bos_token_id]
        assert continuation(made, special + query, written[len(query) :]) == response
    assert word_tokenizer().decode([2]) == "the", "the space would be lost"


def test_stop_strings_are_looked_for_in_all_that_was_written() -> None:
    for made in (word_tokenizer(), byte_tokenizer()):
        made.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
        cat, end = made(" cat", add_special_tokens=False)["input_ids"], made.vocab["<|end|>"]
        assert " cat" in written_by(made)(cat), "the space before the first word"
        assert "<|end|>" in written_by(made)([*cat, end])
        assert "<|end|>" not in continuation(made, [], [*cat, end])


@pytest.mark.parametrize("least", [0, 3])
@pytest.mark.parametrize("stop", ["s", " cat", "e c", "€", "at\n", "the cat", "<|end|>s"])
def test_a_stop_string_is_found_as_soon_as_it_is_written(stop: str, least: int) -> None:
    """By the last tokens of some responses, as in all that all of them say."""
    for made in (word_tokenizer(), byte_tokenizer()):
        made.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
        written, numbers = written_by(made), random.Random(0)
        pieces = ["s", " cat", " the", "the", " c", "at", "\n", "€", "<|end|>", "."]
        texts = ["".join(numbers.choices(pieces, k=30)) for _ in range(24)]
        rows = [made(text, add_special_tokens=False)["input_ids"][:40] for text in texts]
        width = min(map(len, rows))
        answers = Answers.room(len(rows), width, torch.device("cpu"))
        answers.begin(torch.zeros(len(rows), width, 1).expand(-1, -1, answers.uniforms.shape[2]))
        answers.tokens.copy_(torch.tensor([row[:width] for row in rows]).t())
        stops = StopStrings(Sampling(width, (), 0, least, stop_strings=(stop,)), written)
        for position in range(least, width):
            before = answers.ended.tolist()
            stops.end(answers, position)
            for i, row in enumerate(rows):
                held = len(written(row[:least])) if least else 0
                text = written(row[: position + 1])
                whole = text.find(stop, max(held - len(stop) + 1, 0)) >= 0
                assert bool(answers.ended[i]) is (before[i] or whole), (row, position)
        assert answers.ended.any() or stop not in "".join(map(written, rows))


def test_a_response_that_completes_a_character_is_shown_alone(tokenizer: Any) -> None:
    ids = tokenizer("€5")["input_ids"]
    assert continuation(tokenizer, ids[:2], ids[2:]) == "\ufffd5"


# ---- files


def test_real_openings_are_read_tokenized_and_split(assets: Path) -> None:
    """T-01."""
    llama = AutoTokenizer.from_pretrained(assets / "stories260K")
    section = FileData(path=str(assets / "data" / "story_openings.jsonl"))
    sets = load_prompts(section, llama, max_prompt_tokens=464, seed=0)
    assert len(sets.held_out) == 150
    assert all(ids[0] == llama.bos_token_id for ids in sets.train.ids)
    assert all(llama.eos_token_id not in ids[1:] for ids in sets.train.ids)
    assert llama.decode(sets.train.ids[0][1:]) == sets.train.texts[0]
    assert sets.train.ids == load_prompts(section, llama, max_prompt_tokens=464, seed=0).train.ids


def test_other_columns_come_along_with_their_rows(assets: Path, tokenizer: Any) -> None:
    section = FileData(
        path=str(assets / "data" / "banking77_test.jsonl"), prompt_column="text", limit=50
    )
    train = load_prompts(section, tokenizer).train
    lines = (assets / "data" / "banking77_test.jsonl").read_text().splitlines()
    first = json.loads(lines[train.indices[0]])
    assert (train.texts[0], train.columns["intent"][0]) == (first["text"], first["intent"])
    assert max(train.indices) < 50


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_prompts_and_columns(
    suffix: str, tmp_path: Path, tokenizer: Any
) -> None:
    import pandas

    texts = ["null", "007", "a, b", 'say "x"', "two\nlines", "2023-01-01 10:00:00", "NA"]
    table = pandas.DataFrame({"prompt": texts, "label": range(7)})
    path = tmp_path / f"p.{suffix}"
    {
        "jsonl": lambda: table.to_json(path, orient="records", lines=True),
        "json": lambda: table.to_json(path, orient="records", indent=1),
        "csv": lambda: table.to_csv(path, index=False),
        "tsv": lambda: table.to_csv(path, index=False, sep="\t"),
        "parquet": lambda: table.to_parquet(path),
    }[suffix]()
    train = load_prompts(FileData(path=str(path), held_out=0), tokenizer).train
    assert train.texts == texts
    assert train.columns == {"label": list(range(7))}
    assert data.problems(FileData(path=str(path))) == []
    assert data.problems(FileData(path=str(path), prompt_column="labels")) != []


def test_reading_a_file_leaves_no_cache_and_no_output(
    tmp_path: Path,
    tokenizer: Any,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = tmp_path / "p.csv"
    path.write_text("prompt\nhello\nworld\n")
    load_prompts(FileData(path=str(path), held_out=0), tokenizer)
    assert capfd.readouterr() == ("", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.csv"]


def test_odd_unicode_survives(tmp_path: Path, tokenizer: Any) -> None:
    texts = ["emoji 👩‍👩‍👧 ok", "עברית مرحبا", "a\0b", "line\u2028sep", "e\u0301 \ufeff x"]
    train = load_prompts(
        FileData(path=jsonl(tmp_path, [{"prompt": t} for t in texts]), held_out=0), tokenizer
    ).train
    assert train.texts == texts
    assert [tokenizer.decode(ids) for ids in train.ids] == texts


def test_half_a_surrogate_pair_becomes_a_replacement_character(
    tmp_path: Path, tokenizer: Any
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a\\ud83d b 😀"}')
    assert load_prompts(FileData(path=str(path), held_out=0), tokenizer).train.texts == [
        "a\ufffd b 😀"
    ]


def test_a_byte_order_mark_and_blank_lines_are_passed_over(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n\n{"prompt": "b"}\n')
    assert load_prompts(FileData(path=str(path), held_out=0), tokenizer).train.texts == ["a", "b"]


def csv_columns(folder: Path, text: str, **settings: Any) -> dict[str, list[Any]]:
    """The columns beside the prompts of a CSV file that says this."""
    path = folder / "p.csv"
    path.write_text(text)
    section = FileData(path=str(path), held_out=0, **settings)
    return load_prompts(section, byte_tokenizer()).train.columns


def test_a_csv_files_cells_reach_the_reward_as_they_stand(tmp_path: Path) -> None:
    rows = ["007,0.50,3,1.5,True,NA,,5,1_0", "12,1e3,,0.1,False,nan,,2.5,2"]
    header = "prompt,code,price,number,real,truth,word,nothing,mixed,odd"
    content = "\n".join([header, *(f"q{i},{row}" for i, row in enumerate(rows))])
    assert csv_columns(tmp_path, content) == {
        "code": ["007", "12"],
        "price": ["0.50", "1e3"],
        "number": [3, None],
        "real": [1.5, 0.1],
        "truth": [True, False],
        "word": ["NA", "nan"],
        "nothing": [None, None],
        "mixed": [5, 2.5],
        "odd": ["1_0", "2"],
    }
    long = "prompt,answer\n" + "".join(f"q{i},{i}\n" for i in range(11000)) + "q,x+1\n"
    answers = csv_columns(tmp_path, long)["answer"]
    assert (answers[7], answers[-1]) == ("7", "x+1")


def test_numbers_of_a_csv_file_are_python_numbers_of_any_size(tmp_path: Path) -> None:
    big = 10**30
    columns = csv_columns(tmp_path, f"prompt,n,x\na,{big},{'9' * 5000}\nb,-1,1\n")
    assert columns["n"] == [big, -1]
    assert columns["x"] == ["9" * 5000, "1"]


# ---- chats


def test_chats_go_through_the_template_and_are_shown_as_messages(assets: Path) -> None:
    """T-01."""
    section = FileData(
        path=str(assets / "data" / "dpo_en_demo.jsonl"), max_prompt_tokens=4096, limit=20
    )
    tokenizer = byte_tokenizer(wrap=True, template=TEMPLATE)
    train = load_prompts(section, tokenizer).train
    chat = train.texts[0]
    shown = "".join(f"[{message['role']}]{message['content']}" for message in chat)
    assert tokenizer.decode(train.ids[0]) == f"{shown}[assistant]"
    assert chat[-1]["role"] == "user"
    assert set(train.columns) == {"chosen", "rejected"}


def test_the_last_answer_of_a_conversation_is_left_to_the_policy(tmp_path: Path) -> None:
    """But nothing of what comes before it, and no other's message."""
    hi, hello = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
    chats = [[hi, hello], [hi, hello, hello], [hi, hello, hi], [hi, hello, hi, hello]]
    section = FileData(
        path=jsonl(tmp_path, [{"messages": chat} for chat in chats]),
        messages_column="messages",
        held_out=0,
    )
    train = load_prompts(section, byte_tokenizer(template=TEMPLATE)).train
    assert train.texts == [[hi], [hi], [hi, hello, hi], [hi, hello, hi]]


def test_an_answer_that_a_prompt_begins_is_gone_on_with(tmp_path: Path) -> None:
    template = TEMPLATE.replace("{% if", "</s>{% if", 1)
    tokenizer = byte_tokenizer(wrap=True, template=template)
    begun = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, "}]
    section = FileData(path=jsonl(tmp_path, [{"prompt": begun}, {"prompt": begun[:1]}]), held_out=0)
    train = load_prompts(section, tokenizer).train
    written = [tokenizer.decode(ids) for ids in train.ids]
    assert written == ["[user]hi[assistant]Well, ", "[user]hi</s>[assistant]"]
    assert train.texts == [begun[:1], begun[:1]], "a reward is shown the answer as a whole"
    assert train.prefills == train[[0, 1]].prefills == ["Well, ", ""]
    assert train[[1]].prefills == [""]


def test_what_a_template_trims_of_a_begun_answer_is_not_shown_either() -> None:
    trimming = byte_tokenizer(template=TEMPLATE.replace("m.content", "m.content | trim"))
    begun = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " Well, "}]
    prompts = PromptEncoder(trimming).encode([begun], {})
    assert trimming.decode(prompts.ids[0]) == "[user]hi[assistant]Well,"
    assert prompts.prefills == ["Well,"]


def test_a_chat_that_its_template_refuses_is_named_with_its_row() -> None:
    refusing = byte_tokenizer(
        template="{% if messages[0].role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
    )
    chats = [[{"role": role, "content": "hi"}] for role in ("user", "system")]
    with pytest.raises(ConfigError, match=r"refuses the chat of row 2: System role not supported$"):
        PromptEncoder(refusing).encode(chats, {})
    adding = byte_tokenizer(template="{{ messages[0].content + 'x' }}")
    listed = [[{"role": "user", "content": ["hi"]}]]
    with pytest.raises(ConfigError, match=r"refuses the chat of row 1: .*list"):
        PromptEncoder(adding).encode(listed, {})


def test_a_template_is_given_its_variables(tmp_path: Path) -> None:
    thinking = byte_tokenizer(template=TEMPLATE + "{% if not thinks %}[quiet]{% endif %}")
    section = FileData(path=jsonl(tmp_path, [{"prompt": "hi"}]), chat=True, held_out=0)
    section.template_kwargs = {"thinks": True}
    assert thinking.decode(load_prompts(section, thinking).train.ids[0]) == "[user]hi[assistant]"
    section.template_kwargs = {"thinks": False}
    assert thinking.decode(load_prompts(section, thinking).train.ids[0]).endswith("[quiet]")
    section.chat = False
    with pytest.raises(ConfigError, match=r"data.template_kwargs: has no effect, .*data.chat=true"):
        load_prompts(section, thinking)


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_chats_may_be_kept_as_json(suffix: str, column: str, tmp_path: Path) -> None:
    import pandas

    chat = [{"role": "user", "content": "hi"}]
    kept = [*chat, {"role": "assistant", "content": "hello"}] if column == "messages" else chat
    table = pandas.DataFrame({column: [json.dumps(kept, indent=1), json.dumps(chat)]})
    path = tmp_path / f"p.{suffix}"
    {
        "csv": lambda: table.to_csv(path, index=False),
        "parquet": lambda: table.to_parquet(path),
        "jsonl": lambda: table.to_json(path, orient="records", lines=True),
    }[suffix]()
    chosen = {"messages_column": column} if column == "messages" else {}
    section = FileData(path=str(path), held_out=0, **chosen)
    assert load_prompts(section, byte_tokenizer(template=TEMPLATE)).train.texts == [chat, chat]


def test_json_that_is_no_chat_stays_a_text(tmp_path: Path, tokenizer: Any) -> None:
    texts = ['[{"role": "user", "content"', '[{"a": 1}]', "[{'role': 'user'}]", "[1]"]
    texts += ['[{"a": ' + "1" * 5000 + "}]", '[{"a": ' + "[" * 100_000]
    path = jsonl(tmp_path, [{"prompt": t} for t in texts])
    section = FileData(path=path, held_out=0, max_prompt_tokens=0)
    assert load_prompts(section, tokenizer).train.texts == texts


@pytest.mark.parametrize("wrong", ["hello", "[{'role': 'user'}]", '[{"a": 1}]', [], None, ""])
def test_a_column_of_chats_holds_nothing_else(wrong: Any, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    section = FileData(
        path=jsonl(tmp_path, [{"chats": chat}, {"chats": wrong}]), messages_column="chats"
    )
    match = r"data.messages_column=chats: row 2 is .*; it must be a list of messages"
    with pytest.raises(ConfigError, match=match):
        load_prompts(section, byte_tokenizer(template=TEMPLATE))


def test_plain_prompts_can_be_made_a_users_messages(tmp_path: Path) -> None:
    section = FileData(path=jsonl(tmp_path, [{"prompt": "hi"}]), chat=True, held_out=0)
    tokenizer = byte_tokenizer(template=TEMPLATE)
    train = load_prompts(section, tokenizer).train
    assert tokenizer.decode(train.ids[0]) == "[user]hi[assistant]"
    assert train.texts == [[{"role": "user", "content": "hi"}]]


def test_a_chat_without_a_template_is_refused(assets: Path, tokenizer: Any) -> None:
    section = FileData(path=str(assets / "data" / "dpo_en_demo.jsonl"), limit=2)
    with pytest.raises(ConfigError, match="has no chat template"):
        load_prompts(section, tokenizer)


def test_a_list_that_is_no_chat_is_refused_with_its_row(assets: Path, tokenizer: Any) -> None:
    section = FileData(
        path=str(assets / "data" / "mt_bench_questions.jsonl"), prompt_column="turns"
    )
    with pytest.raises(ConfigError, match=r"row 1 is list .* messages with role and content"):
        load_prompts(section, tokenizer)


# ---- lengths


def test_only_the_prefix_of_the_tokenizer_is_kept() -> None:
    prompts = PromptEncoder(byte_tokenizer(wrap=True)).encode(["ab", "</s>"], {})
    assert [ids[0] for ids in prompts.ids] == [256, 256]
    assert len(prompts.ids[0]) == 3
    assert prompts.ids[1] == [256, 257]  # an EOS that the text itself holds stays


def test_a_text_that_begins_with_the_prefix_gets_no_second_one() -> None:
    tokenizer = byte_tokenizer(wrap=True, template="{{ bos_token }}" + TEMPLATE)
    chat = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    beforehand, by_us = (PromptEncoder(tokenizer).encode([p], {}) for p in (text, chat))
    assert beforehand.ids == by_us.ids
    assert beforehand.ids[0].count(256) == 1
    assert beforehand.texts == [text]
    cut = PromptEncoder(tokenizer).encode([text, "abcdef"], {}, cuts=[3, 3])
    assert cut.texts == ["<s>[us", "abc"]
    assert [len(ids) for ids in cut.ids] == [4, 4]


def test_a_template_that_writes_the_day_writes_one_day_for_ever(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Or a run could not go on after midnight: its prompts would be others."""
    day = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}: "
    tokenizer = byte_tokenizer(template=day + TEMPLATE)
    chat = [{"role": "user", "content": "hi"}]
    encoder = PromptEncoder(tokenizer)
    ids = [encoder.encode([chat], {}).ids[0] for _ in range(2)]
    assert tokenizer.decode(ids[0]).startswith("26 Jul 2024: [user]")
    assert caplog.text.count("26 Jul 2024 stands there on every day") == 1
    told = PromptEncoder(tokenizer, template_kwargs={"date_string": "1 May 2026"})
    assert tokenizer.decode(told.encode([chat], {}).ids[0]).startswith("1 May 2026: ")


@pytest.mark.parametrize("chat", [False, True])
def test_empty_prompts_are_dropped_and_counted(
    chat: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Wherever the tokenizer or the template adds tokens to nothing, too."""
    tokenizer = byte_tokenizer(wrap=True, template=TEMPLATE)
    rows = [{"prompt": text} for text in ("a", "", " \n", "b")]
    section = FileData(path=jsonl(tmp_path, rows), chat=chat, held_out=0)
    train = load_prompts(section, tokenizer).train
    assert train.indices == [0, 3]
    assert "2 of 4 prompts dropped: 2 empty" in caplog.text


def test_chats_whose_last_message_is_empty_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    encoder = PromptEncoder(byte_tokenizer(template=TEMPLATE))
    contents = ["a", "", [{"type": "text", "text": " "}], None, [{"type": "image"}]]
    chats = [[{"role": "user", "content": content}] for content in contents]
    assert encoder.encode(chats, {}).indices == [0, 4]
    assert "3 of 5 prompts dropped: 3 empty" in caplog.text
    with pytest.raises(ConfigError, match="all 3 prompts are empty"):
        encoder.encode(chats[1:4], {})


def test_prompts_out_of_bounds_are_dropped_and_counted(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "x" * n, "n": n} for n in (1, 3, 5, 7)]
    section = FileData(
        path=jsonl(tmp_path, rows), min_prompt_tokens=2, max_prompt_tokens=6, held_out=0
    )
    train = load_prompts(section, tokenizer).train
    assert (train.columns["n"], train.indices) == ([3, 5], [1, 2])
    assert "2 of 4 prompts dropped" in caplog.text
    assert load_prompts(section, tokenizer, max_prompt_tokens=4).train.columns["n"] == [3]


def test_long_prompts_can_be_truncated_to_their_beginning(tmp_path: Path) -> None:
    section = FileData(
        path=jsonl(tmp_path, [{"prompt": "abcdef"}]),
        max_prompt_tokens=4,
        long_prompts="truncate",
        held_out=0,
    )
    train = load_prompts(section, byte_tokenizer(wrap=True)).train
    assert (train.texts, len(train.ids[0])) == (["abc"], 4)


def test_a_text_is_cut_before_it_becomes_a_users_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = byte_tokenizer(template=TEMPLATE)
    around = len("[user][assistant]")
    path = jsonl(tmp_path, [{"prompt": "abcdefgh"}, {"prompt": "ab"}, {"prompt": "aé" * 8}])
    section = FileData(path=path, chat=True, held_out=0, max_prompt_tokens=around + 5)
    section.long_prompts = "truncate"
    train = load_prompts(section, tokenizer).train
    assert [tokenizer.decode(ids) for ids in train.ids] == [
        f"[user]{text}[assistant]" for text in ("abcde", "ab", "aéa")
    ]
    assert [chat[0]["content"] for chat in train.texts] == ["abcde", "ab", "aéa"]
    section.cut_min_tokens, section.cut_max_tokens = 3, 3
    train = load_prompts(section, tokenizer).train
    assert [chat[0]["content"] for chat in train.texts] == ["abc", "ab", "aé"]
    assert not caplog.text
    section.max_prompt_tokens = around
    with pytest.raises(ConfigError, match=r"none of 3 prompts is left: 3 longer than"):
        load_prompts(section, tokenizer)


def test_rows_that_are_chats_are_dropped_where_too_long_and_never_cut(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(template=TEMPLATE)
    chats = [[{"role": "user", "content": text}] for text in ("ab", "abcdefgh")]
    section = FileData(path=jsonl(tmp_path, [{"prompt": c} for c in chats]), held_out=0)
    section.long_prompts, section.max_prompt_tokens = "truncate", 20
    assert load_prompts(section, tokenizer).train.indices == [0]
    section.cut_max_tokens = 3
    with pytest.raises(ConfigError, match=r"data.cut_max_tokens: the prompt of row 1 is a chat"):
        load_prompts(section, tokenizer)


def test_openings_are_cut_to_random_lengths_by_seed(assets: Path, tokenizer: Any) -> None:
    section = FileData(
        path=str(assets / "data" / "movie_review_openings.jsonl"),
        prompt_column="opening",
        cut_min_tokens=2,
        cut_max_tokens=8,
        limit=400,
    )
    train = load_prompts(section, tokenizer, seed=0).train
    assert {len(ids) for ids in train.ids} == set(range(2, 9))
    assert all(
        tokenizer.decode(ids) == text for ids, text in zip(train.ids, train.texts, strict=True)
    )
    assert load_prompts(section, tokenizer, seed=0).train.texts == train.texts
    assert load_prompts(section, tokenizer, seed=1).train.texts != train.texts


def test_prompts_all_filtered_away_say_why(tmp_path: Path, tokenizer: Any) -> None:
    section = FileData(
        path=jsonl(tmp_path, [{"prompt": "ab"}, {"prompt": "abc"}]), min_prompt_tokens=5
    )
    with pytest.raises(
        ConfigError, match=r"none of 2 prompts is left: 2 shorter than 5 tokens .* 2 to 3 tokens"
    ):
        load_prompts(section, tokenizer)


def test_embedded_questions_come_with_their_own_held_out_part(tokenizer: Any) -> None:
    sets = load_prompts(EmbeddedData(held_out=5), tokenizer)
    assert len(sets.held_out) == 5
    assert len(sets.train) > 100
    assert set(sets.train.texts).isdisjoint(sets.held_out.texts)


# ---- what is refused


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"row 2 is no valid JSON"),
        ("p.jsonl", '{"prompt": "a"}\n["a"]\n', r"row 2 is list, not an object"),
        ("p.jsonl", '["a"]\n["b"]\n', r"each line must be an object with the columns"),
        ("p.json", '[{"prompt": "a"}', r"cannot be read"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": null}', r"row 2 is missing"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 3}', r"row 2 is int \('3'\)"),
        ("p.jsonl", "", r"the file is empty"),
        ("p.jsonl", "\n\n", r"the data set has no rows"),
        ("p.jsonl", '{"prompt": ""}\n{"prompt": " "}\n', r"all 2 prompts are empty"),
        ("p.csv", "prompt,x\n", r"the data set has no rows"),
        ("p.csv", "prompt,x\na,b,c,d\n", r"more fields than the header"),
        ("p.csv", "prompt;x\na;b\n", r"seems to be separated by ';', and is read by commas\.$"),
        (
            "p.jsonl",
            '{"Prompt": "a", "id": 1}',
            r"it has Prompt, id\. Did you mean data.prompt_column=Prompt",
        ),
        ("p.txt", "a", r"cannot tell the format; the name must end in \.jsonl"),
        ("p.jsonl", "{}\n" + "1" * 5000, r"row 2 is no valid JSON .*digits"),
        ("p.json", '[{"n": ' + "1" * 5000 + "}]", r"cannot be read .*digits"),
        ("p.jsonl", "{}\n" + "[" * 100_000, r"row 2 is no valid JSON .*recursion"),
        ("p.json", "[" * 100_000, r"cannot be read .*recursion"),
        ("p.parquet", "no parquet", r"cannot be read"),
        ("p.jsonl", b'{"prompt": "\xe9"}', r"cannot be read"),
        ("p.csv", b"prompt\n\xe9\n", r"cannot be read"),
    ],
)
def test_a_bad_file_is_refused(
    name: str, content: str | bytes, message: str, tmp_path: Path, tokenizer: Any
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message):
        load_prompts(FileData(path=str(path)), tokenizer)


def test_a_missing_file_is_refused_with_the_place_looked_at(tmp_path: Path, tokenizer: Any) -> None:
    path = str(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match=r"data\.path=.*there is no such file"):
        load_prompts(FileData(path=path), tokenizer)
    assert data.problems(FileData(path=path))[0].startswith(
        f"data.path={path}: there is no such file"
    )
    assert "this is a folder" in data.problems(FileData(path=str(tmp_path)))[0]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_a_file_that_cannot_be_opened_is_refused_by_its_key(tmp_path: Path, suffix: str) -> None:
    section = FileData(path=str(tmp_path / f"p.{suffix}"))
    (tmp_path / f"p.{suffix}").write_text("prompt\n" if suffix == "csv" else '[{"prompt": "a"}]')
    assert "cannot be read" not in "".join(data.problems(section))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        found = data.problems(section)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert found[0].startswith(f"data.path={section.path}: the file cannot be read ([Errno 24]")


def test_checking_a_data_set_loads_nothing_heavy(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"question": "a"}])
    code = (
        "import sys; from ppo_lab import data; from ppo_lab.config import FileData\n"
        f"print(data.problems(FileData(path={path!r})))\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "data.prompt_column=prompt" in done.stdout
    assert "it has question" in done.stdout


def test_a_hub_data_set_that_cannot_be_had_says_so_in_one_paragraph(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.path=nobody/nothing: .*data=file") as error:
        load_prompts(HubData(path="nobody/nothing"), tokenizer)
    assert "\n" not in str(error.value)


def test_columns_that_a_reward_is_given_anyway_are_left_out(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "a", "completions": "b", "completion": "c"}]
    train = load_prompts(FileData(path=jsonl(tmp_path, rows), held_out=0), tokenizer).train
    assert train.columns == {"completion": ["c"]}
    assert "'completions' is left out" in caplog.text
