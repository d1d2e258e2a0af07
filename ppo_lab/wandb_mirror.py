"""Weights & Biases as a mirror of the record: in a thread of its own, and at the end waited for
during a bounded time alone. What goes wrong is said once, and the run goes on.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import secrets
import string
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ppo_lab.record import Say, brief, flat, read_json_lines, to_stderr, write_atomically
from ppo_lab.run_state import WANDB_ID, wandb_run_id
from ppo_lab.secrecy import hidden_text
from ppo_lab.signals import ended_by_agent
from ppo_lab.typed import shell_path
from ppo_lab.types import Sample

X_AXIS = "iteration"
INIT_TIMEOUT = 10.0  # seconds, as all of these; WANDB_INIT_TIMEOUT goes before it
FINISH_TIMEOUT = 10.0  # WANDB_FINISH_TIMEOUT goes before it
READ_TIMEOUT = 30.0
TABLE_TIMEOUT = 5.0
ARTIFACT_TIMEOUT = 120.0
LONGEST_NAME = 128  # characters, by W&B's own rule
THREAD_NAME = "ppo_lab-wandb"
HOME = "wandb_project"  # the file in a run's folder that says where the server keeps it


def uploaded_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The nested config, with `beta` and `epsilon` beside it for charts and filters."""
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
_ELSEWHERE = ("seed", "name", "resume", "device", "objective", "model", "reward", "data")
_NOT_TOLD = ("tracking", "checkpoint", "hydra")


def run_name(base: str, overrides: Sequence[str], *, seed: int) -> str:
    """A name that tells runs apart at a glance: what was overridden, shortened, then the seed.

    >>> run_name("tiny-embedded", ["ppo.init_kl_coef=0.1", "ppo.cliprange=0.2", "seed=3"], seed=3)
    'tiny-embedded-kl0.1-clip0.2-s3'
    """
    parts = [base] if base else []
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key in _ELSEWHERE or key.startswith(_NOT_TOLD) or key.endswith("path"):
            continue
        if hidden_text(value) != value:  # Hydra has put in what the environment holds
            continue
        short = _SHORT.get(key, key.rpartition(".")[2] if "." in key else "")
        parts.append(f"{short}{value}")
    told, repetition = "-".join(parts), f"s{seed}"
    room = LONGEST_NAME - len(repetition) - 1
    if len(told) > room:  # the model first, what was overridden last, are kept
        told = f"{told[: room // 2 - 2]}...{told[-(room - room // 2 - 1) :]}"
    return "-".join(filter(None, [told, repetition]))


def run_id(folder: Path, chosen: str = "") -> str:
    """The W&B id of this run: the agent's, the chosen one, the folder's, or a new one.

    It is kept in the folder, as wandb_run_id, so that a resumed run continues the same curves.
    """
    kept = wandb_run_id(folder)
    letters = string.ascii_lowercase + string.digits
    new = "".join(secrets.choice(letters) for _ in range(8))
    found = os.environ.get("WANDB_RUN_ID") or chosen or kept or new
    if found != kept:
        with suppress(OSError):
            write_atomically(folder / WANDB_ID, found + "\n")
    return found


def home_of(folder: Path) -> tuple[str, str]:
    """Entity and project of a run that the server has, empty where it has none: an agent's
    environment, say, is not there when the run goes on by hand.
    """
    with suppress(OSError):
        entity, _, project = (folder / HOME).read_text().strip().rpartition("/")
        return entity, project
    return "", ""


class WandbTracker:
    """Weights & Biases as a mirror, in a thread of its own: slow or down, it never slows training.

    Offline when nobody is logged in or the server cannot be had, online otherwise, said in one
    line; nothing is ever asked. The x axis of every metric is the PPO iteration. `finish` waits for
    what is still to be uploaded, but for a bounded time; the rest stays on disk for `wandb sync`.

    `section` is the `tracking` section of the config; `overrides`, what the command line changed,
    name the run. With `resumed`, rows that the server lacks are sent from metrics.jsonl, and rows
    that it has are not sent again.
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
        self._name = (
            section.name or os.environ.get("WANDB_NAME") or _default_name(config, overrides)
        )
        self._resumed = resumed
        self._earlier = read_json_lines(folder / "metrics.jsonl") if resumed else []
        self._console = "auto" if capture_console else "off"
        at_the_end = ARTIFACT_TIMEOUT if section.log_model else FINISH_TIMEOUT
        self._init_timeout = _patience("WANDB_INIT_TIMEOUT", INIT_TIMEOUT)
        self._finish_timeout = _patience("WANDB_FINISH_TIMEOUT", at_the_end)
        self._aside_timeout = ARTIFACT_TIMEOUT if section.log_model else TABLE_TIMEOUT
        self._aside: threading.Thread | None = None
        self._sent_through = self._at = -1  # the last iteration that W&B had before, and has now
        self._last_table = -math.inf
        self._samples: tuple[list[Sample], int] | None = None
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
        if self.section.samples_every:
            shown = list(samples), step
            self._do(lambda run: self._take_samples(run, shown))

    def finish(self, status: str, summary: Mapping[str, Any]) -> None:
        """The summary, the adapter where asked for, the state; back in seconds, come what may."""
        if not self._thread.is_alive():
            return
        self._do(lambda run: self._end(run, status, summary))
        self._jobs.put(None)
        self._thread.join(self._init_timeout + 2 * self._aside_timeout + self._finish_timeout)
        if self._thread.is_alive():
            self._tell(
                f"W&B: still not done, left behind; what it holds is in {self.folder / 'wandb'}"
            )

    def _do(self, job: Callable[[Any], None]) -> None:
        if self._thread.is_alive():
            self._jobs.put(job)

    def _tell(self, text: str) -> None:
        if not self._troubled:
            self._say(text)

    def _work(self) -> None:
        try:
            with _staging(self.folder / "wandb"):
                self._mirror(self._begin())
        except Exception as error:
            self._tell(
                f"W&B: none ({type(error).__name__}: {brief(error)}); metrics.jsonl is the record"
            )

    def _mirror(self, run: Any) -> None:
        while run and (job := self._jobs.get()):
            self._try(partial(job, run))

    def _try(self, job: Callable[[], Any]) -> None:
        try:
            job()
        except Exception as error:
            self._tell(f"W&B: {type(error).__name__}: {brief(error)}; training goes on")
            self._troubled = True

    def _begin(self) -> Any:
        mode, why = _mode(self.section.mode)
        if mode == "disabled":
            return self._tell(f"W&B: none, {why}")
        import wandb

        _quieten(wandb)
        if mode == "online":
            why = _no_credentials(wandb)
            mode = "offline" if why else "online"
        try:
            run = wandb.init(mode=mode, **self._options(wandb, mode))
        except wandb.errors.Error as error:
            mode, why = "offline", f"since the server cannot be had ({brief(error)})"
            wandb.teardown()  # or the id counts as in use
            _quieten(wandb)
            run = wandb.init(mode=mode, **self._options(wandb, mode))
        parts = self._earlier_parts("offline-run") if run.offline else {}
        later = f"{why}; upload: wandb sync {' '.join(map(shell_path, _to_upload(parts, run)))}"
        self._tell(f"W&B: {mode}, {later if mode == 'offline' else run.url}")
        if not run.offline:
            with suppress(OSError):
                write_atomically(self.folder / HOME, f"{run.entity}/{run.project}\n")
        try:
            self._sent_through = self._held(run, parts)
            self._prepare(run)
        except Exception:
            run.finish(exit_code=1)  # left open, it would take the rows of this process's next run
            raise
        return run

    def _earlier_parts(self, kind: str) -> dict[Path, int]:
        """The folders that the client left of earlier attempts, oldest first, each with the last
        iteration in it. A server that could not be reached leaves one without any.
        """
        if not self._resumed:
            return {}
        parts = {part: _last_iteration(part) for part in (self.folder / "wandb").glob(f"{kind}-*")}
        return {part: last for part, last in sorted(parts.items()) if last >= 0}

    def _options(self, wandb: Any, mode: str) -> dict[str, Any]:
        section, sweep = self.section, os.environ.get("WANDB_SWEEP_ID")
        entity, project = home_of(self.folder) if self._resumed else ("", "")
        own = {
            "project": section.project or project or os.environ.get("WANDB_PROJECT") or "ppo_lab",
            "entity": section.entity or ("" if section.project else entity),
            "id": run_id(self.folder, section.id),
        }
        chosen = section.id or os.environ.get("WANDB_RUN_ID")
        goes_on = bool(sweep or self._resumed or not chosen)
        group = section.group or os.environ.get("WANDB_RUN_GROUP") or (sweep and f"sweep-{sweep}")
        return {
            **({} if sweep else {name: value or None for name, value in own.items()}),
            # Rows of another run of that id would take the place of this one's.
            "resume": ("must" if mode == "online" and self._earlier_parts("run") else "allow")
            if goes_on
            else "never",
            "dir": str(self.folder),
            "config": uploaded_config(self.config),
            "allow_val_change": True,
            "name": self._name,
            "group": group or None,
            "tags": list(section.tags) or None,
            "notes": section.notes or None,
            "settings": wandb.Settings(
                init_timeout=self._init_timeout,
                finish_timeout=self._finish_timeout,
                finish_timeout_raises=True,
                quiet=True,
                show_info=False,
                console=self._console,
                x_transaction_log_flush_interval=1.0,
            ),
        }

    def _prepare(self, run: Any) -> None:
        for name, ours in self.config.items():
            # A sweep over a config group puts the option's name where the group's settings were.
            if isinstance(ours, Mapping) and not isinstance(run.config.get(name), Mapping):
                run.config.update({f"{name}_cfg": dict(ours)})
        run.define_metric(X_AXIS, hidden=True)
        run.define_metric("*", step_metric=X_AXIS)
        if self._resumed:  # what an earlier end left there would outlast this one's beginning
            run.summary.update({"status": "", "reason": ""})
        for row in self._earlier:
            known = {name: value for name, value in row.items() if value is not None}
            self._send(run, {X_AXIS: known.pop("step"), **known})

    def _held(self, run: Any, parts: Mapping[Path, int]) -> int:
        """The last iteration that the server has, or that folders to be uploaded hold."""
        if not run.offline:
            return int(run.summary.get(X_AXIS, -1)) if run.resumed else -1
        # How much of an earlier attempt arrived, nobody knows here.
        arrived = self._earlier[-1]["step"] if self._earlier and self._earlier_parts("run") else -1
        return max([*parts.values(), int(arrived)])

    def _send(self, run: Any, row: dict[str, float]) -> None:
        if row[X_AXIS] > self._sent_through:
            run.log(row)
            self._at = int(row[X_AXIS])

    def _take_samples(self, run: Any, samples: tuple[list[Sample], int]) -> None:
        self._samples = samples
        if self._x_is_known() and samples[1] - self._last_table >= self.section.samples_every:
            self._send_samples(run)

    def _x_is_known(self) -> bool:
        """Whether the client can tell how far the run is: in a resumed one after a row alone."""
        return self._at >= 0 or self._sent_through < 0

    def _send_samples(self, run: Any) -> None:
        """Send the samples at hand; where an earlier table is still under way, they wait."""
        if self._samples and self._is_free(0.0):
            (samples, step), self._samples = self._samples, None
            self._last_table = step
            x = {} if self._x_is_known() else {X_AXIS: self._sent_through}
            self._go_aside(lambda: _send_table(run, samples, step, x))

    def _go_aside(self, job: Callable[[], Any]) -> None:
        """Do what the client waits for the server with, so that no row stands behind it."""
        self._aside = threading.Thread(target=lambda: self._try(job), daemon=True)
        self._aside.start()

    def _is_free(self, timeout: float) -> bool:
        if self._aside:
            self._aside.join(timeout)
        return not (self._aside and self._aside.is_alive())

    def _end(self, run: Any, status: str, summary: Mapping[str, Any]) -> None:
        # A run that a sweep ends early is done; any other that was preempted waits to be resumed.
        stopped = status == "preempted" and not ended_by_agent(str(summary.get("reason", "")))
        self._try(lambda: self._send_last(run, {**summary, "status": status}, stopped=stopped))
        try:
            run.finish(exit_code=1 if stopped or status == "failed" else 0)
        except TimeoutError:
            self._tell(_to_follow(run, status))
            return
        if not run.offline:
            _mark_as_sent(self.folder / "wandb", run.id)

    def _send_last(self, run: Any, summary: Mapping[str, Any], *, stopped: bool) -> None:
        run.summary.update(_shown(summary))
        model = self.folder / "model"
        if self._is_free(self._aside_timeout):
            self._send_samples(run)
            if self._is_free(self._aside_timeout) and self.section.log_model and model.is_dir():
                self._go_aside(lambda: _send_model(run, model, str(summary["status"])))
                self._is_free(self._aside_timeout)
        if stopped:
            run.mark_preempting()


@contextmanager
def _staging(folder: Path) -> Iterator[None]:
    """Tables and artifacts wait for their upload in the run's folder, not in the user's home."""
    if "WANDB_DATA_DIR" in os.environ:
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("WANDB_DATA_DIR", None)


def _mark_as_sent(folder: Path, run_id: str) -> None:
    """Have `wandb sync` pass over what earlier attempts left offline: the rows came from
    metrics.jsonl. Tables of samples stay where they are, in samples.jsonl and there.
    """
    for file in folder.glob(f"offline-run-*/run-{run_id}.wandb"):
        with suppress(OSError):
            file.with_name(f"{file.name}.synced").touch()


def _to_upload(parts: Iterable[Path], run: Any) -> list[Path]:
    """The folders of these, and the run's own, that have not been uploaded yet."""
    return [part for part in parts if not any(part.glob("*.synced"))] + [Path(run.dir).parent]


def _to_follow(run: Any, status: str) -> str:
    """How what did not arrive in time gets there. A run that goes on asks the server what it has;
    `wandb sync` does not, and by default passes over a folder of a run that was online.
    """
    late = "W&B: not all of it arrived in time; "
    if status != "finished":
        return f"{late}the rest follows when the run is resumed"
    command = f"wandb sync --no-skip-online {shell_path(Path(run.dir).parent)}"
    return f"{late}upload: {command} (rows that did arrive are then there twice)"


def _last_iteration(part: Path) -> int:
    """The last iteration in a folder of the client's, -1 where it has none or cannot be read."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(part)]
    with suppress(OSError, ValueError, KeyError, subprocess.SubprocessError):
        said = subprocess.run(  # noqa: S603 (the client's own command)
            command, capture_output=True, timeout=READ_TIMEOUT, check=True
        )
        return int(json.loads(said.stdout)["summary"][X_AXIS])
    return -1


def _mode(wanted: str) -> tuple[Literal["online", "offline", "disabled"], str]:
    """The mode to try, and the reason where it is not online."""
    set_outside = os.environ.get("WANDB_MODE", "").lower() if wanted == "auto" else ""
    if set_outside == "disabled":
        return "disabled", "by WANDB_MODE=disabled"
    if set_outside in ("offline", "dryrun"):
        return "offline", f"by WANDB_MODE={set_outside}"
    return ("offline", "as asked") if wanted == "offline" else ("online", "")


def _patience(variable: str, seconds: float) -> float:
    """How long to wait: as the client's own variable says, `seconds` where it says nothing. What is
    no number the client refuses itself.
    """
    with suppress(ValueError):
        return float(os.environ.get(variable) or seconds)
    return seconds


def _quieten(wandb: Any) -> None:
    """Turn the client's chatter off, and with it its prompts; its warnings stay."""
    wandb.setup(settings=wandb.Settings(show_info=False))
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)


def _no_credentials(wandb: Any) -> str:
    """Why W&B would not know who this is, by the client's own rules; empty where it would."""
    from wandb.sdk.lib import wbauth

    try:
        host = wandb.setup().settings.base_url
        found = wbauth.authenticate_session(
            host=host, source="ppo_lab", prompt=False, update_session=False
        )
    except wandb.errors.Error as error:
        return f"since the credentials are not valid ({brief(error)})"
    return "" if found else "since nobody is logged in"


class ClassicRun:
    """What a hand-written loop sends, as TRL's classic `log_stats` did: statistics and texts.

    It goes to the W&B run that is open, or to a new one, opened at once. One that was opened for an
    earlier trainer is finished first: a loop over settings, or a cell run again, has a run each.
    Whatever fails is said and passed over.

    Args:
        project: the project of a new run.
        name: its name; empty = W&B's choice.
        config: its settings.
        options: further keywords of `wandb.init`, which go before all others.
    """

    def __init__(
        self, project: str, name: str, config: Mapping[str, Any], options: Mapping[str, Any]
    ) -> None:
        self._options = {"project": project, "name": name or None, "config": config, **options}
        self._safely(self._begin)

    def log(
        self,
        stats: Mapping[str, Any],
        columns: Sequence[str],
        rows: Sequence[Sequence[Any]],
        step: int,
    ) -> None:
        """One step, and a table of its texts; W&B counts steps by itself."""
        import wandb

        def send() -> None:
            table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
            self._run().log({**_chartable(wandb, stats), "game_log": table})

        self._safely(send)

    def _begin(self) -> None:
        import wandb

        if wandb.run is not None and wandb.run.id in _opened:
            wandb.run.finish()
        self._run()

    def _run(self) -> Any:
        import wandb

        return wandb.run or _open_classic(wandb, self._options)

    def _safely(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as error:
            to_stderr(f"W&B: {type(error).__name__}: {brief(error)}; training goes on")


_opened: set[str] = set()  # the runs that trainers of this process have opened, by id


def _open_classic(wandb: Any, options: Mapping[str, Any]) -> Any:
    _quieten(wandb)
    mode = _mode("auto")[0]
    if mode == "online" and _no_credentials(wandb):
        mode = "offline"
    settings = wandb.Settings(
        init_timeout=_patience("WANDB_INIT_TIMEOUT", INIT_TIMEOUT),
        finish_timeout=_patience("WANDB_FINISH_TIMEOUT", FINISH_TIMEOUT),
        quiet=True,
        show_info=False,
    )
    run = wandb.init(**{"mode": mode, "settings": settings} | dict(options))
    _opened.add(run.id)
    return run


def _chartable(wandb: Any, stats: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers as they are, longer arrays as histograms."""
    charts = {}
    for name, value in stats.items():
        flat = value.flatten().tolist() if hasattr(value, "flatten") else value
        many = isinstance(flat, list) and len(flat) > 1
        charts[name] = (
            wandb.Histogram(flat) if many else flat[0] if isinstance(flat, list) else flat
        )
    return charts


def _send_table(run: Any, samples: Sequence[Sample], step: int, x: Mapping[str, int]) -> None:
    """A table whose first column says of which iteration it is. Its row has no `x` while rows may
    come before it: the client puts in that of the newest row, so that x never goes back.
    """
    import wandb

    columns: list[Any] = ["iteration", *Sample.__dataclass_fields__]
    rows = [[step, *(_encodable(value) for value in asdict(sample).values())] for sample in samples]
    run.log({**x, "samples": wandb.Table(columns=columns, data=rows)})


def _send_model(run: Any, folder: Path, status: str) -> None:
    import wandb

    artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata={"status": status})
    artifact.add_dir(str(folder))
    run.log_artifact(artifact)


def _encodable(value: Any) -> Any:
    """The value with what UTF-8 cannot hold spelt out."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _shown(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers and words under slashed names, without versions and revisions."""
    kept = {k: v for k, v in summary.items() if k not in ("versions", "revisions")}
    found = flat(kept, separator="/")
    return {k: v for k, v in found.items() if isinstance(v, str | bool | int | float)}


def _default_name(config: Mapping[str, Any], overrides: Sequence[str]) -> str:
    return run_name(str(config.get("name") or ""), overrides, seed=int(config.get("seed") or 0))
