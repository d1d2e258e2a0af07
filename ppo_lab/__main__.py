"""`python -m ppo_lab`: compose a run from `conf` and the command line, and train."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ppo_lab import __version__, signals

if TYPE_CHECKING:  # from the first moment on a signal is to find its handler
    from pathlib import Path

    from ppo_lab.config import Config


def main() -> None:
    """Answer a question about the program, or run it."""
    signals.end_quietly()
    asked = set(sys.argv[1:])
    if asked & {"--version"}:
        print(f"ppo_lab {__version__}")
    elif asked & {"--help", "-h"}:
        from ppo_lab.help import print_page

        print_page()
    else:
        from ppo_lab.command_line import launch
        from ppo_lab.processes.relaunch import start_as_many_as_asked
        from ppo_lab.rules import problems

        start_as_many_as_asked()
        launch(train, check=problems)


def train(config: Config, folder: Path, overrides: list[str]) -> float:
    """Train as configured and return the objective."""
    from ppo_lab.console import plain_warnings
    from ppo_lab.errors import ConfigError
    from ppo_lab.run_lock import early_lock

    # Imports take seconds, in which the process may be killed.
    with early_lock(folder), plain_warnings():
        from ppo_lab.experiment import run
        from ppo_lab.memory import OutOfMemoryError, ways_out
        from ppo_lab.processes.launch import shared
        from ppo_lab.update import TrainingDiverged

        try:
            return run(config, folder, overrides)
        except TrainingDiverged as error:
            raise shared(ConfigError(str(error))) from error
        except OutOfMemoryError as error:
            raise ConfigError(ways_out(error)) from error


if __name__ == "__main__":
    main()
