"""What a launcher (torchrun, accelerate launch) told this process, read from the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TypeVar

E = TypeVar("E", bound=BaseException)

# What tells a process that it is one of several; children that are not must not see it.
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
LAUNCHERS = (*RANKS, "ACCELERATE_", "FSDP_")


def is_launched() -> bool:
    """Whether a launcher started this process as one of several, or with sharding in mind."""
    return "RANK" in os.environ and (_number("WORLD_SIZE", 1) > 1 or sharding() != "")


def sharding() -> str:
    """What accelerate's configuration asks for beside copies: `fsdp`, `deepspeed` or nothing."""
    asked = {"fsdp": "ACCELERATE_USE_FSDP", "deepspeed": "ACCELERATE_USE_DEEPSPEED"}
    return next((name for name, key in asked.items() if os.environ.get(key) == "true"), "")


def is_first_here() -> bool:
    """Whether this process is the first, or the only one, on its machine."""
    return not is_launched() or _number("LOCAL_RANK", 0) == 0


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return not is_launched() or _number("RANK", 0) == 0


def processes_here() -> int:
    """How many processes share this machine."""
    return _number("LOCAL_WORLD_SIZE", 1) if is_launched() else 1


def without_a_folder(argv: Sequence[str]) -> list[str]:
    """The command line as every process but the main one gives it to Hydra: nothing is written."""
    if is_main():
        return list(argv)
    kept = [text for text in argv if not text.startswith(("hydra.run.dir=", "hydra.output_subdir"))]
    return [*kept, "hydra.run.dir=.", "hydra.output_subdir=null"]


def as_if_alone(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child that is to run by itself."""
    return {name: value for name, value in environment.items() if not name.startswith(LAUNCHERS)}


def shared(error: E) -> E:
    """The error, which all processes raise alike, so that one of them is enough to say it."""
    error.shared = True  # type: ignore[attr-defined]
    return error


def is_shared(error: BaseException) -> bool:
    """Whether all processes raise this error alike."""
    return getattr(error, "shared", False)


def speaks(error: BaseException) -> bool:
    """Whether this process is the one to say an error: its own, or the first one's for all."""
    return is_first_here() or not is_shared(error)


def _number(name: str, default: int) -> int:
    return int(os.environ.get(name) or default)
