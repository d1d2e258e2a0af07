"""The error that a user's mistake raises: a message to read, never a traceback."""

from __future__ import annotations

from collections.abc import Sequence


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, each problem a line of its own.

    The command line prints the message alone and exits with code 1.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        """One problem, or several."""
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))
