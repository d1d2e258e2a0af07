"""What the benchmarks' command lines have in common."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Collection
from pathlib import Path


def list_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """A comma-separated list of known names; empty for `none` or nothing."""

    def parse(text: str) -> list[str]:
        names = [name for name in text.split(",") if name and name != "none"]
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]}: must be of {', '.join(known)}")
        return names

    return parse


def cores() -> int:
    """The processor's cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def positive(text: str) -> int:
    """A number of things of which there is at least one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number from 1 on")
    return int(text)


def model_folder(text: str) -> Path:
    """A folder that holds a model."""
    path = Path(text).expanduser().absolute()
    if not (path / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"{text}: no folder with a config.json")
    return path


def existing_file(text: str) -> Path:
    """A file that there is."""
    path = Path(text).expanduser().absolute()
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return path
