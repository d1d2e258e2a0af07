"""Where numbers go: JSON lines always, which are the record; W&B and the terminal as mirrors of them.

No tracker ever stops a run. What goes wrong with the disk or the network is said once, and the run goes on: rows that
the disk refused are written when it recovers, W&B lives in a thread of its own and is waited for at the end for a
bounded time alone.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import queue
import secrets
import string
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from ppo_lab.types import Sample

Say = Callable[[str], None]

X_AXIS = "iteration"
INIT_TIMEOUT = 10.0
FINISH_TIMEOUT = 10.0
ARTIFACT_TIMEOUT = 120.0
THREAD_NAME = "ppo_lab-wandb"


class Tracker(Protocol):
    """What a run tells of itself."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """The metrics of one iteration; steps never go back."""

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        """Prompts with their responses, as one evaluation or iteration saw them."""

    def finish(self, status: str, summary: Mapping[str, Any]) -> None:
        """The end: `status` is finished, failed or preempted. Nothing is logged afterwards."""


def to_stderr(text: str) -> None:
    """Say one line to whoever watches."""
    print(text, file=sys.stderr, flush=True)


def strict(value: Any) -> Any:
    """The value as strict JSON can hold it: tensors and numpy numbers become numbers, NaN and infinities null."""
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Path):
        return str(value)
    number = float(value)
    return number if math.isfinite(number) else None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; none where there is no file. Lines that a crash left torn are passed over."""
    rows = []
    with suppress(FileNotFoundError):
        for line in path.read_bytes().split(b"\n"):
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict):
                    rows.append(row)
    return rows


def write_atomically(path: Path, text: str) -> None:
    """Put a file in place whole: readers see the old text or the new, whatever happens in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise


class _Lines:
    """One JSON-lines file. What the disk refuses waits in memory for the next attempt; no line is torn or doubled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[str] = []
        self._whole = 0

    def start(self, *, resume_step: int | None) -> None:
        """Empty, any older file set aside as *.old; or the older rows up to `resume_step`."""
        if resume_step is None:
            if self.path.exists():
                self.path.replace(self.path.with_name(self.path.name + ".old"))
            return
        kept = [row for row in read_json_lines(self.path) if row.get("step", math.inf) <= resume_step]
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._whole = self.path.stat().st_size

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write these rows after those that are still waiting.

        Raises:
            OSError: when the disk refuses; the rows then wait.
        """
        self.waiting += [json.dumps(strict(row), allow_nan=False) + "\n" for row in rows]
        if not self.waiting:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            if file.tell() > self._whole:
                file.truncate(self._whole)  # what a refused attempt left
            file.write("".join(self.waiting).encode())
            file.flush()
            self._whole, self.waiting = file.tell(), []


class JsonLines:
    """The record of a run: metrics.jsonl, samples.jsonl and, at the end, summary.json.

    A line an iteration, `step` first, flushed at once: a killed process loses nothing that it logged. JSON is strict
    and pure ASCII: NaN and infinities are null. Resuming after iteration `resume_step` drops the rows of later steps,
    which will be made again.
    """

    def __init__(self, folder: Path, *, resume_step: int | None = None, say: Say = to_stderr) -> None:
        self.folder = folder
        self._say = say
        self._troubled = False
        self._metrics = _Lines(folder / "metrics.jsonl")
        self._samples = _Lines(folder / "samples.jsonl")
        for lines in (self._metrics, self._samples):
            self._guarded(lambda lines=lines: lines.start(resume_step=resume_step))
        self._guarded(lambda: (folder / "summary.json").unlink(missing_ok=True))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """One line in metrics.jsonl."""
        self._guarded(lambda: self._metrics.add([{"step": step, **metrics}]))

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        """A line a sample in samples.jsonl."""
        self._guarded(lambda: self._samples.add({"step": step, **asdict(sample)} for sample in samples))

    def finish(self, status: str, summary: Mapping[str, Any]) -> None:
        """summary.json, put in place whole; and a last attempt at rows that the disk refused."""
        for lines in (self._metrics, self._samples):
            self._guarded(lambda lines=lines: lines.add([]))
        text = json.dumps(strict({**summary, "status": status}), indent=2, allow_nan=False)
        self._guarded(lambda: write_atomically(self.folder / "summary.json", text + "\n"))
        lost = len(self._metrics.waiting) + len(self._samples.waiting)
        if lost:
            self._say(f"{lost} rows of metrics and samples could not be written to {self.folder}")

    def _guarded(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except OSError as error:
            if not self._troubled:
                self._say(f"cannot write to {self.folder} ({error}); training goes on, rows wait in memory")
            self._troubled = True


class Composite:
    """Several trackers as one. A tracker that raises is said once and never stops the others or the run."""

    def __init__(self, trackers: Sequence[Tracker], *, say: Say = to_stderr) -> None:
        self.trackers = list(trackers)
        self._say = say
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
                    self._say(f"{name} failed ({type(error).__name__}: {_brief(error)}); training goes on")
                self._said.add(name)


def uploaded_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The nested config as charts and filters want it: with `beta` and `epsilon` beside it, under their own names."""
    ppo = config.get("ppo") or {}
    aliases = {"beta": ppo.get("init_kl_coef"), "epsilon": ppo.get("cliprange")}
    return {**config, **{name: value for name, value in aliases.items() if value is not None}}


_SHORT = {
    "ppo.init_kl_coef": "kl",
    "ppo.cliprange": "clip",
    "ppo.learning_rate": "lr",
    "lora.r": "r",
    "reward.weight": "w",
}
_NOT_IN_NAMES = ("seed", "name", "resume", "device", "objective", "model", "reward", "data", "tracking")


def run_name(base: str, overrides: Sequence[str], *, seed: int) -> str:
    """A name that tells runs apart at a glance: what was overridden, shortened, then the seed.

    >>> run_name("tiny-embedded", ["ppo.init_kl_coef=0.1", "ppo.cliprange=0.2", "seed=3"], seed=3)
    'tiny-embedded-kl0.1-clip0.2-s3'
    """
    parts = [base] if base else []
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key in _NOT_IN_NAMES or key.startswith(("tracking.", "hydra", "checkpoint")) or "path" in key:
            continue
        short = _SHORT.get(key, key.rpartition(".")[2] if "." in key else "")
        parts.append(f"{short}{value}")
    return "-".join([*parts, f"s{seed}"])[:128]


def run_id(folder: Path, chosen: str = "") -> str:
    """The W&B id of this run: the agent's, the chosen one, the one kept in the folder, or a new one, then kept there."""
    kept = folder / "wandb_run_id"
    with suppress(OSError):
        known = os.environ.get("WANDB_RUN_ID") or chosen or (kept.exists() and kept.read_text().strip())
        if known:
            return known
    letters = string.ascii_lowercase + string.digits
    made = "".join(secrets.choice(letters) for _ in range(8))
    with suppress(OSError):
        write_atomically(kept, made + "\n")
    return made


class WandbTracker:
    """Weights & Biases as a mirror, from a thread of its own: slow, down or full, it costs training nothing.

    Offline when nobody is logged in or the server cannot be had, online otherwise, said in one line; nothing is ever
    asked. Metrics have the PPO iteration as their x axis. `finish` waits for what is still to be uploaded, but for a
    bounded time; the rest stays on disk for `wandb sync`.

    `section` is the `tracking` section of the config, `overrides` what the command line changed, for the run's name.
    With `resumed`, rows that the server lacks are sent from metrics.jsonl, and rows that it has are not sent again.
    """

    def __init__(
        self,
        section: Any,
        folder: Path,
        config: Mapping[str, Any],
        *,
        overrides: Sequence[str] = (),
        resumed: bool = False,
        capture_console: bool = True,
        say: Say = to_stderr,
    ) -> None:
        self.section, self.folder, self.config = section, folder.absolute(), config
        self._say = say
        self._name = section.name or os.environ.get("WANDB_NAME") or _default_name(config, overrides)
        self._earlier = read_json_lines(folder / "metrics.jsonl") if resumed else []
        self._console = "auto" if capture_console else "off"
        self._finish_timeout = ARTIFACT_TIMEOUT if section.log_model else FINISH_TIMEOUT
        self._sent_through = -1
        self._last_table: int | None = None
        self._late_samples: tuple[list[Sample], int] | None = None
        self._troubled = False
        self._jobs: queue.SimpleQueue[Callable[[Any], None] | None] = queue.SimpleQueue()
        busy = any(thread.name == THREAD_NAME for thread in threading.enumerate())
        self._thread = threading.Thread(target=self._work, name=THREAD_NAME, daemon=True)
        if busy:
            self._tell("W&B: none, since an earlier run in this process still waits for it")
        else:
            self._thread.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """One row of history."""
        row = {X_AXIS: step, **metrics}
        self._do(lambda run: self._send(run, row))

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        """A table, at most every `samples_every` iterations; the last one is sent in any case."""
        every = self.section.samples_every
        if not every:
            return
        if self._last_table is not None and step - self._last_table < every:
            self._late_samples = (list(samples), step)
            return
        self._late_samples, self._last_table = None, step
        self._do(lambda run: _send_table(run, samples, step))

    def finish(self, status: str, summary: Mapping[str, Any]) -> None:
        """The summary, the adapter where asked for, and the state; back within seconds whatever the server does."""
        if not self._thread.is_alive():
            return
        if self._late_samples:
            samples, step = self._late_samples
            self._do(lambda run: _send_table(run, samples, step))
        self._do(lambda run: self._end(run, status, summary))
        self._jobs.put(None)
        self._thread.join(INIT_TIMEOUT + self._finish_timeout)
        if self._thread.is_alive():
            self._tell(f"W&B: still not done, left behind; what it holds is in {self.folder / 'wandb'}")

    def _do(self, job: Callable[[Any], None]) -> None:
        if self._thread.is_alive():
            self._jobs.put(job)

    def _tell(self, text: str) -> None:
        if not self._troubled:
            self._say(text)

    def _work(self) -> None:
        try:
            run = self._begin()
        except Exception as error:
            self._tell(f"W&B: none ({type(error).__name__}: {_brief(error)}); metrics.jsonl is the record")
            return
        while run and (job := self._jobs.get()):
            try:
                job(run)
            except Exception as error:
                self._tell(f"W&B: {type(error).__name__}: {_brief(error)}; training goes on")
                self._troubled = True

    def _begin(self) -> Any:
        mode, why = _mode(self.section.mode)
        if mode == "disabled":
            return self._tell(f"W&B: none, {why}")
        wandb = importlib.import_module("wandb")
        os.environ["WANDB_DATA_DIR"] = str(self.folder / "wandb")  # tables wait here for `wandb sync`
        wandb.setup(settings=wandb.Settings(show_info=False))  # its chatter off, its prompts too
        if mode == "online":
            why = _no_credentials(wandb)
            mode = "offline" if why else "online"
        try:
            run = wandb.init(mode=mode, **self._options(wandb))
        except wandb.errors.Error as error:
            mode, why = "offline", f"since the server cannot be had ({_brief(error)})"
            wandb.teardown()  # or the id counts as in use
            wandb.setup(settings=wandb.Settings(show_info=False))
            run = wandb.init(mode=mode, **self._options(wandb))
        where = f"{why}; upload: wandb sync {_short(Path(run.dir).parent)}" if mode == "offline" else run.url
        self._tell(f"W&B: {mode}, {where}")
        self._prepare(run)
        return run

    def _options(self, wandb: Any) -> dict[str, Any]:
        section, sweep = self.section, os.environ.get("WANDB_SWEEP_ID")
        own = {"project": section.project, "entity": section.entity, "id": run_id(self.folder, section.id)}
        group = section.group or os.environ.get("WANDB_RUN_GROUP") or (sweep and f"sweep-{sweep}")
        return {
            **({} if sweep else {name: value or None for name, value in own.items()}),
            "resume": "allow",
            "dir": str(self.folder),
            "config": uploaded_config(self.config),
            "allow_val_change": True,
            "name": self._name,
            "group": group or None,
            "tags": list(section.tags) or None,
            "notes": section.notes or None,
            "settings": wandb.Settings(
                init_timeout=INIT_TIMEOUT,
                finish_timeout=self._finish_timeout,
                quiet=True,
                show_info=False,
                console=self._console,
                x_transaction_log_flush_interval=1.0,
            ),
        }

    def _prepare(self, run: Any) -> None:
        for group, ours in self.config.items():
            if isinstance(ours, Mapping) and not isinstance(run.config.get(group), Mapping):
                run.config.update({f"{group}_cfg": dict(ours)})  # a sweep over a group put its name in its place
        run.define_metric(X_AXIS, hidden=True)
        run.define_metric("*", step_metric=X_AXIS)
        server_has = run.summary.get(X_AXIS) if run.resumed and not run.offline else None
        if not run.offline:
            for row in self._earlier:
                step = row.pop("step")
                if server_has is None or step > server_has:
                    run.log({X_AXIS: step, **row})
        self._sent_through = -1 if server_has is None else int(server_has)

    def _send(self, run: Any, row: dict[str, float]) -> None:
        if row[X_AXIS] > self._sent_through:
            run.log(row)

    def _end(self, run: Any, status: str, summary: Mapping[str, Any]) -> None:
        run.summary.update(_flat({**summary, "status": status}))
        if self.section.log_model and (self.folder / "model").is_dir():
            wandb = importlib.import_module("wandb")
            artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata={"status": status})
            artifact.add_dir(str(self.folder / "model"))
            run.log_artifact(artifact)
        # An agent that ends a run early wants it finished; elsewhere a preempted run waits to be resumed.
        stopped = status == "preempted" and not os.environ.get("WANDB_SWEEP_ID")
        if stopped:
            run.mark_preempting()
        run.finish(exit_code=1 if stopped or status == "failed" else 0)


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
    """The trackers of a run: JSON lines, the terminal (or the `display` given), and W&B where it is wanted."""
    from ppo_lab.display import TerminalTracker

    shown = display or TerminalTracker(total_steps=total_steps, folder=folder, first_step=resume_step or 0)
    say = getattr(shown, "say", to_stderr)
    trackers: list[Tracker] = [JsonLines(folder, resume_step=resume_step, say=say)]
    if section.type == "wandb":
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
    return Composite([*trackers, shown], say=say)


def _mode(wanted: str) -> tuple[str, str]:
    """The mode to try, and the reason where it is not online."""
    by_environment = os.environ.get("WANDB_MODE", "").lower()
    if by_environment in ("disabled", "offline", "dryrun") and wanted == "auto":
        mode = "disabled" if by_environment == "disabled" else "offline"
        return mode, f"by WANDB_MODE={by_environment}"
    return ("offline", "as asked") if wanted == "offline" else ("online", "")


def _no_credentials(wandb: Any) -> str:
    """Why W&B would not know who runs this; empty where it would. The client's own rules, without its prompt."""
    from wandb.sdk.lib import wbauth

    try:
        host = wandb.setup().settings.base_url
        found = wbauth.authenticate_session(host=host, source="ppo_lab", prompt=False, update_session=False)
    except wandb.errors.Error as error:
        return f"since the credentials are not valid ({_brief(error)})"
    return "" if found else "since nobody is logged in"


def _send_table(run: Any, samples: Sequence[Sample], step: int) -> None:
    wandb = importlib.import_module("wandb")
    columns = ["iteration", *Sample.__dataclass_fields__]
    rows = [[step, *(_encodable(value) for value in asdict(sample).values())] for sample in samples]
    run.log({X_AXIS: step, "samples": wandb.Table(columns=columns, data=rows)})


def _encodable(value: Any) -> Any:
    """The value with what UTF-8 cannot hold spelt out."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Numbers and words under slashed names; versions and revisions, which are the config's, left out."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping) and name not in ("versions", "revisions"):
            flat |= _flat(value, f"{prefix}{name}/")
        elif isinstance(value, str | bool | int | float):
            flat[f"{prefix}{name}"] = value
    return flat


def _default_name(config: Mapping[str, Any], overrides: Sequence[str]) -> str:
    return run_name(str(config.get("name") or ""), overrides, seed=int(config.get("seed") or 0))


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


def _short(path: Path) -> str:
    """The path from here, where that is shorter."""
    return min(str(path), os.path.relpath(path), key=len)
