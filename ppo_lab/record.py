"""The record that every run leaves: metrics.jsonl, samples.jsonl and summary.json."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch comes with it, and reading a record needs none
    from ppo_lab.types import Sample

Say = Callable[[str], None]


def to_stderr(text: str) -> None:
    """Say one line to whoever watches."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def flat(
    nested: Mapping[str, Any], *, separator: str = ".", keeps_empty: bool = False
) -> dict[str, Any]:
    """Nested sections as one, under the names of all that a value lies in; an empty one leaves
    nothing, or itself.
    """
    found: dict[str, Any] = {}
    for name, value in nested.items():
        if not isinstance(value, Mapping) or (keeps_empty and not value):
            found[name] = value
            continue
        inner = flat(value, separator=separator, keeps_empty=keeps_empty)
        found |= {f"{name}{separator}{key}": part for key, part in inner.items()}
    return found


def brief(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split())[:160]


def strict(value: Any) -> Any:
    """The value as strict JSON can hold it: tensors are numbers, NaN and infinities are null."""
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Path):
        return str(value)
    number = float(value)
    return number if math.isfinite(number) else None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, none without a file; torn lines are passed over."""
    rows = []
    with suppress(FileNotFoundError):
        for line in path.read_bytes().split(b"\n"):
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict):
                    rows.append(row)
    return rows


def write_atomically(path: Path, text: str) -> None:
    """Put a file in place whole: readers see the old text or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Put summary.json into a run's folder, whole; NaN and infinities are null."""
    text = json.dumps(strict(summary), indent=2, allow_nan=False)
    write_atomically(folder / "summary.json", text + "\n")


class _Lines:
    """One JSON-lines file. What the disk refuses waits in memory; no line is torn or doubled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[str] = []
        self._whole = 0
        self._resume_step: int | None = None  # while the older rows have not been gone over

    def start(self, *, resume_step: int | None) -> None:
        """Empty; or the older rows up to `resume_step`.

        Raises:
            OSError: when the disk refuses; the file is as it was, and the next rows try again.
        """
        self._resume_step = resume_step
        if resume_step is None:
            assert not self.path.exists(), f"{self.path}: a new run would lose these rows"
            return
        kept = [
            row for row in read_json_lines(self.path) if row.get("step", math.inf) <= resume_step
        ]
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._whole, self._resume_step = self.path.stat().st_size, None

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write these rows after those that are still waiting.

        Raises:
            OSError: when the disk refuses; the rows then wait.
        """
        self.waiting += [json.dumps(strict(row), allow_nan=False) + "\n" for row in rows]
        if self._resume_step is not None:
            self.start(resume_step=self._resume_step)
        if not self.waiting:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            if file.tell() > self._whole:
                file.truncate(self._whole)  # what a refused attempt left
            file.write("".join(self.waiting).encode())
            file.flush()
            self._whole, self.waiting = file.tell(), []


class JsonLines:
    """The record of a run: metrics.jsonl, samples.jsonl and, at the end, summary.json.

    A line an iteration, `step` first, flushed at once: a killed process loses nothing that it
    logged. JSON is strict and pure ASCII; NaN and infinities are null. Resuming after iteration
    `resume_step` drops the rows of later steps, which will be made again.
    """

    def __init__(
        self, folder: Path, *, resume_step: int | None = None, say: Say = to_stderr
    ) -> None:
        self.folder = folder
        self._say = say
        self._troubled = False
        self._metrics = _Lines(folder / "metrics.jsonl")
        self._samples = _Lines(folder / "samples.jsonl")
        for lines in (self._metrics, self._samples):
            self._guarded(partial(lines.start, resume_step=resume_step))
        self._guarded(lambda: (folder / "summary.json").unlink(missing_ok=True))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """One line in metrics.jsonl."""
        self._guarded(lambda: self._metrics.add([{"step": step, **metrics}]))

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        """A line a sample in samples.jsonl."""
        self._guarded(
            lambda: self._samples.add({"step": step, **asdict(sample)} for sample in samples)
        )

    def finish(self, status: str, summary: Mapping[str, Any]) -> None:
        """summary.json, put in place whole; and a last attempt at rows that the disk refused."""
        for lines in (self._metrics, self._samples):
            self._guarded(partial(lines.add, []))
        self._guarded(lambda: write_summary(self.folder, {**summary, "status": status}))
        lost = len(self._metrics.waiting) + len(self._samples.waiting)
        if lost:
            self._say(f"{lost} rows of metrics and samples could not be written to {self.folder}")

    def _guarded(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except OSError as error:
            if not self._troubled:
                self._say(f"cannot write to {self.folder} ({error}); the run goes on without")
            self._troubled = True
