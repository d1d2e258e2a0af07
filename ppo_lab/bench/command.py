"""This project and those it replaces on the same work, in turn: `python -m ppo_lab.bench`.

`python -m ppo_lab.bench growth` measures how time and memory grow with the work, `... options` what
each option costs or saves, `... learning` who learns most at how little KL in how little time,
`... features` how much a value head could know.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

from rich.console import Console

from ppo_lab.bench.arguments import add_venvs, cores, list_of, positive, result_file, seed, some_of
from ppo_lab.bench.command_lines import features, growth, learning, options
from ppo_lab.bench.shapes import ARCHITECTURES, SHAPES, Shape
from ppo_lab.bench.venvs import REQUIREMENTS

# Benchmarks with a command line of their own.
OTHERS = {f.__name__: f for f in (features, growth, learning, options)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Gate, run, show, keep; 1 where the gate fails or a worker does."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    console = Console(stderr=False)
    try:
        if words and words[0] in OTHERS:
            asked = OTHERS[words[0]]().parse_args(words[1:])  # before what takes long to import
            return import_module(f"ppo_lab.bench.{words[0]}").main(asked)
        return bench(parser().parse_args(words), console)
    except (RuntimeError, OSError) as error:
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return 1


def bench(asked: argparse.Namespace, console: Console) -> int:
    """The benchmark as asked for on the command line."""
    import torch

    from ppo_lab.bench.equality import gate
    from ppo_lab.bench.report import show, show_gates
    from ppo_lab.record import write_atomically

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    gates = [gate(precision, asked.architecture, device) for precision in asked.precision]
    show_gates(gates, console)
    if not all(g.passed for g in gates):
        return 1
    kept: dict[str, Any] = {}
    try:
        # Kept after every round: what is broken off later loses none of it.
        for kept in records(asked, gates, say):
            if asked.json:
                write_atomically(asked.json, json.dumps(kept, indent=1) + "\n")
    finally:
        if kept:
            show(kept, console)
    if asked.json:
        say(f"wrote {asked.json}")
    return 0


def records(asked: argparse.Namespace, gates: list[Any], say: Any) -> Iterator[dict[str, Any]]:
    """All that is known after each round; rates are measured once, after the first."""
    from ppo_lab.bench.report import record
    from ppo_lab.bench.runs import interleaved

    shape, rivals = shape_of(asked), contestants(asked, say)
    results: list[Any] = []
    rates: dict[str, Any] = {}
    for result in interleaved(
        rivals, shape, rounds=asked.rounds, threads=asked.threads, seed=asked.seed, say=say
    ):
        results.append(result)
        if len(results) % len(rivals) == 0:
            rates = rates or floors(asked)
            yield record(shape, results, gates, rates, threads=asked.threads, seed=asked.seed)


def contestants(asked: argparse.Namespace, say: Any) -> list[Any]:
    """Ours and the others, each at each precision; environments are made where they are missing."""
    from ppo_lab.bench.runs import OURS, Contestant
    from ppo_lab.bench.venvs import python_of

    pythons = {
        name: python_of(name, asked.venvs, say, as_found=asked.as_found)
        for name in (*asked.vs, OURS)
    }
    return [
        Contestant(trainer, precision, python)
        for precision in asked.precision
        for trainer, python in pythons.items()
    ]


def shape_of(asked: argparse.Namespace) -> Shape:
    """The work, on the architecture asked for."""
    return replace(SHAPES[asked.shape], architecture=asked.architecture)


def floors(asked: argparse.Namespace) -> dict[str, Any]:
    """Rates and floor of each precision, measured now."""
    import torch

    from ppo_lab.bench.floor import floor, measure_rates

    torch.set_num_threads(asked.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {}
    for precision in asked.precision:
        rates = measure_rates(precision, device)
        found[precision] = (rates, floor(shape_of(asked), precision, rates, seed=asked.seed))
    return found


def parser() -> argparse.ArgumentParser:
    """What may be asked for."""
    p = argparse.ArgumentParser(prog="python -m ppo_lab.bench", description=__doc__)
    p.add_argument("--shape", choices=SHAPES, default="small", help="the model and the batch")
    p.add_argument(
        "--architecture", choices=ARCHITECTURES, default="bloom", help="the family of the model"
    )
    p.add_argument(
        "--vs",
        type=list_of(REQUIREMENTS),
        default=["trl112", "trl0114"],
        help="the other trainers, comma-separated; empty = none",
    )
    p.add_argument(
        "--precision",
        type=some_of(("fp32", "bf16")),
        default=["fp32", "bf16"],
        help="precision of the weights, comma-separated",
    )
    p.add_argument("--rounds", type=positive, default=3, help="processes of each contestant")
    p.add_argument("--threads", type=positive, default=cores(), help="threads of each process")
    p.add_argument("--seed", type=seed, default=0, help="of weights, prompts and sampling")
    p.add_argument("--json", type=result_file, help="file that keeps the result")
    add_venvs(p)
    return p
