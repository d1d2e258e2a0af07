"""The FLOPs of the iterations that a trainer really made."""

from __future__ import annotations

from typing import Any

from ppo_lab.plan.architecture import Architecture, architecture_of
from ppo_lab.plan.work import (
    Amount,
    forward_flops,
    full_kl_flops,
    iteration_flops,
    learning_flops,
)
from ppo_lab.types import Tokens


class Meter:
    """Counts what a policy, and a critic of its own, compute in an iteration."""

    def __init__(self, policy: Any, critic: Any = None, *, full_kl: bool = False) -> None:
        """Sizes are read off once; nothing of them changes while training. `full_kl`: whether the
        penalty is the exact KL.
        """
        self.policy = architecture_of(policy.pretrained_model)
        self.trunk = policy.trunk
        self.full_kl = full_kl
        self.critic: Architecture | None = None if critic is None else architecture_of(critic.model)

    def flops(
        self, tokens: Tokens, *, epochs: int, critic_epochs: int, policy_learns: bool = True
    ) -> float:
        """FLOPs of an iteration on these tokens, with as many epochs as were made, `critic_epochs`
        of them with a critic of its own. Where the policy does not learn, a value head on its trunk
        still asks for a forward pass.
        """
        prompts = tokens.query_mask.sum(1).tolist()
        amount = Amount.of(zip(prompts, tokens.lengths.tolist(), strict=True))
        amount = amount._replace(scored=int(tokens.mask.sum()))
        cached = bool(self.trunk.kept_below)
        found = iteration_flops(
            self.policy, amount, epochs=epochs if policy_learns else 0, cached=cached
        )
        if self.critic is None and not policy_learns:
            share = self.policy.reached_share if cached else 1.0
            found += epochs * forward_flops(self.policy, amount._replace(scored=0), share=share)
        if self.full_kl:
            found += full_kl_flops(self.policy, amount, cached=cached)
        if self.critic is not None:
            found += forward_flops(self.critic, amount)
            found += critic_epochs * learning_flops(self.critic, amount)
        return found
