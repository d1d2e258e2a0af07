"""The clipped updates: steps taken and skipped, and what a step must not depend on."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_graphed import a_gpu_without_one, move_to_a_gpu_without_one, on_gpu
from tiny_models import (
    EOS,
    PAD,
    QUERIES,
    RESPONSES,
    policy,
    ragged,
    step,
    tensors,
    timeless,
    trainer,
    weights,
)
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ppo_lab import PPOConfig
from ppo_lab.arrivals import Asked
from ppo_lab.metrics import known_metrics
from ppo_lab.models.fast.decoder import FastDecoder
from ppo_lab.packing import pack_by_tokens
from ppo_lab.processes.alone import Whole
from ppo_lab.steps import SUMS, may_be_taken
from ppo_lab.types import Batch, Scores, Tokens, tensors_of
from ppo_lab.update import ClippedUpdates, TrainingDiverged, hash_seed

SCORED = Scores(torch.tensor([1.0, -0.5, 2.0, 0.25]))


def double(model: Any) -> Any:
    """The policy in float64, its value head included."""
    return model.double()


def learn(tokens: Tokens | None = None, **settings: Any) -> tuple[dict[str, float], Any]:
    """Statistics and moved weights of one iteration on the ragged batch, in float64 and by SGD."""
    model = double(policy("gpt2"))
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    made = trainer(model, optimizer=sgd, **settings)
    stats = made.learn(made.collect(ragged() if tokens is None else tokens), SCORED)
    return stats, weights(model)


def close(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert_close(one[name], other[name], rtol=tolerance, atol=tolerance, msg=f"{name} differs")


# --- what a step must not depend on


@pytest.mark.parametrize(
    "settings",
    [
        {"mini_batch_size": 1, "gradient_accumulation_steps": 4},
        {"mini_batch_size": 2, "gradient_accumulation_steps": 2},
        {"micro_batch_tokens": 12},
        {"micro_batch_tokens": 1},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_the_size_of_a_pass_changes_no_result(settings: dict[str, Any]) -> None:
    """N-18, N-20: ragged lengths; the loss is the mean over the tokens of the optimizer batch."""
    (stats, moved), (expected, whole) = learn(**settings), learn()
    close(moved, whole, 1e-10)
    close(timeless(stats), timeless(expected), 1e-6)


def test_padding_columns_change_no_statistic_and_no_gradient() -> None:
    """N-24, N-16, G-02: on either side, whatever ids stand there."""
    tokens, dirt = ragged(), 17
    padded = replace(
        tokens,
        queries=torch.nn.functional.pad(tokens.queries, (5, 0), value=dirt),
        query_mask=torch.nn.functional.pad(tokens.query_mask, (5, 0), value=False),
        responses=torch.nn.functional.pad(tokens.responses, (0, 4), value=dirt),
        mask=torch.nn.functional.pad(tokens.mask, (0, 4), value=False),
    )
    (stats, moved), (expected, plain) = learn(padded), learn(tokens)
    close(moved, plain, 1e-10)
    close(timeless(stats), timeless(expected), 1e-6)


@pytest.mark.parametrize("pad", [EOS, 33])
def test_which_token_pads_changes_no_loss(pad: int) -> None:
    """G-02: pad == EOS gives identical losses."""
    ended = [row[-1] == EOS for row in RESPONSES]
    tokens = Tokens.pack(QUERIES, RESPONSES, pad_id=pad, ended=ended)
    (stats, moved), (expected, plain) = learn(tokens), learn()
    close(moved, plain, 1e-12)
    assert timeless(stats) == timeless(expected)
    assert PAD not in (EOS, 33)


def test_the_order_of_samples_changes_nothing() -> None:
    """N-25."""
    order = torch.tensor([2, 0, 3, 1])
    model, other = (double(policy("gpt2")) for _ in range(2))
    results = []
    for m, rows in ((model, torch.arange(4)), (other, order)):
        made = trainer(m, optimizer=torch.optim.SGD(m.parameters(), lr=0.05))
        scores = Scores(SCORED.total[rows])
        results.append((made.learn(made.collect(ragged()[rows]), scores), weights(m)))
    close(results[0][1], results[1][1], 1e-10)
    close(timeless(results[0][0]), timeless(results[1][0]), 1e-6)


@pytest.mark.parametrize("kind", ["bloom", "gpt2", "llama"])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_ratio_is_one_as_long_as_nothing_has_moved(
    kind: str, temperature: float, dtype: torch.dtype, rounding: float
) -> None:
    """N-05, N-04: over all epochs, with a learning rate that moves nothing."""
    made = trainer(policy(kind, dtype=dtype), learning_rate=1e-30, ppo_epochs=3, mini_batch_size=1)
    made.drawn = replace(made.sampling, temperature=temperature)
    rounding = rounding if temperature == 1.0 else 3 * rounding  # which a low temperature magnifies
    stats = step(made)
    assert stats["ppo/policy/first_minibatch_ratio_error"] < rounding
    assert abs(stats["ppo/policy/ratio_max"] - 1.0) < rounding
    assert stats["clip_fraction"] == 0.0


# --- how many steps, and which


@pytest.mark.parametrize(
    ("mini", "accumulation", "expected"),
    [(0, 1, 3), (4, 1, 3), (2, 1, 6), (1, 1, 12), (1, 2, 6), (2, 2, 3)],
)
def test_optimizer_steps_are_epochs_times_batch_over_mini_batch_times_accumulation(
    mini: int, accumulation: int, expected: int
) -> None:
    """N-19."""
    made = trainer(ppo_epochs=3, mini_batch_size=mini, gradient_accumulation_steps=accumulation)
    taken = []
    made.optimizer.register_step_post_hook(lambda *_: taken.append(1))
    step(made)
    assert len(taken) == expected


def test_every_sample_is_seen_once_an_epoch_in_an_order_of_its_own() -> None:
    made = trainer()
    made.config.mini_batch_size = 3
    orders = [
        torch.cat(list(made.updates.optimizer_batches(16, seed=(0, iteration, epoch)))).tolist()
        for iteration in range(2)
        for epoch in range(2)
    ]
    assert all(sorted(order) == list(range(16)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    sizes = [len(rows) for rows in made.updates.optimizer_batches(16, seed=(0, 0, 0))]
    assert sizes == [3, 3, 3, 3, 3, 1]


def test_no_epoch_of_any_iteration_takes_the_order_of_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, seeds = trainer(ppo_epochs=3), []
    split = made.updates.optimizer_batches

    def spied(n: int, *, seed: tuple[int, ...]) -> Any:
        seeds.append(seed)
        return split(n, seed=seed)

    monkeypatch.setattr(made.updates, "optimizer_batches", spied)
    step(made)
    step(made)
    assert len(set(seeds)) == len(seeds) == 2 * 3


def test_the_gradient_is_clipped_on_every_step() -> None:
    """N-21: and the norm before clipping is logged."""
    made = trainer(max_grad_norm=0.01, ppo_epochs=3, mini_batch_size=1)
    norms = []

    def look(optimizer: Any, *_: Any) -> None:
        gradients = [
            p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None
        ]
        norms.append(torch.stack([g.norm() for g in gradients]).norm().item())

    made.optimizer.register_step_pre_hook(look)
    stats = step(made)
    assert len(norms) == 12
    assert max(norms) <= 0.01 * (1 + 1e-5)
    assert stats["ppo/grad_norm"] > 0.01


def test_without_a_limit_gradients_are_left_alone() -> None:
    (_, free), (_, wide), (_, tight) = (learn(max_grad_norm=n) for n in (0.0, 1e6, 1e-3))
    close(free, wide, 1e-12)
    assert any(not torch.allclose(free[n], tight[n]) for n in free)


def test_policy_and_critic_both_move() -> None:
    """N-28."""
    for lora in (False, True):
        made = trainer(policy(lora=lora))
        before = weights(made.policy)
        step(made)
        moved = {n for n, p in weights(made.policy).items() if not torch.equal(p, before[n])}
        assert {"v_head.summary.weight", "v_head.summary.bias"} < moved
        assert any(("lora" in n) == lora and "v_head" not in n for n in moved)


def test_the_value_head_may_have_a_rate_of_its_own() -> None:
    made = trainer(learning_rate=1e-3, value_learning_rate=0.5)
    rates = [
        (group["lr"], sum(p.numel() for p in group["params"]))
        for group in made.optimizer.param_groups
    ]
    assert rates[0][0] == 1e-3
    assert rates[1] == (0.5, 17)


@pytest.fixture(params=["waiting", "behind"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A device that the host waits for, or one that works off what it is told."""
    monkeypatch.setattr(Whole, "is_behind", request.param == "behind")
    return request.param


@pytest.mark.parametrize("fault", ["ratio", "nan"])
def test_a_skipped_step_moves_nothing_not_even_moments(fault: str, device: str) -> None:
    """N-22: counted, and no momentum carries on."""
    made = trainer(ppo_epochs=3)
    assert made.models.steps_late == (device == "behind")
    made.config.ratio_threshold = 1e-6 if fault == "ratio" else 10.0
    rollout = made.collect(ragged())
    if fault == "nan":
        rollout = replace(
            rollout, values=rollout.values.masked_fill(rollout.tokens.mask, torch.nan)
        )
    before = weights(made.policy)
    stats = made.learn(rollout, SCORED)
    assert stats["ppo/skipped_updates"] == 3
    state = made.optimizer.state_dict()["state"]
    assert all(not moment.any() for of_one in state.values() for moment in of_one.values())
    assert all(torch.equal(p, before[n]) for n, p in weights(made.policy).items())


@pytest.mark.parametrize("limit", [1, 8, 16, 40])
def test_no_pass_holds_more_tokens_than_it_may_prompts_included(limit: int) -> None:
    made, tokens = trainer(micro_batch_tokens=limit), ragged()
    zeros = torch.zeros(tokens.mask.shape)
    groups = made.updates._groups(Batch(tokens, zeros, zeros, zeros, zeros))
    texts = tokens.query_mask.sum(1) + tokens.lengths
    assert sorted(torch.cat(groups).tolist()) == list(range(len(texts)))
    for rows in groups:
        assert len(rows) == 1 or int(texts[rows].max()) * len(rows) <= limit


@pytest.mark.usefixtures("device")
def test_a_masked_end_is_as_if_it_were_not_there() -> None:
    """The loss is a mean over the trained tokens, not over all that were attended to."""
    longer = [row + [33] * (1 + i) for i, row in enumerate(RESPONSES)]
    masks = [[True] * len(row) + [False] * (1 + i) for i, row in enumerate(RESPONSES)]
    masked, cut = trainer(), trainer()
    found = step(masked, responses=tensors(longer), response_masks=list(map(torch.tensor, masks)))
    expected = step(cut)
    names = ("ppo/grad_norm", "ppo/loss/policy", "ppo/loss/value", "ppo/returns/var", "kl")
    for name in names:
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(
    ("threshold", "taken"), [(0.0, True), (2.5, True), (2.0, True), (1.9, False)]
)
def test_a_step_is_taken_by_its_mean_ratio_if_all_its_numbers_are_finite(
    threshold: float, taken: bool
) -> None:
    """N-22: sums over four tokens whose ratios are 2 on average; a threshold of 0 is none."""
    numbers = torch.ones(len(SUMS) + 4, dtype=torch.float64)
    numbers[SUMS.index("tokens")], numbers[SUMS.index("ratio")] = 4.0, 8.0
    assert bool(may_be_taken(numbers, ratio_threshold=threshold)) == taken
    for place in range(len(numbers)):
        for wrong in (math.nan, math.inf, -math.inf):
            broken = numbers.clone()
            broken[place] = wrong
            assert not may_be_taken(broken, ratio_threshold=threshold), (place, wrong)


@pytest.mark.usefixtures("device")
def test_steps_skipped_in_a_row_stop_the_run_with_the_check_to_make() -> None:
    """N-22: across iterations, the batch at fault in hand."""
    made = trainer(ppo_epochs=2, max_skipped_updates=3)
    made.config.ratio_threshold = 1e-6
    step(made)
    with pytest.raises(
        TrainingDiverged, match=r"3 optimizer steps .*first_minibatch_ratio_error"
    ) as error:
        step(made)
    assert isinstance(error.value.batch, Batch)


@pytest.mark.usefixtures("device")
def test_a_step_taken_starts_the_count_of_skipped_ones_anew() -> None:
    """N-22."""
    made = trainer(ppo_epochs=2, max_skipped_updates=3)
    made.config.ratio_threshold = 1e-6
    step(made)
    made.config.ratio_threshold = 10.0
    assert step(made)["ppo/skipped_updates"] == 0
    assert made.updates.skipped_in_a_row == 0


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("side", [-1, 1])
def test_epochs_end_early_on_the_mean_over_the_epoch(side: int) -> None:
    """N-32, N-11: just below the threshold and just above, by all mini-batches of the epoch."""
    settings = {"ppo_epochs": 5, "mini_batch_size": 1, "whiten_advantages": False}
    bad = {"scores": [-5.0] * 4}  # every response becomes less likely: KL(old || new) is positive
    first = step(trainer(**settings | {"ppo_epochs": 1}), **bad)["ppo/policy/policykl"]
    assert first > 0.01
    target = first / 1.5 * (1 - side * 1e-3)
    stats = step(trainer(**settings, early_stopping=True, target_kl=target), **bad)
    assert (stats["ppo/epochs"] == 1.0) == (side == 1)
    assert step(trainer(**settings), **bad)["ppo/epochs"] == 5.0


# --- a device that is behind the host


def two_iterations(**settings: Any) -> tuple[list[dict[str, float]], Any]:
    """With Adam; of the second, two of four samples are at fault."""
    made = trainer(**{"mini_batch_size": 2, "ppo_epochs": 2, **settings})
    stats = [timeless(made.learn(made.collect(ragged()), SCORED))]
    rollout = made.collect(ragged())
    rows = torch.arange(4)[:, None] < 1
    faulty = rollout.values.masked_fill(rollout.tokens.mask & rows, torch.inf)
    stats.append(timeless(made.learn(replace(rollout, values=faulty), SCORED)))
    return stats, weights(made.policy)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ratio_threshold": 1.02, "learning_rate": 0.05},
        {"max_grad_norm": 0.0},
        {"micro_batch_tokens": 12, "gradient_accumulation_steps": 2, "ppo_epochs": 4},
    ],
    ids=str,
)
def test_a_device_that_is_behind_takes_and_skips_the_same_steps(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """N-22: to the last bit."""
    settings |= {"whiten_advantages": False}
    (stats, moved), skipped = two_iterations(**settings), "ppo/skipped_updates"
    assert 0 < sum(s[skipped] for s in stats) < 8
    monkeypatch.setattr(Whole, "is_behind", True)
    again, moved_again = two_iterations(**settings)
    for one, other in zip(stats, again, strict=True):
        assert_close(one, other, rtol=0.0, atol=0.0, equal_nan=True)
    assert all(torch.equal(moved[name], p) for name, p in moved_again.items())


def test_the_host_hears_of_a_step_when_the_next_is_on_its_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And of the last at the end, when what needs no update is worked out; with early stopping, of
    an epoch's last at its end.
    """
    events: list[str] = []

    def noted(*given: Any) -> dict[str, float]:
        events.append("metrics")
        return known_metrics(*given)

    class Noted(Asked):
        def __init__(self, numbers: Tensor) -> None:
            super().__init__(numbers)
            self.number = sum(event.startswith("asked") for event in events)
            events.append(f"asked {self.number}")

        def read(self) -> Tensor:
            events.append(f"read {self.number}")
            return super().read()

    monkeypatch.setattr("ppo_lab.update.Asked", Noted)
    monkeypatch.setattr(Whole, "is_behind", True)
    monkeypatch.setattr("ppo_lab.trainer.known_metrics", noted)
    step(trainer(mini_batch_size=2, ppo_epochs=2))
    assert events == [
        *("asked 0", "asked 1", "read 0", "asked 2", "read 1", "asked 3", "read 2"),
        *("metrics", "read 3"),
    ]
    events.clear()
    step(trainer(mini_batch_size=2, ppo_epochs=2, early_stopping=True, target_kl=1e3))
    assert events == [
        *("asked 0", "asked 1", "read 0", "read 1", "asked 2", "asked 3", "read 2", "read 3"),
        "metrics",
    ]


class AskedOfHostAlone(TorchDispatchMode):
    """Numbers are taken of the host's tensors, and of what is made of those, alone."""

    def __init__(self, host: Batch) -> None:
        super().__init__()
        self.of_host, self.asked = tensors_of(host), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        of_host = bool(given) and all(any(x is known for known in self.of_host) for x in given)
        if func is torch.ops.aten._local_scalar_dense.default:
            assert of_host, "the device is asked for a number"
            self.asked += 1
        if func in (torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default):
            raise AssertionError("the device is asked for places")
        if func is torch.ops.aten.index.Tensor:
            assert not any(x is not None and x.dtype == torch.bool for x in args[1])
        made = func(*args, **kwargs or {})
        if of_host or func in (torch.ops.aten.arange.default, torch.ops.aten.lift_fresh.default):
            self.of_host += [x for x in tree_leaves(made) if isinstance(x, Tensor)]
        return made


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"micro_batch_tokens": 16}, {"entropy_coef": 0.1}], ids=str
)
def test_a_step_that_is_launched_asks_the_host_alone(
    settings: dict[str, Any], lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ragged texts, some of whose tokens are context alone."""
    monkeypatch.setattr(Whole, "is_behind", True)
    monkeypatch.setattr(FastDecoder, "_passes_whole", lambda *_: True)
    made = trainer(policy("llama", lora=lora), mini_batch_size=2, **settings)
    tokens = ragged()
    tokens = replace(tokens, mask=tokens.mask & (tokens.responses != RESPONSES[2][0]))
    seen = made.collect(tokens)
    batch = Batch(tokens, seen.logprobs, seen.values, seen.values, seen.values)
    made._train_mode(True)
    part = batch[torch.tensor([2, 0, 1])]
    with AskedOfHostAlone(part) as mode:
        step = made.updates.optimizer_step(part, 1.0)
    assert mode.asked > 0
    assert step.taken
    assert step.sums[0] == part.tokens.mask.sum() < part.tokens.lengths.sum()


class Arriving:
    """Numbers that must not be needed yet."""

    def __init__(self, numbers: Tensor) -> None:
        assert numbers.device.type == "cuda"

    def read(self) -> Tensor:
        raise AssertionError("the host waits")


@pytest.mark.parametrize("apart", [False, True])
def test_a_step_asks_the_gpu_for_nothing(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes on a GPU. A critic apart learns alone, so that the policy has no gradient."""

    def there(x: Tensor, device: Any) -> Tensor:
        return on_gpu(x) if torch.device(device).type == "cuda" else x

    monkeypatch.setattr("ppo_lab.types.brought", there)
    monkeypatch.setattr("ppo_lab.processes.alone.brought", there)
    monkeypatch.setattr("ppo_lab.update.Asked", Arriving)
    tokens = ragged()
    batch = Batch(tokens, *[torch.zeros(tokens.mask.shape)] * 4)
    with a_gpu_without_one():
        model, critic = (torch.nn.Linear(2, 3, device="cuda") for _ in range(2))
        for module in (model, critic):
            move_to_a_gpu_without_one(module)
        adam = torch.optim.AdamW([*model.parameters(), *critic.parameters()], fused=True)
        config = PPOConfig(mini_batch_size=2, ratio_threshold=2.0)
        updates = ClippedUpdates(model, critic if apart else model, Whole(adam), config)

        def one_pass(*_: Any, only: bool) -> tuple[Tensor, Tensor]:
            assert only
            for parameter in (critic if apart else model).parameters():
                parameter.grad = on_gpu(parameter)
            return on_gpu(torch.empty(len(SUMS))), on_gpu(torch.empty(2))

        monkeypatch.setattr(updates, "_pass", one_pass)
        updates.optimizer_step(batch.each(on_gpu)[torch.tensor([2, 0])], 1.0)
        assert updates.models.steps_late
        assert len(adam.state) == 2


def test_where_somebody_is_told_of_steps_or_adam_cannot_ask_the_device_it_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Whole, "is_behind", True)
    assert trainer().models.steps_late
    assert trainer(ema_decay=0.9).models.steps_late
    assert not trainer(adam="tf").models.steps_late
    made = policy("gpt2")
    for optimizer in (torch.optim.SGD, torch.optim.AdamW, type("Mine", (torch.optim.AdamW,), {})):
        assert not trainer(made, optimizer=optimizer(made.parameters())).models.steps_late
    told = trainer()
    told.optimizer.register_step_post_hook(lambda *_: None)
    assert not told.models.steps_late


# --- memory and numbers


def test_checkpointing_recomputes_in_the_update_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """N-08, M-06: the gradient forward is in train mode, scoring is not."""
    for enabled in (True, False):
        made = trainer(policy("gpt2"), gradient_checkpointing=enabled, ppo_epochs=1)
        block, calls = made.policy.trunk.decoder.h[0], []
        block.attn.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        rollout = made.collect(ragged())
        before_update = len(calls)
        made.learn(rollout, SCORED)
        assert len(calls) - before_update == (2 if enabled else 1)
        assert before_update == 1


def test_what_is_kept_of_a_step_holds_no_graph() -> None:
    """M-02: the activations of every step of an iteration would stay with it."""
    made = trainer(gradient_accumulation_steps=2, mini_batch_size=1)
    rollout = made.collect(ragged())
    made.updates.prepare(rollout.tokens)
    batch = made.shape(rollout, SCORED).batch
    epochs = made.updates.launch(batch, temperature=1.0, seed=(0, 0))
    kept = [step.sums for epoch in epochs for step in epoch]
    assert len(kept) == 4
    assert not any(sums.requires_grad for sums in kept)


def test_statistics_are_floats_and_hold_on_to_nothing() -> None:
    """M-02, L-01: also for bfloat16 weights."""
    for dtype in (torch.float32, torch.bfloat16):
        stats = step(trainer(policy(dtype=dtype)))
        assert {type(value) for value in stats.values()} == {float}
        assert all(value == value for value in stats.values())


def test_rows_are_packed_longest_first_within_the_limit() -> None:
    groups = pack_by_tokens(torch.tensor([3, 10, 4, 4, 12]), limit=12)
    assert [g.tolist() for g in groups] == [[4], [1], [2, 3, 0]]


def test_a_seed_is_made_of_all_its_numbers() -> None:
    seeds = {hash_seed(a, b, c) for a in range(3) for b in range(3) for c in range(3)}
    assert len(seeds) == 27
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert hash_seed(1, 2, 3) == hash_seed(1, 2, 3)


def test_an_entropy_bonus_keeps_the_distribution_wider() -> None:
    """N-23: the entropy is that of the distribution, and never negative."""
    entropies = []
    for coefficient in (0.0, 1.0):
        made = trainer(entropy_coef=coefficient, ppo_epochs=8, learning_rate=5e-3)
        step(made)
        entropies.append(step(made)["ppo/policy/entropy"])
    assert 0 < entropies[0] < entropies[1]


def test_the_upper_side_may_be_clipped_at_another_epsilon() -> None:
    narrow, wide = (
        step(trainer(ppo_epochs=6, learning_rate=0.02, cliprange=0.05, cliprange_high=high))
        for high in (0.0, 5.0)
    )
    assert narrow["clip_fraction/high"] > 0
    assert wide["clip_fraction/high"] < narrow["clip_fraction/high"]
    assert narrow["clip_fraction"] == pytest.approx(
        narrow["clip_fraction/low"] + narrow["clip_fraction/high"]
    )
