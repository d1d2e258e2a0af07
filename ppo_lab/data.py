"""Prompt sets, and the resumable stream of prompt batches that training draws from them."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ppo_lab.config import DataSection, EmbeddedData, FileData, HubData
from ppo_lab.errors import ConfigError
from ppo_lab.prompt_tokens import PromptEncoder, described, is_chat
from ppo_lab.tables import (
    Columns,
    column_names,
    find_file,
    read_file,
    read_hub,
    require_column,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ppo_lab.types import Prompts

log = logging.getLogger(__name__)

# one stream of random numbers for each purpose, so that none depends on what another has drawn
_ORDER, _SPLIT, _CUT, _CUT_HELD_OUT = 0, 1, 2, 3

_CHAT = re.compile(r'\s*\[\s*\{\s*"')
_RESERVED = ("prompts", "completions", "completion_ids")


@dataclass(frozen=True)
class PromptSets:
    """The prompts to train on and those kept for evaluation; no prompt is in both."""

    train: Prompts
    held_out: Prompts


class PromptStream:
    """Endless batches of prompts.

    Every epoch holds each prompt once, in an order that (seed, epoch) fixes. A batch may hold the
    end of one epoch and the beginning of the next. The state is the place in the stream.
    """

    def __init__(
        self, prompts: Prompts, *, batch_size: int, seed: int, shuffle: bool = True
    ) -> None:
        """The stream from its beginning; without `shuffle` in the order of `prompts`."""
        if not len(prompts):
            raise ValueError("prompts: a stream needs at least one prompt.")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: it must be at least 1.")
        self.prompts = prompts
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.position = 0

    def next_batch(self) -> Prompts:
        """The next `batch_size` prompts."""
        rows: list[int] = []
        while len(rows) < self.batch_size:
            taken = self._order()[self.position :][: self.batch_size - len(rows)]
            rows += taken
            self.position += len(taken)
            if self.position == len(self.prompts):
                self.epoch, self.position = self.epoch + 1, 0
        return self.prompts[rows]

    def state_dict(self) -> dict[str, int]:
        """The place in the stream, and what the order depends on."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "prompts": len(self.prompts),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where a stream over the same prompts was.

        Raises:
            ValueError: it had another number of prompts or another seed, and so another order.
        """
        for name, ours in (("prompts", len(self.prompts)), ("seed", self.seed)):
            if state[name] != ours:
                raise ValueError(
                    f"the stream of prompts was saved with {name}={state[name]}, now it has "
                    f"{ours}: its order cannot be continued."
                )
        self.epoch, self.position = state["epoch"], state["position"]

    def _order(self) -> list[int]:
        """The rows of this epoch in their order."""
        if not self.shuffle:
            return list(range(len(self.prompts)))
        return _generator(self.seed, _ORDER, self.epoch).permutation(len(self.prompts)).tolist()


def load_prompts(
    section: EmbeddedData | FileData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int = 0,
    seed: int = 0,
) -> PromptSets:
    """The prompts that a `data` section describes, tokenized, bounded in length, cut and split.

    `max_prompt_tokens` is what the model's context leaves for a prompt, 0 = no limit; the section's
    own bound holds as well. Lengths count every token of the prompt, those that the tokenizer or
    the chat template adds included. Every other column of the data stands in `Prompts.columns`.

    Raises:
        ConfigError: the data cannot be read or no prompt is left; the message says why.
    """
    bounds = [bound for bound in (section.max_prompt_tokens, max_prompt_tokens) if bound]
    encoder = PromptEncoder(
        tokenizer,
        shortest=section.min_prompt_tokens,
        longest=min(bounds, default=0),
        truncate=section.long_prompts == "truncate",
        chat=section.chat,
        template_kwargs=section.template_kwargs,
    )
    if isinstance(section, EmbeddedData):
        from ppo_lab import embedded

        train, kept = (embedded.prompts(split) for split in ("train", "held_out"))
        kept = kept[: held_out_count(section.held_out, len(train) + len(kept))]
        return PromptSets(encoder.encode(train, {}), encoder.encode(kept, {}))
    prompts = _encoded(section, encoder, seed, _CUT)
    if (judged := judged_by(section)) is None:
        return split_prompts(prompts, held_out=section.held_out, seed=seed)
    with _said_of_held_out(section):
        held_out = _encoded(judged, encoder, seed, _CUT_HELD_OUT)
    return keep_apart(prompts, held_out)


def judging(section: DataSection, held_out: Prompts, count: int) -> Prompts:
    """Of the prompts held out those by which a run is judged, so many or all: of a file spread over
    its length, since files are sorted, by label or by source, and their beginning stands for itself
    alone. The embedded ones are in no order.
    """
    if not isinstance(section, FileData) or count >= len(held_out):
        return held_out[:count]
    return held_out[[i * len(held_out) // count for i in range(count)]]


def judged_by(section: FileData) -> FileData | None:
    """Where the prompts are that judge the run, if not among those of `path`."""
    other = section.held_out_path
    if not isinstance(section, HubData):
        return replace(section, path=other, limit=0) if other else None
    if not other and section.held_out_split in ("", section.split):
        return None
    split = section.held_out_split or section.split
    if other in ("", section.path):
        return replace(section, split=split, limit=0)
    return replace(section, path=other, split=split, subset="", revision="", limit=0)


def keep_apart(prompts: Prompts, held_out: Prompts) -> PromptSets:
    """Prompts to train on and others to judge by, each of these once; what repeats one of them is
    left out of training, and told of.

    Raises:
        ConfigError: none is left to train on.
    """
    first_rows: dict[tuple[int, ...], int] = {}
    for row, ids in enumerate(held_out.ids):
        first_rows.setdefault(tuple(ids), row)
    train = [row for row, ids in enumerate(prompts.ids) if tuple(ids) not in first_rows]
    if not train:
        raise ConfigError("data: every prompt is held out too; none is left to train on.")
    if repeated := len(prompts) - len(train):
        log.warning("data: %d prompts that are held out too are not trained on", repeated)
    return PromptSets(prompts[train], held_out[list(first_rows.values())])


def split_prompts(prompts: Prompts, *, held_out: float, seed: int) -> PromptSets:
    """The prompts in two parts, drawn by `seed`.

    `held_out` is a share below 1 or a number from 1 on; 0 holds none out, which no run may ask for,
    since held-out prompts are what it is judged by. They are distinct, and whatever repeats one of
    them is left out of training: a prompt is never in both parts.

    Raises:
        ConfigError: there are not enough distinct prompts.
    """
    wanted = held_out_count(held_out, len(prompts))
    first_rows: dict[tuple[int, ...], int] = {}
    for row, ids in enumerate(prompts.ids):
        first_rows.setdefault(tuple(ids), row)
    if wanted >= len(first_rows):
        raise ConfigError(_too_few(held_out, wanted, len(first_rows)))
    order = _generator(seed, _SPLIT).permutation(len(first_rows))[:wanted]
    keys = list(first_rows)
    kept = {keys[i] for i in order.tolist()}
    train = [row for row, ids in enumerate(prompts.ids) if tuple(ids) not in kept]
    return PromptSets(prompts[train], prompts[sorted(first_rows[key] for key in kept)])


def _too_few(held_out: float, wanted: int, distinct: int) -> str:
    """What to do where so many prompts held out would leave none to train on."""
    if distinct < 2:
        return (
            "data: there is one distinct prompt; needs two or more, to train on some and to hold "
            "others out."
        )
    return (
        f"data.held_out={held_out:g}: holds out {wanted} prompts where {distinct} are distinct; "
        f"must be at most {distinct - 1}, so that one is left to train on, or use more prompts."
    )


def problems(section: DataSection, *, key: str = "data") -> list[str]:
    """What can be said against a data set before it is read, one sentence each."""
    if isinstance(section, HubData):
        return [] if section.path else [f"{key}.path: name the data set on the hub, as owner/name."]
    if not isinstance(section, FileData):
        return []
    found: list[str] = []
    for part in (section, judged_by(section)):
        try:
            with _said_of_held_out(section if part is not section else None):
                if part is not None:
                    _refuse_unknown_column(column_names(find_file(part.path)), part)
        except ConfigError as error:
            found += error.problems
    return found


def _encoded(section: FileData, encoder: PromptEncoder, seed: int, cut: int) -> Prompts:
    columns = _limited(_read(section), section.limit)
    texts = _take_prompts(columns, section)
    return encoder.encode(texts, columns, cuts=_cuts(section, len(texts), seed, cut))


@contextmanager
def _said_of_held_out(section: FileData | None) -> Iterator[None]:
    """What is said of a data set, said of the one that holds the prompts held out."""
    try:
        yield
    except ConfigError as error:
        if section is None:
            raise
        name = "held_out_path" if section.held_out_path else "held_out_split"
        told = [text.replace("data.path", f"data.{name}") for text in error.problems]
        key = f"data.{name}={getattr(section, name)}: "
        raise ConfigError([t if name in t else key + t for t in told]) from error


def _read(section: FileData) -> Columns:
    if isinstance(section, HubData):
        return read_hub(
            section.path,
            name=section.subset,
            split=section.split,
            revision=section.revision,
            limit=section.limit,
        )
    file = find_file(section.path)
    return read_file(file, text_columns=(section.prompt_column, section.messages_column))


def _limited(columns: Columns, limit: int) -> Columns:
    """The first `limit` rows; all of them if that is 0."""
    return {name: values[: limit or None] for name, values in columns.items()}


def _take_prompts(columns: Columns, section: FileData) -> list[Any]:
    """The prompts, taken out of the columns; so are columns that no reward could be given."""
    if not any(columns.values()):
        raise ConfigError(f"data.path={section.path}: the data set has no rows.")
    _refuse_unknown_column(list(columns), section)
    prompts = columns.pop(section.messages_column or section.prompt_column)
    for name in _RESERVED:
        if columns.pop(name, None) is not None:
            log.warning(
                "data: the column %r is left out; rewards get their own under that name", name
            )
    prompts = [chat_in(prompt) for prompt in prompts]
    if not section.messages_column:
        return prompts
    for row, prompt in enumerate(prompts, 1):
        if not is_chat(prompt):
            raise ConfigError(
                f"data.messages_column={section.messages_column}: row {row} is "
                f"{described(prompt)}; it must be a list of messages with role and content, or "
                "one as JSON."
            )
    return [_without_answer(prompt) for prompt in prompts]


def chat_in(prompt: Any) -> Any:
    """The chat that a text holds as JSON, as tables without lists keep it; all else as it is."""
    if not isinstance(prompt, str) or not _CHAT.match(prompt):
        return prompt
    try:
        found = json.loads(prompt)
    except (ValueError, RecursionError):
        return prompt
    return found if is_chat(found) else prompt


def _without_answer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation up to what the assistant is to answer."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end]


def _refuse_unknown_column(names: Sequence[str], section: FileData) -> None:
    key = "messages_column" if section.messages_column else "prompt_column"
    require_column(names, getattr(section, key), key=f"data.{key}", path=section.path)


def held_out_count(held_out: float, count: int) -> int:
    """How many of `count` prompts are held out: of a share, rounded up."""
    # Rounding alone adds none: 0.07 * 100 is 7.000000000000001.
    return int(held_out) if held_out >= 1 else math.ceil(round(held_out * count, 9))


def _cuts(section: FileData, count: int, seed: int, stream: int) -> list[int]:
    """How many first tokens of each prompt are kept; empty = all of them."""
    if not section.cut_max_tokens:
        return []
    low = section.cut_min_tokens or section.cut_max_tokens
    return _generator(seed, stream).integers(low, section.cut_max_tokens + 1, size=count).tolist()


def _generator(*key: int) -> np.random.Generator:
    """Random numbers of their own for every key; nothing global is read or changed."""
    return np.random.default_rng(key)
