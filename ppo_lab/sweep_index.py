"""The index of a sweep: what every run came to, in one file, so that a thousand are read at once.

The sweep writes the first line: all the runs that it is to make. Each run appends one as it begins
and as it ends. The last line of a run counts, and only as long as the run's folder agrees: a line
holds the mark of the summary.json that it was made from, and a checksum of itself. A line that is
torn or changed, or whose mark is not that of the folder, is made again from the folder; so is the
whole index, where it is gone. Nothing depends on it but how soon an answer is there.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ppo_lab.run_lock import in_use
from ppo_lab.run_state import (
    RECORD,
    RunState,
    fate,
    mark_of,
    numerically,
    overrides_in,
    read_state,
    run_folders,
    settings,
)

INDEX = "sweep.jsonl"
SWEEP_RECORD = "multirun.yaml"  # Hydra's, in the folder of a sweep
DEEPEST = 3  # folders from a run up to its sweep
PATIENCE = 1.0  # seconds for the index's lock; on one machine an append is whole without it

Plan = list[tuple[str, ...]]


@contextmanager
def indexed(folder: Path) -> Iterator[None]:
    """The run in this folder is in its sweep's index: as running, then as what it came to."""
    sweep = sweep_of(folder)
    if sweep is None:
        yield
        return
    name = folder.relative_to(sweep).as_posix()
    own = tuple(overrides_in(folder / RECORD / "overrides.yaml"))
    append(sweep, [RunState(name, "running", own)])
    try:
        yield
    finally:
        append(sweep, [read_state(folder, name)])


def note(folder: Path) -> None:
    """Put what a run's folder says now into its sweep's index, where it belongs to a sweep."""
    if sweep := sweep_of(folder):
        append(sweep, [read_state(folder, folder.relative_to(sweep).as_posix())])


def sweep_of(folder: Path) -> Path | None:
    """The folder of the sweep, Hydra's or W&B's, that a run belongs to."""
    agents = os.environ.get("WANDB_SWEEP_ID")
    for above in list(folder.parents)[:DEEPEST]:
        if above.name == agents or (above / SWEEP_RECORD).exists():
            return above
    return None


def is_sweep(folder: Path) -> bool:
    """Whether this is the folder of a sweep."""
    return (folder / SWEEP_RECORD).exists() or (folder / INDEX).exists()


def states(sweep: Path) -> list[RunState]:
    """Every run of a sweep as its folder has it, and those that it is still to make, by number."""
    known, planned = read(sweep)
    folders = {path.relative_to(sweep).as_posix(): path for path in run_folders(sweep)}
    found = [_agreed(path, known.get(name), name) for name, path in folders.items()]
    append(sweep, [new for new in found if _is_news(new, known.get(new.run))])
    return sorted([*found, *_missing(planned or [], found)], key=lambda s: numerically(s.run))


def read(sweep: Path) -> tuple[dict[str, RunState], Plan | None]:
    """The last line of each run as the index has it, and the plan, None where there is none."""
    known: dict[str, RunState] = {}
    planned: Plan | None = None
    lines: Sequence[bytes] = ()
    with suppress(OSError):
        lines = (sweep / INDEX).read_bytes().split(b"\n")
    for line in lines:
        with suppress(ValueError, TypeError, KeyError, AttributeError):
            fields = _whole(line)
            if "plan" in fields:
                planned = [tuple(own) for own in fields["plan"]]
            else:
                state = _state(fields)
                known[state.run] = state
    return known, planned


def plan(sweep: Path, jobs: Iterable[Sequence[str]]) -> None:
    """Write down the overrides of each run that a sweep is to make, unless that is written."""
    wanted = [tuple(own) for own in jobs]
    if wanted != read(sweep)[1]:
        _append(sweep, _line({"plan": wanted}))


def append(sweep: Path, found: Iterable[RunState]) -> None:
    """Add a line for each state, in one write; a disk that refuses costs nothing but time."""
    _append(sweep, b"".join(_line(asdict(state)) for state in found))


def _append(sweep: Path, text: bytes) -> None:
    if not text:
        return
    with suppress(OSError):
        number = os.open(sweep / INDEX, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            _lock(number)
            size = os.fstat(number).st_size
            torn = size > 0 and os.pread(number, 1, size - 1) != b"\n"
            os.write(number, (b"\n" if torn else b"") + text)
        finally:
            os.close(number)


def _agreed(folder: Path, known: RunState | None, name: str) -> RunState:
    """What the index knows of a run where its folder agrees, else what the folder says."""
    mark = mark_of(folder)
    if known is None or known.mark != mark:
        return read_state(folder, name)
    if not mark:
        return read_state(folder, name, known.overrides or None)
    if known.status == "finished" or not in_use(folder):
        return known
    status, reason = fate(folder, {"status": known.status})
    return replace(known, status=status, reason=reason)


def _is_news(state: RunState, known: RunState | None) -> bool:
    """Whether a summary is to be put into the index: not that which a run left before it went on,
    whose line would say that it is running as long as the summary is there.
    """
    before = known.mark if known else ()
    return state.status != "running" and state.mark not in ((), before)


def _missing(planned: Plan, found: Iterable[RunState]) -> Iterator[RunState]:
    """The planned runs that no folder holds."""
    there = Counter(settings(state.overrides) for state in found)
    for number, own in enumerate(planned):
        if there[settings(own)] > 0:
            there[settings(own)] -= 1
        else:
            yield RunState(str(number), "missing", own, reason="not begun")


def _line(fields: dict[str, Any]) -> bytes:
    """A line of the index, the time in it and its checksum last."""
    fields = {**fields, "time": round(time.time(), 3)}
    return json.dumps({**fields, "check": _checksum(fields)}).encode() + b"\n"


def _whole(line: bytes) -> dict[str, Any]:
    """What a line holds.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is torn or changed.
    """
    fields = json.loads(line)
    if fields.pop("check") != _checksum(fields):
        raise ValueError("the checksum is another")
    return fields


def _state(fields: dict[str, Any]) -> RunState:
    del fields["time"]
    return RunState(**fields | {name: tuple(fields[name]) for name in ("overrides", "mark")})


def _checksum(fields: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(fields, sort_keys=True).encode())


def _lock(number: int) -> None:
    """Hold the index's lock if it can be had soon; it goes with the file's closing."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.005)
        except OSError:
            return
        else:
            return
