"""A mirror of the record for TensorBoard, which shows many runs side by side in a browser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ppo_lab.record import flat
from ppo_lab.types import Sample

SUBFOLDER = "tensorboard"
ALWAYS_SHOWN = (
    *("ppo.init_kl_coef", "ppo.cliprange", "ppo.learning_rate", "seed"),
    *("model.name", "lora.r", "reward.name"),
)


class TensorBoardTracker:
    """Every metric as a scalar against the iteration, samples as text, and at its end the run's
    settings beside its outcome (HParams), in <run>/tensorboard: those that `overrides` state and
    those that all runs are told apart by, since its table has no room for all.

    `tensorboard --logdir outputs` opens all runs below a folder. A resumed run hides what it had
    written after `resume_step`.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any] | None = None,
        *,
        overrides: Sequence[str] = (),
        resume_step: int | None = None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        stated = {word.lstrip("+").partition("=")[0] for word in overrides}
        shown = stated.union(ALWAYS_SHOWN)
        settings = flat(config or {})
        self._settings = {key: _plain(x) for key, x in settings.items() if key in shown}
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
        if status == "finished" and self._settings:
            # In the run's own folder: by default TensorBoard would show it as another run.
            self._writer.add_hparams(self._settings, _outcome(summary), run_name=".")
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


def _plain(value: Any) -> Any:
    """A setting as its table takes it: a number, true or false, else a text."""
    return value if isinstance(value, bool | int | float | str) else str(value)


def _outcome(summary: Mapping[str, Any]) -> dict[str, float]:
    """What runs are compared by, under names that no curve has."""
    last = (summary.get("eval") or {}).get("last") or {}
    clipped = (summary.get("train") or {}).get("clip_fraction")
    found = {
        "objective": summary.get("objective"),
        **{name: last.get(name) for name in ("mean_reward", "kl", "gold")},
        "clip_fraction": clipped,
    }
    return {f"end/{name}": float(value) for name, value in found.items() if value is not None}


def _cell(text: str) -> str:
    """A text inside a table: as code, on one line, so that nothing in it is markup."""
    whole = text.encode("utf-8", "backslashreplace").decode()  # not every text from JSON is UTF-8
    line = " ".join(whole.split()).replace("`", "'").replace("|", "\\|")
    return f"`{line}`" if line else ""
