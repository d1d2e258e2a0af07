"""The command line: Hydra's, read once beforehand, so that all that is wrong is said at once.

Only a command without fault reaches Hydra and makes a folder.
"""

from __future__ import annotations

import sys
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ppo_lab import typed
from ppo_lab.command_reader import Check, CommandReader, a_hydra
from ppo_lab.config import conf_folder, register_schema
from ppo_lab.errors import ConfigError, message, refuse, suggestion
from ppo_lab.multirun import (
    launch_missing_only,
    record_hydra,
    resumed_sweep,
    what_is_missing,
    with_search_defaults,
)
from ppo_lab.processes import launch as processes
from ppo_lab.processes.launch import shared
from ppo_lab.resume import MISSING_ONLY, resumed_command
from ppo_lab.scheduler import is_requeued, join_processes
from ppo_lab.secrecy import secret_overrides

WITHOUT_DOCSTRINGS = (
    "python -OO, or PYTHONOPTIMIZE=2, leaves out docstrings, which transformers reads when it is "
    "imported; use -O or neither"
)
Job = Callable[[Any, Path, list[str]], float | None]


def launch(
    job: Job, *, check: Check, config_name: str = "config", direction: str = "maximize"
) -> None:
    """Run `job(config, folder, overrides)` as the command line says, or say what is wrong with it.

    `check(config, stated)` gives the problems of a composed configuration; `stated` are the keys
    that the command line sets; `direction` is where what `job` returns gets better, for a search. A
    wrong command ends with exit code 1 and a message, no traceback; so does a job that raises
    `ConfigError`.
    """
    register_schema()
    try:
        given = flags_first(sys.argv[1:])
        missing_only = {f"resume={value}" for value in MISSING_ONLY} & set(given)
        resumed = resumed_sweep if missing_only else resumed_command
        sys.argv[1:] = with_search_defaults(resumed(given), direction=direction)
        if found := list(secret_overrides(sys.argv[1:])):
            raise ConfigError(found)
        if found := command_problems(sys.argv[1:], check=check, config_name=config_name):
            raise ConfigError(found)
        if missing_only:
            launch_missing_only(sys.argv[1:])
    except ConfigError as error:
        refuse(shared(error))  # every process reads the same command
    sys.argv[1:] = processes.without_a_folder(sys.argv[1:])
    entry = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=config_name)
    entry(_hydra_job(job, check))()


def command_problems(argv: list[str], *, check: Check, config_name: str = "config") -> list[str]:
    """Everything wrong with a command, a line each; empty when it may run.

    A sweep is refused as a whole: each of its runs is looked at (up to `MOST_RUNS_CHECKED`).
    """
    arguments = _arguments(argv)
    shows_only = arguments.help or arguments.cfg or arguments.info or arguments.hydra_help
    if arguments.multirun and (arguments.cfg or arguments.info):
        return ["-m: --cfg and --info show what one run is made of; leave -m out"]
    asks_otherwise = (shows_only and not arguments.cfg) or arguments.shell_completion
    if asks_otherwise or arguments.config_path:
        return []
    with a_hydra(arguments.config_dir) as composer:
        rules = (lambda config, stated: []) if arguments.cfg else check  # shown, not run
        reader = CommandReader(composer, arguments.config_name or config_name, rules)
        lacking = [WITHOUT_DOCSTRINGS] if sys.flags.optimize > 1 and not arguments.cfg else []
        return [*lacking, *reader.problems(arguments.overrides, multirun=arguments.multirun)]


def configurations(argv: list[str], *, check: Check) -> list[tuple[list[str], Any, int]]:
    """Of every run that a command asks for: what it changes, its configuration, how often it comes.

    The runs of a search are alike, and are given as one that comes as often as there are trials.

    Raises:
        ConfigError: everything that is wrong with the command.
    """
    register_schema()
    if found := command_problems(argv, check=check):
        raise ConfigError(found)
    arguments = _arguments(argv)
    with a_hydra(arguments.config_dir) as composer:
        reader = CommandReader(composer, arguments.config_name or "config", check)
        return list(reader.configurations(arguments.overrides, multirun=arguments.multirun))


def flags_first(argv: list[str]) -> list[str]:
    """A command line with its flags, a word each, before all overrides, as Hydra wants them: it
    reads no override behind a flag that is behind another.
    """
    parser, said = get_args_parser(), _arguments(argv)
    flags = []
    for action in parser._actions:
        value, name = (
            getattr(said, action.dest, None),
            max(action.option_strings, key=len, default=""),
        )
        if name and value not in (None, action.default):
            flags.append(name if action.nargs == 0 else f"{name}={value}")
    return [*flags, *said.overrides]


def _let_help_be_lazy() -> None:
    """Have argparse add arguments whose help is made into a text when it is shown, as one of
    Hydra's is; from Python 3.14 on it would look into it at once.
    """
    check = getattr(ArgumentParser, "_check_help", None)

    def check_texts(parser: ArgumentParser, action: Action) -> None:
        if check and isinstance(action.help, str):
            check(parser, action)

    if check:
        ArgumentParser._check_help = check_texts  # type: ignore[attr-defined]


_let_help_be_lazy()


def _arguments(argv: list[str]) -> Namespace:
    """Hydra's flags and overrides, in whatever order; a wrong flag is a ConfigError."""
    parser = get_args_parser()

    def error(message: str) -> NoReturn:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        wrong = next((word for word in argv if word.startswith("-") and word not in flags), "")
        raise ConfigError(f"{message}{suggestion(wrong, flags)}")

    parser.error = error  # type: ignore[method-assign]
    return parser.parse_intermixed_args(argv)


def _hydra_job(job: Job, check: Check) -> Callable[[DictConfig], float | None]:
    """The job as Hydra calls it: a refused run of a sweep lets the others go on."""

    def run(composed: DictConfig) -> float | None:
        join_processes()
        settings = HydraConfig.get()
        folder = Path(settings.runtime.output_dir)
        typed.shell_folder = typed.shell_folder or Path(settings.runtime.cwd)
        try:
            config: Any = OmegaConf.to_object(composed)
            stated = frozenset(
                text.lstrip("+~").partition("=")[0] for text in settings.overrides.task
            )
            goes_on = hasattr(config, "resume")  # which no stage before PPO does
            if goes_on and (config.resume in MISSING_ONLY or is_requeued(folder)):
                of_a_sweep = settings.overrides.task if config.resume in MISSING_ONLY else ()
                config = what_is_missing(config, folder, of_a_sweep)
                record_hydra(folder)
            if isinstance(config, float):
                return config
            if found := check(config, stated):
                raise shared(ConfigError(found))
            return job(config, folder, list(settings.overrides.task))
        except ConfigError as error:
            if settings.mode == RunMode.MULTIRUN:
                raise CompactHydraException(message(error)) from None
            refuse(error)

    return run
