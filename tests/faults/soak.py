"""Train a tiny model for thousands of iterations and watch memory, file handles and threads.

    python tests/faults/soak.py --steps 2000

Fails if resident memory grows by 2 % or more after the warm-up (the first tenth), if a file handle
or a thread is left behind, if a line of metrics.jsonl is missing at any moment, or if checkpoints
pile up.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from tiny_runs import tiny

from ppo_lab.experiment import run

SEEN: list[dict[str, float]] = []


def watched_length(completions: list[str], **_: object) -> list[float]:
    """The reward: lengths in characters. Called once an iteration, it looks around."""
    SEEN.append(
        {
            "rss": resident_bytes(),
            "files": len(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(),
        }
    )
    return [float(len(text)) for text in completions]


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    config = tiny(
        folder,
        ppo={"steps": arguments.steps, "learning_rate": 1e-3},
        evaluation={"every": 50},
        reward={"target": "__main__:watched_length"},
        checkpoint={"every": 20, "keep": 2, "best_metric": "eval/mean_reward"},
    )
    begun = time.monotonic()
    run(config, folder / "run")
    return report(folder / "run", arguments.steps, time.monotonic() - begun)


def report(run_folder: Path, steps: int, seconds: float) -> int:
    warm = SEEN[len(SEEN) // 10 :]
    tenth = max(1, len(warm) // 10)
    first = sum(seen["rss"] for seen in warm[:tenth]) / tenth
    last = sum(seen["rss"] for seen in warm[-tenth:]) / tenth
    growth = last / first - 1
    files = [seen["files"] for seen in warm]
    threads = [seen["threads"] for seen in warm]
    lines = (run_folder / "metrics.jsonl").read_bytes().count(b"\n")
    kept = sorted(entry.name for entry in (run_folder / "checkpoints").iterdir())
    print(f"\n{steps} iterations in {seconds:.0f} s")
    print(f"resident memory: {first / 2**20:.1f} to {last / 2**20:.1f} MiB, {growth:+.2%}")
    print(f"file handles: {files[0]} to {files[-1]}; threads: {threads[0]} to {threads[-1]}")
    print(f"metrics.jsonl: {lines} lines; checkpoints: {', '.join(kept)}")
    well = growth < 0.02 and files[-1] <= files[0] and threads[-1] <= threads[0]
    return 0 if well and lines == steps and len(kept) <= 3 else 1


if __name__ == "__main__":
    sys.exit(main())
