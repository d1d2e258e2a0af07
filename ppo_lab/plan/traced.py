"""What passes hold on a device that is not here: a miniature traced on the meta device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig

from ppo_lab.config import Config, ModelSection
from ppo_lab.models import logprobs
from ppo_lab.models.fast.decoder import KERNELS, FastDecoder
from ppo_lab.models.fast.families import read
from ppo_lab.models.fast.graphed import Standing
from ppo_lab.models.fast.layers import Anatomy
from ppo_lab.models.fast.sweep import GPU_TILE, GPU_TOKENS
from ppo_lab.models.policy import enable_checkpointing
from ppo_lab.models.trunk import Trunk
from ppo_lab.plan.architecture import blueprint
from ppo_lab.plan.heads import HeadShape
from ppo_lab.plan.rehearsal import ByDepth, Held
from ppo_lab.plan.trace import tracked
from ppo_lab.plan.workload import Row

# Rows of the vocabulary that TRL's kernel takes at a time on a GPU.
CHUNK = 32768


@dataclass(frozen=True)
class Traced:
    """What a pass holds, and how many operations it launches forward and backward, by depth; and
    those of a token's pass that can be recorded, none where the layers are not known one by one or
    never passed so.
    """

    held: Held
    forward: ByDepth
    backward: ByDepth
    token: ByDepth


class _Seen(NamedTuple):
    kept: int
    passing: int
    churned: int
    reading: int
    forward: int
    backward: int
    token: int


def traced(
    model: PreTrainedConfig,
    config: Config,
    *,
    dtype: torch.dtype,
    training: Sequence[Row],
    reading: Sequence[Row],
) -> Traced:
    """What the passes over these rows hold, by the layers that a GPU would take."""
    one, two = (
        _trace(
            blueprint(
                model,
                config.model,
                replace(config.lora, top_layers=0),
                dtype=dtype,
                layers=layers,
            ),
            training,
            reading,
            config=config,
        )
        for layers in (1, 2)
    )
    by_depth = [ByDepth.of(a, b) for a, b in zip(one, two, strict=True)]
    return Traced(Held(*by_depth[:4]), *by_depth[4:])


def published_head_bytes(head: HeadShape, tokens: int, *, gradients: bool) -> float:
    """The most that log-probs hold on a GPU: of a frozen head the products of a tile, and with
    gradients what they pull the states by; of one that is trained logits in float32, their softmax
    and its gradient, of many tokens those of a tile.
    """
    if not (head.trained and gradients):
        tile = min(tokens, GPU_TOKENS) * min(head.vocabulary, GPU_TILE) * head.dtype.itemsize
        return tile + 8.0 * tokens * head.hidden * gradients
    entries = min(tokens * head.vocabulary, max(logprobs.TILE, tokens * CHUNK))
    return entries * 12.0


def _trace(model: Any, training: Sequence[Row], reading: Sequence[Row], *, config: Config) -> _Seen:
    checkpointing = config.ppo.gradient_checkpointing
    if checkpointing:
        enable_checkpointing(model)
        if hasattr(model, "peft_config"):
            model.enable_input_require_grads()
    trunk = Trunk(model)
    widest = max(row.seen for row in (*training, *reading))
    known = _known(trunk.decoder, config.model, widest)
    fast = known and config.model.fast_layers and not checkpointing
    passed = FastDecoder(trunk.decoder, known).hidden if known and fast else trunk.hidden
    with torch.device("meta"), attention_of_a_gpu(), experts_of_a_gpu():
        model.train()
        tracker = tracked()
        with tracker as live:
            hidden = passed(*_rectangle(training))
            kept, churned, forward = live.now, live.made - live.now, live.launches
            hidden.backward(torch.ones_like(hidden))
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        peak = live.peak(without=tracker.names(gradients))
        model.eval()
        with torch.no_grad(), tracked() as passing:
            passed(*_rectangle(reading))
        token = _launches_of_a_token(known) if known else 0
    backward = live.launches - forward
    return _Seen(kept, max(0, peak - kept), churned, passing.peak(), forward, backward, token)


def _known(decoder: Any, section: ModelSection, widest: int) -> Anatomy | None:
    """The layers one by one, where they are known and may be passed so over that many tokens."""
    anatomy = read(decoder)
    usable = not section.load_in_4bit and section.attn_implementation in ("", *KERNELS)
    return anatomy if anatomy and usable and anatomy.covers(widest) else None


@contextmanager
def attention_of_a_gpu() -> Iterator[None]:
    """Attention by the kernel that a GPU takes where there is a mask, which keeps no scores.

    A function mode would not do: it is off where a checkpoint recomputes.
    """
    before = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _by_one_kernel
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


@contextmanager
def experts_of_a_gpu() -> Iterator[None]:
    """Experts by one grouped product, in every precision: torch's own on the meta device knows
    bfloat16 alone.
    """
    places = [(F, "grouped_mm"), (torch, "_grouped_mm")]
    before = [(place, name, getattr(place, name)) for place, name in places if hasattr(place, name)]
    for place, name, _ in before:
        setattr(place, name, _by_one_product)
    try:
        yield
    finally:
        for place, name, function in before:
            setattr(place, name, function)


def _by_one_product(rows: Tensor, experts: Tensor, offs: Tensor | None = None) -> Tensor:
    """As large a result as each row's product with its expert's matrix, which takes as much."""
    return rows @ experts[0]


def _by_one_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What `F.scaled_dot_product_attention` does on a GPU with its arguments."""
    if enable_gqa:
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(attn_mask, 0.0)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    keeps = torch.is_grad_enabled()
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, keeps, dropout_p, is_causal, scale=scale
    )[0]


class _OnAGpu(Standing):
    """A generation's buffers where one kernel attends to the newest queries and writes their keys
    and values into their places.
    """

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, blocks: Any, scaling: float
    ) -> Tensor:
        return torch.zeros_like(q).transpose(1, 2).flatten(2)


@torch.no_grad()
def _launches_of_a_token(anatomy: Anatomy) -> int:
    """Launches of a token's pass as it is recorded."""
    standing = _OnAGpu(anatomy, batch=1, width=8, positions=9)
    standing.states(standing.ids)  # reads the linear layers
    with tracked() as live:
        standing.states(standing.ids)
    return live.launches


def _rectangle(rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention of these rows, padded to the longest."""
    width = max(row.seen for row in rows)
    return (
        torch.zeros(len(rows), width, dtype=torch.long),
        torch.ones(len(rows), width, dtype=torch.bool),
    )
