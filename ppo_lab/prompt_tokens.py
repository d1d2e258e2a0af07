"""Prompts as token ids: texts and chats, within bounds of length."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ppo_lab.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ppo_lab.types import Prompts

log = logging.getLogger(__name__)


class PromptEncoder:
    """Tokenizes prompts for a policy that is to continue them.

    What the tokenizer puts before a text (BOS) stays, what it puts after one (EOS) does not. A chat
    goes through the chat template, up to where the assistant begins; with `chat` a plain text
    counts as a user's message. `shortest` and `longest` (0 = no limit) bound the length in tokens.
    Longer ones are dropped or, with `truncate`, keep their beginning; a chat is dropped in any
    case, since its template would lose its end.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        shortest: int = 1,
        longest: int = 0,
        truncate: bool = False,
        chat: bool = False,
    ) -> None:
        """An encoder for one tokenizer."""
        self.tokenizer = tokenizer
        self.shortest = max(shortest, 1)
        self.longest = longest
        self.truncate = truncate
        self.chat = chat
        self._prefix = _prefix(tokenizer)

    def encode(
        self, prompts: list[Any], columns: dict[str, list[Any]], *, cuts: list[int] | None = None
    ) -> Prompts:
        """The prompts within the bounds, their rows kept in `indices`.

        `cuts`, if any, says how many first tokens of each text are kept, the tokenizer's own prefix
        not counted. `texts` then holds what is left of it; a chat is shown as its messages.

        Raises:
            ConfigError: a prompt is neither text nor chat (the message names its row), there is no
            chat template, all prompts are empty, or none is left.
        """
        from ppo_lab.types import Prompts

        if prompts and all(isinstance(p, str) and not p.strip() for p in prompts):
            raise ConfigError(f"data: all {len(prompts)} prompts are empty.")
        shown = [self._checked(prompt, row) for row, prompt in enumerate(prompts, 1)]
        ids, texts, kept = [], [], []
        lengths, dropped = [], Counter[str]()
        for row, (prompt, tokens) in enumerate(zip(shown, self._tokens(shown), strict=True)):
            most = self._most(cuts[row] if cuts else 0, prompt)
            text, tokens = self._shortened(prompt, tokens, most)
            lengths.append(len(tokens))
            if reason := self._refused(len(tokens)):
                dropped[reason] += 1
                continue
            ids.append(tokens)
            texts.append(text)
            kept.append(row)
        self._tell(dropped, lengths)
        picked = {name: [values[row] for row in kept] for name, values in columns.items()}
        return Prompts(ids=ids, texts=texts, columns=picked, indices=kept)

    def _checked(self, prompt: Any, row: int) -> Any:
        """A prompt as text or as a list of messages."""
        if isinstance(prompt, str):
            text = _encodable(prompt)
            return [{"role": "user", "content": text}] if self.chat else text
        if isinstance(prompt, list) and prompt and all(map(_is_message, prompt)):
            return [{k: v for k, v in message.items() if v is not None} for message in prompt]
        what = "missing" if prompt is None else f"{type(prompt).__name__} ({str(prompt)[:60]!r})"
        raise ConfigError(
            f"data: the prompt of row {row} is {what}; it must be text, or a list of "
            "messages with role and content."
        )

    def _tokens(self, prompts: list[Any]) -> list[list[int]]:
        """The ids of each prompt, all texts of the set in one call."""
        texts = [p if isinstance(p, str) else self._templated(p) for p in prompts]
        ids = (
            self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            if texts
            else []
        )
        return [
            [*self._prefix, *row] if isinstance(prompt, str) else row
            for prompt, row in zip(prompts, ids, strict=True)
        ]

    def _templated(self, messages: list[dict[str, Any]]) -> str:
        """A chat as the model reads it, up to where the assistant begins."""
        if not self.tokenizer.chat_template:
            raise ConfigError(
                "data: the prompts are chats, but the model's tokenizer has no chat "
                "template; use a model with one (an instruct or chat model), or a column of "
                "plain text."
            )
        return str(
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )

    def _most(self, cut: int, prompt: Any) -> int:
        """How many tokens of this prompt are kept; 0 = all."""
        if not isinstance(prompt, str):
            return 0
        limits = [cut + len(self._prefix) if cut else 0, self.longest if self.truncate else 0]
        return min((limit for limit in limits if limit), default=0)

    def _shortened(self, prompt: Any, tokens: list[int], most: int) -> tuple[Any, list[int]]:
        """The prompt and its ids, reduced to its beginning where it is longer than `most`."""
        if not most or len(tokens) <= most:
            return prompt, tokens
        tokens = tokens[:most]
        content = tokens[len(self._prefix) :]
        return self.tokenizer.decode(content, clean_up_tokenization_spaces=False), tokens

    def _refused(self, length: int) -> str:
        """Why a prompt of this many tokens is dropped; empty if it is not."""
        if length < self.shortest:
            return f"shorter than {self.shortest} tokens (data.min_prompt_tokens)"
        if self.longest and length > self.longest:
            return f"longer than {self.longest} tokens (data.max_prompt_tokens or the context)"
        return ""

    def _tell(self, dropped: Counter[str], lengths: list[int]) -> None:
        """Say how many prompts were dropped and why; refuse to go on with none."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        if not lengths:
            raise ConfigError("data: there are no prompts.")
        if dropped.total() == len(lengths):
            raise ConfigError(
                f"data: none of {len(lengths)} prompts is left: {reasons}. "
                f"They have {min(lengths)} to {max(lengths)} tokens."
            )
        if dropped:
            log.warning(
                "data: %d of %d prompts dropped: %s", dropped.total(), len(lengths), reasons
            )


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


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str)


def _encodable(text: str) -> str:
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
