"""A mirror of the record for TensorBoard, which shows many runs side by side in a browser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ppo_lab.types import Sample

SUBFOLDER = "tensorboard"


class TensorBoardTracker:
    """Every metric as a scalar against the iteration, samples as text, in <run>/tensorboard.

    `tensorboard --logdir outputs` opens all runs below a folder. A resumed run hides what it had
    written after `resume_step`.
    """

    def __init__(self, folder: Path, *, resume_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purged = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(folder / SUBFOLDER), purge_step=purged)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """One point on each curve."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        """Prompts, responses and scores as a table."""
        rows = [f"| {_cell(s.prompt)} | {_cell(s.response)} | {s.score:.3g} |" for s in samples]
        table = "\n".join(["| prompt | response | score |", "|---|---|---|", *rows])
        self._writer.add_text("samples", table, step)

    def finish(self, status: str, summary: Mapping[str, Any]) -> None:
        """The last points reach the disk."""
        self._writer.add_text("status", status)
        self._writer.close()


class ClassicTensorBoard:
    """What a hand-written loop sends, as TRL's classic `log_stats` did: statistics and texts."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def log(
        self,
        stats: Mapping[str, Any],
        columns: Sequence[str],
        rows: Sequence[Sequence[Any]],
        step: int,
    ) -> None:
        """One step: numbers as scalars, arrays as histograms, texts as a table; on the disk when
        this returns, since a script may end at any moment.
        """
        for name, value in stats.items():
            flat = torch.as_tensor(value).flatten()
            if len(flat) > 1:
                self._writer.add_histogram(name, flat, step)
            else:
                self._writer.add_scalar(name, flat.item(), step)
        lines = ["| " + " | ".join(_cell(str(cell)) for cell in row) + " |" for row in rows]
        head = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        self._writer.add_text("game_log", "\n".join([*head, *lines]), step)
        self._writer.flush()


def _cell(text: str) -> str:
    """A text inside a table: as code, on one line, so that nothing in it is markup."""
    whole = text.encode("utf-8", "backslashreplace").decode()  # not every text from JSON is UTF-8
    line = " ".join(whole.split()).replace("`", "'").replace("|", "\\|")
    return f"`{line}`" if line else ""
