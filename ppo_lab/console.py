"""Where commands print: a terminal, a file, or a pipe whose reader may go at any moment."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole


class Console(RichConsole):
    """A console that outlives its reader, as in `... | head`: what is printed then goes nowhere.

    Rich's own ends the process there by SystemExit, which nothing that guards a run stops.
    """

    def on_broken_pipe(self) -> None:
        """Be quiet from here on; what is left in buffers has somewhere to go."""
        self.quiet = True
        with suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), self.file.fileno())


@contextmanager
def plain_warnings() -> Iterator[None]:
    """What the package warns of inside is said to a user: without a place in its code."""
    package, format_of_others = str(Path(__file__).parent), warnings.formatwarning

    def formatted(message: Any, category: Any, filename: str, *more: Any, **named: Any) -> str:
        if filename.startswith(package):
            return f"warning: {message}\n"
        return format_of_others(message, category, filename, *more, **named)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = format_of_others
