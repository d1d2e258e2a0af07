"""How the families of transformers' decoders are built, read off their modules.

An architecture that is not read here, or an unusual variant of one that is, goes transformers' way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ppo_lab.models.fast.elementwise import ACTIVATIONS
from ppo_lab.models.fast.layers import Anatomy, Layer
from ppo_lab.models.fast.products import is_plain

# Kinds of rotary embedding whose angles depend on a token's own position alone.
ROTARY = ("default", "linear", "llama3", "yarn")


def read(decoder: Any) -> Anatomy | None:
    """The anatomy of a decoder; None where it has parts that are not understood, or is another's of
    the same name, as code that comes with a model may be.
    """
    is_known = type(decoder).__module__.startswith("transformers.models.")
    reader = READERS.get(type(decoder).__name__) if is_known else None
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


def _opt(decoder: Any) -> Anatomy | None:
    """OPT, whose learned positions begin at the third. Source: Zhang et al. 2022, arXiv:2205.01068.

    Of its sizes one (350m) has its norms elsewhere, and is not read.
    """
    config = decoder.config
    if decoder.project_in is not None or decoder.final_layer_norm is None:
        return None
    if not config.layer_norm_elementwise_affine:
        return None

    def layer(block: Any) -> Layer:
        attention = block.self_attn
        return Layer(
            norm=block.self_attn_layer_norm,
            projections=(attention.q_proj, attention.k_proj, attention.v_proj),
            out=attention.out_proj,
            second_norm=block.final_layer_norm,
            gate=None,
            up=block.fc1,
            down=block.fc2,
            activation=config.activation_function,
            heads=attention.num_heads,
            kv_heads=attention.num_heads,
            size=attention.head_dim,
            scaling=attention.scaling,
        )

    return Anatomy(
        blocks=tuple(decoder.layers),
        layers=tuple(layer(block) for block in decoder.layers),
        norm=decoder.final_layer_norm,
        words=decoder.embed_tokens,
        learned=decoder.embed_positions,
        first_position=decoder.embed_positions.offset,
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
            turned_by=0,
        )

    if not _turns_plainly(decoder):
        return None
    return Anatomy(
        blocks=tuple(decoder.layers),
        layers=tuple(layer(block) for block in decoder.layers),
        norm=decoder.final_layer_norm,
        words=decoder.embed_in,
        rotary=(decoder.rotary_emb,),
    )


def _llama(decoder: Any) -> Anatomy | None:
    """Llama and those built like it: Gemma; Qwen3 with a norm of each head (Yang et al. 2025,
    arXiv:2505.09388); SmolLM3 with layers that turn nothing; Phi-3 with fewer, wider products;
    OLMo 2 and 3 with norms of what the parts give alone (Walsh et al. 2025, arXiv:2501.00656);
    Gemma 3 with both, and angles of its own for layers with a window (arXiv:2503.19786).

    Source: Touvron et al. 2023, arXiv:2302.13971.
    """
    config, kinds = decoder.config, _rotary_kinds(decoder)
    window = _window(config)
    if window is None or getattr(config, "use_bidirectional_attention", None):
        return None
    if not _turns_plainly(decoder):
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
        # What stands after attention is the second norm where there is no other.
        sandwiched = hasattr(block, "post_feedforward_layernorm")
        after = block.post_attention_layernorm
        return Layer(
            norm=getattr(block, "input_layernorm", None),
            projections=projections,
            out=attention.o_proj,
            second_norm=getattr(block, "pre_feedforward_layernorm", None) if sandwiched else after,
            gate=gate,
            up=up,
            gate_in_up=fused,
            down=mlp.down_proj,
            activation=getattr(config, "hidden_activation", None) or config.hidden_act,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            size=attention.head_dim,
            scaling=attention.scaling,
            head_norms=(attention.q_norm, attention.k_norm) if with_norms else None,
            after_attention=after if sandwiched else None,
            after_feed_forward=block.post_feedforward_layernorm if sandwiched else None,
            turned_by=_turned_by(attention, kinds),
        )

    return Anatomy(
        blocks=tuple(decoder.layers),
        layers=tuple(layer(block) for block in decoder.layers),
        norm=decoder.norm,
        words=decoder.embed_tokens,
        rotary=tuple(
            partial(decoder.rotary_emb, layer_type=kind) if kind else decoder.rotary_emb
            for kind in kinds
        ),
        window=window,
    )


READERS: dict[str, Callable[[Any], Anatomy | None]] = {
    "BloomModel": _bloom,
    "GemmaModel": _llama,
    "Gemma3TextModel": _llama,
    "GPT2Model": _gpt2,
    "GPTNeoXModel": _gpt_neox,
    "LlamaModel": _llama,
    "MistralModel": _llama,
    "OPTDecoder": _opt,
    "Olmo2Model": _llama,
    "Olmo3Model": _llama,
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
    types = getattr(decoder.rotary_emb, "rope_type", None)
    return set(types.values() if isinstance(types, dict) else [types]) <= set(ROTARY)


def _rotary_kinds(decoder: Any) -> Sequence[str]:
    """The kinds of layers that have angles of their own; one without a name if all share them."""
    types = getattr(decoder.rotary_emb, "rope_type", None)
    return sorted(types) if isinstance(types, dict) else [""]


def _turned_by(attention: Any, kinds: Sequence[str]) -> int | None:
    """Which kind's angles turn the queries and keys of an attention."""
    if not getattr(attention, "use_rope", True):
        return None
    if len(kinds) == 1:
        return 0
    return kinds.index(getattr(attention, "layer_type", None) or attention.attention_type)


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
