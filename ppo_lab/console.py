"""Where commands print: a terminal, a file, or a pipe whose reader may go at any moment."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

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
