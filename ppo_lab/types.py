"""The records that travel between the rooms of a PPO iteration: frozen, shapes annotated.

Conventions, everywhere: queries are left-padded, responses right-padded, so that column j of every
    (batch, time)
tensor is response token j. `mask` is True on the real response tokens, the first end-of-sequence
token included. Masks come from lengths, never from comparing ids with the pad token (which may be
the end-of-sequence token).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Where a tensor among others may begin, in bytes: kernels read so many at a time.
ALIGNMENT = 16


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts before any padding.

    `ids` are token ids without padding; `texts` is what a reward is shown; `columns` holds every
    other column of the data set, one value a prompt, and reaches the reward under its own name;
    `indices` are the prompts' places in their data set; `prefills`, where there are any, what the
    ids hold of each answer already: a reward is shown it as the beginning of the response.
    """

    ids: list[list[int]]
    texts: list[Any]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    indices: list[int] = field(default_factory=list)
    prefills: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | Sequence[int]) -> Prompts:
        """These rows, in this order."""
        picked = range(len(self))[rows] if isinstance(rows, slice) else rows
        return Prompts(
            ids=[self.ids[i] for i in picked],
            texts=[self.texts[i] for i in picked] if self.texts else [],
            columns={name: [column[i] for i in picked] for name, column in self.columns.items()},
            indices=[self.indices[i] for i in picked] if self.indices else [],
            prefills=[self.prefills[i] for i in picked] if self.prefills else [],
        )


class _Rows:
    """A record of tensors that share their first dimension, the batch."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))  # type: ignore[arg-type]

    def __getitem__(self, rows: Tensor | slice | list[int]) -> Self:
        """These samples of every tensor; nested records and absent (None) tensors included."""
        if not isinstance(rows, Tensor):
            return self.each(lambda value: value[rows])
        here = functools.cache(functools.partial(brought, rows))  # to each device once
        return self.each(lambda x: x[here(x.device)])

    def to(self, device: torch.device | str) -> Self:
        """The same record on another device."""
        return self.each(lambda value: value.to(device))

    def on_host(self) -> Self:
        """The record in the host's memory: what is elsewhere is waited for once."""
        return with_tensors(self, on_host(tensors_of(self)))

    def brought(self, device: torch.device) -> Self:
        """The record on a device, where what is on the host goes in one transfer."""
        return with_tensors(self, brought_together(tensors_of(self), device))

    def each(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The record with every tensor, nested records' included, as the function makes it."""
        return self.each_by_name(lambda _, value: function(value))

    def each_by_name(self, function: Callable[[str, Tensor], Tensor]) -> Self:
        """The same, where the function is told the tensor's name too."""
        changed = {
            f.name: value.each_by_name(function)
            if isinstance(value, _Rows)
            else function(f.name, value)
            for f in fields(self)  # type: ignore[arg-type]
            if (value := getattr(self, f.name)) is not None
        }
        return replace(self, **changed)  # type: ignore[type-var]

    def padded(self, query: int, time: int) -> Self:
        """The record with queries of `query` columns, padded with zeros on the left, and everything
        else of `time` columns, padded on the right.
        """
        return self.each_by_name(
            lambda name, x: x if x.dim() < 2 else _padded(name, x, query, time)
        )

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """The samples of all parts, in their order, made equally wide: queries are padded on the
        left, everything else on the right, with zeros.
        """
        columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(cls)}  # type: ignore[arg-type]
        return cls(**{name: _joined(name, column) for name, column in columns.items()})


def brought(x: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device. To a GPU it goes from memory that the host will not write over, when
    the GPU has done what it was told before.
    """
    if x.device.type == "cpu" and torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of tensors on one device one after the other, which one transfer takes.

    In units of eight bytes: a host would spread a copy of as many numbers as there are bytes over
    its threads, which then wait for the next at full speed.
    """
    gap = torch.zeros(ALIGNMENT, dtype=torch.uint8, device=tensors[0].device)
    parts = []
    for x in tensors:
        parts += [x.reshape(-1).view(torch.uint8), gap[: -x.nbytes % ALIGNMENT]]
    return torch.cat(parts).view(torch.int64)


def unpacked(together: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in their bytes, given some of the same shapes and types; no number is moved."""
    found, start, together = [], 0, together.view(torch.uint8)
    for x in like:
        found.append(together[start : start + x.nbytes].view(x.dtype).view(x.shape))
        start += x.nbytes + -x.nbytes % ALIGNMENT
    return found


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in the host's memory; those that are elsewhere are waited for once."""
    elsewhere = [x for x in tensors if x.device.type != "cpu"]
    arrived = iter(unpacked(packed(elsewhere).cpu(), elsewhere) if elsewhere else ())
    return [x if x.device.type == "cpu" else next(arrived) for x in tensors]


def brought_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors on a device; those that are on the host go there in one transfer."""
    here = [x for x in tensors if x.device.type == "cpu"]
    arrived = iter(unpacked(brought(packed(here), device), here) if here else ())
    return [next(arrived) if x.device.type == "cpu" else x for x in tensors]


def tensors_of(record: Any) -> list[Tensor]:
    """The tensors of a record, nested ones' included, in their order; of a tensor, itself."""
    if isinstance(record, Tensor):
        return [record]
    found: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        found.append(x)
        return x

    record.each(note)
    return found


def with_tensors(record: Any, tensors: Sequence[Tensor]) -> Any:
    """The record with these tensors in place of its own."""
    if isinstance(record, Tensor):
        return tensors[0]
    following: Iterator[Tensor] = iter(tensors)
    return record.each(lambda _: next(following))


def _joined(name: str, parts: Sequence[Any]) -> Any:
    """One tensor, or one record, out of those of all parts; None where it is absent."""
    if parts[0] is None:
        return None
    if not isinstance(parts[0], Tensor):
        return type(parts[0]).join(parts)
    if parts[0].dim() < 2:
        return torch.cat(list(parts))
    width = max(part.shape[1] for part in parts)
    return torch.cat([_padded(name, part, width, width) for part in parts])


def _padded(name: str, x: Tensor, query: int, time: int) -> Tensor:
    """(batch, columns) with so many columns, in a query and elsewhere."""
    on_left = name in ("queries", "query_mask")
    missing = (query if on_left else time) - x.shape[1]
    if not missing:
        return x
    return torch.nn.functional.pad(x, (missing, 0) if on_left else (0, missing))


def _packed(
    rows: Sequence[Sequence[Any]], fill: Any, *, dtype: Any = np.int64, on_left: bool = False
) -> tuple[Tensor, Bool[Tensor, "batch columns"]]:
    """Lists as one rectangle, filled up on a side; and where it holds what was in them."""
    lengths = np.array([len(row) for row in rows])
    columns = np.arange(lengths.max())
    held = columns < lengths[:, None]
    if on_left:
        held = held[:, ::-1].copy()
    rectangle = np.full(held.shape, fill, dtype)
    rectangle[held] = np.fromiter(itertools.chain.from_iterable(rows), dtype, lengths.sum())
    return torch.from_numpy(rectangle), torch.from_numpy(held)


@dataclass(frozen=True)
class Tokens(_Rows):
    """Prompts and responses as rectangles of token ids.

    `queries` is left-padded with `query_mask` True on real tokens. `responses` is right-padded;
    `lengths` counts its tokens, and `mask` is True on those that are trained: all of them, unless
    some (the words of a tool, say) were masked out, which stay context. `ended` is True where a
    stop condition was generated, False where the length limit cut the response. `below`, where it
    is kept, holds the hidden states that enter the policy's first adapted layer, of every token but
    the last: frozen layers make them, so that they stay the same while the policy learns.
    `host`, where it is given, is this record, but for `below`, in the host's memory, so that a
    device need not be asked for what is in it. `kept`, where it is given, are the places of
    `responses`, in reading order, that are looked at: those where `mask` is True, and perhaps some
    more; such a record is of whole samples, and is not cut into fewer. Without `host` no column of
    it is left out.
    """

    queries: Int[Tensor, "batch query"]
    query_mask: Bool[Tensor, "batch query"]
    responses: Int[Tensor, "batch time"]
    mask: Bool[Tensor, "batch time"]
    lengths: Int[Tensor, " batch"]
    ended: Bool[Tensor, " batch"]
    below: Float[Tensor, "batch seen hidden"] | None = None
    host: Tokens | None = None
    kept: Int[Tensor, " kept"] | None = None

    @classmethod
    def pack(
        cls,
        queries: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        *,
        pad_id: int,
        masks: Sequence[Sequence[bool]] | None = None,
        ended: Sequence[bool] | None = None,
    ) -> Tokens:
        """Lists of token ids, one a sample, as rectangles; `masks` are all True unless given."""
        ids, real = _packed(queries, pad_id, on_left=True)
        answers, given = _packed(responses, pad_id)
        return cls(
            queries=ids,
            query_mask=real,
            responses=answers,
            mask=given if masks is None else _packed(masks, False, dtype=np.bool_)[0],
            lengths=given.sum(1),
            ended=torch.tensor([True] * len(responses) if ended is None else list(ended)),
        )

    @property
    def attended(self) -> Bool[Tensor, "batch time"]:
        """True on every response token that later ones see: the trained ones and those masked
        out.
        """
        columns = torch.arange(self.responses.shape[1], device=self.lengths.device)
        return columns < self.lengths[:, None]

    def heard(self) -> Tokens:
        """The record with `host`, for which the device is asked now unless it has been."""
        if self.host is not None:
            return self
        return replace(self, host=replace(self, below=None).on_host())

    def response_lists(self) -> list[list[int]]:
        """The responses' token ids without padding."""
        known = self if self.host is None else self.host
        rows = zip(known.responses.tolist(), known.lengths.tolist(), strict=True)
        return [row[:n] for row, n in rows]


@dataclass(frozen=True)
class Rollout(_Rows):
    """What one pass over freshly sampled responses records; nothing in it carries a gradient.

    `logprobs` and `ref_logprobs` are those of the sampled tokens at the sampling temperature, under
    the policy and under the reference; `values` is the critic's word on the state that predicts
    each token. `full_kl` is the exact KL over the vocabulary, in nats per token, computed for
    `kl_penalty=full` alone. Padding holds zeros.
    """

    tokens: Tokens
    logprobs: Float[Tensor, "batch time"]
    values: Float[Tensor, "batch time"]
    ref_logprobs: Float[Tensor, "batch time"]
    entropy: Float[Tensor, "batch time"] | None = None
    full_kl: Float[Tensor, "batch time"] | None = None

    def heard(self) -> Rollout:
        """The record in the host's memory, for which a device is asked, and waited for, once; what
        is large, `tokens.below`, stays where it is.
        """
        tokens = self.tokens if self.tokens.host is None else self.tokens.host
        known = replace(self, tokens=replace(tokens, below=None)).on_host()
        return replace(known, tokens=replace(known.tokens, below=self.tokens.below))


@dataclass(frozen=True)
class Scores:
    """What the reward says of a batch of responses: one number a sample, and the named parts it is
    made of.

    `total` has the reward's weight in it; `parts` are the raw scores of each part before weights.
    """

    total: Float[Tensor, " batch"]
    parts: dict[str, Float[Tensor, " batch"]] = field(default_factory=dict)

    def on_host(self) -> Scores:
        """The same scores in the host's memory."""
        return Scores(self.total.cpu(), {name: part.cpu() for name, part in self.parts.items()})


@dataclass(frozen=True)
class Batch(_Rows):
    """A rollout made ready for the clipped updates: targets fixed, nothing carries a gradient."""

    tokens: Tokens
    logprobs: Float[Tensor, "batch time"]
    values: Float[Tensor, "batch time"]
    advantages: Float[Tensor, "batch time"]
    returns: Float[Tensor, "batch time"]

    def blank(self) -> Batch:
        """The first sample with every token masked out: it costs a pass and teaches nothing."""
        first = self[:1]
        tokens = replace(first.tokens, mask=torch.zeros_like(first.tokens.mask), host=None)
        return replace(first, tokens=tokens)


@dataclass(frozen=True)
class Forward(_Rows):
    """What one forward of the policy gives for response tokens: padding holds zeros.

    `entropy` is that of the whole next-token distribution at the sampling temperature, in nats,
    when asked for.
    """

    logprobs: Float[Tensor, "batch time"]
    values: Float[Tensor, "batch time"]
    entropy: Float[Tensor, "batch time"] | None = None


@dataclass(frozen=True)
class Sample:
    """One prompt with its response as people read it, for samples.jsonl, tables and the summary."""

    prompt: str
    response: str
    score: float
    reference_response: str | None = None
    reference_score: float | None = None
    gold: float | None = None
    reference_gold: float | None = None
