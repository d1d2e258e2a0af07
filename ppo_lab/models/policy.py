"""The policy: a causal language model with a value head on its trunk."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn

from ppo_lab.errors import ConfigError
from ppo_lab.models.loading import disable_dropout
from ppo_lab.models.logprobs import token_logprobs
from ppo_lab.models.trunk import Trunk
from ppo_lab.models.value_head import (
    VALUE_HEAD_FILE,
    ValueHead,
    find_value_head,
    model_folder,
    save_value_head,
)
from ppo_lab.types import Forward, Tokens


class AutoModelForCausalLMWithValueHead(nn.Module):
    """A causal language model (plain or PEFT) as `pretrained_model`, with a scalar value head
    `v_head` on its trunk.

    One pass through the trunk gives log-probabilities, values and entropies of response tokens. The
    value head stands outside the PEFT model, so that switching the adapter off for the reference
    leaves it alone.
    """

    def __init__(
        self, pretrained_model: Any, *, v_head_init: str = "normal", v_head_init_std: float = 0.0
    ) -> None:
        super().__init__()
        check_causal(pretrained_model)
        disable_dropout(pretrained_model)  # or the ratio would not be 1 before the first update
        self.pretrained_model: Any = pretrained_model
        self.trunk = Trunk(pretrained_model)
        self.trunk.check()
        head = ValueHead(self.trunk.hidden_size, init=v_head_init, std=v_head_init_std)
        self.v_head = head.to(self.trunk.head.weight.device)

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep the trunk that of `pretrained_model`, which scripts wrap with an adapter later."""
        super().__setattr__(name, value)
        if name == "pretrained_model" and "trunk" in self.__dict__:
            self.look_again()

    def look_again(self) -> None:
        """See what `pretrained_model` is made of now, where modules of it were put in later.

        Raises:
            ValueError: nothing that can be trained.
        """
        if self.trunk.is_of(self.pretrained_model):
            return
        check_causal(self.pretrained_model)
        disable_dropout(self.pretrained_model)
        before, self.trunk = self.trunk, Trunk(self.pretrained_model)
        self.trunk.fast_layers = before.fast_layers
        self.trunk.records_graphs = before.records_graphs
        self.trunk.check()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *,
        peft_config: Any = None,
        v_head_init_strategy: str | None = "normal",
        v_head_initializer_range: float = 0.0,
        **kwargs: Any,
    ) -> Self:
        """A policy from a hub id, a folder (LoRA adapters and TRL 0.11's folders included) or a
        model in memory.

        Weights are float32 unless `dtype` says otherwise, whatever they were saved in: in half
        precision, Adam's small steps would be lost to rounding.

        A value head found beside the model is loaded, else it is drawn anew: "normal" with standard
        deviation `v_head_initializer_range` (0 = 1 / sqrt(hidden_size + 1)), or "zero".
        `peft_config` wraps the model with a fresh adapter; other keywords go to
        `AutoModelForCausalLM.from_pretrained`.

        Raises:
            ValueError: nothing that a policy can be made of, `peft_config` for a model that has an
                adapter already, or an unknown initialisation.
        """
        v_head_init_strategy = v_head_init_strategy or "normal"
        if v_head_init_strategy not in ("normal", "zero"):
            raise ValueError(
                f"v_head_init_strategy is 'normal' or 'zero', not {v_head_init_strategy!r}"
            )
        kwargs = _of_today(kwargs)
        model = _load(pretrained_model_name_or_path, dict(kwargs))
        if peft_config is not None:
            model = _wrap(model, peft_config)
        policy = cls(
            model, v_head_init=v_head_init_strategy, v_head_init_std=v_head_initializer_range
        )
        policy.load_value_head(pretrained_model_name_or_path, **_asked_of_hub(kwargs))
        return policy

    def load_value_head(self, source: Any, **asked: Any) -> bool:
        """Take the value head that lies beside a model in a folder or on the hub, which is asked as
        for the model (`revision`, `token`, ...); False where there is none.

        Raises:
            ConfigError: it is damaged, or of another model.
        """
        path = model_folder(source, **asked)
        if path is None:
            return False
        try:
            weights = find_value_head(path)
            if weights is not None:
                self.v_head.load_state_dict(weights)
        except (SafetensorError, UnpicklingError, OSError, RuntimeError, ValueError) as error:
            said = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"{path}: the value head beside the model cannot be taken ({said}); remove "
                f"{VALUE_HEAD_FILE} there, and a new one is drawn"
            ) from error
        return weights is not None

    def save_pretrained(
        self, folder: str | Path, *, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Write model (or adapter) and value head as safetensors; `AutoModelForCausalLM` or
        `PeftModel` load it. A value head that is not trained, since a critic stands in for it, is
        left out. `state_dict` is that of the whole policy, where it is sharded. With `push_to_hub`
        all of it goes to the hub too, as `repo_id` or by the folder's name.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        pushed = kwargs.pop("push_to_hub", False)
        repo_id = kwargs.pop("repo_id", path.name)
        head = self.v_head.state_dict() if state_dict is None else under("v_head.", state_dict)
        if state_dict is not None:
            kwargs["state_dict"] = under("pretrained_model.", state_dict)
        if self.is_peft_model:
            kwargs["selected_adapters"] = [self.pretrained_model.active_adapter]
            # The vocabulary never changes here; finding that out, PEFT would ask the hub.
            kwargs.setdefault("save_embedding_layers", False)
        self.pretrained_model.save_pretrained(path, **kwargs)
        if self.is_peft_model:
            _move_up(path / self.pretrained_model.active_adapter)
        if self.v_head.summary.weight.requires_grad:
            save_value_head(head, path)
        if pushed:  # not by transformers, which knows of no value head
            self.push_to_hub(repo_id, private=kwargs.get("private"), token=kwargs.get("token"))

    def forward(
        self,
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None, Float[Tensor, "batch time"]]:
        """TRL's classic triple: logits of every position, None, values of every position."""
        attended = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = self.trunk.hidden(input_ids, attended.bool(), **kwargs)
        return self.trunk.head.logits(hidden), None, self.v_head(hidden)

    def score(self, tokens: Tokens, *, temperature: float, entropy: bool = False) -> Forward:
        """Log-probabilities and values (and entropies, when asked for) of the response tokens, in
        one pass.
        """
        hidden, targets = looked_at(response_states(self.trunk, tokens), tokens), targets_of(tokens)
        logprobs, entropies = token_logprobs(
            hidden, self.trunk.head, targets, temperature=temperature, entropy=entropy
        )
        return Forward(
            logprobs=spread(logprobs, tokens),
            values=spread(self.v_head(hidden), tokens),
            entropy=None if entropies is None else spread(entropies, tokens),
        )

    def values(self, tokens: Tokens) -> Float[Tensor, "batch time"]:
        """The values of the response tokens, on a trunk that learns nothing from them."""
        with torch.no_grad():
            hidden = looked_at(response_states(self.trunk, tokens), tokens)
        return spread(self.v_head(hidden), tokens)

    def below(self, tokens: Tokens) -> Float[Tensor, "batch seen hidden"]:
        """The hidden states that enter the first adapted layer, of every token but the last; zeros
        in columns that are padding in every row.
        """
        skip, longest, ids, attention = _without_empty_columns(tokens)
        after = tokens.responses.shape[1] - longest
        return torch.nn.functional.pad(self.trunk.below(ids, attention), (0, 0, skip, after))

    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """Transformers' own `generate`."""
        return self.pretrained_model.generate(*args, **kwargs)

    @property
    def is_peft_model(self) -> bool:
        """Whether an adapter is trained rather than the model's own weights."""
        return hasattr(self.pretrained_model, "peft_config") and hasattr(
            self.pretrained_model, "disable_adapter"
        )

    @is_peft_model.setter
    def is_peft_model(self, _: bool) -> None:
        """Scripts set it; it is seen of the model."""

    @property
    def config(self) -> Any:
        """The language model's configuration."""
        return self.trunk.model.config

    @property
    def generation_config(self) -> Any:
        """The language model's generation settings."""
        return self.trunk.model.generation_config

    @property
    def device(self) -> torch.device:
        """Where the trunk lies."""
        return self.trunk.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The trunk's dtype."""
        return self.trunk.head.weight.dtype

    def train(self, mode: bool = True) -> Self:
        """Set training mode; of the model under it only what recomputes activations follows."""
        super().train(mode)
        train_checkpoints_alone(self.pretrained_model)
        return self

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: Any = None) -> str:
        """Upload what `save_pretrained` writes to the hub, and return its address."""
        from ppo_lab.scripts import push

        return push(self.save_pretrained, repo_id, private=private, token=token)

    def enable_input_require_grads(self) -> None:
        """Let gradients reach adapters under frozen embeddings."""
        self.pretrained_model.enable_input_require_grads()

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations for the backward pass."""
        self.pretrained_model.gradient_checkpointing_disable()

    def gradient_checkpointing_enable(self) -> None:
        """Recompute activations in the backward pass; with an adapter, gradients still reach it."""
        enable_checkpointing(self.pretrained_model)
        if self.is_peft_model:
            self.pretrained_model.enable_input_require_grads()


def enable_checkpointing(model: Any) -> None:
    """Make a model of transformers recompute its activations in the backward pass.

    Raises:
        ConfigError: its architecture does not.
    """
    # The second name is that of transformers before 5.23.
    enable = (
        getattr(model, "activation_checkpointing_enable", None)
        or model.gradient_checkpointing_enable
    )
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(f"ppo.gradient_checkpointing=true: {error} Leave it out.") from error


def train_checkpoints_alone(model: nn.Module) -> None:
    """Take all out of training mode but what asks there whether to recompute activations.

    Dropout is not all that hangs on it: routers of experts draw noise, Gemma 3n clips weights of
    which it then leaves an adapter out. The model that is trained would not be the one sampled.
    """
    for module in model.modules():
        module.training = module.training and getattr(module, "gradient_checkpointing", False)


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries of one part of a state, under their names in that part."""
    found = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def response_states(trunk: Trunk, tokens: Tokens) -> Float[Tensor, "batch time hidden"]:
    """The hidden states that predict each response token.

    Columns that are padding in every row are not computed; on padding the result holds zeros.
    """
    skip, longest, ids, attention = _without_empty_columns(tokens)
    below = tokens.below if trunk.kept_below else None
    if below is not None:
        below = below[:, skip : skip + ids.shape[1]]
    hidden = trunk.hidden(ids, attention, last=longest, below=below)
    after = tokens.responses.shape[1] - longest
    return torch.nn.functional.pad(hidden, (0, 0, 0, after)) if after else hidden  # pad copies


def _without_empty_columns(tokens: Tokens) -> tuple[int, int, Tensor, Tensor]:
    """Columns left out at the beginning, the longest response, and ids and attention of what
    predicts something: the last token of all does not.
    """
    skip, longest = 0, tokens.responses.shape[1]
    if tokens.kept is None or tokens.host is not None:
        known = tokens if tokens.host is None else tokens.host
        skip = tokens.queries.shape[1] - int(known.query_mask.sum(1).max())
        longest = int(known.lengths.max())
    ids = torch.cat([tokens.queries[:, skip:], tokens.responses[:, :longest]], 1)
    attention = torch.cat([tokens.query_mask[:, skip:], tokens.attended[:, :longest]], 1)
    return skip, longest, ids[:, :-1], attention[:, :-1]


def looked_at(
    x: Float[Tensor, "batch time hidden"], tokens: Tokens
) -> Float[Tensor, "kept hidden"]:
    """What stands at the places that are looked at: those of the trained tokens, and with
    `tokens.kept` perhaps some of padding.
    """
    if tokens.kept is None:
        return x[tokens.mask]
    return x.flatten(0, 1).index_select(0, tokens.kept)


def targets_of(tokens: Tokens) -> Int[Tensor, " kept"]:
    """The response tokens at those places."""
    if tokens.kept is None:
        return tokens.responses[tokens.mask]
    return tokens.responses.flatten().index_select(0, tokens.kept)


def spread(x: Float[Tensor, " kept"], tokens: Tokens) -> Float[Tensor, "batch time"]:
    """Numbers of those places in them, zeros where no token is trained."""
    mask = tokens.mask
    if tokens.kept is None:
        return x.new_zeros(mask.shape).masked_scatter(mask, x)
    everywhere = x.new_zeros(mask.numel()).index_copy(0, tokens.kept, x)
    return everywhere.view(mask.shape).masked_fill(~mask, 0.0)


def _of_today(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keywords of TRL 0.11 and of its transformers as transformers takes them today.

    Raises:
        ValueError: `reward_adapter`, which is not done here.
    """
    kwargs = dict(kwargs)
    if kwargs.pop("reward_adapter", None) is not None:
        raise ValueError("reward_adapter: a reward model is a model of its own here")
    kwargs.pop("summary_dropout_prob", None)  # there is no dropout
    if "use_auth_token" in kwargs:
        kwargs.setdefault("token", kwargs.pop("use_auth_token"))
    bits = {name: kwargs.pop(name, False) for name in ("load_in_8bit", "load_in_4bit")}
    if any(bits.values()):
        from transformers import BitsAndBytesConfig

        kwargs.setdefault("quantization_config", BitsAndBytesConfig(**bits))
    return kwargs


def _asked_of_hub(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of the keywords of a model those that say where the hub has it, and how it is asked."""
    names = ("revision", "token", "cache_dir", "local_files_only")
    return {name: kwargs[name] for name in names if name in kwargs}


def _load(source: Any, kwargs: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils.peft_utils import find_adapter_config_file

    if not isinstance(source, (str, Path)):
        return source
    trainable = kwargs.pop("is_trainable", True)
    if "torch_dtype" not in kwargs:
        kwargs.setdefault("dtype", torch.float32)
    if find_adapter_config_file(str(source)) is not None:
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(
            str(source), is_trainable=trainable, **kwargs
        )
    return AutoModelForCausalLM.from_pretrained(str(source), **kwargs)


def check_causal(model: Any) -> None:
    """Refuse what is no causal language model, or lies on several devices, and adapters whose
    effect the trunk would not see.

    Raises:
        ValueError: saying which.
    """
    from transformers import PreTrainedModel

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = type(base).__name__
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"model must be a causal language model of transformers, plain or PEFT, not {name}"
        )
    if base.config.is_encoder_decoder or base.get_output_embeddings() is None:
        raise ValueError(f"model must be a decoder with a language-model head, which {name} is not")
    places = {str(place) for place in getattr(base, "hf_device_map", {}).values()}
    if len(places) > 1:
        raise ValueError(
            f"model: device_map put {name} on {', '.join(sorted(places))}, and a model that is "
            "trained here is on one device, with nothing offloaded; load it without device_map"
        )
    if hasattr(base.get_output_embeddings(), "base_layer"):
        raise ValueError(
            f"model: the adapter is on the output head of {name}, which is never adapted, since "
            "log-probs are made from its own weight; leave the head out of target_modules"
        )
    adapter = getattr(model, "active_peft_config", None)
    if getattr(adapter, "alora_invocation_tokens", None):
        raise ValueError(
            "model: alora_invocation_tokens: such an adapter acts inside of PEFT's own forward "
            "alone, and would not be trained; leave it out"
        )
    if adapter is not None and adapter.is_prompt_learning:
        raise ValueError(
            f"model: {adapter.peft_type.value} learns a prompt, and only adapters inside of the "
            "model (such as LoRA) can be trained here"
        )


def _move_up(folder: Path) -> None:
    """Put the files of an adapter that has a name of its own where one is looked for."""
    if folder.is_dir():
        for file in folder.iterdir():
            file.replace(folder.parent / file.name)
        folder.rmdir()


def _wrap(model: Any, peft_config: Any) -> Any:
    from peft import PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise ValueError(
            "peft_config was given for a model that has an adapter already: leave one of them out"
        )
    return get_peft_model(model, peft_config)
