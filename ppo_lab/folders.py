"""A folder that is one run's, or one sweep's, alone."""

from __future__ import annotations

from itertools import count
from pathlib import Path


def claimed(folder: Path) -> Path:
    """The folder, newly made; where one is there already, the first free of name-2, name-3, ...

    Whoever makes a folder has it: of two processes, on whatever machines that share the disk, the
    file system lets one only make it. A name made of the time alone cannot tell them apart.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        candidate = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            candidate.mkdir()
        except FileExistsError:
            continue
        return candidate
    raise AssertionError("there is always a next number")
