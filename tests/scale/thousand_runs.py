"""How long it takes to look at a sweep of a thousand runs, to compare them, and to go on with it.

    python tests/scale/thousand_runs.py [--runs 1000] [--folder FOLDER]

Makes the folders of a finished sweep out of a formula (50 iterations of 60 metrics each), and then
runs the commands as a user would, each in a process of its own: wall seconds and CPU seconds.
Meant for a quiet machine; fails where a listing takes 2 s or more, or a comparison 20 s.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import yaml
from made_up_runs import make_run
from tiny_runs import command as tiny_command

from ppo_lab.multirun import GRID, planned

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {"listing, by the index": 2.0, "listing, the index gone": 2.0, "compare": 20.0}
METRICS = [f"metric/{i}" for i in range(50)]


@dataclass(frozen=True)
class Taken:
    """What a command took, in seconds, and what it said."""

    wall: float
    cpu: float
    said: str


@dataclass(frozen=True)
class Sweep:
    """The folder of a made-up sweep that has finished, and the command that would have made it."""

    folder: Path
    command: list[str]


def made_up_sweep(top: Path, runs: int) -> Sweep:
    """A sweep over beta and the seed, as Hydra would have left it."""
    folder, seeds = top / "outputs" / "multirun" / "2026-01-02" / "03-04-05", min(runs, 5)
    betas = [float(f"{beta:.6g}") for beta in np.geomspace(0.001, 1, runs // seeds)]
    swept = [
        *tiny_command(top / "in", "ppo.steps=2"),
        f"ppo.init_kl_coef={','.join(map(str, betas))}",
        f"seed={','.join(map(str, range(seeds)))}",
    ]
    hydra = {"overrides": {"task": swept}, "sweeper": {"_target_": GRID, "params": None}}
    jobs = planned(hydra)
    for number, ((beta, seed), own) in enumerate(
        zip(product(betas, range(seeds)), jobs, strict=True)
    ):
        place = folder / str(number)
        make_run(place, beta=beta, seed=seed, steps=50, names=METRICS, overrides=own)
    (folder / "multirun.yaml").write_text(yaml.safe_dump({"hydra": hydra}))
    return Sweep(folder, ["-m", "ppo_lab", "-m", *swept])


def taken(folder: Path, *words: str) -> Taken:
    """What `python WORDS` takes in a folder."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    before, begun = os.times(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=True,
    )
    wall, after = time.perf_counter() - begun, os.times()
    user, system = (
        after.children_user - before.children_user,
        after.children_system - before.children_system,
    )
    return Taken(wall, user + system, done.stdout)


def measured(top: Path, runs: int) -> dict[str, Taken]:
    """Each command on a new sweep of that many runs."""
    sweep = made_up_sweep(top, runs)
    found = {}
    listing, index = ["-m", "ppo_lab.runs", str(sweep.folder)], sweep.folder / "sweep.jsonl"
    found["listing, the index gone"] = taken(top, *listing)
    assert index.exists()
    found["listing, by the index"] = taken(top, *listing)
    found["compare"] = taken(top, "-m", "ppo_lab.compare", str(sweep.folder))
    found["resume=true, nothing is missing"] = taken(top, *sweep.command, "resume=true")
    shutil.rmtree(sweep.folder / str(runs // 2))
    found["resume=true, one run is missing"] = taken(top, *sweep.command, "resume=true")
    listed = taken(top, *listing).said
    assert f"{runs} runs: {runs} finished" in listed, listed[:300]
    return found


def main() -> int:
    """Print the table; 1 where a limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="where to make the runs; default: a new folder")
    asked = parser.parse_args()
    top = asked.folder or Path(tempfile.mkdtemp(prefix="thousand-"))
    load = os.getloadavg()[0]
    found = measured(top, asked.runs)
    print(f"{asked.runs} runs in {top}; load before: {load:.1f} on {os.cpu_count()} cores")
    print(f"{'':34}{'wall s':>8}{'CPU s':>8}")
    for name, took in found.items():
        print(f"{name:34}{took.wall:8.2f}{took.cpu:8.2f}")
    slow = [name for name, limit in LIMITS.items() if found[name].wall >= limit]
    print(f"too slow: {', '.join(slow)}" if slow else "within the limits")
    return int(bool(slow))


if __name__ == "__main__":
    sys.exit(main())
