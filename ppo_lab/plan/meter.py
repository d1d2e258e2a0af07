"""The FLOPs of the iterations that a trainer really made."""

from __future__ import annotations

from typing import Any

from ppo_lab.plan.architecture import Architecture, architecture_of
from ppo_lab.plan.work import Amount, forward_flops, iteration_flops, learning_flops
from ppo_lab.types import Tokens


class Meter:
    """Counts what a policy, and a critic of its own, compute in an iteration."""

    def __init__(self, policy: Any, critic: Any = None) -> None:
        """Sizes are read off once; nothing of them changes while training."""
        self.policy = architecture_of(policy.pretrained_model)
        self.trunk = policy.trunk
        self.critic: Architecture | None = None if critic is None else architecture_of(critic.model)

    def flops(
        self,
        tokens: Tokens,
        *,
        epochs: int,
        critic_epochs: int,
        policy_learns: bool = True,
        exact_kl: bool = False,
    ) -> float:
        """FLOPs of an iteration on these tokens, with as many epochs as were made, `critic_epochs`
        of them with a critic of its own. While the policy does not learn, a value head's epochs
        pass through its trunk all the same; `exact_kl` takes both models once more.
        """
        prompts = tokens.query_mask.sum(1).tolist()
        amount = Amount.of(zip(prompts, tokens.lengths.tolist(), strict=True))
        amount = amount._replace(scored=int(tokens.mask.sum()))
        cached = bool(self.trunk.kept_below)
        found = iteration_flops(
            self.policy,
            amount,
            epochs=epochs if policy_learns else 0,
            cached=cached,
            exact_kl=exact_kl,
        )
        if self.critic is not None:
            found += forward_flops(self.critic, amount)
            found += critic_epochs * learning_flops(self.critic, amount)
        elif not policy_learns:
            share = self.policy.reached_share if cached else 1.0
            found += epochs * forward_flops(self.policy, amount._replace(scored=0), share=share)
        return found
