"""The gate before any ratio: what is fast must compute what transformers, PEFT and log_softmax do.

On a tiny model of the same architecture with an adapter that changes it, log-probs, values and the
adapter's gradients of this project's policy are compared with those taken plainly. The reference,
and a generation that came before, are of that policy while its adapter changed nothing, as when
training begins: the one must not see the adapter, of the other nothing may be left. Errors are
max |a - b| / max |b|.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppo_lab.bench.shapes import Shape
from ppo_lab.models.policy import AutoModelForCausalLMWithValueHead
from ppo_lab.models.reference import Reference
from ppo_lab.rollout import NoiseKey, Sampling, sample
from ppo_lab.types import Forward, Tokens

TOLERANCE = {"fp32": 1e-5, "bf16": 5e-2}
ON_GPU = {"fp32": 1e-4, "bf16": 5e-2}  # products sum in other orders; 1e-4 has not been tried
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VOCABULARIES = (997, 250880)
TEMPERATURE = 0.7


@dataclass(frozen=True)
class Gate:
    """The relative errors by what was compared, and whether all are within the tolerance."""

    precision: str
    tolerance: float
    errors: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether ratios may be shown."""
        return all(error <= self.tolerance for error in self.errors.values())


def gate(precision: str, architecture: str = "bloom", device: str = "cpu") -> Gate:
    """Both roads on a small vocabulary and on BLOOM's own, on the device that is measured."""
    errors: dict[str, float] = {}
    for vocabulary in VOCABULARIES:
        for name, error in _errors(precision, vocabulary, architecture, device).items():
            errors[f"{name}/{architecture}/{vocabulary}"] = error
    tolerance = (TOLERANCE if device == "cpu" else ON_GPU)[precision]
    return Gate(precision, tolerance, errors)


def _errors(precision: str, vocabulary: int, architecture: str, device: str) -> dict[str, float]:
    policy = tiny_policy(vocabulary, DTYPES[precision], architecture, adapted=False).to(device)
    reference = Reference(policy)
    _sampled(policy)
    change_adapter(policy)
    plain = copy.deepcopy(policy.pretrained_model)
    tokens, seen = _sampled(policy)
    weights = torch.randn(tokens.mask.shape, generator=torch.Generator().manual_seed(1))
    weights = weights.to(device)
    forward = policy.score(tokens, temperature=TEMPERATURE)
    ((forward.logprobs + forward.values) * weights).sum().backward()
    logprobs, values = _plainly(plain, policy.v_head, tokens)
    policy.v_head.zero_grad()
    ((logprobs + values) * weights).sum().backward()
    with torch.no_grad(), plain.disable_adapter():
        unadapted, _ = _plainly(plain, policy.v_head, tokens)
    found = {
        "log-probs": _error(forward.logprobs, logprobs),
        "values": _error(forward.values, values),
        "log-probs of sampling": _error(seen.logprobs, logprobs),
        "values of sampling": _error(seen.values, values),
        "reference": _error(reference.logprobs(tokens, temperature=TEMPERATURE), unadapted),
    }
    return {**found, "gradients": _gradient_error(policy.pretrained_model, plain)}


def _sampled(policy: AutoModelForCausalLMWithValueHead) -> tuple[Tokens, Forward]:
    """Responses to prompts of several lengths."""
    return sample(
        policy,
        [list(range(5, 5 + n)) for n in (16, 9, 12, 3, 16, 5, 7, 11)],
        sampling=Sampling(max_new_tokens=18, eos_ids=(), pad_id=0, temperature=TEMPERATURE),
        noise=NoiseKey(0, 0),
    )


def tiny_policy(
    vocabulary: int, dtype: torch.dtype, architecture: str = "bloom", *, adapted: bool = True
) -> AutoModelForCausalLMWithValueHead:
    """A policy of random weights, its adapter's included if that is to change it."""
    from peft import LoraConfig
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shape = Shape("gate", 64, 3, 4, vocabulary, architecture=architecture)
    config = AutoConfig.for_model(**shape.model(), initializer_range=0.1, pad_token_id=0)
    adapter = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=list(shape.family.targets),
        fan_in_fan_out=architecture == "gpt2",
    )
    model: Any = AutoModelForCausalLM.from_config(config)
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(model.to(dtype), peft_config=adapter)
    if adapted:
        change_adapter(policy)
    return policy


@torch.no_grad()
def change_adapter(policy: AutoModelForCausalLMWithValueHead) -> None:
    """Give the adapter weights with which it changes the model, as training would."""
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.3)


def _plainly(model: Any, v_head: Any, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Log-probs and values of the responses by transformers' own forward."""
    ids = torch.cat([tokens.queries, tokens.responses], 1)
    attention = torch.cat([tokens.query_mask, tokens.attended], 1).long()
    inputs = {"input_ids": ids, "attention_mask": attention}
    if model.config.model_type != "bloom":  # ALiBi counts by the mask
        inputs["position_ids"] = (attention.cumsum(1) - 1).clamp(min=0)
    out = model(**inputs, output_hidden_states=True, use_cache=False)
    start = tokens.queries.shape[1] - 1
    logits = out.logits[:, start:-1].float() / TEMPERATURE
    logprobs = logits.log_softmax(-1).gather(2, tokens.responses[..., None]).squeeze(2)
    return logprobs, v_head(out.hidden_states[-1][:, start:-1])


def _gradient_error(ours: Any, plain: Any) -> float:
    theirs = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    mine = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert theirs.keys() == mine.keys() != set(), "gradients of different parameters"
    return max(_error(mine[name], theirs[name]) for name in theirs)


def _error(ours: Tensor, plain: Tensor) -> float:
    scale = plain.detach().abs().max().clamp(min=1e-30)
    return float((ours.detach() - plain.detach()).abs().max() / scale)
