"""`python -m ppo_lab.bench growth`: how time and memory grow with the work.

Time: one PPO iteration at growing batches and growing responses, each in a process of its own; the
exponent is the slope of log seconds over log size (1 = linear). Memory: the most that the loss of a
fixed number of tokens takes on top of head and hidden states, at growing vocabularies, under each
kind of head, and with entropies; and what that costs in time beside logits that are kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ppo_lab.bench.report import origin
from ppo_lab.bench.runs import ours_here, run
from ppo_lab.bench.shapes import SHAPES, Shape
from ppo_lab.models.logprobs import Head, from_logits, token_logprobs
from ppo_lab.plan.machine import seconds_of
from ppo_lab.plan.trace import peak_bytes
from ppo_lab.record import write_atomically

FACTORS = (1, 2, 4, 8)
VOCABULARIES = (2**14, 2**15, 2**16, 2**17, 2**18)
KINDS = ("frozen", "trained", "soft-capped", "entropies")
# Tokens and width of the loss whose memory is taken; vocabulary, width and pairs of the one that is
# timed.
TOKENS, WIDTH = 256, 128
TIMED_VOCABULARY, TIMED_WIDTH, PAIRS = 2**16, 768, 5


def main(asked: argparse.Namespace) -> int:
    """Measure, show, keep."""
    console = Console()
    grown = {
        "batch": lambda shape, factor: replace(shape, batch=factor * shape.batch),
        "response": lambda shape, factor: replace(shape, new_tokens=factor * shape.new_tokens),
    }
    kept: dict[str, Any] = {**origin(asked.threads), "shape": asked.shape, "time": {}}
    kept["loss_memory_mb"] = {k: {str(v): loss_memory(v, k) for v in VOCABULARIES} for k in KINDS}
    kept["loss_time"] = {kind: loss_time(kind) for kind in KINDS}
    for name, grow in grown.items():
        kept["time"][name] = times(asked, grow)
        if asked.json:  # after each, so that what is broken off loses none of it
            write_atomically(asked.json, json.dumps(kept, indent=1) + "\n")
    show(kept, console)
    return 0


def times(asked: argparse.Namespace, grow: Callable[[Shape, int], Shape]) -> dict[str, Any]:
    """Median seconds of an iteration at each size, and the exponent of their growth."""
    seconds = {}
    for factor in FACTORS:
        shape = grow(SHAPES[asked.shape], factor)
        results = [
            run(ours_here("fp32"), shape, turn=turn, threads=asked.threads, seed=0)
            for turn in range(asked.rounds)
        ]
        seconds[str(factor)] = median(result.wall_s for result in results)
    return {"seconds": seconds, "exponent": exponent(FACTORS, list(seconds.values()))}


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of log seconds over log size, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def loss_memory(vocabulary: int, kind: str = "frozen") -> float:
    """MB that log-probs of TOKENS tokens and their gradient hold at once; head, states and the
    head's own gradient aside.
    """
    head, hidden, targets = _loss_of(vocabulary, WIDTH, kind)
    own = head.weight.nbytes if head.weight.requires_grad else 0
    work = _work(token_logprobs, head, hidden, targets, entropy=kind == "entropies")
    return (peak_bytes(work) - own) / 1e6


def loss_time(kind: str) -> float:
    """Seconds of log-probs and their gradient, over those by logits that are kept: the median of
    pairs in turn.
    """
    head, hidden, targets = _loss_of(TIMED_VOCABULARY, TIMED_WIDTH, kind)
    roads = [
        _work(road, head, hidden, targets, entropy=kind == "entropies")
        for road in (token_logprobs, _by_kept_logits)
    ]
    pairs = [[seconds_of(road) for road in roads] for _ in range(PAIRS)]
    return median(ours / plain for ours, plain in pairs)


def _loss_of(vocabulary: int, width: int, kind: str) -> tuple[Head, Tensor, Tensor]:
    hidden = torch.randn(TOKENS, width, requires_grad=True)
    weight = (torch.randn(vocabulary, width) * 0.02).requires_grad_(kind == "trained")
    head = Head(weight, softcap=30.0 if kind == "soft-capped" else 0.0)
    return head, hidden, torch.randint(0, vocabulary, (TOKENS,))


def _work(
    road: Callable[..., Any], head: Head, hidden: Tensor, targets: Tensor, *, entropy: bool
) -> Callable[[], None]:
    def work() -> None:
        found = road(hidden, head, targets, temperature=1.0, entropy=entropy)
        torch.cat([x for x in found if x is not None]).sum().backward()
        hidden.grad = head.weight.grad = None

    return work


def _by_kept_logits(hidden: Tensor, head: Head, targets: Tensor, **asked: Any) -> Any:
    return from_logits(head.logits(hidden), targets, **asked)


def show(kept: dict[str, Any], console: Console) -> None:
    """The record as tables."""
    table = Table(title=f"seconds of an iteration, {kept['shape']} shape")
    for column in ("grown", *(f"x {factor}" for factor in FACTORS), "exponent"):
        table.add_column(column, justify="right")
    for name, found in kept["time"].items():
        row = (f"{seconds:.2f}" for seconds in found["seconds"].values())
        table.add_row(name, *row, f"{found['exponent']:.2f}")
    console.print(table)
    memory = Table(title=f"MB that the loss of {TOKENS} tokens holds at once, by vocabulary")
    for column in ("", *map(str, VOCABULARIES)):
        memory.add_column(column, justify="right")
    for kind, found in kept["loss_memory_mb"].items():
        memory.add_row(kind, *(f"{mb:.1f}" for mb in found.values()))
    logits = (4e-6 * TOKENS * vocabulary for vocabulary in VOCABULARIES)
    memory.add_row("logits alone", *(f"{mb:.1f}" for mb in logits))
    console.print(memory)
    costs = ", ".join(f"{kind} {ratio:.2f}" for kind, ratio in kept["loss_time"].items())
    console.print(
        f"time of that loss over logits that are kept, {TIMED_VOCABULARY} x {TIMED_WIDTH}: {costs}"
    )
