"""Prompts and responses that are chats: lists of {"role": ..., "content": ...} messages."""

from __future__ import annotations

from typing import Any


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
