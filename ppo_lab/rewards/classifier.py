"""A sequence classifier as a reward: it reads texts with its own tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor

from ppo_lab.local_model import POSITIONS
from ppo_lab.models.digests import digest_of_weights
from ppo_lab.models.fitness import steady_context
from ppo_lab.models.trunk import Trunk
from ppo_lab.processes.alone import Alone
from ppo_lab.record import brief
from ppo_lab.rewards.conversation import as_chat, as_text, is_chat, joined, templated
from ppo_lab.rewards.loading import load_classifier, load_reward_tokenizer
from ppo_lab.rewards.scoring import RewardError, Scorer

# What transformers calls the table that positions are looked up in, where there is one.
LEARNED_POSITIONS = ("position_embeddings", "wpe", "embed_positions", "positions_embed")


def model_scorer(section: Any, *, device: str, processes: Alone | None = None) -> Scorer:
    """The classifier that `reward=model` names: a copy for each process, one on a GPU of its own
    that the main process asks, or one that is sharded over all.

    Raises:
        RewardError: it cannot be had, has no trained head, does not fit its tokenizer, or
            `label` is not among its labels.
    """
    processes, place = processes or Alone(), section.device
    alone_there = processes.size > 1 and place.startswith("cuda")
    if alone_there and not processes.is_main:
        return Elsewhere()
    model = load_classifier(
        section.path,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
        dtype=section.dtype,
        device=device if place in ("", "auto", "sharded") else place,
    )
    tokenizer = load_reward_tokenizer(
        section.tokenizer or section.path,
        revision="" if section.tokenizer else section.revision,
        trust_remote_code=section.trust_remote_code,
    )
    scorer = Classifier(
        model,
        tokenizer,
        label=section.label,
        output=section.output,
        text=section.text,
        chat_template=section.chat_template,
        append_eos=section.append_eos,
        batch_size=section.batch_size,
        max_length=section.max_length,
    )
    scorer.sees_whole_batch = alone_there
    if place == "sharded":
        scorer.call, scorer.in_step = processes.shard(model), True
    return scorer


class Elsewhere:
    """Stands for a scorer that only the main process has, and asks."""

    sees_whole_batch = True

    def __call__(self, *_: Any, **__: Any) -> Tensor:
        """Nothing: nobody calls it."""
        raise AssertionError("the main process alone asks this reward model")


def embedded_scorer(section: Any, *, device: str) -> Scorer:
    """The reward model of the embedded help desk, built on its first use."""
    from ppo_lab import embedded

    path = str(embedded.reward_path())
    model = load_classifier(path, device=device)
    return Classifier(model, load_reward_tokenizer(path), batch_size=section.batch_size)


class Read(NamedTuple):
    """What the model reads of a sample: token ids and, of a pair of texts, which of the two each is
    of; empty where the model does not ask.
    """

    ids: list[int]
    kinds: Sequence[int] = ()


class Classifier:
    """Scores by one output of a sequence classifier, as float32 numbers.

    The model is in evaluation mode and records no gradient. A sample's score depends on its own
    text alone, whatever stands beside it in the batch: texts are padded with an attention mask, on
    the side that this model proves to bear, and the padding is never taken for the text's end.
    Texts over `max_length` tokens lose their beginning, so that the response stays.

    `text`: what is read, of which `pair` shows an encoder prompt and response as two texts, with
    what its tokenizer puts between them, as models that judge answers to questions were trained.

    `chat_template`: `auto` uses the tokenizer's template where the prompt is a chat and there is a
    template. `append_eos`: `auto` appends the end-of-sequence token to plain texts of decoders, the
    form in which TRL's RewardTrainer shows them in training; not to a chat template's text, nor for
    an encoder, nor where the tokenizer closes its texts itself. Whatever ends a text, a decoder's
    head reads the last token that does not pad, as transformers' does: where EOS pads too, as with
    tokenizers that have no padding of their own, the one before it, unless `append_eos` is
    `always`.
    """

    # Whether one process scores all samples; whether all make as many passes, over one model.
    sees_whole_batch = in_step = False

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        label: str = "",
        output: str = "logit",
        text: str = "prompt_and_completion",
        chat_template: str = "auto",
        append_eos: str = "auto",
        batch_size: int = 32,
        max_length: int = 0,
    ) -> None:
        """A scorer that owns `model`, a loaded AutoModelForSequenceClassification."""
        self.model = model.eval().requires_grad_(False)
        # Whatever precision this device has it in.
        self.fingerprint = digest_of_weights(model.named_parameters(), rounded_to=torch.bfloat16)
        self.call: Callable[..., Tensor] = _plainly
        self.tokenizer = tokenizer
        self.index = label_index(model.config, label)
        self.output = output
        self.text = text
        self.chat_template = chat_template
        self.batch_size = batch_size
        self.max_length = max_length or longest_text(model, tokenizer)
        _refuse_unsteady(model, max_length)
        _refuse_positions(model, max_length)
        _refuse_foreign_tokenizer(model, tokenizer)
        if chat_template == "always" and not tokenizer.chat_template:
            raise RewardError(
                "reward.chat_template=always: the reward model's tokenizer has no chat template."
            )
        self.pad_token_id = _pad_token_id(model, tokenizer)
        self._trunk = Trunk(model) if _is_decoder(model) else None
        if text == "pair":
            _refuse_joining(tokenizer)
            tokenizer.truncation_side = "left"
        self.append_eos = _appends_eos(model, tokenizer, append_eos)
        self._eos_in_chats = append_eos == "always"
        read = self._trunk is not None and append_eos != "always"
        self._unread = model.config.get_text_config().pad_token_id if read else None
        self._pads_left = self._trunk is None and batch_size > 1 and self._wants_padding_left()

    @torch.no_grad()
    def __call__(self, /, prompts: list[Any], completions: list[str], **columns: Any) -> Tensor:
        """The scores, shape (batch,), on the CPU."""
        texts = [self._read(p, c) for p, c in zip(prompts, completions, strict=True)]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i].ids), reverse=True)
        scores = torch.empty(len(texts))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            scores[rows] = self.call(self._forward, [texts[i] for i in rows])
        return scores

    def check_prompts(self, prompts: Sequence[Any]) -> None:
        """Nothing, where the chat template takes prompts like these, one of each order of roles.

        Raises:
            RewardError: it refuses one.
        """
        chats = [prompt for prompt in prompts if self._as_chat(prompt)]
        orders = {tuple(m.get("role") for m in as_chat(prompt, "")): prompt for prompt in chats}
        for prompt in orders.values():
            self._chat_text(prompt, "a")

    def _read(self, prompt: Any, completion: str) -> Read:
        """What stands for one sample."""
        if self.text == "pair":
            return self._pair(as_text(prompt), completion)
        return Read(self._encode(prompt, completion))

    def _pair(self, first: str, second: str) -> Read:
        """Two texts as the tokenizer joins them. If they are too long the first loses its
        beginning, or, where the second alone leaves it no room, the longer of the two does.
        """
        read = self.tokenizer(first, second, verbose=False)
        if self.max_length and len(read["input_ids"]) > self.max_length:
            alone = len(self.tokenizer("", second, verbose=False)["input_ids"])
            which = "only_first" if alone < self.max_length else "longest_first"
            read = self.tokenizer(first, second, truncation=which, max_length=self.max_length)
        return Read(read["input_ids"], read.get("token_type_ids", ()))

    def _encode(self, prompt: Any, completion: str) -> list[int]:
        """The token ids that stand for one sample as one text."""
        chat = self._as_chat(prompt)
        text = self._chat_text(prompt, completion) if chat else self._plain_text(prompt, completion)
        ids = self.tokenizer(text, add_special_tokens=not chat, verbose=False)["input_ids"]
        eos = self.tokenizer.eos_token_id
        ends = self._eos_in_chats if chat else self.append_eos
        ids = [*ids, eos] if ends and (len(ids) < 2 or ids[-1] != eos) else ids
        while len(ids) > 1 and ids[-1] == self._unread:
            ids = ids[:-1]
        return self._shortened(ids, keep_first=not chat) or [self.pad_token_id]

    def _as_chat(self, prompt: Any) -> bool:
        """Whether a sample goes through the chat template."""
        has_template = bool(self.tokenizer.chat_template)
        auto = self.chat_template == "auto" and has_template and is_chat(prompt)
        return self.chat_template == "always" or auto

    def _chat_text(self, prompt: Any, completion: str) -> str:
        """What is read of a sample through the chat template."""
        messages = as_chat(prompt, completion)
        if self.text == "completion":
            messages = messages[-1:]
        try:
            return templated(self.tokenizer, messages)
        except (TemplateError, TypeError, ValueError) as error:
            raise RewardError(
                f"reward.path: the reward model's chat template refuses {str(messages)[:60]!r}: "
                f"{brief(error)}; reward.chat_template=never reads plain text"
            ) from error

    def _plain_text(self, prompt: Any, completion: str) -> str:
        """What is read of a sample without a chat template."""
        return completion if self.text == "completion" else joined(prompt, completion)

    def _shortened(self, ids: list[int], *, keep_first: bool) -> list[int]:
        """At most `max_length` ids, cut at the beginning after an opening special token."""
        if not self.max_length or len(ids) <= self.max_length:
            return ids
        special = keep_first and ids[0] in self.tokenizer.all_special_ids and self.max_length > 1
        return ids[:1] + ids[1 - self.max_length :] if special else ids[-self.max_length :]

    def _forward(self, texts: list[Read]) -> Tensor:
        """The scores of texts that fit into one pass."""
        logits = (self._whole(texts) if self._trunk is None else self._last(texts)).float()
        if self.output == "logit":
            return logits[:, self.index].cpu()
        # Several labels that may hold at once were each trained as a question of its own.
        kind = getattr(self.model.config, "problem_type", None)
        of_its_own = logits.shape[1] == 1 or kind == "multi_label_classification"
        logprobs = torch.nn.functional.logsigmoid(logits) if of_its_own else logits.log_softmax(-1)
        chosen = logprobs[:, self.index].cpu()
        return chosen if self.output == "log_probability" else chosen.exp()

    def _last(self, texts: list[Read]) -> Tensor:
        """A decoder's logits: its head on the last token of each text.

        Texts are left-padded, so that they end in the last column and nothing depends on what pads;
        of the last layer that column alone is computed.
        """
        assert self._trunk is not None
        ids = [text.ids for text in texts]
        width, pad = max(map(len, ids)), self.pad_token_id
        rows = torch.tensor([[pad] * (width - len(row)) + row for row in ids])
        real = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in ids])
        device, head = self.model.device, self.model.score
        hidden = self._trunk.hidden(rows.to(device), real.to(device), last=1)[:, -1]
        return head(hidden.to(head.weight.dtype))

    def _whole(self, texts: list[Read], *, left: bool | None = None) -> Tensor:
        """An encoder's logits, its texts padded on the side that moves none."""
        left = self._pads_left if left is None else left
        width = max(len(text.ids) for text in texts)

        def padded(rows: list[Sequence[int]], pad: int) -> Tensor:
            holes = [[pad] * (width - len(row)) for row in rows]
            pairs = zip(rows, holes, strict=True)
            full = [[*hole, *row] if left else [*row, *hole] for row, hole in pairs]
            return torch.tensor(full, device=self.model.device)

        inputs = {
            "input_ids": padded([text.ids for text in texts], self.pad_token_id),
            "attention_mask": padded([[1] * len(text.ids) for text in texts], 0),
        }
        if texts[0].kinds:
            inputs["token_type_ids"] = padded([text.kinds for text in texts], 0)
        return self.model(**inputs).logits

    @torch.no_grad()
    def _wants_padding_left(self) -> bool:
        """Whether an encoder's texts keep their scores beside longer ones when they are padded on
        the left, and not on the right. XLNet's do.

        Raises:
            RewardError: they do on neither side.
        """
        short, long = self._read("", "a"), self._read("", "a b c d e f g h")
        alone = self._whole([short], left=False).float()
        exact = self.model.dtype == torch.float32
        allowed = 1e-3 * alone.abs().max() if exact else 5e-2 * (1.0 + alone.abs().max())
        for left in (False, True):
            beside = self._whole([short, long], left=left)[:1].float()
            if (beside - alone).abs().max() <= allowed:
                return left
        raise RewardError(
            f"reward.path: {type(self.model).__name__} scores a text otherwise when it is padded, "
            "whatever the attention mask says; reward.batch_size=1 reads texts one by one"
        )


def _plainly(function: Callable[..., Tensor], *args: Any) -> Tensor:
    return function(*args)


def label_index(config: Any, label: str, *, key: str = "reward.label") -> int:
    """The column of the logits that `label` stands for.

    It is a name or a number; empty stands for the only one. A name that looks like a number goes
    before the number, as of labels -1, 0 and 1. `key` names it in errors.

    Raises:
        RewardError: there are several and none is named, or there is no such label.
    """
    names = {int(index): str(name) for index, name in config.id2label.items()}
    listed = ", ".join(f"{index} ({name})" for index, name in sorted(names.items()))
    if not label:
        if len(names) == 1:
            return 0
        raise RewardError(f"{key}: the reward model has several outputs; name one of {listed}.")
    for called in (names, {index: str(index) for index in names}):
        for index, name in called.items():
            if label.lower() == name.lower():
                return index
    raise RewardError(f"{key}={label}: the reward model has no such output; it has {listed}.")


def longest_text(model: Any, tokenizer: Any) -> int:
    """The longest text that model and tokenizer take, tokens; 0 where neither states a limit."""
    limits = [_positions(model), tokenizer.model_max_length, steady_context(model.config) or 0]
    return min((limit for limit in limits if 0 < limit < 10**9), default=0)


def _positions(model: Any) -> int:
    """How many positions the configuration speaks of; 0 where of none."""
    config = model.config.get_text_config()
    # RoBERTa's kin count positions from padding_idx + 1 within the same table
    skipped = getattr(getattr(model.base_model, "embeddings", None), "padding_idx", None)
    positions = next((bound for name in POSITIONS if (bound := getattr(config, name, None))), 0)
    return max(positions - (0 if skipped is None else skipped + 1), 0)


def _is_decoder(model: Any) -> bool:
    """Whether a linear head reads the last token; transformers calls those heads alone `score`."""
    return isinstance(getattr(model, "score", None), torch.nn.Linear)


def _appends_eos(model: Any, tokenizer: Any, choice: str) -> bool:
    """Whether plain texts are ended with EOS."""
    if tokenizer.eos_token_id is None:
        if choice == "always":
            raise RewardError(
                "reward.append_eos=always: the reward model's tokenizer has no EOS token."
            )
        return False
    if choice != "auto":
        return choice == "always"
    return _is_decoder(model) and not _closes_texts(tokenizer)


def _closes_texts(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts a special token behind a text.

    A special token may also be the text: that of the unknown, where there are no small letters.
    """
    text = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    closed = bool(whole) and whole[-len(text) :] != text
    return closed and whole[-1] in tokenizer.all_special_ids


def _pad_token_id(model: Any, tokenizer: Any) -> int:
    """The id that fills short rows: the model's own if it has one; old Llama configurations say -1
    for none.
    """
    own = model.config.get_text_config().pad_token_id
    known = (own, tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((i for i in known if i is not None and i >= 0), 0)


def _refuse_unsteady(model: Any, max_length: int) -> None:
    """Texts over which a score would depend on what stands beside."""
    steady = steady_context(model.config)
    if steady and max_length > steady:
        raise RewardError(
            f"reward.max_length={max_length}: the reward model's rotary embedding turns texts of a "
            f"batch alike up to {steady} tokens alone; use at most {steady}."
        )


def _refuse_positions(model: Any, max_length: int) -> None:
    """Texts for which the reward model has no positions."""
    longest = _positions(model)
    learned = any(
        isinstance(module, torch.nn.Embedding) and name.rpartition(".")[2] in LEARNED_POSITIONS
        for name, module in model.named_modules()
    )
    bounded = learned or hasattr(model.config, "max_seq_len")  # to which MPT builds its ALiBi
    if bounded and longest and max_length > longest:
        raise RewardError(
            f"reward.max_length={max_length}: the reward model has positions for {longest} tokens; "
            f"use at most {longest}, or 0."
        )


def _refuse_joining(tokenizer: Any) -> None:
    """A tokenizer that would write two texts as one."""
    one, two = (tokenizer.num_special_tokens_to_add(pair=pair) for pair in (False, True))
    if two <= one:
        raise RewardError(
            "reward.text=pair: the reward model's tokenizer puts nothing between two texts, so its "
            "model reads one; use reward.text=prompt_and_completion."
        )


def _refuse_foreign_tokenizer(model: Any, tokenizer: Any) -> None:
    """A tokenizer whose ids reach beyond the model's embedding belongs to another model."""
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise RewardError(
            f"reward.tokenizer: the tokenizer has {len(tokenizer)} tokens, the reward model "
            f"{rows}; they do not belong together."
        )
