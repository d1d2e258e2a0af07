"""The error that a user's mistake raises: a message to read, never a traceback, with the nearest of
the choices that there were.
"""

from __future__ import annotations

import difflib
import sys
import time
from collections.abc import Collection, Sequence
from typing import NoReturn

from ppo_lab.processes.launch import speaks

LATEST = 5.0  # seconds by which the process that speaks may be behind the others


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, each problem a line of its own.

    The command line prints the message alone and exits with code 1.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        """One problem, or several."""
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def refuse(error: ConfigError) -> NoReturn:
    """Print the problems, once for all processes that have them, and exit with code 1.

    Those that do not print wait to be ended: a launcher ends all processes, the one that is yet to
    print among them, when a first has ended.
    """
    if speaks(error):
        sys.stderr.write(message(error) + "\n")
    else:
        time.sleep(LATEST)
    sys.exit(1)


def message(error: ConfigError) -> str:
    """All problems, a line each, under a line that says what they mean."""
    count = len(error.problems)
    said = "this cannot run" if count == 1 else f"this cannot run, for {count} reasons"
    return "\n".join([f"ppo_lab: {said}:", *(f"  {problem}" for problem in error.problems)])


def suggestion(wrong: str, valid: Collection[str], *, cutoff: float = 0.6) -> str:
    """`; did you mean ...?` with the nearest valid choice, or nothing where none is near."""
    near = difflib.get_close_matches(wrong, list(valid), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""
