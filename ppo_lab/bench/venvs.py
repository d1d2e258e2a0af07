"""The environments of the other trainers: made on request, outside of the checkout."""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

# Torch is this environment's own version, so that all trainers compute with the same kernels.
REQUIREMENTS = {
    "trl112": (
        "trl==1.12.0",
        "transformers==5.23.0",
        "peft==0.21.2",
        "accelerate==1.15.0",
        "datasets==5.2.0",
        "rich",
    ),
    "trl0114": (
        "trl==0.11.4",
        "transformers==4.45.2",
        "peft==0.13.2",
        "accelerate==1.0.1",
        "datasets<6",
        "rich",
    ),
}


def environments_folder() -> Path:
    """Where environments lie unless `--venvs` says otherwise: the platform's cache folder."""
    from ppo_lab.embedded.cache import cache_folder

    return cache_folder() / "bench"


def python_of(trainer: str, folder: Path, say: Callable[[str], None]) -> Path:
    """The interpreter that runs a trainer; its environment is made on first use (minutes, network).

    Raises:
        RuntimeError: the environment could not be filled; pip's last lines say why.
    """
    if trainer == "ppo_lab":
        return Path(sys.executable)
    home = folder / trainer
    python = home / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not _is_complete(python, trainer):
        say(f"{trainer}: making its environment in {home} (once; some minutes)")
        venv.create(home, with_pip=True, clear=home.exists())
        _install(python, [f"torch=={version('torch').partition('+')[0]}", *REQUIREMENTS[trainer]])
    return python


def _is_complete(python: Path, trainer: str) -> bool:
    wanted = REQUIREMENTS[trainer][0].partition("==")[2]
    code = "from importlib.metadata import version; print(version('trl'), version('peft'))"
    if not python.exists():
        return False
    said = subprocess.run([python, "-c", code], capture_output=True, text=True)  # noqa: S603
    return said.stdout.startswith(wanted)


def _install(python: Path, packages: list[str]) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", *packages]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        raise RuntimeError(
            "\n".join(["pip could not fill the environment:", *done.stderr.splitlines()[-8:]])
        )
