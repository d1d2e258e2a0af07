"""Recorded decoding gives what transformers' layers give, and can be recorded."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_fast import SHAPES, assert_states_close, ragged_ids, tiny_model
from test_rollout import answers_come_late
from tiny_models import (
    EOS,
    PAD,
    QUERIES,
    VOCABULARY,
    policy,
    tokenizer,
    train_adapter,
    weights,
)
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from ppo_lab.models.choice import LEVELS
from ppo_lab.models.fast import decoder as decoder_module
from ppo_lab.models.fast import families, graphed, recording
from ppo_lab.models.fast.attention import KeysAndValues, attend, bias_of, blocks_of
from ppo_lab.models.fast.decoder import FastDecoder
from ppo_lab.models.fast.graphed import WORTH_RECORDING, Graphed
from ppo_lab.models.fast.kernels import without_kernels
from ppo_lab.models.fast.layers import Anatomy
from ppo_lab.models.fast.products import Linear
from ppo_lab.models.policy import AutoModelForCausalLMWithValueHead
from ppo_lab.models.reference import Reference
from ppo_lab.models.trunk import Trunk
from ppo_lab.rollout import Drawing, NoiseKey, Sampling, sample

ROOM = 11 + WORTH_RECORDING
CASES = [*((name, torch.float32) for name in SHAPES)]
CASES += [(name, torch.bfloat16) for name in ("bloom", "llama")]


class Undoing(TorchDispatchMode):
    """Notes what tensors held before they were written into."""

    def __init__(self) -> None:
        super().__init__()
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, operation: Any, _: Any, args: Any = (), named: Any = None) -> Any:
        for of, given in zip(operation._schema.arguments, args, strict=False):
            if of.alias_info is not None and of.alias_info.is_write:
                written = given if isinstance(given, list | tuple) else [given]
                self.before += [(x, x.clone()) for x in written]
        return operation(*args, **(named or {}))


@contextmanager
def undone() -> Iterator[None]:
    """What is written in it is as it was afterwards: recording a CUDA graph does nothing yet."""
    with Undoing() as done:
        yield
    with torch.no_grad():
        for x, before in reversed(done.before):
            x.copy_(before)


class Tape:
    """What a CUDA graph is to kernels, this is to operations: it holds those that a function made,
    on the very tensors that it made them on, whatever Python would do the next time.
    """

    def __init__(self) -> None:
        self.recorded, self.played, self.works = 0, 0, True

    def let_go(self) -> None:
        """Holds nothing that could be given back."""

    def warm(self, function: Callable[[], Any]) -> Any:
        return function()

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.recorded += 1
        with undone():
            operations = make_fx(function)()
            results = [torch.zeros_like(result) for result in operations()]

        def play() -> None:
            self.played += 1
            for result, new in zip(results, operations(), strict=True):
                result.copy_(new)

        return play, results


class Once(Tape):
    """Plays nothing, and holds nothing of the function, as a CUDA graph does not."""

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        return lambda: None, function()


class BrokenTape(Tape):
    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.recorded += 1
        with undone():
            function()
        raise RuntimeError("operation not permitted when stream is capturing")


def by_parts(
    made: Graphed, ids: torch.Tensor, attention: torch.Tensor, prompt: int = 6
) -> torch.Tensor:
    """The states of the columns from the prompt's last on, the first so many being the prompt."""
    parts = [(ids[:, :prompt], attention[:, :prompt])]
    parts += [(ids[:, i : i + 1], attention[:, : i + 1]) for i in range(prompt, ids.shape[1])]
    return torch.stack([made.newest(*part, alone)[0] for part in parts], 1)


def alone(states: torch.Tensor) -> tuple[torch.Tensor]:
    return (states,)


def anatomy_of(decoder: Any) -> Anatomy:
    anatomy = families.read(decoder)
    assert anatomy is not None
    return anatomy


def generation(decoder: Any, tape: Any, room: int = ROOM) -> Graphed:
    return Graphed(anatomy_of(decoder), room, tape)


def take_the_way_of_a_gpu(patch: pytest.MonkeyPatch, tape: Tape) -> None:
    """As trunks do on a GPU, on a CPU."""
    patch.setattr(Trunk, "_device", "cuda")
    patch.setattr("ppo_lab.models.trunk.Recorder", lambda _: tape)
    patch.setattr("ppo_lab.models.trunk.has_room", lambda _: True)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_recorded_passes_give_transformers_hidden_states(name: str, dtype: Any) -> None:
    trunk, tape = Trunk(tiny_model(name, dtype)), Tape()
    ids, attention = ragged_ids()
    attention[2] = True
    ours = by_parts(generation(trunk.decoder, tape), ids, attention)
    with torch.no_grad():
        theirs = trunk._by_transformers(ids, attention)[:, 5:]
    if dtype == torch.float32:
        assert_states_close(ours, theirs)
    else:
        assert_close(ours, theirs, atol=0.1, rtol=0.1, check_dtype=False)
    assert tape.played == 4  # all tokens but the first, which warms up


def text_of(
    rows: int, columns: int, seed: int, *, prompt: int = 6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids, of which rows begin with up to three columns of padding, fewer than prompts."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (rows, columns), generator=random)
    first = torch.randint(0, min(4, prompt), (rows, 1), generator=random)
    return ids, torch.arange(columns) >= first


def assert_states_are_transformers(
    trunk: Trunk, made: Graphed, rows: int, *, prompt: int = 6, new: int = 5, seed: int = 0
) -> torch.Tensor:
    """The next generation gives them; its states."""
    ids, attention = text_of(rows, prompt + new, seed, prompt=prompt)
    made.again(prompt + new + WORTH_RECORDING)
    ours = by_parts(made, ids, attention, prompt)
    with torch.no_grad():
        theirs = trunk._by_transformers(ids, attention)[:, prompt - 1 :]
    assert_states_close(ours, theirs)
    return ours


@pytest.mark.parametrize("name", ["bloom", "gpt2", "llama"])
def test_later_generations_play_what_was_recorded(name: str) -> None:
    """Tokens' passes are recorded in the first, prompts' in the second, and then nothing is."""
    trunk, tape = Trunk(tiny_model(name)), Tape()
    made, counts = generation(trunk.decoder, tape), []
    for seed in range(4):
        assert_states_are_transformers(trunk, made, 3, seed=seed)
        counts.append((tape.recorded, tape.played))
    assert counts == [(1, 4), (2, 10), (2, 16), (2, 22)]


def test_prompts_of_about_the_same_width_share_recordings() -> None:
    """Of up to 16 columns; and those of the next 16 do not."""
    trunk, tape = Trunk(tiny_model("bloom")), Tape()
    made = generation(trunk.decoder, tape)
    for prompt in (6, 16, 4, 9):
        assert_states_are_transformers(trunk, made, 3, prompt=prompt, seed=prompt)
    held, recorded = made._standing, tape.recorded
    assert recorded == 2
    assert_states_are_transformers(trunk, made, 3, prompt=17)
    assert made._standing is not held
    assert tape.recorded > recorded


def test_more_columns_or_another_number_of_rows_take_other_buffers() -> None:
    trunk, tape = Trunk(tiny_model("llama")), Tape()
    made = generation(trunk.decoder, tape)
    held = [made._standing]
    for rows, new in ((3, 5), (2, 5), (2, 15), (4, 15), (4, 5)):
        assert_states_are_transformers(trunk, made, rows, new=new, seed=new)
        held.append(made._standing)
    assert len({id(standing) for standing in held}) == 5  # less room is taken out of more


def test_a_narrow_prompt_may_need_more_columns_than_a_wide_one_that_shares_its_width() -> None:
    trunk = Trunk(tiny_model("bloom"))
    made, columns = generation(trunk.decoder, None), []
    for prompt, new in ((16, 12), (1, 27), (15, 13)):
        assert_states_are_transformers(trunk, made, 2, prompt=prompt, new=new)
        columns.append(made._standing.positions)  # type: ignore[union-attr]
    assert columns == [32, 48, 48]


def adapted(
    patch: pytest.MonkeyPatch, dtype: torch.dtype
) -> tuple[AutoModelForCausalLMWithValueHead, dict[str, torch.Tensor]]:
    """A policy in a precision whose adapter is in float32, passed as on a GPU, where half precision
    is computed in; and the adapter's weights.
    """
    patch.setattr(decoder_module, "_passed_in", lambda stored: stored.dtype)
    made = policy("llama", lora=True)
    train_adapter(made)
    made.pretrained_model.to(dtype)
    matrices = {n: p for n, p in made.pretrained_model.named_parameters() if "lora" in n}
    for parameter in matrices.values():
        parameter.data = parameter.data.float()
    return made, matrices


def fresh(
    made: AutoModelForCausalLMWithValueHead, ids: torch.Tensor, attention: torch.Tensor
) -> torch.Tensor:
    """What an adapter gives in a generation of its own, without recordings."""
    return by_parts(generation(made.trunk.decoder, None), ids, attention)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recordings_follow_an_adapter_that_learns(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, matrices = adapted(monkeypatch, dtype)
    text, tape = text_of(3, 11, 0), Tape()
    passes, seen = generation(made.trunk.decoder, tape), []
    for _ in range(4):
        passes.again(ROOM)
        seen.append(by_parts(passes, *text))
        assert seen[-1].dtype == dtype
        assert_close(seen[-1], fresh(made, *text))
        with torch.no_grad():
            for matrix in matrices.values():
                matrix.add_(0.1 * torch.randn_like(matrix))
    assert tape.recorded == 2
    assert not any(torch.allclose(a, b, atol=0.1) for a, b in pairwise(seen))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_switched_off_and_on_is_read_anew(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = adapted(monkeypatch, dtype)
    text, before = text_of(3, 11, 0), weights(made)
    passes, held = generation(made.trunk.decoder, Tape()), []
    for off in (False, True, True, False):
        passes.again(ROOM)
        with made.pretrained_model.disable_adapter() if off else nullcontext():
            assert_close(by_parts(passes, *text), fresh(made, *text))
        held.append(passes._standing)
    assert held[1] is held[2]
    assert held[0] is not held[1]
    assert held[2] is not held[3]
    assert_close(weights(made), before, rtol=0, atol=0)


def test_an_adapter_that_is_scaled_otherwise_is_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = adapted(monkeypatch, torch.float32)
    text, passes = text_of(3, 11, 0), generation(made.trunk.decoder, Tape())
    for _ in range(3):
        passes.again(ROOM)
        assert_close(by_parts(passes, *text), fresh(made, *text))
        for module in made.modules():
            if hasattr(module, "scaling") and hasattr(module, "lora_A"):
                module.scaling["default"] *= 2.0


def test_another_adapter_takes_the_place_of_one_and_changes_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where the reference, a copy of what the adapter was, answers after the policy."""
    made, matrices = adapted(monkeypatch, torch.float32)
    reference = Reference(made)
    with torch.no_grad():
        for matrix in matrices.values():
            matrix.add_(0.1)
    text, before = text_of(3, 11, 0), weights(made)
    passes, seen = generation(made.trunk.decoder, Tape()), []
    for others in (False, True, False, True):
        passes.again(ROOM)
        with reference.active() if others else nullcontext():
            seen.append(by_parts(passes, *text))
            assert_close(seen[-1], fresh(made, *text))
        assert_close(weights(made), before, rtol=0, atol=0)
    assert not torch.allclose(seen[0], seen[1], atol=1e-2)


class Counted(TorchDispatchMode):
    """The names of the operations that are made; views, which launch nothing, aside."""

    VIEWS = ("slice", "select", "view", "unsqueeze", "expand", "alias", "t", "transpose")

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, operation: Any, _: Any, args: Any = (), named: Any = None) -> Any:
        name = operation.overloadpacket.__name__
        if name not in self.VIEWS:
            self.made.append(name)
        return operation(*args, **(named or {}))


def test_copies_of_an_adapter_are_brought_up_to_date_by_one_operation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, matrices = adapted(monkeypatch, torch.bfloat16)
    (ids, attention), passes = text_of(3, 16, 0), generation(made.trunk.decoder, None)
    passes.newest(ids, attention, alone)
    assert passes._standing is not None
    with Counted() as count:
        assert passes._standing.begin(ids, attention)
    assert len(matrices) == 8
    assert count.made.count("copy_") == 3  # the prompts, where they are real, where they begin
    assert count.made.count("_foreach_copy_") == 1


def test_what_linear_layers_are_read_from_is_what_they_read() -> None:
    made = policy("gpt2", lora=True)
    for off in (False, True):
        with made.pretrained_model.disable_adapter() if off else nullcontext():
            for module, (tensors, scales) in graphed._read(anatomy_of(made.trunk.decoder)).items():
                linear = Linear.read(module)
                read = (linear.weight, *linear.matrices)
                assert [x.data_ptr() for x in tensors] == [x.data_ptr() for x in read]
                assert tuple(scales) == linear.scalings


def test_weights_at_other_addresses_are_read_anew() -> None:
    """As after a model went to another device and came back."""
    trunk, tape = Trunk(tiny_model("llama")), Tape()
    made, old = generation(trunk.decoder, tape), []
    for _ in range(3):
        assert_states_are_transformers(trunk, made, 3)
        for parameter in trunk.model.parameters():
            old.append(parameter.data)
            parameter.data = parameter.data.clone()
    assert tape.recorded == 3  # the passes of tokens of each


def test_a_tape_holds_what_was_done_and_not_what_python_would_do() -> None:
    place, steps = torch.zeros(1), [1.0, 10.0]
    play, (result,) = Tape().record(lambda: (place + steps.pop(0),))
    for value in (2.0, 3.0):
        place.fill_(value)
        play()
        assert result.item() == value + 1.0


def test_what_a_tape_records_is_not_done_before_it_is_played() -> None:
    place = torch.zeros(1)
    play, _ = Tape().record(lambda: (place.add_(1.0),))
    assert place.item() == 0.0
    play()
    play()
    assert place.item() == 2.0


def test_a_generation_lets_go_of_its_keys_and_values_at_once() -> None:
    trunk = Trunk(tiny_model("llama"))
    made = generation(trunk.decoder, Once())
    by_parts(made, *ragged_ids())
    held = weakref.ref(made._standing._layers[0][0])  # type: ignore[union-attr]
    gc.disable()
    try:
        del made
        assert held() is None
    finally:
        gc.enable()


def test_few_tokens_are_not_worth_a_recording() -> None:
    trunk, tape = Trunk(tiny_model("llama")), Tape()
    by_parts(generation(trunk.decoder, tape, 11), *ragged_ids())
    assert tape.played == 0


def test_a_recording_that_fails_is_said_and_changes_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    trunk = Trunk(tiny_model("bloom"))
    ids, attention = ragged_ids()
    wanted = by_parts(generation(trunk.decoder, None), ids, attention)
    broken = BrokenTape()
    for _ in range(2):
        assert_close(by_parts(generation(trunk.decoder, broken), ids, attention), wanted)
    assert caplog.text.count("not permitted when stream is capturing") == 1


@pytest.mark.parametrize("new", [5, 1])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_kernel_for_everything_is_attention(kv_heads: int, new: int) -> None:
    torch.manual_seed(0)
    attention = torch.ones(2, 6, dtype=torch.bool)
    attention[1, :2] = False
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]) if kv_heads == 4 else None
    blocks = blocks_of(
        attention, new=new, heads=4, kv_heads=kv_heads, slopes=slopes, dtype=torch.float32,
        rounded_to=torch.float32,
    )  # fmt: skip
    bias = bias_of(attention, torch.arange(6)[-new:], slopes=slopes, dtype=torch.float32)
    q = torch.randn(2, 4, new, 3, requires_grad=True)
    k, v = (torch.randn(2, kv_heads, 6, 3, requires_grad=True) for _ in range(2))
    asks = attention[:, -new:, None].float()  # padding asks nothing
    ours, theirs = (attend(q, k, v, how, 0.4) * asks for how in (bias, blocks))
    assert_close(ours, theirs)
    for one, other in zip(*(_slopes(y, (q, k, v)) for y in (ours, theirs)), strict=True):
        assert_close(one, other)


def _slopes(y: torch.Tensor, of: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(y.square().sum(), of)


def part_of(x: torch.Tensor, index: Any) -> torch.Tensor:
    """x[index] by slices, numbers, None and ..., or by tensors and whole axes."""
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(part, torch.Tensor) for part in parts):
        tensors = [part if isinstance(part, torch.Tensor) else None for part in parts]
        return torch.ops.aten.index.Tensor(x, tensors)
    axis, taken = 0, sum(part is not None and part is not ... for part in parts)
    for part in parts:
        if isinstance(part, int):
            x = x.select(axis, part)
            continue
        if isinstance(part, slice):
            x = torch.ops.aten.slice(x, axis, part.start, part.stop, part.step or 1)
        elif part is None:
            x = x.unsqueeze(axis)
        else:
            assert part is ..., "an index that a pass must not have"
        axis += x.dim() - taken if part is ... else 1
    return x


def made_to(x: torch.Tensor, *targets: Any, **named: Any) -> torch.Tensor:
    """x.to(...), which must not be another device."""
    for target in (*targets, *named.values()):
        if isinstance(target, torch.dtype):
            x = x if x.dtype == target else torch.ops.aten._to_copy(x, dtype=target)
        elif not isinstance(target, bool):  # whether to wait, where there is something to do
            assert x.device.type == torch.device(target).type == "cuda"
    return x


# These look for a real GPU before they ask what the tensor is.
LOOKING = {
    "__getitem__": part_of,
    "to": made_to,
    "copy_": lambda x, source: torch.ops.aten.copy_.default(x, source),
    "__invert__": lambda x: torch.ops.aten.bitwise_not(x),
    "contiguous": lambda x: torch.ops.aten.clone(x, memory_format=torch.contiguous_format),
}


def move_to_a_gpu_without_one(model: torch.nn.Module) -> None:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(on_gpu(parameter))
        module._buffers.update({n: on_gpu(b) for n, b in module._buffers.items() if b is not None})


def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    """A shape on a GPU."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")


@contextmanager
def a_gpu_without_one() -> Iterator[None]:
    """Shapes on a GPU: mixing devices, or waiting for a number of the GPU, raises."""
    # Triton's kernels would launch on the real one, or ask the driver for it.
    with pytest.MonkeyPatch.context() as patch, without_kernels(), FakeTensorMode():
        for method, does in LOOKING.items():
            patch.setattr(FakeTensor, method, does, raising=False)
        patch.setattr(graphed, "_where", lambda _: [])  # shapes lie nowhere
        yield


def anatomy_there(decoder: Any) -> Anatomy:
    found = anatomy_of(decoder)
    return found if found.slopes is None else replace(found, slopes=on_gpu(found.slopes))


def parts_there(decoder: Any, then: Any, *given: torch.Tensor) -> list[Any]:
    """What `then` makes of the states of prompts and of two tokens, all of it shapes on a GPU."""
    cache = Graphed(anatomy_there(decoder), ROOM)
    ids = torch.empty(3, 9, dtype=torch.long, device="cuda")
    real = torch.empty(3, 11, dtype=torch.bool, device="cuda")
    prompts = cache.newest(ids, real[:, :9], then, *given)
    return [prompts, *(cache.newest(ids[:, :1], real[:, :n], then, *given) for n in (10, 11))]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_pass_asks_the_gpu_for_nothing_and_brings_nothing_from_the_host(
    name: str, dtype: Any
) -> None:
    decoder = Trunk(tiny_model(name, dtype)).decoder
    with a_gpu_without_one():
        move_to_a_gpu_without_one(decoder)
        for (states,) in parts_there(decoder, alone):
            assert states.shape == (3, 48)
            assert states.device.type == "cuda"


@pytest.mark.parametrize(
    "changes", [{}, {"temperature": 0.0}, {"temperature": 0.5}, {"top_k": 5, "top_p": 0.9}]
)
@pytest.mark.parametrize("banning", [False, True])
def test_nor_does_drawing_a_token(changes: dict[str, Any], banning: bool) -> None:
    made, sampling = policy("bloom", lora=True), Sampling(4, (EOS,), PAD, **changes)
    with a_gpu_without_one():
        move_to_a_gpu_without_one(made)
        uniforms = torch.empty(3, LEVELS, dtype=torch.float64, device="cuda")
        draws = Drawing(made, made.trunk, sampling, banning)
        for results in parts_there(made.trunk.decoder, draws, uniforms):
            assert [result.device.type for result in results] == ["cuda"] * 4
            assert [result.shape for result in results] == [(3,)] * 4


def test_what_is_recorded_reads_the_adapter() -> None:
    made = policy("llama", lora=True)
    train_adapter(made)
    ids, attention = ragged_ids()
    ids, attention = ids % 64, torch.ones_like(attention)
    decoder = made.trunk.decoder
    ours = by_parts(generation(decoder, Tape()), ids, attention)
    with torch.no_grad(), made.pretrained_model.disable_adapter():
        off = by_parts(generation(decoder, Tape()), ids, attention)
        off_by_transformers = made.trunk._by_transformers(ids, attention)[:, 5:]
    with torch.no_grad():
        on_by_transformers = made.trunk._by_transformers(ids, attention)[:, 5:]
    assert_close(ours, on_by_transformers, atol=2e-5, rtol=2e-5)
    assert_close(off, off_by_transformers, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(ours, off)


def drawn(made: AutoModelForCausalLMWithValueHead, **changes: Any) -> Any:
    settings: dict[str, Any] = {"max_new_tokens": 16, "eos_ids": (EOS,), "pad_id": PAD}
    return sample(made, QUERIES, sampling=Sampling(**settings | changes), noise=NoiseKey(0, 3))


def by_transformers(made: AutoModelForCausalLMWithValueHead, **changes: Any) -> Any:
    made.trunk.fast_layers = False
    found = drawn(made, **changes)
    made.trunk.fast_layers = True
    return found


@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature": 0.0, "batch_size": 3}, {"top_k": 5, "min_new_tokens": 4}],
)
def test_responses_are_those_of_transformers_layers(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = policy("bloom", lora=True)
    train_adapter(made)
    wanted, tape = by_transformers(made, **changes), Tape()
    take_the_way_of_a_gpu(monkeypatch, tape)
    tokens, forward = drawn(made, **changes)
    assert tape.played > 0
    assert torch.equal(tokens.responses, wanted[0].responses)
    assert_close(forward.logprobs, wanted[1].logprobs, atol=2e-5, rtol=2e-5)
    assert_close(forward.values, wanted[1].values, atol=2e-5, rtol=2e-5)


def test_responses_of_all_iterations_are_those_of_transformers_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The policy learns between them; later ones record nothing."""
    made, tape, recorded = policy("bloom", lora=True), Tape(), []
    train_adapter(made)
    wanted = []
    for iteration in range(4):
        if iteration == 1:
            take_the_way_of_a_gpu(monkeypatch, tape)
        wanted = [by_transformers(made), *wanted]
        tokens, forward = drawn(made)
        recorded.append(tape.recorded)
        assert torch.equal(tokens.responses, wanted[0][0].responses)
        assert_close(forward.logprobs, wanted[0][1].logprobs, atol=2e-5, rtol=2e-5)
        with torch.no_grad():
            for name, matrix in made.pretrained_model.named_parameters():
                if "lora" in name:
                    matrix.add_(0.1)
    assert not torch.equal(wanted[0][0].responses, wanted[1][0].responses)
    assert 0 == recorded[0] < recorded[1] < recorded[2] == recorded[3]


@pytest.mark.parametrize("changes", [{}, {"batch_size": 3}, {"max_new_tokens": 2}], ids=str)
def test_responses_that_end_early_are_those_of_transformers_layers(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU is heard about its rows one token late."""
    changes = {"eos_ids": tuple(range(1, VOCABULARY, 4))} | changes
    made, tape = policy("bloom", lora=True), Tape()
    train_adapter(made)
    wanted = by_transformers(made, **changes)
    take_the_way_of_a_gpu(monkeypatch, tape)
    answers_come_late(monkeypatch)
    tokens, forward = drawn(made, **changes)
    assert wanted[0].lengths.max() < 14
    for name in ("queries", "responses", "mask", "lengths", "ended"):
        assert torch.equal(getattr(tokens, name), getattr(wanted[0], name))
    for name in ("logprobs", "values", "entropy"):
        ours, theirs = getattr(forward, name), getattr(wanted[1], name)
        assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


class Marked(Tape):
    """Notes among the operations that are made where a recording is launched."""

    def __init__(self, count: Counted) -> None:
        super().__init__()
        self.count = count

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        play, results = super().record(function)

        def marked() -> None:
            before = len(self.count.made)
            play()
            self.count.made[before:] = ["launch"]

        return marked, results


# On a CPU: the flags as they are, what those of the token before say, and that as a bool.
ASKING = ["clone", "all", "_local_scalar_dense"]


@pytest.mark.parametrize(("ends", "between"), [((), []), ((EOS,), ASKING)])
def test_between_two_tokens_nothing_is_done_but_to_ask_whether_all_have_ended(
    ends: tuple[int, ...], between: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, count = policy("bloom", lora=True), Counted()
    take_the_way_of_a_gpu(monkeypatch, Marked(count))
    answers_come_late(monkeypatch)
    for _ in range(2):
        drawn(made, eos_ids=ends)
    count.made.clear()
    with count:
        drawn(made, eos_ids=ends)
    launches = [i for i, name in enumerate(count.made) if name == "launch"]
    assert len(launches) > 8
    for first, second in pairwise(launches[1:]):
        assert count.made[first + 1 : second] == between


def test_fewer_tokens_are_written_where_more_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """And more of them elsewhere."""
    made, rows = policy("bloom", lora=True), []
    lengths = (16, 16, 12, 9, 16, 20)
    wanted = [by_transformers(made, max_new_tokens=n) for n in lengths]
    take_the_way_of_a_gpu(monkeypatch, Tape())
    for length, (tokens, forward) in zip(lengths, wanted, strict=True):
        found = drawn(made, max_new_tokens=length)
        assert torch.equal(found[0].responses, tokens.responses)
        assert_close(found[1].logprobs, forward.logprobs, atol=2e-5, rtol=2e-5)
        rows.append(len(made.trunk._kept._placed[0]))
    assert rows == [16, 16, 16, 16, 16, 20]


def test_responses_keep_what_they_are_when_others_are_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = policy("bloom", lora=True)
    take_the_way_of_a_gpu(monkeypatch, Tape())
    for changes in ({}, {"max_new_tokens": 1}):
        tokens, forward = drawn(made, **changes)
        held = copy.deepcopy((tokens, forward))
        sample(made, QUERIES, sampling=Sampling(16, (), PAD), noise=NoiseKey(1, 4))
        for name in ("responses", "lengths", "ended", "mask"):
            assert torch.equal(getattr(tokens, name), getattr(held[0], name))
        for name in ("logprobs", "values", "entropy"):
            assert torch.equal(getattr(forward, name), getattr(held[1], name))


@pytest.mark.parametrize("changes", [{}, {"min_new_tokens": 5, "batch_size": 3}], ids=str)
def test_a_stop_string_ends_a_recorded_response(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, decode = policy("bloom", lora=True), tokenizer().decode
    train_adapter(made)
    sampling = Sampling(16, (EOS,), PAD, stop_strings=("w5", "w40", "w33"), **changes)
    found = []
    for fast in (False, True):
        if fast:
            take_the_way_of_a_gpu(monkeypatch, Tape())
            answers_come_late(monkeypatch)
        made.trunk.fast_layers = fast
        key = NoiseKey(0, 3)
        found.append(sample(made, QUERIES, sampling=sampling, noise=key, decode=decode)[0])
    assert found[0].lengths.min() < 16
    for name in ("responses", "lengths", "ended", "mask"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name))


def test_other_tokens_may_follow_than_those_that_a_pass_wrote() -> None:
    trunk = Trunk(tiny_model("bloom"))
    (ids, attention), made = text_of(3, 12, 0), generation(trunk.decoder, Tape(), 12)
    wanted = by_parts(generation(trunk.decoder, None), ids, attention)
    (newest,) = made.placed(torch.empty(3, 1, dtype=torch.long))

    def writes(states: torch.Tensor, newest: torch.Tensor) -> tuple[torch.Tensor]:
        newest.fill_(7)
        return (states,)

    states = [made.newest(ids[:, :6], attention[:, :6], writes, newest)[0]]
    for column in range(6, 12):
        given = ids[:, column : column + 1]
        if column % 2:
            newest.copy_(given)
            given = newest
        states += made.newest(given, attention[:, : column + 1], writes, newest)
    assert newest.tolist() == [[7]] * 3
    assert_close(torch.stack(states, 1), wanted)


def test_what_generations_keep_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is kept from then on."""
    made, tape = policy("bloom", lora=True), Tape()
    wanted = by_transformers(made)
    take_the_way_of_a_gpu(monkeypatch, tape)
    assert not Trunk(made.pretrained_model).let_go()
    drawn(made)
    keys = weakref.ref(made.trunk._kept._standing._layers[0][0])
    assert made.trunk.let_go()
    gc.collect()
    assert keys() is None
    assert not made.trunk.let_go()
    for _ in range(2):
        recorded = tape.recorded
        assert torch.equal(drawn(made)[0].responses, wanted[0].responses)
        assert tape.recorded == recorded + 1
        assert not made.trunk.let_go()


def test_buffers_of_other_shapes_take_the_place_of_those_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Never both at a time: they hold the keys and values of all prompts."""
    alive: weakref.WeakSet[graphed.Standing] = weakref.WeakSet()
    there = []

    class Counted(graphed.Standing):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            alive.add(self)
            there.append(len(alive))

    monkeypatch.setattr(graphed, "Standing", Counted)
    made = generation(Trunk(tiny_model("bloom")).decoder, None, 60)
    for width in (5, 20, 40):
        made.again(width + 10)
        ids = torch.randint(3, VOCABULARY, (2, width))
        made.newest(ids, torch.ones_like(ids, dtype=torch.bool), alone)
    assert there == [1, 1, 1]


def test_a_full_gpu_keeps_nothing_for_the_next_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    made = policy("bloom", lora=True)
    wanted = by_transformers(made)
    take_the_way_of_a_gpu(monkeypatch, Tape())
    monkeypatch.setattr("ppo_lab.models.trunk.has_room", lambda _: False)
    for _ in range(2):
        assert torch.equal(drawn(made)[0].responses, wanted[0].responses)
        assert not made.trunk.let_go()


def test_a_recording_that_gives_other_states_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    made = policy("bloom")
    wanted, tape = by_transformers(made), Tape()
    take_the_way_of_a_gpu(monkeypatch, tape)
    monkeypatch.setattr(graphed, "added_and_normed", lambda norm, x, y: (x, 1.1 * norm(x + y)))
    assert torch.equal(drawn(made)[0].responses, wanted[0].responses)
    assert not made.trunk.records_graphs
    played = tape.played
    drawn(made)
    assert tape.played == played


def test_a_copy_of_a_policy_records_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    made = policy("bloom", lora=True)
    take_the_way_of_a_gpu(monkeypatch, Tape())
    wanted = drawn(made)
    copied = copy.deepcopy(made)
    assert made.trunk._kept is not None
    assert copied.trunk._kept is copied.trunk._recorder is None
    train_adapter(copied)
    assert torch.equal(drawn(made)[0].responses, wanted[0].responses)
    assert not torch.equal(drawn(copied)[1].values, wanted[1].values)


def test_a_hook_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    made, tape, seen = policy("bloom"), Tape(), []
    take_the_way_of_a_gpu(monkeypatch, tape)
    made.trunk.decoder.h[0].register_forward_hook(lambda *_: seen.append(1))
    drawn(made)
    assert seen
    assert not tape.played


@pytest.mark.parametrize("name", SHAPES)
def test_with_padding_passed_along_states_and_gradients_are_transformers(name: str) -> None:
    """As on a GPU."""
    trunk = Trunk(tiny_model(name))
    whole = FastDecoder(trunk.decoder, anatomy_of(trunk.decoder), whole=True)
    assert trunk._proof().of_learning(whole)
    ids, attention = ragged_ids()
    ours, theirs = whole.hidden(ids, attention, last=4), trunk._by_transformers(ids, attention)
    seen = attention[:, -4:]
    assert_close(ours[seen], theirs[:, -4:][seen], atol=2e-5, rtol=2e-5)


def test_a_road_with_other_gradients_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    made = policy("bloom", lora=True)
    train_adapter(made)
    whole = FastDecoder(made.trunk.decoder, anatomy_of(made.trunk.decoder), whole=True)
    assert made.trunk._proof().of_learning(whole)
    monkeypatch.setattr(decoder_module, "attend", lambda q, *more: attend(q.detach(), *more))
    assert not made.trunk._proof().of_learning(whole)


def test_a_device_that_the_road_was_not_proved_on_asks_for_a_proof(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And what fails in it is said, and leaves transformers' way."""
    trunk = Trunk(tiny_model("bloom"))
    monkeypatch.setattr(Trunk, "_device", "cuda")
    assert trunk._fast_here() is not None
    trunk._proved_on = "elsewhere"
    monkeypatch.setattr(decoder_module, "attend", lambda *_: torch.zeros(1).expand(2, 3))
    assert trunk._fast_here() is None
    assert "layers are passed transformers' way" in caplog.text


def test_layers_may_be_left_to_transformers() -> None:
    trunk = Trunk(tiny_model("bloom"))
    ids, attention = ragged_ids()
    trunk.fast_layers = False
    with torch.no_grad():
        assert torch.equal(trunk.hidden(ids, attention), trunk._by_transformers(ids, attention))
    assert not isinstance(trunk.new_cache(8), KeysAndValues)


@pytest.mark.parametrize("name", SHAPES)
def test_a_pass_of_whole_batches_waits_for_nothing_either(name: str) -> None:
    """Without gradients, since autograd itself asks for a GPU."""
    decoder = Trunk(tiny_model(name, torch.bfloat16)).decoder
    with a_gpu_without_one(), torch.no_grad():
        move_to_a_gpu_without_one(decoder)
        ids = torch.empty(3, 11, dtype=torch.long, device="cuda")
        real = torch.empty(3, 11, dtype=torch.bool, device="cuda")
        states = FastDecoder(decoder, anatomy_there(decoder)).hidden(ids, real, last=4)
    assert states.shape == (3, 4, 48)
    assert states.device.type == "cuda"


def trained_on_a_gpu(kind: str, dtype: torch.dtype) -> AutoModelForCausalLMWithValueHead:
    made = policy(kind, lora=True)
    train_adapter(made)
    made = made.to("cuda")
    made.pretrained_model.to(dtype)
    return made


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bloom", "gpt2", "llama"])
def test_a_gpu_records_and_draws_what_it_draws_without(kind: str, dtype: Any) -> None:
    made = trained_on_a_gpu(kind, dtype)
    made.trunk.records_graphs = False
    plain = drawn(made, max_new_tokens=32, eos_ids=())
    made.trunk.records_graphs = True
    for _ in range(2):
        tokens, forward = drawn(made, max_new_tokens=32, eos_ids=())
        assert made.trunk.records_graphs
        assert made.trunk._recorder.works
        assert made.trunk._recorder.last is not None
        if dtype == torch.float32:
            assert torch.equal(tokens.responses, plain[0].responses)
            assert_close(forward.logprobs, plain[1].logprobs, atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            scored = made.score(tokens, temperature=1.0)
        real = tokens.mask
        gap = (forward.logprobs - scored.logprobs)[real].abs().mean()
        assert gap < (1e-4 if dtype == torch.float32 else 0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bloom", "gpt2", "llama"])
def test_a_gpu_gives_transformers_gradients(kind: str, dtype: Any) -> None:
    made = trained_on_a_gpu(kind, dtype)
    tokens, _ = drawn(made, max_new_tokens=32)

    def gradients(fast: bool) -> dict[str, torch.Tensor]:
        made.zero_grad()
        made.trunk.fast_layers = fast
        seen = made.score(tokens, temperature=1.0)
        (seen.logprobs.square().sum() + seen.values.sum()).backward()
        return {n: p.grad.float() for n, p in made.named_parameters() if p.grad is not None}

    ours = gradients(True)
    assert made.trunk._fast_here() is not None
    share = 1e-3 if dtype == torch.float32 else 0.1
    for name, theirs in gradients(False).items():
        assert (ours[name] - theirs).norm() <= share * theirs.norm() + 1e-6, name


@pytest.mark.gpu
def test_a_recording_that_a_wait_breaks_leaves_random_numbers_and_memory_as_they_were() -> None:
    device, x = torch.device("cuda", 0), torch.zeros(4, device="cuda")
    with pytest.raises(RuntimeError):
        recording.Recorder(device).record(lambda: float((x + 1.0).sum()))
    assert torch.rand(3, device="cuda").shape == (3,)
    replay, result = recording.Recorder(device).record(lambda: x + 1.0)
    replay()
    assert result.tolist() == [1.0] * 4
