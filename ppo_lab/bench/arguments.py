"""What the benchmarks' command lines have in common."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Collection
from pathlib import Path

from ppo_lab.bench.venvs import environments_folder
from ppo_lab.on_disk import unwritable


def add_venvs(parser: argparse.ArgumentParser) -> None:
    """Let the command line say where the environments of other trainers are."""
    parser.add_argument(
        "--venvs",
        type=Path,
        default=environments_folder(),
        help="where environments lie or are made",
    )
    parser.add_argument(
        "--as-found",
        action="store_true",
        help="take environments that are there with other versions of what TRL needs; results name "
        "them",
    )


def list_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """A comma-separated list of known names; empty for `none` or nothing."""

    def parse(text: str) -> list[str]:
        names = [name for name in text.split(",") if name and name != "none"]
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]}: must be of {', '.join(known)}")
        return list(dict.fromkeys(names))

    return parse


def some_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """A comma-separated list of known names, of which there is at least one."""
    any_of = list_of(known)

    def parse(text: str) -> list[str]:
        if names := any_of(text):
            return names
        raise argparse.ArgumentTypeError(f"must name at least one of {', '.join(known)}")

    return parse


def numbers(kind: Callable[[str], float]) -> Callable[[str], list]:
    """A comma-separated list of numbers, of which there is at least one."""

    def parse(text: str) -> list:
        try:
            found = [kind(part) for part in text.split(",") if part]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text}: {error}") from None
        if not found:
            raise argparse.ArgumentTypeError("must hold at least one number")
        return found

    return parse


def cores() -> int:
    """The processor's cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def positive(text: str) -> int:
    """A number of things of which there is at least one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number from 1 on")
    return int(text)


def seed(text: str) -> int:
    """A number that random generators take to begin from."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number from 0 to {2**32 - 1}")
    return int(text)


def result_file(text: str) -> Path:
    """A file that can be written, tried now: what is measured for hours must have a place."""
    path = Path(text).expanduser().absolute()
    for problem in unwritable("folder", str(path.parent)):
        raise argparse.ArgumentTypeError(f"{text}: {problem}")
    if path.is_dir() or (path.exists() and not path.stat().st_mode & 0o200):
        raise argparse.ArgumentTypeError(f"{text}: is a folder, or a file that is read-only")
    return path


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
