"""Python functions named in a configuration as package.module:callable."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class TargetError(ValueError):
    """A target that leads to no function; the message says why."""


def find_target(target: str) -> Callable[..., Any]:
    """The function that `package.module:callable` names; the working folder is searched as well.

    Raises:
        TargetError: the form is wrong, the module cannot be imported, it has no such name, or that
        is not a plain
            callable.
    """
    module_name, colon, path = target.partition(":")
    if not (module_name and colon and path):
        raise TargetError("name a function as package.module:callable.")
    if "/" in module_name or module_name.endswith(".py"):
        own = Path(module_name).stem
        raise TargetError(f"name the module without its path: {own}:{path}, in the folder of it.")
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
    if inspect.iscoroutinefunction(found) or inspect.iscoroutinefunction(type(found).__call__):
        raise TargetError("it is an async function; wrap it in one that returns its result.")
    return found


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
