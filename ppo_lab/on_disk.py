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

    The one before leaves by a rename too, so that whoever is killed meanwhile leaves no part of it.
    What a process left that was killed here before is put back or removed first.
    """
    beside, before = (
        place.with_name(f".{place.name}.{what}") for what in ("unfinished", "replaced")
    )
    _put_back(before, place)
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        yield beside
        if place.exists():
            place.rename(before)
        beside.rename(place)
    finally:
        _put_back(before, place)
        shutil.rmtree(beside, ignore_errors=True)


def _put_back(before: Path, place: Path) -> None:
    """The folder that was in a place, there again if nothing has taken its place, and else gone."""
    if before.exists() and not place.exists():
        before.rename(place)
    shutil.rmtree(before, ignore_errors=True)
