"""`python -m ppo_lab.bench features`: how much a value head on the policy's trunk could know.

A value head is a linear map of its trunk's hidden states. The share of the score's variance that
the best such map explains, on answers that it was not fitted on, bounds what a head learns as long
as the trunk stays as it is; the reward model's own states show what a critic that starts from them
has from the first iteration on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.utils.logging import disable_progress_bar

from ppo_lab.bench.learning.judge import answered, batches, sample, score
from ppo_lab.bench.learning.task import prompts_in
from ppo_lab.bench.report import origin
from ppo_lab.record import write_atomically

FITTED = 0.75  # the share of the answers that a map is fitted on
RIDGE = 1e-3  # penalty, as a share of the states' mean square
SPLITS = 4  # ways to choose what is fitted on
FEWEST = 16  # answers, of which some are to be left unseen
LATE = 0.75  # from this share of the longest answer on, tokens are late


class Answers(NamedTuple):
    """Scored answers, and for each of their tokens, one after the other: the states that predicted
    it, by whose they are; the answer that it is of; whether it is a late one.
    """

    scores: Float[Tensor, " answers"]
    states: dict[str, Float[Tensor, "tokens hidden"]]
    of: Int[Tensor, " tokens"]
    late: Bool[Tensor, " tokens"]


def main(asked: argparse.Namespace) -> int:
    """Sample, score, fit, show.

    Raises:
        RuntimeError: too few prompts, or model and reward model do not read the same tokens.
    """
    prompts = prompts_in(asked.prompts)[: asked.answers]
    if len(prompts) < FEWEST:
        raise RuntimeError(f"{asked.prompts}: {len(prompts)} distinct prompts; needs {FEWEST}")
    torch.set_num_threads(asked.threads)
    disable_progress_bar()
    found = collect(
        asked.model, asked.reward_model, prompts, new_tokens=asked.new_tokens, seed=asked.seed
    )
    shares = {
        name: [explained(states, found, seed=seed) for seed in range(SPLITS)]
        for name, states in found.states.items()
    }
    show(found, shares, Console())
    if asked.json:
        kept = {
            **origin(asked.threads),
            "model": asked.model.name,
            "reward_model": asked.reward_model.name,
            "prompts": asked.prompts.name,
            "answers": len(found.scores),
            "tokens": len(found.of),
            "new_tokens": asked.new_tokens,
            "seed": asked.seed,
            "explained of all and of late tokens, by split": shares,
        }
        write_atomically(asked.json, json.dumps(kept, indent=1) + "\n")
    return 0


@torch.inference_mode()
def collect(
    model: Path, reward_model: Path, prompts: Sequence[str], *, new_tokens: int, seed: int
) -> Answers:
    """One answer to each prompt, sampled at temperature 1, with the states of every layer of the
    model and the last of the reward model, both on the same tokens.

    Raises:
        RuntimeError: the two do not read the same tokens.
    """
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    reading = AutoTokenizer.from_pretrained(reward_model, padding_side="right")
    if tokenizer.get_vocab() != reading.get_vocab():
        raise RuntimeError(f"{reward_model}: its tokenizer has another vocabulary than the model's")
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    classifier = AutoModelForSequenceClassification.from_pretrained(
        reward_model, dtype=torch.float32
    ).eval()
    scores, real, states = [], [], []
    for rows in batches(list(prompts)):
        ids, attention, mask = sample(policy, tokenizer, rows, new_tokens)
        texts = answered(tokenizer, ids, attention.bool(), new=mask.shape[1])
        pairs = zip(rows, texts, strict=True)
        scores.append(score(classifier, reading, [prompt + answer for prompt, answer in pairs]))
        real += list(mask)
        columns = slice(-mask.shape[1] - 1, -1)
        layers = _layers(policy, classifier, ids, attention)
        states.append({name: layer[:, columns][mask] for name, layer in layers.items()})
    joined = {name: torch.cat([part[name] for part in states]) for name in states[0]}
    answer, column = pad_sequence(real, batch_first=True).nonzero(as_tuple=True)
    return Answers(torch.cat(scores), joined, answer, column >= LATE * new_tokens)


def _layers(policy: Any, classifier: Any, ids: Tensor, attention: Tensor) -> dict[str, Tensor]:
    """Hidden states (batch, time, hidden) by whose they are."""
    inputs = {
        "input_ids": ids,
        "attention_mask": attention,
        "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
    }
    every = policy(**inputs, output_hidden_states=True).hidden_states
    names = ["embeddings", *(f"after layer {i}" for i in range(1, len(every)))]
    read = classifier.base_model(**inputs).last_hidden_state
    return {**dict(zip(names, every, strict=True)), "reward model": read}


def explained(
    states: Float[Tensor, "tokens hidden"], found: Answers, *, seed: int
) -> tuple[float, float]:
    """1 - var(score - prediction) / var(score) over unseen answers' tokens, and over the late ones,
    of the map fitted on the others by least squares with a small penalty.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(found.scores), generator=generator)
    fitted = torch.zeros(len(order), dtype=torch.bool)
    fitted[order[: round(FITTED * len(order))]] = True
    known, targets = fitted[found.of], found.scores.double()[found.of]
    x = torch.cat([states.double(), torch.ones(len(states), 1)], 1)
    a, b = x[known], targets[known]
    penalty = RIDGE * a.square().mean() * len(a) * torch.eye(x.shape[1], dtype=x.dtype)
    error = targets - x @ torch.linalg.solve(a.T @ a + penalty, a.T @ b)

    def share(tokens: Tensor) -> float:
        return 1.0 - float(error[tokens].var() / targets[tokens].var())

    return share(~known), share(~known & found.late)


def show(found: Answers, shares: dict[str, list[tuple[float, float]]], console: Console) -> None:
    """As a table: whose states explain how much."""
    table = Table(title="what of the score's variance a linear head explains", box=box.SIMPLE)
    table.add_column("hidden states of", no_wrap=True)
    for name in ("all tokens", "late tokens"):
        table.add_column(name, justify="right")
    for name, of_splits in shares.items():
        table.add_row(name, *map(_spread, zip(*of_splits, strict=True)))
    console.print(table)
    for line in (
        f"{len(found.scores)} answers of {len(found.of)} tokens",
        f"unseen answers, mean±sd of {SPLITS} splits; late: the last {1 - LATE:.0%} of the longest",
    ):
        console.print(line, highlight=False, soft_wrap=True)


def _spread(shares: Sequence[float]) -> str:
    return f"{fmean(shares):.3f}±{stdev(shares):.3f}"
