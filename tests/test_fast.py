"""The fast roads compute what the plain ones do, and step aside where they would not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import BloomConfig, BloomForCausalLM

from ppo_lab.bench.equality import _policy as adapted_policy
from ppo_lab.models.fast import bloom
from ppo_lab.models.fast.bloom import FastBloom, KeysAndValues, Places
from ppo_lab.models.fast.draws import BLOCK, draw_by_blocks
from ppo_lab.models.fast.products import is_plain, linear, product
from ppo_lab.models.fast.sweep import TILE, swept_logprobs
from ppo_lab.models.logprobs import Head, from_logits, token_logprobs
from ppo_lab.models.trunk import Trunk
from ppo_lab.rollout import NoiseKey, Sampling, draw, sample


def tiny_bloom(**changed: Any) -> BloomForCausalLM:
    torch.manual_seed(0)
    settings = {"vocab_size": 97, "hidden_size": 48, "n_layer": 2, "n_head": 3, **changed}
    config = BloomConfig(
        hidden_dropout=0.0, attention_dropout=0.0, initializer_range=0.2, **settings
    )
    model = BloomForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    return model


def ragged_ids() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.arange(3 * 11).view(3, 11) * 5 % 97
    attention = torch.ones_like(ids, dtype=torch.bool)
    attention[1, :4] = False
    attention[2, -3:] = False
    return ids, attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changed", [{}, {"apply_residual_connection_post_layernorm": True}])
def test_the_fast_bloom_gives_transformers_hidden_states(dtype: Any, changed: dict) -> None:
    trunk = Trunk(tiny_bloom(**changed).to(dtype))
    ids, attention = ragged_ids()
    assert trunk._fast is not None
    with torch.no_grad():
        ours, theirs = trunk.hidden(ids, attention), trunk._by_transformers(ids, attention)
    tolerance = 2e-5 if dtype == torch.float32 else 0.1
    assert_close(ours[attention], theirs[attention], atol=tolerance, rtol=tolerance)


def test_a_cache_of_its_own_continues_where_the_prompt_ended() -> None:
    trunk = Trunk(tiny_bloom())
    ids, attention = ragged_ids()
    attention[2] = True
    cache = trunk.new_cache(11)
    assert isinstance(cache, KeysAndValues)
    with torch.no_grad():
        whole = trunk.hidden(ids, attention)
        parts = [trunk.hidden(ids[:, :6], attention[:, :6], cache=cache)]
        parts += [
            trunk.hidden(ids[:, i : i + 1], attention[:, : i + 1], cache=cache)
            for i in range(6, 11)
        ]
    assert_close(torch.cat(parts, 1)[attention], whole[attention], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("adapter", ["on", "off"])
def test_gradients_of_the_adapter_are_those_of_peft(adapter: str) -> None:
    def gradients(fast: bool) -> dict[str, torch.Tensor]:
        model = get_peft_model(tiny_bloom(), LoraConfig(r=4, task_type="CAUSAL_LM"))
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        trunk = Trunk(model)
        assert trunk._fast is not None
        trunk._fast = trunk._fast if fast else None
        ids, attention = ragged_ids()
        if adapter == "off":
            with model.disable_adapter(), torch.no_grad():
                return {"hidden": trunk.hidden(ids, attention)[attention]}
        trunk.hidden(ids, attention)[attention].square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    ours, theirs = gradients(fast=True), gradients(fast=False)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_close(
            ours[name], theirs[name], rtol=1e-4, atol=1e-4 * float(theirs[name].abs().max())
        )


def test_a_trunk_that_the_fast_road_gets_wrong_does_not_take_it(monkeypatch: Any) -> None:
    monkeypatch.setattr(bloom, "_slopes", lambda heads: torch.ones(heads))
    assert Trunk(tiny_bloom())._fast is None


def test_adapters_that_the_fast_road_does_not_know_keep_to_the_plain_one() -> None:
    for settings in ({"use_dora": True}, {"lora_dropout": 0.1}):
        model = get_peft_model(tiny_bloom(), LoraConfig(r=2, task_type="CAUSAL_LM", **settings))
        assert not FastBloom.fits(Trunk(model).decoder)
    assert not is_plain(torch.nn.Identity())


def test_gradient_checkpointing_is_transformers_own() -> None:
    model = tiny_bloom()
    trunk = Trunk(model)
    model.gradient_checkpointing_enable()
    model.train()
    assert trunk._fast is not None
    assert not trunk._fast.usable()
    assert not isinstance(trunk.new_cache(4), KeysAndValues)


def test_a_product_is_that_of_a_linear_layer_in_either_layout() -> None:
    layer, x = torch.nn.Linear(7, 5), torch.randn(3, 7)
    with torch.no_grad():
        assert_close(product(x, layer.weight, layer.bias), layer(x))
        assert_close(product(x, layer.weight, None), layer(x) - layer.bias)
    assert_close(linear(layer, x), layer(x))


def test_rows_go_to_their_places_and_back_with_their_gradients() -> None:
    real = torch.arange(40).view(4, 10) % 10 > 0
    places = Places(real)
    kept = torch.zeros(40, dtype=torch.bool).index_fill(0, places.kept, True)
    assert len(places.kept) == 40
    assert bool(kept[real.flatten()].all())
    real[:, 1] = False
    assert len(Places(real).kept) == 32
    real[:, 2:] = False
    real[0] = True
    places = Places(real)
    assert len(places.kept) == 32
    rows = torch.randn(32, 2, dtype=torch.float64, requires_grad=True)
    spread = places.spread(rows)
    assert_close(places.gather(spread), rows)
    elsewhere = torch.ones(40, dtype=torch.bool).index_fill(0, places.kept, False)
    assert bool((spread[elsewhere] == 0).all())
    assert torch.autograd.gradcheck(places.spread, (rows,))
    assert torch.autograd.gradcheck(places.gather, (spread.detach().requires_grad_(),))


@pytest.mark.parametrize("scale", [1.0, 1.7])
@pytest.mark.parametrize("biased", [False, True])
def test_one_sweep_gives_log_softmax_and_its_gradient(scale: float, biased: bool) -> None:
    torch.manual_seed(0)
    vocabulary = 2 * TILE + 17
    weight, bias = torch.randn(vocabulary, 24) * 0.3, torch.randn(vocabulary) if biased else None
    targets = torch.tensor([0, TILE, vocabulary - 1, 5, 5])
    hidden = torch.randn(5, 24, requires_grad=True)
    ours = swept_logprobs(hidden, weight, bias, targets, scale=scale)
    assert ours is not None
    (mine,) = torch.autograd.grad((ours * torch.arange(5)).sum(), hidden)
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    plain = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    (theirs,) = torch.autograd.grad((plain * torch.arange(5)).sum(), hidden)
    assert_close(ours, plain, atol=2e-5, rtol=1e-5)
    assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


def test_a_sweep_that_overflows_gives_way_to_the_plain_road() -> None:
    weight = torch.zeros(2**16, 4)
    weight[7] = 100.0
    hidden, targets = torch.ones(2, 4), torch.tensor([3, 7])
    with torch.no_grad():
        assert swept_logprobs(hidden, weight, None, targets, scale=1.0) is None
        logprobs, _ = token_logprobs(hidden, Head(weight), targets, temperature=1.0)
    assert_close(logprobs, torch.tensor([-400.0, 0.0]))


def test_a_head_that_is_trained_gets_its_gradient() -> None:
    weight = (torch.randn(2**16, 8) * 0.1).requires_grad_()
    hidden, targets = torch.randn(3, 8), torch.tensor([1, 2, 3])
    logprobs, _ = token_logprobs(hidden, Head(weight), targets, temperature=1.0)
    logprobs.sum().backward()
    assert weight.grad is not None
    assert float(weight.grad[1].abs().max()) > 0


def test_drawing_by_blocks_draws_what_the_whole_distribution_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    for vocabulary in (3 * BLOCK, 3 * BLOCK + 5, 40):
        logits = 4 * torch.randn(200, vocabulary, generator=generator)
        uniforms = torch.rand(200, generator=generator, dtype=torch.float64)
        uniforms[:2] = torch.tensor([0.0, 1 - 2**-53])
        ours = draw_by_blocks(logits, uniforms)
        tokens = draw(logits, uniforms, sampling=Sampling(1, (), 0))
        # Only a number within rounding of a border between two tokens may fall on its other side.
        assert int((ours.tokens != tokens).sum()) <= 1
        logprobs, entropy = from_logits(logits, ours.tokens, temperature=1.0, entropy=True)
        assert_close(ours.logprobs, logprobs, atol=1e-5, rtol=1e-5)
        assert_close(ours.entropy, entropy, atol=1e-4, rtol=1e-4)


def test_a_block_without_mass_is_never_drawn_from() -> None:
    logits = torch.full((4, 4 * BLOCK), -1e4)
    logits[:, BLOCK + 3] = 0.0
    drawn = draw_by_blocks(logits, torch.tensor([0.0, 0.5, 1 - 2**-24, 1 - 2**-53]))
    assert drawn.tokens.tolist() == [BLOCK + 3] * 4


def test_batches_split_or_whole_draw_the_same_tokens_of_a_large_vocabulary() -> None:
    policy = adapted_policy(70_000, torch.float32)
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]

    def drawn(size: int) -> torch.Tensor:
        sampling = Sampling(max_new_tokens=5, eos_ids=(), pad_id=0, batch_size=size)
        return sample(policy, prompts, sampling=sampling, noise=NoiseKey(3, 1))[0].responses

    assert_close(drawn(0), drawn(3))
