"""Anybody's rows for the stages: read, checked, put into the columns that TRL knows, and split."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from ppo_lab.data import chat_in, held_out_count
from ppo_lab.errors import ConfigError
from ppo_lab.prompt_tokens import encodable
from ppo_lab.record import brief
from ppo_lab.rewards.conversation import answer, as_text, is_chat, templated
from ppo_lab.stages.config import PairDataSection, SFTDataSection
from ppo_lab.tables import Columns, column_names, find_file, read_file, require_column

Row = dict[str, Any]
Render = Callable[[list[Row]], Any]

log = logging.getLogger(__name__)


def sft_columns(section: SFTDataSection, names: Sequence[str]) -> dict[str, str]:
    """TRL's column -> the file's, for the format that a file with these columns has.

    Raises:
        ConfigError: it has none of the three.
    """
    if section.completion_column in names:
        _require(names, "prompt_column", section.prompt_column, section.path)
        return {"prompt": section.prompt_column, "completion": section.completion_column}
    if section.messages_column in names:
        return {"messages": section.messages_column}
    _require(names, "text_column", section.text_column, section.path)
    return {"text": section.text_column}


def pair_columns(section: PairDataSection, names: Sequence[str]) -> dict[str, str]:
    """TRL's column -> the file's. A file without a column of prompts compares whole texts.

    Raises:
        ConfigError: a column of answers is missing.
    """
    _require(names, "chosen_column", section.chosen_column, section.path)
    _require(names, "rejected_column", section.rejected_column, section.path)
    prompt = {"prompt": section.prompt_column} if section.prompt_column in names else {}
    return {**prompt, "chosen": section.chosen_column, "rejected": section.rejected_column}


def data_problems(section: SFTDataSection | PairDataSection) -> list[str]:
    """What can be said against a file before its rows are read, one sentence each."""
    try:
        _columns_of(section, column_names(find_file(section.path)))
    except ConfigError as error:
        return error.problems
    return []


def read_rows(
    section: SFTDataSection | PairDataSection, *, render: Render | None, seed: int
) -> list[Row]:
    """The rows of a file under TRL's names, in an order drawn by `seed`, `limit` of them at most.

    `render` is the tokenizer's chat template. Where it has none, a chat becomes text: its messages
    on lines of their own.

    Raises:
        ConfigError: the file cannot be read, is empty, or a row holds neither texts nor chats, or a
            chat that the template refuses.
    """
    file = find_file(section.path)
    names = tuple(v for k, v in vars(section).items() if k.endswith("_column"))
    table = read_file(file, text_columns=names)
    wanted = _columns_of(section, list(table))
    rows = [
        _row(table, wanted, i, section.path) for i in range(len(next(iter(table.values()), [])))
    ]
    if not rows:
        raise ConfigError(f"data.path={section.path}: the file has no rows.")
    kinds = [any(map(is_chat, row.values())) for row in rows]
    if render and any(kinds) and not all(kinds):
        raise ConfigError(
            f"data.path={section.path}: row {kinds.index(not kinds[0]) + 1} is "
            f"{'a text' if kinds[0] else 'a chat'}, and those before it are not; make all of them "
            "chats, or texts."
        )
    drawn = np.random.default_rng((seed, 0)).permutation(len(rows)).tolist()
    order = _told_apart(drawn, rows, section.path)[: section.limit or None]
    if render is None:
        return [_as_plain(rows[i]) for i in order]
    for i in sorted(order):
        _check_template(rows[i], render, f"data.path={section.path}: row {i + 1}")
    return [rows[i] for i in order]


def _told_apart(order: list[int], rows: list[Row], path: str) -> list[int]:
    """Of the rows in an order, all but pairs of the same answer twice: these teach nothing, and no
    score could get them right.

    Raises:
        ConfigError: none is left.
    """
    kept = [i for i in order if "chosen" not in rows[i] or rows[i]["chosen"] != rows[i]["rejected"]]
    if not kept:
        raise ConfigError(f"data.path={path}: the chosen answer of every pair is the rejected one.")
    if left_out := len(order) - len(kept):
        log.warning("data: %d pairs are left out, whose two answers are the same", left_out)
    return kept


def chat_template(tokenizer: Any, variables: Mapping[str, Any] | None = None) -> Render | None:
    """What makes a text of a chat, by the template's variables; None where the tokenizer has no
    template.
    """
    if not tokenizer.chat_template:
        return None
    return partial(templated, tokenizer, **(variables or {}))


def with_variables(rows: list[Row], variables: Mapping[str, Any]) -> list[Row]:
    """The rows, each with the variables of the chat template under TRL's name for them.

    Raises:
        ConfigError: there are variables, and no row goes through a template.
    """
    if not variables:
        return rows
    if not any(is_chat(value) for row in rows for value in row.values()):
        raise ConfigError(
            "data.template_kwargs: has no effect, since no row goes through a chat template; it "
            "takes rows that are chats, and a tokenizer with a template"
        )
    return [{**row, "chat_template_kwargs": dict(variables)} for row in rows]


def _check_template(row: Row, render: Render, where: str) -> None:
    """Refuse a row with a chat that the template does not take."""
    from jinja2 import TemplateError

    prompt = row.get("prompt", [])
    for name, value in row.items():
        if not is_chat(value):
            continue
        try:
            render(value if name in ("prompt", "messages") else [*prompt, *value])
        except (TemplateError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{where}: the tokenizer's chat template refuses its {name}: {brief(error)}"
            ) from error


def split_rows(rows: list[Row], held_out: float) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out: a share below 1, a number from 1 on, 0 = none.

    A share is rounded up. Rows held out are distinct, and what repeats one of them is not trained
    on. Pairs of a prompt that share answers are on one side, and a few fewer may be held out: an
    answer would be judged after it was taught.

    Raises:
        ConfigError: nothing would be left to train on.
    """
    count = held_out_count(held_out, len(rows))
    distinct: dict[str, Row] = {}
    for row in rows:
        distinct.setdefault(json.dumps(row, sort_keys=True), row)
    if count >= len(distinct):
        raise ConfigError(
            f"data.held_out={held_out:g}: of {len(rows)} rows, {len(distinct)} of them distinct, "
            "none would be left to train on; lower it (0 = none is held out)."
        )
    judging = {key: distinct[key] for key in _with_whole_prompts(distinct, count)}
    train = [row for row in rows if json.dumps(row, sort_keys=True) not in judging]
    if repeated := len(rows) - len(train) - len(judging):
        log.warning("data: %d rows that are held out too are not trained on", repeated)
    return train, list(judging.values())


def _with_whole_prompts(distinct: dict[str, Row], count: int) -> list[str]:
    """The first keys, `count` at most, that leave no row behind which shares an answer to the same
    prompt with one of theirs; the first `count` of all where that gives less than half of them.
    """
    told = {
        key: [json.dumps([row.get("prompt"), row[name]]) for name in ("chosen", "rejected")]
        for key, row in distinct.items()
        if "chosen" in row
    }
    times = Counter(chain.from_iterable(told.values()))
    groups: dict[str, list[str]] = {}
    for key, row in distinct.items():
        shares = any(times[one] > 1 for one in told.get(key, ()))
        groups.setdefault(json.dumps(row.get("prompt")) if shares else key, []).append(key)
    kept: list[str] = []
    for keys in groups.values():
        kept += keys if len(kept) + len(keys) <= count else []
    if 2 * len(kept) >= count:
        return kept
    log.warning("data: prompts are few, and some answers held out are trained on too")
    return list(distinct)[:count]


def merging_prompts(rows: Sequence[Row], tokenizer: Any) -> int:
    """How many prompts that are texts end within a token which their completion goes on with, as
    after a space that most tokenizers put before the next word: no run goes on from such tokens.
    """

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    found = 0
    for row in rows:
        if isinstance(row.get("prompt"), str):
            prompt = ids(row["prompt"])
            found += ids(row["prompt"] + row["completion"])[: len(prompt)] != prompt
    return found


def _columns_of(section: SFTDataSection | PairDataSection, names: Sequence[str]) -> dict[str, str]:
    if isinstance(section, SFTDataSection):
        return sft_columns(section, names)
    return pair_columns(section, names)


def _require(names: Sequence[str], key: str, wanted: str, path: str) -> None:
    require_column(names, wanted, key=f"data.{key}", path=path)


def _row(table: Columns, wanted: dict[str, str], number: int, path: str) -> Row:
    row = {name: table[column][number] for name, column in wanted.items()}
    row = {name: value if name == "text" else chat_in(value) for name, value in row.items()}
    if _is_chat(row.get("text")):
        row = {"messages": row["text"]}
    for name, value in row.items():
        if not _is_chat(value) and (name == "messages" or not _is_text(value)):
            chat = "a list of messages with role and content, or one as JSON"
            raise ConfigError(
                f"data.path={path}: row {number + 1} of column {wanted[name]} holds "
                f"{str(value)[:40]!r}; "
                f"must be {'' if name == 'messages' else 'a text, or '}{chat}."
            )
    if any(is_chat(value) for value in row.values()):
        return _as_chats(row, f"data.path={path}: row {number + 1}")
    return {name: encodable(text) for name, text in row.items()}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_chat(value: Any) -> bool:
    messages = value if isinstance(value, list) else []
    return bool(messages) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )


def _as_chats(row: Row, where: str) -> Row:
    """Every text of the row as a message: the prompt's is the user's, any other the assistant's.

    Answers that are whole conversations lose the prompt that they begin with. An answer that the
    prompt's last message begins is one message with it, as PPO shows it to a reward.

    Raises:
        ConfigError: what is left of an answer does not begin with the assistant.
    """
    roles = {"prompt": "user"}
    chats = {
        name: _bare(value)
        if is_chat(value)
        else [{**answer(encodable(value))[0], "role": roles.get(name, "assistant")}]
        for name, value in row.items()
    }
    prompt = chats.get("prompt", [])
    for name in chats.keys() - {"prompt"} if prompt else ():
        is_whole = chats[name][: len(prompt)] == prompt
        chats[name] = chats[name][len(prompt) :] if is_whole else chats[name]
        if not chats[name] or chats[name][0]["role"] != "assistant":
            raise ConfigError(
                f"{where}: the {name} answer does not go on from its prompt with an assistant's "
                "message"
            )
    if prompt[:-1] and prompt[-1]["role"] == "assistant":
        begun, chats["prompt"] = prompt[-1]["content"], prompt[:-1]
        for name in chats.keys() - {"prompt"}:
            first, *others = chats[name]
            chats[name] = [{**first, "content": begun + first["content"]}, *others]
    return chats


def _bare(messages: list[Row]) -> list[Row]:
    return [{"role": m["role"], "content": encodable(m["content"])} for m in messages]


def _as_plain(row: Row) -> Row:
    """A row of chats as a row of texts."""
    texts = {name: as_text(value) for name, value in row.items()}
    if "messages" in texts:
        return {"text": texts["messages"]}
    if "prompt" in texts and is_chat(row["prompt"]):
        texts["prompt"] += "\n"
    return texts
