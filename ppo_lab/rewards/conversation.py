"""Prompts and responses that are chats: lists of {"role": ..., "content": ...} messages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

DAY = datetime(2024, 7, 26)  # where a template writes the day; Llama 3's own, if it is told none
_TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of messages rather than a text."""
    return isinstance(prompt, list)


def answer(completion: str) -> list[dict[str, Any]]:
    """A response as the assistant's message: TRL shows it so to a reward, beside a chat."""
    return [{"role": "assistant", "content": completion}]


def as_chat(prompt: Any, completion: str) -> list[dict[str, Any]]:
    """The whole conversation, the response being its last message; a plain prompt is the user's."""
    before = prompt if is_chat(prompt) else [{"role": "user", "content": prompt}]
    return [*before, *answer(completion)]


def as_text(prompt: Any) -> str:
    """A prompt as plain text: the messages of a chat stand on lines of their own."""
    if not is_chat(prompt):
        return str(prompt)
    return "\n".join(content_of(message) for message in prompt)


def joined(prompt: Any, completion: str) -> str:
    """Prompt and response as one plain text; after a chat the response starts a line."""
    return f"{as_text(prompt)}\n{completion}" if is_chat(prompt) else prompt + completion


def content_of(message: Any) -> str:
    """The text of a message, its parts joined where it has several."""
    content = message.get("content", "") if isinstance(message, dict) else message
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content)


def writes_the_day(tokenizer: Any) -> bool:
    """Whether the tokenizer's chat template writes the day that it is used on."""
    template = tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else [template or ""]
    return any(_TODAY.search(text) for text in texts)


@contextmanager
def one_day(tokenizer: Any) -> Iterator[None]:
    """The tokenizer's chat template writes `DAY`, whatever day it is.

    A run that goes on tomorrow must find the prompts that it had today, and runs of different days
    are to be compared.
    """
    template = tokenizer.chat_template
    if writes_the_day(tokenizer):
        several = isinstance(template, dict)
        tokenizer.chat_template = (
            {name: _dated(text) for name, text in template.items()} if several else _dated(template)
        )
    try:
        yield
    finally:
        tokenizer.chat_template = template


def templated(tokenizer: Any, messages: list[dict[str, Any]], **variables: Any) -> str:
    """A chat as the tokenizer's template writes it on `DAY`, with these variables."""
    with one_day(tokenizer):
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **variables))


def keep_variables(tokenizer: Any, variables: Mapping[str, Any], *, folder: Path) -> None:
    """Save a tokenizer whose chat template has these variables, whoever uses it."""
    if not variables:
        return
    # `+%}` keeps a line break that the template begins with
    given = "".join(f"{{% set {name} = {value!r} +%}}" for name, value in variables.items())
    template = tokenizer.chat_template
    tokenizer.chat_template = (
        {name: given + text for name, text in template.items()}
        if isinstance(template, dict)
        else given + template
    )
    tokenizer.save_pretrained(folder)


def _dated(template: str) -> str:
    return _TODAY.sub(lambda call: repr(DAY.strftime(call[2])), template)
