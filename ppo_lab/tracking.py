"""Where numbers go: JSON lines always, which are the record; W&B, TensorBoard and the terminal
mirror them. No tracker ever stops a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ppo_lab.record import JsonLines, Say, brief, to_stderr
from ppo_lab.types import Sample


class Tracker(Protocol):
    """What a run tells of itself."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """The metrics of one iteration; steps never go back."""

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        """Prompts with their responses, as one evaluation or iteration saw them."""

    def finish(self, status: str, summary: Mapping[str, Any]) -> None:
        """The end: `status` is finished, failed or preempted. Nothing is logged afterwards."""


class Composite:
    """Several trackers as one. One that raises is said once and never stops the others."""

    def __init__(self, trackers: Sequence[Tracker], *, say: Say = to_stderr) -> None:
        self.trackers = list(trackers)
        self.say = say
        self._said: set[str] = set()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """The metrics of one iteration, to each."""
        self._each(lambda tracker: tracker.log(metrics, step))

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        """Samples, to each."""
        self._each(lambda tracker: tracker.log_samples(samples, step))

    def finish(self, status: str, summary: Mapping[str, Any]) -> None:
        """The end, to each."""
        self._each(lambda tracker: tracker.finish(status, summary))

    def _each(self, tell: Callable[[Tracker], None]) -> None:
        for tracker in self.trackers:
            try:
                tell(tracker)
            except Exception as error:
                name = type(tracker).__name__
                if name not in self._said:
                    self.say(
                        f"{name} failed ({type(error).__name__}: {brief(error)}); training goes on"
                    )
                self._said.add(name)


def open_trackers(
    section: Any,
    folder: Path,
    config: Mapping[str, Any],
    *,
    total_steps: int,
    overrides: Sequence[str] = (),
    resume_step: int | None = None,
    display: Tracker | None = None,
) -> Composite:
    """The trackers of a run: JSON lines, W&B where it is wanted, the terminal (or `display`)."""
    from ppo_lab.display import TerminalTracker

    shown = display or TerminalTracker(
        total_steps=total_steps, folder=folder, first_step=max(resume_step or 0, 0)
    )
    say = getattr(shown, "say", to_stderr)
    trackers: list[Tracker] = [JsonLines(folder, resume_step=resume_step, say=say)]
    if section.type == "wandb":
        from ppo_lab.wandb_mirror import WandbTracker

        wandb = WandbTracker(
            section,
            folder,
            config,
            overrides=overrides,
            resumed=resume_step is not None,
            capture_console=not getattr(shown, "live", False),
            say=say,
        )
        trackers.append(wandb)
    if section.type == "tensorboard":
        from ppo_lab.tensorboard_mirror import TensorBoardTracker

        trackers.append(
            TensorBoardTracker(folder, config, overrides=overrides, resume_step=resume_step)
        )
    return Composite([*trackers, shown], say=say)
