"""The frozen model that a policy is held to."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ppo_lab.models.loading import disable_dropout
from ppo_lab.models.logprobs import token_full_kl, token_logprobs
from ppo_lab.models.policy import (
    AutoModelForCausalLMWithValueHead,
    check_causal,
    looked_at,
    response_states,
    spread,
    targets_of,
)
from ppo_lab.models.trunk import Trunk
from ppo_lab.signals import undisturbed
from ppo_lab.types import Tokens

REFERENCE_ADAPTER = "reference"


class Reference:
    """The frozen model that KL is measured against: the policy as it was when this was made.

    Of a policy with a fresh adapter it is the same trunk with the adapter off, of one with a
    trained adapter a frozen copy of that adapter on the same trunk, else a frozen copy of the
    model, or `model` where one is given (which is then frozen). `exact_kl` says that `full_kl` will
    be asked for.
    """

    def __init__(
        self,
        policy: AutoModelForCausalLMWithValueHead,
        model: Any = None,
        *,
        exact_kl: bool = False,
    ) -> None:
        self._policy, self.given = policy, model
        self.is_start = model is None
        self._adapter = ""
        if model is not None:
            self._trunk = Trunk(_plain(model))
            self._trunk.check()
            _check_rows(self._trunk, policy.trunk, alike=exact_kl)
        elif not policy.is_peft_model or not _switches_whole(policy.pretrained_model):
            self._trunk = Trunk(_frozen(copy.deepcopy(policy.pretrained_model)))
        else:
            self._trunk = policy.trunk
            self._adapter = (
                _clone_adapter(policy.pretrained_model)
                if _is_trained(policy.pretrained_model)
                else "off"
            )

        self._trunk.fast_layers = policy.trunk.fast_layers
        self._trunk.records_graphs = policy.trunk.records_graphs

    @property
    def trunk(self) -> Trunk:
        """What its passes go through: the policy's trunk, or one of its own."""
        return self._trunk

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The models of its own by name: none where it shares the policy's trunk."""
        shared = self._trunk is self._policy.trunk
        return {} if shared else {"reference": self._trunk.model}

    @torch.no_grad()
    def logprobs(self, tokens: Tokens, *, temperature: float) -> Float[Tensor, "batch time"]:
        """Log-probabilities of the response tokens under the reference."""
        with self.active() as trunk:
            hidden = looked_at(response_states(trunk, tokens), tokens)
            targets = targets_of(tokens)
            logprobs, _ = token_logprobs(hidden, trunk.head, targets, temperature=temperature)
        return spread(logprobs, tokens)

    @torch.no_grad()
    def full_kl(self, tokens: Tokens, *, temperature: float) -> Float[Tensor, "batch time"]:
        """The exact KL of the policy to the reference at each response token, over the vocabulary,
        in nats.
        """
        hidden = looked_at(response_states(self._policy.trunk, tokens), tokens)
        with self.active() as trunk:
            ref_hidden = looked_at(response_states(trunk, tokens), tokens)
            kl = token_full_kl(
                hidden, ref_hidden, self._policy.trunk.head, trunk.head, temperature=temperature
            )
        return spread(kl, tokens)

    @contextmanager
    def active(self) -> Iterator[Trunk]:
        """The reference's trunk; with a shared trunk, its adapter is switched for the while and
        switched back.
        """
        # Interrupted half-way, some layers would keep the reference's adapter, and train with it.
        switched = ExitStack()
        try:
            with undisturbed():
                switched.enter_context(self._switched())
            yield self._trunk
        finally:
            with undisturbed():
                switched.close()

    @contextmanager
    def _switched(self) -> Iterator[None]:
        model = self._policy.pretrained_model
        if self._adapter == "off":
            with model.disable_adapter():
                yield
        elif self._adapter:
            trained = model.active_adapter
            model.set_adapter(self._adapter, inference_mode=True)
            try:
                yield
            finally:
                model.set_adapter(trained)
        else:
            yield


def _check_rows(reference: Trunk, policy: Trunk, *, alike: bool) -> None:
    """Refuse a reference that lacks tokens which the policy may sample; where their distributions
    are to be `alike`, for the exact KL, also one that has more.

    Raises:
        ValueError: saying how many each has.
    """
    theirs, ours = len(reference.head.weight), len(policy.head.weight)
    if theirs < ours:
        raise ValueError(
            f"ref_model: its head has {theirs} rows and the policy's {ours}, each of which the "
            "policy may sample, those that pad its vocabulary too; the reference's must be as many "
            "(transformers' resize_token_embeddings adds rows)"
        )
    if alike and theirs > ours:
        raise ValueError(
            f"ref_model: its head has {theirs} rows and the policy's {ours}; the exact KL "
            "(kl_penalty='full') is of distributions over the same tokens"
        )


def _plain(model: Any) -> Any:
    wrapped = (
        model.pretrained_model if isinstance(model, AutoModelForCausalLMWithValueHead) else model
    )
    check_causal(wrapped)
    return _frozen(wrapped)


def _frozen(model: Any) -> Any:
    disable_dropout(model)
    return model.requires_grad_(False).eval()


def _switches_whole(model: Any) -> bool:
    """Whether all that the adapter trains can be switched off and cloned: LoRA without biases."""
    adapter = model.active_peft_config
    plain = not getattr(adapter, "layer_replication", None)  # a second adapter repeats them again
    return adapter.peft_type == "LORA" and adapter.bias == "none" and plain


def _is_trained(model: Any) -> bool:
    """Whether the adapter already changes the model, which a fresh one does not.

    A fresh one holds zeros in `lora_B` (of embeddings: in A) and copies in `modules_to_save` and
    of the rows of single tokens.
    """
    if any(
        bool(p.any())
        for name, p in model.named_parameters()
        if "lora_B" in name or "lora_embedding_A" in name
    ):
        return True
    return any(_saved_otherwise(m) or _moved_tokens(m) for m in model.modules())


def _saved_otherwise(module: Any) -> bool:
    """Whether what an adapter keeps in a module's place (`modules_to_save`) is other than it."""
    if not isinstance(module, ModulesToSaveWrapper):
        return False
    return any(
        _differ(copied, module.original_module) for copied in module.modules_to_save.values()
    )


def _moved_tokens(module: Any) -> bool:
    """Whether rows of single tokens that an adapter trains (`trainable_token_indices`) are other
    than those that they began as.
    """
    rows = getattr(module, "trainable_tokens_delta", {})
    return any(not torch.equal(row, module.trainable_tokens_original[n]) for n, row in rows.items())


def _differ(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return any(not torch.equal(a, b) for a, b in pairs)


def _clone_adapter(model: Any) -> str:
    """Add a frozen copy of the active adapter under a name that is not taken, and return that."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    trained, name = model.active_adapter, REFERENCE_ADAPTER
    while name in model.peft_config:
        name += "_"
    config = copy.deepcopy(model.peft_config[trained])
    # Some ways to start an adapter (PiSSA, OLoRA) take what they put into it out of the trunk.
    config.init_lora_weights = True
    model.add_adapter(name, config)
    weights = get_peft_model_state_dict(model, adapter_name=trained, save_embedding_layers=False)
    set_peft_model_state_dict(model, weights, adapter_name=name)
    disable_dropout(model)
    model.set_adapter(trained)
    return name
