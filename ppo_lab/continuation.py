"""What of a run goes into a checkpoint, when, and how it comes back: exactly, or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ppo_lab import checkpoint
from ppo_lab.config import CheckpointSection
from ppo_lab.errors import ConfigError
from ppo_lab.evaluation import Evaluation
from ppo_lab.models.digests import digest_of_weights
from ppo_lab.record import Say, read_json_lines, to_stderr
from ppo_lab.run_state import wandb_run_id
from ppo_lab.types import Prompts, Sample

if TYPE_CHECKING:
    from ppo_lab.data import PromptSets

SUMMARISED = (
    "kl",
    "mean_reward",
    "clip_fraction",
    "tokens_per_second",
    "time/iteration",
    "ppo/val/explained_variance",
    "ppo/skipped_updates",
)
PIECES = (
    "trainer",
    "stream",
    "random",
    "evaluator",
    "evaluations",
    "best",
    "elapsed_s",
    "wandb_run_id",
    "identity",
)


class Keeper:
    """Writes a run's checkpoints when they are due, keeps the newest few and the best one.

    A disk that refuses is said once and stops nothing: the next checkpoint tries again.
    """

    def __init__(self, section: CheckpointSection, folder: Path, say: Say) -> None:
        self.section, self.folder, self.say = section, folder, say
        self.best: dict[str, Any] | None = None
        self._refused = False

    def keep(self, lab: Any, metrics: Mapping[str, float], *, due: bool = False) -> None:
        """A checkpoint of the run as it stands, where one is due or this is the best so far."""
        step, every, best = lab.trainer.iterations_done, self.section.every, self.best
        is_best = self._improves(metrics, step)
        if not (due or is_best or (every and step % every == 0)):
            return
        state, save_model = state_of(lab), lab.trainer.saver() if is_best else None
        written = not lab.processes.is_main or self._written(state, step, save_model)
        if lab.processes.any(not written):
            self.best = best  # of what is not there the next best need not be better

    def _written(
        self, state: dict[str, Any], step: int, save_model: Callable[[str], object] | None
    ) -> bool:
        try:
            _flush_record(self.folder)
            checkpoint.save(self.folder, state, step=step, save_model=save_model)
            best = None if self.best is None else int(self.best["step"])
            checkpoint.prune(self.folder, keep=self.section.keep, best=best)
        except OSError as error:
            if not self._refused:
                before = checkpoint.newest_step(self.folder)
                left = f", and that of iteration {before} is kept" if before else " without any"
                self.say(
                    f"the checkpoint of iteration {step} could not be written ({error}); the run "
                    f"goes on{left}"
                )
            self._refused = True
            return False
        self._refused = False
        return True

    def _improves(self, metrics: Mapping[str, float], step: int) -> bool:
        """Whether the metric that is watched is here, and higher than ever."""
        value = metrics.get(self.section.best_metric, math.nan)
        if value != value or (self.best is not None and value <= self.best["value"]):
            return False
        self.best = {"step": step, "value": float(value), "metric": self.section.best_metric}
        return True

    def take_up(self, best: dict[str, Any] | None) -> None:
        """Go on from the best so far: of the metric that is watched now, or of any where none is,
        since its checkpoint is kept. What one metric came to says nothing of another.
        """
        watched = self.section.best_metric
        same = best is None or not watched or best.get("metric", watched) == watched
        self.best = best if same else None


def state_of(lab: Any) -> dict[str, Any]:
    """Everything that changes in a run, and what tells whether it is the same run again."""
    return {
        "trainer": lab.trainer.state_dict(),
        "stream": lab.place,
        "random": lab.random,
        "evaluator": lab.evaluator.state_dict(),
        "evaluations": [asdict(evaluation) for evaluation in lab.evaluations],
        "best": lab.keeper.best,
        "elapsed_s": time.monotonic() - lab.started,
        "wandb_run_id": wandb_run_id(lab.folder),
        "identity": lab.identity,
        "threads": torch.get_num_threads(),
    }


def restore(lab: Any, state: dict[str, Any]) -> None:
    """Put a run, newly built from its configuration, where `state_of` left it.

    Raises:
        ConfigError: a piece is missing, or model or prompts are others than they were.
    """
    if missing := [piece for piece in PIECES if piece not in state]:
        raise ConfigError(f"{lab.folder}: its checkpoint lacks {', '.join(missing)}")
    for what, then in state["identity"].items():
        if then != lab.identity.get(what):
            raise ConfigError(
                f"{lab.folder}: the {what} are not those that this run began with; it cannot go on"
            )
    try:
        lab.trainer.load_state_dict(state["trainer"])
    except (KeyError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{lab.folder}: its checkpoint does not fit this model: {error}"
        ) from None
    threads, now = state.get("threads"), torch.get_num_threads()
    if lab.trainer.device.type == "cpu" and threads not in (None, now):
        lab.keeper.say(
            f"{lab.folder}: goes on with {now} threads, where it had {threads}: numbers differ by "
            f"rounding from here on (OMP_NUM_THREADS={threads} keeps them)"
        )
    lab.stream.load_state_dict(state["stream"])
    lab.evaluator.load_state_dict(state["evaluator"])
    lab.evaluations[:] = [_evaluation(saved) for saved in state["evaluations"]]
    lab.keeper.take_up(state["best"])
    lab.started = time.monotonic() - state["elapsed_s"]
    lab.history[:] = history(lab.folder, lab.trainer.iterations_done, lab.keeper)
    set_random_state(state["random"])
    lab.note_place()


def find(resume: str, folder: Path, say: Say = to_stderr) -> Path | None:
    """The checkpoint to go on from: the one that `resume` names, or the run's newest whole one."""
    named = Path(resume).expanduser().absolute()
    if named.parent.name == checkpoint.FOLDER and named.parent.parent == folder:
        checkpoint.step_of(named)
        if reason := checkpoint.damage(named):
            raise checkpoint.TornCheckpointError(f"resume={resume}: {reason}")
        return named
    found = checkpoint.latest(folder, say)
    if found is None:
        say("no checkpoint yet: the run begins again from its first iteration")
    return found


def history(folder: Path, done: int, keeper: Keeper) -> list[dict[str, float]]:
    """The metrics that the summary averages, of the iterations done, out of metrics.jsonl."""
    rows = [
        row
        for row in read_json_lines(folder / "metrics.jsonl")
        if row.get("step", done + 1) <= done
    ]
    if len(rows) != done:
        keeper.say(
            f"metrics.jsonl has {len(rows)} of {done} iterations; the means leave the others out"
        )
    return [summarised(row) for row in rows]


def summarised(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Of an iteration's metrics those that the summary averages, so that a long run stays small."""
    found = {name: metrics.get(name) for name in SUMMARISED}
    return {name: math.nan if value is None else float(value) for name, value in found.items()}


def seed_random_state(seed: int) -> None:
    """Begin every global random generator from the run's seed; rewards may draw from them."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The state of every global random generator: Python's, NumPy's, torch's on CPU and GPUs."""
    numpy_state: Any = np.random.get_state(legacy=False)
    inner = numpy_state["state"]
    return {
        "python": random.getstate(),
        "numpy": {
            "key": torch.from_numpy(inner["key"].astype(np.int64)),
            "pos": int(inner["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put every generator back; GPUs that are gone are passed over, others start as seeded."""
    random.setstate(state["python"])
    numbers = state["numpy"]
    key = numbers["key"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, numbers["pos"], numbers["has_gauss"], numbers["gauss"]))
    torch.set_rng_state(state["torch"])
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device, saved in enumerate(state["cuda"][:here]):
        torch.cuda.set_rng_state(saved, device)


def identity(prompts: PromptSets, policy: Any) -> dict[str, str]:
    """Digests of what a run starts from and no checkpoint holds: its prompts, what a reward is told
    beside them, its first weights.

    To be taken before any training. Of each weight the first elements are looked at, adapters are
    left out.
    """
    named = policy.trunk.model.named_parameters()
    weights = digest_of_weights((name, w) for name, w in named if "lora_" not in name)
    sets = (prompts.train, prompts.held_out)
    names = dict.fromkeys(name for part in sets for name in part.columns)
    columns = {name: _digest_of_values([part.columns.get(name) for part in sets]) for name in names}
    return {
        "prompts": _digest(prompts.train),
        "held-out prompts": _digest(prompts.held_out),
        **{f"values of the column {name!r}": digest for name, digest in columns.items()},
        "model's weights": weights,
    }


def _digest(prompts: Prompts) -> str:
    rows = hashlib.sha256()
    for ids in prompts.ids:
        rows.update(np.asarray([len(ids), *ids], dtype=np.int64).tobytes())
    return rows.hexdigest()


def _digest_of_values(values: Any) -> str:
    """Of what is no JSON, as pictures, the type alone counts."""
    text = json.dumps(values, default=lambda value: type(value).__name__)
    return hashlib.sha256(text.encode()).hexdigest()


def _evaluation(saved: dict[str, Any]) -> Evaluation:
    samples = [Sample(**sample) for sample in saved["samples"]]
    return Evaluation(saved["metrics"], samples, saved.get("step", -1))


def _flush_record(folder: Path) -> None:
    """See the rows that a checkpoint counts on onto the disk before it."""
    with suppress(FileNotFoundError), (folder / "metrics.jsonl").open("rb") as file:
        os.fsync(file.fileno())
