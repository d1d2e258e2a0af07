"""Kill a run with SIGKILL at random moments, resume it each time, compare it with one left alone.

    python tests/faults/kill_many.py --kills 50

Moments are drawn over the whole life of a process, from its imports to its last words; most of them
while it trains. Each run that was killed must end with the same metrics, samples and weights, to
the last bit.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from subprocess import Popen

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tiny_runs import command, outcome, start

from ppo_lab.resume import is_finished


def main() -> int:
    arguments = parse()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="kill_many-"))
    words = command(folder, f"ppo.steps={arguments.steps}", "ppo.lr_schedule=linear")
    begun = time.monotonic()
    left_alone = folder / "straight"
    finish(folder, *words, f"hydra.run.dir={left_alone}")
    life = time.monotonic() - begun
    print(f"left alone: {life:.1f} s", flush=True)
    longest, draw = min(life, arguments.longest), random.Random(arguments.seed)
    kills, runs, same = 0, 0, True
    while kills < arguments.kills and same:
        killed, runs = folder / f"killed-{runs}", runs + 1
        kills += kill_often(folder, words, killed, arguments.kills - kills, longest, draw)
        same = outcome(killed) == outcome(left_alone)
        print(
            f"{killed.name}: {'the same to the last bit' if same else 'NOT THE SAME'}", flush=True
        )
    print(f"killed {kills} times over {runs} runs: {'all the same' if same else 'NOT THE SAME'}")
    return 0 if same else 1


def kill_often(
    folder: Path, words: list[str], run: Path, kills: int, longest: float, draw: random.Random
) -> int:
    """Kill and resume at most so many times, then let the run end; how often it was killed."""
    done = 0
    while done < kills and not is_finished(run):
        process = start(folder, *going_on(words, run))
        wait(process, run, longest, draw)
        process.kill()
        output, _ = process.communicate()
        done += process.returncode == -9
        print(f"kill {done}: {progress(run)}", flush=True)
        if process.returncode not in (-9, 0):
            raise SystemExit(output)
    if not is_finished(run):
        finish(folder, *going_on(words, run))
    return done


def wait(process: Popen[str], run: Path, longest: float, draw: random.Random) -> None:
    """Wait for a random moment: one in four from the start on, others while it trains."""
    if draw.random() < 0.25:
        time.sleep(draw.uniform(0.2, longest))
        return
    before = logged(run)
    while process.poll() is None and logged(run) == before:
        time.sleep(0.02)
    time.sleep(draw.uniform(0, 3))


def logged(run: Path) -> float:
    """When the run last wrote a line of metrics; 0 = never."""
    file = run / "metrics.jsonl"
    return file.stat().st_mtime if file.exists() else 0.0


def going_on(words: list[str], run: Path) -> list[str]:
    """The command that begins the run, or resumes it once there is something to resume."""
    begun = (run / ".hydra/overrides.yaml").exists() and (run / ".hydra/config.yaml").exists()
    return [f"resume={run}"] if begun else [*words, f"hydra.run.dir={run}"]


def progress(run: Path) -> str:
    kept = sorted(entry.name for entry in (run / "checkpoints").glob("*"))
    lines = (run / "metrics.jsonl").read_bytes().count(b"\n") if kept else 0
    return f"{lines} iterations logged, {', '.join(kept) or 'no checkpoint'}"


def finish(folder: Path, *words: str) -> None:
    process = start(folder, *words)
    output, _ = process.communicate()
    if process.returncode != 0:
        raise SystemExit(output)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--longest", type=float, default=20.0, help="seconds before a kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
