"""What a run costs: counted work by hand, memory by part, devices, ways to share, the command."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from rich.console import Console
from test_cli import command as cli
from tiny_models import causal_lm, lora_config, policy, ragged, train_adapter, trainer
from tiny_runs import command, inputs, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    DeepseekV3Config,
    FalconConfig,
    GPTNeoConfig,
    HunYuanMoEV1Config,
    Lfm2Config,
    MambaConfig,
    MixtralConfig,
    Qwen3NextConfig,
)

from ppo_lab import AutoModelForCausalLMWithValueHead
from ppo_lab.assembly import load_policy
from ppo_lab.config import ConfigError, EvaluationSection, LoraSection, ModelCritic, ModelSection
from ppo_lab.metric_names import METRICS
from ppo_lab.models.byte_tokenizer import BYTE_VOCABULARY, byte_tokenizer
from ppo_lab.models.fast import gemm
from ppo_lab.models.loading import load_tokenizer
from ppo_lab.models.logprobs import TILE
from ppo_lab.models.reference import Reference
from ppo_lab.models.trunk import Trunk
from ppo_lab.plan import machine, work
from ppo_lab.plan import measured as measured_module
from ppo_lab.plan.architecture import Architecture, architecture_of, blueprint
from ppo_lab.plan.check import CASES, Held, check
from ppo_lab.plan.counted import _full_kl_bytes
from ppo_lab.plan.devices import DEVICES, named
from ppo_lab.plan.estimate import Plan, plan_of
from ppo_lab.plan.graphs import Recorded, recorded_by, records_again
from ppo_lab.plan.heads import HeadShape, logprob_bytes, logprob_seconds, sampling_bytes
from ppo_lab.plan.machine import product_rate
from ppo_lab.plan.memory import update_bytes
from ppo_lab.plan.meter import Meter
from ppo_lab.plan.parallel import fitting, ways
from ppo_lab.plan.rehearsal import ByDepth, Miniature, Rehearsal
from ppo_lab.plan.rehearsal import Held as HeldBytes
from ppo_lab.plan.report import Planned, show
from ppo_lab.plan.request import read
from ppo_lab.plan.subject import Subject, Target, subject_of
from ppo_lab.plan.trace import peak_bytes, tracked
from ppo_lab.plan.traced import attention_of_a_gpu
from ppo_lab.plan.work import Amount
from ppo_lab.plan.workload import Row, Workload, workload_of
from ppo_lab.summary import number

SIZES = Architecture(
    layers=2,
    hidden=10,
    vocabulary=100,
    matrices=1000,
    head=1000,
    queries=20,
    cached=40,
    parameters=2100,
    trained=50,
    weight_bytes=8400,
    bytes_per_weight=4,
    trained_bytes=200,
    adapter=50,
    reached=2,
)
WHOLE = replace(SIZES, adapter=0, trained=2100, trained_matrices=1000, head_trained=True)
WHOLE = replace(WHOLE, has_own_reference=True, trained_bytes=8400)
ROWS = [(3, 2), (5, 4)]  # 4 and 8 tokens seen, 10 and 36 pairs, 6 scored


# ------ Work


def test_flops_are_those_of_the_equations_by_hand() -> None:
    amount = Amount.of(ROWS)
    assert amount == (12, 46, 6)
    forward = 2 * 1050 * 12 + 4 * 20 * 46 + 2 * 1000 * 6
    assert work.forward_flops(SIZES, amount) == forward
    backward = 2 * 1000 * 12 + 8 * 20 * 46 + 4 * 50 * 12 + 2 * 1000 * 6
    assert work.backward_flops(SIZES, amount) == backward
    reference = forward - 2 * 50 * 12
    iteration = forward + reference + 3 * (forward + backward)
    assert work.iteration_flops(SIZES, amount, epochs=3) == iteration
    whole = 2 * 1000 * 12 + 8 * 20 * 46 + 2 * 1000 * 12 + 4 * 1000 * 6
    assert work.backward_flops(WHOLE, amount) == whole


def test_gradients_pass_through_the_upper_layers_alone_where_those_alone_are_adapted() -> None:
    amount, upper = Amount.of(ROWS), replace(SIZES, reached=1)
    less = (2 * 1000 * 12 + 8 * 20 * 46) // 2
    both = work.backward_flops(SIZES, amount), work.backward_flops(upper, amount)
    assert both[0] - both[1] == less
    kept = work.iteration_flops(upper, amount, epochs=2, cached=True)
    spared = 2 * 500 * 12 + 2 * 20 * 46  # the lower layer's forward pass
    assert work.iteration_flops(upper, amount, epochs=2) - kept == 2 * spared


def test_the_last_step_of_sampling_has_read_the_weights_as_often_as_there_are_tokens() -> None:
    found = work.generate(SIZES, ROWS)
    cached = 40 * 4 * (4 + 6 + 7 + 8)
    assert found.bytes == 4 * (1000 + 50 + 1000) * 4 + cached
    assert found.flops == work.forward_flops(SIZES, Amount.of(ROWS))


def test_recomputed_activations_cost_one_more_forward_pass_of_the_trunk() -> None:
    plain, again = (
        work.update(SIZES, ROWS, epochs=2, passes=1, steps=1, recomputed=r) for r in (False, True)
    )
    trunk = work.forward_flops(SIZES, Amount.of(ROWS)._replace(scored=0))
    assert again.flops - plain.flops == 2 * trunk


@pytest.mark.parametrize("kind", ["bloom", "gpt2", "llama"])
@pytest.mark.parametrize("lora", [False, True])
def test_counted_flops_are_what_torch_counts(kind: str, lora: bool, monkeypatch: Any) -> None:
    """Forward and backward of one pass, by transformers' own layers. Under an adapter torch leaves
    out the gradients of what enters the first layer, which of two layers is a part.
    """
    from torch.utils.flop_counter import FlopCounterMode

    model = policy(kind, lora=lora, attn_implementation="eager")  # torch counts no other on a CPU
    model.trunk._fast = None
    monkeypatch.setattr(gemm, "takes_onednn", lambda dtype: False)  # of which torch counts nothing
    tokens = ragged()
    rectangle = Amount.of([(4, 5)] * 4)  # torch counts padding
    rectangle = rectangle._replace(scored=int(tokens.mask.sum()), pairs=4 * 8 * 8)
    model.train()
    with FlopCounterMode(display=False) as counter:
        seen = model.score(tokens, temperature=1.0)
        (seen.logprobs + seen.values).sum().backward()
    of = architecture_of(model.pretrained_model)
    assert counter.get_total_flops() == pytest.approx(work.learning_flops(of, rectangle), rel=0.08)


def test_counted_flops_of_the_exact_kl_are_what_torch_counts(monkeypatch: Any) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = policy("llama", lora=True, attn_implementation="eager")
    model.trunk._fast = None
    monkeypatch.setattr(gemm, "takes_onednn", lambda dtype: False)
    tokens, reference = ragged(), Reference(model)
    rectangle = Amount.of([(4, 5)] * 4)
    rectangle = rectangle._replace(scored=int(tokens.mask.sum()), pairs=4 * 8 * 8)
    with FlopCounterMode(display=False) as counter:
        reference.full_kl(tokens, temperature=1.0)
    counted = work.full_kl_flops(architecture_of(model.pretrained_model), rectangle)
    assert counter.get_total_flops() == pytest.approx(counted, rel=0.01)


# ------ Sizes


SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "vocab_size": 64,
}
LOCAL: dict[str, Any] = {"attention_types": [[["global", "local", "global"], 1]]}


def test_a_token_counts_the_experts_that_it_is_given_to() -> None:
    config = MixtralConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        vocab_size=64,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    model = blueprint(config, ModelSection(path=""), LoraSection(r=0), dtype=torch.float32)
    of = architecture_of(model)
    chosen = 2 * 3 * 16 * 24
    assert of.in_experts == 3 * chosen
    assert (of.queries, of.cached) == (3 * 16, 3 * 2 * 8)  # two heads of keys and values for four
    assert of.matrices == of.trained_matrices == 3 * (2 * 16 * 16 + 2 * 16 * 8 + chosen)
    adapted = LoraSection(r=4, target_modules=["q_proj"])
    frozen = architecture_of(blueprint(config, ModelSection(path=""), adapted, dtype=torch.float32))
    assert (frozen.in_experts, frozen.trained_matrices) == (3 * chosen, 0)


@pytest.mark.parametrize(
    ("config", "queries", "cached"),
    [
        (  # keys of 8 + 4, values of 6, for four heads
            DeepseekV3Config(
                num_key_value_heads=4,
                q_lora_rank=8,
                kv_lora_rank=8,
                qk_nope_head_dim=8,
                qk_rope_head_dim=4,
                v_head_dim=6,
                first_k_dense_replace=3,
                n_group=1,
                topk_group=1,
                **SMALL,
            ),
            3 * 4 * (8 + 4 + 6) // 2,
            3 * 4 * (8 + 4 + 6),
        ),
        (
            Lfm2Config(
                num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"], **SMALL
            ),
            16,
            2 * 2 * 4,
        ),
        (
            Qwen3NextConfig(
                head_dim=4,
                num_key_value_heads=2,
                layer_types=["linear_attention", "full_attention", "full_attention"],
                **SMALL,
            ),
            2 * 16,
            2 * 2 * 2 * 4,
        ),
        (MambaConfig(hidden_size=16, num_hidden_layers=3, vocab_size=64), 0, 0),
        (GPTNeoConfig(hidden_size=16, num_layers=3, num_heads=4, vocab_size=64, **LOCAL), 48, 96),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_only_layers_that_attend_count_as_such_at_the_widths_of_their_heads(
    config: Any, queries: int, cached: int
) -> None:
    model = blueprint(config, ModelSection(path=""), LoraSection(r=0), dtype=torch.float32)
    of = architecture_of(model)
    assert (of.queries, of.cached) == (queries, cached)


@pytest.mark.parametrize("new", [False, True])
def test_a_falcon_s_cache_is_counted_as_transformers_fills_it(new: bool) -> None:
    config = FalconConfig(new_decoder_architecture=new, num_kv_heads=2 if new else None, **SMALL)
    model = blueprint(config, ModelSection(path=""), LoraSection(r=0), dtype=torch.float32)
    ids = torch.zeros(1, 5, dtype=torch.long, device="meta")
    filled = model(ids, use_cache=True).past_key_values.layers
    held = sum(x.numel() for layer in filled for x in (layer.keys, layer.values))
    assert 5 * architecture_of(model).cached == held


@pytest.mark.parametrize(
    ("changes", "reached"),
    [
        ({}, 3),
        ({"layers_to_transform": [2]}, 1),
        ({"layers_to_transform": [2], "trainable_token_indices": [5]}, 3),
    ],
)
def test_gradients_reach_down_to_what_is_trained(changes: dict[str, Any], reached: int) -> None:
    """To the rows of single tokens too, which stand below all layers."""
    model = causal_lm("llama", num_hidden_layers=3)
    assert (
        architecture_of(get_peft_model(model, lora_config("llama", **changes))).reached == reached
    )


def test_a_trained_head_holds_its_gradient_beside_the_tiles() -> None:
    none = ByDepth(0.0, 0.0)
    held = HeldBytes(kept=ByDepth(5.0, 3.0), passing=ByDepth(7.0, 0.0), churned=none, reading=none)
    assert update_bytes(SIZES, held, 100.0) == {"activations": 8.0, "log-prob tiles": 100.0}
    assert update_bytes(SIZES, held, 1.0)["log-prob tiles"] == 7.0
    whole = update_bytes(replace(WHOLE, reached=2), held, 100.0)
    assert whole["log-prob tiles"] == 100.0 + 4 * WHOLE.head


def test_experts_may_be_counted_layer_by_layer() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 24, "vocab_size": 64}
    counts = [
        architecture_of(
            blueprint(
                HunYuanMoEV1Config(**sizes, num_experts=4, moe_topk=taken),
                ModelSection(path=""),
                LoraSection(r=0),
                dtype=torch.float32,
            )
        ).in_experts
        for taken in (2, [2, 2])
    ]
    assert counts == [2 * 2 * 3 * 16 * 24] * 2


def test_sizes_are_read_off_a_model_that_takes_no_memory() -> None:
    section = ModelSection(path="gpt2", weights="random")
    from ppo_lab.models.loading import load_config

    lora = LoraSection(r=16, target_modules=["c_attn"])
    model = blueprint(load_config(section), section, lora, dtype=torch.bfloat16)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    of = architecture_of(model)
    assert (of.layers, of.hidden, of.vocabulary) == (12, 768, 50257)
    assert of.matrices == 12 * 12 * 768**2
    assert of.adapter == of.trained == 12 * 16 * (768 + 3 * 768)
    assert of.weight_bytes == 2 * 124_439_808 + 4 * of.adapter
    upper = replace(lora, top_layers=3, target_modules=["c_attn"])
    model = blueprint(load_config(section), section, upper, dtype=torch.bfloat16)
    assert architecture_of(model).reached == 3


# ------ Memory


def test_the_tracker_sees_what_is_held_and_lets_go_of_what_is_not() -> None:
    x = torch.ones(1000, requires_grad=True)
    with tracked() as live:
        y = (x * 2).exp()  # exp keeps its result, the product is let go of
        assert live.now == 4000
        assert live.peak() == 8000
        y.sum().backward()
    assert peak_bytes(lambda: torch.zeros(10) + torch.ones(5, 10)) == 4 * (10 + 50 + 50)
    with tracked() as live:
        z = torch.empty(3, 4).zero_()  # one kernel: asking for memory is none, nor is a view
        torch.nn.functional.layer_norm(z.t(), (3,))  # one, though it makes three tensors
        z.add_(1.0)
    assert live.launches == 3
    with torch.device("meta"):
        assert peak_bytes(lambda: torch.zeros(10**12)) == 4 * 10**12


@pytest.mark.parametrize("masked", [torch.bool, torch.float16, None])
def test_attention_is_planned_by_a_kernel_that_keeps_no_scores(masked: torch.dtype | None) -> None:
    q = torch.zeros(2, 4, 64, 8, dtype=torch.float16, device="meta", requires_grad=True)
    k = torch.zeros(2, 2, 64, 8, dtype=torch.float16, device="meta", requires_grad=True)
    mask = None if masked is None else torch.zeros(2, 1, 64, 64, dtype=masked, device="meta")
    plain, scores = F.scaled_dot_product_attention, 2 * 2 * 4 * 64 * 64  # bytes
    with tracked() as live:
        by_parts = plain(q, k, k, attn_mask=mask, enable_gqa=True)
        assert live.now > scores
    assert by_parts.shape == q.shape
    with attention_of_a_gpu(), tracked() as live:
        mixed = F.scaled_dot_product_attention(q, k, k, attn_mask=mask, enable_gqa=True)
        assert live.now < scores
        mixed.sum().backward()
    assert F.scaled_dot_product_attention is plain
    assert q.grad is not None
    assert k.grad is not None
    assert mixed.shape == q.shape


def test_a_further_layer_adds_what_the_second_did() -> None:
    assert ByDepth.of(10.0, 14.0).at(12) == 10 + 11 * 4
    assert ByDepth.of(10.0, 9.0).at(12) == 10


@pytest.mark.parametrize("kind", ["bloom", "llama"])
def test_rehearsals_of_one_and_two_layers_tell_what_four_hold(kind: str) -> None:
    from test_thrift import long_rows

    key = {"llama": "num_hidden_layers"}.get(kind, "n_layer")
    minis = [
        Miniature(
            policy(kind, lora=True, vocab_size=512, **{key: n}).pretrained_model,
            checkpointing=False,
        )
        for n in (1, 2, 4)
    ]
    one, two, four = (mini.held(long_rows())[0] for mini in minis)
    assert ByDepth.of(one, two).at(4) == pytest.approx(four, rel=0.01)
    rows = [Row(3, 48)] * 4
    held = Rehearsal(minis[0], minis[1], layer_weights=1000).held(rows)
    assert held.kept.at(4) == pytest.approx(four, rel=0.1)


@pytest.mark.parametrize("trained", [False, True])
def test_log_probs_hold_no_logits_of_a_large_vocabulary(trained: bool) -> None:
    head = HeadShape(2**16, 64, trained, torch.float32)
    assert 0 < logprob_bytes(head, 256, gradients=True) < 2**16 * 256
    few = HeadShape(2**11, 64, trained, torch.float32)
    assert logprob_bytes(few, 256, gradients=True) > 2**11 * 256 * 4


# ------ Workloads


def load(**changes: Any) -> Workload:
    """Eight rows in four mini-batches, two of which make a step."""
    rows = tuple(Row(3 + i, 5) for i in range(8))
    settings = {"mini_batch": 2, "samples_a_step": 4, "epochs": 2, "iterations": 10}
    return Workload(**{"rows": rows} | settings | changes)  # type: ignore[arg-type]


def test_a_batch_falls_into_steps_passes_and_chunks() -> None:
    assert [len(step) for step in load().steps()] == [4, 4]
    assert [len(part) for part in load().passes()] == [2, 2, 2, 2]
    assert [len(part) for part in load(sampled_at_once=3).chunks()] == [3, 3, 2]
    widest = [max(r.prompt + r.response for r in p) * len(p) for p in load().passes()]
    small = load(micro_batch_tokens=12).passes()
    assert max(max(r.prompt + r.response for r in p) * len(p) for p in small) <= 15 < max(widest)
    assert sum(map(len, small)) == 8
    share = load().shared_by(2)
    assert (len(share.rows), share.mini_batch, share.samples_a_step) == (4, 1, 2)


# ------ Devices and plans


def test_a_process_is_planned_with_the_share_of_the_busiest() -> None:
    share = load(examined=(Row(3, 5),) * 4).shared_by(3)
    assert (len(share.rows), share.mini_batch, share.samples_a_step) == (3, 1, 2)
    assert len(share.examined) == 2
    assert [len(step) for step in share.steps()] == [2, 1]


def test_devices_are_found_by_the_names_that_torch_gives_them() -> None:
    assert named("NVIDIA H100 80GB HBM3") is DEVICES["h100"]
    assert named("NVIDIA A100-SXM4-40GB") is DEVICES["a100-40"]
    assert named("NVIDIA A100-SXM4-80GB") is DEVICES["a100-80"]
    assert named("NVIDIA L40S") is DEVICES["l40s"]
    assert named("NVIDIA L4") is DEVICES["l4"]
    assert named("Tesla T4") is DEVICES["t4"]
    assert named("NVIDIA GeForce RTX 4090") is DEVICES["rtx4090"]
    assert named("AMD Instinct MI300X") is DEVICES["mi300x"]
    assert named("Quadro K620") is None
    assert DEVICES["t4"].flops("bfloat16") == DEVICES["t4"].float32


def test_a_plan_for_another_device_needs_neither_weights_nor_network(tmp_path: Path) -> None:
    config = tiny(tmp_path, model=ModelSection(path="bigscience/bloom-560m"))
    config = replace(config, lora=LoraSection(r=16, target_modules=["query_key_value"]))
    config = replace(config, ppo=replace(config.ppo, batch_size=16, mini_batch_size=8))
    plan = plan_of(config, Target(DEVICES["h100"]))
    assert plan.memory.standing["weights"] == pytest.approx(2 * 559_214_592)
    assert plan.memory.standing["adapter and optimizer"] == 16 * plan.of.trained
    assert set(plan.phases) == {"generate", "score", "reference", "update"}
    assert plan.fits
    assert any("not measured" in note for note in plan.notes)
    whole = plan_of(replace(config, lora=LoraSection(r=0)), Target(DEVICES["t4"]))
    assert whole.memory.standing["Adam's moments"] == 8 * 559_214_592
    thrifty = replace(config, lora=LoraSection(r=0), ppo=replace(config.ppo, adam="8bit"))
    eight = plan_of(thrifty, Target(DEVICES["t4"])).memory.standing["Adam's moments"]
    assert eight < 0.26 * whole.memory.standing["Adam's moments"]


def test_what_a_run_refuses_is_not_planned(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    section = {"tokenizer": str(tmp_path / "tokenizer")}
    config = tiny(tmp_path, model=section)
    inputs(tmp_path, vocab_size=BYTE_VOCABULARY)
    assert plan_of(config, Target(DEVICES["h100"])).of.vocabulary == BYTE_VOCABULARY
    inputs(tmp_path, vocab_size=100)
    with pytest.raises(ConfigError, match=r"model\.tokenizer: 259 tokens, .* has 100 rows"):
        plan_of(config, Target(DEVICES["h100"]))
    inputs(tmp_path, model_type="rwkv", architectures=["RwkvForCausalLM"])
    with pytest.raises(ConfigError, match="RwkvForCausalLM: it takes no cache"):
        plan_of(config, Target(DEVICES["h100"]))


def test_a_recorded_token_is_launched_in_less_time_where_the_layers_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path)
    plain = replace(config, model=replace(config.model, cuda_graphs=False))

    def seconds(c: Any) -> float:
        return plan_of(c, Target(DEVICES["h200"])).phases["generate"].seconds

    assert seconds(config) < 0.6 * seconds(plain)
    slow = replace(config, model=replace(config.model, fast_layers=False))
    assert seconds(slow) >= seconds(plain)
    monkeypatch.setattr("ppo_lab.models.fast.families.READERS", {})
    assert seconds(config) == seconds(plain)


# Seconds by phase, and bytes of tensors at their most, of an iteration of BLOOM 560m on an H200.
TOOK_S = {"generate": 0.149, "reference": 0.026, "update": 0.222}
TOOK_LAUNCHED_S = {"reference": 0.107, "update": 0.778}  # when passes were not recorded yet
HELD = 4.29e9


def of_560m(folder: Path, **model: Any) -> Any:
    """A run of the shape that was measured: 64 x (64 + 128) tokens, 16 optimizer steps."""
    return tiny(
        folder,
        model=ModelSection(path="bigscience/bloom-560m", **model),
        lora={"r": 16},
        ppo={"batch_size": 64, "mini_batch_size": 16, "ppo_epochs": 4},
        generation={"max_new_tokens": 128},
        # Where no prompts are they are counted at their longest.
        data={"path": str(folder / "nowhere.jsonl"), "max_prompt_tokens": 64},
    )


def test_an_iteration_on_an_h200_is_planned_within_a_third_of_what_it_took(tmp_path: Path) -> None:
    plan = plan_of(of_560m(tmp_path), Target(DEVICES["h200"]))
    for name, seconds in TOOK_S.items():
        assert plan.phases[name].seconds == pytest.approx(seconds, rel=1 / 3), name
    assert plan.memory.tensors == pytest.approx(HELD, rel=0.05)
    launched = plan_of(of_560m(tmp_path / "launched", cuda_graphs=False), Target(DEVICES["h200"]))
    for name, seconds in TOOK_LAUNCHED_S.items():
        assert launched.phases[name].seconds == pytest.approx(seconds, rel=1 / 3), name
        assert launched.phases[name].binds == "launches"


def subject(folder: Path, **changes: Any) -> Subject:
    return subject_of(tiny(folder, **changes), Target(DEVICES["h200"]))


EVERYTHING = Recorded(tokens=True, kept=True, reading=True, learning=True)
NOT_PASSES = EVERYTHING._replace(reading=False, learning=False)
NOT_UPDATES = EVERYTHING._replace(learning=False)


@pytest.mark.parametrize(
    ("changes", "recorded"),
    [
        ({}, EVERYTHING),
        ({"model": {"cuda_graphs": False}}, Recorded(*[False] * 4)),
        ({"model": {"fast_layers": False}}, Recorded(*[False] * 4)),
        ({"model": {"torch_compile": True}}, NOT_PASSES),
        ({"ppo": {"cache_trunk": True}}, NOT_PASSES),
        ({"ppo": {"gradient_checkpointing": True}}, NOT_UPDATES),
        ({"ppo": {"micro_batch_tokens": 64}}, NOT_UPDATES),
        ({"ppo": {"micro_batch_tokens": -1}}, NOT_UPDATES),
    ],
    ids=str,
)
def test_passes_are_recorded_under_the_settings_that_let_them(
    changes: dict[str, Any], recorded: Recorded, tmp_path: Path
) -> None:
    assert recorded_by(subject(tmp_path, **changes), known=True) == recorded


def test_passes_are_not_recorded_where_others_have_a_part_or_layers_are_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = subject(tmp_path)
    assert recorded_by(replace(made, processes=2), known=True) == NOT_PASSES
    assert not any(recorded_by(made, known=False))
    with_critic = {"critic": ModelCritic(path=made.config.model.path)}
    assert recorded_by(subject(tmp_path, **with_critic), known=True) == EVERYTHING
    monkeypatch.setattr("ppo_lab.models.fast.families.READERS", {})
    assert recorded_by(subject(tmp_path, **with_critic), known=True) == NOT_PASSES


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"cuda_graphs": False},
        {"fast_layers": False},
        # A trunk asks for the truth of a compiled decoder, which has none.
        {"torch_compile": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_planner_and_a_trunk_agree_on_what_may_be_recorded(
    model: dict[str, Any], checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path, model=model, ppo={"gradient_checkpointing": checkpointing})
    policy = load_policy(config, load_tokenizer(config.model), "cpu")
    if checkpointing:
        policy.gradient_checkpointing_enable()
    monkeypatch.setattr(Trunk, "_device", "cuda")
    monkeypatch.setattr(policy.trunk, "_proved_on", "cuda")
    planned = recorded_by(subject_of(config, Target(DEVICES["h200"])), known=True)
    for learns, expected in ((False, planned.reading), (True, planned.learning)):
        policy.train(learns)
        assert policy.trunk.passes_may_be_recorded(32) == expected


def test_nothing_is_kept_on_a_gpu_that_it_does_not_fit_on(tmp_path: Path) -> None:
    config, h200 = of_560m(tmp_path), DEVICES["h200"]
    config = replace(config, generation=replace(config.generation, max_new_tokens=120))
    roomy = plan_of(config, Target(h200))
    assert roomy.memory.passing["update"]["KV cache, kept"] == 64 * 192 * roomy.of.cached * 2
    assert keeps(plan_of(config, Target(replace(h200, memory=1.01 * roomy.memory.total))))
    full = plan_of(config, Target(replace(h200, memory=0.99 * roomy.memory.total)))
    assert full.fits
    assert not keeps(full)
    assert full.phases["generate"].seconds > roomy.phases["generate"].seconds
    assert full.phases["update"].seconds > 1.5 * roomy.phases["update"].seconds


def test_nothing_is_kept_where_less_than_half_of_a_gpu_is_free(tmp_path: Path) -> None:
    config = of_560m(tmp_path)
    config = replace(config, ppo=replace(config.ppo, mini_batch_size=1))  # little beside it
    memory = plan_of(config, Target(DEVICES["h200"])).memory
    before = sum(memory.standing.values()) + memory.around["CUDA"]
    before += memory.passing["update"]["KV cache, kept"]
    assert memory.total < 1.99 * before
    for room, kept in ((1.99 * before, False), (2.01 * before, True)):
        assert keeps(plan_of(config, Target(replace(DEVICES["h200"], memory=room)))) == kept


def test_several_processes_keep_buffers_and_record_no_passes(tmp_path: Path) -> None:
    shared = plan_of(of_560m(tmp_path), Target(DEVICES["h200"], 2), processes=2)
    assert "KV cache, kept" in shared.memory.passing["update"]
    assert "recorded passes" not in shared.memory.around
    assert shared.phases["update"].binds == "launches"


def keeps(plan: Plan) -> bool:
    """Whether buffers and recorded passes are kept in the GPU's memory."""
    found = {"KV cache, kept" in plan.memory.passing["update"]}
    found.add("recorded passes" in plan.memory.around)
    assert len(found) == 1, "both or neither"
    return found.pop()


def test_parts_of_a_generation_are_recorded_anew_where_they_are_of_several_shapes(
    tmp_path: Path,
) -> None:
    made = subject(tmp_path)
    even, uneven = (replace(made, workload=load(sampled_at_once=n)) for n in (4, 3))
    assert not records_again(even)
    assert records_again(uneven)
    longer = tuple(Row(n, 5) for n in (8, 8, 17, 17))
    wider = replace(load(sampled_at_once=2), rows=longer)
    assert records_again(replace(made, workload=wider))


def test_checkpointed_activations_are_fewer_and_cost_time(tmp_path: Path) -> None:
    config = tiny(tmp_path, evaluation=EvaluationSection())
    thrifty = replace(config, ppo=replace(config.ppo, gradient_checkpointing=True))
    plain, again = (plan_of(c, Target(DEVICES["a10"])) for c in (config, thrifty))
    held = [plan.memory.passing["update"]["activations"] for plan in (plain, again)]
    assert held[1] < 0.5 * held[0]
    assert again.phases["update"].work.flops > plain.phases["update"].work.flops


@pytest.mark.parametrize("target", [Target(DEVICES["h100"]), Target()])
def test_the_exact_kl_costs_two_more_passes_and_the_vocabulary(
    tmp_path: Path, target: Target
) -> None:
    config = tiny(tmp_path)
    full = replace(config, ppo=replace(config.ppo, kl_penalty="full"))
    plain, exact = (plan_of(c, target) for c in (config, full))
    read, reread = (plan.phases["reference"] for plan in (plain, exact))
    assert reread.work.flops > 2.9 * read.work.flops
    entries = sum(row.response for row in plain.workload.rows) * plain.of.vocabulary
    assert reread.work.bytes >= 3 * read.work.bytes + work.FULL_KL_BYTES * entries
    assert reread.seconds > 2.5 * read.seconds
    assert exact.memory.passing["reference"]["reading"] >= 28 * entries
    others = plain.phases.keys() - {"reference"}
    assert all(exact.phases[k].work == plain.phases[k].work for k in others)


@pytest.mark.parametrize("top_layers", [0, 1])
def test_a_critic_of_the_policy_s_size_holds_as_much_whichever_layers_are_adapted(
    tmp_path: Path, top_layers: int
) -> None:
    """It is trained whole; the policy holds less where gradients pass its upper layers alone."""
    config = tiny(tmp_path, lora={"r": 4, "top_layers": top_layers})
    judged = replace(config, critic=ModelCritic(path=config.model.path))
    plan = plan_of(judged, Target(DEVICES["a10"]))
    update, layers = plan.memory.passing["update"], 2 / (top_layers or 2)
    assert update["critic's activations"] == pytest.approx(layers * update["activations"])
    alone = plan_of(config, Target(DEVICES["a10"])).memory
    assert "critic's activations" not in alone.passing["update"]
    assert plan.memory.standing["critic"] > 0


def test_the_exact_kl_holds_the_vocabulary_of_the_largest_pass_up_to_a_tile(tmp_path: Path) -> None:
    made = subject(tmp_path, ppo={"kl_penalty": "full"})
    rows = (*(Row(1000, 20),) * 2, *(Row(1000, 60),) * 2, *(Row(1000, 40),) * 2)
    for vocabulary, entries in ((1000, 2 * 60 * 1000), (10**6, TILE)):
        sized = replace(made.of, vocabulary=vocabulary)
        asked = replace(made, of=sized, workload=load(rows=rows))
        assert _full_kl_bytes(asked) == 28 * entries
    assert _full_kl_bytes(subject(tmp_path)) == 0.0


def test_evaluations_are_planned_at_their_own_length(tmp_path: Path) -> None:
    config = tiny(tmp_path, generation={"max_new_tokens": 8}, evaluation={"max_new_tokens": 8})
    longer = replace(config, evaluation=replace(config.evaluation, max_new_tokens=32))
    short, long = (plan_of(c, Target(DEVICES["h100"])) for c in (config, longer))
    assert {row.response for row in long.workload.examined} == {32}
    assert long.iteration_s == short.iteration_s
    assert long.evaluation_s > 3 * short.evaluation_s
    assert long.run_s - short.run_s == pytest.approx(
        long.workload.evaluations * (long.evaluation_s - short.evaluation_s)
    )
    asked = plan_of(longer, Target(DEVICES["h100"]), response_tokens=8)
    assert asked.evaluation_s == short.evaluation_s


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mixture_of_experts_is_planned_in_every_precision(
    tmp_path: Path, dtype: str, rank: int
) -> None:
    experts = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    config = tiny(tmp_path, model={"dtype": dtype}, lora={"r": rank})
    inputs(tmp_path, **experts, num_local_experts=4, num_experts_per_tok=2)
    plan = plan_of(config, Target(DEVICES["h100"]))
    assert plan.memory.passing["update"]["activations"] > 0


@pytest.mark.parametrize(("every", "evaluations"), [(0, 2), (1, 5), (2, 3), (3, 3), (4, 2)])
def test_the_last_evaluation_is_planned_once(every: int, evaluations: int, tmp_path: Path) -> None:
    config = tiny(tmp_path, ppo={"steps": 4}, evaluation={"every": every})
    assert workload_of(config).evaluations == evaluations


def test_gradients_are_sent_round_a_ring_twice_but_for_ones_own_share(tmp_path: Path) -> None:
    config, device = tiny(tmp_path), DEVICES["a100-80"]
    alone = plan_of(config, Target(device, 4))
    shared = plan_of(config, Target(device, 4), processes=4)
    found = {way.name: way for way in ways(alone, shared)}
    steps = shared.workload.epochs * len(shared.workload.steps())
    sent = steps * 2 * 3 / 4 * 4 * shared.of.trained
    took = found["DDP"].seconds - shared.iteration_s
    assert took == pytest.approx(sent / device.link)
    assert found["ZeRO-2"].seconds == found["DDP"].seconds < found["FSDP2"].seconds
    summed = 4 * shared.of.trained / 4  # a bucket at a time
    assert found["DDP"].bytes - shared.memory.total == pytest.approx(summed, abs=1.0)


def test_a_model_that_fits_no_device_whole_fits_when_it_is_sharded(tmp_path: Path) -> None:
    config = tiny(tmp_path, lora={"r": 0})
    target = Target(DEVICES["a10"], 8)
    alone = plan_of(config, target)
    shared = plan_of(config, target, processes=8)
    size = alone.memory.total
    small = [replace(plan, room=0.6 * size) for plan in (alone, shared)]
    standing = {"weights": 1.5e9, "reference": 1.5e9, "gradients": 1.5e9, "Adam's moments": 3e9}
    grown = [replace(plan, memory=replace(plan.memory, standing=standing)) for plan in small]
    found = {way.name: way for way in ways(*(replace(p, room=4e9) for p in grown))}
    assert not found["one device"].fits
    assert not found["DDP"].fits
    assert found["FSDP2"].fits
    assert fitting(list(found.values())).name == "FSDP2"  # type: ignore[union-attr]
    assert found["FSDP2"].file == "fsdp2"


def test_a_report_says_how_much_how_long_and_what_binds(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    target = Target(DEVICES["h100"], 4)
    alone = plan_of(config, target)
    run = Planned(["seed=0"], 1, alone, ways(alone, plan_of(config, target, processes=4)))
    console = Console(record=True, width=110)
    show([run, replace(run, changes=["seed=1"])], console)
    said = console.export_text()
    for text in (
        "weights",
        "(KV cache, in generate",
        "TFLOP",
        "ZeRO-3",
        "fits: ",
        "binds: launches",
        "s an iteration",
    ):
        assert text in said
    assert "2 runs" in said


def test_hours_are_of_all_devices_and_those_of_a_search_of_all_its_trials(tmp_path: Path) -> None:
    """A search is one run that comes several times: its page is of one of them."""
    config, target = tiny(tmp_path, ppo={"steps": 1000}), Target(DEVICES["h100"], 4)
    alone, shared = (plan_of(config, target, processes=n) for n in (1, 4))
    one, ddp = ways(alone, shared)[:2]
    run, seconds = Planned(["trial"], 25, alone, [one]), alone.run_s
    assert run.device_hours == pytest.approx(seconds / 3600)
    sharded = replace(run, times=1, ways=[replace(one, fits=False), replace(ddp, fits=True)])
    assert sharded.device_hours == pytest.approx(
        seconds * ddp.seconds / alone.iteration_s * 4 / 3600
    )
    console = Console(record=True, width=110)
    show([run, sharded], console)
    said = console.export_text()
    assert f"{number(seconds / 3600)} GPU-hours" in said
    row = next(line for line in said.splitlines() if line.startswith("25 x "))
    assert row.split()[-1] == number(25 * seconds / 3600)
    total = 25 * seconds / 3600 + sharded.device_hours
    assert f"26 runs, {number(total)} hours of devices in all" in said


def test_a_measurement_is_believed_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a busy machine was measured at does not stay its speed for ever."""
    monkeypatch.setenv("PPO_LAB_CACHE", str(tmp_path / "cache"))
    made: list[int] = []
    measure = measured_module._measure
    monkeypatch.setattr(
        measured_module, "_measure", lambda *a: made.append(1) or measure(*a)  # type: ignore[func-returns-value]
    )  # fmt: skip
    config = tiny(tmp_path)
    first, second = (plan_of(config, Target()) for _ in range(2))
    assert len(made) == 1
    assert first.phases == second.phases
    monkeypatch.setattr(measured_module, "BELIEVED_S", 0.0)
    plan_of(config, Target())
    assert len(made) == 2


class Only(TorchDispatchMode):
    """Notes on which devices operations work, but for those on single numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, found)) if isinstance(x, torch.Tensor)]
        self.seen |= {x.device.type for x in tensors if x.dim()}
        return found


def test_what_is_measured_lies_where_the_run_will() -> None:
    """Not on the host of a GPU. The meta device stands for one here: it is no CPU either."""
    head = HeadShape(600, 16, trained=True, dtype=torch.float32, device="meta")
    with Only() as used:
        sampling_bytes(head, 3)
        logprob_bytes(head, 5, gradients=True)
        logprob_seconds(head, 5, gradients=True)
    assert used.seen == {"meta"}
    mini: Any = SimpleNamespace(policy=SimpleNamespace(device=torch.device("meta")))
    tokens = Rehearsal(mini, mini, 1)._tokens_of([Row(3, 2)])
    assert tokens.queries.device.type == tokens.responses.device.type == "meta"


@pytest.mark.parametrize("part", ["processor", "gpu"])
def test_a_measurement_is_that_of_one_kind_of_machine(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache may lie on a disk that several machines share."""
    gpu = ["NVIDIA H100 80GB HBM3"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu[0])
    here = measured_module._place("a run")
    assert measured_module._place("a run") == here
    if part == "gpu":
        gpu[0] = "NVIDIA L4"
    else:
        monkeypatch.setattr(machine, "processor", lambda: "another")
    assert measured_module._place("a run") != here


def test_a_machine_is_measured_with_the_layers_that_the_run_would_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PPO_LAB_CACHE", str(tmp_path / "cache"))
    asked: list[bool] = []
    train = Miniature.train
    monkeypatch.setattr(
        Miniature, "train", lambda self, *a: asked.append(layers_of(self)) or train(self, *a)
    )  # fmt: skip
    config = tiny(tmp_path)
    for fast in (True, False):
        asked.clear()
        plan_of(replace(config, model=replace(config.model, fast_layers=fast)), Target())
        assert set(asked) == {fast}


def layers_of(mini: Miniature) -> bool:
    """Whether policy and reference of a miniature go through the project's own layers."""
    assert mini.reference.trunk.fast_layers == mini.policy.trunk.fast_layers
    return mini.policy.trunk.fast_layers


def test_a_plan_says_that_compiled_layers_are_not_counted(tmp_path: Path) -> None:
    config = tiny(tmp_path, model={"torch_compile": True})
    assert any("torch_compile" in note for note in plan_of(config, Target(DEVICES["h100"])).notes)


# ------ The command


def test_the_planner_reads_its_own_arguments_and_leaves_the_others() -> None:
    asked = read(["model=gpt2", "device=H100", "devices=8", "response_tokens=20", "-m"])
    assert (asked.device, asked.devices, asked.response_tokens) == ("h100", 8, 20)
    assert asked.run == ["model=gpt2", "-m"]
    assert read(["device=cpu"]).run == ["device=cpu"]
    with pytest.raises(ConfigError) as refused:
        read(["device=h1000", "devices=0"])
    assert len(refused.value.problems) == 2
    assert "did you mean h100?" in refused.value.problems[0]


@pytest.mark.parametrize("words", [["--help"], ["device=h1000"], ["ppo.cliprange=7"]])
def test_the_planner_answers_at_once_without_importing_anything_heavy(
    words: list[str], tmp_path: Path
) -> None:
    done = cli(*words, folder=tmp_path, program=("-X", "importtime", "-m", "ppo_lab.plan"))
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.split("\n")}
    assert "ppo_lab" in loaded
    assert not loaded & {"torch", "transformers", "trl", "peft", "datasets", "wandb"}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["sft", "reward_model"])
def test_the_stages_before_ppo_explain_themselves_at_once(stage: str, tmp_path: Path) -> None:
    program = ("-X", "importtime", "-m", f"ppo_lab.{stage}")
    done = cli("--help", folder=tmp_path, program=program)
    assert done.returncode == 0
    assert "fit.learning_rate" in done.stdout
    assert "torch" not in {
        line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.split("\n")
    }


def test_a_sweep_is_planned_in_all(tmp_path: Path) -> None:
    words = [w for w in command(tmp_path) if not w.startswith("device=")]
    done = subprocess.run(
        [sys.executable, "-m", "ppo_lab.plan", "-m", *words, "device=t4", "ppo.lam=0.9,1.0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "2 runs" in done.stdout
    assert "ppo.lam=0.9" in done.stdout
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_plans_hold_on_this_machine() -> None:
    assert check(CASES) == 0


def test_a_plan_holds_within_what_is_promised_and_not_beyond() -> None:
    assert Held("", 1.1e9, 14.0, 1e9, 10.0).holds
    assert not Held("", 1.2e9, 10.0, 1e9, 10.0).holds
    assert not Held("", 1e9, 16.0, 1e9, 10.0).holds
    assert not Held("", 1e9, 6.0, 1e9, 10.0).holds


# ------ While a run is under way


PEAK = 1e15


def test_a_rate_above_the_peak_shows_that_it_was_measured_beside_other_work() -> None:
    made, asked = trainer(), []

    def peak(**said: bool) -> float:
        asked.append(said)
        return 1e3 if not said else 2e3

    made.clock._peak_flops = peak
    stats = [made.learn(made.collect(ragged()), _scores()) for _ in range(2)]
    assert stats[0]["mfu"] == 1.0
    assert asked[:2] == [{}, {"again": True}]
    assert all(row["mfu"] <= 1.0 for row in stats)


def test_of_a_measured_peak_the_largest_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PPO_LAB_CACHE", str(tmp_path))
    found = iter([3.0, 2.0, 5.0])
    monkeypatch.setattr(machine, "product_rate", lambda *_: next(found))
    ask = partial(machine.peak_flops, "cpu", torch.float32)
    assert [ask(), ask(), ask(again=True), ask(again=True), ask()] == [3.0, 3.0, 3.0, 5.0, 5.0]
    assert len(list((tmp_path / "plan").iterdir())) == 1
    monkeypatch.setattr(machine, "processor", lambda: "Another (R) CPU @ 2 GHz")
    monkeypatch.setattr(machine, "product_rate", lambda *_: 1.0)
    assert ask() == 1.0
    assert len(list((tmp_path / "plan").iterdir())) == 2


def test_utilisation_is_counted_flops_over_time_and_peak_rate() -> None:
    made = trainer()
    made.clock._peak_flops = lambda **_: PEAK
    stats = made.learn(made.collect(ragged()), _scores())
    flops = Meter(made.policy).flops(ragged(), epochs=2, critic_epochs=2)
    assert stats["mfu"] == pytest.approx(flops / stats["time/iteration"] / PEAK)
    assert METRICS["mfu"][0] == "share"
    assert stats["tokens_per_second"] == pytest.approx((4 + 2 + 5 + 3) / stats["time/iteration"])
    of = architecture_of(made.policy.pretrained_model)
    amount = Amount.of([(3, 4), (1, 2), (4, 5), (2, 3)])
    assert flops == work.iteration_flops(of, amount, epochs=2)


@pytest.mark.parametrize("cached", [False, True])
def test_utilisation_counts_the_exact_kl_as_the_planner_does(cached: bool, tmp_path: Path) -> None:
    upper = lora_config("llama", layers_to_transform=[1])
    model = AutoModelForCausalLMWithValueHead.from_pretrained(causal_lm("llama"), peft_config=upper)
    made = trainer(model, kl_penalty="full", cache_trunk=cached)
    made.clock._peak_flops = lambda **_: PEAK
    stats = made.learn(made.collect(ragged()), _scores())
    amount, of = Amount.of([(3, 4), (1, 2), (4, 5), (2, 3)]), made.meter.policy
    flops = work.iteration_flops(of, amount, epochs=2, cached=cached)
    flops += work.full_kl_flops(of, amount, cached=cached)
    assert stats["mfu"] * stats["time/iteration"] * PEAK == pytest.approx(flops)
    ppo = {"kl_penalty": "full", "cache_trunk": cached}
    config = tiny(tmp_path, ppo=ppo, lora={"top_layers": 1})
    plan = plan_of(config, Target(DEVICES["h100"]))
    rows = Amount.of([(row.prompt, row.response) for row in plan.workload.rows])
    planned = sum(plan.phases[k].work.flops for k in ("generate", "reference", "update"))
    counted = work.iteration_flops(plan.of, rows, epochs=2, cached=cached)
    assert planned == pytest.approx(counted + work.full_kl_flops(plan.of, rows, cached=cached))


def test_what_one_trainer_kept_of_a_trunk_the_next_does_not_count_on() -> None:
    upper = lora_config("llama", layers_to_transform=[1])
    model = AutoModelForCausalLMWithValueHead.from_pretrained(causal_lm("llama"), peft_config=upper)
    tokens, counted = ragged(), []
    for cached in (False, True, False):
        made = trainer(model, cache_trunk=cached)
        counted.append(made.meter.flops(tokens, epochs=2, critic_epochs=2))
    assert counted[0] == counted[2] > counted[1]


def test_a_value_head_that_learns_alone_costs_the_passes_of_its_trunk() -> None:
    made = trainer(critic_warmup_steps=1, steps=2)
    made.clock._peak_flops = lambda **_: PEAK
    stats = made.learn(made.collect(ragged()), _scores())
    amount, of = Amount.of([(3, 4), (1, 2), (4, 5), (2, 3)]), made.meter.policy
    trunk = work.forward_flops(of, amount._replace(scored=0))
    flops = work.iteration_flops(of, amount, epochs=0) + 2 * trunk
    assert stats["mfu"] * stats["time/iteration"] * PEAK == pytest.approx(flops)


def test_a_value_head_that_learns_alone_passes_none_of_the_layers_that_were_kept() -> None:
    upper = lora_config("llama", layers_to_transform=[1])
    model = AutoModelForCausalLMWithValueHead.from_pretrained(causal_lm("llama"), peft_config=upper)
    made = trainer(model, cache_trunk=True, critic_warmup_steps=1, steps=2)
    made.clock._peak_flops = lambda **_: PEAK
    stats = made.learn(made.collect(ragged()), _scores())
    amount, of = Amount.of([(3, 4), (1, 2), (4, 5), (2, 3)]), made.meter.policy
    half = work.forward_flops(of, amount._replace(scored=0), share=0.5)
    flops = work.iteration_flops(of, amount, epochs=0, cached=True) + 2 * half
    assert stats["mfu"] * stats["time/iteration"] * PEAK == pytest.approx(flops)


def test_epochs_that_were_not_made_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(early_stopping=True, ppo_epochs=4)
    made.clock._peak_flops = lambda **_: PEAK
    monkeypatch.setattr(made.updates, "_moved_too_far", lambda sums: True)
    stats = made.learn(made.collect(ragged()), _scores())
    assert stats["ppo/epochs"] == 1
    flops = stats["mfu"] * stats["time/iteration"] * PEAK
    assert flops == pytest.approx(Meter(made.policy).flops(ragged(), epochs=1, critic_epochs=1))


def test_tokens_that_are_context_alone_are_not_scored() -> None:
    made, tokens = trainer(), ragged()
    less = replace(tokens, mask=tokens.mask & (torch.arange(5) != 1))
    of, unscored = made.meter.policy, int(tokens.mask.sum() - less.mask.sum())
    whole, fewer = (made.meter.flops(t, epochs=2, critic_epochs=2) for t in (tokens, less))
    # By sampling and the reference, and forward and backward in both epochs.
    assert whole - fewer == pytest.approx((2 + 2 * 3) * 2 * of.head * unscored)


def test_the_reference_s_copy_of_an_adapter_is_no_second_adapter() -> None:
    fresh, begun = policy(lora=True), policy(lora=True)
    train_adapter(begun)
    assert trainer(begun).meter.policy.adapter == trainer(fresh).meter.policy.adapter > 0


def test_measuring_the_peak_rate_moves_no_random_number_of_a_run() -> None:
    before = torch.get_rng_state()
    assert product_rate(torch.float32, "cpu") > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_a_slow_product_is_measured_by_few_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen.append(len(a))
        return a @ b

    monkeypatch.setattr(machine, "pulled_back", multiply)
    for too_long, rows in ((1e9, 512), (0.0, machine.FEW)):
        seen: list[int] = []
        monkeypatch.setattr(machine, "TOO_LONG", too_long)
        assert product_rate(torch.float32, "cpu") > 0
        assert max(seen) == rows


def test_there_is_no_utilisation_of_a_device_that_nobody_knows() -> None:
    made = trainer()
    made.clock._peak_flops = lambda **_: 0.0
    assert "mfu" not in made.learn(made.collect(ragged()), _scores())


def test_a_run_records_its_utilisation(tmp_path: Path) -> None:
    from ppo_lab.experiment import run

    run(tiny(tmp_path, ppo={"steps": 1}), tmp_path / "run")
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < row["mfu"] < 1


def _scores() -> Any:
    from ppo_lab.types import Scores

    return Scores(torch.tensor([1.0, -0.5, 2.0, 0.25]))
