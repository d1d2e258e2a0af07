"""Folders to be written: whether one can be, and one that is there whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def unwritable(key: str, path: str) -> Iterator[str]:
    """Why a folder that a setting names cannot be made or written, in a sentence; else nothing."""
    folder = Path(path).absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not there.is_dir():
        yield f"{key}={path}: {there} is a file; must be a folder"
        return
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        yield f"{key}={path}: cannot be written ({error.strerror or error})"


@contextmanager
def put_in_place(place: Path) -> Iterator[Path]:
    """A new folder beside `place`, which takes its place once it is written, and else goes.

    What a process left that was killed here before is removed first.
    """
    beside = place.with_name(f".{place.name}.unfinished")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        yield beside
        if place.exists():
            shutil.rmtree(place)
        beside.rename(place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
