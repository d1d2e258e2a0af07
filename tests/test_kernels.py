"""The Triton kernels give what torch's operations do, and are left out where they do not.

Those marked `gpu` also run in Triton's interpreter, where that is installed: TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_fast import assert_states_close, ragged_ids, tiny_model
from torch import Tensor
from torch.testing import assert_close

from ppo_lab.models.choice import LEVELS
from ppo_lab.models.fast import decoder as decoder_module
from ppo_lab.models.fast import kernels as kernels_module
from ppo_lab.models.fast.attention import bias_of, by_one_kernel, parted
from ppo_lab.models.fast.decoder import FastDecoder
from ppo_lab.models.fast.draws import draw_from
from ppo_lab.models.fast.elementwise import ACTIVATIONS
from ppo_lab.models.fast.kernels import Kernels
from ppo_lab.models.fast.proof import prove_draws
from ppo_lab.models.fast.recording import Recorder
from ppo_lab.models.logprobs import Head
from ppo_lab.models.trunk import Trunk

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def relative(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach().float(), theirs.detach().float()
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-9))


def tolerance(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "new", "seen", "alibi"),
    [
        (4, 4, 64, 37, 37, True),
        (4, 2, 24, 20, 33, False),
        (2, 1, 128, 130, 130, False),
        (3, 3, 16, 5, 140, True),
        (2, 2, 80, 64, 64, False),
    ],
)
def test_attention_over_whole_texts_and_its_gradients(
    heads: int, kv_heads: int, size: int, new: int, seen: int, alibi: bool
) -> None:
    from ppo_lab.models.fast.kernels.whole_texts import attend_texts

    torch.manual_seed(0)
    dtype = DTYPES[-1]
    # As the layers have them: (batch, time, heads, size), seen the other way round.
    q = normal(3, new, heads, size, dtype=dtype).transpose(1, 2).requires_grad_()
    k, v = (
        normal(3, seen, kv_heads, size, dtype=dtype).transpose(1, 2).requires_grad_()
        for _ in range(2)
    )
    real = torch.ones(3, seen, dtype=torch.bool, device=DEVICE)
    real[1, : seen // 3] = False
    real[2, -2:] = False
    slopes = 2.0 * torch.rand(heads, device=DEVICE) if alibi else None
    positions = ((real.cumsum(1) - 1) * real).float()
    columns = torch.arange(seen - new, seen, device=DEVICE)
    bias = bias_of(real, columns, slopes=slopes, dtype=dtype).float().clamp(min=-1e30)

    ours = attend_texts(q, k, v, real, positions, slopes, 0.2)
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    theirs = by_one_kernel(*exact, bias, 0.2)
    asks = real[:, -new:, None].float()  # padding asks nothing
    pull = normal(*ours.shape) * asks
    assert ours.isfinite().all()
    assert relative(ours * asks, theirs * asks) < tolerance(dtype)
    for one, other in zip(
        torch.autograd.grad((ours.float() * pull).sum(), (q, k, v)),
        torch.autograd.grad((theirs * pull).sum(), exact),
        strict=True,
    ):
        assert relative(one, other) < tolerance(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("by_head", [True, False])
def test_the_gradient_of_attention_lies_as_its_product_does(by_head: bool) -> None:
    from ppo_lab.models.fast.kernels.whole_texts import attend_texts

    torch.manual_seed(0)
    fused = normal(2, 21, 2 * 3 * 16, dtype=DTYPES[-1]).requires_grad_()
    real = torch.ones(2, 21, dtype=torch.bool, device=DEVICE)
    positions = (real.cumsum(1) - 1).float()

    def split(x: Tensor) -> tuple[Tensor, ...]:
        return x.unflatten(2, (2, 3, 16) if by_head else (3, 2, 16)).unbind(3 if by_head else 2)

    found, addresses = [], set()
    for parts in (parted(fused, split), split(fused)):
        for part in parts:
            part.register_hook(lambda grad: addresses.add(grad.untyped_storage().data_ptr()))
        q, k, v = (part.transpose(1, 2) for part in parts)
        mixed = attend_texts(q, k, v, real, positions, None, 0.2)
        found.append(torch.autograd.grad(mixed.float().square().sum(), fused)[0])
    assert torch.equal(*found)
    assert found[0].untyped_storage().data_ptr() in addresses
    assert found[1].untyped_storage().data_ptr() not in addresses


@pytest.mark.gpu
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "rank"),
    [(1, 96, 128, 0), (5, 40, 2048, 0), (64, 1030, 512, 16), (33, 32, 4096, 0), (17, 64, 1024, 5)],
)
def test_products_of_few_rows(
    rows: int, outputs: int, inputs: int, rank: int, biased: bool
) -> None:
    """Again and again, with what the products before left in the parts of their sums."""
    from ppo_lab.models.fast.kernels.few_rows import few_rows

    torch.manual_seed(rows)
    dtype = DTYPES[-1]
    weight, bias = normal(outputs, inputs, dtype=dtype), normal(outputs, dtype=dtype)
    a, b = normal(rank, inputs, dtype=dtype), normal(outputs, rank, dtype=dtype)
    for _ in range(3):
        x = normal(rows, inputs, dtype=dtype) / inputs**0.5
        exact = x.double() @ weight.double().t()
        exact += bias.double() * biased + 0.5 * x.double() @ a.double().t() @ b.double().t()
        adapter = (0.5, a, b) if rank else ()
        ours = few_rows(x, weight, bias if biased else None, *adapter)
        assert ours.dtype == dtype
        assert relative(ours, exact) < tolerance(dtype)
        assert torch.equal(ours, few_rows(x, weight, bias if biased else None, *adapter))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter runs programs one after the other")
def test_kernels_that_are_brought_up_early_read_what_those_before_have_written() -> None:
    """A recorded chain of them, again and again, gives what it gives kernel by kernel."""
    from ppo_lab.models.fast.kernels.add_norm import add_norm
    from ppo_lab.models.fast.kernels.few_rows import few_rows

    torch.manual_seed(0)
    sizes, dtype = [1024, 4096, 1024, 512], torch.bfloat16
    weights = [normal(n, m, dtype=dtype) / m**0.5 for m, n in pairwise([*sizes, sizes[0]])]
    scale, start = normal(1024, dtype=dtype), normal(64, 1024, dtype=dtype)

    def chain(between: Callable[[], None]) -> Tensor:
        total = x = start
        for _ in range(10):
            for weight in weights:
                x = few_rows(x, weight, None)
                between()
            total, x = add_norm(total, x, scale, None, 1e-5, False)
            between()
        return x

    with torch.no_grad():
        wanted = chain(torch.cuda.synchronize)
        recorder = Recorder(torch.device("cuda", torch.cuda.current_device()))
        launch, result = recorder.record(lambda: chain(lambda: None))
    for _ in range(20):
        launch()
        torch.cuda.synchronize()
        assert torch.equal(result, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_a_product_of_few_rows_is_activated_as_torch_does_it(activation: str) -> None:
    from ppo_lab.models.fast.kernels.few_rows import few_rows

    torch.manual_seed(0)
    dtype = DTYPES[-1]
    for outputs, inputs in ((40, 256), (32, 4096)):  # by one program a tile, and by several
        x, bias = normal(5, inputs, dtype=dtype), normal(outputs, dtype=dtype)
        weight = normal(outputs, inputs, dtype=dtype) * 2.0 / inputs**0.5
        x[0] = torch.nan
        wanted = ACTIVATIONS[activation](few_rows(x, weight, bias)).float()
        ours = few_rows(x, weight, bias, 0.0, None, None, activation)
        assert ours[0].isnan().all()
        assert_close(ours[1:].float(), wanted[1:], rtol=tolerance(dtype), atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("rank", "other_rank"), [(0, 0), (4, 0), (0, 20), (3, 16)])
def test_a_gate_and_what_goes_through_it_are_one_product(rank: int, other_rank: int) -> None:
    from ppo_lab.models.fast.kernels.few_rows import few_rows

    torch.manual_seed(0)
    dtype, outputs, inputs = DTYPES[-1], 72, 256
    x = normal(7, inputs, dtype=dtype)

    def numbers(rank: int, scaling: float, bias: Tensor | None) -> tuple[Any, ...]:
        weight = normal(outputs, inputs, dtype=dtype) / inputs**0.5
        a, b = normal(rank, inputs, dtype=dtype) / 16.0, normal(outputs, rank, dtype=dtype) / 16.0
        return weight, bias, scaling, *((a, b) if rank else (None, None))

    gate, up = numbers(rank, 0.5, None), numbers(other_rank, 2.0, normal(outputs, dtype=dtype))
    wanted = F.silu(few_rows(x, *gate)).float() * few_rows(x, *up).float()
    assert relative(few_rows(x, *gate, "silu", up), wanted) < tolerance(dtype)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter runs programs one after the other")
def test_attention_of_more_heads_than_a_grid_has_columns() -> None:
    from ppo_lab.models.fast.kernels.whole_texts import attend_texts

    q, k, v = (normal(2**13 + 1, 8, 3, 16, dtype=DTYPES[-1]).requires_grad_() for _ in range(3))
    real = torch.ones(len(q), 3, dtype=torch.bool, device=DEVICE)
    positions = (real.cumsum(1) - 1).float()
    whole = attend_texts(q, k, v, real, positions, None, 0.2)
    last = attend_texts(q[-1:], k[-1:], v[-1:], real[-1:], positions[-1:], None, 0.2)
    assert torch.equal(whole[-1:], last)
    for gradient in torch.autograd.grad(whole.float().square().sum(), (q, k, v)):
        assert gradient[-1].any()


def attended_by_hand(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    first: Tensor,
    column: int,
    slopes: Tensor | None,
    scaling: float,
) -> Tensor:
    """softmax(scaling q k + slope (column - first)) v in float64, row by row and head by head."""
    batch, heads, _ = q.shape
    group, mixed = heads // keys.shape[1], torch.zeros(q.shape, dtype=torch.float64)
    for row in range(batch):
        seen = slice(int(first[row]), column + 1)
        for head in range(heads):
            k, v = (x[row, head // group, seen].double().cpu() for x in (keys, values))
            scores = scaling * k @ q[row, head].double().cpu()
            if slopes is not None:
                alibi = float(slopes[head]) * torch.arange(len(k), dtype=torch.float32)
                scores += alibi.to(q.dtype).double()
            mixed[row, head] = scores.softmax(0) @ v
    return mixed


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(4, 4, 16), (4, 2, 80), (6, 2, 128), (3, 1, 16)]
)
def test_attention_to_the_newest_column(
    heads: int, kv_heads: int, size: int, alibi: bool, dtype: torch.dtype
) -> None:
    """About the edges of what is read at once, of views, with no number in all that is not seen."""
    from ppo_lab.models.fast.kernels.grouped_query import columns_of
    from ppo_lab.models.fast.kernels.one_query import COLUMNS, attend_newest, readers_of

    torch.manual_seed(size)
    width = 128 if size > 16 else 16
    once = readers_of(width, dtype) * COLUMNS if heads == kv_heads else columns_of(width, dtype)
    firsts, positions = torch.tensor([0, 1, once - 1, once, once + 3]), 2 * once + 3
    slopes = 2.0 ** -torch.arange(1, heads + 1).float() if alibi else None
    for column in (0, 1, once - 1, once, once + 1, 2 * once, positions - 1):
        first = firsts.clamp(max=column)
        batch, many = len(first), heads + 2 * kv_heads
        # Queries, keys and values side by side, in rows further apart than they are wide.
        fused = torch.randn(batch, 2, many, size, dtype=dtype)[:, 1].to(DEVICE)
        q, k, v = fused.split([heads, kv_heads, kv_heads], 1)
        there = torch.arange(positions)
        seen = ((there >= first[:, None]) & (there < column))[:, None, :, None]
        keys, values = (
            torch.randn(batch, kv_heads, positions, size).masked_fill(~seen, torch.nan)
            for _ in range(2)
        )
        keys, values = (x.to(dtype).to(DEVICE) for x in (keys, values))
        wanted = [x.clone() for x in (keys, values)]
        for buffer, new in zip(wanted, (k, v), strict=True):
            buffer[:, :, column] = new
        mixed = attend_newest(
            q, k, v, keys, values, first.to(DEVICE), torch.tensor([column], device=DEVICE),
            slopes if slopes is None else slopes.to(DEVICE), 0.7 / size**0.5,
        )  # fmt: skip
        for buffer, expected in zip((keys, values), wanted, strict=True):
            assert_close(buffer, expected, rtol=0, atol=0, equal_nan=True)
        by_hand = attended_by_hand(q, *wanted, first, column, slopes, 0.7 / size**0.5)
        assert mixed.dtype == dtype
        share = tolerance(dtype)  # bfloat16 keeps 8 bits of the result
        assert_close(mixed.double().cpu(), by_hand, rtol=share, atol=share)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [300, 5003])
@pytest.mark.parametrize("biased", [False, True])
def test_a_sweep_gives_log_probabilities_and_their_gradient(
    vocabulary: int, biased: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ppo_lab.models.fast.kernels import sweep_rows as module

    monkeypatch.setattr(module, "GPU_TILE", 128)
    monkeypatch.setattr(module, "GPU_TOKENS", 8)
    torch.manual_seed(0)
    hidden = normal(13, 24, dtype=dtype).requires_grad_()
    weight = normal(vocabulary, 24, dtype=dtype)
    bias = normal(vocabulary, dtype=dtype) if biased else None
    targets = torch.randint(0, vocabulary, (13,), device=DEVICE)
    targets[0] = vocabulary - 1
    ours = module.sweep_rows(hidden, weight, bias, targets, 0.7)

    exact = hidden.detach().float().requires_grad_()
    logits = F.linear(exact, weight.float(), None if bias is None else bias.float())
    theirs = (0.7 * logits).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    pull = normal(13)
    (slope,) = torch.autograd.grad((ours * pull).sum(), hidden)
    (exact_slope,) = torch.autograd.grad((theirs * pull).sum(), exact)
    assert relative(ours, theirs) < tolerance(dtype)
    assert relative(slope, exact_slope) < tolerance(dtype)
    with torch.no_grad():
        assert_close(module.sweep_rows(hidden, weight, bias, targets, 0.7), ours.detach())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [3.0, 60.0])
@pytest.mark.parametrize("vocabulary", [9, 16, 17, 300, 5003, 70000])
def test_tokens_are_drawn_as_on_a_cpu(vocabulary: int, spread: float, dtype: torch.dtype) -> None:
    """With a spread so large that most blocks of the vocabulary have no share in the sum, too."""
    from ppo_lab.models.fast.kernels.draw_rows import draw_rows

    torch.manual_seed(0)
    products = spread * normal(7, vocabulary, dtype=dtype)
    uniforms = torch.rand(7, LEVELS, dtype=torch.float64, device=DEVICE)
    tokens, logprobs, entropies = draw_rows(products, uniforms, 0.8)
    wanted = draw_from(products.cpu(), uniforms.cpu(), scale=0.8)
    assert torch.equal(tokens.cpu(), wanted.tokens)
    # Each is a difference of two numbers as large as the largest logit.
    assert_close(logprobs.cpu(), wanted.logprobs, atol=4e-6 * spread, rtol=1e-5)
    assert_close(entropies.cpu(), wanted.entropy, atol=4e-6 * spread, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "centred"), [(48, True), (64, False), (1000, True)])
def test_a_sum_and_its_norm(width: int, centred: bool, dtype: torch.dtype) -> None:
    from ppo_lab.models.fast.kernels.add_norm import add_norm

    torch.manual_seed(0)
    x, y = (normal(5, width, dtype=dtype).requires_grad_() for _ in range(2))
    weight = normal(width, dtype=dtype)
    bias = normal(width, dtype=dtype) if centred else None
    total, normed = add_norm(x, y, weight, bias, 1e-5, centred)

    exact = [p.detach().float().requires_grad_() for p in (x, y)]
    summed = exact[0] + exact[1]
    norm = F.layer_norm if centred else F.rms_norm
    more = [bias.float()] if bias is not None else []
    wanted = norm(summed, (width,), weight.float(), *more, eps=1e-5)
    pulls = normal(5, width), normal(5, width)
    assert relative(total, summed) < tolerance(dtype)
    assert relative(normed, wanted) < tolerance(dtype)
    ours = torch.autograd.grad((total * pulls[0] + normed * pulls[1]).sum(), (x, y))
    theirs = torch.autograd.grad((summed * pulls[0] + wanted * pulls[1]).sum(), exact)
    for one, other in zip(ours, theirs, strict=True):
        assert relative(one, other) < tolerance(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", ["alone", "gated", "halves"])
@pytest.mark.parametrize("width", [2051, 40])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_an_activation_with_its_gradient(
    activation: str, given: str, width: int, dtype: torch.dtype
) -> None:
    """Rows of more than one block, or of less than one."""
    from ppo_lab.models.fast.kernels.activate import activate_halves, activate_rows

    torch.manual_seed(0)
    both = normal(3, 2 * width, dtype=dtype).requires_grad_()
    exact = both.detach().float().requires_grad_()
    z, u = exact.chunk(2, 1)
    by_gate, by_up = both.chunk(2, 1)
    if given == "halves":
        ours = activate_halves(both, activation)
    else:
        ours = activate_rows(by_gate, activation, by_up if given == "gated" else None)
    wanted = ACTIVATIONS[activation](z) * (1.0 if given == "alone" else u)
    pull = normal(3, width, dtype=dtype)
    assert relative(ours, wanted) < tolerance(dtype)
    (slope,) = torch.autograd.grad(ours, both, pull)
    (exact_slope,) = torch.autograd.grad(wanted, exact, pull.float())
    assert relative(slope, exact_slope) < tolerance(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("starts", [True, False])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "rank"),
    [(70, 100, 330, 16), (5, 1300, 40, 3), (200, 64, 64, 33)],
)
def test_an_adapter_with_its_gradients(
    rows: int, inputs: int, outputs: int, rank: int, starts: bool
) -> None:
    """Forward and backward, A and B in float32 beside rows in half precision."""
    from ppo_lab.models.fast.kernels.adapter import adapted_start, adapter_slopes

    torch.manual_seed(0)
    dtype = DTYPES[-1]
    x, grad = normal(rows, inputs, dtype=dtype), normal(rows, outputs, dtype=dtype)
    a, b = normal(rank, inputs) / inputs**0.5, normal(outputs, rank) / outputs**0.5
    bias = normal(outputs, dtype=dtype) if starts else None
    y, inner = adapted_start(x, a, b if starts else None, 0.7, bias)
    for_x, of_inner = adapted_start(grad, b.t(), a.t() if starts else None, 0.7, None)
    for_a, for_b = adapter_slopes(x, grad, inner, of_inner, 0.7, torch.float32)

    x, grad = x.float(), grad.float()
    h, d = x @ a.t(), grad @ b
    pairs = [(inner, h), (of_inner, d), (for_a, 0.7 * d.t() @ x), (for_b, 0.7 * grad.t() @ h)]
    assert (y is None) == (for_x is None) == (not starts)
    if y is not None and for_x is not None and bias is not None:
        pairs += [(y, 0.7 * h @ b.t() + bias.float()), (for_x, 0.7 * d @ a)]
    for ours, exact in pairs:
        assert ours.shape == exact.shape
        assert relative(ours, exact) < tolerance(dtype)


@pytest.mark.gpu
def test_a_head_proves_them() -> None:
    torch.manual_seed(0)
    kernels = kernels_module._kernels()
    assert kernels is not None
    assert not kernels_module._left_out
    for dtype in DTYPES:
        head = Head(normal(5003, 32, dtype=dtype), normal(5003, dtype=dtype), scale=0.5)
        assert prove_draws(head)


# --- where they fail


def like_torch(
    x: Tensor, y: Tensor, weight: Tensor, bias: Any, eps: float, centred: bool
) -> tuple[Tensor, Tensor]:
    norm = F.layer_norm if centred else F.rms_norm
    more = [bias] if centred else []
    return x + y, norm(x + y, weight.shape, weight, *more, eps=eps)


def activated(z: Tensor, activation: str, u: Tensor | None = None) -> Tensor:
    return ACTIVATIONS[activation](z) * (1.0 if u is None else u)


def halves_activated(both: Tensor, activation: str) -> Tensor:
    z, u = both.chunk(2, 1)
    return activated(z, activation, u)


def refuse(*_: Any) -> Any:
    raise FileNotFoundError("ptxas")


def wrong(x: Tensor, y: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x + y, x - y


@pytest.fixture
def a_gpu_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Trunks believe to be on a GPU with this kernel for a sum and its norm."""

    def take(add_norm: Callable[..., Any]) -> None:
        others = dict.fromkeys(Kernels._fields)  # are for half precision
        others |= {"activate_rows": activated, "activate_halves": halves_activated}
        kernels = Kernels(**{**others, "add_norm": add_norm})
        found = lambda _: None if kernels_module._left_out else kernels  # noqa: E731
        for module in ("attention", "elementwise"):
            monkeypatch.setattr(f"ppo_lab.models.fast.{module}.kernels_for", found)
        monkeypatch.setattr("ppo_lab.models.trunk.kernels_for", found)
        monkeypatch.setattr(FastDecoder, "_passes_whole", lambda *_: True)
        monkeypatch.setattr(Trunk, "_device", "cuda")
        monkeypatch.setattr(kernels_module, "_left_out", [])

    return take


def assert_fast_and_equal(trunk: Trunk) -> None:
    ids, attention = ragged_ids()
    fast = trunk._fast_here()
    assert fast is not None
    theirs = trunk._by_transformers(ids, attention)
    assert_states_close(fast.hidden(ids, attention)[attention], theirs[attention])


@pytest.mark.parametrize("name", ["bloom", "llama", "phi3"])
def test_a_layer_made_of_them_is_the_layer(name: str, a_gpu_with: Callable[[Any], None]) -> None:
    a_gpu_with(like_torch)
    trunk = Trunk(tiny_model(name).requires_grad_(False))
    assert_fast_and_equal(trunk)
    assert not kernels_module._left_out


@pytest.mark.parametrize("bad", [refuse, wrong])
def test_those_that_fail_or_differ_are_left_out_and_the_layers_stay_fast(
    bad: Callable[..., Any],
    a_gpu_with: Callable[[Any], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    a_gpu_with(bad)
    trunk = Trunk(tiny_model("bloom").requires_grad_(False))
    assert len(kernels_module._left_out) == 1
    assert "kernels are left out" in caplog.text
    assert_fast_and_equal(trunk)


def test_they_stay_where_it_is_not_they_that_differ(
    a_gpu_with: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    a_gpu_with(like_torch)
    monkeypatch.setattr(decoder_module, "attend", lambda q, *_: torch.zeros_like(q).flatten(2))
    trunk = Trunk(tiny_model("bloom").requires_grad_(False))
    assert trunk._fast_here() is None
    assert not kernels_module._left_out
