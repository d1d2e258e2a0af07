"""Training runs of every contestant in turn, each judged, each kept as soon as it is done."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import ppo_lab
from ppo_lab.bench.learning.task import Task
from ppo_lab.record import write_atomically

HERE = Path(__file__).parent
OURS = "ppo_lab"


@dataclass(frozen=True)
class Contestant:
    """A trainer with its settings: a worker's script by name, or overrides of a run of ours.

    `environment` names the environment that runs it, empty for the one that runs this; `share` is
    how much of the task's iterations it makes.
    """

    name: str
    about: str
    environment: str = ""
    overrides: tuple[str, ...] = field(default=())
    share: float = 1.0

    @property
    def is_ours(self) -> bool:
        """Whether this project trains."""
        return self.name.startswith(OURS)

    def command(self, python: Path, spec: dict[str, Any]) -> list[str]:
        """What trains as the spec says and leaves a model."""
        if not self.is_ours:
            script = HERE / "workers" / f"{self.name}_worker.py"
            return [str(python), str(script), json.dumps(spec)]
        steps = f"ppo.steps={round(self.share * spec['iterations'])}"
        return [str(python), "-m", "ppo_lab", *overrides(spec), steps, *self.overrides]

    @property
    def folder(self) -> str:
        """Its name as part of a folder's."""
        return re.sub(r"[^\w.-]+", "_", self.name)

    def model(self, output: Path) -> Path:
        """Where the trained model lies."""
        return output / "model" if self.is_ours else output


# Of our own runs: fewer iterations than the others make, for as much score at their KL.
SHARE = 0.6

CONTESTANTS = {
    c.name: c
    for c in (
        Contestant("ppo_lab", "experiment=stories, 0.6 of the iterations", share=SHARE),
        Contestant(
            "ppo_lab-head",
            "the same with critic=head, learning in every epoch, and a longer lambda",
            overrides=(
                "critic=head",
                "critic.epochs=0",
                "critic.learning_rate=0.003",
                "ppo.lam=0.95",
            ),
            share=SHARE,
        ),
        Contestant(
            "ppo_lab-lora",
            "the same with lora=r8, at ten times the step size",
            overrides=("lora=r8", "lora.learning_rate_factor=10"),
            share=SHARE,
        ),
        Contestant("trl112", "TRL 1.12 PPO, separate critic", "trl112"),
        Contestant("trl0114", "TRL 0.11.4 PPO, value head", "trl0114"),
        Contestant("rloo", "TRL 1.16 RLOO, 4 samples a prompt"),
    )
}


def variant(words: str) -> Contestant:
    """`experiment=stories` with these overrides, given as on a command line, and named by them."""
    given = tuple(shlex.split(words))
    return Contestant(f"{OURS} {' '.join(given)}", "a variant", overrides=given, share=SHARE)


def overrides(spec: dict[str, Any]) -> list[str]:
    """The task as this project's command line says it."""
    return [
        "experiment=stories",
        f"model.path={spec['model']}",
        f"reward.path={spec['reward_model']}",
        f"data.path={spec['prompts']}",
        f"ppo.batch_size={spec['batch']}",
        f"ppo.mini_batch_size={spec['mini_batch']}",
        f"ppo.ppo_epochs={spec['epochs']}",
        f"ppo.learning_rate={spec['learning_rate']}",
        f"ppo.init_kl_coef={spec['beta']}",
        f"generation.max_new_tokens={spec['new_tokens']}",
        f"seed={spec['seed']}",
        "tracking=none",
        f"hydra.run.dir={spec['output']}",
    ]


@dataclass(frozen=True)
class Cell:
    """One run to make: who, at which beta, with which seed."""

    contestant: str
    beta: float
    seed: int


@dataclass(frozen=True)
class Cost:
    """What a process took: wall and CPU seconds from start to end, and its largest resident set in
    1e9 bytes.
    """

    wall_s: float
    cpu_s: float
    peak_gb: float


class Record:
    """The runs that are done, in a file that is whole at any moment; with it a benchmark that was
    stopped goes on.
    """

    def __init__(self, file: Path | None, task: Task, origin: dict[str, Any]) -> None:
        """The record in `file`, continued where there is one; `origin` says where its newest runs
        are from.

        Raises:
            RuntimeError: it is of other work.
        """
        self.file = file
        self.kept: dict[str, Any] = {
            **origin,
            "task": {**task.named(), "fingerprint": task.fingerprint()},
            "runs": [],
        }
        if file is not None and file.exists():
            try:
                before = json.loads(file.read_text())
                fingerprint, runs = before["task"]["fingerprint"], before["runs"]
            except (ValueError, KeyError, TypeError):
                raise RuntimeError(f"{file}: no record of this benchmark; name another") from None
            if fingerprint != task.fingerprint():
                raise RuntimeError(f"{file}: holds results of another task; name another file")
            self.kept["runs"] = runs

    def has(self, cell: Cell) -> bool:
        """Whether this run is done."""
        return any(all(run[k] == v for k, v in vars(cell).items()) for run in self.kept["runs"])

    def add(self, cell: Cell, cost: Cost, judged: dict[str, float]) -> None:
        """Keep a run."""
        self.kept["runs"].append({**vars(cell), **vars(cost), **judged})
        if self.file is not None:
            write_atomically(self.file, json.dumps(self.kept, indent=1) + "\n")


def cells(contestants: Iterable[str], betas: list[float], seeds: list[int]) -> Iterator[Cell]:
    """A B C A B C ...: in turn, so that whatever else the machine does meanwhile hits all alike."""
    return (Cell(name, beta, seed) for seed, beta, name in product(seeds, betas, contestants))


def train_and_judge(
    todo: Iterator[Cell],
    contestants: Mapping[str, Contestant],
    task: Task,
    pythons: Mapping[str, Path],
    record: Record,
    *,
    folder: Path,
    threads: int,
    say: Callable[[str], None],
) -> None:
    """Make each run that is not done yet, and keep it.

    Raises:
        RuntimeError: a process failed; the message holds the end of what it said.
    """
    prompts, judged = task.split(folder)
    for cell in todo:
        if record.has(cell):
            continue
        contestant = contestants[cell.contestant]
        output = folder / f"{contestant.folder}-beta{cell.beta:g}-seed{cell.seed}"
        shutil.rmtree(output, ignore_errors=True)  # of a run that was not kept
        spec = task.spec(prompts=prompts, beta=cell.beta, seed=cell.seed, threads=threads)
        command = contestant.command(pythons[cell.contestant], spec | {"output": str(output)})
        _, cost = run(command, name=cell.contestant, threads=threads)
        verdict = judge(task, contestant.model(output), judged, threads=threads)
        record.add(cell, cost, verdict)
        say(
            f"{cell.contestant}, beta {cell.beta:g}, seed {cell.seed}: {verdict['score']:.2f} at "
            f"{verdict['kl']:.1f} nats, {cost.wall_s:.1f} s ({cost.cpu_s:.1f} CPU s)"
        )


def judge(task: Task, model: Path, prompts: Path, *, threads: int) -> dict[str, float]:
    """The judge's verdict, from a process of its own."""
    asked = {
        "model": str(model),
        "start": task.model,
        "reward_model": task.reward_model,
        "prompts": str(prompts),
        "new_tokens": task.new_tokens,
        "threads": threads,
    }
    command = [sys.executable, str(HERE / "judge.py"), json.dumps(asked)]
    said, _ = run(command, name="judge", threads=threads)
    return json.loads(next(line for line in said.splitlines() if line.startswith("{")))


def run(command: list[str], *, name: str, threads: int) -> tuple[str, Cost]:
    """What a process said, and what it took.

    Raises:
        RuntimeError: it failed; the message holds the end of what it said.
    """
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(  # noqa: S603
            command, stdout=output, stderr=subprocess.STDOUT, env=environment(name, threads)
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - start
        output.seek(0)
        said = output.read()
    if process.returncode:
        lines = "\n".join(said.splitlines()[-15:])
        raise RuntimeError(f"{name} failed (exit code {process.returncode}):\n{lines}")
    unit = 1 if sys.platform == "darwin" else 1024
    return said, Cost(wall, used.ru_utime + used.ru_stime, used.ru_maxrss * unit / 1e9)


def environment(name: str, threads: int) -> dict[str, str]:
    """What a process sees: as many threads as asked for, no network, our package if it is ours."""
    changed = {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if name.startswith(OURS):
        changed["PYTHONPATH"] = str(Path(ppo_lab.__file__).parents[1])
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | changed
