"""Python functions named in a configuration as package.module:callable."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any


class TargetError(ValueError):
    """A target that leads to no function; the message says why."""


def find_target(target: str, kwargs: Collection[str] = ()) -> Callable[..., Any]:
    """The function that `package.module:callable` names; the working folder is searched as well.

    Raises:
        TargetError: the form is wrong, the module cannot be imported, it has no such name, or that
            is not a plain callable, or not one that takes keywords and `kwargs` among them.
    """
    module_name, colon, path = target.partition(":")
    if not (module_name and colon and path):
        raise TargetError("name a function as package.module:callable.")
    if re.search(r"[/\\]|^\.|\.py$", module_name):
        own = re.split(r"[/\\]", module_name)[-1].removesuffix(".py").lstrip(".")
        raise TargetError(
            f"name the module without a path, {own}:{path}, and start in the folder it lies in."
        )
    found: Any = _imported(module_name)
    for name in path.split("."):
        if not hasattr(found, name):
            near = difflib.get_close_matches(name, [n for n in dir(found) if n[0] != "_"], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise TargetError(f"{module_name} has no {path!r}.{hint}")
        found = getattr(found, name)
    if inspect.isclass(found):
        raise TargetError("it is a class; name an instance of it.")
    if not callable(found):
        raise TargetError(f"it is {type(found).__name__}, not a function.")
    _check_keywords(found, kwargs)
    return found


def parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a callable; those of one without a readable signature: any keyword."""
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return [inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)]


def keywords(function: Callable[..., Any]) -> list[str] | None:
    """The arguments that a callable takes by name; None where it takes any."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = parameters(function)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in found):
        return None
    return [p.name for p in found if p.kind in named]


def _check_keywords(function: Callable[..., Any], kwargs: Collection[str]) -> None:
    """Refuse what cannot be called by keywords, and `kwargs` that it does not take."""
    for parameter in parameters(function):
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
            raise TargetError(
                f"it takes {parameter.name!r} by position alone, and rewards are called by "
                "keywords; wrap it in a function of prompts and completions."
            )
    taken = keywords(function)
    for name in kwargs if taken is not None else ():
        if name not in (taken or ()):
            near = difflib.get_close_matches(name, taken or (), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise TargetError(f"it has no argument {name!r}, which reward.kwargs holds.{hint}")


def _imported(module_name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:  # a console script's path does not hold the working folder
        sys.path.append(here)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise TargetError(
                f"there is no module {error.name!r} in the working folder ({here}) or among the "
                "installed packages."
            ) from error
        raise TargetError(f"{module_name} cannot be imported: {error}.") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise TargetError(f"{module_name} cannot be imported: {reason}") from error
