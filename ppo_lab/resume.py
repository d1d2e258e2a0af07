"""Going on with a run: its own command, in its own folder, and nothing that changes its numbers.

Only `resume=FOLDER` resumes. Nothing here imports torch: what cannot go on is refused at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from ppo_lab.config import Config, as_trained
from ppo_lab.errors import ConfigError
from ppo_lab.record import flat, write_atomically
from ppo_lab.run_state import RECORD, is_stage, key_of, read_summary, work_in
from ppo_lab.secrecy import BLOT, hidden
from ppo_lab.typed import leave_shell_for, quoted, shell_override, unquoted

MISSING_ONLY = ("true", "True")  # of a sweep: each run finds its folder again, see `multirun`
# What may change under way, since no number of the iterations still to come depends on it.
FREE = (
    "resume",
    "name",
    "device",
    "profile",
    "objective",
    "tracking.",
    "checkpoint.",
    "processes.",
    "evaluation.every",
    "evaluation.samples",
    "ppo.steps",
    "ppo.max_kl",
    "ppo.max_skipped_updates",
    "ppo.micro_batch_tokens",
    "ppo.gradient_checkpointing",
    "generation.batch_size",
)
REWARD_DEVICE = re.compile(r"reward\.(parts\.[^.]+\.)*device")
FREE_IN_WORDS = (
    "ppo.max_kl, ppo.max_skipped_updates, ppo.micro_batch_tokens, ppo.gradient_checkpointing, "
    "generation.batch_size, evaluation.every, evaluation.samples, tracking, checkpoint, processes, "
    "device, profile, name and objective may change"
)
STEPS_TOO = ", and ppo.steps where ppo.lr_schedule=constant"


def run_folder(resume: str) -> Path:
    """The run's folder, absolute, given it or one of its checkpoints.

    Raises:
        ConfigError: nothing that was started as a run lies there, or none that may be read.
    """
    try:
        return _run_at(Path(resume).expanduser().absolute(), resume)
    except (OSError, RuntimeError) as error:  # no permission; a home folder of nobody
        raise ConfigError(f"resume={resume}: cannot be read ({error})") from None


def _run_at(given: Path, resume: str) -> Path:
    folder = given.parent.parent if given.parent.name == "checkpoints" else given
    if not folder.is_dir():
        raise ConfigError(f"resume={resume}: no such folder; give a run's folder or a checkpoint's")
    if given != folder and not given.is_dir():
        raise ConfigError(f"resume={resume}: no such checkpoint")
    for name in (RECORD, f"{RECORD}/config.yaml", f"{RECORD}/overrides.yaml"):
        path = folder / name
        if path.resolve() != folder.resolve() / name:
            raise ConfigError(f"resume={resume}: {name} leads out of the run's folder")
        if not path.exists():
            raise ConfigError(
                f"resume={resume}: holds no run (no {name}); one that had not begun is started anew"
            )
    return folder


def check_new(folder: Path) -> None:
    """Nothing, where a new run may begin in this folder.

    Raises:
        ConfigError: it holds a run, with whose files those of another would mix.
    """
    if found := work_in(folder):
        raise ConfigError(
            f"{folder}: holds a run already ({', '.join(found)}); {resume_command(folder)} goes on "
            "with it, another hydra.run.dir=FOLDER takes a new one"
        )


def resumed_command(argv: Sequence[str]) -> list[str]:
    """The command line that goes on with a run: its own overrides, then those given now.

    A command without `resume=` comes back as it is. Paths in the run's overrides are relative to
    where it was started, so that this becomes the working folder.

    Raises:
        ConfigError: there is nothing to go on with, or it is asked for in a sweep.
    """
    wanted = [text.partition("=")[2] for text in argv if text.startswith("resume=")]
    value = unquoted(wanted[-1]) if wanted else ""
    if not value or value in MISSING_ONLY:
        return list(argv)
    if {"-m", "--multirun"} & set(argv):
        raise ConfigError(f"resume={value}: a run goes on by itself, without -m")
    folder = run_folder(value)
    if is_stage(folder):
        raise ConfigError(
            f"resume={value}: is a stage before PPO and no run; a stage is started anew"
        )
    own = [text for text in _recorded(folder, "overrides") if isinstance(text, str)]
    flags = [text for text in argv if text.startswith("-")]
    given = [text for text in argv if not text.startswith(("-", "resume=", "hydra.run.dir="))]
    hydra = _recorded(folder, "hydra").get("hydra", {})
    stated = {key_of(text) for text in given}
    kept = [text for text in own if key_of(text) not in {*stated, "resume"}]
    checkpoint = Path(value).expanduser().absolute()
    with suppress(OSError):
        leave_shell_for(hydra["runtime"]["cwd"])
    return [
        *flags,
        *sources(hydra, flags),
        *kept,
        *given,
        f"resume={quoted(checkpoint)}",
        f"hydra.run.dir={quoted(folder)}",
        "hydra.output_subdir=null",
    ]


def differences(config: Config) -> list[str]:
    """What keeps this configuration from going on with the run that it names, a line each."""
    try:
        folder = run_folder(config.resume)
        then = _recorded(folder, "config")
    except ConfigError as error:
        return error.problems
    now = flat(asdict(config), keeps_empty=True)
    recorded = as_trained(flat(then, keeps_empty=True))
    found = [
        f"{key}={now.get(key, '(nothing)')}: the run has {key}={value}"
        for key, value in recorded.items()
        if not _is_free(key) and not (_same(now[key], value) if key in now else value == {})
    ]
    found += [f"{key}: the run has no such entry" for key in _added(config, then)]
    if now["ppo.steps"] != recorded.get("ppo.steps") and config.ppo.lr_schedule != "constant":
        schedule = config.ppo.lr_schedule
        found.append(
            f"ppo.steps={config.ppo.steps}: the run has ppo.steps={recorded.get('ppo.steps')}, and "
            f"its learning rate follows ppo.lr_schedule={schedule} to that end"
        )
    if found:
        return [*found, f"a run goes on with its own numbers; {FREE_IN_WORDS}{STEPS_TOO}"]
    return list(_already_done(config, folder))


def record_again(folder: Path, config: Config, overrides: Sequence[str]) -> None:
    """Write down what the run is now, at no moment half: its overrides, then its configuration."""
    own = [text for text in overrides if key_of(text) != "resume"]
    write_atomically(folder / RECORD / "overrides.yaml", yaml.safe_dump(own))
    settings = hidden({**asdict(config), "resume": ""})
    write_atomically(folder / RECORD / "config.yaml", yaml.safe_dump(settings, sort_keys=False))


def sources(hydra: Mapping[str, Any], flags: Sequence[str]) -> Iterator[str]:
    """The flags that say where a run's configuration came from, but for those given anew."""
    given = {flag.partition("=")[0] for flag in flags}
    name = hydra.get("job", {}).get("config_name")
    if "--config-name" not in given and name and name != "config":
        yield f"--config-name={name}"
    sources = hydra.get("runtime", {}).get("config_sources") or []
    own = [source["path"] for source in sources if source.get("provider") == "command-line"]
    if "--config-dir" not in given and own:
        yield f"--config-dir={own[0]}"


def resume_command(folder: Path) -> str:
    """What to type to go on with a run."""
    return f"python -m ppo_lab {shell_override('resume', folder)}"


def is_finished(folder: Path) -> bool:
    """Whether a run came to its end, by its summary."""
    return read_summary(folder).get("status") == "finished"


def _already_done(config: Config, folder: Path) -> Iterator[str]:
    done, schedule = read_summary(folder).get("steps", 0), config.ppo.lr_schedule
    if not is_finished(folder) or not isinstance(done, int) or config.ppo.steps > done:
        return
    more = f"ppo.steps=N above {done} goes on"
    if schedule != "constant":
        more = f"its learning rate came to its end with them (ppo.lr_schedule={schedule})"
    yield f"resume={config.resume}: this run has finished its {done} iterations; {more}"


def _recorded(folder: Path, name: str) -> Any:
    """What Hydra wrote down when the run began."""
    path = folder / RECORD / f"{name}.yaml"
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ConfigError(f"resume={folder}: {path.name} cannot be read ({error})") from None
    if not isinstance(found, list if name == "overrides" else dict):
        raise ConfigError(f"resume={folder}: {path.name} is not what a run writes; start it anew")
    return found


def _added(now: Any, then: Any, prefix: str = "") -> Iterator[str]:
    """The entries that a mapping (arguments of a function, parts of a reward) has now and had not
    then. A section's own keys are not among them: an older run lacks those that came later.
    """
    if isinstance(then, str):  # a reference, as in `_same`
        return
    inner = then if isinstance(then, Mapping) else {}
    if is_dataclass(now):
        for knob in fields(now):
            yield from _added(
                getattr(now, knob.name), inner.get(knob.name), f"{prefix}{knob.name}."
            )
    elif isinstance(now, Mapping):
        for name, value in now.items():
            if name in inner:
                yield from _added(value, inner[name], f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"


def _is_free(key: str) -> bool:
    if REWARD_DEVICE.fullmatch(key):
        return True
    return any(key == free or (free.endswith(".") and key.startswith(free)) for free in FREE)


def _same(ours: Any, recorded: Any) -> bool:
    """Whether a value is the recorded one; references and secrets are not recorded."""
    if isinstance(recorded, str) and ("${" in recorded or BLOT in recorded):
        return True
    if isinstance(ours, float) and isinstance(recorded, int | float | str):
        with suppress(ValueError):
            return ours == float(recorded)
    return ours == recorded
