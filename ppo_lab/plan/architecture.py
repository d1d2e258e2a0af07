"""What of a policy costs work and memory, read off its modules: real ones, or ones on the meta
device, which take no memory.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)
from transformers.pytorch_utils import Conv1D

from ppo_lab.config import LoraSection, ModelSection
from ppo_lab.models.loading import disable_dropout
from ppo_lab.models.lora import wrap_lora


@dataclass(frozen=True)
class Architecture:
    """Sizes of a policy, in numbers (weights, or values of one position), not in bytes.

    `matrices` are the weights that a token is multiplied with in all layers together, of a mixture
    those of as many experts as a token is given to (`in_experts`); `adapter` those of LoRA beside
    them, `head` those of the output head. `queries` is the width of the queries of all layers that
    attend together (the mean of it and of the values' where these differ), `cached` that of their
    keys and values. `trained` counts every weight with a gradient, `trained_matrices` those in
    `matrices`; `reached` are the layers from the first trained one on. Weights lie in
    `weight_bytes` bytes, those used twice counted once.
    """

    layers: int
    hidden: int
    vocabulary: int
    matrices: int
    head: int
    queries: int
    cached: int
    parameters: int
    trained: int
    weight_bytes: int
    bytes_per_weight: int
    trained_bytes: int = 0
    in_experts: int = 0
    adapter: int = 0
    trained_matrices: int = 0
    head_trained: bool = False
    has_own_reference: bool = False
    reached: int = 0

    @property
    def reached_share(self) -> float:
        """The share of the layers that gradients pass through."""
        return self.reached / max(self.layers, 1)


def architecture_of(model: Any) -> Architecture:
    """The sizes of a causal language model, plain or with its adapter, or of a classifier."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    text, output = base.config.get_text_config(decoder=True), base.get_output_embeddings()
    # A classifier's head, of a few numbers, counts among the matrices.
    head = torch.empty(0, text.hidden_size, device="meta") if output is None else output.weight
    matrices = list(_matrices(model, output))
    # Not the frozen copy that a reference keeps of a trained adapter.
    adapter = [w for name, w in matrices if "lora_" in name and w.requires_grad]
    own = [w for name, w in matrices if "lora_" not in name]
    experts, trained_experts = _experts(model, text)
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    heads = getattr(text, "num_attention_heads", 0)
    groups = _groups(text, heads)
    attending, (keys, values) = _attending(model, text), _head_widths(text, heads)
    return Architecture(
        layers=text.num_hidden_layers,
        hidden=head.shape[1],
        vocabulary=head.shape[0],
        matrices=sum(w.numel() for w in own) + experts,
        head=head.numel(),
        queries=attending * heads * (keys + values) // 2,
        cached=attending * groups * (keys + values),
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in trained),
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
        bytes_per_weight=parameters[0].element_size(),
        trained_bytes=sum(p.numel() * p.element_size() for p in trained),
        in_experts=experts,
        adapter=sum(w.numel() for w in adapter),
        trained_matrices=sum(w.numel() for w in own if w.requires_grad) + trained_experts,
        head_trained=head.requires_grad,
        has_own_reference=not hasattr(model, "peft_config"),
        reached=text.num_hidden_layers - _first_trained(model),
    )


def blueprint(
    config: PreTrainedConfig,
    model: ModelSection,
    lora: LoraSection,
    *,
    dtype: torch.dtype,
    device: str = "meta",
    layers: int = 0,
) -> Any:
    """The model of a run with its adapter: on the meta device, without memory.

    With `layers` it has no more of them, and a small vocabulary: a miniature, to be measured.

    Raises:
        ConfigError: `lora.target_modules` names what the model does not have.
    """
    kernel = model.attn_implementation
    settings = {"attn_implementation": kernel} if kernel else {}
    config = shallow(config, layers) if layers else config
    with torch.device(device), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(config, dtype=dtype, **settings)
        disable_dropout(made)
        return wrap_lora(made, lora) if lora.r else made


def classifier_blueprint(
    config: PreTrainedConfig, *, dtype: torch.dtype, device: str = "meta", layers: int = 0
) -> Any:
    """A sequence classifier with one output, as `blueprint`."""
    config = shallow(config, layers) if layers else copy.deepcopy(config)
    config.num_labels = 1
    with torch.device(device), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
        disable_dropout(made)
        return made


VOCABULARY_OF_A_MINIATURE = 512


def shallow(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same architecture with so many layers and a small vocabulary."""
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    deep = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == deep:  # one entry a layer
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    text.vocab_size = VOCABULARY_OF_A_MINIATURE
    text.pad_token_id, text.bos_token_id, text.eos_token_id = 0, 1, 2
    return config


def _first_trained(model: Any) -> int:
    """The number of layers, from the first on, that nothing trained is in or under."""
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    numbers = [re.search(r"\.(\d+)\.", name) for name in trained]
    in_layers = [int(found[1]) for found in numbers if found]
    outside = len(in_layers) < len(trained)  # embeddings, which stand below all layers
    return 0 if outside or not in_layers else min(in_layers)


def _attending(model: Any, text: PreTrainedConfig) -> int:
    """How many layers hold softmax attention: not those with a state or a convolution instead."""
    attention = re.compile(r"(?<!Linear)(?<!Lightning)Attention", re.IGNORECASE)
    if not getattr(text, "num_attention_heads", 0):
        return 0
    found = {
        numbered[0]
        # A block that several layers share is met in each of them.
        for name, module in model.named_modules(remove_duplicate=False)
        if attention.search(type(module).__name__) and (numbered := re.findall(r"\.(\d+)\.", name))
    }
    return len(found) if found else text.num_hidden_layers


def _groups(text: PreTrainedConfig, heads: int) -> int:
    """How many heads of keys and values there are. The first Falcons have one, whatever number
    stands beside the word for it.
    """
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return 1
    return getattr(text, "num_key_value_heads", None) or heads


def _head_widths(text: PreTrainedConfig, heads: int) -> tuple[int, int]:
    """The widths of a head's queries and keys, and of its values, which latent attention tells
    apart.
    """
    size = getattr(text, "head_dim", None) or text.hidden_size // max(heads, 1)
    if not getattr(text, "kv_lora_rank", None):
        return size, size
    return text.qk_nope_head_dim + text.qk_rope_head_dim, text.v_head_dim


def _experts(model: Any, text: PreTrainedConfig) -> tuple[int, int]:
    """How many weights a token is multiplied with in all experts that it is given to, and how many
    of them are trained. The experts of a layer are one parameter, each a matrix of it.
    """
    names = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk")
    taken = next((n for name in names if (n := getattr(text, name, None))), 0)
    taken = fmean(taken) if isinstance(taken, (list, tuple)) else taken  # one for each layer
    stacked = [
        (round(taken * p[0].numel()), p.requires_grad)
        for module in model.modules()
        for p in module.parameters(recurse=False)
        if taken and p.dim() == 3 and not isinstance(module, nn.Conv1d)
    ]
    return sum(size for size, _ in stacked), sum(size for size, trained in stacked if trained)


def _matrices(model: Any, head: nn.Module | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and weights of every matrix that tokens are multiplied with, the head's left out."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head:
            yield name, module.weight
