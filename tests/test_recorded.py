"""Recorded passes of updates and collection teach and say what launched ones do."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from test_critic import classifier
from test_graphed import (
    BrokenTape,
    Tape,
    a_gpu_without_one,
    anatomy_there,
    move_to_a_gpu_without_one,
    on_gpu,
)
from tiny_models import (
    PAD,
    VOCABULARY,
    causal_lm,
    lora_config,
    policy,
    ragged,
    timeless,
    tokenizer,
    train_adapter,
    trainer,
    weights,
)
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from ppo_lab import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, rollout
from ppo_lab.models.critic import Critic
from ppo_lab.models.fast.decoder import FastDecoder
from ppo_lab.models.fast.recording import KEPT, ByShape
from ppo_lab.models.trunk import Trunk
from ppo_lab.processes.alone import Alone, Whole
from ppo_lab.recorded import (
    COLUMNS,
    STEPS,
    RecordedPasses,
    add_gradients,
    fitted,
    tensors_of,
)
from ppo_lab.types import Batch, Prompts, Scores, Tokens
from ppo_lab.update import EVERYBODY, ClippedUpdates, Turn

# Adam's usual eps makes steps of what in gradients that are zero is rounding alone.
SETTINGS: dict[str, Any] = {"mini_batch_size": 2, "gradient_accumulation_steps": 2}
SETTINGS |= {"ppo_epochs": 2, "adam_eps": 1e-3}
IN_ONE_PASS: dict[str, Any] = {"mini_batch_size": 4, "gradient_accumulation_steps": 1}
IN_ONE_PASS |= {"ppo_epochs": 3}

Take = Callable[[Tape], None]


class Watched(Tape):
    """Tells passes that learn from those that only read."""

    learnt = learning = 0

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        play, results = super().record(function)
        learns = torch.is_grad_enabled()
        self.learning += learns

        def watched() -> None:
            self.learnt += learns
            play()

        return watched, results


class Bare(Tape):
    """Gives a function's own results, as a CUDA graph does, and plays nothing."""

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        return lambda: None, function()


class LyingTape(Tape):
    """Plays sums and extremes as they are, and other gradients."""

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        play, results = super().record(function)

        def lie() -> None:
            play()
            for result in results[2:]:
                result.add_(1.0)

        return lie, results


class FullGPU(Tape):
    """Once told so, has no memory left for the next pass that is made and learns, or reads."""

    full_for = ""

    def warm(self, function: Callable[[], Any]) -> Any:
        if self.full_for == ("learning" if torch.is_grad_enabled() else "reading"):
            self.full_for = ""
            raise torch.OutOfMemoryError("CUDA out of memory")
        return function()


class Several(Alone):
    """One of several processes, as far as recording goes: its models are not simply whole."""

    def wrap(self, models: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer) -> Whole:
        return type("Copied", (Whole,), {})(optimizer)


@pytest.fixture
def a_gpu_with(monkeypatch: pytest.MonkeyPatch) -> Take:
    """Trunks believe to be on a GPU, and passes are recorded by the tape."""

    def take(tape: Tape) -> None:
        monkeypatch.setattr(Trunk, "_device", "cuda")
        monkeypatch.setattr(FastDecoder, "_passes_whole", lambda *_: True)
        monkeypatch.setattr("ppo_lab.recorded.Recorder", lambda _: tape)
        monkeypatch.setattr("ppo_lab.recorded.has_room", lambda _: True)

    return take


def adapted(**changes: Any) -> Any:
    """A policy whose adapter is trained already."""
    peft_config = lora_config("bloom", **changes)
    torch.manual_seed(1)
    made = AutoModelForCausalLMWithValueHead.from_pretrained(causal_lm(), peft_config=peft_config)
    train_adapter(made)
    return made


def scored(tokens: Tokens) -> Scores:
    return Scores(torch.tensor([1.0, -0.5, 2.0, 0.25, -1.0])[: len(tokens)])


def learn(
    *batches: Tokens,
    model: Any = None,
    judge: str = "",
    between: Callable[[Any], None] = lambda _: None,
    **settings: Any,
) -> tuple[list[dict[str, float]], dict[str, Tensor], Any]:
    """Statistics of an iteration on each batch (by default on the ragged one, twice), the moved
    weights, and the trainer; between iterations something may be done to it.
    """
    if judge:
        settings["critic"] = Critic(classifier(judge))
    made = trainer(adapted() if model is None else model, **SETTINGS | settings)
    stats = []
    for tokens in batches or (ragged(), ragged()):
        stats.append(timeless(made.learn(made.collect(tokens), scored(tokens))))
        between(made)
    moved = weights(made.policy)
    if judge:
        moved |= {f"critic.{n}": p for n, p in weights(made.critic).items()}
    return stats, moved, made


def assert_alike(one: Any, other: Any) -> None:
    for ours, theirs in zip(one[0], other[0], strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert_close(one[1], other[1], rtol=1e-3, atol=1e-5)


def batch_of(samples: int, query: int, response: int, *, seed: int = 0) -> Tokens:
    """Random tokens up to these lengths; some response tokens are context alone."""
    random = torch.Generator().manual_seed(seed)

    def rows(most: int) -> list[list[int]]:
        lengths = [most, *torch.randint(1, most + 1, (samples - 1,), generator=random).tolist()]
        return [torch.randint(2, VOCABULARY, (n,), generator=random).tolist() for n in lengths]

    responses = rows(response)
    masks = [[bool(token % 5) or i == 0 for i, token in enumerate(row)] for row in responses]
    return Tokens.pack(rows(query), responses, pad_id=PAD, masks=masks)


# --- what may be recorded


@pytest.mark.parametrize("judge", ["", "bloom", "llama"])
@pytest.mark.parametrize("kind", ["adapter", "gpt2", "llama"])
def test_what_is_recorded_asks_the_gpu_for_nothing(
    kind: str, judge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes on a GPU, without gradients, since autograd itself asks for one; whoever learns."""
    critic = Critic(classifier(judge)) if judge else None
    model = adapted() if kind == "adapter" else policy(kind)
    made = trainer(model, critic=critic, entropy_coef=0.1)
    tokens = fitted(ragged())
    batch = Batch(tokens, *[torch.zeros(tokens.mask.shape)] * 4)
    roads: dict[Trunk, FastDecoder] = {}

    def fast(trunk: Trunk, *_: Any) -> FastDecoder:
        made = roads.get(trunk) or FastDecoder(trunk.decoder, anatomy_there(trunk.decoder))
        return roads.setdefault(trunk, made)

    monkeypatch.setattr(Trunk, "_fast_here", fast)
    reads = [partial(made.policy.score, temperature=0.7, entropy=True), made.critic.values]
    reads += [partial(made.reference.logprobs, temperature=0.7)]
    reads += [partial(made.reference.full_kl, temperature=0.7)]
    with a_gpu_without_one(), torch.no_grad():
        for module in {made.policy, made.critic, *made.reference.modules.values()}:
            move_to_a_gpu_without_one(module)
        there = batch.each(on_gpu)
        for turn in (EVERYBODY, Turn(critic=False)):
            found = made.updates._losses(there, 0.7, turn)
            assert all(x.device.type == "cuda" for x in found)
        for read in reads:
            assert all(x.device.type == "cuda" for x in tensors_of(read(there.tokens)))
    assert len(roads) == len({*made.recorded.trunks})


# --- the same is learnt


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"entropy_coef": 0.1, "kl_penalty": "full", "critic_epochs": 1},
        {"judge": "llama"},
        {"judge": "bloom", "critic_epochs": 1},
    ],
    ids=str,
)
def test_recorded_passes_learn_the_same(settings: dict[str, Any], a_gpu_with: Take) -> None:
    wanted, tape = learn(**settings), Watched()
    a_gpu_with(tape)
    assert_alike(learn(**settings), wanted)
    # Of 8 passes that learn, of two shapes, the first of each is launched, in each kind of turn.
    assert tape.learnt >= (4 if "critic_epochs" in settings else 6)
    assert tape.played >= tape.learnt + 2  # in collection: of the policy, and of the reference


def test_a_policy_without_an_adapter_learns_the_same(a_gpu_with: Take) -> None:
    """And its reference is a trunk of its own."""
    wanted, tape = learn(model=policy("gpt2")), Watched()
    a_gpu_with(tape)
    assert_alike(learn(model=policy("gpt2")), wanted)
    assert tape.learnt >= 6


def test_settings_that_change_between_iterations_count_in_recorded_passes_too(
    a_gpu_with: Take,
) -> None:
    def change(made: PPOTrainer) -> None:
        made.config.cliprange, made.config.cliprange_value = 1e-4, 0.01
        made.config.vf_coef, made.config.entropy_coef = 5.0, 0.1

    batches, tape = [ragged()] * 3, Watched()
    wanted = learn(*batches, between=change)
    a_gpu_with(tape)
    assert_alike(learn(*batches, between=change), wanted)
    assert tape.learnt >= 8
    assert wanted[0][1]["clip_fraction"] > 1.2 * wanted[0][0]["clip_fraction"]


def test_weights_that_learn_no_more_are_left_alone(a_gpu_with: Take) -> None:
    def freeze(made: PPOTrainer) -> None:
        made.policy.v_head.requires_grad_(False)
        made.recorded.trained[:] = [p for p in made.recorded.trained if p.requires_grad]

    batches, tape = [ragged()] * 3, Watched()
    wanted = learn(*batches, between=freeze)
    a_gpu_with(tape)
    assert_alike(learn(*batches, between=freeze), wanted)
    assert tape.learnt > 0


def test_passes_of_all_shapes_share_one_set_of_gradients(a_gpu_with: Take) -> None:
    """A recording keeps what it gives, and gradients are as large as all that is trained."""
    a_gpu_with(Bare())
    batches = [batch_of(4, 6, time, seed=time) for time in (4, 20, 40, 60)]
    *_, made = learn(*batches, mini_batch_size=4, gradient_accumulation_steps=1)
    made_for = [entry[1]._results for entry in made.recorded._passes._made.values()]
    of_learning = [results[2:] for results in made_for if len(results) > 4]
    assert len(of_learning) == 4
    places = {tuple(x.data_ptr() for x in found) for found in of_learning}
    assert len(places) == 1


@pytest.mark.parametrize("accumulated", [1, 2])
def test_batches_of_all_sizes_and_widths_learn_the_same(accumulated: int, a_gpu_with: Take) -> None:
    """Five samples: the last optimizer batch is smaller, and passes of one sample are among them.
    Four shapes of texts, one of them twice.
    """
    shapes = [(5, 6, 9), (5, 20, 4), (4, 3, 20), (5, 6, 12)]
    batches = [batch_of(*shape, seed=i) for i, shape in enumerate(shapes)]
    settings = {"gradient_accumulation_steps": accumulated}
    wanted, tape = learn(*batches, **settings), Watched()
    a_gpu_with(tape)
    assert_alike(learn(*batches, **settings), wanted)
    assert tape.learnt > tape.learning > 0  # some were played again


@pytest.mark.parametrize("judge", ["", "llama"])
def test_iterations_in_which_the_critic_learns_alone_are_launched(
    judge: str, a_gpu_with: Take
) -> None:
    batches, tape, learnt = [ragged()] * 3, Watched(), []
    wanted = learn(*batches, judge=judge, critic_warmup_steps=2)
    a_gpu_with(tape)
    settings = {"judge": judge, "critic_warmup_steps": 2}
    found = learn(*batches, between=lambda _: learnt.append(tape.learnt), **settings)
    assert_alike(found, wanted)
    assert learnt[:2] == [0, 0]
    assert learnt[2] >= 2  # of 4


@pytest.mark.parametrize(
    "settings", [{"micro_batch_tokens": 9}, {"gradient_checkpointing": True}], ids=str
)
def test_updates_of_other_kinds_are_launched(settings: dict[str, Any], a_gpu_with: Take) -> None:
    wanted, tape = learn(**settings), Watched()
    a_gpu_with(tape)
    assert_alike(learn(**settings), wanted)
    assert tape.learnt == 0
    assert tape.played > 0  # collection


def without_graphs() -> Any:
    made = adapted()
    made.trunk.records_graphs = False
    return made


@pytest.mark.parametrize(
    "case",
    [
        lambda: {"cache_trunk": True, "model": adapted(layers_to_transform=[1])},
        lambda: {"processes": Several()},
        lambda: {"model": without_graphs()},
    ],
    ids=["cache_trunk", "several processes", "records_graphs off"],
)
def test_nothing_is_recorded_that_others_have_a_part_in(
    case: Callable[[], dict[str, Any]], a_gpu_with: Take
) -> None:
    wanted, tape = learn(**case()), Tape()
    a_gpu_with(tape)
    assert_alike(learn(**case()), wanted)
    assert (tape.recorded, tape.played) == (0, 0)


def test_nothing_is_recorded_on_a_gpu_that_is_full(
    a_gpu_with: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, tape = learn(), Tape()
    a_gpu_with(tape)
    monkeypatch.setattr("ppo_lab.recorded.has_room", lambda _: False)
    assert_alike(learn(), wanted)
    assert (tape.recorded, tape.played) == (0, 0)


# --- what goes wrong


def test_a_recording_that_fails_is_said_once_and_changes_nothing(
    a_gpu_with: Take, caplog: pytest.LogCaptureFixture
) -> None:
    wanted, tape = learn(), BrokenTape()
    a_gpu_with(tape)
    assert_alike(learn(), wanted)
    assert caplog.text.count("passes are not recorded as CUDA graphs, and go on") == 1
    assert tape.recorded == 1
    assert not tape.works


def test_a_recording_that_gives_other_gradients_is_said_and_not_taken(
    a_gpu_with: Take, caplog: pytest.LogCaptureFixture
) -> None:
    wanted, tape = learn(), LyingTape()
    a_gpu_with(tape)
    assert_alike(learn(), wanted)
    assert caplog.text.count("their gradients prove unequal") == 1
    assert tape.played == 1
    assert not tape.works


def test_weights_at_other_addresses_are_recorded_anew(a_gpu_with: Take) -> None:
    old: list[Tensor] = []  # kept, so that nobody else gets their addresses
    tape, recorded = Tape(), [0]

    def move(made: Any) -> None:
        recorded.append(tape.recorded)
        for parameter in made.policy.parameters():
            old.append(parameter.data)
            parameter.data = parameter.data.clone()

    wanted = learn(*[ragged()] * 3, **IN_ONE_PASS)
    a_gpu_with(tape)
    assert_alike(learn(*[ragged()] * 3, between=move, **IN_ONE_PASS), wanted)
    # Each iteration makes the first of its three passes that learn, records the second and plays
    # it; what it reads it reads once.
    assert recorded == [0, 1, 2, 3]
    assert tape.played == 3 * 2


@pytest.mark.parametrize(
    ("kind", "size"), [("reading", 4), ("learning", 4), ("learning", 1)], ids=str
)
def test_where_memory_runs_out_recordings_are_let_go_and_passes_stay_as_large(
    kind: str, size: int, a_gpu_with: Take, caplog: pytest.LogCaptureFixture
) -> None:
    """Memory runs out in the second iteration, in a pass of another shape."""
    batches, settings = [ragged(), batch_of(4, 20, 20)], IN_ONE_PASS | {"mini_batch_size": size}
    wanted, tape = learn(*batches, **settings), FullGPU()
    a_gpu_with(tape)
    found = learn(*batches, between=lambda _: setattr(tape, "full_for", kind), **settings)
    assert_alike(found, wanted)
    assert caplog.text.count("GPU memory ran out: passes are no longer recorded") == 1
    assert found[2].updates.passes.most == 0
    assert not tape.works


@pytest.mark.filterwarnings("ignore:GPU memory ran out:RuntimeWarning")
@pytest.mark.parametrize("kind", ["reading", "learning"])
def test_where_memory_runs_out_in_the_first_pass_the_same_is_learnt(
    kind: str, a_gpu_with: Take
) -> None:
    """Where nothing but its own tensors is there to give way."""
    wanted, tape = learn(**IN_ONE_PASS), FullGPU()
    tape.full_for = kind
    a_gpu_with(tape)
    assert_alike(learn(**IN_ONE_PASS), wanted)
    assert not tape.full_for


def test_nothing_is_let_go_where_nothing_was_recorded(a_gpu_with: Take) -> None:
    a_gpu_with(Tape())
    passes = RecordedPasses([adapted().trunk], [], alone=True)
    assert not passes.let_go()
    assert read(passes, by_lengths, ragged()) is not None
    assert passes.let_go()
    assert not passes.let_go()
    assert read(passes, by_lengths, ragged()) is None


def test_what_recorded_passes_worked_in_is_given_back(a_gpu_with: Take) -> None:
    a_gpu_with(Tape())
    passes, made = by_hand(), []

    def noted(tokens: Tokens) -> Tensor:
        result = by_lengths(tokens)
        made.append(weakref.ref(result))
        return result

    for _ in range(3):
        assert read(passes, noted, ragged()) is not None
    passes.let_go()
    gc.collect()
    assert len(made) > 1
    assert not [result for result in made if result() is not None]


# --- passes by hand


def read(passes: RecordedPasses, function: Callable[..., Any], tokens: Tokens, **at: Any) -> Any:
    """What a pass over all of these tokens gives."""
    return passes.read(function, passes.begin(tokens), **at)


def by_lengths(tokens: Tokens) -> Tensor:
    """Each response token times its sample's number of tokens."""
    return (tokens.responses * tokens.lengths[:, None]).float().masked_fill(~tokens.mask, 0.0)


def batch_with(logprobs: list[float]) -> Batch:
    """A sample of so many tokens."""
    tokens = Tokens.pack([[5]], [[7] * len(logprobs)], pad_id=PAD)
    numbers = torch.tensor([logprobs])
    return Batch(tokens, numbers, numbers, numbers, numbers)


def learnt(passes: RecordedPasses, losses: Any, batch: Batch, *more: Tensor, key: Any) -> Any:
    """What a pass over this batch alone adds up, its gradients apart."""
    batch = replace(batch, tokens=passes.begin(batch.tokens))
    return passes.learn(losses, batch, *more, key=key)


def by_hand(*parameters: Tensor) -> RecordedPasses:
    """Passes of losses that need no trunk."""
    return RecordedPasses([], parameters, alone=True)


def test_gradients_are_those_of_the_sums_over_all_tokens_and_are_added(a_gpu_with: Take) -> None:
    """d/dw of 3 w sum(logprobs) / n."""
    weight, unused = (torch.nn.Parameter(torch.tensor(2.0)) for _ in range(2))
    tape = Tape()
    a_gpu_with(tape)
    passes = by_hand(weight, unused)

    def losses(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        total = batch.logprobs.sum()
        return 3.0 * weight * total, total[None], torch.stack([total, -total])

    expected = 0.0
    for logprobs, n in (([1.0, 2.0], 4), ([5.0], 1), ([4.0, 6.0, 8.0], 2), ([1.0], 3)):
        found = learnt(passes, losses, batch_with(logprobs), torch.tensor(n), key=())
        assert found is not None
        assert [x.tolist() for x in found] == [[sum(logprobs)], [sum(logprobs), -sum(logprobs)]]
        expected += 3.0 * sum(logprobs) / n
        assert weight.grad is not None
        assert weight.grad.item() == pytest.approx(expected)
        assert unused.grad is None
    assert (tape.recorded, tape.played) == (1, 2)  # 3 tokens are of another shape: more are kept


def test_what_a_batch_does_not_say_is_said_by_the_key(a_gpu_with: Take) -> None:
    weight = torch.nn.Parameter(torch.tensor(2.0))
    a_gpu_with(Tape())
    passes = by_hand(weight)
    for key in (1.0, 10.0) * 3:

        def losses(batch: Batch, key: float = key) -> tuple[Tensor, Tensor, Tensor]:
            return key * weight * batch.logprobs.sum(), batch.logprobs[0], batch.logprobs[0]

        learnt(passes, losses, batch_with([1.0]), torch.tensor(1), key=key)
    assert weight.grad is not None
    assert weight.grad.item() == 3 * 11.0


class Counted(TorchDispatchMode):
    """How often each operation is made."""

    def __init__(self) -> None:
        super().__init__()
        self.times: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.times[func.overloadpacket.__name__] += 1
        return func(*args, **kwargs or {})


@pytest.mark.filterwarnings("ignore:the policy's log-probs changed")  # since nothing is played
def test_around_a_recorded_pass_of_its_own_a_step_moves_its_numbers_once(
    a_gpu_with: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that it is given goes in one copy; gradients and sums are taken where they lie."""
    a_gpu_with(Bare())
    monkeypatch.setattr(Whole, "is_behind", True)
    *_, made = learn(**IN_ONE_PASS)
    shaped = made.shape(made.collect(ragged()), scored(ragged()))
    made.updates.recorded.begin(shaped.batch.tokens)
    with Counted() as counted:
        made.updates.optimizer_step(shaped.batch, 1.0)
    assert made.recorded._passes.was_recorded
    assert counted.times["copy_"] == 1
    assert counted.times["clone"] == 1  # as an answer is kept on a CPU
    for needless in ("_foreach_add", "minimum", "maximum", "isfinite", "index"):
        assert counted.times[needless] == 0
    places = {x.data_ptr() for x in made.recorded._gradients.values()}
    assert {p.grad.data_ptr() for p in made.recorded.trained} == places


def test_noise_is_there_before_an_iteration_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is behind with the updates leaves the host time for it."""
    made, prompts = trainer(), Prompts([[5, 6], [7], [8, 9], [5]], [""] * 4)
    monkeypatch.setattr(Whole, "is_behind", True)
    for asked in (0, 1):
        had = rollout._uniforms.cache_info().hits
        tokens, seen = made.sample(prompts)
        assert rollout._uniforms.cache_info().hits == had + asked
        made.learn(made.collect(tokens, seen), scored(tokens))


def test_gradients_are_added_to_those_that_are_there() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    first = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]
    add_gradients(parameters, first)
    add_gradients(parameters, [torch.tensor([10.0, 20.0]), torch.tensor([30.0, 40.0])])
    assert [p.grad.tolist() for p in parameters] == [[11.0, 22.0], [33.0, 44.0]]  # type: ignore[union-attr]
    assert [g.tolist() for g in first] == [[1.0, 2.0], [3.0, 4.0]]


def test_what_is_read_is_as_wide_as_the_responses_and_stays(a_gpu_with: Take) -> None:
    """One shape of four samples once they are padded, whose recording is played again and again."""
    made, tape = adapted(), Tape()
    texts = [batch_of(4, 5, 3 + i, seed=i) for i in range(5)]
    with torch.no_grad():
        wanted = [made.score(t, temperature=0.7, entropy=True) for t in texts]
        values = [made.values(t) for t in texts]
        a_gpu_with(tape)
        passes = RecordedPasses([made.trunk], [], alone=True)
        found = [read(passes, made.score, t, temperature=0.7, entropy=True) for t in texts]
        found_values = [read(passes, made.values, t) for t in texts]
    assert tape.played > 0
    for ours, theirs, tokens in zip(found, wanted, texts, strict=True):
        for name in ("logprobs", "values", "entropy"):
            assert getattr(ours, name).shape == tokens.responses.shape
            assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-5)
    for one, other in zip(found_values, values, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_what_is_read_at_one_temperature_is_not_taken_for_another(a_gpu_with: Take) -> None:
    made = adapted()
    a_gpu_with(Tape())
    passes = RecordedPasses([made.trunk], [], alone=True)
    with torch.no_grad():
        for temperature in (0.5, 1.0) * 3:
            ours = read(passes, made.score, ragged(), temperature=temperature)
            theirs = made.score(ragged(), temperature=temperature)
            assert_close(ours.logprobs, theirs.logprobs, rtol=1e-4, atol=1e-5)
            assert ours.entropy is None


def test_where_trained_tokens_lie_is_asked_once_where_passes_are_recorded(a_gpu_with: Take) -> None:
    tokens, made = masked(4, 6, 9, 2), adapted()
    assert RecordedPasses([made.trunk], [], alone=True).begin(tokens) is tokens
    a_gpu_with(Tape())
    begun = RecordedPasses([made.trunk], [], alone=True).begin(tokens)
    assert torch.equal(begun.host.mask, tokens.mask)
    assert begun.heard() is begun
    part, rows = begun[torch.tensor([2, 0])], torch.tensor([2, 0])
    assert torch.equal(part.host.responses, tokens.responses[rows])


# --- shapes


def masked(samples: int, query: int, time: int, seed: int) -> Tokens:
    """Tokens whose mask has holes, and rows without any token to learn."""
    random = torch.Generator().manual_seed(seed)
    found = batch_of(samples, query, time, seed=seed)
    share = torch.rand(samples, 1, generator=random)
    holes = torch.rand(found.mask.shape, generator=random) < share
    holes[seed % samples] = False
    return replace(found, mask=found.attended & holes)


def test_texts_come_in_few_widths_and_every_trained_place_is_looked_at() -> None:
    many: set[tuple[int, ...]] = set()
    for seed in range(200):
        samples, query, time = 1 + seed % 5, 1 + seed * 7 % 40, 1 + seed * 5 % 35
        tokens = masked(samples, query, time, seed)
        wide = fitted(tokens)
        width, long = wide.queries.shape[1], wide.responses.shape[1]
        assert width % COLUMNS == long % COLUMNS == 0
        assert query <= width < query + COLUMNS
        assert time <= long < time + COLUMNS
        for name in ("queries", "query_mask"):
            assert torch.equal(getattr(wide, name)[:, width - query :], getattr(tokens, name))
        for name in ("responses", "mask", "attended"):
            assert torch.equal(getattr(wide, name)[:, :time], getattr(tokens, name))
        assert not wide.query_mask[:, : width - query].any()
        assert not wide.mask[:, time:].any()
        assert wide.kept is not None
        places = wide.kept.tolist()
        assert places == sorted(set(places))
        assert set(wide.mask.flatten().nonzero().squeeze(1).tolist()) <= set(places)
        assert 0 <= places[0] <= places[-1] < samples * long
        many.add((samples, long, len(places)))
    by_rectangle = {key[:2] for key in many}
    assert len(many) > len(by_rectangle)
    for rectangle in by_rectangle:
        assert sum(key[:2] == rectangle for key in many) <= STEPS


def test_a_batch_is_fitted_with_its_tokens_and_as_it_was_is_left() -> None:
    tokens = masked(3, 5, 7, 1)
    numbers = torch.randn(3, 7)
    batch = Batch(tokens, numbers, numbers, numbers, numbers)
    wide = fitted(batch)
    assert torch.equal(wide.tokens.kept, fitted(tokens).kept)
    assert wide.logprobs.shape == wide.returns.shape == wide.tokens.mask.shape == (3, 16)
    assert torch.equal(wide.advantages[:, :7], numbers)
    assert not wide.values[:, 7:].any()
    assert batch.tokens.kept is None
    assert batch.tokens.mask.shape == (3, 7)


@pytest.mark.parametrize("masks", ["holes", "none at all"])
@torch.no_grad()
def test_a_fitted_record_has_the_same_numbers(masks: str) -> None:
    made, judge, tokens = adapted(), Critic(classifier()), masked(4, 6, 9, 2)
    if masks == "none at all":
        tokens = replace(tokens, mask=torch.zeros_like(tokens.mask))
    wide = fitted(tokens)
    ours = made.score(wide, temperature=0.7, entropy=True)
    theirs = made.score(tokens, temperature=0.7, entropy=True)
    pairs = [(getattr(ours, n), getattr(theirs, n)) for n in ("logprobs", "values", "entropy")]
    for one, other in (*pairs, (judge.values(wide), judge.values(tokens))):
        assert_close(one[:, :9], other, rtol=1e-4, atol=1e-5)
        assert not one[:, 9:].any()
        assert not one[:, :9][~tokens.mask].any()


def doubled(x: Tensor) -> tuple[Tensor]:
    return (2 * x,)


def test_the_latest_used_recordings_are_kept_and_others_made_again() -> None:
    tape = Tape()
    passes = ByShape(tape)  # type: ignore[arg-type]

    def call(n: int) -> int:
        """How many recordings two calls with n numbers make."""
        before = tape.recorded
        for i in range(2):
            (found,) = passes("doubled", doubled, torch.full((n,), float(i + n)))
            assert found.tolist() == [2.0 * (i + n)] * n
        assert len(passes) <= KEPT
        return tape.recorded - before

    assert [call(n) for n in range(1, KEPT + 1)] == [1] * KEPT
    assert call(1) == 0  # which now is the latest
    assert call(KEPT + 1) == 1
    assert len(passes) == KEPT
    assert call(1) == 0
    assert call(2) == 1  # the one that made room


class Short(Tape):
    """Has no memory left for the first so many recordings."""

    def __init__(self, fails: int) -> None:
        super().__init__()
        self.fails = fails
        self.made: weakref.ref[Tensor] | None = None

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        assert self.made is None or self.made() is None, "the failed recording is still held"
        self.fails -= 1
        if self.fails >= 0:
            within = torch.zeros(8)
            self.made = weakref.ref(within)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().record(function)


@pytest.mark.parametrize(("fails", "works"), [(1, True), (2, False)])
def test_a_recording_without_memory_is_tried_again_with_what_the_allocator_kept(
    fails: int, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    emptied: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    tape = Short(fails)
    passes = ByShape(tape)  # type: ignore[arg-type]

    def doubled_alone(x: Tensor) -> tuple[Tensor]:
        assert tape.made is None or tape.made() is None
        return (2 * x,)

    for _ in range(3):
        (found,) = passes("doubled", doubled_alone, torch.ones(3))
        assert found.tolist() == [2.0] * 3
    assert emptied == [1]
    assert tape.works is works
    assert passes.was_recorded is works


def test_other_shapes_types_and_keys_are_other_recordings() -> None:
    tape = Tape()
    passes = ByShape(tape)  # type: ignore[arg-type]
    for x in (torch.ones(2, 3), torch.ones(3, 2), torch.ones(2, 3, dtype=torch.long)):
        for key, function in (("doubled", doubled), ("tripled", lambda x: (3 * x,))):
            seen = []
            for _ in range(3):
                (found,) = passes(key, function, x)
                assert torch.equal(found, function(x)[0])
                seen.append(passes.was_recorded)
            assert seen == [False, True, True]
    assert tape.recorded == 6
    passes.forget()
    assert len(passes) == 0


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_nothing_is_recorded_where_gradients_are_watched(hook: str, a_gpu_with: Take) -> None:
    """As `wandb.watch` does: a recording would call nobody."""
    seen: list[int] = []
    tape, model = Watched(), adapted()
    for parameter in model.parameters():
        if parameter.requires_grad:
            getattr(parameter, hook)(lambda _: seen.append(1))
    a_gpu_with(tape)
    learn(model=model)
    assert tape.learnt == 0
    passes = 2 * 2 * 2  # iterations, epochs, mini-batches of an optimizer batch
    assert len(seen) >= passes * sum(p.requires_grad for p in model.parameters())


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("judge", ["", "llama"])
@pytest.mark.parametrize("kind", ["bloom", "llama"])
def test_a_gpu_learns_from_recorded_passes_what_it_learns_from_launched_ones(
    kind: str, judge: str
) -> None:
    batches = [batch_of(5, 6, 9), batch_of(5, 20, 4, seed=1), batch_of(5, 6, 9, seed=2)]

    def learnt(records: bool) -> Any:
        model = policy(kind, lora=True)
        train_adapter(model)
        critic = Critic(classifier(judge)) if judge else None
        config = PPOConfig(learning_rate=1e-3, batch_size=4, **SETTINGS)
        made = PPOTrainer(config, model, None, tokenizer(), device="cuda", critic=critic)
        for trunk in made.recorded.trunks:
            trunk.records_graphs = records
        stats = []
        for tokens in batches:
            there = tokens.to("cuda")
            stats.append(timeless(made.learn(made.collect(there), scored(tokens))))
        return stats, weights(made.policy) | weights(made.critic), made

    ours, theirs = learnt(True), learnt(False)
    recorder = ours[2].recorded._passes.recorder
    assert recorder.works
    assert recorder.last is not None
    assert theirs[2].recorded._passes is None
    for one, other in zip(ours[0], theirs[0], strict=True):
        assert_close(one, other, rtol=1e-2, atol=1e-3)
    assert_close(ours[1], theirs[1], rtol=1e-2, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("judge", ["", "llama"])
@pytest.mark.parametrize("records", [True, False])
def test_a_gpu_is_asked_for_nothing_in_optimizer_steps(
    records: bool, judge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the third iteration on; a critic of its own learns alone in the first."""
    critic = Critic(classifier(judge)) if judge else None
    config = PPOConfig(learning_rate=1e-3, batch_size=4, critic_warmup_steps=1, **IN_ONE_PASS)
    made = PPOTrainer(config, adapted(), None, tokenizer(), device="cuda", critic=critic)
    for trunk in made.recorded.trunks:
        trunk.records_graphs = records
    step, played = ClippedUpdates.optimizer_step, []

    def not_to_be_asked(*args: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            played.append(step(*args))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return played[-1]

    for iteration in range(4):
        if iteration == 2:
            monkeypatch.setattr(ClippedUpdates, "optimizer_step", not_to_be_asked)
        tokens = ragged()
        stats = made.learn(made.collect(tokens.to("cuda")), scored(tokens))
    assert made.models.steps_late
    assert len(played) == 6
    assert stats["ppo/skipped_updates"] == 0.0
