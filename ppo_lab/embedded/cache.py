"""A folder of things built once: named by what they are made of, put in place whole."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path


def cache_folder() -> Path:
    """`PPO_LAB_CACHE`, or else the platform's cache folder."""
    from platformdirs import user_cache_path

    chosen = os.environ.get("PPO_LAB_CACHE", "")
    return Path(chosen).expanduser() if chosen else user_cache_path("ppo_lab", appauthor=False)


def fingerprint(sources: Iterable[Path], *, packages: Iterable[str]) -> str:
    """Twelve hexadecimal digits that change with any source's text or package's version."""
    digest = hashlib.sha256()
    for source in sorted(sources):
        digest.update(f"{source.name}\0".encode() + source.read_bytes() + b"\0")
    for package in packages:
        digest.update(f"{package}=={version(package)}\0".encode())
    return digest.hexdigest()[:12]


def built(folder: Path, build: Callable[[Path], object], *, anew: bool = False) -> Path:
    """`folder`, filled by `build(empty folder)` unless it is there already.

    Processes that ask for the same folder at once wait for the first. The folder appears whole, by
    a rename; what a build left that was killed is never taken for one, and goes. `anew` builds in
    any case and replaces it.
    """
    from filelock import FileLock

    if folder.is_dir() and not anew:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir() and not anew:
            return folder
        for left in folder.parent.glob(f".{folder.name}-*"):
            shutil.rmtree(left, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            build(scratch)
            if folder.is_dir():
                folder.replace(scratch / "replaced")
                (scratch / "replaced").replace(f"{scratch}-old")
            scratch.replace(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            shutil.rmtree(f"{scratch}-old", ignore_errors=True)
    return folder
