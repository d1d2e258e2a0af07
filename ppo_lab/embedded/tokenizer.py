"""The help desk's own tokenizer: byte-level BPE in BLOOM's style, trained on its corpus."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Any:
    """A tokenizer that pads on the left; unknown, beginning, end, padding are ids 0 to 3."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[UNK, BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=256,
    )


def for_reward(tokenizer: Any) -> Any:
    """The same vocabulary for the reward model, forgiving about how texts are joined.

    White space counts as one space, at the end as none, and a sentence that follows another
    without one gets one: an answer scores the same with and without the space or line break that
    other policies begin with.
    """
    from tokenizers import Regex, Tokenizer, normalizers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    bpe.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Replace(Regex(r"(?<=[.?!])(?=[A-Z])"), " "),
            normalizers.Replace(Regex(r" $"), ""),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="right",
        model_max_length=256,
    )
