"""What a person sees: a live display, or plain lines without a terminal, and a page at the end."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from ppo_lab.console import Console
from ppo_lab.summary import duration, number, percent, print_summary, spell_out_missing_letters
from ppo_lab.types import Sample

PLAIN_SECONDS = 5.0
EVERY_LINE_SECONDS = 2.0
NAME, VALUE = "dim", "bold cyan"  # styles
SPEED = ("tokens_per_second", "time/tokens_per_second")


def has_terminal(console: Console) -> bool:
    """Whether to redraw in place: on a terminal that is not dumb, where colours are not refused.

    FORCE_COLOR makes rich take a file for a terminal; it asks for colours there, and no more.
    """
    a_file = os.environ.get("FORCE_COLOR") and not console.file.isatty()
    return has_colours(console) and not (a_file or os.environ.get("CI"))


def has_colours(console: Console) -> bool:
    """Whether what is printed may be coloured: on a terminal, or where that is asked for."""
    refused = console.no_color or os.environ.get("NO_COLOR")
    return console.is_terminal and not console.is_dumb_terminal and not refused


class TerminalTracker:
    """A display redrawn in place; without a terminal, lines: one an iteration or every 5 s.

    At the end it prints the summary page, with the samples that it was shown last. `first_step` is
    the number of iterations done before, in a run that is resumed.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        folder: Path,
        first_step: int = 0,
        console: Console | None = None,
        commands: Sequence[str] = (),
    ) -> None:
        self.total_steps, self.folder, self.commands = total_steps, folder, list(commands)
        self.console = console or Console(highlight=False)
        spell_out_missing_letters(self.console)
        self.live = has_terminal(self.console)
        self._view = _View(self.console, total_steps, first_step) if self.live else None
        self._clock = _Clock(first_step, total_steps)
        self._samples: list[Sample] = []
        self._gold: list[float] = []
        self._last_line = -PLAIN_SECONDS

    def say(self, text: str) -> None:
        """A line above the display."""
        with suppress(OSError, ValueError):
            if self.live:
                self.console.print(Text(text))
            else:
                self._plain(text)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """The state of the run after iteration `step`."""
        if "eval/gold" in metrics:
            self._gold.append(float(metrics["eval/gold"]))
        if "eval/mean_reward" in metrics:
            self.say(evaluation_line(metrics, step))
        seconds_left = self._clock.tick(step)
        if "kl" not in metrics:
            return
        if self._view:
            self._view.show(metrics, step, seconds_left)
        elif self._is_due(step):
            self._last_line = time.monotonic()
            line = progress_line(metrics, step, self.total_steps, seconds_left)
            self._plain(line, coloured(line, metrics))

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        """Kept for the summary page."""
        self._samples = list(samples)

    def finish(self, status: str, summary: Mapping[str, Any]) -> None:
        """The display goes, the summary page comes."""
        if self._view:
            self._view.stop()
        page = {**summary, "status": status}
        print_summary(
            page,
            self._samples,
            self.folder,
            self.commands,
            gold_history=self._gold,
            console=self.console,
        )

    def _is_due(self, step: int) -> bool:
        quiet_for = time.monotonic() - self._last_line
        slow = self._clock.seconds_a_step >= EVERY_LINE_SECONDS
        return slow or quiet_for >= PLAIN_SECONDS or step >= self.total_steps

    def _plain(self, text: str, shown: Text | None = None) -> None:
        """A line, or where colours are wanted its coloured form."""
        if shown and has_colours(self.console):
            self.console.print(shown, soft_wrap=True)
            return
        try:
            print(text, file=self.console.file, flush=True)
        except BrokenPipeError:
            self.console.on_broken_pipe()


class _Clock:
    """Seconds an iteration, smoothed, and how many seconds are left."""

    def __init__(self, first_step: int, total_steps: int) -> None:
        self.seconds_a_step = 0.0
        self._total_steps, self._step, self._then = total_steps, first_step, time.monotonic()

    def tick(self, step: int) -> float:
        """Seconds left after iteration `step`."""
        now = time.monotonic()
        if step > self._step:
            last = (now - self._then) / (step - self._step)
            self.seconds_a_step = (
                0.8 * self.seconds_a_step + 0.2 * last if self.seconds_a_step else last
            )
            self._step, self._then = step, now
        return self.seconds_a_step * max(self._total_steps - step, 0)


class _View:
    """The live display: a bar with iteration and time, the headline metrics under it."""

    def __init__(self, console: Console, total_steps: int, first_step: int) -> None:
        self._bar = Progress(
            TextColumn("PPO"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[left]}"),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task(
            "PPO", total=total_steps, completed=first_step, left="starting"
        )
        self._live = Live(Group(self._bar), console=console, refresh_per_second=4, transient=True)
        self._live.start()
        atexit.register(self._live.stop)  # a run that dies leaves the cursor visible

    def show(self, metrics: Mapping[str, float], step: int, seconds_left: float) -> None:
        self._bar.update(self._task, completed=step, left=f"{duration(seconds_left)} left")
        line = Text("    ")
        for name, value in _headline(metrics):
            line.append(f"{name} ", style=NAME).append(value, style=VALUE).append("   ")
        line.no_wrap = True
        self._live.update(Group(self._bar, line))

    def stop(self) -> None:
        self._live.stop()
        atexit.unregister(self._live.stop)


def _headline(metrics: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    if "kl" in metrics:
        yield "kl", number(metrics["kl"])
    if "mean_reward" in metrics:
        yield "mean_reward", number(metrics["mean_reward"])
    if "clip_fraction" in metrics:
        yield "clip_fraction", percent(metrics["clip_fraction"])
    speed = next((metrics[name] for name in SPEED if name in metrics), None)
    if speed is not None:
        yield "tokens/s", f"{float(speed):,.0f}"


def progress_line(
    metrics: Mapping[str, float], step: int, total_steps: int, seconds_left: float
) -> str:
    """One iteration on one line, for logs."""
    numbers = "  ".join(f"{name} {value}" for name, value in _headline(metrics))
    return f"iteration {step}/{total_steps}  {numbers}  {duration(seconds_left)} left"


def coloured(line: str, metrics: Mapping[str, float]) -> Text:
    """A line of progress with its metrics as the live display has them."""
    text = Text(line)
    for name, value in _headline(metrics):
        start = line.index(f"{name} {value}")
        text.stylize(NAME, start, start + len(name))
        text.stylize(VALUE, start + len(name) + 1, start + len(name) + 1 + len(value))
    return text


def evaluation_line(metrics: Mapping[str, float], step: int) -> str:
    """What the held-out prompts say after iteration `step`, on one line."""
    names = ("mean_reward", "gold", "kl")
    found = [(name, metrics.get(f"eval/{name}")) for name in names]
    numbers = "  ".join(f"{name} {number(value)}" for name, value in found if value is not None)
    return f"iteration {step}, held-out prompts:  {numbers}"
