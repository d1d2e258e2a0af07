"""TRL's classic verbs, as people's code of before calls them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from test_critic import classifier
from tiny_models import (
    EOS,
    QUERIES,
    RESPONSES,
    SCORES,
    VOCABULARY,
    causal_lm,
    lora_config,
    policy,
    ragged,
    step,
    tensors,
    timeless,
    tokenizer,
    train_adapter,
    trainer,
    weights,
)
from torch.testing import assert_close
from transformers import AutoTokenizer, GenerationConfig

from ppo_lab import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from ppo_lab.classic import _until
from ppo_lab.models.critic import Critic


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A local model with its tokenizer."""
    causal_lm().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def test_the_classic_snippet_prints_kl_and_mean_reward(folder: str) -> None:
    """A-01, T-05: one query against a batch size of 16, and no data set."""
    model = AutoModelForCausalLMWithValueHead.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder)
    config = PPOConfig(
        model_name="tiny", learning_rate=1.5e-5, batch_size=16, kl_penalty="kl", init_kl_coef=0.2
    )
    made = PPOTrainer(config, model, tokenizer=tokens, device="cpu")
    query_tensors = [tokens.encode("w5 w6 w7", return_tensors="pt")[0]]
    response_tensors = made.generate(query_tensors)
    stats = made.step(query_tensors, response_tensors, [torch.tensor(1.8)])
    assert stats["mean_reward"] == stats["ppo/mean_scores"] == pytest.approx(1.8)
    assert stats["kl"] == 0.0
    assert made.dataloader is None


def test_prompts_made_on_the_fly_train_over_many_steps(folder: str) -> None:
    """A-01, T-05: generate, score, step, in a loop of one's own."""
    model = AutoModelForCausalLMWithValueHead.from_pretrained(folder)
    made = trainer(model)
    for i in range(3):
        queries = tensors([[5 + i, 6], [7]])
        responses = made.generate(queries, return_prompt=False, max_new_tokens=4)
        stats = made.step(queries, responses, [float(len(r)) for r in responses])
    assert stats["tokens/queries_len_mean"] == 1.5
    assert abs(stats["kl"]) > 0.0
    assert made.iterations_done == 3


# --- generate


def test_a_list_gives_a_list_and_one_query_a_tensor_of_one_row() -> None:
    """A-01: `.squeeze()` on the answer to one query is in everybody's code."""
    made = trainer()
    one = made.generate(torch.tensor([5, 6]), max_new_tokens=3, eos_token_id=None)
    assert one.shape == (1, 5)
    assert one.squeeze()[:2].tolist() == [5, 6]
    many = made.generate(tensors([[5, 6], [7]]), max_new_tokens=3, return_prompt=False)
    assert [response.dim() for response in many] == [1, 1]


def test_a_query_that_holds_the_end_is_returned_whole() -> None:
    """G-03."""
    query = [5, EOS, 6, EOS]
    (full,) = trainer().generate(tensors([query]), max_new_tokens=3)
    assert full[:4].tolist() == query
    assert len(full) > 4


def test_the_length_sampler_draws_the_number_of_new_tokens() -> None:
    lengths = iter([3, 5])
    made = trainer()
    for expected in (3, 5):
        (row,) = made.generate(
            tensors([[5]]), lambda: next(lengths), return_prompt=False, eos_token_id=None
        )
        assert len(row) == expected
    several = iter([3, 1, 5])
    rows = made.generate(
        tensors([[5], [6], [7]]), lambda: next(several), return_prompt=False, eos_token_id=None
    )
    assert [len(row) for row in rows] == [3, 1, 5], "one draw a query"


def test_the_references_responses_come_from_the_reference() -> None:
    """G-07: with the adapter off, or from the frozen copy; not from the policy as it is now."""
    for lora in (True, False):
        model = policy(lora=lora)
        made = trainer(model)
        before = made.generate(tensors(QUERIES), do_sample=False, max_new_tokens=6)
        if lora:
            train_adapter(model, size=3.0)
        else:
            with torch.no_grad():
                for parameter in model.pretrained_model.parameters():
                    parameter.add_(torch.randn_like(parameter))
        now, reference = made.generate(
            tensors(QUERIES), do_sample=False, max_new_tokens=6, generate_ref_response=True
        )
        assert [r.tolist() for r in reference] == [r.tolist() for r in before]
        assert [r.tolist() for r in now] != [r.tolist() for r in before]


@pytest.mark.parametrize("extra", [{}, {"use_cache": True}], ids=["ours", "transformers"])
def test_nothing_of_the_models_own_generation_config_leaks_in(extra: dict[str, Any]) -> None:
    """N-33: top_k, temperature, repetition penalty, bad words, least and greatest length."""
    model = policy()
    own = model.generation_config
    own.top_k, own.temperature, own.repetition_penalty, own.do_sample = 1, 0.01, 50.0, False
    own.max_length, own.min_new_tokens, own.suppress_tokens = 7, 5, list(range(2, 60))
    own.no_repeat_ngram_size = 1
    made = trainer(model)
    torch.manual_seed(0)
    rows = made.generate(tensors([[5, 6]] * 12), max_new_tokens=9, return_prompt=False, **extra)
    assert len({tuple(row.tolist()) for row in rows}) == 12
    assert any(token < 60 and token > 1 for row in rows for token in row.tolist())
    assert max(len(row) for row in rows) == 9
    assert model.generation_config is own


def test_generation_keywords_of_transformers_are_honoured() -> None:
    """G-09: its own sampler takes those that ours does not know, one by one."""
    made = trainer()
    rows = made.generate(
        tensors(QUERIES),
        return_prompt=False,
        bad_words_ids=[[i] for i in range(2, 60)],
        max_new_tokens=6,
    )
    assert all(token < 2 or token >= 60 for row in rows for token in row.tolist())
    (row,) = made.generate(tensors([[5, 6]]), max_length=5, eos_token_id=None, use_cache=True)
    assert len(row) == 5
    beams = made.generate(tensors([[5, 6]]), num_beams=2, do_sample=False, max_new_tokens=3)
    assert len(beams[0]) <= 5


def test_stop_strings_end_responses_and_count_as_ends() -> None:
    """G-09, N-13: no penalty for a missing EOS where a stop string was generated."""
    made = trainer(missing_eos_penalty=3.0)
    free = made.generate(
        tensors([[5, 6]]), return_prompt=False, do_sample=False, max_new_tokens=9, eos_token_id=None
    )[0].tolist()
    stop = made.decode(free[3:4])
    end = free.index(free[3]) + 1
    (row,) = made.generate(
        tensors([[5, 6]]),
        return_prompt=False,
        do_sample=False,
        max_new_tokens=9,
        eos_token_id=None,
        stop_strings=[stop],
    )
    assert row.tolist() == free[:end]
    with pytest.warns(RuntimeWarning, match="temperature=0"):
        stats = made.step(tensors([[5, 6]]), [row], [1.0])
    assert stats["ppo/mean_scores"] == pytest.approx(1.0)
    cut = made.step(tensors([[5, 6]]), [torch.tensor([40, 41])], [1.0])
    assert cut["ppo/mean_scores"] == pytest.approx(-2.0)


def test_where_no_stop_condition_is_known_no_response_lacks_one() -> None:
    made = trainer(missing_eos_penalty=3.0)
    query, free = tensors([[5, 6]]), {"return_prompt": False, "max_new_tokens": 3}
    (row,) = made.generate(query, eos_token_id=None, **free)
    stats = made.step(query, [row], [1.0])
    assert (stats["ppo/mean_scores"], stats["tokens/eos_rate"]) == (1.0, 1.0)


def test_a_special_token_stops_a_response_as_any_text_does() -> None:
    """Chat templates end a turn with one, which texts are decoded without."""
    made, how = trainer(), {"do_sample": False, "max_new_tokens": 9, "eos_token_id": None}
    query = tensors([[5, 6]])
    free = made.generate(query, return_prompt=False, **how)[0].tolist()
    end = made.tokenizer.convert_ids_to_tokens(free[3])
    made.tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    assert end not in made.decode(free[:4])
    (row,) = made.generate(query, return_prompt=False, stop_strings=[end], **how)
    assert row.tolist() == free[: free.index(free[3]) + 1]
    assert made.written(row.tolist()).endswith(end)


def test_a_generation_config_says_what_keywords_leave_open() -> None:
    made = trainer()
    said = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=None)
    (row,) = made.generate(tensors([[5, 6]]), return_prompt=False, generation_config=said)
    (same,) = made.generate(
        tensors([[5, 6]]),
        return_prompt=False,
        do_sample=False,
        max_new_tokens=3,
    )
    assert row.tolist() == same.tolist()
    assert made.drawn.temperature == 0.0
    (row,) = made.generate(
        tensors([[5, 6]]), return_prompt=False, generation_config=said, max_new_tokens=1
    )
    assert len(row) == 1
    beams = GenerationConfig(num_beams=2, do_sample=False, max_new_tokens=3)
    assert len(made.generate(tensors([[5, 6]]), generation_config=beams)[0]) <= 5
    made.generate(tensors([[5]]), eos_token_id=torch.tensor([2, 5]), max_new_tokens=2)
    assert made.drawn.eos_ids == (2, 5, EOS)  # where responses of a list are cut


def test_texts_longer_than_a_rotary_model_was_made_for_are_told_of_once_and_trained_on() -> None:
    """As TRL's classic trainer did; the numbers are those of a model made for longer ones."""
    found = []
    for made_for in (64, 12):
        made = trainer(causal_lm("llama", max_position_embeddings=made_for))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(2):
                rows = made.generate(tensors([[5, 6], [7]]), max_new_tokens=11, eos_token_id=None)
                responses = [rows[0][2:], rows[1][1:]]
                stats = made.step(tensors([[5, 6], [7]]), responses, tensors([1.0, -1.0]))
        found.append(([row.tolist() for row in rows], timeless(stats)))
        said = [str(warning.message) for warning in told]
        wanted = "has 13 tokens, and the model was made for 12; training goes on"
        assert len(said) == (0 if made_for == 64 else 1)
        assert all(text.endswith(wanted) for text in said)
    assert found[0] == found[1]


def test_texts_are_not_longer_than_what_a_rotary_embedding_turns_steadily() -> None:
    turned = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    made = trainer(causal_lm("llama", max_position_embeddings=12, rope_parameters=turned))
    with pytest.raises(ValueError, match="has 13 tokens, and the model reads at most 12"):
        made.generate(tensors([[5, 6]]), max_new_tokens=11)


def test_texts_longer_than_the_reference_or_the_critic_reads_are_refused() -> None:
    """T-06."""
    short = {"n_positions": 12}
    arguments = {"queries": tensors([[5] * 9]), "responses": tensors([[6] * 4]), "scores": [1.0]}
    made = trainer(causal_lm("gpt2", n_positions=16), causal_lm("gpt2", seed=1, **short))
    with pytest.raises(ValueError, match="has 13 tokens, and the ref_model reads at most 12"):
        made.step(**arguments)
    made = trainer(causal_lm("gpt2", n_positions=16), critic=classifier("gpt2", **short))
    with pytest.raises(ValueError, match="has 13 tokens, and the critic reads at most 12"):
        made.step(**arguments)


def test_texts_longer_than_the_model_reads_are_refused() -> None:
    """T-06."""
    made = trainer(causal_lm("gpt2", n_positions=16))
    with pytest.raises(ValueError, match=r"queries\[1\] with its max_new_tokens=8 has 17 .* 16"):
        made.generate(tensors([[5], list(range(3, 12))]), max_new_tokens=8)
    with pytest.raises(ValueError, match=r"queries\[0\] with its response has 18 .* at most 16"):
        made.step(tensors([list(range(3, 12))]), tensors([list(range(3, 12))]), [1.0])
    with pytest.raises(ValueError, match="max_new_tokens=0: must be at least 1"):
        made.generate(tensors([[5]]), max_new_tokens=0)
    with pytest.raises(ValueError, match="max_new_tokens=0: must be at least 1"):
        made.generate(tensors([[5], [6]]), length_sampler=iter([3, 0]).__next__)
    assert len(made.generate(tensors([list(range(3, 12))]), max_new_tokens=7)) == 1


def test_a_value_head_learns_again_when_no_critic_stands_in_for_it() -> None:
    made = trainer(critic=Critic(classifier()))
    again = trainer(made.policy)
    before = made.policy.v_head.summary.weight.clone()
    step(again)
    assert not torch.equal(made.policy.v_head.summary.weight, before)


def test_a_merged_adapter_answers_as_it_does_apart_and_is_not_trained() -> None:
    models = [policy(lora=True) for _ in range(2)]
    for model in models:
        train_adapter(model, 1.0)
    made = [trainer(model) for model in models]
    models[1].pretrained_model.merge_adapter()
    queries = tensors(QUERIES)
    apart, merged = (one.generate(queries, max_new_tokens=6) for one in made)
    assert [r.tolist() for r in merged] == [r.tolist() for r in apart]
    with pytest.raises(ValueError, match="merged into its weights"):
        step(made[1])
    with pytest.raises(ValueError, match="merged into its weights"):
        made[1].generate(queries, max_new_tokens=2, generate_ref_response=True)
    models[1].pretrained_model.unmerge_adapter()
    assert step(made[1])["kl"] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("eos", [-1, 100_000])
def test_an_end_that_no_token_is_keeps_no_token_from_being_drawn(eos: int) -> None:
    """TRL's scripts have nothing end a text so; -1 is not the last token of the vocabulary."""
    likely = causal_lm("llama", tie_word_embeddings=False)
    with torch.no_grad():
        likely.lm_head.weight[:-1] = 0.0
    asked = {"return_prompt": False, "min_new_tokens": 3, "max_new_tokens": 3, "do_sample": False}
    said = trainer(likely).generate(tensors([[5], [6, 7]]), eos_token_id=None, **asked)
    assert VOCABULARY - 1 in torch.cat(said)
    found = trainer(likely).generate(tensors([[5], [6, 7]]), eos_token_id=eos, **asked)
    assert [r.tolist() for r in found] == [r.tolist() for r in said]


def test_keywords_hold_for_their_own_call_alone() -> None:
    """N-33: greedy decoding once is not greedy decoding ever after."""
    made = trainer()
    made.generate(tensors([[5]]), do_sample=False, max_new_tokens=2, top_k=3)
    rows = made.generate(tensors([[5]] * 8), return_prompt=False, max_new_tokens=6)
    assert len({tuple(row.tolist()) for row in rows}) > 1
    assert made.drawn.departures == ()
    assert made.sampling.temperature == 1.0


def test_log_probs_follow_the_temperature_of_the_last_generation() -> None:
    """N-04: and the sampling of iterations stays what it was."""
    made = trainer(ppo_epochs=1)
    with torch.no_grad():
        expected = -made.policy.eval().score(ragged(), temperature=0.5).logprobs.sum() / 4
    made.generate(tensors(QUERIES), temperature=0.5)
    assert step(made)["objective/entropy"] == pytest.approx(expected.item(), rel=1e-5)
    assert made.sampling.temperature == 1.0


def test_sampling_is_repeated_by_its_seed_and_differs_from_call_to_call() -> None:
    """C-09."""
    calls = [
        [r.tolist() for r in made.generate(tensors(QUERIES))] for made in (trainer(), trainer())
    ]
    assert calls[0] == calls[1]
    made = trainer()
    assert [r.tolist() for r in made.generate(tensors(QUERIES))] == calls[0]
    assert [r.tolist() for r in made.generate(tensors(QUERIES))] != calls[0]
    split = [r.tolist() for r in trainer().generate(tensors(QUERIES), batch_size=1)]
    assert split == calls[0]


# --- step


def test_responses_from_elsewhere_are_learnt_from() -> None:
    """G-08: however unlikely they are under the policy."""
    made = trainer(policy(seed=7), learning_rate=1e-4)
    unlikely = tensors([[VOCABULARY - 1] * 30, [2]])
    stats = made.step(tensors([[5], [6]]), unlikely, [1.0, 2.0])
    assert stats["ppo/policy/first_minibatch_ratio_error"] < 1e-4
    assert np.isfinite(list(stats.values())).all()


def test_a_mask_of_ones_is_no_mask() -> None:
    """N-26."""
    ones = [torch.ones(len(r), dtype=torch.bool) for r in RESPONSES]
    masked, plain = step(trainer(), response_masks=ones), step(trainer())
    assert timeless(masked) == timeless(plain)


def test_masked_tokens_are_context_and_nothing_else() -> None:
    """N-26, N-27: what stands there is seen, never learnt, and costs no credit."""
    response, mask = [20, 40, 41, 42, 21], torch.tensor([1, 0, 0, 0, 1])
    made = trainer(lam=0.5, gamma=0.9)
    from ppo_lab.classic import check_step
    from ppo_lab.types import Scores

    tokens, scores = check_step(made, tensors([[5]]), tensors([response]), [2.0], [mask])
    rollout = made.collect(tokens)
    batch = made.shape(rollout, Scores(scores)).batch
    assert rollout.logprobs[0, 1:4].tolist() == [0.0] * 3
    unmasked = made.collect(check_step(made, tensors([[5]]), tensors([response]), [2.0], None)[0])
    assert_close(rollout.logprobs[0, [0, 4]], unmasked.logprobs[0, [0, 4]])
    values, beta_kl = rollout.values[0], 0.2 * (rollout.logprobs - rollout.ref_logprobs)[0]
    last = 2.0 - beta_kl[4] - values[4]
    first = -beta_kl[0] + 0.9 * values[4] - values[0] + 0.9 * 0.5 * last
    assert_close(batch.returns[0, [0, 4]], torch.stack([first + values[0], last + values[4]]))


@pytest.mark.parametrize(
    "scores",
    [
        SCORES,
        torch.tensor(SCORES),
        torch.tensor(SCORES)[:, None],
        [torch.tensor([s]) for s in SCORES],
        [np.float32(s) for s in SCORES],
        tuple(SCORES),
        [torch.tensor(s, dtype=torch.bfloat16) for s in SCORES],
    ],
    ids=lambda s: type(s).__name__,
)
def test_scores_are_numbers_or_scalar_tensors_of_any_kind(scores: Any) -> None:
    """L-01: bfloat16 as well."""
    assert step(trainer(), scores=scores)["mean_reward"] == pytest.approx(np.mean(SCORES))


ONE = tensors([[5]])
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "queries no list": ({"queries": torch.tensor([[5]])}, "queries must be a list"),
    "queries empty": ({"queries": [], "responses": [], "scores": []}, "queries is empty"),
    "an empty query": ({"queries": tensors([[5], []])}, r"queries\[1\] is empty"),
    "queries of lists": ({"queries": [[5]]}, r"queries\[0\] must be a 1-D tensor .* not list"),
    "queries of rows": ({"queries": [torch.tensor([[5]])]}, r"queries\[0\] .* not \(1, 1\)"),
    "queries of floats": ({"queries": [torch.tensor([5.0])]}, r"queries\[0\] must hold integers"),
    "an id too large": ({"queries": tensors([[64]])}, r"queries\[0\] holds the token id 64"),
    "an id below zero": ({"responses": tensors([[3, -100]])}, r"responses\[0\] holds .* -100"),
    "responses no list": ({"responses": "w5"}, "responses must be a list"),
    "an empty response": ({"responses": [torch.tensor([]).long()]}, r"responses\[0\] is empty"),
    "too few responses": (
        {"queries": tensors([[5], [6]])},
        "responses has 1 items and queries has 2",
    ),
    "too many scores": ({"scores": [1.0, 2.0]}, "scores has 2 items and queries has 1"),
    "scores no list": ({"scores": 1.0}, "scores must be a list"),
    "scores one scalar": ({"scores": torch.tensor(1.0)}, "scores must be a list"),
    "scores of texts": ({"scores": ["good"]}, r"scores\[0\] must be one number"),
    "scores of None": ({"scores": [None]}, r"scores\[0\] must be one number"),
    "a score a token": ({"scores": [torch.ones(3)]}, r"scores\[0\] must be one number"),
    "a score that is NaN": ({"scores": [float("nan")]}, r"scores\[0\] is nan"),
    "an infinite score": ({"scores": [torch.tensor(torch.inf)]}, r"scores\[0\] is inf"),
    "masks no list": ({"response_masks": torch.ones(1, 2)}, "response_masks must be a list"),
    "masks empty": ({"response_masks": []}, "response_masks has 0 items and queries has 1"),
    "a mask too short": ({"response_masks": [torch.ones(1)]}, r"response_masks\[0\] .* 2 tokens"),
    "a mask of nothing": ({"response_masks": [torch.zeros(2)]}, r"response_masks\[0\] masks every"),
    "too many masks": ({"response_masks": [torch.ones(2)] * 2}, "response_masks has 2 items"),
}


@pytest.mark.parametrize("case", WRONG)
def test_step_names_the_argument_that_is_wrong(case: str) -> None:
    """G-06, T-06, R-03: types, lengths, emptiness, ids out of the vocabulary, vectors of scores."""
    arguments, message = WRONG[case]
    made = trainer()
    before = weights(made.policy)
    good = {"queries": ONE, "responses": tensors([[20, 21]]), "scores": [1.0]}
    with pytest.raises(ValueError, match=message):
        made.step(**good | arguments)
    assert all(torch.equal(p, before[n]) for n, p in weights(made.policy).items())


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("w5", "query_tensor must be a 1-D tensor"),
        (torch.tensor([[5]]), "not a tensor of 2 dimensions"),
        ([], "query_tensor is empty"),
        ([[5]], r"query_tensor\[0\] must be a 1-D tensor"),
        ([torch.tensor([]).long()], r"query_tensor\[0\] is empty"),
        (tensors([[5], [64]]), r"query_tensor\[1\] holds the token id 64; .* has 64"),
        (tensors([[-1]]), r"query_tensor\[0\] holds the token id -1"),
    ],
)
def test_generate_names_the_argument_that_is_wrong(query: Any, message: str) -> None:
    """T-06: an id without a row would be an index error in the midst of sampling."""
    with pytest.raises(ValueError, match=message):
        trainer().generate(query)


# --- the constructor, data, folders


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": {"batch_size": 4}}, "config must be a PPOConfig, not dict"),
        ({"model": None}, "model is missing"),
        ({"model": "gpt2"}, "model must be a causal language model .* not str"),
        ({"ref_model": "gpt2"}, "ref_model must be a causal language model"),
        ({"critic": "gpt2"}, "critic must be a sequence classifier .* not str"),
        ({"tokenizer": None}, "tokenizer must be a transformers tokenizer, not NoneType"),
        ({"model": torch.nn.Linear(2, 2)}, "model must be a causal language model .* not Linear"),
    ],
)
def test_the_constructor_names_the_argument_that_is_wrong(
    arguments: dict[str, Any], message: str
) -> None:
    """A-02, P-09."""
    good = {"config": PPOConfig(), "model": policy(), "tokenizer": tokenizer(), "device": "cpu"}
    with pytest.raises(ValueError, match=message):
        PPOTrainer(**good | arguments)


def test_everything_optional_may_be_left_out() -> None:
    """A-02, T-05: config, reference, data set, collator, optimizer and schedule."""
    made = PPOTrainer(model=causal_lm(), tokenizer=tokenizer(), device="cpu")
    assert step(made)["kl"] == 0.0


def test_the_model_itself_cannot_be_its_own_reference() -> None:
    """A-03: it would be frozen, or move along; nor may they have a single layer in common."""
    model = policy()
    half = policy()
    half.pretrained_model.transformer.h[0] = model.pretrained_model.transformer.h[0]
    for same in (model, model.pretrained_model, half):
        with pytest.raises(ValueError, match="ref_model shares weights with model"):
            trainer(model, same)
    assert step(trainer(model, policy()))["kl"] == 0.0
    assert any(p.requires_grad for p in model.pretrained_model.parameters())


@pytest.mark.parametrize(
    ("keyword", "value"),
    [("temperature", -1.0), ("temperature", float("nan")), ("top_p", 0.0), ("top_p", 1.5)],
)
def test_numbers_that_nothing_can_be_drawn_by_are_refused(keyword: str, value: float) -> None:
    """Of a temperature below 0 the likeliest tokens would be the least likely, in `step` too."""
    made = trainer()
    with pytest.raises(ValueError, match=rf"^{keyword}={value}: must be"):
        made.generate(tensors([[5]]), **{keyword: value})
    assert made.drawn == made.sampling


@pytest.mark.parametrize("wrong", [-1, 64])
def test_generate_refuses_ids_that_the_model_lacks(wrong: int) -> None:
    with pytest.raises(
        ValueError, match=rf"query_tensor\[1\] holds the token id {wrong}; .* has 64"
    ):
        trainer().generate(tensors([[5], [wrong]]))


@pytest.mark.parametrize("pad", [-100, 64])
def test_padding_by_an_id_that_the_model_lacks_changes_nothing(pad: int) -> None:
    found = [
        trainer(seed=1).generate(tensors(QUERIES), max_new_tokens=9, pad_token_id=pad_id)
        for pad_id in (0, pad)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_reference_that_lacks_tokens_of_the_policy_is_refused() -> None:
    """It would be an index error in the first step that samples one of them."""
    with pytest.raises(ValueError, match="ref_model: its head has 60 rows and the policy's 64"):
        trainer(policy(), causal_lm(vocab_size=60))
    assert trainer(policy(), causal_lm(vocab_size=72)).reference.trunk.head.weight.shape[0] == 72
    with pytest.raises(ValueError, match="72 rows and the policy's 64; the exact KL"):
        trainer(policy(), causal_lm(vocab_size=72), kl_penalty="full")


def test_the_collator_that_was_given_is_the_one_used() -> None:
    """T-02."""
    seen = []

    def collate(rows: list[Any]) -> int:
        seen.append(len(rows))
        return len(rows)

    rows = [{"query": f"w{i}", "input_ids": list(range(i))} for i in range(10)]
    made = trainer(dataset=rows, data_collator=collate)
    assert list(made.dataloader) == [4, 4]
    assert seen == [4, 4]


def test_without_a_collator_every_column_is_a_list() -> None:
    """T-02, T-05: ragged columns and texts included, none dropped, in an order by seed."""
    rows = [{"query": f"w{i}", "input_ids": list(range(i))} for i in range(8)]
    one, two, other = (
        [batch["query"] for batch in trainer(dataset=rows, seed=seed).dataloader]
        for seed in (0, 0, 1)
    )
    assert one == two != other
    assert sorted(query for batch in one for query in batch) == sorted(row["query"] for row in rows)
    batch = next(iter(trainer(dataset=rows).dataloader))
    assert [len(ids) for ids in batch["input_ids"]] == [int(q[1:]) for q in batch["query"]]


def test_a_data_set_smaller_than_a_batch_is_refused() -> None:
    """T-04, D-05."""
    with pytest.raises(
        ValueError, match="dataset has 3 rows, fewer than one batch of batch_size=4"
    ):
        trainer(dataset=[{"query": "w5"}] * 3)


def test_a_pad_token_that_the_embedding_lacks_does_no_harm() -> None:
    """T-06, G-02: added to the tokenizer, as old code does, and never to the model."""
    words = tokenizer()
    words.add_special_tokens({"pad_token": "[PAD]"})
    assert words.pad_token_id == VOCABULARY
    made = PPOTrainer(PPOConfig(batch_size=4), policy(), tokenizer=words, device="cpu")
    same = trainer(policy(), ppo_epochs=4, learning_rate=PPOConfig().learning_rate, max_grad_norm=0)
    stats = [timeless(step(t)) for t in (made, same)]
    assert stats[0] == stats[1]
    assert len(made.generate(tensors(QUERIES))) == 4


def test_statistics_go_nowhere_unless_asked() -> None:
    """L-01: `log_stats` without a tracker does nothing."""
    made = trainer()
    stats = step(made)
    made.log_stats(stats, {"query": ["a"], "response": ["b"]}, [torch.tensor(1.0)])
    assert made.logs is None


def test_what_was_saved_is_what_was_trained(tmp_path: Path) -> None:
    """P-02, C-04, A-01."""
    made = trainer()
    step(made)
    made.save_pretrained(str(tmp_path))
    loaded = trainer(AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path)))
    mine, theirs = weights(made.policy), weights(loaded.policy)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert AutoTokenizer.from_pretrained(str(tmp_path)).eos_token_id == EOS


def test_an_optimizer_and_a_schedule_of_ones_own_are_used() -> None:
    model = policy()
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(sgd, step_size=1, gamma=0.1)
    made = trainer(model, optimizer=sgd, lr_scheduler=schedule)
    assert [step(made)["ppo/learning_rate"] for _ in range(2)] == [0.5, pytest.approx(0.05)]


def test_ids_may_be_of_any_type_of_integers() -> None:
    model, made = policy(), []
    for dtype in (torch.long, torch.uint8, torch.int16):
        queries = [torch.tensor([5, 6], dtype=dtype)] * 2
        responses = [torch.tensor([7, 8, 9], dtype=dtype)] * 2
        again = trainer(copy.deepcopy(model))
        made.append(again.step(queries, responses, [torch.tensor(1.0), torch.tensor(0.5)]))
    assert made[0]["ppo/loss/total"] == made[1]["ppo/loss/total"] == made[2]["ppo/loss/total"]


def test_what_no_step_here_could_serve_is_refused_before_one() -> None:
    model = policy()
    with pytest.raises(ValueError, match="optimizer: LBFGS"):
        trainer(model, optimizer=torch.optim.LBFGS(model.parameters()))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(sgd)
    with pytest.raises(ValueError, match="ReduceLROnPlateau"):
        trainer(model, optimizer=sgd, lr_scheduler=plateau)


def test_an_optimizer_may_leave_some_of_the_weights_as_they_are() -> None:
    model = policy()
    some = [p for p in model.parameters() if p.dim() > 1]
    made = trainer(model, optimizer=torch.optim.Adam(some, lr=0.1))
    before = weights(model)
    step(made)
    moved = {n for n, p in weights(model).items() if not torch.equal(p, before[n])}
    assert moved
    assert all(before[name].dim() > 1 for name in moved)


@pytest.mark.parametrize(
    ("ids", "cut"), [([5, 1, 6, 1], [5, 1]), ([1], [1]), ([5, 6], [5, 6])], ids=str
)
def test_what_ends_a_response_is_part_of_it(ids: list[int], cut: list[int]) -> None:
    assert _until(1, torch.tensor(ids)).tolist() == cut


def test_an_optimizer_that_leaves_somebody_as_he_is_is_refused() -> None:
    model = policy()
    early = torch.optim.Adam(model.parameters())
    for part, name in ((model.pretrained_model, "critic"), (model.v_head, "model")):
        with pytest.raises(ValueError, match=f"optimizer holds no parameter of the {name}"):
            trainer(model, optimizer=torch.optim.Adam(part.parameters()))
    model.pretrained_model = get_peft_model(model.pretrained_model, lora_config())
    with pytest.raises(ValueError, match="optimizer holds no parameter of the model"):
        trainer(model, optimizer=early)
    of_adapter = torch.optim.Adam(p for p in model.parameters() if p.requires_grad)
    assert step(trainer(model, optimizer=of_adapter))["kl"] == pytest.approx(0.0, abs=1e-5)
