"""A tokenizer of bytes, for models with random weights: nothing to fetch, lossless on any text."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIALS = ("<pad>", "<s>", "</s>")
"""Pad, beginning and end of sequence: ids 0, 1 and 2. The byte b has the id b + 3."""

BYTE_VOCABULARY = len(SPECIALS) + 256


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the 256 bytes of UTF-8 and three specials, which no text can spell.

    Neither BOS nor EOS is put around a text.
    """
    backend = Tokenizer(models.BPE(vocab=_vocabulary(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    pad, bos, eos = SPECIALS
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def _vocabulary() -> dict[str, int]:
    """Ids of the specials, then of the characters that stand for the bytes 0 to 255."""
    names = [_byte_character(byte) for byte in range(256)]
    return {name: index for index, name in enumerate([*SPECIALS, *names])}


def _byte_character(byte: int) -> str:
    """ByteLevel's character for a byte: itself where printable, else the next from U+0100 on."""
    if chr(byte) in _PRINTABLE:
        return chr(byte)
    return chr(256 + sum(chr(lower) not in _PRINTABLE for lower in range(byte)))


_PRINTABLE = frozenset(pre_tokenizers.ByteLevel.alphabet())
