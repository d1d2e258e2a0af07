"""`python -m ppo_lab.bench learning`: who learns most, at how little KL, in how little time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ppo_lab.bench.arguments import (
    add_venvs,
    cores,
    existing_file,
    list_of,
    model_folder,
    numbers,
    positive,
    result_file,
    seed,
)
from ppo_lab.bench.learning.runs import (
    CONTESTANTS,
    OURS,
    Contestant,
    Record,
    cells,
    overrides,
    train_and_judge,
    variant,
)
from ppo_lab.bench.learning.task import Task
from ppo_lab.bench.venvs import python_of
from ppo_lab.command_line import command_problems
from ppo_lab.config import register_schema
from ppo_lab.rules import problems


def compare(asked: argparse.Namespace) -> None:
    """The comparison as asked for on the command line.

    Raises:
        RuntimeError: a process fails, or there is nothing to compare on.
    """
    from ppo_lab.bench.learning.report import show
    from ppo_lab.bench.report import origin

    console = Console()

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    task = Task(
        model=str(asked.model),
        reward_model=str(asked.reward_model),
        prompts=str(asked.prompts),
        iterations=asked.iterations,
    )
    record = Record(asked.json, task, origin(asked.threads))
    variants = [variant(words) for words in asked.variant]
    check_variants(variants, task)
    chosen = [*(CONTESTANTS[name] for name in asked.contestants), *variants]
    if not chosen:
        raise RuntimeError("nobody to compare: name some by --contestants or --variant")
    contestants = {c.name: c for c in chosen}
    pythons = {
        c.name: python_of(c.environment or OURS, asked.venvs, say, as_found=asked.as_found)
        for c in chosen
    }
    train_and_judge(
        cells(contestants, asked.betas, asked.seeds),
        contestants,
        task,
        pythons,
        record,
        folder=asked.folder.absolute(),
        threads=asked.threads,
        say=say,
    )
    show(record.kept, console, ours=OURS)


def check_variants(variants: Sequence[Contestant], task: Task) -> None:
    """Nothing, where each variant is a run that may be.

    Raises:
        RuntimeError: with all that is wrong.
    """
    register_schema()
    spec = task.spec(prompts=Path(task.prompts), beta=0.1, seed=0, threads=1) | {"output": "o"}
    wrong = [
        problem
        for found in variants
        for problem in command_problems([*overrides(spec), *found.overrides], check=problems)
    ]
    if wrong:
        raise RuntimeError("\n".join(dict.fromkeys(wrong)))


def parser() -> argparse.ArgumentParser:
    """What may be asked for."""
    listed = "; ".join(f"{c.name}: {c.about}" for c in CONTESTANTS.values())
    p = argparse.ArgumentParser(
        prog="python -m ppo_lab.bench learning", description=__doc__, epilog=listed
    )
    p.add_argument(
        "--model", type=model_folder, required=True, help="folder of the model to start from"
    )
    p.add_argument(
        "--reward-model", type=model_folder, required=True, help="folder of its reward model"
    )
    p.add_argument("--prompts", type=existing_file, required=True, help="JSON lines with `prompt`")
    p.add_argument(
        "--contestants",
        type=list_of(CONTESTANTS),
        default=list(CONTESTANTS),
        help="comma-separated; all by default",
    )
    p.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="OVERRIDES",
        help='ours with more overrides, as "ppo.lam=1 critic=head"; may be given several times',
    )
    p.add_argument("--betas", type=numbers(float), default=[0.05, 0.3, 1.0])
    p.add_argument("--seeds", type=numbers(seed), default=[0, 1, 2])
    p.add_argument("--iterations", type=positive, default=Task.iterations)
    p.add_argument("--threads", type=positive, default=cores(), help="threads of each process")
    p.add_argument(
        "--json", type=result_file, help="file that keeps the results; runs in it are not made"
    )
    p.add_argument(
        "--folder",
        type=Path,
        default=Path("outputs/bench-learning"),
        help="where the trained models lie",
    )
    add_venvs(p)
    return p
