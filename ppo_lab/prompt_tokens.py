"""Prompts as token ids: texts and chats, within bounds of length."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ppo_lab.errors import ConfigError
from ppo_lab.rewards.conversation import DAY, templated, writes_the_day

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ppo_lab.types import Prompts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoded:
    """A prompt's ids, and what a reward is shown of it: a text, or messages and the beginning of
    the answer to them.
    """

    ids: list[int]
    text: Any
    prefill: str = ""


class PromptEncoder:
    """Tokenizes prompts for a policy that is to continue them.

    What the tokenizer puts before a text (BOS) stays, and stands there once where the text begins
    with it; what it puts after one (EOS) does not. A chat goes through the chat template, which is
    given `template_kwargs`, up to where the assistant begins, or goes on where the last message is
    the assistant's; with `chat` a plain text counts as a user's message. `shortest` and `longest`
    (0 = no limit) bound the length in tokens. Longer ones are dropped or, with `truncate`, keep the
    beginning of their text; what is a chat already is dropped in any case, as are empty prompts.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        shortest: int = 1,
        longest: int = 0,
        truncate: bool = False,
        chat: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """An encoder for one tokenizer."""
        self.tokenizer = tokenizer
        self.shortest = max(shortest, 1)
        self.longest = longest
        self.truncate = truncate
        self.chat = chat
        self.template_kwargs = dict(template_kwargs or {})
        self._prefix = _prefix(tokenizer)
        self._tells_of_day = writes_the_day(tokenizer)

    def encode(
        self, prompts: list[Any], columns: dict[str, list[Any]], *, cuts: list[int] | None = None
    ) -> Prompts:
        """The prompts within the bounds, their rows kept in `indices`.

        `cuts`, if any, says how many first tokens of each text are kept, the tokenizer's own prefix
        and the template's tokens not counted. `texts` then holds what is left of it; a chat is
        shown as its messages.

        Raises:
            ConfigError: a prompt is neither text nor chat, or the chat template refuses it (the
            message names its row), a chat is to be cut, there is no chat template, or nothing for
            it, all prompts are empty, or none is left.
        """
        from ppo_lab.types import Prompts

        shown = [self._checked(prompt, row) for row, prompt in enumerate(prompts, 1)]
        rows = [row for row, prompt in enumerate(shown) if not _is_blank(prompt)]
        if shown and not rows:
            raise ConfigError(f"data: all {len(shown)} prompts are empty.")
        self._refuse_useless(shown, cut=bool(cuts))
        encoded = self._encoded({row: shown[row] for row in rows}, cuts or [])
        reasons = {row: self._refused(len(prompt.ids)) for row, prompt in encoded.items()}
        dropped = Counter({"empty": len(shown) - len(rows)} if len(rows) < len(shown) else {})
        dropped.update(reason for reason in reasons.values() if reason)
        self._tell(dropped, len(shown), [len(prompt.ids) for prompt in encoded.values()])
        kept = [row for row in rows if not reasons[row]]
        prefills = [encoded[row].prefill for row in kept]
        return Prompts(
            ids=[encoded[row].ids for row in kept],
            texts=[encoded[row].text for row in kept],
            columns={name: [values[row] for row in kept] for name, values in columns.items()},
            indices=kept,
            prefills=prefills if any(prefills) else [],
        )

    def _checked(self, prompt: Any, row: int) -> Any:
        """A prompt as text or as a list of messages."""
        if isinstance(prompt, str):
            return encodable(prompt)
        if is_chat(prompt):
            return [{k: v for k, v in message.items() if v is not None} for message in prompt]
        raise ConfigError(
            f"data: the prompt of row {row} is {described(prompt)}; it must be text, or a list of "
            "messages with role and content."
        )

    def _refuse_useless(self, prompts: list[Any], *, cut: bool) -> None:
        """Say what was asked for that does nothing to these prompts."""
        chat = next((row for row, p in enumerate(prompts, 1) if not isinstance(p, str)), 0)
        if cut and chat:
            raise ConfigError(
                f"data.cut_max_tokens: the prompt of row {chat} is a chat, which is never cut; use "
                "data.cut_min_tokens=0 data.cut_max_tokens=0, or a column of plain text."
            )
        if prompts and self.template_kwargs and not (chat or self.chat):
            raise ConfigError(
                "data.template_kwargs: has no effect, since no prompt is a chat; add "
                "data.chat=true, or leave it out."
            )

    def _encoded(self, prompts: dict[int, Any], cuts: Sequence[int]) -> dict[int, Encoded]:
        """The prompts of these rows, all of them tokenized in one call."""
        if self.chat and cuts:
            pieces = zip(prompts, self._ids(list(prompts.values())), strict=True)
            prompts = {row: self._beginning(ids[: cuts[row]]) for row, ids in pieces}
        chats = {
            row: [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            for row, prompt in prompts.items()
            if self.chat or not isinstance(prompt, str)
        }
        if chats and self._tells_of_day:
            self._tells_of_day = False  # once
            log.warning(
                "data: the chat template writes the day, and %s stands there on every day, so that "
                "a run can go on and be repeated",
                f"{DAY:%d %b %Y}",
            )
        written = [
            self._templated(chats[row], row) if row in chats else prompt
            for row, prompt in prompts.items()
        ]
        found = {}
        for (row, prompt), text, ids in zip(
            prompts.items(), written, self._ids(written), strict=True
        ):
            if row not in chats:
                found[row] = self._plain(prompt, ids, cuts[row] if cuts else 0)
            elif isinstance(prompt, str) and self.truncate and 0 < self.longest < len(ids):
                found[row] = self._fitted(prompt, ids, row)
            else:
                found[row] = _as_shown(chats[row], text, ids)
        return found

    def _plain(self, text: str, ids: list[int], cut: int) -> Encoded:
        """A text after the tokenizer's prefix, reduced to its beginning where it is too long."""
        added = [] if ids[: len(self._prefix)] == self._prefix else self._prefix
        limits = [cut + len(self._prefix) if cut else 0, self.longest if self.truncate else 0]
        most = min((limit for limit in limits if limit), default=0)
        whole = [*added, *ids]
        if not most or len(whole) <= most:
            return Encoded(whole, text)
        kept = ids[: max(most - len(added), 0)]
        return Encoded(whole[:most], self._text(kept))

    def _fitted(self, text: str, ids: list[int], row: int) -> Encoded:
        """A user's text cut at its end until with its template it has `longest` tokens; as it is
        where nothing of it would be left.
        """
        content, cut, whole = self._ids([text])[0], text, ids
        while len(whole) > self.longest and cut.strip():
            content = content[: self.longest - len(whole)]
            cut = self._beginning(content)
            whole = self._ids([self._templated([{"role": "user", "content": cut}], row)])[0]
        if not cut.strip():
            cut, whole = text, ids
        return Encoded(whole, [{"role": "user", "content": cut}])

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text alone, all of them in one call."""
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _text(self, ids: list[int]) -> str:
        """What these ids say, special tokens included."""
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _beginning(self, ids: list[int]) -> str:
        """The text that begins with these ids, to be read again: of half a character at its end
        nothing is left.
        """
        return self._text(ids).rstrip("\ufffd")

    def _templated(self, messages: list[dict[str, Any]], row: int) -> str:
        """A chat as the model reads it, up to where the assistant begins or goes on."""
        from jinja2 import TemplateError

        if not self.tokenizer.chat_template:
            raise ConfigError(
                "data: the prompts are chats, but the model's tokenizer has no chat "
                "template; use a model with one (an instruct or chat model), or a column of "
                "plain text."
            )
        begun = messages[-1]["role"] == "assistant"
        end: dict[str, Any] = {"continue_final_message" if begun else "add_generation_prompt": True}
        try:
            return templated(self.tokenizer, messages, **end, **self.template_kwargs)
        except (TemplateError, TypeError, ValueError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ConfigError(
                f"data: the tokenizer's chat template refuses the chat of row {row + 1}: {reason}"
            ) from error

    def _refused(self, length: int) -> str:
        """Why a prompt of this many tokens is dropped; empty if it is not."""
        if length < self.shortest:
            return f"shorter than {self.shortest} tokens (data.min_prompt_tokens)"
        if self.longest and length > self.longest:
            return f"longer than {self.longest} tokens (data.max_prompt_tokens or the context)"
        return ""

    def _tell(self, dropped: Counter[str], count: int, lengths: list[int]) -> None:
        """Say how many of so many prompts were dropped and why; refuse to go on with none."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        if not count:
            raise ConfigError("data: there are no prompts.")
        if dropped.total() == count:
            raise ConfigError(
                f"data: none of {count} prompts is left: {reasons}. "
                f"They have {min(lengths)} to {max(lengths)} tokens."
            )
        if dropped:
            log.warning("data: %d of %d prompts dropped: %s", dropped.total(), count, reasons)


def continuation(
    tokenizer: PreTrainedTokenizerBase,
    query: Sequence[int],
    response: Sequence[int],
    *,
    special: bool = False,
) -> str:
    """The text that a response adds to that of its query, without special tokens unless `special`.

    Tokenizers of SentencePiece's kin keep the space before a word in the word's token and leave it
    out where a text begins: a response by itself would lose it, and prompt and response put
    together would be another text than the one that was written.
    """

    def text(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=not special))

    before, whole = text(query), text([*query, *response])
    # Not where a query ends within a character that the response completes.
    return whole[len(before) :] if whole.startswith(before) else text(response)


def written_by(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], str]:
    """What says how a response, or the rest of one, reads where stop strings are looked for in it:
    with its special tokens, one of which may be what stops it, and with the space before its first
    word.
    """
    word = tokenizer.encode("a", add_special_tokens=False)
    return lambda ids: continuation(tokenizer, word, ids, special=True)


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of messages, each with a role."""
    return isinstance(prompt, list) and bool(prompt) and all(map(_is_message, prompt))


def described(prompt: Any) -> str:
    """What a value is that is no prompt, for a message."""
    return "missing" if prompt is None else f"{type(prompt).__name__} ({str(prompt)[:60]!r})"


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str)


def _is_blank(prompt: Any) -> bool:
    """Whether a text, or the last message of a chat, says nothing."""
    parts = [prompt] if isinstance(prompt, str) else _parts(prompt[-1])
    return all(isinstance(part, str) and not part.strip() for part in parts)


def _parts(message: dict[str, Any]) -> list[Any]:
    """The texts of a message, and whatever else it holds beside them."""
    content = message.get("content", "")
    parts = content if isinstance(content, list) else [content]
    return [part.get("text", part) if isinstance(part, dict) else part for part in parts]


def _as_shown(chat: list[dict[str, Any]], text: str, ids: list[int]) -> Encoded:
    """A chat as rewards are shown it: an answer that it begins comes before the response."""
    if chat[-1]["role"] != "assistant":
        return Encoded(ids, chat)
    prefill = "".join(part for part in _parts(chat[-1]) if isinstance(part, str))
    # Templates may trim what a message says.
    return Encoded(ids, chat[:-1], prefill if text.endswith(prefill) else prefill.strip())


def encodable(text: str) -> str:
    """The text with halves of surrogate pairs, which UTF-8 cannot hold, replaced by U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    starts = range(len(whole) - len(plain) + 1)
    start = next((i for i in starts if whole[i : i + len(plain)] == plain), 0)
    return whole[:start]
