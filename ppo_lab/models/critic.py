"""A critic of its own: a sequence classifier that reads every response token."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ppo_lab.errors import ConfigError
from ppo_lab.models.loading import disable_dropout
from ppo_lab.models.policy import (
    enable_checkpointing,
    looked_at,
    response_states,
    spread,
    train_checkpoints_alone,
    under,
)
from ppo_lab.models.trunk import Trunk
from ppo_lab.types import Tokens


class Critic(nn.Module):
    """A sequence classifier whose score of the text before each response token is that token's
    value, times `scale`.

    Started from a reward model it knows from the first iteration on what will be scored well,
    which a new value head has to learn. `scale` is the reward's weight: a task that is turned
    round turns the critic round with it. `index` is the output that is the score, the only one
    that is kept.

    Source: Stiennon et al. 2020, arXiv:2009.01325, section 3.4: a value function of its own,
        initialised to the reward model.
    """

    def __init__(self, model: Any, *, index: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        check_decoder(model)
        _keep_one_output(model, index)
        disable_dropout(model)  # or values would differ between collection and updates
        self.model: Any = model.requires_grad_(True)
        self.trunk = Trunk(model)
        self.scale = scale

    def values(self, tokens: Tokens) -> Float[Tensor, "batch time"]:
        """The value of the state that predicts each response token; zeros on padding.

        Which tokens are read follows from lengths alone: what pads, and on which side, is not
        looked at.
        """
        hidden = looked_at(response_states(self.trunk, tokens), tokens)
        head = self.model.score
        values = self.scale * head(hidden.to(head.weight.dtype)).float().squeeze(-1)
        return spread(values, tokens)

    def train(self, mode: bool = True) -> Self:
        """Set training mode; of the model under it only what recomputes activations follows."""
        super().train(mode)
        train_checkpoints_alone(self.model)
        return self

    def gradient_checkpointing_enable(self) -> None:
        """Recompute activations in the backward pass."""
        enable_checkpointing(self.model)

    def save_pretrained(
        self, folder: str | Path, *, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Write the classifier as safetensors; `AutoModelForSequenceClassification` loads it.

        The scale is not in it: the saved model gives raw scores, as the reward model did.
        `state_dict` is that of the whole critic, where it is sharded.
        """
        state = None if state_dict is None else under("model.", state_dict)
        self.model.save_pretrained(folder, state_dict=state)


def check_decoder(model: Any) -> None:
    """Refuse what cannot read a text token by token.

    Raises:
        ConfigError: an encoder, whose states see the tokens to come, or no classifier.
    """
    # transformers calls the heads of decoders, and theirs alone, `score`.
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise ConfigError(
            f"critic: {type(model).__name__} is no decoder with a linear score head; a critic "
            "reads a text from left to right, as a language model does: use critic=head"
        )


def check_shared_vocabulary(path: str, critic_tokenizer: Any, tokenizer: Any, rows: int) -> None:
    """Refuse a critic that would take the policy's tokens for others.

    `rows` are those of the critic's embedding.

    Raises:
        ConfigError: saying by how much the vocabularies differ.
    """
    theirs, ours = critic_tokenizer.get_vocab(), tokenizer.get_vocab()
    differing = sum(theirs.get(token) != i for token, i in ours.items())
    if differing:
        raise ConfigError(
            f"critic.path={path}: {differing} of the policy's {len(ours)} tokens are others in its "
            "tokenizer; a critic reads the policy's tokens, so both must share one: use critic=head"
        )
    if rows <= max(ours.values()):
        raise ConfigError(
            f"critic.path={path}: its embedding has {rows} rows for {len(ours)} tokens; "
            "this tokenizer is not the model's"
        )


def _keep_one_output(model: Any, index: int) -> None:
    """Make the head give the one score, so that what is saved is a classifier of one label."""
    full = model.score
    if full.out_features == 1:
        return
    bias, weight = full.bias is not None, full.weight
    head = nn.Linear(full.in_features, 1, bias=bias, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        head.weight.copy_(weight[index : index + 1])
        if bias:
            head.bias.copy_(full.bias[index : index + 1])
    model.score = head
    model.config.num_labels = model.num_labels = 1
