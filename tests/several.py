"""Runs of several processes on a CPU, and how their metrics are compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import tiny_runs

ROOT = Path(__file__).resolve().parents[1]
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}


def launch(
    count: int, folder: Path, *words: str, own_group: bool = False, **environment: str
) -> subprocess.Popen[str]:
    """`torchrun` with so many processes, or one without it, in that folder; with `own_group` as a
    terminal starts it, whose Ctrl-C goes to a group of processes.
    """
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return subprocess.Popen(
        [sys.executable, *(torchrun if count > 1 else []), *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0 if own_group else None,
    )


def run(count: int, folder: Path, *overrides: str, place: str = "", **environment: str) -> Path:
    """The folder of a run that these processes made together, and finished."""
    place = place or f"of-{count}"
    words = ("-m", "ppo_lab", *overrides, f"hydra.run.dir={folder / place}")
    process = launch(count, folder, *words, **environment)
    said, _ = process.communicate(timeout=280)
    assert process.returncode == 0, said[-4000:]
    return folder / place


def tiny(folder: Path, *overrides: str) -> list[str]:
    """A run of five iterations whose batches divide by neither two nor four."""
    return tiny_runs.command(
        folder,
        *("ppo.steps=5", "ppo.batch_size=9", "ppo.mini_batch_size=3", "ppo.learning_rate=1e-4"),
        *("evaluation.prompts=3", "evaluation.every=2", *overrides),
    )


def disagreements(one: Path, other: Path, tolerance: float = 1e-5) -> list[tuple[Any, ...]]:
    """The metrics of two runs that differ by more than the tolerance, relative or, near 0,
    absolute; and their samples where they are other ones.
    """
    rows, others = tiny_runs.metrics(one), tiny_runs.metrics(other)
    assert len(rows) == len(others)
    found = [
        (row["step"], name, row[name], compared[name])
        for row, compared in zip(rows, others, strict=True)
        for name in row
        if abs(row[name] - compared[name]) > tolerance * max(abs(row[name]), 1.0)
    ]
    texts = [[sample["response"] for sample in samples(run)] for run in (one, other)]
    return found + ([("samples", *texts)] if texts[0] != texts[1] else [])


def samples(run: Path) -> list[dict[str, Any]]:
    """The lines of samples.jsonl."""
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
