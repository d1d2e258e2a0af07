"""vLLM in place of our own sampler: much faster on a GPU, and watched.

The engine samples; the policy then passes over its responses once, since log-probs of another
engine are not those that the ratio begins from. Both are compared every iteration: where they are
further apart than rounding explains, or where the engine's are nearer to the reference's than to
the policy's, the weights that were trained did not reach it.

Run against TRL 1.16's `VLLMGeneration` with the build of vLLM 0.31 for CPUs, where the engine is in
this process; on a GPU, or with a server, it has not been run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from ppo_lab import core
from ppo_lab.errors import ConfigError
from ppo_lab.models.lora import unmerged_exactly
from ppo_lab.rollout import NoiseKey, Sampling
from ppo_lab.types import Forward, Prompts, Tokens


class Engine(Protocol):
    """What is used of TRL's `VLLMGeneration`."""

    def sync_weights(self) -> None:
        """Send the policy's weights, its adapter merged into them, to the engine."""

    def generate(
        self, prompts: list[list[int]], images: None, num_generations: int
    ) -> tuple[Any, ...]:
        """Prompts, responses, and the log-probs of their tokens, one a token in a list."""


class VLLMSampler:
    """Samples by an engine, and gives what our own sampler gives.

    `max_gap` is the largest mean |difference| between the engine's log-probs and the policy's, nats
    per token. The engine's random numbers are its own: a run that is resumed is not the same run to
    the last bit.
    """

    def __init__(self, trainer: Any, engine: Engine, *, max_gap: float) -> None:
        self.trainer, self.engine, self.max_gap = trainer, engine, max_gap

    @torch.no_grad()
    def __call__(
        self, prompts: Prompts, sampling: Sampling, noise: NoiseKey
    ) -> tuple[Tokens, Forward]:
        """Responses, with the policy's log-probs and values of them.

        Raises:
            ConfigError: the engine does not sample from the policy.
        """
        trainer = self.trainer
        tokens, theirs = self._responses(prompts, sampling)
        at = {"temperature": sampling.logprob_temperature}
        seen = trainer.in_passes(tokens, trainer.policy.score, **at, entropy=True)
        if sampling.takes_all:  # else the engine's are of what top-k and top-p left
            ref = trainer.in_passes(tokens, trainer.reference.logprobs, **at)
            gap = core.masked_mean((theirs - seen.logprobs).abs(), tokens.mask)
            to_reference = core.masked_mean((theirs - ref).abs(), tokens.mask)
            trainer.noted["ppo/policy/sampler_gap"] = float(gap)
            check_gap(float(gap), float(to_reference), max_gap=self.max_gap)
        return tokens, seen

    def _responses(
        self, prompts: Prompts, sampling: Sampling
    ) -> tuple[Tokens, Float[Tensor, "batch time"]]:
        """The engine's responses with its own log-probs, of all processes."""
        processes, n = self.trainer.processes, len(prompts)
        own = prompts[processes.evened(n)]  # a server takes as many from each process
        with unmerged_exactly(self.trainer.policy.pretrained_model):
            self.engine.sync_weights()
        _, responses, logprobs, _ = self.engine.generate(own.ids, None, 1)
        tokens = Tokens.pack(
            own.ids,
            responses,
            pad_id=sampling.pad_id,
            ended=[self._has_ended(ids, sampling) for ids in responses],
        ).to(self.trainer.device)
        theirs = torch.zeros(tokens.mask.shape)
        for row, of_tokens in zip(theirs, logprobs, strict=True):
            row[: len(of_tokens)] = torch.tensor([_first(numbers) for numbers in of_tokens])
        seen = Forward(theirs.to(self.trainer.device), torch.zeros_like(theirs))
        tokens, seen = processes.gather(tokens, n), processes.gather(seen, n)
        return tokens, seen.logprobs

    def _has_ended(self, ids: Sequence[int], sampling: Sampling) -> bool:
        """Whether a stop condition ended the response, and not its length alone."""
        if len(ids) < sampling.max_new_tokens or ids[-1] in sampling.eos_ids:
            return True
        stops, written = sampling.stop_strings, self.trainer.written
        return any(s in written(ids) and s not in written(ids[:-1]) for s in stops)


def check_gap(gap: float, to_reference: float, *, max_gap: float) -> None:
    """Nothing, if the engine's log-probs are the policy's but for rounding.

    `gap` is their mean |difference| from the policy's, `to_reference` from the reference's, in
    nats per token.

    Raises:
        ConfigError: they are not; the message says which sign of what.
    """
    if to_reference < gap and gap > max_gap / 10:
        raise ConfigError(
            f"generation=vllm: the engine's log-probs are {to_reference:.3g} nats a token from the "
            f"reference's and {gap:.3g} from the policy's: it still samples from the model that "
            "training began with, so that the adapter's weights do not reach it"
        )
    if not gap <= max_gap:
        raise ConfigError(
            f"generation=vllm: the engine's log-probs are {gap:.3g} nats a token from the "
            f"policy's, more than generation.max_gap={max_gap:g}: it does not sample from the "
            "policy (another precision, tokenizer or revision, or weights that did not reach it)"
        )


def engine_for(
    trainer: Any,
    section: Any,
    sampling: Sampling,
    *,
    context: int,
    trust_remote_code: bool = False,
) -> Engine:
    """TRL's `VLLMGeneration` of the trainer's policy, as the section says; `context` is the longest
    prompt and response, tokens.
    """
    from ppo_lab.trl_parts import vllm_generation

    return vllm_generation(
        trainer.policy.pretrained_model,
        trainer.processes.accelerator,
        trainer.tokenizer,
        mode="server" if section.server else "colocate",
        server_base_url=section.server or None,
        gpu_memory_utilization=section.gpu_memory,
        enable_sleep_mode=section.sleep,
        max_model_length=context,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_completion_length=sampling.max_new_tokens,
        logprobs=0,
        generation_kwargs=generation_kwargs(sampling),
        trust_remote_code=trust_remote_code,
    )


def generation_kwargs(sampling: Sampling) -> dict[str, Any]:
    """The ends of a response in vLLM's words; what ends it stays part of it."""
    # Special tokens are text here, or a stop string that is one would never be found.
    stops = {
        "stop": list(sampling.stop_strings),
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
    }
    return {
        "stop_token_ids": list(sampling.eos_ids),
        "ignore_eos": True,  # the model's own: all that ends a response is named
        "min_tokens": sampling.min_new_tokens,
        **(stops if sampling.stop_strings else {}),
    }


def _first(numbers: Sequence[float | None]) -> float:
    return numbers[0] if numbers[0] is not None else float("nan")
