"""The fast roads compute what the plain ones do, and step aside where they would not."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from ppo_lab.bench.equality import tiny_policy
from ppo_lab.config import LoraSection
from ppo_lab.errors import ConfigError
from ppo_lab.models.choice import FAN, LEVELS, choose
from ppo_lab.models.fast import draws, families, gemm, products
from ppo_lab.models.fast.attention import KeysAndValues, attend, blocks_of, last_columns, parted
from ppo_lab.models.fast.decoder import FastDecoder
from ppo_lab.models.fast.draws import draw_from
from ppo_lab.models.fast.elementwise import ACTIVATIONS, LARGE, normed, rotated, spread_angles
from ppo_lab.models.fast.kernels import Kernels
from ppo_lab.models.fast.places import LastColumns, Places
from ppo_lab.models.fast.products import Linear, is_plain, product, wide_product
from ppo_lab.models.fast.sweep import TILE, Curve, swept_logprobs, swept_twice
from ppo_lab.models.logprobs import Head, from_logits, token_logprobs, walks_twice
from ppo_lab.models.lora import wrap_lora
from ppo_lab.models.policy import AutoModelForCausalLMWithValueHead
from ppo_lab.models.reference import Reference
from ppo_lab.models.trunk import Trunk
from ppo_lab.rollout import NoiseKey, Sampling, draw, sample
from ppo_lab.types import Tokens

LLAMA_LIKE = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
}
NEOX = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 80,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SHAPES: dict[str, PreTrainedConfig] = {
    "bloom": BloomConfig(hidden_size=48, n_layer=2, n_head=3),
    "bloom, residual after the norm": BloomConfig(
        hidden_size=48, n_layer=2, n_head=3, apply_residual_connection_post_layernorm=True
    ),
    "gpt2": GPT2Config(n_embd=48, n_layer=3, n_head=3, scale_attn_by_inverse_layer_idx=True),
    "gpt-neox": GPTNeoXConfig(**NEOX, rope_parameters={"partial_rotary_factor": 0.25}),
    "gpt-neox, one after the other": GPTNeoXConfig(**NEOX, use_parallel_residual=False),
    "llama": LlamaConfig(**LLAMA_LIKE),
    "llama, stretched": LlamaConfig(**LLAMA_LIKE, rope_parameters=YARN),
    "qwen2": Qwen2Config(**LLAMA_LIKE),
    "mistral": MistralConfig(**LLAMA_LIKE, sliding_window=None),
    "mistral, within its window": MistralConfig(**LLAMA_LIKE, sliding_window=16),
    "phi3": Phi3Config(**LLAMA_LIKE, pad_token_id=0),
    "qwen3": Qwen3Config(**LLAMA_LIKE, head_dim=16),
    "smollm3": SmolLM3Config(**LLAMA_LIKE, pad_token_id=0, no_rope_layers=[1, 0, 1]),
    "gemma": GemmaConfig(**LLAMA_LIKE, head_dim=16),
    "gemma3": Gemma3TextConfig(
        **LLAMA_LIKE,
        head_dim=16,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "olmo2": Olmo2Config(**LLAMA_LIKE),
    "olmo3": Olmo3Config(**LLAMA_LIKE, sliding_window=16),
    "opt": OPTConfig(
        hidden_size=48,
        word_embed_proj_dim=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        ffn_dim=80,
    ),
}
# Of architectures for which PEFT names none, or not all that is to be tried.
TARGETS = {
    "phi3": ["qkv_proj", "gate_up_proj"],
    "gemma3": ["q_proj", "v_proj", "down_proj"],
    "olmo2": ["q_proj", "k_proj", "o_proj"],
    "opt": ["q_proj", "fc2"],
}
DROPOUTS = (
    "attention_dropout",
    "hidden_dropout",
    "embd_pdrop",
    "attn_pdrop",
    "resid_pdrop",
    "dropout",
)


def tiny_model(name: str, dtype: torch.dtype = torch.float32, **changed: Any) -> Any:
    torch.manual_seed(0)
    config = type(SHAPES[name])(**{**SHAPES[name].to_dict(), "vocab_size": 97, **changed})
    config.initializer_range = 0.2
    config.bos_token_id = config.eos_token_id = 1
    for rate in DROPOUTS:
        if hasattr(config, rate):
            setattr(config, rate, 0.0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    return model.to(dtype)


def tiny_bloom(**changed: Any) -> BloomForCausalLM:
    return tiny_model("bloom", **changed)


def ragged_ids() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.arange(3 * 11).view(3, 11) * 5 % 97
    attention = torch.ones_like(ids, dtype=torch.bool)
    attention[1, :4] = False
    attention[2, -3:] = False
    return ids, attention


def assert_states_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Hidden states in float32, whose size differs between families, but for rounding."""
    assert_close(ours, theirs, atol=2e-5 * max(1.0, float(theirs.abs().max()) / 4), rtol=2e-5)


def assert_as_near(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> None:
    """Hidden states in bfloat16, about as near to those in float32 as transformers' are."""
    off = float((theirs - exact).abs().max())
    assert float((ours - exact).abs().max()) <= 0.1 + 1.5 * off


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_the_fast_decoder_gives_transformers_hidden_states(name: str, dtype: Any) -> None:
    model = tiny_model(name, dtype)
    trunk, in_full = Trunk(model), Trunk(copy.deepcopy(model).float())
    ids, attention = ragged_ids()
    assert trunk._fast is not None
    with torch.no_grad():
        ours, theirs = trunk.hidden(ids, attention), trunk._by_transformers(ids, attention)
        last, exact = trunk.hidden(ids, attention, last=4), in_full._by_transformers(ids, attention)
    for got, seen in ((ours, attention), (last, attention[:, -4:])):
        columns = slice(-seen.shape[1], None)
        if dtype == torch.float32:
            assert_states_close(got[seen], theirs[:, columns][seen])
        else:
            assert_as_near(got[seen], theirs[:, columns][seen], exact[:, columns][seen])


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("last", [0, 4])
def test_every_weight_gets_the_gradient_that_transformers_gives_it(name: str, last: int) -> None:
    model = tiny_model(name)
    trunk = Trunk(model)
    ids, attention = ragged_ids()
    columns = slice(-last, None) if last else slice(None)

    def gradients(fast: FastDecoder | None) -> dict[str, torch.Tensor]:
        trunk._fast = fast
        model.zero_grad()
        hidden = trunk.hidden(ids, attention, last=last)[attention[:, columns]]
        torch.nn.functional.softplus(hidden).square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    assert trunk._fast is not None
    ours, theirs = gradients(trunk._fast), gradients(None)
    assert ours.keys() == theirs.keys()
    for key, wanted in theirs.items():
        # The exact gradient of a key's bias is 0: softmax does not mind it.
        rounding = 1e-5 if key.endswith("k_proj.bias") else 1e-8
        atol = 1e-4 * float(wanted.abs().max()) + rounding
        assert_close(ours[key], wanted, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("name", [name for name in SHAPES if "," not in name])
def test_a_cache_of_its_own_continues_where_the_prompt_ended(name: str) -> None:
    trunk = Trunk(tiny_model(name))
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


@pytest.mark.parametrize(
    "architecture",
    ["bloom", "gpt2", "gpt-neox", "llama", "phi3", "qwen3", "gemma", "gemma3", "olmo2", "opt"],
)
@pytest.mark.parametrize("adapter", ["on", "off"])
def test_gradients_of_the_adapter_are_those_of_peft(adapter: str, architecture: str) -> None:
    def gradients(fast: bool) -> dict[str, torch.Tensor]:
        settings = LoraConfig(
            r=4,
            task_type="CAUSAL_LM",
            fan_in_fan_out=architecture == "gpt2",
            target_modules=TARGETS.get(architecture),
        )
        model = get_peft_model(tiny_model(architecture), settings)
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
    monkeypatch.setattr(families, "alibi_slopes", lambda heads: torch.ones(heads))
    assert Trunk(tiny_bloom())._fast is None


def test_a_deep_model_whose_padding_is_zeros_proves_equal_as_well() -> None:
    """The slope of a norm at zero grows with every layer above it."""
    model = tiny_model("llama", num_hidden_layers=24, pad_token_id=0)
    assert not model.get_input_embeddings().weight[0].any()
    trunk = Trunk(model)
    assert trunk._fast is not None
    assert trunk._proof().of_learning(trunk._fast)


def test_a_layer_that_does_not_prove_equal_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(families, "alibi_slopes", lambda heads: torch.ones(heads))
    Trunk(tiny_bloom())
    assert "do not prove equal on BloomForCausalLM" in caplog.text


def test_what_is_not_read_goes_transformers_way() -> None:
    for model in (
        tiny_model("mistral", sliding_window=4),
        tiny_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
        tiny_model("gpt2", activation_function="quick_gelu"),
        tiny_bloom(slow_but_exact=True),
        tiny_model("opt", word_embed_proj_dim=24),
        tiny_model("opt", do_layer_norm_before=False),
        tiny_model("opt", layer_norm_elementwise_affine=False),
        tiny_model("gemma3", use_bidirectional_attention=True),
    ):
        assert Trunk(model)._fast is None


def test_another_decoder_of_a_known_name_is_not_taken_for_it() -> None:
    """As code that comes with a model may bring one."""
    model = tiny_model("llama")
    assert Trunk(model).road == "ppo_lab's"
    kind = type(model.model)
    model.model.__class__ = type(kind.__name__, (kind,), {"__module__": "modeling_mine"})
    assert Trunk(model)._fast is None
    assert Trunk(model).road == "transformers'"


@pytest.mark.parametrize("name", ["mistral, within its window", "gemma3", "olmo3"])
def test_more_positions_than_a_window_holds_go_transformers_way(name: str) -> None:
    trunk = Trunk(tiny_model(name))  # windows of 16
    ids = torch.arange(2 * 19).view(2, 19) * 5 % 97
    attention = torch.ones_like(ids, dtype=torch.bool)
    attention[1, :4] = False
    assert trunk._fast is not None
    with torch.no_grad():
        for columns in (16, 19):
            given = ids[:, :columns], attention[:, :columns]
            ours, theirs = trunk.hidden(*given)[:, -1], trunk._by_transformers(*given)[:, -1]
            assert_states_close(ours, theirs)
            fast = trunk._fast.hidden(*given)[:, -1]
            assert torch.equal(ours, fast) == (columns == 16)
            assert torch.allclose(fast, theirs, atol=1e-3) == (columns == 16)
    assert isinstance(trunk.new_cache(16), KeysAndValues)
    assert not isinstance(trunk.new_cache(17), KeysAndValues)


def test_a_hook_on_a_layer_is_honoured() -> None:
    model = tiny_model("llama")
    trunk = Trunk(model)
    with torch.no_grad():
        model(*ragged_ids(), output_hidden_states=True)  # leaves hooks that sleep
    assert trunk._fast is not None
    assert trunk._fast.usable()
    seen: list[Any] = []
    model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        trunk.hidden(*ragged_ids())
    assert seen


def test_a_layer_s_call_that_has_been_replaced_is_made() -> None:
    model = tiny_model("llama")
    trunk, own = Trunk(model), model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda x: 2 * own(x)
    with torch.no_grad():
        changed = trunk.hidden(*ragged_ids())
        del model.model.layers[1].mlp.forward
        assert not torch.allclose(trunk.hidden(*ragged_ids()), changed)


def test_an_adapter_that_is_merged_is_not_added_twice() -> None:
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trunk, (ids, attention) = Trunk(model), ragged_ids()
    assert trunk._fast is not None
    with torch.no_grad():
        apart = trunk.hidden(ids, attention)
        model.merge_adapter()
        assert not isinstance(trunk.new_cache(17), KeysAndValues)
        merged = trunk.hidden(ids, attention)
        model.unmerge_adapter()
    assert trunk._fast.usable()
    assert_close(merged[attention], apart[attention], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_autocast_is_torch_s_own(lora: bool) -> None:
    """The products of the fast road would mix its precision with theirs."""
    model = tiny_model("llama")
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM"))
    trunk, (ids, attention) = Trunk(model), ragged_ids()
    assert trunk._fast is not None
    exact = trunk.hidden(ids, attention)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not isinstance(trunk.new_cache(17), KeysAndValues)
        states = trunk.hidden(ids, attention)
    states[attention].square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    assert grads
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert_close(states[attention].float(), exact[attention], rtol=0.1, atol=0.1)
    assert trunk._fast.usable()


def test_adapters_that_the_fast_road_does_not_know_keep_to_the_plain_one() -> None:
    for settings in ({"use_dora": True}, {"lora_dropout": 0.1}):
        model = get_peft_model(tiny_bloom(), LoraConfig(r=2, task_type="CAUSAL_LM", **settings))
        assert FastDecoder.of(Trunk(model).decoder) is None
    assert not is_plain(torch.nn.Identity())


def test_gradient_checkpointing_is_transformers_own() -> None:
    model = tiny_bloom()
    trunk = Trunk(model)
    model.gradient_checkpointing_enable()
    model.train()
    assert trunk._fast is not None
    assert not trunk._fast.usable()
    assert not isinstance(trunk.new_cache(4), KeysAndValues)


def move_adapter(model: Any, *, seed: int) -> None:
    """As training does, by as much as can be seen."""
    random = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if "lora_B.default" in key:
            torch.nn.init.normal_(parameter, std=0.1, generator=random)


@pytest.mark.parametrize("start", ["fresh", "trained"])
@pytest.mark.parametrize("top_layers", [1, 2])
@pytest.mark.parametrize("name", ["bloom", "gpt2", "gpt-neox", "llama"])
def test_a_kept_trunk_changes_no_number(name: str, top_layers: int, start: str) -> None:
    """Reference, log-probs, values and the adapter's gradients, from layers computed once; the
    reference is the trunk without the adapter, or with a copy of the one that it came with.
    """

    def numbers(cache_trunk: bool) -> dict[str, torch.Tensor]:
        adapter = LoraSection(r=4, top_layers=top_layers, target_modules=["all-linear"])
        model = wrap_lora(tiny_model(name, num_hidden_layers=3), adapter)
        if start == "trained":
            move_adapter(model, seed=2)
        torch.manual_seed(3)
        policy = AutoModelForCausalLMWithValueHead(model)
        reference = Reference(policy)
        move_adapter(model, seed=1)
        tokens = Tokens.pack(
            [[5, 6, 7, 8], [9], [3, 4]], [[11, 12], [13, 14, 15, 16, 17], [18]], pad_id=0
        )
        if cache_trunk:
            policy.trunk.keep_below()
            tokens = replace(tokens, below=policy.below(tokens))
            policy.trunk._fast.anatomy.layers[0].up.weight.data.fill_(torch.nan)  # not read again
        forward = policy.score(tokens, temperature=0.7)
        (forward.logprobs.square() + forward.values).sum().backward()
        found = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
        assert any("lora_A" in key for key in found)
        with torch.no_grad():
            shorter = policy.score(tokens[1:], temperature=0.7)  # its first columns are all padding
        return {
            **found,
            "logprobs": forward.logprobs.detach(),
            "values": forward.values.detach(),
            "logprobs of the shorter": shorter.logprobs,
            "reference": reference.logprobs(tokens, temperature=0.7),
        }

    ours = numbers(True)
    for key, wanted in numbers(False).items():
        assert_close(ours[key], wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()) + 1e-6)


def test_a_trunk_that_changes_while_training_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = wrap_lora(tiny_bloom(), LoraSection(r=2))
    with pytest.raises(ConfigError, match="the first layer of BloomForCausalLM is trained"):
        Trunk(whole).keep_below()
    monkeypatch.setattr(families, "READERS", {})
    upper = Trunk(wrap_lora(tiny_bloom(), LoraSection(r=2, top_layers=1)))
    with pytest.raises(ConfigError, match="are not known one by one"):
        upper.keep_below()


def test_alibi_s_numbers_are_rounded_as_transformers_rounds_them() -> None:
    slopes, real = torch.tensor([0.5, 0.25]), torch.ones(1, 400, dtype=torch.bool)
    shape = {"new": 1, "heads": 2, "kv_heads": 2, "slopes": slopes, "dtype": torch.float32}
    (block,) = blocks_of(real, **shape, rounded_to=torch.bfloat16)
    exact = slopes[:, None] * torch.arange(400.0)
    assert_close(block.bias[:, 0], exact.bfloat16().float(), rtol=0, atol=0)
    assert not torch.equal(block.bias[:, 0], exact)


def test_a_trunk_above_rows_that_are_trained_is_not_kept() -> None:
    adapted = wrap_lora(tiny_bloom(), LoraSection(r=2, top_layers=1))
    trunk = Trunk(adapted)
    trunk.keep_below()
    assert trunk.kept_below > 0
    adapted.get_input_embeddings().requires_grad_(True)
    with pytest.raises(ConfigError, match="the first layer of BloomForCausalLM is trained"):
        trunk.keep_below()


def test_a_trunk_that_is_not_kept_for_its_adapter_says_so() -> None:
    adapted = wrap_lora(tiny_bloom(), LoraSection(r=2, top_layers=1, use_dora=True))
    with pytest.raises(ConfigError, match=r"is DoRA \(lora\.use_dora=true\)"):
        Trunk(adapted).keep_below()


def test_a_product_is_that_of_a_linear_layer_in_either_layout() -> None:
    layer, x = torch.nn.Linear(7, 5), torch.randn(3, 7)
    with torch.no_grad():
        assert_close(product(x, layer.weight, layer.bias), layer(x))
        assert_close(product(x, layer.weight, None), layer(x) - layer.bias)
    assert_close(Linear.read(layer, x.dtype)(x), layer(x))


@pytest.fixture(params=["onednn", "mkl"])
def library(request: Any, monkeypatch: Any) -> None:
    """Frozen weights multiplied by either library, whatever this processor prefers."""
    if request.param == "onednn" and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(gemm, "takes_onednn", lambda dtype: request.param == "onednn")


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 3, 40])
@pytest.mark.parametrize("outputs", [5, 9])
def test_products_and_their_gradients_are_torchs_by_either_library(
    rows: int, outputs: int, dtype: torch.dtype
) -> None:
    """Of layers that narrow and that widen, of fewer rows than count as thin and of more."""
    if gemm.takes_onednn(dtype) and gemm.computed_in(dtype) != dtype:
        pytest.skip("oneDNN multiplies no bfloat16 on this processor")
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(7, outputs).to(dtype), torch.randn(rows, 7, dtype=dtype)
    g = torch.randn(rows, outputs, dtype=dtype)
    layer.requires_grad_(False)
    for bias in (layer.bias, None):
        for given in (x, x.t().contiguous().t()):
            given = given.detach().requires_grad_()
            wanted = torch.nn.functional.linear(given, layer.weight, bias)
            assert_close(gemm.times(given.detach(), layer.weight, bias), wanted.detach())
            ours = product(given, layer.weight, bias)
            assert_close(ours, wanted)
            slopes = [torch.autograd.grad(y, given, g)[0] for y in (ours, wanted)]
            assert_close(*slopes)


@pytest.mark.parametrize("trained", ["weight", "bias", "both"])
@pytest.mark.parametrize("rows", [0, 3, 40])
def test_trained_products_have_torchs_gradients_by_another_library(
    rows: int, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(gemm, "takes_onednn", lambda dtype: True)
    monkeypatch.setattr(products, "SMALL", 0)
    layer, g = torch.nn.Linear(7, 9), torch.randn(rows, 9)
    layer.weight.requires_grad_(trained != "bias")
    layer.bias.requires_grad_(trained != "weight")
    x = torch.randn(7, rows).t().requires_grad_()
    found = []
    for function in (product, torch.nn.functional.linear):
        y = function(x, layer.weight, layer.bias)
        wanted = [p for p in (x, *layer.parameters()) if p.requires_grad]
        found.append([y, *torch.autograd.grad(y, wanted, g)])
    assert type(found[0][0].grad_fn).__name__ == "_TrainedBackward"
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("outputs", [4096, 4099, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_times_a_vocabulary_are_contiguous(outputs: int, bias: bool) -> None:
    layer, x = torch.nn.Linear(7, outputs, bias=bias), torch.randn(3, 7)
    with torch.no_grad():
        ours = wide_product(x, layer.weight, layer.bias)
        other_way_round = wide_product(x, layer.weight.t().contiguous().t(), layer.bias)
    assert ours.is_contiguous()
    assert_close(ours, layer(x))
    assert_close(other_way_round, layer(x))


def test_half_precision_is_widened_where_the_processor_does_not_compute_in_it(
    monkeypatch: Any,
) -> None:
    monkeypatch.setattr(gemm, "WIDENED", 40)
    layer = torch.nn.Linear(7, 25).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(3, 7, requires_grad=True)
    exact = torch.nn.functional.linear(x, layer.weight.float(), layer.bias.float())
    assert_close(product(x, layer.weight, layer.bias), exact)
    assert_close(product(x, layer.weight, None), exact - layer.bias.float())
    g = torch.randn(3, 25)
    (ours,) = torch.autograd.grad(product(x, layer.weight, layer.bias), x, g)
    assert_close(ours, g @ layer.weight.float())


@pytest.mark.parametrize("adapters", [1, 2])
def test_without_a_gradient_an_adapter_is_multiplied_with_its_weight_by_one_kernel(
    adapters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, by a stand-in for the kernel; of several adapters none goes with the weight."""
    torch.manual_seed(0)
    settings = LoraConfig(r=2, lora_alpha=3, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(7, 9)), settings)
    if adapters == 2:
        model.add_adapter("second", settings)
    model.base_model.set_adapter(["default", "second"][:adapters])
    ranks = []

    def few_rows(
        x: Any, weight: Any, bias: Any, scaling: float = 0.0, a: Any = None, b: Any = None
    ) -> Any:
        ranks.append(0 if a is None else len(a))
        y = torch.nn.functional.linear(x, weight, bias)
        return y if a is None else y + scaling * (x @ a.t()) @ b.t()

    kernels = Kernels(**{**dict.fromkeys(Kernels._fields), "few_rows": few_rows})
    monkeypatch.setattr(products, "_for_few_rows", lambda x, weight: kernels)
    x, layer = torch.randn(3, 7), model.base_model.model[0]
    with torch.no_grad():
        assert_close(Linear.read(layer)(x), layer(x))
    assert ranks == ([2] if adapters == 1 else [])
    assert_close(Linear.read(layer)(x), layer(x))  # a gradient needs what lies between
    assert len(ranks) == (1 if adapters == 1 else 0)


@pytest.mark.parametrize("x_is_pulled", [False, True])
def test_kernels_give_an_adapter_the_gradients_that_peft_gives(
    x_is_pulled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, by stand-ins for the kernels."""
    torch.manual_seed(0)
    settings = LoraConfig(r=2, lora_alpha=3, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(7, 9)), settings)

    def adapted_start(x: Any, a: Any, b: Any, scaling: float, bias: Any) -> Any:
        inner = x @ a.t()
        if b is None:
            return None, inner
        return scaling * inner @ b.t() + (0.0 if bias is None else bias), inner

    def adapter_slopes(x: Any, g: Any, h: Any, d: Any, scaling: float, dtype: Any) -> Any:
        return scaling * d.t() @ x, scaling * g.t() @ h

    given = {"adapted_start": adapted_start, "adapter_slopes": adapter_slopes}
    kernels = Kernels(**{**dict.fromkeys(Kernels._fields), **given})
    monkeypatch.setattr(products, "_for_adapter", lambda x, linear: kernels)
    x, layer = torch.randn(3, 7, requires_grad=x_is_pulled), model.base_model.model[0]
    trained = [p for p in (x, *layer.parameters()) if p.requires_grad]
    ours, theirs = Linear.read(layer)(x), layer(x)
    assert_close(ours, theirs)
    pull = torch.randn(3, 9)
    for one, other in zip(
        torch.autograd.grad(ours, trained, pull),
        torch.autograd.grad(theirs, trained, pull),
        strict=True,
    ):
        assert_close(one, other)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", ["bloom", "llama", "phi3"])
def test_without_a_gradient_an_activation_goes_with_its_product(
    name: str, adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, by a stand-in for the kernel."""
    model = tiny_model(name)
    if adapted:
        settings = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, settings).get_base_model()
    activated = []

    def few_rows(
        x: Any,
        weight: Any,
        bias: Any,
        scaling: float = 0.0,
        a: Any = None,
        b: Any = None,
        activation: str = "",
        factor: Any = None,
    ) -> Any:
        y = torch.nn.functional.linear(x, weight, bias)
        y = y if a is None else y + scaling * (x @ a.t()) @ b.t()
        if not activation:
            return y
        activated.append(activation)
        return ACTIVATIONS[activation](y) * (few_rows(x, *factor) if factor else 1.0)

    kernels = Kernels(**{**dict.fromkeys(Kernels._fields), "few_rows": few_rows})
    monkeypatch.setattr(products, "_for_few_rows", lambda x, weight: kernels)
    monkeypatch.setattr(products, "_are_few", lambda x: True)
    fast, (ids, attention) = FastDecoder.of(model.base_model), ragged_ids()
    assert fast is not None
    theirs = fast.hidden(ids, attention)  # with a gradient to come
    assert not activated
    with torch.no_grad():
        assert_states_close(fast.hidden(ids, attention)[attention], theirs[attention])
    assert len(activated) == len(fast.anatomy.layers)


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("outputs", [5, 9])
def test_several_adapters_add_up_with_the_gradients_that_peft_gives(
    outputs: int, bias: Any
) -> None:
    """Of layers that narrow and that widen; with the layer's own bias trained or not."""
    torch.manual_seed(0)
    settings = LoraConfig(r=2, lora_alpha=3, target_modules=["0"], bias=bias)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(7, outputs)), settings)
    if bias == "none":
        model.add_adapter("other", LoraConfig(r=3, lora_alpha=5, target_modules=["0"]))
        model.base_model.set_adapter(["default", "other"])
    layer = model.base_model.model[0]
    for matrix in layer.lora_B.parameters():
        torch.nn.init.normal_(matrix)
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert len(trained) == (4 if bias == "none" else 3)
    x, g = torch.randn(3, 7, requires_grad=True), torch.randn(3, outputs)
    assert_close(Linear.read(layer, x.dtype)(x), layer(x))
    with torch.no_grad():
        assert_close(Linear.read(layer, x.dtype)(x), layer(x))
    ours = torch.autograd.grad(Linear.read(layer, x.dtype)(x), [x, *trained], g)
    assert_close(ours, torch.autograd.grad(layer(x), [x, *trained], g))
    of_adapters = torch.autograd.grad(Linear.read(layer, x.dtype)(x.detach()), trained, g)
    assert_close(of_adapters, ours[1:])


def test_rows_go_to_their_places_and_back_with_their_gradients() -> None:
    real = torch.arange(40).view(4, 10) % 10 > 0
    places = Places(real, width=1000)
    kept = torch.zeros(40, dtype=torch.bool).index_fill(0, places.rows, True)
    assert len(places.rows) == 40
    assert bool(kept[real.flatten()].all())
    real[:, 1] = False
    assert len(Places(real, width=1000).rows) == 32
    assert len(Places(real, width=8).rows) == 40, "little padding of short rows stays"
    real[:, 2:] = False
    real[0] = True
    places = Places(real, width=1000)
    assert len(places.rows) == 32
    rows = torch.randn(32, 2, dtype=torch.float64, requires_grad=True)
    rectangle = places.spread(rows)
    assert_close(places.gather(rectangle), rows)
    (back,) = torch.autograd.grad(rectangle, rows, torch.ones(40, 2, dtype=torch.float64))
    assert_close(back, torch.ones_like(rows))
    assert torch.autograd.gradcheck(places.gather, (rectangle.detach().requires_grad_(),))


def test_the_last_columns_are_picked_out_of_the_rows_with_their_gradients() -> None:
    real = torch.ones(4, 30, dtype=torch.bool)
    real[1, :13], real[2, 25:], real[3, :28] = False, False, False
    whole = Places(real, width=1000)
    end = LastColumns(whole, 5)
    rows = torch.randn(len(whole.rows), 2, dtype=torch.float64, requires_grad=True)
    rectangle = whole.spread(rows).view(4, 30, 2)[:, -5:]
    picked = end.places.spread(end.pick(rows)).view(4, 5, 2)
    seen = real[:, -5:]
    assert_close(picked[seen], rectangle[seen])
    weights = torch.randn(int(seen.sum()), 2, dtype=torch.float64)
    ours = torch.autograd.grad((picked[seen] * weights).sum(), rows)
    theirs = torch.autograd.grad((rectangle[seen] * weights).sum(), rows)
    assert_close(ours, theirs)


@pytest.mark.parametrize("scores", [1, 2**17])
def test_attention_is_softmax_of_scaled_products_with_its_gradients(
    scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one block as in several, of all queries as of the last ones alone."""
    monkeypatch.setattr("ppo_lab.models.fast.attention.SCORES", scores)
    monkeypatch.setattr("ppo_lab.models.fast.attention.COLUMNS", 2)
    torch.manual_seed(0)
    attention = torch.ones(2, 6, dtype=torch.bool)
    attention[1, :2] = False
    blocks = blocks_of(
        attention, new=5, heads=4, kv_heads=2, slopes=None, dtype=torch.float64,
        rounded_to=torch.float64,
    )  # fmt: skip
    last = last_columns(blocks, 3)
    assert [(block.first, block.end) for block in last] == [(0, 2)]
    assert [(block.first, block.end) for block in blocks] == (
        [(0, 2), (2, 5)] if scores == 1 else [(0, 5)]
    )
    q, k, v = (
        torch.randn(2, heads, columns, 3, dtype=torch.float64, requires_grad=True)
        for heads, columns in ((4, 5), (2, 6), (2, 6))
    )
    hidden = torch.ones(5, 6, dtype=torch.bool).triu(2) | ~attention[:, None, None, :]
    bias = torch.zeros(2, 4, 5, 6, dtype=torch.float64).masked_fill(hidden, -1e300)
    many = {"attn_mask": bias, "scale": 0.4, "enable_gqa": True}
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, **many)  # type: ignore[arg-type]
    asks = attention[:, -5:, None].double()  # padding asks nothing
    plain = plain.transpose(1, 2).flatten(2) * asks
    assert_close(attend(q, k, v, blocks, 0.4) * asks, plain)
    with torch.no_grad():
        assert_close(attend(q, k, v, blocks, 0.4) * asks, plain)
    of_last = attend(q[:, :, 3:], k, v, last, 0.4)
    assert_close(of_last, plain[:, 3:])
    assert torch.autograd.gradcheck(lambda *x: attend(*x, blocks, 0.4) * asks, (q, k, v))


def test_elementwise_parts_have_the_gradients_of_their_formulas() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 10, requires_grad=True)
    for name, formula in {
        "gelu_new": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
        "silu": lambda z: z * z.sigmoid(),
    }.items():
        assert_close(ACTIVATIONS[name](x), formula(x))
        ours = torch.autograd.grad(ACTIVATIONS[name](x).square().sum(), x)
        assert_close(ours, torch.autograd.grad(formula(x).square().sum(), x))
    norm = tiny_model("llama").model.norm
    wide = torch.randn(6, 48, requires_grad=True)
    assert_close(normed(norm, wide), norm(wide))
    ours = torch.autograd.grad(normed(norm, wide).square().sum(), (wide, norm.weight))
    assert_close(ours, torch.autograd.grad(norm(wide).square().sum(), (wide, norm.weight)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [LARGE // 48, LARGE // 48 + 1])
@torch.no_grad()
def test_norms_of_few_and_of_many_numbers_are_transformers(rows: int, dtype: Any) -> None:
    """And what is normed stays as it is."""
    torch.manual_seed(0)
    norm = tiny_model("llama", dtype).model.norm
    norm.weight.copy_(torch.rand(48) + 0.5)
    wide = torch.randn(48, rows, dtype=dtype).t()
    before = wide.clone()
    assert_close(normed(norm, wide), norm(wide))
    assert torch.equal(wide, before)


def test_a_turn_pairs_the_halves_and_is_undone_by_its_gradient() -> None:
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    angle = torch.rand(2, 2, dtype=torch.float64)
    cos, sin = spread_angles(angle.cos(), angle.sin(), heads=3, size=6)
    turned = rotated(x, cos, sin, 2)
    a, b = torch.complex(x[..., :2], x[..., 2:4]), torch.polar(torch.ones_like(angle), angle)
    assert_close(torch.complex(turned[..., :2], turned[..., 2:4]), a * b[:, None])
    assert_close(turned[..., 4:], x[..., 4:])
    assert torch.autograd.gradcheck(lambda z: rotated(z, cos, sin, 2), (x,))


CURVES = (Curve(), Curve(scale=1.7, temperature=0.8), Curve(1.7, softcap=3.0, temperature=0.8))


def head_of(vocabulary: int, *, biased: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    torch.manual_seed(0)
    weight = (torch.randn(vocabulary, 24) * 0.3).requires_grad_()
    return weight, torch.randn(vocabulary, requires_grad=True) if biased else None


def plain_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, curve: Curve
) -> torch.Tensor:
    z = torch.nn.functional.linear(hidden, weight, bias) * curve.scale
    z = curve.softcap * torch.tanh(z / curve.softcap) if curve.softcap else z
    return z / curve.temperature


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("biased", [False, True])
def test_one_sweep_gives_log_softmax_and_its_gradient(curve: Curve, biased: bool) -> None:
    vocabulary = 2 * TILE + 17
    weight, bias = head_of(vocabulary, biased=biased)
    targets = torch.tensor([0, TILE, vocabulary - 1, 5, 5])
    hidden = torch.randn(5, 24, requires_grad=True)
    ours = swept_logprobs(hidden, weight, bias, targets, curve)
    assert ours is not None
    (mine,) = torch.autograd.grad((ours * torch.arange(5)).sum(), hidden)
    logits = plain_logits(hidden, weight, bias, curve)
    plain = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    (theirs,) = torch.autograd.grad((plain * torch.arange(5)).sum(), hidden)
    assert_close(ours, plain, atol=2e-5, rtol=1e-5)
    assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("factors", [(1.0, None), (1.0, 0.3), (0.0, 1.0)])
def test_two_sweeps_give_the_gradients_of_a_trained_head_and_of_entropies(
    curve: Curve, biased: bool, factors: tuple[float, float | None]
) -> None:
    vocabulary = 2 * TILE + 17
    weight, bias = head_of(vocabulary, biased=biased)
    targets = torch.tensor([0, TILE, vocabulary - 1, 5, 5])
    hidden = torch.randn(5, 24, requires_grad=True)
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    of_logprob, of_entropy = factors
    found = swept_twice(hidden, weight, bias, targets, curve, entropy=of_entropy is not None)
    assert found is not None
    logs = plain_logits(hidden, weight, bias, curve).log_softmax(-1)
    plain = logs.gather(1, targets[:, None]).squeeze(1), -(logs.exp() * logs).sum(-1)
    weights, losses = torch.arange(1.0, 6.0), []
    for logprobs, entropies in (found, plain):
        loss = (of_logprob * logprobs * weights).sum()
        if of_entropy is not None:
            loss = loss + (of_entropy * entropies * weights.flip(0)).sum()
        losses.append(loss)
    assert_close(found[0], plain[0], atol=2e-5, rtol=1e-5)
    if of_entropy is None:
        assert found[1] is None
    else:
        assert_close(found[1], plain[1], atol=2e-5, rtol=1e-5)
    ours, theirs = (torch.autograd.grad(loss, leaves) for loss in losses)
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other, atol=3e-5, rtol=1e-4)


def test_of_a_trained_head_only_what_is_trained_gets_a_gradient() -> None:
    hidden, targets = torch.randn(3, 24), torch.tensor([1, 2, 3])
    for frozen in (0, 1):
        weight, bias = head_of(TILE + 3, biased=True)
        assert bias is not None
        (weight, bias)[frozen].requires_grad_(False)
        found = swept_twice(hidden, weight, bias, targets, Curve())
        assert found is not None
        found[0].sum().backward()
        assert [p.grad is None for p in (weight, bias)] == [frozen == 0, frozen == 1]


def test_a_trained_half_precision_head_is_walked_as_its_products_are() -> None:
    torch.manual_seed(0)
    weight = (torch.randn(2**13, 32) * 0.2).bfloat16().requires_grad_()
    hidden = torch.randn(600, 32).bfloat16().requires_grad_()
    targets = torch.randint(2**13, (600,))
    assert walks_twice(Head(weight), 600)
    ours, _ = token_logprobs(hidden, Head(weight), targets, temperature=1.0)
    mine = torch.autograd.grad(ours.sum(), (hidden, weight))
    logits = torch.nn.functional.linear(hidden.double(), weight.double())
    plain = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    theirs = torch.autograd.grad(plain.sum(), (hidden, weight))
    assert_close(ours.double(), plain, atol=0.05, rtol=0.01)
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == torch.bfloat16
        assert float((a.double() - b.double()).norm() / b.double().norm()) < 0.01


def test_a_sweep_that_overflows_gives_way_to_the_plain_road(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = torch.zeros(2**16, 4)
    weight[7] = 100.0
    hidden, targets = torch.ones(2, 4), torch.tensor([3, 7])
    with torch.no_grad():
        assert swept_logprobs(hidden, weight, None, targets, Curve()) is None
        logprobs, _ = token_logprobs(hidden, Head(weight), targets, temperature=1.0)
    assert_close(logprobs, torch.tensor([-400.0, 0.0]))
    monkeypatch.setattr("ppo_lab.models.logprobs.WALKED_TWICE", 1)
    assert swept_twice(hidden, weight.requires_grad_(), None, targets, Curve()) is None
    logprobs, _ = token_logprobs(hidden, Head(weight), targets, temperature=1.0)
    assert_close(logprobs, torch.tensor([-400.0, 0.0]))


@pytest.mark.parametrize("above", [50.0, 70.0, 85.2, 100.0])
@pytest.mark.parametrize("trained", [False, True])
def test_entropies_are_right_however_unlikely_the_chosen_token(above: float, trained: bool) -> None:
    """Sums of exp(z) z overflow where those of exp(z) do not yet."""
    weight = torch.zeros(2**13, 4)
    weight[7] = above / 4
    weight.requires_grad_(trained)
    hidden = torch.ones(300, 4, requires_grad=True)
    targets = torch.full((300,), 3)
    assert walks_twice(Head(weight), 300)
    logprobs, entropies = token_logprobs(
        hidden, Head(weight), targets, temperature=1.0, entropy=True
    )
    assert entropies is not None
    assert_close(logprobs, torch.full((300,), -above))
    assert_close(entropies, torch.zeros(300), atol=1e-4, rtol=0)
    (logprobs + entropies).sum().backward()
    assert hidden.grad is not None
    assert bool(hidden.grad.isfinite().all())


def test_a_head_that_is_trained_gets_its_gradient() -> None:
    weight = (torch.randn(2**16, 8) * 0.1).requires_grad_()
    hidden, targets = torch.randn(3, 8), torch.tensor([1, 2, 3])
    logprobs, _ = token_logprobs(hidden, Head(weight), targets, temperature=1.0)
    logprobs.sum().backward()
    assert weight.grad is not None
    assert float(weight.grad[1].abs().max()) > 0


def test_drawing_gives_what_the_whole_distribution_says() -> None:
    generator = torch.Generator().manual_seed(0)
    for vocabulary in (FAN**3, 3 * FAN**2 + 5, 40):
        logits = 4 * torch.randn(200, vocabulary, generator=generator)
        uniforms = torch.rand(200, LEVELS, generator=generator, dtype=torch.float64)
        uniforms[:2] = torch.tensor([[0.0], [1 - 2**-53]])
        ours = draw_from(logits, uniforms)
        tokens = draw(logits, uniforms, sampling=Sampling(1, (), 0))
        # Only a number within rounding of a border between two tokens may fall on its other side.
        assert int((ours.tokens != tokens).sum()) <= 1
        logprobs, entropy = from_logits(logits, ours.tokens, temperature=1.0, entropy=True)
        assert_close(ours.logprobs, logprobs, atol=1e-5, rtol=1e-5)
        assert_close(ours.entropy, entropy, atol=1e-4, rtol=1e-4)


def test_a_token_without_mass_is_never_drawn() -> None:
    logits = torch.full((4, 1000), -1e4)
    logits[:, 515] = 0.0
    edges = torch.tensor([0.0, 0.5, 1 - 2**-24, 1 - 2**-53], dtype=torch.float64)
    drawn = draw_from(logits, edges[:, None].expand(4, LEVELS))
    assert drawn.tokens.tolist() == [515] * 4


def test_choices_come_in_proportion_to_their_weights() -> None:
    weights = torch.tensor([0.0, 1.0, 2.0, 0.0] + [0.0] * 30 + [3.0, 0.0, 4.0])
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(20_000, LEVELS, generator=generator, dtype=torch.float64)
    found = torch.bincount(choose(weights.expand(20_000, -1), uniforms), minlength=37) / 20_000
    assert_close(found, weights / 10, atol=0.01, rtol=0)
    assert found[weights == 0].sum() == 0


def test_rounding_of_the_weights_hardly_ever_changes_the_choice() -> None:
    """Inverting the cumulative distribution would choose otherwise some 200 times here."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(50_000, generator=generator, dtype=torch.float64)
    noise = 1e-5 * torch.randn(50_000, generator=generator, dtype=torch.float64)
    uniforms = torch.rand(10_000, LEVELS, generator=generator, dtype=torch.float64)
    one, other = (
        torch.cat([choose(w.softmax(0).expand(500, -1), u) for u in uniforms.split(500)])
        for w in (logits, logits + noise)
    )
    assert int((one != other).sum()) <= 4


def test_rows_of_a_large_vocabulary_one_by_one_or_at_once_are_the_same(monkeypatch: Any) -> None:
    logits, uniforms = 4 * torch.randn(7, 2000), torch.rand(7, LEVELS)
    at_once = draw_from(logits, uniforms)
    monkeypatch.setattr(draws, "LARGE_VOCABULARY", 1000)
    for ours, theirs in zip(draw_from(logits, uniforms), at_once, strict=True):
        assert_close(ours, theirs)


def test_batches_split_or_whole_draw_the_same_tokens_of_a_large_vocabulary() -> None:
    policy = tiny_policy(70_000, torch.float32)
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]

    def drawn(size: int) -> torch.Tensor:
        sampling = Sampling(max_new_tokens=5, eos_ids=(), pad_id=0, batch_size=size)
        return sample(policy, prompts, sampling=sampling, noise=NoiseKey(3, 1))[0].responses

    assert_close(drawn(0), drawn(3))


@pytest.mark.parametrize("by_head", [True, False])
def test_parts_of_a_product_have_its_gradient_wherever_theirs_lie(by_head: bool) -> None:
    torch.manual_seed(0)
    fused, pull = torch.randn(2, 5, 24, requires_grad=True), torch.randn(3, 2, 5, 2, 4)

    def split(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.unflatten(2, (2, 3, 4) if by_head else (3, 2, 4)).unbind(3 if by_head else 2)

    found = []
    for parts in (parted(fused, split), split(fused)):
        pairs = zip(parts, pull, strict=True)
        total = sum((part.square() * one).sum() for part, one in pairs)
        found += torch.autograd.grad(total, fused)
    assert_close(*found)
