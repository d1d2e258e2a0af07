"""What would keep a reward from being made: found without importing anything heavy."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ppo_lab.config import REWARDS
from ppo_lab.rewards.targets import TargetError, find_target


def problems(section: Any, *, key: str = "reward") -> list[str]:
    """What this machine lacks to make the reward, one sentence each.

    `key` is the dotted key of the section, for the messages.
    """
    check = {"model": _model, "function": _function, "vader": _vader, "weighted": _weighted}
    name = kind(section)
    if not name:
        return [f"{key}: choose a kind of reward: {', '.join(REWARDS)}."]
    return check[name](section, key) if name in check else []


def kind(section: Any) -> str:
    """The kind of reward that a section describes: `model` for a ModelReward; empty for none."""
    return next((name for name, known in REWARDS.items() if type(section) is known), "")


def _model(section: Any, key: str) -> list[str]:
    """A folder that is no model; whether a hub has a model is known only when it is asked."""
    if not section.path:
        return [f"{key}.path: name the reward model, a hub id or a folder."]
    found = []
    for name in ("chat_template", "append_eos"):
        if section.text == "pair" and getattr(section, name) == "always":
            found.append(f"{key}.{name}=always: {key}.text=pair shows two texts as they are.")
    for name in ("path", "tokenizer"):
        value = getattr(section, name)
        try:
            if value and Path(value).expanduser().is_dir():
                found += _folder(Path(value).expanduser(), f"{key}.{name}", model=name == "path")
            elif value and _looks_like_folder(value):
                found.append(f"{key}.{name}={value}: there is no such folder.")
        except (OSError, RuntimeError) as error:  # no permission; a home folder of nobody
            found.append(f"{key}.{name}={value}: cannot be read ({error}).")
    return found


def _folder(folder: Path, key: str, *, model: bool) -> list[str]:
    """A folder that should hold a model, and does not."""
    if not model or (folder / "config.json").is_file():
        return []
    if (folder / "adapter_config.json").is_file():
        return [f"{key}={folder}: this is an adapter; merge it into its model and save that."]
    return [f"{key}={folder}: the folder has no config.json, so it holds no model."]


def _looks_like_folder(path: str) -> bool:
    """Whether a name is no hub id; those have the form `name` or `owner/name`."""
    return path[0] in "./~" or path.count("/") > 1


def _function(section: Any, key: str) -> list[str]:
    if not section.target:
        return [f"{key}.target: name the function, as package.module:callable."]
    try:
        find_target(section.target, list(section.kwargs))
    except TargetError as error:
        return [f"{key}.target={section.target}: {error}"]
    return []


def _vader(section: Any, key: str) -> list[str]:
    if importlib.util.find_spec("vaderSentiment") is not None:
        return []
    return [
        f"{key}=vader needs the vaderSentiment package, an extra that is not installed: "
        "pip install 'ppo_lab[vader]'."
    ]


def _weighted(section: Any, key: str) -> list[str]:
    if not section.parts:
        return [f"{key}.parts: name at least one reward."]
    return [
        p for name, part in section.parts.items() for p in problems(part, key=f"{key}.parts.{name}")
    ]
