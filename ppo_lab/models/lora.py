"""LoRA from the `lora` section: which modules are adapted, and the wrapping itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ppo_lab.errors import ConfigError

if TYPE_CHECKING:
    from ppo_lab.config import LoraSection

ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer but the output head."""

# Architectures whose dt_proj is never called: their mixers multiply by its weight themselves.
READS_DT_PROJ = ("mamba", "falcon_mamba", "jamba")


def lora_config(section: LoraSection, model: PreTrainedModel) -> LoraConfig:
    """PEFT's settings for this model, `lora.target_modules` checked against its layers.

    An empty list is PEFT's choice for the architecture, usually projections of attention, and every
    linear layer of an architecture unknown to it. The output head is never adapted: log-probs are
    made from hidden states and the head's own weight.

    Raises:
        ConfigError: a target that is no linear layer of the model, or its output head; more layers
            than there are.
    """
    names = linear_names(model)
    targets = list(section.target_modules) or _default_targets(model)
    if targets != [ALL_LINEAR]:
        _check_targets(targets, names, model)
    elif section.top_layers:  # PEFT takes no word for all of them beside numbers of layers
        targets = sorted({name.rpartition(".")[2] for name in names})
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=section.r,
        lora_alpha=section.alpha,  # type: ignore[arg-type]
        lora_dropout=section.dropout,
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
        exclude_modules=_unfit(model) or None,
        use_rslora=section.use_rslora,
        use_dora=section.use_dora,
        layers_to_transform=_top_layers(section, model),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )


def wrap_lora(model: PreTrainedModel | PeftModel, section: LoraSection) -> PeftModel:
    """The model with a new adapter, which alone is trained.

    The adapter is float32 whatever the trunk's precision. The trunk is frozen, so that the model
    with its adapter off stays what it was: the reference. A model that comes with an adapter keeps
    that one and goes on training it.

    Raises:
        ConfigError: targets that the model does not have or PEFT does not adapt, or settings that
            differ from those of its own adapter.
    """
    if isinstance(model, PeftModel):
        _check_same_adapter(model, section)
        return model
    config, leaves = lora_config(section, model), _leaves(linear_names(model))
    if getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    try:
        return get_peft_model(model, config, autocast_adapter_dtype=True)  # type: ignore[return-value]
    except ValueError as error:  # a layer that it does not adapt
        said = " ".join(str(error).split())
        left = [leaf for leaf in leaves if f"'{leaf}'" not in said]
        raise ConfigError(
            f"lora.target_modules: PEFT refuses them for this model ({said}); choose among "
            f"{', '.join(left)}, or train all weights with lora=none"
        ) from error


def merged(model: Any) -> Any:
    """The model with the adapter that it may have come with in its weights, all of which are to be
    trained.
    """
    if not hasattr(model, "merge_and_unload"):  # plain, or a learnt prompt, which is refused later
        return model
    return model.merge_and_unload().requires_grad_(True)  # what lay under the adapter was frozen


@contextmanager
def unmerged_exactly(model: nn.Module) -> Iterator[None]:
    """Weights that adapters are merged into and taken out of again inside are what they were.

    PEFT subtracts what it added, which leaves other numbers; and the weights are the reference's
    too.
    """
    layers: list[Any] = [m.base_layer for m in model.modules() if hasattr(m, "base_layer")]
    held = [(layer, layer.weight, _copied(layer.weight)) for layer in layers]
    try:
        yield
    finally:
        for layer, weight, copy in held:
            if copy is not None:
                weight.data.copy_(copy)
            layer.weight = weight  # of quantized layers PEFT makes a new one


def _copied(weight: Tensor) -> Tensor | None:
    """A copy of weights in which what is added and subtracted leaves a trace; quantized ones are
    made anew.
    """
    return weight.detach().clone() if weight.is_floating_point() else None


def _top_layers(section: LoraSection, model: PreTrainedModel) -> list[int] | None:
    """The numbers of the layers to adapt, None for all."""
    if not section.top_layers:
        return None
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    if section.top_layers > layers:
        raise ConfigError(f"lora.top_layers={section.top_layers}: this model has {layers} layers")
    return list(range(layers - section.top_layers, layers))


def linear_names(model: PreTrainedModel) -> list[str]:
    """The full names of the linear layers that an adapter can go on, the output head left out."""
    head, unfit = model.get_output_embeddings(), set(_unfit(model))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and name not in unfit
    ]


def _unfit(model: PreTrainedModel) -> list[str]:
    """The full names of linear layers that an adapter cannot go on, or would do nothing on."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    left = {leaf for leaf in _leaves(names) if _is_refused(leaf, model)}
    if model.config.model_type in READS_DT_PROJ:
        left.add("dt_proj")
    return [*_routers(model), *(name for name in names if name.rpartition(".")[2] in left)]


def _is_refused(leaf: str, model: PreTrainedModel) -> bool:
    """Whether PEFT takes no adapter on layers of this name in this architecture, such as Mamba's
    out_proj.
    """
    stand_in = nn.Module()
    stand_in.add_module(leaf, nn.Linear(1, 1))
    stand_in.config = model.config  # type: ignore[assignment]
    try:
        LoraModel(stand_in, LoraConfig(target_modules=[leaf]), "default")
    except ValueError:
        return True
    return False


def _routers(model: PreTrainedModel) -> list[str]:
    """The full names of linear layers that give more than a product, such as the experts that they
    choose (Llama 4, Phi-3.5 MoE): an adapter's product cannot be added to that.
    """
    # Those of quantised weights have a forward of their own too, but not of this architecture.
    own = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module).__module__ == type(model).__module__
    }
    one_each = {type(layer): layer for layer in own.values()}
    plain = {kind for kind, layer in one_each.items() if _gives_a_product(layer)}
    return [name for name, layer in own.items() if type(layer) not in plain]


@torch.no_grad()
def _gives_a_product(layer: nn.Linear) -> bool:
    try:
        given = layer(layer.weight.new_zeros(1, layer.in_features))
    except Exception:  # of what reads another shape
        return False
    return isinstance(given, Tensor) and given.shape == (1, layer.out_features)


def _leaves(names: list[str]) -> list[str]:
    """The last parts of modules' names, each once."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _default_targets(model: PreTrainedModel) -> list[str]:
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type)
    return list(known) if isinstance(known, list) else [ALL_LINEAR]


def _check_targets(targets: list[str], names: list[str], model: PreTrainedModel) -> None:
    head, unfit = _head_name(model), set(_unfit(model)) - set(_routers(model))
    leaves = _leaves(names)
    problems = [
        f"lora.target_modules: {target} is the output head, which is never adapted"
        if head and _names(target, head)
        else f"lora.target_modules: {target} takes no adapter in this model, which reads its "
        f"weight and may not call it; choose among {', '.join(leaves)}, or train all weights with "
        "lora=none"
        if any(_names(target, name) for name in unfit)
        else _unknown_target(target, leaves)
        for target in targets
        if not any(_names(target, name) for name in names)
    ]
    if problems:
        raise ConfigError(problems)


def _names(target: str, name: str) -> bool:
    """Whether a target names this module: in full, or by its last parts, as PEFT compares them."""
    return name == target or name.endswith(f".{target}")


def _unknown_target(target: str, leaves: list[str]) -> str:
    near = get_close_matches(target, leaves, n=1)
    nearest = f" (did you mean {near[0]}?)" if near else ""
    return (
        f"lora.target_modules: {target} is no linear layer of this model{nearest}. "
        f"It has {', '.join(leaves)}; or [{ALL_LINEAR}] for all, or [] for PEFT's choice"
    )


def _head_name(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), "")


def _check_same_adapter(model: PeftModel, section: LoraSection) -> None:
    own: Any = model.peft_config[model.active_adapter]
    if not isinstance(own, LoraConfig):
        raise ConfigError(
            f"lora.r={section.r}: the adapter in model.path is {own.peft_type.value}, and of those "
            "LoRA's alone go on training; lora=none merges one into the weights where PEFT can"
        )
    settings = {"r": own.r, "alpha": own.lora_alpha, "use_rslora": own.use_rslora}
    settings |= {"use_dora": own.use_dora, "top_layers": _how_many(own.layers_to_transform)}
    problems = [
        f"lora.{name}={getattr(section, name)}: the adapter in model.path has {value}; "
        f"set lora.{name}={value} to go on training it"
        for name, value in settings.items()
        if getattr(section, name) != value
    ]
    targets, theirs = section.target_modules, _adapted(model)
    if targets and not _same_leaves(targets, theirs, model):
        stated, own_names = ",".join(targets), ",".join(theirs)
        problems.append(
            f"lora.target_modules=[{stated}]: the adapter in model.path has [{own_names}]; "
            f"set lora.target_modules=[{own_names}] to go on training it"
        )
    if problems:
        raise ConfigError(problems)


def _how_many(layers: list[int] | int | None) -> int:
    """How many layers PEFT's setting names, 0 where it leaves it open: one may stand by itself."""
    return 1 if isinstance(layers, int) else len(layers or ())


def _adapted(model: PeftModel) -> list[str]:
    """The last parts of the names of the layers that an adapter is on."""
    layers = model.get_base_model().named_modules()
    return _leaves([name for name, module in layers if hasattr(module, "lora_A")])


def _same_leaves(targets: list[str], adapted: list[str], model: PeftModel) -> bool:
    """Whether targets name, by their last parts, the layers that an adapter is on."""
    if list(targets) == [ALL_LINEAR]:
        base: Any = model.get_base_model()
        others = [name for name in linear_names(base) if "lora_" not in name]
        return set(_leaves([name.removesuffix(".base_layer") for name in others])) <= set(adapted)
    return set(_leaves(list(targets))) == set(adapted)
