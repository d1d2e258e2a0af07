"""What one iteration of a run has to do: lengths of prompts and responses, passes, steps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, NamedTuple

import torch

from ppo_lab.assembly import longest_prompt
from ppo_lab.config import Config
from ppo_lab.data import load_prompts
from ppo_lab.errors import ConfigError
from ppo_lab.models.byte_tokenizer import byte_tokenizer
from ppo_lab.models.loading import load_tokenizer
from ppo_lab.packing import pack_by_tokens
from ppo_lab.types import Tokens

# Batches that the typical one is taken from.
LOOKED_AT = 16
CHARACTERS_A_TOKEN = 4

# Answers that the embedded policy learnt from, looked at for their lengths.
ANSWERS = 512


class Row(NamedTuple):
    """The lengths of a prompt and of its response, tokens."""

    prompt: int
    response: int

    @property
    def seen(self) -> int:
        """Tokens that pass through the trunk: the last one predicts nothing that is asked for."""
        return self.prompt + self.response - 1

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that attention looks at."""
        return self.seen * (self.seen + 1) // 2


@dataclass(frozen=True)
class Workload:
    """One iteration, and how often it comes.

    `rows` are those of a typical batch; the longest response is sampled to its end by all.
    `examined` are those of an evaluation, if its prompts are of the same lengths. `notes` say what
    of it is assumed and not known.
    """

    rows: tuple[Row, ...]
    mini_batch: int
    samples_a_step: int
    epochs: int
    iterations: int
    sampled_at_once: int = 0
    micro_batch_tokens: int = 0
    examined: tuple[Row, ...] = ()
    evaluations: int = 0
    notes: tuple[str, ...] = field(default=())

    @property
    def longest(self) -> int:
        """Tokens of the longest response."""
        return max(row.response for row in self.rows)

    def chunks(self) -> list[tuple[Row, ...]]:
        """The rows that are sampled at a time."""
        return _parts(self.rows, self.sampled_at_once or len(self.rows))

    def steps(self) -> list[tuple[Row, ...]]:
        """The rows of each optimizer step of one epoch."""
        return _parts(self.rows, self.samples_a_step)

    def passes(self) -> list[tuple[Row, ...]]:
        """The rows of each forward and backward pass of one epoch."""
        return [part for step in self.steps() for part in self._passes_of(step)]

    def reading(self, pass_tokens: int) -> list[tuple[Row, ...]]:
        """The rows of each pass without gradients."""
        width = max(row.prompt for row in self.rows) + self.longest
        return _parts(self.rows, max(self.mini_batch, pass_tokens // width))

    def shared_by(self, processes: int) -> Workload:
        """What the busiest of several processes has to do, for which the others wait."""

        def share(samples: int) -> int:
            return -(-samples // processes)

        return replace(
            self,
            rows=self.rows[: share(len(self.rows))],
            mini_batch=share(self.mini_batch),
            samples_a_step=share(self.samples_a_step),
            examined=self.examined[: share(len(self.examined))],
        )

    def _passes_of(self, step: tuple[Row, ...]) -> list[tuple[Row, ...]]:
        if self.micro_batch_tokens <= 0:
            return _parts(step, self.mini_batch)
        lengths = torch.tensor([row.prompt + row.response for row in step])
        groups = pack_by_tokens(lengths, limit=self.micro_batch_tokens)
        return [tuple(step[i] for i in group.tolist()) for group in groups]


def workload_of(config: Config, *, response_tokens: int = 0) -> Workload:
    """The work of one iteration of a run, with the lengths of its own prompts where they can be
    had.

    Responses are taken to be `response_tokens` long, or else as long as they may become.
    """
    notes: list[str] = []
    prompts = _prompt_lengths(config, notes)
    responses = _response_lengths(
        config, response_tokens, notes, longest=config.generation.max_new_tokens
    )
    judged = _response_lengths(config, response_tokens, longest=config.evaluation.max_new_tokens)
    ppo = config.ppo
    mini = ppo.mini_batch_size or ppo.batch_size
    every = config.evaluation.every
    return Workload(
        rows=tuple(map(Row, prompts, itertools.cycle(responses))),
        mini_batch=mini,
        samples_a_step=mini * ppo.gradient_accumulation_steps,
        epochs=ppo.ppo_epochs,
        iterations=ppo.steps,
        sampled_at_once=config.generation.batch_size,
        micro_batch_tokens=ppo.micro_batch_tokens,
        examined=tuple(
            Row(prompts[i % len(prompts)], judged[i % len(judged)])
            for i in range(config.evaluation.prompts)
        ),
        # The first one and the last, and those between them.
        evaluations=2 + ((ppo.steps - 1) // every if every else 0),
        notes=tuple(notes),
    )


def tokens_of(rows: Sequence[Row], vocabulary: int) -> Tokens:
    """Token ids without meaning, of these lengths."""
    draw = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(3, vocabulary, (length,), generator=draw).tolist()

    return Tokens.pack(
        [ids(row.prompt) for row in rows], [ids(row.response) for row in rows], pad_id=0
    )


def _prompt_lengths(config: Config, notes: list[str]) -> list[int]:
    """The lengths of a typical batch's prompts, tokens."""
    try:
        return _typical(_known_lengths(config, notes), config.ppo.batch_size)
    except ConfigError:
        longest = config.data.max_prompt_tokens
        notes.append(
            f"the prompts cannot be read here: counted at data.max_prompt_tokens={longest}"
        )
        return [longest] * config.ppo.batch_size


def _known_lengths(config: Config, notes: list[str]) -> list[int]:
    """The lengths of every training prompt.

    Where the model's tokenizer cannot be had they are estimated from the number of characters.
    """
    try:
        tokenizer, characters = load_tokenizer(config.model), 1
    except ConfigError:
        tokenizer, characters = byte_tokenizer(), CHARACTERS_A_TOKEN
        notes.append(f"no tokenizer here: {characters} characters counted as a token")
    sets = load_prompts(
        replace(config.data, max_prompt_tokens=config.data.max_prompt_tokens * characters),  # type: ignore[arg-type]
        tokenizer,
        max_prompt_tokens=longest_prompt(config) * characters,
        seed=config.seed,
    )
    return [-(-len(ids) // characters) for ids in sets.train.ids]


def _response_lengths(
    config: Config, asked: int, notes: list[str] | None = None, *, longest: int
) -> list[int]:
    """The lengths of responses, as often as need be: as asked for, as the embedded policy has
    learnt to answer, or as `longest`, which they may become.
    """
    from ppo_lab.embedded.build import folder_of_this_version
    from ppo_lab.embedded.corpus import sft_rows

    if asked:
        return [min(asked, longest)]
    if config.model.path == str(folder_of_this_version() / "policy"):
        tokenizer = load_tokenizer(config.model)
        answers = [row["completion"] for row in sft_rows(ANSWERS, split="train", seed=0)]
        return [min(len(tokenizer(answer)["input_ids"]) + 1, longest) for answer in answers]
    if notes is not None:
        notes.append("responses counted at their longest; response_tokens=N counts N")
    return [longest]


def _typical(lengths: list[int], size: int) -> list[int]:
    """Of some batches, drawn as training does, the one whose number of tokens is in the middle."""
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).tolist()
    repeated = [lengths[order[i % len(order)]] for i in range(size * LOOKED_AT)]
    batches = sorted((repeated[i : i + size] for i in range(0, len(repeated), size)), key=fmean)
    return batches[LOOKED_AT // 2]


def _parts(rows: Sequence[Any], size: int) -> list[tuple[Any, ...]]:
    return [tuple(rows[i : i + size]) for i in range(0, len(rows), size)]
