"""`python -m ppo_lab.plan check`: plans held against runs, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import ppo_lab

SHARED = (
    *("model.weights=random", "data.chat=false", "reward=length", "tracking=none", "device=auto"),
    *("ppo.steps=2", "ppo.batch_size=16", "ppo.mini_batch_size=8", "ppo.ppo_epochs=2"),
    *("generation.max_new_tokens=24", "evaluation.prompts=4", "checkpoint.every=0"),
)
CASES = {
    "Llama (SmolLM2, 135 M), LoRA": ("model=smollm2_135m", "lora=r16"),
    "GPT-2 (124 M), all trained": ("model=gpt2", "lora=none"),
    "GPT-NeoX (Pythia, 160 M), LoRA": ("model=pythia160m", "lora=r16"),
}
# A run whose clock is the plan's: with one thread the processor's, in which others have no part.
RUN = """
from ppo_lab import clock
from ppo_lab.__main__ import main
from ppo_lab.plan import machine
clock.now = machine.now
main()
"""
MEMORY_WITHIN, TIME_WITHIN = 0.15, 1.5


@dataclass(frozen=True)
class Held:
    """A plan beside what its run took: bytes and seconds of an iteration."""

    name: str
    planned_bytes: float
    planned_s: float
    taken_bytes: float
    taken_s: float

    @property
    def holds(self) -> bool:
        """Whether both figures are as near as promised."""
        seconds = self.planned_s / self.taken_s
        return (
            abs(self.planned_bytes / self.taken_bytes - 1) <= MEMORY_WITHIN
            and 1 / TIME_WITHIN <= seconds <= TIME_WITHIN
        )


def check(cases: dict[str, Sequence[str]] = CASES) -> int:  # type: ignore[assignment]
    """Plan and run every case, print a table; 1 where a plan does not hold."""
    console = Console(highlight=False)
    found = []
    for name, own in cases.items():
        console.print(f"{name} ...", markup=False)
        found.append(hold(name, [*own, *SHARED]))
    console.print(table(found))
    return 0 if all(held.holds for held in found) else 1


def hold(name: str, words: list[str]) -> Held:
    """One case, planned and run."""
    planned = _planned(words)
    taken_bytes, taken_s = _taken(words)
    return Held(name, planned["bytes"], planned["seconds"], taken_bytes, taken_s)


def table(found: Sequence[Held]) -> Table:
    """A line a case."""
    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
    for title in ("", "GB planned", "taken", "ratio", "s planned", "taken", "ratio", ""):
        made.add_column(title, justify="right" if title else "left")
    for held in found:
        made.add_row(
            held.name,
            *(f"{x / 1e9:.2f}" for x in (held.planned_bytes, held.taken_bytes)),
            f"{held.planned_bytes / held.taken_bytes:.2f}",
            *(f"{x:.2f}" for x in (held.planned_s, held.taken_s)),
            f"{held.planned_s / held.taken_s:.2f}",
            "holds" if held.holds else "does not hold",
        )
    return made


def _planned(words: list[str]) -> dict[str, float]:
    """The figures of a plan made in a process of its own, whose libraries it counts."""
    code = "import sys; from ppo_lab.plan.command import figures; figures(sys.argv[1:])"
    done = _run([sys.executable, "-c", code, *words], Path.cwd())
    return json.loads(done.stdout.splitlines()[-1])


def _taken(words: list[str]) -> tuple[float, float]:
    """Peak bytes of a run, and the seconds of its last iteration."""
    with tempfile.TemporaryDirectory() as folder:
        _run([sys.executable, "-c", RUN, *words, "hydra.run.dir=run"], Path(folder))
        run = Path(folder) / "run"
        summary = json.loads((run / "summary.json").read_text())
        last: dict[str, Any] = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return summary["peak_memory_gb"] * 2**30, last["time/iteration"]


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    paths = [str(Path(ppo_lab.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command[:3])} failed:\n{done.stdout[-500:]}{done.stderr[-1500:]}"
        )
    return done
