"""Where the files of a model lie: a folder, the hub, its cache or, the config alone, this package.

Asked before anything heavy is imported or loaded, so that a model that cannot be had is said within
seconds: one request to the hub, without retries, with a deadline. transformers' own retries take
three quarters of a minute on a machine without a network.
"""

from __future__ import annotations

import functools
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppo_lab.errors import ConfigError, suggestion

DEADLINE = 10.0
"""Longest wait for the hub's first answer, seconds; a name server that stays silent included."""

_SILENT: set[str] = set()
"""Hubs that gave no answer once: this process does not wait for them again."""

_CONFIGS = Path(__file__).parent / "configs"
_PACKAGED = {
    "bigscience/bloom-560m": "bloom-560m",
    "bigscience/bloom-1b1": "bloom-1b1",
    "gpt2": "gpt2",
    "openai-community/gpt2": "gpt2",
    "lvwerra/gpt2-imdb": "gpt2",
    "EleutherAI/pythia-160m": "pythia-160m",
    "EleutherAI/pythia-160m-deduped": "pythia-160m",
    "EleutherAI/pythia-1b": "pythia-1b",
    "EleutherAI/pythia-1b-deduped": "pythia-1b",
    "cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr": "pythia-1b",
    "HuggingFaceTB/SmolLM2-135M": "smollm2-135m",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2-135m",
    "Qwen/Qwen2.5-0.5B": "qwen2.5-0.5b",
    "Qwen/Qwen2.5-0.5B-Instruct": "qwen2.5-0.5b",
    "Qwen/Qwen3-0.6B-Base": "qwen3-0.6b",
}


class ModelUnavailable(ConfigError):
    """Neither the hub nor its cache gave the model; the message holds the ways out."""


@dataclass(frozen=True)
class Source:
    """A model that is there: folder or hub id, and how transformers is to ask for it.

    `entry` is the file that was found, by which an adapter is told from a model; `revision` is the
    commit of a hub model.
    """

    path: str
    entry: str
    revision: str = ""
    local_files_only: bool = True

    @property
    def loading_arguments(self) -> dict[str, Any]:
        """What `from_pretrained` is told beside the path."""
        known = {"revision": self.revision} if self.revision else {}
        return {"local_files_only": self.local_files_only, **known}

    @property
    def is_folder(self) -> bool:
        """True of a folder, False of a hub id."""
        return Path(self.path).is_dir()


def packaged_config(path: str) -> Path | None:
    """The config file that lies in this package for a hub id; None where there is none."""
    name = _PACKAGED.get(path)
    return _CONFIGS / f"{name}.json" if name else None


def locate(
    path: str,
    *,
    revision: str = "",
    entries: tuple[str, ...] = ("adapter_config.json", "config.json"),
    wanted: str = "config.json",
    key: str = "model.path",
) -> Source:
    """The folder or hub model of this name, cached or not, with the first of `entries` it holds.

    `wanted` says in words what is missing where there is none of them; `key` is the setting to
    blame.

    Raises:
        ModelUnavailable: the hub cannot be reached, or refuses, and the cache does not have it.
        ConfigError: a folder or repository without any of `entries`, or no such folder, repository
            or revision.
    """
    if not path:
        raise ConfigError(f"{key}: empty; give a folder or the id of a model on the hub")
    folder = Path(path).expanduser()
    if folder.exists():
        return _in_folder(folder, entries, f"{key}={path}", wanted)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path):
        raise ConfigError(f"{key}={path}: no such folder, and not the id of a model on the hub")
    return _on_hub(path, revision, entries, key, wanted)


def _in_folder(folder: Path, entries: tuple[str, ...], setting: str, wanted: str) -> Source:
    if not folder.is_dir():
        raise ConfigError(f"{setting}: a file; give the folder that holds it")
    for entry in entries:
        if (folder / entry).is_file():
            return Source(str(folder), entry)
    raise ConfigError(f"{setting}: this folder holds no {wanted}")


@functools.cache
def _on_hub(path: str, revision: str, entries: tuple[str, ...], key: str, wanted: str) -> Source:
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        found = _online(path, revision, entries)
    except RevisionNotFoundError:
        raise ConfigError(f"{key}={path}: no revision {revision!r} on the hub") from None
    except GatedRepoError:  # a kind of RepositoryNotFoundError, and so asked first
        why = "its authors ask for an agreement: accept it on the hub, then `hf auth login`"
    except RepositoryNotFoundError:
        raise ConfigError(_no_repository(path, key)) from None
    except Exception as error:  # sockets, TLS, proxies, HTTP have no common class
        why = f"the hub cannot be reached ({_first_line(error)})"
    else:
        if found is None:
            raise ConfigError(f"{key}={path}: the repository on the hub holds no {wanted}")
        return found
    for entry in entries:
        if commit := _cached_commit(path, revision, entry):
            return Source(path, entry, commit)
    raise ModelUnavailable(_unavailable(path, why, key))


def _online(path: str, revision: str, entries: tuple[str, ...]) -> Source | None:
    """The first of `entries` in the repository on the hub; None where it has none of them."""
    from huggingface_hub.errors import EntryNotFoundError

    for entry in entries:
        try:
            commit = _ask_hub(path, revision, entry)
        except EntryNotFoundError:
            continue
        return Source(path, entry, commit or revision, local_files_only=False)
    return None


def _cached_commit(path: str, revision: str, entry: str) -> str:
    """The commit under which the cache has this file, which lies in a folder of that name."""
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(path, entry, revision=revision or None)
    return Path(file).parent.name if isinstance(file, str) else ""


def _ask_hub(path: str, revision: str, entry: str) -> str:
    """The commit of this revision on the hub, or what huggingface_hub raises, within DEADLINE."""
    import httpx
    from huggingface_hub import constants, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set")
    endpoint = os.environ.get("HF_ENDPOINT") or None
    url = hf_hub_url(path, entry, revision=revision or None, endpoint=endpoint)
    hub = endpoint or constants.ENDPOINT
    if hub in _SILENT:
        raise TimeoutError("it was silent when it was asked before")
    try:
        return _within(DEADLINE, lambda: _commit_at(url))
    except (TimeoutError, httpx.TimeoutException):
        _SILENT.add(hub)
        raise


def _commit_at(url: str) -> str:
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    response = get_session().head(
        url, headers=build_hf_headers(), timeout=DEADLINE, follow_redirects=True
    )
    hf_raise_for_status(response)
    found = (r.headers.get("x-repo-commit") for r in (*response.history, response))
    return next((commit for commit in found if commit), "")


def _within(seconds: float, function: Callable[[], str]) -> str:
    """What `function` returns or raises, or TimeoutError: resolving a host name has no timeout."""
    outcome: list[str | Exception] = []

    def work() -> None:
        try:
            outcome.append(function())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:.0f} seconds")
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _no_repository(path: str, key: str) -> str:
    return (
        f"{key}={path}: no such folder, and no public model of this id on the hub"
        f"{suggestion(path, _PACKAGED)} (a private one needs `hf auth login`)"
    )


def _unavailable(path: str, why: str, key: str) -> str:
    from huggingface_hub import constants

    ways = [f"point HF_HOME at a cache that holds it (looked in {constants.HF_HUB_CACHE})"]
    if key == "model.path":
        ways.append("give a folder, `model=local model.path=FOLDER`")
        if packaged_config(path):
            ways.append("run its shape with random weights, `model.weights=random`")
    else:
        ways.append(f"give a folder, `{key}=FOLDER`")
    return (
        f"{key}={path}: no such folder, not in the cache, and {why}. "
        f"Ways out: {'; '.join(ways)}; or fetch it once where there is a network."
    )
