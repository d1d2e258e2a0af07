"""The environments of the other trainers: made on request, outside of the checkout."""

from __future__ import annotations

import json
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


def python_of(
    trainer: str, folder: Path, say: Callable[[str], None], *, as_found: bool = False
) -> Path:
    """The interpreter that runs a trainer; its environment is made on first use (minutes, network).
    Of one that is there all versions must be those that are compared or, `as_found`, TRL's alone.

    Raises:
        RuntimeError: the environment could not be filled, and pip's last lines say why; or it holds
            other versions than are to be compared.
    """
    if trainer == "ppo_lab":
        return Path(sys.executable)
    home = folder / trainer
    python = home / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    torch = _public(version("torch"))
    found = _installed(python)
    if not {"trl", "peft"} <= found.keys():
        say(f"{trainer}: making its environment in {home} (once; some minutes)")
        venv.create(home, with_pip=True, clear=home.exists())
        _install(python, [f"torch=={torch}", *REQUIREMENTS[trainer]])
        return python
    pinned = [text.split("==") for text in REQUIREMENTS[trainer] if "==" in text]
    wanted = {"torch": torch, **dict(pinned)}
    if as_found:
        wanted = {"trl": wanted["trl"]}
    if others := [
        f"{name} {found.get(name)}" for name, n in wanted.items() if found.get(name) != n
    ]:
        raise RuntimeError(
            f"{trainer}: its environment in {home} has {', '.join(others)}, where "
            f"{', '.join(f'{name} {n}' for name, n in wanted.items())} are to be compared; remove "
            "it, and it is made anew, or take it --as-found"
        )
    return python


def _installed(python: Path) -> dict[str, str]:
    """The versions of what an environment has, none where there is no environment."""
    if not python.exists():
        return {}
    code = (
        "import json; from importlib.metadata import distributions as d; "
        "print(json.dumps({x.metadata['Name'].lower(): x.version for x in d()}))"
    )
    said = subprocess.run([python, "-c", code], capture_output=True, text=True)  # noqa: S603
    found = json.loads(said.stdout) if said.returncode == 0 else {}
    return {name: _public(number) for name, number in found.items()}


def _public(number: str) -> str:
    """A version without what a build adds to it."""
    return number.partition("+")[0]


def _install(python: Path, packages: list[str]) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", *packages]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        raise RuntimeError(
            "\n".join(["pip could not fill the environment:", *done.stderr.splitlines()[-8:]])
        )
