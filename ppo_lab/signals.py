"""Being asked to go: SIGTERM, SIGINT and SIGHUP, or a scheduler's warning, end the iteration and
leave a checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from types import FrameType
from typing import Any, NoReturn, Self

from ppo_lab.processes.launch import is_first_here

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not done yet, try again
INTERRUPTED = 130  # what shells say of a program that SIGINT ended
ENDINGS = (signal.SIGTERM, signal.SIGINT)
HANGUP = signal.SIGHUP  # the terminal is closed, or the connection to it lost
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # before a time limit or a preemption, as configured
SHOW_CURSOR = "\x1b[?25h"


def end_quietly() -> None:
    """Have Ctrl-C end the process with a line, where it would with a traceback: for as long as
    there is no run yet, whose `Preemption` has more to say.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def run_quietly(module: str, entry: str = "main") -> NoReturn:
    """Run a module's function as the program, with Ctrl-C as above from its imports on."""
    end_quietly()
    sys.exit(getattr(import_module(module), entry)())


def _end(number: int, _: FrameType | None) -> NoReturn:
    if is_first_here():
        _tell("ppo_lab: interrupted\n")
    raise SystemExit(INTERRUPTED)


DEFAULTS = (signal.SIG_DFL, signal.default_int_handler, _end)


def ended_by_agent(reason: str) -> bool:
    """Whether a run that was asked to stop, with this signal's name, is done for good, as one that
    a W&B sweep ends early. What a scheduler warns of is to be handed out again.
    """
    return "WANDB_SWEEP_ID" in os.environ and not any(n.name in reason for n in WARNINGS)


class Preempted(SystemExit):
    """The run was asked to stop and did; the process ends with exit code 75.

    Where a W&B agent ended it with 0: it takes three early failures for a broken program and gives
    up.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(0 if ended_by_agent(reason) else EXIT_CODE)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class Preemption:
    """Watches for SIGTERM, SIGINT and SIGHUP, and for a scheduler's warnings, while it is entered.

    As long as `deferred` is False there is nothing to lose, and the first signal raises
    `Preempted`. From then on it only sets `asked`, for the loop to see at the end of an iteration.
    A second SIGTERM or SIGINT ends the process at once, by the signal's own means, but for SIGINT
    in a notebook, which ends the run alone; SIGHUP comes from the shell and from the system, and
    says but one thing. Of several processes that are all asked one `tells`.

    Where somebody handled a signal before, as submitit does in its jobs, a second one ends nothing:
    the scheduler has its own way to insist. And a warning is passed on when the run has left its
    checkpoint: submitit then has the job requeued.

    Processes that a reward forks inherit all this. SIGTERM ends them, as multiprocessing counts on;
    what a terminal sends to all alike they outlive as the run does, without a word.
    """

    def __init__(self, *, tells: bool = True) -> None:
        self.asked, self._tells = "", tells
        self.deferred = False
        self._before: dict[int, Any] = {}
        self._warned = 0
        self._process = os.getpid()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            others = (HANGUP, *WARNINGS)
            watched = [*ENDINGS, *(number for number in others if _is_watchable(number))]
            self._before = {number: signal.signal(number, self._handle) for number in watched}
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        handler = self._before.get(self._warned)
        if isinstance(error, Preempted) and callable(handler):
            _pass_on(handler, self._warned, error)

    def _handle(self, number: int, _: FrameType | None) -> None:
        is_fork = os.getpid() != self._process
        if is_fork and number == signal.SIGTERM:
            _end_by(number)
        if number in WARNINGS:
            self._warned = number
        elif self.asked and number != HANGUP and self._before[number] in DEFAULTS:
            if number == signal.SIGINT and hasattr(sys, "ps1"):  # there is work in it
                raise KeyboardInterrupt
            _die_of(number)
        first = not self.asked
        if first or number in WARNINGS:  # SIGTERM alone does not tell who asks
            self.asked = signal.Signals(number).name
        if not self.deferred:
            raise Preempted(self.asked)
        if first and self._tells and not is_fork:
            once_more = "" if self._before[number] not in DEFAULTS else "; once more stops at once"
            _tell(f"{self.asked}: the iteration is finished first{once_more}\n")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C is told of what is done inside when it is done: half of it would be a state that
    nothing expects, and a notebook goes on from there.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or not _is_watchable(signal.SIGINT):
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def _is_watchable(number: int) -> bool:
    """Whether a signal may be watched for: not one ignored, as nohup has it for SIGHUP, or handled
    outside Python.
    """
    return signal.getsignal(number) not in (None, signal.SIG_IGN)


def _pass_on(handler: Callable[..., Any], number: int, error: Preempted) -> None:
    """Hand a warning to whoever was to handle it, which ends the process.

    Of a job's processes only the first is ended so. The others end as if all were well: where one
    fails, Slurm may end all, and the first might not come to requeue the job.
    """
    handler(number, None)
    error.code = 0


def _die_of(number: int) -> None:
    if sys.stderr.isatty():
        _tell(SHOW_CURSOR)
    _end_by(number)


def _end_by(number: int) -> None:
    """End this process by the signal's own means."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _tell(text: str) -> None:
    """Write past Python's buffers, in which the signal may have come."""
    with suppress(OSError):
        os.write(2, text.encode())
