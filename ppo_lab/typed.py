"""Paths as one types them: short, in a shell, and behind a key of Hydra's."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

shell_folder: Path | None = None  # where the user's shell is, once a process has left it


def short_path(path: Path) -> str:
    """The path from the folder that the user's shell is in, where that is shorter."""
    absolute = str(path.absolute())
    try:
        return min(os.path.relpath(absolute, shell_folder), absolute, key=len)
    except ValueError:  # another drive
        return absolute


def leave_shell_for(folder: str | Path) -> None:
    """Change the current folder of this process alone.

    Raises:
        OSError: there is no such folder, and nothing has changed.
    """
    global shell_folder
    left = shell_folder or Path.cwd()
    os.chdir(folder)
    shell_folder = left


def shell_path(path: Path) -> str:
    """The short path as a shell reads it."""
    return shlex.quote(short_path(path))


def shell_override(key: str, path: Path) -> str:
    """`key=path` as a shell and then Hydra's grammar read it."""
    value = quoted(Path(short_path(path)))
    plain = not any(c in value for c in '"$`\\!')
    return f'{key}="{value}"' if "'" in value and plain else f"{key}={shlex.quote(value)}"


def unquoted(text: str) -> str:
    """A value without the quotes of Hydra's grammar."""
    if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"":
        return text
    quote = text[0]
    inner = re.sub(rf"\\((?:\\\\)*){quote}", rf"\1{quote}", text[1:-1])
    return re.sub(rf"(\\+)(?={quote}|\Z)", lambda found: found[1][: len(found[1]) // 2], inner)


def quoted(path: Path) -> str:
    """A path as Hydra's grammar reads it, whatever characters it has.

    Letters beyond ASCII want quotes; backslashes count in front of a quote, the closing one too.
    """
    text = str(path)
    if all((c.isascii() and c.isalnum()) or c in "/._-+:%@" for c in text):
        return text
    text = re.sub(r"(\\*)'", r"\1\1\\'", text)
    return "'" + re.sub(r"(\\+)\Z", r"\1\1", text) + "'"
