"""Being asked to go: SIGTERM and SIGINT end the iteration and leave a checkpoint."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType
from typing import Any, Self

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not done yet, try again
HANDLED = (signal.SIGTERM, signal.SIGINT)
SHOW_CURSOR = "\x1b[?25h"


class Preempted(SystemExit):
    """The run was asked to stop and did; the process ends with exit code 75.

    Under a W&B agent with 0: it takes three early failures for a broken program and gives up.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(0 if os.environ.get("WANDB_SWEEP_ID") else EXIT_CODE)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class Preemption:
    """Watches for SIGTERM and SIGINT while it is entered.

    As long as `deferred` is False there is nothing to lose, and the first signal raises
    `Preempted`. From then on it only sets `asked`, for the loop to see at the end of an iteration.
    A second signal ends the process at once, by the signal's own means. Of several processes that
    are all asked one `tells`.
    """

    def __init__(self, *, tells: bool = True) -> None:
        self.asked, self._tells = "", tells
        self.deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in HANDLED}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.asked:
            _die_of(number)
        self.asked = signal.Signals(number).name
        if not self.deferred:
            raise Preempted(self.asked)
        if self._tells:
            _tell(f"{self.asked}: the iteration is finished first; once more stops at once\n")


def _die_of(number: int) -> None:
    if sys.stderr.isatty():
        _tell(SHOW_CURSOR)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _tell(text: str) -> None:
    """Write past Python's buffers, in which the signal may have come."""
    with suppress(OSError):
        os.write(2, text.encode())
