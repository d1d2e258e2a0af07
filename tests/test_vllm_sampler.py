"""Sampling by another engine, tried with a stand-in for TRL's `VLLMGeneration`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from tiny_models import EOS, PAD, QUERIES, policy, tokenizer, train_adapter

from ppo_lab import PPOConfig, PPOTrainer
from ppo_lab.errors import ConfigError
from ppo_lab.metrics import METRICS
from ppo_lab.models.lora import unmerged_exactly
from ppo_lab.rollout import NoiseKey, Sampling, sample
from ppo_lab.types import Prompts, Scores
from ppo_lab.vllm_sampler import VLLMSampler, check_gap, engine_for, generation_kwargs

WHOLE = Sampling(max_new_tokens=6, eos_ids=(EOS,), pad_id=PAD, temperature=0.8)


class StandIn:
    """Samples from the policy as it was when its weights were last sent, in lists as TRL does."""

    def __init__(self, model: Any, *, synchronises: bool = True) -> None:
        self.model, self.synchronises, self.syncs = model, synchronises, 0
        self.weights = self._copy()

    def _copy(self) -> dict[str, torch.Tensor]:
        return {k: v.detach().clone() for k, v in self.model.state_dict().items()}

    def sync_weights(self) -> None:
        self.syncs += 1
        if self.synchronises:
            self.weights = self._copy()

    def generate(self, prompts: list[list[int]], images: None, num_generations: int) -> tuple:
        assert images is None
        assert num_generations == 1
        now = self._copy()
        self.model.load_state_dict(self.weights)
        tokens, seen = sample(self.model, prompts, sampling=WHOLE, noise=NoiseKey(5, self.syncs))
        self.model.load_state_dict(now)
        rows = tokens.response_lists()
        logprobs = [
            [[float(x)] for x in row[: len(ids)]]
            for row, ids in zip(seen.logprobs, rows, strict=True)
        ]
        return prompts, rows, logprobs, None


def trainer(*, synchronises: bool = True) -> tuple[PPOTrainer, StandIn]:
    made = PPOTrainer(
        PPOConfig(batch_size=4, learning_rate=0.05),
        policy("llama", lora=True),
        tokenizer=tokenizer(),
        sampling=WHOLE,
        reward=lambda prompts, completions: Scores(torch.linspace(-1, 1, len(prompts))),
        device="cpu",
    )
    engine = StandIn(made.policy, synchronises=synchronises)
    made.sampler = VLLMSampler(made, engine, max_gap=0.1)
    return made, engine


def test_an_iteration_learns_from_another_engines_responses() -> None:
    made, engine = trainer()
    prompts = Prompts([list(q) for q in QUERIES], [""] * len(QUERIES))
    for number in range(3):
        metrics = made.iteration(prompts)
        assert engine.syncs == number + 1
        assert metrics["ppo/policy/sampler_gap"] < 1e-5
        assert metrics["ppo/policy/first_minibatch_ratio_error"] < 1e-4
        assert metrics["ppo/policy/entropy"] > 0
    assert metrics["kl"] != 0
    assert "ppo/policy/sampler_gap" in METRICS


def test_the_last_token_may_complete_a_stop_string() -> None:
    made, _ = trainer()
    prompts = Prompts([list(q) for q in QUERIES], [""] * len(QUERIES))
    free, _ = made.sampler(prompts, WHOLE, NoiseKey(0, 0))
    full = free.lengths == WHOLE.max_new_tokens
    assert full.any()
    for token in (-1, -3):  # the last one of a whole response, and one before it
        row = free.response_lists()[int(full.nonzero()[0])]
        stopping = replace(WHOLE, stop_strings=(made.tokenizer.decode(row[token]),))
        assert made.sampler._has_ended(row, stopping) is (token == -1)
        assert made.sampler._has_ended(row[:token], stopping) is True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("exactly", [True, False])
def test_weights_that_are_merged_to_be_sent_stay_the_references(
    exactly: bool, dtype: torch.dtype
) -> None:
    """PEFT's own way back leaves others."""
    made = policy("llama", lora=True)
    train_adapter(made)
    model = made.pretrained_model.to(dtype)
    base = {n: p.clone() for n, p in model.named_parameters() if "lora" not in n}
    addresses = [p.data_ptr() for p in model.parameters()]
    for _ in range(5):
        with unmerged_exactly(model) if exactly else nullcontext():
            model.merge_adapter()
            merged = [n for n, p in model.named_parameters() if n in base and (p != base[n]).any()]
            model.unmerge_adapter()
    assert merged
    left = [n for n, p in model.named_parameters() if n in base and (p != base[n]).any()]
    assert bool(left) is not exactly
    assert [p.data_ptr() for p in model.parameters()] == addresses


def test_an_adapter_that_does_not_reach_the_engine_stops_the_run() -> None:
    made, _ = trainer(synchronises=False)
    prompts = Prompts([list(q) for q in QUERIES], [""] * len(QUERIES))
    made.iteration(prompts)
    with pytest.raises(ConfigError, match="still samples from the model that training began with"):
        for _ in range(5):
            made.iteration(prompts)


def test_log_probs_too_far_apart_stop_the_run() -> None:
    check_gap(0.02, 0.5, max_gap=0.1)
    check_gap(0.005, 0.001, max_gap=0.1)  # before the first update both are rounding
    with pytest.raises(ConfigError, match=r"0.3 nats a token .* generation.max_gap=0.1"):
        check_gap(0.3, 0.5, max_gap=0.1)
    with pytest.raises(ConfigError, match="more than"):
        check_gap(float("nan"), 0.5, max_gap=0.1)


def test_ends_of_a_response_are_said_in_the_engines_words() -> None:
    assert generation_kwargs(WHOLE) == {
        "stop_token_ids": [EOS],
        "ignore_eos": True,  # the model's own, where another is named
        "min_tokens": 0,
    }
    stopping = Sampling(4, (), PAD, stop_strings=("END",))
    assert generation_kwargs(stopping)["stop"] == ["END"]
    assert generation_kwargs(stopping)["skip_special_tokens"] is False, "one may be what stops"
    assert generation_kwargs(stopping)["ignore_eos"] is True


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_samples_from_the_policy(assets: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ppo_lab.config import LoraSection, VLLMGeneration
    from ppo_lab.models.lora import wrap_lora
    from ppo_lab.models.policy import AutoModelForCausalLMWithValueHead

    path = str(assets / "stories260K")
    model = wrap_lora(AutoModelForCausalLM.from_pretrained(path), LoraSection(r=4))
    words = AutoTokenizer.from_pretrained(path)
    made = PPOTrainer(
        PPOConfig(batch_size=8, learning_rate=1e-3),
        AutoModelForCausalLMWithValueHead(model),
        tokenizer=words,
        sampling=Sampling(max_new_tokens=24, eos_ids=(1,), pad_id=0),
        reward=lambda prompts, completions: Scores(
            torch.tensor([float(len(c)) for c in completions])
        ),
    )
    section = VLLMGeneration(gpu_memory=0.2)
    engine = engine_for(made, section, made.sampling, context=64)
    made.sampler = VLLMSampler(made, engine, max_gap=section.max_gap)
    prompts = Prompts([words("Once upon a time")["input_ids"]] * 8, ["Once upon a time"] * 8)
    for _ in range(3):
        assert made.iteration(prompts)["ppo/policy/sampler_gap"] < 0.1
