"""Run folders as records: found, read, told apart by what became of them; nothing here raises."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ppo_lab.config import as_trained
from ppo_lab.record import flat, read_json_lines
from ppo_lab.run_state import fate, is_run, is_stage, numerically

History = dict[str, np.ndarray]

INSIDE_A_RUN = ("checkpoints", "model", "wandb")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_REFERENCE = re.compile(r"^\$\{([\w.]+)\}$")


@dataclass
class Run:
    """One run. `config` has dotted keys; `history` holds a column a metric, NaN where not measured.

    `status` is finished, failed or preempted as the run says itself; without a word of it: running,
    crashed, or empty (nothing was logged), as `fate` finds; or broken (cannot be read).
    """

    name: str
    path: str
    status: str = "empty"
    reason: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: History = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """The last iteration that was logged, 0 when there is none."""
        step = self.history.get("step")
        return int(step[-1]) if step is not None and len(step) else 0


def read_runs(paths: Iterable[str]) -> list[Run]:
    """Every run in these run folders, sweep folders and globs, each once, in their order."""
    folders = list(dict.fromkeys(folder for path in paths for folder in find_folders(path)))
    names = _short_names(folders)
    with ThreadPoolExecutor() as pool:
        return list(pool.map(read_run, folders, names))


def find_folders(pattern: str) -> Iterator[Path]:
    """The run folders at a path or below it; a path where nothing is stays, to be shown as such."""
    matches = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
    for match in matches or [pattern]:
        path = Path(match)
        found = list(_below(path)) if path.is_dir() else []
        plain_file = len(matches) > 1 and not path.is_dir()
        yield from found or ([] if plain_file else [path.resolve()])


def _below(top: Path) -> Iterator[Path]:
    """Run folders from here down: those with a record, and those where nothing lies at all."""
    for folder, inner, files in os.walk(top.resolve()):
        if ".hydra" in inner or {"metrics.jsonl", "summary.json"} & set(files):
            inner[:] = [name for name in inner if name not in INSIDE_A_RUN]
            if is_run(Path(folder)):
                yield Path(folder)
        elif not inner and not files:
            yield Path(folder)
        inner[:] = sorted((name for name in inner if not name.startswith(".")), key=numerically)


def _short_names(folders: list[Path]) -> list[str]:
    """Each path from the deepest folder that all share."""
    if not folders:
        return []
    top = os.path.commonpath([folder.parent for folder in folders])
    return [os.path.relpath(folder, top) for folder in folders]


def read_run(folder: Path, name: str) -> Run:
    """The record of one folder; what cannot be read is named in `reason`."""
    run = Run(name, str(folder))
    if not folder.is_dir():
        run.status, run.reason = (
            "broken",
            "no such folder" if not folder.exists() else "not a folder",
        )
        return run
    if is_stage(folder):
        run.status, run.reason = "broken", "a stage before PPO, no run"
        return run
    troubles: list[str] = []
    readers = {
        "config": (".hydra/config.yaml", _read_config),
        "summary": ("summary.json", _read_summary),
        "history": ("metrics.jsonl", read_history),
        "samples": ("samples.jsonl", _read_samples),
    }
    for attribute, (file, read) in readers.items():
        try:
            if (folder / file).exists():
                setattr(run, attribute, read(folder / file))
        except Exception as error:  # whatever a stranger's file may hold
            troubles.append(f"{file} cannot be read ({' '.join(str(error).split())[:100]})")
    run.status, run.reason = _verdict(run, folder, troubles)
    return run


def _verdict(run: Run, folder: Path, troubles: list[str]) -> tuple[str, str]:
    """What became of a run, and why."""
    return ("broken", "; ".join(troubles)) if troubles else fate(folder, run.summary)


def _read_config(file: Path) -> dict[str, Any]:
    config = yaml.load(file.read_bytes(), Loader=_LOADER)  # noqa: S506 (the safe loader, in C)
    if not isinstance(config, dict):
        raise ValueError("it holds no mapping")
    return resolved(flat(config))


def _read_summary(file: Path) -> dict[str, Any]:
    summary = json.loads(file.read_bytes())
    if not isinstance(summary, dict):
        raise ValueError("it holds no mapping")
    return summary


def _read_samples(file: Path) -> list[dict[str, Any]]:
    """The samples of the last evaluation that left any; of the last iteration where none did.

    An evaluation's have the reference's answers beside them, those from training have none.
    """
    rows = [row for row in read_json_lines(file) if "prompt" in row]
    rows = [row for row in rows if row.get("reference_response") is not None] or rows
    last = max((row.get("step", 0) for row in rows), default=0)
    return [row for row in rows if row.get("step", 0) == last]


def read_history(file: Path) -> History:
    """The columns of a metrics.jsonl, by step; lines that a crash left torn are skipped."""
    import pyarrow
    from pyarrow import json as arrow_json

    size = max(file.stat().st_size, 1)
    options = arrow_json.ReadOptions(block_size=min(size, 2**31 - 1), use_threads=False)
    try:
        table = arrow_json.read_json(file, read_options=options)
    except pyarrow.ArrowInvalid:  # an empty file, or a torn line
        return columns(read_json_lines(file))
    numbers = [name for name in table.column_names if _is_number(table.schema.field(name).type)]
    found = {name: _as_floats(table[name]) for name in numbers}
    return _by_step(found)


def _is_number(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind)


def _as_floats(column: Any) -> np.ndarray:
    return np.asarray(column.cast("float64").to_numpy(), dtype=float)


def columns(rows: Iterable[Mapping[str, Any]]) -> History:
    """Rows of named numbers as columns, NaN where a row lacks a name."""
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    found = {name: np.array([_number(row.get(name)) for row in rows]) for name in names}
    return _by_step({name: column for name, column in found.items() if np.isfinite(column).any()})


def _by_step(found: History) -> History:
    if "step" not in found:
        return {}
    order = np.argsort(found["step"], kind="stable")
    return {name: column[order] for name, column in found.items()}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else np.nan


def resolved(config: dict[str, Any]) -> dict[str, Any]:
    """The same with `${other.key}` replaced by that key's value, where it is one, and
    `${by_training:ADAPTER,WHOLE}` by the number of the two that the run has.
    """
    config = as_trained(config)

    def value_of(value: Any, depth: int = 0) -> Any:
        match = _REFERENCE.match(value) if isinstance(value, str) and depth < 9 else None
        return value_of(config.get(match[1], value), depth + 1) if match else value

    return {key: value_of(value) for key, value in config.items()}
