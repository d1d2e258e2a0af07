"""`python -m ppo_lab.bench options`: what each option of this project costs or saves.

One iteration with an option and one without, in turn, each in a process of its own: the ratio says
how many times less the option takes (below 1: how much more).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import product
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ppo_lab.bench.command_lines import OPTIONS
from ppo_lab.bench.equality import gate
from ppo_lab.bench.report import origin, show_gates
from ppo_lab.bench.runs import Result, ours_here, pairwise, run
from ppo_lab.bench.shapes import SHAPES, Shape
from ppo_lab.record import write_atomically


@dataclass(frozen=True)
class Option:
    """A setting to be measured beside another: what is added to a worker's task for each."""

    meaning: str
    on: dict[str, Any]
    off: dict[str, Any] = field(default_factory=dict)


def options(shape: Shape) -> dict[str, Option]:
    """Everything that can be measured, on this shape."""
    layers = shape.n_layer
    half = shape.mini_batch * (shape.longest_prompt + shape.new_tokens) // 2
    upper = {"lora": {**shape.spec("fp32", threads=1, seed=0)["lora"]}}
    upper["lora"]["layers_to_transform"] = list(range(layers - max(1, layers // 4), layers))
    return {
        "fast road": Option(
            "the layers made for PPO instead of transformers'", {}, {"road": "transformers"}
        ),
        "cache_trunk": Option(
            "ppo.cache_trunk=true, LoRA on the upper quarter of the layers",
            {**upper, "ppo": {"cache_trunk": True}},
            upper,
        ),
        "gradient_checkpointing": Option(
            "ppo.gradient_checkpointing=true",
            {"ppo": {"gradient_checkpointing": True}},
            {"road": "transformers"},
        ),
        "micro_batch_tokens": Option(
            "ppo.micro_batch_tokens, half of a mini-batch a pass",
            {"ppo": {"micro_batch_tokens": half}},
        ),
        "torch_compile": Option(
            "model.torch_compile=true, once it is compiled", {"compiled": True}
        ),
        "cuda_graphs": Option("model.cuda_graphs=true, as by default", {}, {"cuda_graphs": False}),
        "adam=8bit": Option("ppo.adam=8bit", {"ppo": {"adam": "8bit"}}),
    }


def chosen(only: Sequence[str]) -> list[str]:
    """The options to measure: these, or all that this machine has what they need for.

    Raises:
        RuntimeError: one of these needs what is not here.
    """
    here = {
        "": True,
        "a GPU": torch.cuda.is_available(),
        "bitsandbytes": find_spec("bitsandbytes") is not None,
    }
    for name in only:
        if not here[OPTIONS[name]]:
            raise RuntimeError(f"{name} needs {OPTIONS[name]}, which is not here")
    return list(only) or [name for name, needed in OPTIONS.items() if here[needed]]


def main(asked: argparse.Namespace) -> int:
    """Gate, measure, show, keep; 1 where the gate fails.

    Raises:
        RuntimeError: an option needs what is not here.
    """
    names = chosen(asked.only)
    shape = replace(SHAPES[asked.shape], architecture=asked.architecture)
    console = Console()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    equal = gate(asked.precision, asked.architecture, device)
    show_gates([equal], console)
    if not equal.passed:
        return 1
    kept: dict[str, Any] = {
        **origin(asked.threads),
        "shape": asked.shape,
        "architecture": asked.architecture,
        "precision": asked.precision,
        "options": {},
    }
    found = options(shape)
    for name in names:
        option = found[name]
        kept["options"][name] = {"meaning": option.meaning, **measured(asked, shape, option)}
        if asked.json:  # after each, so that what is broken off loses none of it
            write_atomically(asked.json, json.dumps(kept, indent=1) + "\n")
    show(kept, console)
    return 0


def measured(asked: argparse.Namespace, shape: Shape, option: Option) -> dict[str, Any]:
    """The ratios off / on of wall time, CPU time and memory, of each pair."""
    results: list[Result] = []
    for turn, (name, more) in product(
        range(asked.rounds), (("off", option.off), ("on", option.on))
    ):
        found = run(
            ours_here(asked.precision), shape, turn=turn, threads=asked.threads, seed=0, more=more
        )
        results.append(replace(found, contestant=name))
    return {
        "wall": pairwise(results, "on", "off", lambda r: r.wall_s),
        "cpu": pairwise(results, "on", "off", lambda r: r.cpu_s),
        "memory": pairwise(results, "on", "off", lambda r: r.peak_gb),
    }


def show(kept: dict[str, Any], console: Console) -> None:
    """The record as a table."""
    table = Table(title=f"without / with each option, {kept['shape']} shape: median (range)")
    for column in ("option", "wall", "CPU", "memory"):
        table.add_column(column)
    for name, found in kept["options"].items():
        cells = (_median_and_range(found[kind]) for kind in ("wall", "cpu", "memory"))
        table.add_row(name, *cells)
    console.print(table)


def _median_and_range(ratios: list[float]) -> str:
    return f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
