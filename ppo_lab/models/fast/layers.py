"""The layers of a decoder as the fast road reads them: which modules, in which order, of what kind.

    x <- x + out(attention(norm(x)))        a = activation
    x <- x + down(a(up(norm(x))))           or, gated, down(a(gate(norm(x))) * up(norm(x)))

Nothing is copied: a layer here holds the model's own modules, so that it is always what they are.
An architecture that is not read here, or an unusual variant of one that is, goes transformers' way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ppo_lab.models.fast.elementwise import ACTIVATIONS
from ppo_lab.models.fast.products import is_plain

# Kinds of rotary embedding whose angles depend on a token's own position alone.
ROTARY = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Layer:
    """One layer: its modules, and what of its shape they do not say.

    `projections` are those of queries, keys and values, or one for all three, whose output is then
    ordered `by_head` (heads, three, size) or else one kind after the other. `gate` is None where
    the feed-forward part has none, and where `gate_in_up` it is the first half of what `up` gives.
    `size` is a head's width, `scaling` multiplies attention's scores.
    `parallel`: both parts read the layer's input. `after_norm`: the residual is the normed input
    (BLOOM's option). `head_norms` are those of each query and each key. `turns`: rotary embeddings,
    where there are some, turn them here.
    """

    norm: Any
    projections: tuple[Any, ...]
    out: Any
    second_norm: Any
    gate: Any
    up: Any
    down: Any
    activation: str
    heads: int
    kv_heads: int
    size: int
    scaling: float
    by_head: bool = False
    parallel: bool = False
    after_norm: bool = False
    gate_in_up: bool = False
    head_norms: tuple[Any, Any] | None = None
    turns: bool = True

    @property
    def linears(self) -> tuple[Any, ...]:
        """Every linear layer in it."""
        gate = () if self.gate is None else (self.gate,)
        return (*self.projections, self.out, *gate, self.up, self.down)

    def split(self, fused: Float[Tensor, "batch time outputs"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (batch, time, heads, size) out of one product for all three."""
        if self.by_head:
            q, k, v = fused.unflatten(2, (self.heads, 3, self.size)).unbind(3)
        else:
            counts = [self.heads, self.kv_heads, self.kv_heads]
            q, k, v = fused.unflatten(2, (-1, self.size)).split(counts, 2)
        return q, k, v


@dataclass(frozen=True)
class Anatomy:
    """A decoder: its embedding, its layers, its last norm, and where positions enter.

    `blocks` are the modules that the layers were read from. Positions are learned vectors, rotary
    angles that a module gives, or ALiBi's slopes of each head; None where they are not. Some layers
    may see the last `window` positions alone (0 = all see all); of more, nothing here knows.
    """

    blocks: tuple[Any, ...]
    layers: tuple[Layer, ...]
    words: Any
    norm: Any
    first_norm: Any = None
    learned: Any = None
    rotary: Any = None
    slopes: Float[Tensor, " heads"] | None = None
    window: int = 0

    def covers(self, positions: int) -> bool:
        """Whether every layer sees all of so many positions."""
        return not self.window or positions <= self.window

    @property
    def entrance(self) -> tuple[Any, ...]:
        """The modules before the first layer."""
        parts = (self.words, self.first_norm, self.learned)
        return tuple(part for part in parts if part is not None)

    def embed(
        self, ids: Int[Tensor, " rows"], positions: Int[Tensor, " rows"]
    ) -> Float[Tensor, "rows hidden"]:
        """What the first layer reads."""
        x = self.words(ids)
        x = x if self.learned is None else x + self.learned(positions)
        return x if self.first_norm is None else self.first_norm(x)


def read(decoder: Any) -> Anatomy | None:
    """The anatomy of a decoder; None where it has parts that are not understood."""
    reader = READERS.get(type(decoder).__name__)
    anatomy = reader(decoder) if reader else None
    if anatomy is None or not all(_is_understood(layer) for layer in anatomy.layers):
        return None
    return anatomy


def _is_understood(layer: Layer) -> bool:
    return layer.activation in ACTIVATIONS and all(is_plain(module) for module in layer.linears)


def _bloom(decoder: Any) -> Anatomy | None:
    """BLOOM. Source: Le Scao et al. 2022, arXiv:2211.05100."""
    config = decoder.config
    if config.slow_but_exact:
        return None

    def layer(block: Any) -> Layer:
        attention, mlp = block.self_attention, block.mlp
        return Layer(
            norm=block.input_layernorm,
            projections=(attention.query_key_value,),
            out=attention.dense,
            second_norm=block.post_attention_layernorm,
            gate=None,
            up=mlp.dense_h_to_4h,
            down=mlp.dense_4h_to_h,
            activation="gelu_new",
            heads=config.n_head,
            kv_heads=config.n_head,
            size=attention.head_dim,
            scaling=1.0 / math.sqrt(attention.head_dim),
            by_head=True,
            after_norm=config.apply_residual_connection_post_layernorm,
        )

    return Anatomy(
        blocks=tuple(decoder.h),
        layers=tuple(layer(block) for block in decoder.h),
        norm=decoder.ln_f,
        words=decoder.word_embeddings,
        first_norm=decoder.word_embeddings_layernorm,
        slopes=alibi_slopes(config.n_head),
    )


def _gpt2(decoder: Any) -> Anatomy | None:
    """GPT-2, with learned positions."""
    config = decoder.config
    if config.add_cross_attention:
        return None

    def layer(block: Any) -> Layer:
        return Layer(
            norm=block.ln_1,
            projections=(block.attn.c_attn,),
            out=block.attn.c_proj,
            second_norm=block.ln_2,
            gate=None,
            up=block.mlp.c_fc,
            down=block.mlp.c_proj,
            activation=config.activation_function,
            heads=block.attn.num_heads,
            kv_heads=block.attn.num_heads,
            size=block.attn.head_dim,
            scaling=block.attn.scaling,
        )

    return Anatomy(
        blocks=tuple(decoder.h),
        layers=tuple(layer(block) for block in decoder.h),
        norm=decoder.ln_f,
        words=decoder.wte,
        learned=decoder.wpe,
    )


def _gpt_neox(decoder: Any) -> Anatomy | None:
    """GPT-NeoX (Pythia). Source: Black et al. 2022, arXiv:2204.06745."""
    config = decoder.config

    def layer(block: Any) -> Layer:
        return Layer(
            norm=block.input_layernorm,
            projections=(block.attention.query_key_value,),
            out=block.attention.dense,
            second_norm=block.post_attention_layernorm,
            gate=None,
            up=block.mlp.dense_h_to_4h,
            down=block.mlp.dense_4h_to_h,
            activation=config.hidden_act,
            heads=config.num_attention_heads,
            kv_heads=config.num_attention_heads,
            size=block.attention.head_size,
            scaling=block.attention.scaling,
            by_head=True,
            parallel=block.use_parallel_residual,
        )

    if not _turns_plainly(decoder):
        return None
    return Anatomy(
        blocks=tuple(decoder.layers),
        layers=tuple(layer(block) for block in decoder.layers),
        norm=decoder.final_layer_norm,
        words=decoder.embed_in,
        rotary=decoder.rotary_emb,
    )


def _llama(decoder: Any) -> Anatomy | None:
    """Llama and those built like it: Qwen3 with a norm of each head (Yang et al. 2025,
    arXiv:2505.09388), SmolLM3 with layers that turn nothing, Phi-3 with fewer, wider products.

    Source: Touvron et al. 2023, arXiv:2302.13971.
    """
    config = decoder.config
    window = _window(config)
    if window is None or not _turns_plainly(decoder):
        return None

    def layer(block: Any) -> Layer:
        attention, mlp = block.self_attn, block.mlp
        with_norms, fused = hasattr(attention, "q_norm"), hasattr(attention, "qkv_proj")
        projections: tuple[Any, ...]
        if fused:
            projections, gate, up = (attention.qkv_proj,), None, mlp.gate_up_proj
        else:
            projections = attention.q_proj, attention.k_proj, attention.v_proj
            gate, up = mlp.gate_proj, mlp.up_proj
        return Layer(
            norm=block.input_layernorm,
            projections=projections,
            out=attention.o_proj,
            second_norm=block.post_attention_layernorm,
            gate=gate,
            up=up,
            gate_in_up=fused,
            down=mlp.down_proj,
            activation=config.hidden_act,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            size=attention.head_dim,
            scaling=attention.scaling,
            head_norms=(attention.q_norm, attention.k_norm) if with_norms else None,
            turns=bool(getattr(attention, "use_rope", True)),
        )

    return Anatomy(
        blocks=tuple(decoder.layers),
        layers=tuple(layer(block) for block in decoder.layers),
        norm=decoder.norm,
        words=decoder.embed_tokens,
        rotary=decoder.rotary_emb,
        window=window,
    )


READERS: dict[str, Callable[[Any], Anatomy | None]] = {
    "BloomModel": _bloom,
    "GPT2Model": _gpt2,
    "GPTNeoXModel": _gpt_neox,
    "LlamaModel": _llama,
    "MistralModel": _llama,
    "Phi3Model": _llama,
    "Qwen2Model": _llama,
    "Qwen3Model": _llama,
    "SmolLM3Model": _llama,
}


def alibi_slopes(heads: int) -> Float[Tensor, " heads"]:
    """2^(-8 i / n), n the power of two below `heads`; then every other one of 2 n.

    Source: Press et al. 2022, arXiv:2108.12409.
    """
    n = 2 ** math.floor(math.log2(heads))
    powers = [2.0 ** (-8.0 * i / n) for i in range(1, n + 1)]
    powers += [2.0 ** (-4.0 * i / n) for i in range(1, 2 * (heads - n) + 1, 2)]
    return torch.tensor(powers)


def _turns_plainly(decoder: Any) -> bool:
    return getattr(decoder.rotary_emb, "rope_type", None) in ROTARY


def _window(config: Any) -> int | None:
    """How far back layers see at least, in positions, 0 where all see all; None where some layer is
    of another kind.
    """
    width = getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return width
    if set(kinds) - {"full_attention", "sliding_attention"}:
        return None
    return width if "sliding_attention" in kinds else 0
