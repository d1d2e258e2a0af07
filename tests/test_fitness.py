"""Models that no fast road is known for: what is sampled is what is scored, or they are refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tiny_models import QUERIES, VOCABULARY, causal_lm, policy, ragged, trainer
from tiny_runs import inputs, tiny
from torch import nn
from torch.testing import assert_close

from ppo_lab import AutoModelForCausalLMWithValueHead
from ppo_lab.assembly import longest_prompt
from ppo_lab.config import GenerationSection, LoraSection
from ppo_lab.errors import ConfigError
from ppo_lab.models.critic import Critic
from ppo_lab.models.fitness import steady_context, what_fails
from ppo_lab.models.loading import max_context
from ppo_lab.models.lora import wrap_lora
from ppo_lab.models.trunk import Trunk, UnfitModel
from ppo_lab.rollout import NoiseKey, Sampling, sample
from ppo_lab.types import Tokens

TWO_LAYERS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
OTHER_NAMES: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4, "intermediate_size": 32},
    "mamba2": {"num_heads": 4, "head_dim": 8, "state_size": 4, "n_groups": 2, "chunk_size": 4},
    "llama4_text": {"intermediate_size_mlp": 32, "head_dim": 8, "num_local_experts": 2},
    "mixtral": {"num_local_experts": 4},
    "minimax": {"head_dim": 8, "num_local_experts": 2},
    "rwkv": {"attention_hidden_size": 16},
    "openai-gpt": {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY},
    "xlnet": {"d_model": 16, "d_inner": 32, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY},
    "trocr": {
        "d_model": 16,
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 32,
        "vocab_size": VOCABULARY,
    },
}
OTHER_NAMES["falcon_mamba"] = OTHER_NAMES["mamba"]


def model(kind: str, **changes: Any) -> Any:
    """One of that kind with weights large enough that its distributions are not flat."""
    torch.manual_seed(0)
    settings = OTHER_NAMES.get(kind, {}) | changes
    whole = settings if "vocab_size" in settings else TWO_LAYERS | settings
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    config = transformers.AutoConfig.for_model(kind, **whole, **special)
    made = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return made


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "mamba2", "llama4_text", "mixtral"])
def test_what_is_sampled_token_by_token_is_what_one_pass_scores(kind: str) -> None:
    made = AutoModelForCausalLMWithValueHead(model(kind))
    assert made.trunk._fast is None, "the test would be of the fast road"
    sampling = Sampling(max_new_tokens=8, eos_ids=(), pad_id=0)
    tokens, seen = sample(made, QUERIES, sampling=sampling, noise=NoiseKey(0, 0))
    again = made.score(tokens, temperature=1.0)
    assert_close(seen.logprobs, again.logprobs, rtol=1e-4, atol=1e-4)
    assert_close(seen.values, again.values, rtol=1e-4, atol=1e-4)


REFUSED = {
    "rwkv": "takes no cache of transformers'",
    "openai-gpt": "takes no cache of transformers'",
    "xlnet": "takes no cache of transformers'",
    "trocr": "others when the text is padded on the left",
    "bert-generation": "change with the tokens that come after it",
    "bert": "its logits are not its head",
    "electra": "does not pass a few tokens as a decoder does",
    "minimax": "does not pass a few tokens as a decoder does",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_sampling_and_scoring_would_not_see_alike_is_refused(kind: str) -> None:
    made = model(kind)
    with pytest.raises(UnfitModel, match=REFUSED[kind]) as caught:
        AutoModelForCausalLMWithValueHead(made)
    assert isinstance(caught.value, ConfigError), "a message, no traceback"
    assert f"model: {type(made).__name__}: " in str(caught.value)


@pytest.mark.parametrize("spoilt", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_blamed_and_not_the_architecture(spoilt: float) -> None:
    made = causal_lm("llama")
    made.lm_head.weight.data[3, 0] = spoilt
    with pytest.raises(UnfitModel, match=r"model: lm_head\.weight holds NaN or infinity"):
        AutoModelForCausalLMWithValueHead(made)


def test_a_cache_that_is_not_read_is_noticed() -> None:
    trunk = Trunk(causal_lm())

    def forgetful(ids: Any, attention: Any, cache: Any) -> Any:
        return trunk._by_transformers(ids, attention[:, -ids.shape[1] :])

    words = trunk.decoder.get_input_embeddings().weight
    found = what_fails(forgetful, lambda: None, words, trunk.model.parameters())
    assert "token by token, are others" in found


@pytest.mark.parametrize(("share", "fit"), [(0.2, True), (0.8, False)])
def test_half_precision_may_send_some_tokens_to_other_experts(share: float, fit: bool) -> None:
    torch.manual_seed(0)
    states = torch.randn(2, 9, 16)

    def passes(ids: Any, attention: Any, cache: Any) -> Any:
        """Those of its columns, some of them far off whenever not all are passed."""
        begin = attention.shape[1] - ids.shape[1] if len(ids) == 2 else 3
        found = states[2 - len(ids) :, begin : begin + ids.shape[1]].clone()
        if ids.shape[1] < 9:
            off = (torch.arange(found.shape[1]) + begin) % 5 < 5 * share
            found[:, off] *= -1.0
        return found

    words = torch.zeros(64, 16, dtype=torch.bfloat16)
    half = [nn.Parameter(words)]
    assert (what_fails(passes, lambda: None, words, half) == "") is fit


@pytest.mark.parametrize(("off", "fit"), [(1e-5, True), (1e-3, False)])
def test_in_full_precision_states_agree_but_for_rounding(off: float, fit: bool) -> None:
    states = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))

    def passes(ids: Any, attention: Any, cache: Any) -> Any:
        """Those of its columns, off a little whenever not all are passed."""
        begin = attention.shape[1] - ids.shape[1] if len(ids) == 2 else 3
        found = states[2 - len(ids) :, begin : begin + ids.shape[1]]
        return found if ids.shape[1] == 9 else found * (1 + off)

    words = torch.zeros(64, 16)
    assert (what_fails(passes, lambda: None, words, [nn.Parameter(words)]) == "") is fit


def test_of_two_kinds_of_angles_the_one_that_turns_by_the_batch_first_bounds() -> None:
    long = {"rope_type": "longrope", "original_max_position_embeddings": 12}
    kinds = {"full_attention": {"rope_type": "dynamic"}, "sliding_attention": long}
    config = SimpleNamespace(rope_parameters=kinds, max_position_embeddings=24)
    config.get_text_config = lambda decoder: config
    assert steady_context(config) == 12


def test_a_text_may_be_as_long_as_its_angles_are_its_own() -> None:
    turned = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    trunk = Trunk(causal_lm("llama", max_position_embeddings=16, rope_parameters=turned))
    at_most = torch.ones(1, 17, dtype=torch.bool)
    at_most[0, 0] = False
    trunk.hidden(at_most.long(), at_most)
    beyond = torch.ones(1, 17, dtype=torch.bool)
    with pytest.raises(ConfigError, match="a text of 17 tokens: over 16"):
        trunk.hidden(beyond.long(), beyond)


@pytest.mark.parametrize(
    ("settings", "scale", "softcap"),
    [
        ({"logit_scale": 0.5}, 0.5, 0.0),
        ({"logits_scaling": 4.0}, 0.25, 0.0),
        ({"lm_head_multiplier": 3.0}, 3.0, 0.0),
        ({"logits_scaling": 4.0, "lm_head_multiplier": 3.0}, 0.75, 0.0),
        ({"final_logit_softcapping": 30.0, "logit_scale": None}, 1.0, 30.0),
    ],
    ids=str,
)
def test_a_head_scales_its_logits_as_the_config_has_it(
    settings: dict[str, Any], scale: float, softcap: float
) -> None:
    trunk = Trunk(causal_lm())
    trunk.model.config.update(settings)
    assert (trunk.head.scale, trunk.head.softcap) == (scale, softcap)


def test_adapters_go_on_all_of_mamba_that_takes_them() -> None:
    for targets in ([], ["all-linear"]):
        wrapped = wrap_lora(model("mamba"), LoraSection(r=2, target_modules=targets))
        made = AutoModelForCausalLMWithValueHead(wrapped)
        tokens = Tokens.pack([[5, 6, 7]], [[9, 4, 8]], pad_id=0)
        made.score(tokens, temperature=1.0).logprobs.sum().backward()
        named = wrapped.named_parameters()
        learns = {name: weight.grad for name, weight in named if "lora_B" in name}
        assert len(learns) == 4  # in_proj and x_proj of two layers
        assert all(grad is not None and grad.any() for grad in learns.values())


def test_a_head_multiplies_its_logits_where_others_divide() -> None:
    made = model("hyperclovax", logits_scaling=0.125)
    tokens = Tokens.pack([[5, 6, 7]], [[9, 4, 8]], pad_id=0)
    ours = AutoModelForCausalLMWithValueHead(made).score(tokens, temperature=1.0).logprobs
    theirs = made(input_ids=torch.tensor([[5, 6, 7, 9, 4, 8]])).logits.log_softmax(-1)
    assert_close(ours, theirs[:, [2, 3, 4], [9, 4, 8]])


def test_a_model_that_trains_stays_in_training() -> None:
    made = model("mixtral").train()
    AutoModelForCausalLMWithValueHead(made)
    assert all(module.training for module in made.modules())


NOISY = {"router_jitter_noise": 0.3}  # on what its experts read, while it trains


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_trained_is_what_is_sampled(checkpointing: bool) -> None:
    made = AutoModelForCausalLMWithValueHead(model("mixtral", **NOISY))
    still = made.score(ragged(), temperature=1.0)
    if checkpointing:
        made.gradient_checkpointing_enable()
    made.train()
    layers = made.trunk.decoder.layers
    assert all(layer.training is checkpointing for layer in layers)
    trained = made.score(ragged(), temperature=1.0)
    assert torch.equal(trained.logprobs, still.logprobs)
    assert torch.equal(trained.values, still.values)
    made.eval()
    assert not any(module.training for module in made.modules())


def test_who_cannot_recompute_activations_says_so() -> None:
    sizes = {"n_embd": 16, "dff": 32, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY}
    made = AutoModelForCausalLMWithValueHead(model("ctrl", **sizes))
    problem = r"^ppo\.gradient_checkpointing=true: CTRLLMHeadModel does not"
    with pytest.raises(ConfigError, match=problem):
        trainer(made, gradient_checkpointing=True)


def test_a_critic_learns_from_the_values_that_it_gave() -> None:
    kind = transformers.AutoModelForSequenceClassification
    noisy = kind.from_config(model("mixtral", **NOISY, num_labels=1).config)
    critic = Critic(noisy.eval())
    still = critic.values(ragged())
    assert torch.equal(critic.train().values(ragged()), still)


def test_a_reference_of_ones_own_is_looked_at_as_well() -> None:
    with pytest.raises(UnfitModel, match="padded on the left"):
        trainer(policy(), ref_model=model("trocr"))
    trainer(policy(), ref_model=causal_lm("gpt2")).reference.logprobs(ragged(), temperature=1.0)


LONGROPE = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
TURNED = {
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, 16),
    "longrope": (
        {"rope_type": "longrope", "original_max_position_embeddings": 16, **LONGROPE},
        64,
    ),
}


@pytest.mark.parametrize("rope", TURNED)
def test_texts_over_which_angles_are_those_of_a_batch_are_refused(rope: str) -> None:
    settings, most = TURNED[rope]
    turned = {"rope_parameters": settings | {"rope_theta": 1e4}, "max_position_embeddings": most}
    made = policy("llama", **turned)
    assert max_context(made.config) == 16
    rows = [([5] * 10, [6] * 6), ([7] * 3, [8] * 4)]
    alone = [made.score(packed(row), temperature=1.0).logprobs for row in rows]
    beside = made.score(packed(*rows), temperature=1.0).logprobs
    assert_close(beside[1, :4], alone[1][0])
    assert_close(beside[0], alone[0][0])
    with pytest.raises(ConfigError, match=r"18 tokens: over 16, .*LlamaForCausalLM"):
        made.score(packed(([5] * 10, [6] * 9), rows[1]), temperature=1.0)


def packed(*rows: tuple[list[int], list[int]]) -> Tokens:
    return Tokens.pack([query for query, _ in rows], [answer for _, answer in rows], pad_id=0)


def test_a_run_leaves_room_before_angles_are_those_of_a_batch(tmp_path: Path) -> None:
    config = tiny(tmp_path, generation={"max_new_tokens": 6})
    assert longest_prompt(config) == 90
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 16, **LONGROPE}
    inputs(tmp_path, rope_parameters=rope | {"rope_theta": 1e4})
    assert longest_prompt(config) == 10
    with pytest.raises(ConfigError, match=r"below the 16 tokens .*rope_type dynamic or longrope"):
        longest_prompt(replace(config, generation=GenerationSection(max_new_tokens=16)))
