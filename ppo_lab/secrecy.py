"""Secrets stay out of a run's files: refused on the command line, blotted out everywhere else."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

BLOT = "***"
SHORTEST = 8
NAMES = re.compile(r"(api_?key|token|secret|password|passwd|credential)s?$", re.IGNORECASE)
# An entry of a mapping that is written out, and its value.
ENTRY = re.compile(r"([\w.-]+)['\"]?\s*:\s*(\$\{|['\"]?[^\s,{}\[\]]+)")
# What is no secret, whatever it is called: max_tokens=5.
PLAIN = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?|true|false|null", re.IGNORECASE)
ENVIRONMENT = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?$")
KNOWN = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[opsu]_[A-Za-z0-9]{20,}"
    r"|\bwandb_v1_[A-Za-z0-9_]{20,}|\bAKIA[A-Z0-9]{16}\b|(?<=://)[^/\s:@]+:[^/\s:@]+(?=@)"
)


def secret_overrides(argv: Sequence[str]) -> Iterator[str]:
    """Each argument that holds a secret, which the run's files would keep, without its value."""
    for text in argv:
        key, equals, value = text.partition("=")
        entries = [(key, value), *ENTRY.findall(value)] if ".kwargs" in key else []
        named = any(_is_secret(name, said) for name, said in entries)
        if equals and (named or hidden_text(value) != value):
            yield (
                f"{key}={BLOT}: a secret, which the run's files would keep; put it into the "
                f"environment and write {key}='${{oc.env:ITS_NAME}}'"
            )


def _is_secret(name: str, value: str) -> bool:
    """Whether a keyword is called a secret and holds one: no reference, number or truth value."""
    if not NAMES.search(name) or "${" in value:
        return False
    return bool(value) and not PLAIN.fullmatch(value)


def hidden_text(text: str) -> str:
    """The text with every secret of the environment, and what looks like a key, blotted out."""
    for secret in _of_the_environment():
        text = text.replace(secret, BLOT)
    return KNOWN.sub(BLOT, text)


def reason_of(error: BaseException) -> str:
    """An error's kind and what it says, on one line, for a run's summary."""
    return hidden_text(" ".join(f"{type(error).__name__}: {error}".split()))


def hidden(value: Any, name: str = "") -> Any:
    """A nested configuration with its secrets blotted out; free-form keys are judged by name."""
    if isinstance(value, Mapping):
        return {
            key: BLOT
            if name == "kwargs" and NAMES.search(str(key)) and isinstance(item, str)
            else hidden(item, name if name == "kwargs" else str(key))
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [hidden(item, name) for item in value]
    return hidden_text(value) if isinstance(value, str) else value


def _of_the_environment() -> list[str]:
    found = {v for name, v in os.environ.items() if ENVIRONMENT.search(name) and len(v) >= SHORTEST}
    return sorted(found, key=len, reverse=True)
