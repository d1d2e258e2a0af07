"""What makes a run smaller or faster without changing it: checkpointing, passes as large as memory
lets them be, 8-bit Adam, a compiled decoder.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from tiny_models import VOCABULARY, causal_lm, policy, ragged, timeless, trainer, weights
from tiny_runs import metrics, tiny
from torch.testing import assert_close

from ppo_lab import checkpoint, memory
from ppo_lab.experiment import build, run
from ppo_lab.optim import is_8bit, make_optimizer
from ppo_lab.plan.architecture import architecture_of
from ppo_lab.plan.memory import standing_bytes, trained_whole
from ppo_lab.plan.trace import tracked
from ppo_lab.rules import problems
from ppo_lab.types import Scores, Tokens

SCORED = Scores(torch.tensor([1.0, -0.5, 2.0, 0.25]))

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="needs the extra `quantization`"
)


# ------ Gradient checkpointing


def long_rows(rows: int = 4, time: int = 48) -> Tokens:
    """Responses so long that activations are larger than anything else."""
    ids = torch.randint(2, VOCABULARY, (rows, time), generator=torch.Generator().manual_seed(0))
    return Tokens.pack([[3, 4, 5]] * rows, ids.tolist(), pad_id=0)


def pass_of(kind: str, lora: bool, checkpointing: bool) -> tuple[int, int, dict[str, Any]]:
    """Bytes kept by a training forward of four layers, calls of a layer's inner part over forward
    and backward, and the gradients.
    """
    model = policy(kind, lora=lora, **{"llama": {"num_hidden_layers": 4}}.get(kind, {"n_layer": 4}))
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.trunk._fast = None  # both by transformers' layers
    model.train()
    blocks = model.trunk.decoder.layers if kind == "llama" else model.trunk.decoder.h
    calls: list[None] = []
    for block in blocks:
        block.mlp.register_forward_pre_hook(lambda *_: calls.append(None))
    with tracked() as live:
        seen = model.score(long_rows(), temperature=1.0)
        kept = live.now
        (seen.logprobs + seen.values).sum().backward()
    return kept, len(calls), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["bloom", "gpt2", "llama"])
def test_checkpointing_keeps_less_and_computes_each_layer_again(kind: str, lora: bool) -> None:
    kept, calls, gradients = pass_of(kind, lora, False)
    thrifty, again, same = pass_of(kind, lora, True)
    assert calls == 4
    assert again == 8
    assert thrifty < 0.35 * kept
    for name, gradient in gradients.items():
        assert_close(same[name], gradient, msg=name)


@pytest.mark.parametrize("lora", [False, True])
def test_checkpointing_leaves_the_fast_road_for_training_alone(lora: bool) -> None:
    model = policy("bloom", lora=lora)
    assert model.trunk._fast.usable()
    model.gradient_checkpointing_enable()
    model.train()
    assert not model.trunk._fast.usable()
    model.eval()
    assert model.trunk._fast.usable()


# ------ Passes chosen from free memory


def learn(**settings: Any) -> tuple[Any, dict[str, float], dict[str, Any]]:
    """A trainer after one iteration on the ragged batch, its statistics and its weights."""
    model = policy("gpt2").double()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    made = trainer(model, optimizer=sgd, **settings)
    return made, made.learn(made.collect(ragged()), SCORED), weights(model)


@pytest.mark.parametrize("free", [1e12, 2e5, 0.0])
def test_passes_chosen_from_free_memory_change_no_number(
    free: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: free)
    _, expected, whole = learn()
    made, stats, moved = learn(micro_batch_tokens=-1)
    for name in whole:
        assert_close(moved[name], whole[name], rtol=1e-10, atol=1e-10)
    assert timeless(stats) == pytest.approx(timeless(expected), rel=1e-6, abs=1e-9)
    longest = max(map(len, tiny_models_rows()))
    assert made.updates.most_tokens >= longest
    assert (made.updates.most_tokens == longest) == (free < 1e12)


def tiny_models_rows() -> list[list[int]]:
    """Prompt and response of each row of the ragged batch."""
    tokens = ragged()
    lengths = (tokens.query_mask.sum(1) + tokens.lengths).tolist()
    return [[0] * length for length in lengths]


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_passes_take_their_share_of_what_is_free_and_leave_some(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 1e6)
    monkeypatch.setattr(memory, "peak_bytes", lambda work: 1000)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(10))])
    found = memory.tokens_that_fit(lambda: None, tokens=50, optimizer=optimizer, share=share)
    room, each = share * 1e6 - 12 * 10, memory.HOLES_BESIDE * 1000 / 50
    assert found == int(memory.SHARE_OF_FREE * room / each) < room / each


def test_more_memory_means_more_tokens_and_what_is_to_come_is_left_free() -> None:
    model = policy("gpt2")
    optimizer = torch.optim.AdamW(model.parameters())
    numbers = sum(p.numel() for p in model.parameters())
    assert memory.bytes_to_come(optimizer) == 12 * numbers
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    assert memory.bytes_to_come(optimizer) == 8 * numbers
    optimizer.step()
    assert memory.bytes_to_come(optimizer) == 0


def test_moments_are_counted_in_the_precision_that_adam_keeps_them_in() -> None:
    model = causal_lm("gpt2").to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    expected, sizes = memory.bytes_to_come(optimizer), architecture_of(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moments = [state[m] for state in optimizer.state.values() for m in ("exp_avg", "exp_avg_sq")]
    held = sum(m.nbytes for m in moments)
    assert expected == held + sum(p.nbytes for p in model.parameters())
    assert standing_bytes(sizes)["Adam's moments"] == held
    whole = sizes.parameters, sizes.weight_bytes
    assert trained_whole(*whole) == held + 2 * sizes.weight_bytes
    assert trained_whole(*whole, adam="8bit") < trained_whole(*whole)


def test_a_resumed_run_keeps_to_the_passes_that_it_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 1e9)
    lab = build(tiny(tmp_path, ppo={"micro_batch_tokens": -1}), tmp_path / "run")
    lab.trainer.iteration(lab.stream.next_batch())
    chosen, state = lab.trainer.updates.most_tokens, lab.trainer.state_dict()
    monkeypatch.setattr(memory, "free_bytes", lambda: 2e9)
    other = build(tiny(tmp_path, ppo={"micro_batch_tokens": -1}), tmp_path / "other")
    other.trainer.load_state_dict(state)
    other.trainer.iteration(other.stream.next_batch())
    assert other.trainer.updates.most_tokens == chosen > 0


# ------ 8-bit Adam


def test_8_bit_adam_is_refused_where_it_is_not_installed(tmp_path: Path) -> None:
    found = problems(tiny(tmp_path, ppo={"adam": "8bit"}))
    if find_spec("bitsandbytes") is None:
        assert found == ["ppo.adam=8bit: needs bitsandbytes: pip install 'ppo_lab[quantization]'"]
    else:
        assert found == []


def test_tensors_that_share_memory_are_saved_apart(tmp_path: Path) -> None:
    table = torch.arange(4.0)
    state = {"a": {"table": table}, "b": {"table": table}, "c": table[1:]}
    found = checkpoint.read(checkpoint.save(tmp_path, state, step=1))
    assert torch.equal(found["a"]["table"], table)
    assert torch.equal(found["b"]["table"], table)
    assert torch.equal(found["c"], table[1:])


@needs_bitsandbytes
def test_8_bit_adam_moves_nearly_as_adam_does() -> None:
    moved = {}
    for adam in ("torch", "8bit"):
        torch.manual_seed(0)
        model, head = torch.nn.Linear(128, 96), torch.nn.Linear(128, 1)
        optimizer = make_optimizer(
            model,
            head,
            adam=adam,
            learning_rate=1e-2,
            value_learning_rate=0.0,
            eps=1e-8,
            weight_decay=0.0,
        )
        assert is_8bit(optimizer) == (adam == "8bit")
        start = model.weight.detach().clone()
        for _ in range(10):
            optimizer.zero_grad()
            model(torch.randn(32, 128)).square().mean().backward()
            optimizer.step()
        moved[adam] = model.weight.detach() - start
    assert torch.nn.functional.cosine_similarity(*moved.values(), dim=0).mean() > 0.98


@needs_bitsandbytes
def test_a_run_with_8_bit_adam_resumes_to_the_same_numbers(tmp_path: Path) -> None:
    wide = {"hidden_size": 64, "intermediate_size": 128}  # smaller weights keep 32-bit moments
    whole: dict[str, Any] = {"lora": {"r": 0}, "evaluation": {"every": 3}}
    whole["ppo"] = {"adam": "8bit", "learning_rate": 1e-3}
    straight = tiny(tmp_path, **whole)
    tiny_runs.inputs(tmp_path, **wide)
    run(straight, tmp_path / "straight")
    short = tiny(tmp_path, **{**whole, "ppo": {**whole["ppo"], "steps": 3}})
    tiny_runs.inputs(tmp_path, **wide)
    run(short, tmp_path / "cut")
    state = checkpoint.read(checkpoint.latest(tmp_path / "cut"))
    kinds = {t.dtype for t in leaves(state["trainer"]["optimizer"]["state"])}
    assert torch.uint8 in kinds
    again = tiny(tmp_path, **whole, resume=str(tmp_path / "cut"))
    tiny_runs.inputs(tmp_path, **wide)
    run(again, tmp_path / "cut")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "straight")


def leaves(tree: Any) -> list[torch.Tensor]:
    """Every tensor in nested dictionaries."""
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in leaves(value)]
    return [tree] if isinstance(tree, torch.Tensor) else []


# ------ A compiled decoder


def test_a_compiled_decoder_is_refused_beside_what_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path, model={"torch_compile": True}, ppo={"gradient_checkpointing": True})
    (line,) = problems(config)
    assert "leave ppo.gradient_checkpointing out" in line
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    (line,) = problems(tiny(tmp_path, model={"torch_compile": True}))
    assert "needs a C++ compiler" in line


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("gpt2", "eager"),
        *(
            pytest.param(kind, "inductor", marks=pytest.mark.slow)
            for kind in ("bloom", "gpt2", "llama")
        ),
    ],
)
def test_a_compiled_decoder_gives_the_same_gradients_by_one_graph(
    kind: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured alone (eager), which takes seconds, and turned into machine code."""
    from torch._dynamo.utils import counters

    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    plain, compiled = policy(kind, lora=True), policy(kind, lora=True)
    compiled.trunk.compile()
    for time in (5, 9, 7, 12):
        found = []
        for model in (plain, compiled):
            model.train()
            seen = model.score(long_rows(3, time), temperature=1.0)
            (seen.logprobs + seen.values).sum().backward()
            found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
            model.zero_grad()
        for name, gradient in found[0].items():
            assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    assert counters["stats"]["unique_graphs"] == 1
