"""Where responses end: masks, lengths and slices, whatever the end tokens and the batch's parts."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from ppo_lab.models.policy import AutoModelForCausalLMWithValueHead
from ppo_lab.rollout import NoiseKey, Sampling, sample
from ppo_lab.types import Tokens

VOCABULARY = 12
FEW = settings(max_examples=40, deadline=None)


@cache
def policy() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    return AutoModelForCausalLMWithValueHead(LlamaForCausalLM(config)).eval()


QUERIES = st.lists(
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=5), min_size=1, max_size=5
)
SAMPLINGS = st.builds(
    Sampling,
    max_new_tokens=st.integers(1, 7),
    eos_ids=st.sets(st.integers(0, VOCABULARY - 1)).map(tuple),
    pad_id=st.integers(0, VOCABULARY - 1),
    min_new_tokens=st.integers(0, 4),
    batch_size=st.integers(0, 3),
)


@FEW
@given(QUERIES, SAMPLINGS, st.integers(0, 1000))
def test_a_response_ends_with_its_first_end_token_and_nothing_behind_it_counts(
    queries: list[list[int]], sampling: Sampling, seed: int
) -> None:
    if len(sampling.eos_ids) == VOCABULARY and sampling.min_new_tokens:
        return  # no token could be drawn at all
    tokens, seen = sample(policy(), queries, sampling=sampling, noise=NoiseKey(seed, 0))
    for row, query in enumerate(queries):
        length = int(tokens.lengths[row])
        ids = tokens.responses[row, :length].tolist()
        ends = [i for i, token in enumerate(ids) if token in sampling.eos_ids]
        assert ends in ([], [length - 1])
        assert bool(tokens.ended[row]) == bool(ends)
        assert ends or length == sampling.max_new_tokens
        assert not ends or length > min(sampling.min_new_tokens, sampling.max_new_tokens - 1)
        assert tokens.mask[row].tolist() == [i < length for i in range(tokens.mask.shape[1])]
        assert set(tokens.responses[row, length:].tolist()) <= {sampling.pad_id}
        assert tokens.queries[row][tokens.query_mask[row]].tolist() == query
        assert not seen.logprobs[row, length:].any()
        assert not seen.values[row, length:].any()


@FEW
@given(QUERIES, SAMPLINGS, st.integers(0, 1000), st.integers(1, 4))
def test_what_is_drawn_does_not_depend_on_the_parts_of_the_batch(
    queries: list[list[int]], sampling: Sampling, seed: int, part: int
) -> None:
    if len(sampling.eos_ids) == VOCABULARY and sampling.min_new_tokens:
        return
    whole, _ = sample(policy(), queries, sampling=sampling, noise=NoiseKey(seed, 0))
    found = []
    for first in range(0, len(queries), part):
        noise = NoiseKey(seed, 0, first_sample=first)
        tokens, _ = sample(policy(), queries[first : first + part], sampling=sampling, noise=noise)
        found += tokens.response_lists()
    assert found == whole.response_lists()


@FEW
@given(QUERIES, st.data())
def test_packing_and_slicing_lose_nothing(queries: list[list[int]], data: Any) -> None:
    responses = data.draw(
        st.lists(
            st.lists(st.integers(0, 9), min_size=1, max_size=6),
            min_size=len(queries),
            max_size=len(queries),
        )
    )
    tokens = Tokens.pack(queries, responses, pad_id=data.draw(st.integers(0, 9)))
    assert tokens.response_lists() == responses
    rows = data.draw(st.lists(st.integers(0, len(queries) - 1), min_size=1))
    picked = tokens[torch.tensor(rows)]
    assert picked.response_lists() == [responses[row] for row in rows]
    assert int(picked.mask.sum()) == sum(len(responses[row]) for row in rows)


def test_packed_by_hand() -> None:
    masks = [[True, False], []]
    tokens = Tokens.pack([[1], [2, 3]], [[4, 5], []], pad_id=9, masks=masks, ended=[True, False])
    assert tokens.queries.tolist() == [[9, 1], [2, 3]]
    assert tokens.query_mask.tolist() == [[False, True], [True, True]]
    assert tokens.responses.tolist() == [[4, 5], [9, 9]]
    assert tokens.mask.tolist() == [[True, False], [False, False]]
    assert tokens.lengths.tolist() == [2, 0]
    assert tokens.ended.tolist() == [True, False]
    empty = Tokens.pack([[1]], [[]], pad_id=9)
    assert (empty.responses.dtype, empty.mask.dtype) == (torch.long, torch.bool)
