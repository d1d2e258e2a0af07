"""The policy: a causal language model with a value head on its trunk, and the reference that it is
held to.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ppo_lab.models.loading import disable_dropout
from ppo_lab.models.logprobs import token_full_kl, token_logprobs
from ppo_lab.models.trunk import Trunk
from ppo_lab.models.value_head import ValueHead, find_value_head, save_value_head
from ppo_lab.types import Forward, Tokens

REFERENCE_ADAPTER = "reference"


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
        disable_dropout(pretrained_model)  # or the ratio would not be 1 before the first update
        self.pretrained_model: Any = pretrained_model
        self.trunk = Trunk(pretrained_model)
        self.trunk.check()
        head = ValueHead(self.trunk.hidden_size, init=v_head_init, std=v_head_init_std)
        self.v_head = head.to(self.trunk.head.weight.device)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *,
        peft_config: Any = None,
        v_head_init_strategy: str = "normal",
        v_head_initializer_range: float = 0.0,
        **kwargs: Any,
    ) -> Self:
        """A policy from a hub id, a folder (LoRA adapters and TRL 0.11's folders included) or a
        model in memory.

        A value head found in the folder is loaded, else it is drawn anew: "normal" with standard
        deviation `v_head_initializer_range` (0 = 1 / sqrt(hidden_size + 1)), or "zero".
        `peft_config` wraps the model with a fresh adapter; other keywords go to
        `AutoModelForCausalLM.from_pretrained`.

        Raises:
            ValueError: `peft_config` for a model that has an adapter already, or an unknown
                initialisation.
        """
        if v_head_init_strategy not in ("normal", "zero"):
            raise ValueError(
                f"v_head_init_strategy is 'normal' or 'zero', not {v_head_init_strategy!r}"
            )
        model = _load(pretrained_model_name_or_path, kwargs)
        if peft_config is not None:
            model = _wrap(model, peft_config)
        policy = cls(
            model, v_head_init=v_head_init_strategy, v_head_init_std=v_head_initializer_range
        )
        policy.load_value_head(pretrained_model_name_or_path)
        return policy

    def load_value_head(self, folder: Any) -> bool:
        """Take the value head that lies in `folder`; False where there is none."""
        path = Path(folder) if isinstance(folder, (str, Path)) else None
        weights = find_value_head(path) if path is not None and path.is_dir() else None
        if weights is not None:
            self.v_head.load_state_dict(weights)
        return weights is not None

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Write model (or adapter) and value head as safetensors; `AutoModelForCausalLM` or
        `PeftModel` load it.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        if self.is_peft_model:
            kwargs.setdefault("selected_adapters", [self.pretrained_model.active_adapter])
        self.pretrained_model.save_pretrained(path, **kwargs)
        save_value_head(self.v_head, path)

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
        hidden = response_states(self.trunk, tokens)[tokens.mask]
        targets = tokens.responses[tokens.mask]
        logprobs, entropies = token_logprobs(
            hidden, self.trunk.head, targets, temperature=temperature, entropy=entropy
        )
        return Forward(
            logprobs=_spread(logprobs, tokens.mask),
            values=_spread(self.v_head(hidden), tokens.mask),
            entropy=None if entropies is None else _spread(entropies, tokens.mask),
        )

    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """Transformers' own `generate`."""
        return self.pretrained_model.generate(*args, **kwargs)

    @property
    def is_peft_model(self) -> bool:
        """Whether an adapter is trained rather than the model's own weights."""
        return hasattr(self.pretrained_model, "peft_config") and hasattr(
            self.pretrained_model, "disable_adapter"
        )

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

    def gradient_checkpointing_enable(self) -> None:
        """Recompute activations in the backward pass; with an adapter, gradients still reach it."""
        self.pretrained_model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.is_peft_model:
            self.pretrained_model.enable_input_require_grads()


class Reference:
    """The frozen model that KL is measured against: the policy as it was when this was made.

    Of a policy with a fresh adapter it is the same trunk with the adapter off, of one with a
    trained adapter a frozen copy of that adapter on the same trunk, else a frozen copy of the
    model, or `model` where one is given.
    """

    def __init__(self, policy: AutoModelForCausalLMWithValueHead, model: Any = None) -> None:
        self._policy = policy
        self.is_start = model is None
        self._adapter = ""
        if model is not None:
            self._trunk = Trunk(_plain(model))
        elif not policy.is_peft_model:
            self._trunk = Trunk(_frozen(copy.deepcopy(policy.trunk.model)))
        else:
            self._trunk = policy.trunk
            self._adapter = (
                _clone_adapter(policy.pretrained_model)
                if _is_trained(policy.pretrained_model)
                else "off"
            )

    @torch.no_grad()
    def logprobs(self, tokens: Tokens, *, temperature: float) -> Float[Tensor, "batch time"]:
        """Log-probabilities of the response tokens under the reference."""
        with self.active() as trunk:
            hidden = response_states(trunk, tokens)[tokens.mask]
            targets = tokens.responses[tokens.mask]
            logprobs, _ = token_logprobs(hidden, trunk.head, targets, temperature=temperature)
        return _spread(logprobs, tokens.mask)

    @torch.no_grad()
    def full_kl(self, tokens: Tokens, *, temperature: float) -> Float[Tensor, "batch time"]:
        """The exact KL of the policy to the reference at each response token, over the vocabulary,
        in nats.
        """
        hidden = response_states(self._policy.trunk, tokens)[tokens.mask]
        with self.active() as trunk:
            ref_hidden = response_states(trunk, tokens)[tokens.mask]
            kl = token_full_kl(
                hidden, ref_hidden, self._policy.trunk.head, trunk.head, temperature=temperature
            )
        return _spread(kl, tokens.mask)

    @contextmanager
    def active(self) -> Iterator[Trunk]:
        """The reference's trunk; with a shared trunk, its adapter is switched for the while and
        switched back.
        """
        model = self._policy.pretrained_model
        if self._adapter == "off":
            with model.disable_adapter():
                yield self._trunk
        elif self._adapter:
            trained = model.active_adapter
            model.set_adapter(self._adapter)
            try:
                yield self._trunk
            finally:
                model.set_adapter(trained)
        else:
            yield self._trunk


def response_states(trunk: Trunk, tokens: Tokens) -> Float[Tensor, "batch time hidden"]:
    """The hidden states that predict each response token.

    Columns that are padding in every row are not computed; on padding the result holds zeros.
    """
    time = tokens.responses.shape[1]
    width = tokens.queries.shape[1]
    skip = width - int(tokens.query_mask.sum(1).max())
    longest = int(tokens.lengths.max())
    ids = torch.cat([tokens.queries[:, skip:], tokens.responses[:, :longest]], 1)
    attention = torch.cat([tokens.query_mask[:, skip:], tokens.attended[:, :longest]], 1)
    # The last token predicts nothing that is asked for.
    hidden = trunk.hidden(ids[:, :-1], attention[:, :-1])[:, width - skip - 1 :]
    return torch.nn.functional.pad(hidden, (0, 0, 0, time - longest))


def _spread(x: Float[Tensor, " tokens"], mask: Tensor) -> Float[Tensor, "batch time"]:
    return x.new_zeros(mask.shape).masked_scatter(mask, x)


def _load(source: Any, kwargs: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    if not isinstance(source, (str, Path)):
        return source
    if (Path(source) / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(str(source), is_trainable=True, **kwargs)
    return AutoModelForCausalLM.from_pretrained(str(source), **kwargs)


def _wrap(model: Any, peft_config: Any) -> Any:
    from peft import PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise ValueError(
            "peft_config was given for a model that has an adapter already: leave one of them out"
        )
    return get_peft_model(model, peft_config)


def _plain(model: Any) -> Any:
    wrapped = (
        model.pretrained_model if isinstance(model, AutoModelForCausalLMWithValueHead) else model
    )
    return _frozen(wrapped)


def _frozen(model: Any) -> Any:
    return model.requires_grad_(False).eval()


def _is_trained(model: Any) -> bool:
    """Whether a LoRA adapter already changes the model: some `lora_B` is not zero."""
    return any(bool(p.any()) for name, p in model.named_parameters() if "lora_B" in name)


def _clone_adapter(model: Any) -> str:
    """Add a frozen copy of the active adapter under the reference's name."""
    trained = model.active_adapter
    model.add_adapter(REFERENCE_ADAPTER, copy.deepcopy(model.peft_config[trained]))
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in weights.items():
            if f".{trained}." in name or name.endswith(f".{trained}"):
                weights[name.replace(f".{trained}", f".{REFERENCE_ADAPTER}")].copy_(parameter)
    model.set_adapter(trained)
    return REFERENCE_ADAPTER
