"""One forward of policy and reference, and the folders in which they travel."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import save_file
from tiny_models import (
    EOS,
    PAD,
    QUERIES,
    RESPONSES,
    VOCABULARY,
    causal_lm,
    lora_config,
    policy,
    ragged,
    step,
    timeless,
    train_adapter,
    trainer,
    weights,
)
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from ppo_lab import AutoModelForCausalLMWithValueHead
from ppo_lab.models import logprobs
from ppo_lab.models.logprobs import Head, token_full_kl, token_logprobs
from ppo_lab.models.reference import Reference
from ppo_lab.models.value_head import ValueHead
from ppo_lab.rollout import NoiseKey, Sampling
from ppo_lab.types import Prompts, Tokens

KINDS = ["bloom", "gpt2", "llama"]
IDS = torch.tensor([[5, 6, 7, 20, 21, 22]])


def by_hand(model: Any, query: list[int], response: list[int], temperature: float) -> Any:
    """Log-probs, values and entropies of one response, from the logits of one unpadded row."""
    ids = torch.tensor([query + response])
    with torch.no_grad():
        out = model.pretrained_model(input_ids=ids, output_hidden_states=True)
        logp = (out.logits[0].float() / temperature).log_softmax(-1)[len(query) - 1 : -1]
        values = model.v_head(out.hidden_states[-1][0, len(query) - 1 : -1])
    chosen = logp.gather(1, torch.tensor(response)[:, None])[:, 0]
    return chosen, values, -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_kl_is_of_both_distributions_at_the_temperature(kind: str) -> None:
    model = policy(kind, lora=True).eval()
    reference = Reference(model)
    train_adapter(model)
    query, response = [5, 6, 7], [20, 21, 22]

    def log_p() -> torch.Tensor:
        with torch.no_grad():
            logits = model.pretrained_model(input_ids=torch.tensor([query + response])).logits
        return (logits[0].float() / 0.6).log_softmax(-1)[len(query) - 1 : -1]

    ours = log_p()
    with model.pretrained_model.disable_adapter():
        theirs = log_p()
    by_hand = (ours.exp() * (ours - theirs)).sum(1)
    tokens = Tokens.pack([query, [8]], [response, [9]], pad_id=0)
    found = reference.full_kl(tokens, temperature=0.6)[0]
    assert float(by_hand.min()) > 0.01
    assert_close(found, by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_gives_each_response_what_it_gets_alone(kind: str) -> None:
    """N-06, N-10, N-25: padding moves no position; V is of the state that predicts the token."""
    model = policy(kind).eval()
    with torch.no_grad():
        got = model.score(ragged(), temperature=0.7, entropy=True)
    for i, (query, response) in enumerate(zip(QUERIES, RESPONSES, strict=True)):
        expected = by_hand(model, query, response, 0.7)
        for column, single in zip((got.logprobs, got.values, got.entropy), expected, strict=True):
            assert_close(column[i, : len(response)], single, rtol=1e-5, atol=1e-5)
            assert not column[i, len(response) :].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_are_mostly_padding_give_finite_numbers(kind: str, dtype: torch.dtype) -> None:
    """N-34, Q-02: half precision under left padding; the value head stays in float32."""
    model = policy(kind, dtype=dtype).eval()
    tokens = Tokens.pack([[5] * 30, [6]], [[7, 8], [9]], pad_id=PAD)
    with torch.no_grad():
        got = model.score(tokens, temperature=1.0, entropy=True)
    for column in (got.logprobs, got.values, got.entropy):
        assert column.dtype == torch.float32
        assert column.isfinite().all()
    assert model.dtype == dtype


@torch.no_grad()
def test_a_value_is_worked_out_in_float32_under_a_half_precision_trunk() -> None:
    """Q-02: returned as float32 and worked out in bfloat16, one in 256 of it would be noise."""
    torch.manual_seed(0)
    head, hidden = ValueHead(64, std=1.0), torch.randn(8, 64).bfloat16()
    exact = hidden.double() @ head.summary.weight[0].double()
    assert_close(head(hidden), exact.float(), rtol=1e-5, atol=1e-5)


def test_train_mode_changes_nothing_whatever_dropout_the_config_asks_for() -> None:
    """N-09, P-10: the functional dropout of BLOOM, and that of an adapter added later."""
    model = policy(hidden_dropout=0.5, attention_dropout=0.5)
    late = get_peft_model(model.pretrained_model, lora_config(lora_dropout=0.5))
    made = trainer(late)
    train_adapter(made.policy)
    made.policy.train()
    with torch.no_grad():
        one, two = (made.policy.score(ragged(), temperature=1.0).logprobs for _ in range(2))
        made.policy.eval()
        still = made.policy.score(ragged(), temperature=1.0).logprobs
    assert torch.equal(one, two)
    assert torch.equal(one, still)


def test_a_reference_of_ones_own_has_no_dropout_and_is_frozen() -> None:
    """N-09."""
    ref = causal_lm("gpt2", seed=3, resid_pdrop=0.5, embd_pdrop=0.5).train()
    made = trainer(policy("gpt2"), ref)
    one, two = (made.reference.logprobs(ragged(), temperature=1.0) for _ in range(2))
    assert torch.equal(one, two)
    assert not any(p.requires_grad for p in ref.parameters())


def test_the_value_head_starts_as_asked() -> None:
    """N-29: N(0, 1 / (H + 1)) by default, another deviation, or zero."""
    torch.manual_seed(0)
    normal, narrow, zero = (
        ValueHead(4095, init=init, std=std).summary
        for init, std in (("normal", 0.0), ("normal", 0.2), ("zero", 0.0))
    )
    assert normal.weight.std().item() == pytest.approx(1 / 64, rel=0.05)
    assert narrow.weight.std().item() == pytest.approx(0.2, rel=0.05)
    assert not zero.weight.any()
    assert not normal.bias.any()


def test_an_unknown_start_of_the_value_head_is_refused() -> None:
    with pytest.raises(
        ValueError, match="v_head_init_strategy is 'normal' or 'zero', not 'xavier'"
    ):
        AutoModelForCausalLMWithValueHead.from_pretrained(
            causal_lm(), v_head_init_strategy="xavier"
        )


# --- memory


class LargestOverVocabulary(TorchDispatchMode):
    """Remembers how many elements the largest tensor had whose last dimension is the vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.elements = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (self.vocabulary,):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_of_batch_time_vocabulary_is_made_when_scoring(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """M-01, M-03, N-35: not for log-probs, entropies, reference or the KL over the vocabulary."""
    vocabulary, tile = 5003, 4 * 5003
    monkeypatch.setattr(logprobs, "TILE", tile)
    tokens = Tokens.pack([[5, 6]] * 8, [[7] * 6] * 8, pad_id=PAD)
    made = trainer(policy(vocab_size=vocabulary), policy(vocab_size=vocabulary, seed=4))
    with torch.no_grad(), LargestOverVocabulary(vocabulary) as seen:
        made.policy.eval()
        made.in_passes(tokens, made.policy.score, temperature=0.7, entropy=True)
        made.in_passes(tokens, made.reference.full_kl, temperature=0.7)
        made.collect(tokens)
    transposed_head = 16 * vocabulary
    assert tile <= seen.elements <= transposed_head < 4 * 6 * vocabulary  # a mini-batch's logits


class AliveOverVocabulary(TorchDispatchMode):
    """Remembers how many tensors of (batch, vocabulary) were there at once, at most."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape, self.most, self.made = shape, 0, list[weakref.ref[torch.Tensor]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.shape == self.shape:
                self.made.append(weakref.ref(tensor))
        self.most = max(self.most, len({id(made()) for made in self.made} - {id(None)}))
        return result


@pytest.mark.parametrize("changes", [{}, {"top_k": 5}], ids=["all", "top-k"])
def test_logits_of_a_token_are_gone_when_the_next_is_drawn(changes: dict[str, Any]) -> None:
    """M-03: log-probs are made of them at once, and no scores of all positions are kept."""
    made, prompts = trainer(policy(vocab_size=503)), Prompts(QUERIES, ["q"] * 4)
    drawn = {}
    for n in (2, 12):
        sampling = Sampling(max_new_tokens=n, eos_ids=(), pad_id=PAD, **changes)
        with AliveOverVocabulary((4, 503)) as seen:
            made.draw(prompts, sampling, NoiseKey(0, 0))
        drawn[n] = seen.most
    assert drawn[12] == drawn[2] > 0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bound", ["TILE", "WALKED_TWICE"])
def test_the_tiled_head_agrees_with_plain_logits_gradients_included(
    bound: str, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """M-01, N-35: TRL's kernel and ours walk the vocabulary in tiles that do not divide it."""
    torch.manual_seed(0)
    vocabulary = 8192 + 77
    hidden = torch.randn(7, 16, requires_grad=True)
    weight = (torch.randn(vocabulary, 16) * 0.5).requires_grad_()
    offset = torch.randn(vocabulary, requires_grad=True) if bias else None
    targets = torch.randint(vocabulary, (7,))
    leaves = [x for x in (hidden, weight, offset) if x is not None]
    results = []
    for entries in (2**25, 1):
        monkeypatch.setattr(logprobs, bound, entries)
        logp, entropy = token_logprobs(
            hidden, Head(weight, offset), targets, temperature=0.7, entropy=True
        )
        gradients = torch.autograd.grad((logp - 0.1 * entropy).sum(), leaves)
        with torch.no_grad():
            rows, _ = token_logprobs(hidden, Head(weight, offset), targets, temperature=0.7)
        assert_close(rows, logp.detach())
        results.append([logp.detach(), entropy.detach(), *gradients])
    for plain, tiled in zip(*results, strict=True):
        assert_close(tiled, plain, rtol=1e-4, atol=1e-5)


def test_the_kl_over_the_vocabulary_does_not_depend_on_its_tiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """N-35."""
    torch.manual_seed(0)
    hidden, other = torch.randn(9, 16), torch.randn(9, 16)
    head, ref = Head(torch.randn(VOCABULARY, 16)), Head(torch.randn(VOCABULARY, 16))
    whole = token_full_kl(hidden, other, head, ref, temperature=0.7)
    monkeypatch.setattr(logprobs, "TILE", 2 * VOCABULARY)
    assert_close(token_full_kl(hidden, other, head, ref, temperature=0.7), whole)
    logp, ref_logp = (
        (h @ w.weight.T / 0.7).log_softmax(-1) for h, w in ((hidden, head), (other, ref))
    )
    assert_close(whole, (logp.exp() * (logp - ref_logp)).sum(-1), rtol=1e-4, atol=1e-5)


# --- adapters


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", [False, True])
def test_kl_is_zero_at_first_whatever_adapter_the_policy_starts_from(
    kind: str, trained: bool
) -> None:
    """P-01, N-01: fresh or trained; and the reference stays where it was while the policy moves."""
    model = policy(kind, lora=True)
    if trained:
        train_adapter(model)
    made = trainer(model)
    before = made.reference.logprobs(ragged(), temperature=1.0)
    start = by_hand(model, QUERIES[0], RESPONSES[0], 1.0)[0]
    assert_close(before[0, :4], start, rtol=1e-5, atol=1e-5)
    first = step(made)
    assert first["kl"] == first["objective/kl"] == 0.0
    later = step(made)
    assert abs(later["kl"]) > 1e-4
    assert torch.equal(made.reference.logprobs(ragged(), temperature=1.0), before)


@pytest.mark.parametrize(
    "changes",
    [
        {"init_lora_weights": "pissa"},
        {"target_modules": ["word_embeddings", "query_key_value"]},
        {"target_modules": ["word_embeddings"]},
        {"use_dora": True, "use_rslora": True},
        {"target_modules": ["query_key_value"], "modules_to_save": ["dense_h_to_4h"]},
        {"trainable_token_indices": [5, 6, 20]},
        {"lora_dropout": 0.5},
        {"bias": "lora_only"},
    ],
    ids=str,
)
def test_adapters_of_every_make_start_at_kl_zero_and_leave_the_policy_alone(
    changes: dict[str, Any],
) -> None:
    """P-01: a copy of PiSSA's must not take from the trunk; embeddings start at zero in A, not B;
    trained biases stay when PEFT switches an adapter off.
    """
    peft_config = lora_config(**changes)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(causal_lm(), peft_config=peft_config)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.pretrained_model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval()
    before = model.score(ragged(), temperature=1.0).logprobs
    made = trainer(model)
    assert_close(made.policy.score(ragged(), temperature=1.0).logprobs, before)
    assert step(made)["kl"] == pytest.approx(0.0, abs=1e-5)
    assert abs(step(made)["kl"]) > 1e-4


@pytest.mark.parametrize("moved", [0.0, 0.5])
@pytest.mark.parametrize("tied", [False, True])
def test_a_reference_keeps_the_rows_of_tokens_that_an_adapter_trains(
    tied: bool, moved: float
) -> None:
    adapter = lora_config("llama", trainable_token_indices=[5, 6, 20])
    model = causal_lm("llama", tie_word_embeddings=tied)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(model, peft_config=adapter)
    rows = [p for n, p in model.named_parameters() if "trainable_tokens_delta" in n]
    with torch.no_grad():
        before = [row.add_(moved).clone() for row in rows]
        start = model.score(ragged(), temperature=1.0).logprobs
    made = trainer(model)
    assert made.reference.modules == {}, "no copy of the model"
    assert_close(made.reference.logprobs(ragged(), temperature=1.0), start)
    step(made)
    assert not any(torch.equal(a, b) for a, b in zip(rows, before, strict=True))
    assert_close(made.reference.logprobs(ragged(), temperature=1.0), start)


def test_a_module_that_an_adapter_has_moved_makes_it_a_trained_one() -> None:
    """P-01: where what it keeps in a module's place is all that it has learnt."""
    adapter = lora_config(modules_to_save=["dense_h_to_4h"])
    model = AutoModelForCausalLMWithValueHead.from_pretrained(causal_lm(), peft_config=adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name and name.endswith("weight"):
                parameter.mul_(1.5)
        start = model.score(ragged(), temperature=1.0).logprobs
    made = trainer(model)
    assert_close(made.reference.logprobs(ragged(), temperature=1.0), start)
    with made.reference.active(), model.pretrained_model.disable_adapter(), torch.no_grad():
        off = model.score(ragged(), temperature=1.0).logprobs
    assert (off - start).abs().max() > 1e-2


def test_a_value_head_starts_as_wide_as_its_source_has_it() -> None:
    """Ziegler et al. 2019's code: 1 / sqrt(hidden_size + 1), and no bias."""
    torch.manual_seed(4)
    head = ValueHead(3).summary
    torch.manual_seed(4)
    torch.nn.Linear(3, 1)  # draws as often as the head does before it is given its own numbers
    assert_close(head.weight, torch.nn.init.normal_(torch.empty(1, 3), std=0.5))
    assert head.bias.tolist() == [0.0]


def test_a_model_that_is_put_in_later_goes_the_road_that_was_chosen() -> None:
    model = policy()
    model.trunk.fast_layers = model.trunk.records_graphs = False
    model.pretrained_model = get_peft_model(model.pretrained_model, lora_config())
    assert model.trunk.is_of(model.pretrained_model)
    assert (model.trunk.fast_layers, model.trunk.records_graphs) == (False, False)


def test_a_second_trainer_may_start_from_the_first_ones_policy() -> None:
    """P-01: each has a reference of its own."""
    model = policy(lora=True)
    train_adapter(model)
    first = trainer(model)
    before = first.reference.logprobs(ragged(), temperature=1.0)
    step(first)
    second = trainer(model)
    assert step(second)["kl"] == 0.0
    assert torch.equal(first.reference.logprobs(ragged(), temperature=1.0), before)


def test_the_adapter_comes_back_on_after_an_error_under_the_reference() -> None:
    """P-06, P-03: and the value head is the same with the adapter on and off."""
    for trained in (False, True):
        model = policy(lora=True)
        if trained:
            train_adapter(model)
        made = trainer(model)
        before = model.eval().score(ragged(), temperature=1.0)
        head = model.v_head.state_dict()
        with pytest.raises(RuntimeError, match="in between"), made.reference.active():
            assert torch.equal(model.v_head.summary.weight, head["summary.weight"])
            raise RuntimeError("in between")
        after = model.score(ragged(), temperature=1.0)
        assert torch.equal(before.logprobs, after.logprobs)
        assert torch.equal(before.values, after.values)
        assert {n for n in weights(model) if "lora" in n} == {
            n for n in weights(model) if "lora" in n and ".default" in n
        }
        assert any("lora" in n for n in weights(model))


def test_a_reference_adapter_is_never_trained() -> None:
    """P-01: it is frozen after each look at it."""
    model = policy(lora=True)
    train_adapter(model)
    made = trainer(model)
    made.reference.logprobs(ragged(), temperature=1.0)
    frozen = [p for n, p in model.named_parameters() if ".reference." in n]
    assert frozen
    assert not any(p.requires_grad for p in frozen)


def test_an_adapter_on_the_output_head_is_refused() -> None:
    """P-04: log-probs come from the head's own weight and would not see it."""
    peft_config = lora_config(target_modules=["query_key_value", "lm_head"])
    model = causal_lm(tie_word_embeddings=False)
    with pytest.raises(ValueError, match="on the output head of BloomForCausalLM"):
        AutoModelForCausalLMWithValueHead.from_pretrained(model, peft_config=peft_config)


def test_a_learnt_prompt_is_refused() -> None:
    """P-09: the trunk would not see it."""
    peft_config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="PROMPT_TUNING learns a prompt"):
        AutoModelForCausalLMWithValueHead.from_pretrained(causal_lm(), peft_config=peft_config)


def test_two_adapters_at_once_are_refused() -> None:
    """P-07."""
    model = get_peft_model(causal_lm(), lora_config())
    with pytest.raises(ValueError, match="peft_config was given for a model that has an adapter"):
        AutoModelForCausalLMWithValueHead.from_pretrained(model, peft_config=lora_config())


def test_plain_peft_and_wrapped_models_are_all_policies() -> None:
    """P-09: and each is trained."""
    for model in (causal_lm(), get_peft_model(causal_lm(), lora_config()), policy()):
        made = trainer(model)
        before = weights(made.policy)
        step(made)
        after = weights(made.policy)
        assert any(not torch.equal(before[n], after[n]) for n in before if "v_head" not in n)


def test_an_adapter_that_was_loaded_frozen_is_refused(tmp_path: Path) -> None:
    """P-08: PEFT loads adapters frozen unless told, and a run would train the value head alone."""
    get_peft_model(causal_lm(), lora_config()).save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(causal_lm(), str(tmp_path))
    with pytest.raises(ValueError, match="model: none of its weights is trainable"):
        trainer(frozen)


def test_gradients_reach_the_adapter_under_checkpointing() -> None:
    """P-05."""
    made = trainer(policy(lora=True), gradient_checkpointing=True, ppo_epochs=1)
    step(made)
    gradients = [p.grad for n, p in made.policy.named_parameters() if "lora_B" in n]
    assert gradients
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)


@pytest.mark.parametrize("made", ["classifier", "encoder", "number", "wrapper"])
def test_what_is_no_causal_language_model_is_refused(made: str) -> None:
    """A-02, N-07: encoder-decoders are not for this trainer."""
    if made == "classifier":
        wrong: Any = AutoModelForSequenceClassification.from_config(causal_lm().config)
    elif made == "encoder":
        sizes = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8}
        wrong = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes))
    else:
        wrong = 3 if made == "number" else policy()
    with pytest.raises(ValueError, match="model must be a"):
        AutoModelForCausalLMWithValueHead.from_pretrained(wrong)


# --- folders


def same(one: Any, other: Any) -> None:
    assert torch.equal(one.v_head.summary.weight, other.v_head.summary.weight)
    assert torch.equal(one.v_head.summary.bias, other.v_head.summary.bias)
    with torch.no_grad():
        (logits, _, values), (expected, _, expected_values) = (m.eval()(IDS) for m in (one, other))
    assert_close(logits, expected)
    assert_close(values, expected_values)


def test_a_saved_policy_comes_back_with_its_value_head_bit_for_bit(tmp_path: Path) -> None:
    """P-02, C-02, C-04: and plain transformers loads the same folder."""
    made = trainer(policy("gpt2"))
    step(made)
    made.save_pretrained(str(tmp_path))
    same(AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path), made.policy)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert_close(plain(IDS).logits, made.policy.eval()(IDS)[0])
    assert not [f for f in tmp_path.iterdir() if f.suffix in (".bin", ".pt", ".pkl")]
    assert (tmp_path / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_value_head_among_the_shards_of_a_model_is_found(tmp_path: Path, name: str) -> None:
    """P-02: as TRL 0.11 left large policies."""
    saved = policy("llama", seed=3)
    saved.pretrained_model.config.save_pretrained(tmp_path)
    state = saved.pretrained_model.state_dict()
    state |= {f"v_head.{key}": value for key, value in saved.v_head.state_dict().items()}
    place = {key: f"{i % 2}-{name}" for i, key in enumerate(sorted(state))}
    for file in set(place.values()):
        shard = {key: state[key].clone() for key in state if place[key] == file}
        if name.endswith(".bin"):
            torch.save(shard, tmp_path / file)
        else:
            save_file(shard, tmp_path / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": place}
    (tmp_path / f"{name}.index.json").write_text(json.dumps(index))
    same(AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path), saved)


@pytest.mark.parametrize("lora", [False, True])
def test_saving_in_the_midst_of_training_moves_nothing(tmp_path: Path, lora: bool) -> None:
    """C-05: not what is trained, nor what the end saves."""
    watched, alone = (trainer(policy(lora=lora), max_grad_norm=1.0) for _ in range(2))
    for made in (watched, alone):
        step(made)
    watched.save_pretrained(str(tmp_path / "midst"))
    watched.save_pretrained(str(tmp_path / "again"))
    assert timeless(step(watched)) == timeless(step(alone))
    for made, name in ((watched, "watched"), (alone, "alone")):
        made.save_pretrained(str(tmp_path / name))
    for one, other in (("midst", "again"), ("watched", "alone")):
        files = sorted(p.name for p in (tmp_path / one).iterdir())
        assert "value_head.safetensors" in files
        for file in files:
            texts = [(tmp_path / folder / file).read_bytes() for folder in (one, other)]
            assert texts[0] == texts[1], file
    heads = [(tmp_path / f / "value_head.safetensors").read_bytes() for f in ("midst", "watched")]
    assert heads[0] != heads[1]


@pytest.mark.parametrize("adapter", ["default", "mine"])
@pytest.mark.parametrize("trained", [False, True])
def test_a_saved_adapter_comes_back_trainable_with_its_value_head(
    tmp_path: Path, adapter: str, trained: bool
) -> None:
    """P-02, P-08, C-04: whatever its name, and without the reference's."""
    causal_lm().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = AutoModelForCausalLMWithValueHead(
        get_peft_model(base, lora_config(), adapter_name=adapter)
    )
    if trained:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0.0, 0.3)
    made = trainer(model)
    step(made)
    made.save_pretrained(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "saved")
    same(loaded, made.policy)
    assert any("lora" in name for name in weights(loaded))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert_close(plain(IDS).logits, made.policy.eval()(IDS)[0])
    assert not (tmp_path / "saved" / "reference").exists()


def test_a_merged_adapter_is_a_plain_model_with_the_same_logits(tmp_path: Path) -> None:
    """P-11."""
    model = policy(lora=True)
    train_adapter(model)
    made = trainer(model)
    step(made)
    with torch.no_grad():
        expected = model.eval()(IDS)[0]
    model.pretrained_model.merge_and_unload().save_pretrained(tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert_close(merged(IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_half_precision_files_are_trained_in_float32_unless_told(tmp_path: Path) -> None:
    """Q-02: transformers loads what was saved; the classic default is float32."""
    causal_lm().half().save_pretrained(tmp_path)
    load = AutoModelForCausalLMWithValueHead.from_pretrained
    assert load(tmp_path).dtype == torch.float32
    assert load(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load(tmp_path, torch_dtype="auto").dtype == torch.float16


def test_weights_on_several_devices_or_on_the_disk_are_refused(tmp_path: Path) -> None:
    """Q-03: torch would speak of meta tensors."""
    causal_lm().save_pretrained(tmp_path)
    parts = {"transformer.word_embeddings": "cpu", "transformer.h.0": "cpu", "lm_head": "cpu"}
    parts |= {f"transformer.{name}": "disk" for name in ("h.1", "ln_f")}
    parts |= {"transformer.word_embeddings_layernorm": "cpu"}
    apart = {"device_map": parts, "offload_folder": str(tmp_path / "offloaded")}
    message = "model: device_map put BloomForCausalLM on cpu, disk, and"
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, **apart)
    spread_out = AutoModelForCausalLM.from_pretrained(tmp_path, **apart)
    with pytest.raises(ValueError, match=message):
        trainer(spread_out)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert step(trainer(whole))["kl"] == 0.0


def test_the_wrapper_shows_what_libraries_look_for() -> None:
    """G-10."""
    model = policy()
    assert model.generation_config is model.pretrained_model.generation_config
    assert model.config.model_type == "bloom"
    assert model.generation_config.eos_token_id == EOS


def test_a_reference_given_is_the_one_compared_with() -> None:
    """A-03, N-05."""
    made = trainer(policy(), policy(seed=5))
    expected = by_hand(policy(seed=5).eval(), QUERIES[2], RESPONSES[2], 1.0)[0]
    assert_close(
        made.reference.logprobs(ragged(), temperature=1.0)[2], expected, rtol=1e-5, atol=1e-5
    )
    assert isinstance(made.reference, Reference)
