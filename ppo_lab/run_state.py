"""What became of a run, told by its folder alone: in a second for a thousand of them.

A run says itself how it ended, in summary.json. Where it could not (SIGKILL, a machine that went
down), its lock tells on the same machine; of a run on another machine only the age of its files.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ppo_lab.run_lock import in_use, owner

SILENT_FOR = 900.0  # seconds without a new line after which a run on another machine has crashed
SUMMARY, METRICS, RECORD = "summary.json", "metrics.jsonl", ".hydra"
WANDB_ID = "wandb_run_id"
WORK = (METRICS, "samples.jsonl", "checkpoints", "model")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class RunState:
    """One run in short.

    `status` is finished, failed or preempted as the run says itself; without a word of it: running,
    crashed, empty (nothing was logged), or broken (its summary cannot be read). A run that a sweep
    is to make and that has no folder is `missing`, and `run` is then its number. `mark` changes
    whenever summary.json does.
    """

    run: str
    status: str
    overrides: tuple[str, ...] = ()
    objective: float | None = None
    steps: int = 0
    reason: str = ""
    mark: tuple[int, ...] = ()


def read_state(folder: Path, name: str, overrides: Iterable[str] | None = None) -> RunState:
    """The state of the run in this folder; `overrides` where they are known already."""
    mark, summary = mark_of(folder), read_summary(folder)
    status, reason = fate(folder, summary)
    if mark and not summary and not in_use(folder):
        status, reason = "broken", f"{SUMMARY} cannot be read"
    own = overrides_in(folder / RECORD / "overrides.yaml") if overrides is None else overrides
    steps = summary["steps"] if "steps" in summary else last_step(folder)
    return RunState(
        run=name,
        status=status,
        overrides=tuple(own),
        objective=_number(summary.get("objective")),
        steps=steps if isinstance(steps, int) else 0,
        reason=reason,
        mark=mark,
    )


def fate(folder: Path, summary: Mapping[str, Any]) -> tuple[str, str]:
    """What became of a run, and why: by its summary, its lock, the age of its files."""
    said = str(summary.get("status", "finished")) if summary else ""
    if said == "finished":
        return said, str(summary.get("reason", ""))
    working, age = in_use(folder), _age(folder)
    silent = "" if age is None else f"last written {_ago(age)} ago"
    if working:
        return "running", ", ".join(filter(None, [f"on {owner(folder).get('host', '?')}", silent]))
    if said:
        return said, str(summary.get("reason", ""))
    if age is None:
        return "empty", "nothing was written"
    if working is False:
        return "crashed", f"its process is gone without a word (killed?), {silent}"
    if age < SILENT_FOR:
        return "running", silent
    reason = f"no {SUMMARY}, and nothing written for {age / 60:.0f} min"
    return ("crashed" if _size(folder / METRICS) else "empty"), reason


def read_summary(folder: Path) -> dict[str, Any]:
    """A run's summary.json; empty where there is none that can be read."""
    with suppress(OSError, ValueError):
        found = json.loads((folder / SUMMARY).read_bytes())
        return found if isinstance(found, dict) else {}
    return {}


def wandb_run_id(folder: Path) -> str:
    """The W&B id of the run in this folder, empty where it has none."""
    with suppress(OSError):
        return (folder / WANDB_ID).read_text().strip()
    return ""


def overrides_in(file: Path) -> list[str]:
    """The overrides that Hydra wrote down, of a run or of a sweep."""
    with suppress(OSError, yaml.YAMLError, KeyError, TypeError):
        found = yaml.load(file.read_bytes(), Loader=_LOADER)  # noqa: S506 (the safe loader, in C)
        texts = found if isinstance(found, list) else found["hydra"]["overrides"]["task"]
        return [text for text in texts if isinstance(text, str)]
    return []


def settings(overrides: Iterable[str]) -> tuple[str, ...]:
    """What overrides say of the run itself, in an order of their own."""
    return tuple(
        sorted(
            text
            for text in overrides
            if not text.startswith("-")
            and not key_of(text).startswith("hydra")
            and key_of(text) != "resume"
        )
    )


def common(found: Sequence[RunState]) -> frozenset[str]:
    """The overrides that all of several runs share; none where there is one run only."""
    if len(found) < 2:
        return frozenset()
    return frozenset(found[0].overrides).intersection(*(state.overrides for state in found))


def key_of(override: str) -> str:
    """The key that an override sets."""
    return override.lstrip("+~").partition("=")[0]


def mark_of(folder: Path) -> tuple[int, ...]:
    """When summary.json was put in place, and its size; empty where there is none."""
    with suppress(OSError):
        found = (folder / SUMMARY).stat()
        return (found.st_mtime_ns, found.st_size)
    return ()


def run_folders(top: Path) -> Iterator[Path]:
    """Every run's folder from here down; nothing is looked for inside of one."""
    with suppress(OSError), os.scandir(top) as entries:
        inner = [
            e for e in entries if not e.name.startswith(".") and e.is_dir(follow_symlinks=False)
        ]
        for entry in sorted(inner, key=lambda e: numerically(e.name)):
            path = Path(entry.path)
            if is_run(path):
                yield path
            elif not is_stage(path):
                yield from run_folders(path)


def subfolders(folder: Path) -> list[Path]:
    """The folders right below, numbered ones by number; hidden ones and links are left out."""
    with suppress(OSError), os.scandir(folder) as entries:
        inner = [e for e in entries if not e.name.startswith(".")]
        names = [e.name for e in inner if e.is_dir(follow_symlinks=False)]
        return [folder / name for name in sorted(names, key=numerically)]
    return []


def is_run(folder: Path) -> bool:
    """Whether a run has left anything in this folder. A stage before PPO is no run."""
    if (folder / SUMMARY).exists() or (folder / METRICS).exists():
        return True
    return (folder / RECORD).exists() and not is_stage(folder)


def is_stage(folder: Path) -> bool:
    """Whether this is a folder of `ppo_lab.sft` or `ppo_lab.reward_model`: by a section that they
    alone have.
    """
    with suppress(OSError):
        return b"\nfit:" in (folder / RECORD / "config.yaml").read_bytes()
    return False


def work_in(folder: Path) -> list[str]:
    """What a run's work has left in this folder, by name: a new run would mix with it.

    Nothing is left of a run that was refused or killed before it evaluated anything; its summary,
    where it has one, counts no steps.
    """
    found = [name for name in WORK if os.path.lexists(folder / name)]
    summary = read_summary(folder)
    return found + [SUMMARY] * (mark_of(folder) != () and (not summary or "steps" in summary))


def numerically(name: str) -> tuple[int, str]:
    """Sorts numbered folders by their numbers, before others."""
    return (int(name) if name.isdecimal() else -1, name)


def last_step(folder: Path) -> int:
    """The iteration of the last whole line of metrics.jsonl; 0 without one."""
    with suppress(OSError), (folder / METRICS).open("rb") as file:
        file.seek(max(0, _size(folder / METRICS) - 2**16))
        for line in reversed(file.read().split(b"\n")):
            with suppress(ValueError, TypeError, KeyError):
                return int(json.loads(line)["step"])
    return 0


def _age(folder: Path) -> float | None:
    """Seconds since a run wrote a line; None where it wrote nothing."""
    times = []
    for file in (folder / METRICS, folder / RECORD / "config.yaml"):
        with suppress(OSError):
            times.append(file.stat().st_mtime)
    return max(0.0, time.time() - max(times)) if times else None  # clocks of others may be ahead


def _ago(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _size(file: Path) -> int:
    with suppress(OSError):
        return file.stat().st_size
    return 0


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
