"""The critic: a value head on the policy's trunk, or a model of its own started from a reward
model.
"""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
import transformers
from safetensors.torch import load_file
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
    tokenizer,
    trainer,
    weights,
)
from tiny_runs import fuses, kill, outcome, tiny
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from ppo_lab import AutoModelForCausalLMWithValueHead, experiment
from ppo_lab.assembly import load_critic, ppo_config
from ppo_lab.config import (
    Config,
    ConfigError,
    CriticSection,
    FunctionReward,
    HeadCritic,
    ModelCritic,
    ModelReward,
    ModelSection,
    PPOSection,
)
from ppo_lab.memory import GIB, check_fits
from ppo_lab.models.byte_tokenizer import byte_tokenizer
from ppo_lab.models.critic import Critic, check_shared_vocabulary
from ppo_lab.models.loading import load_tokenizer
from ppo_lab.types import Scores, Tokens

SCORED = Scores(torch.tensor([1.0, -0.5, 2.0, 0.25]))
WIDE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE |= {"intermediate_size": 32, "num_key_value_heads": 2}
KINDS = {
    "bloom": (transformers.BloomConfig, {"hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "gpt2": (transformers.GPT2Config, {"n_embd": 16, "n_layer": 2, "n_head": 2}),
    "llama": (transformers.LlamaConfig, WIDE),
    "qwen2": (transformers.Qwen2Config, WIDE),
    "qwen3": (transformers.Qwen3Config, WIDE),
    "gpt_neox": (transformers.GPTNeoXConfig, WIDE),
}


def classifier(kind: str = "llama", seed: int = 5, labels: int = 1, **changes: Any) -> Any:
    """A sequence classifier with random weights, large enough that scores differ."""
    maker, settings = KINDS[kind]
    special = {"pad_token_id": PAD, "bos_token_id": EOS, "eos_token_id": EOS, "num_labels": labels}
    torch.manual_seed(seed)
    config = maker(
        **{"vocab_size": VOCABULARY, "initializer_range": 0.3} | settings | special | changes
    )
    return AutoModelForSequenceClassification.from_config(config).eval()


def judged(kind: str = "llama", *, policy_settings: Any = None, **settings: Any) -> Any:
    """A trainer with a critic of its own."""
    made = Critic(classifier(kind), scale=settings.pop("scale", 1.0))
    return trainer(policy(kind="gpt2", **(policy_settings or {})), critic=made, **settings)


def scores_of_cut_texts(model: Any) -> list[list[float]]:
    """The classifier's own score of every query with every beginning of its response."""
    with torch.no_grad():
        return [
            [float(model(torch.tensor([q + r[:t]])).logits[0, 0]) for t in range(len(r))]
            for q, r in zip(QUERIES, RESPONSES, strict=True)
        ]


# --- values


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_value_is_the_classifier_s_own_score_of_the_text_before_the_token(kind: str) -> None:
    model = classifier(kind)
    expected = scores_of_cut_texts(model)
    values = Critic(model).values(ragged())
    for row, scores in zip(values, expected, strict=True):
        assert_close(row[: len(scores)], torch.tensor(scores), rtol=1e-4, atol=1e-4)
        assert not row[len(scores) :].any()
    assert len({round(v, 3) for row in expected for v in row}) > 8


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_pads_and_where_changes_no_value(kind: str) -> None:
    critic, tokens = Critic(classifier(kind)), ragged()

    def pad(x: Any, left: int, right: int, value: Any) -> Any:
        return torch.nn.functional.pad(x, (left, right), value=value)

    for dirt in (PAD, EOS, 17):
        padded = replace(
            tokens,
            queries=pad(tokens.queries.masked_fill(~tokens.query_mask, dirt), 3, 0, dirt),
            query_mask=pad(tokens.query_mask, 3, 0, False),
            responses=pad(tokens.responses.masked_fill(~tokens.mask, dirt), 0, 2, dirt),
            mask=pad(tokens.mask, 0, 2, False),
        )
        values = critic.values(padded)
        assert_close(values[:, :-2], critic.values(tokens), rtol=1e-4, atol=1e-5)
        assert not values[:, -2:].any()


@torch.no_grad()
def test_tokens_masked_out_are_read_and_have_no_value() -> None:
    critic = Critic(classifier())
    masks = [[True] * len(r) for r in RESPONSES]
    masks[0][1] = False
    partly = Tokens.pack(QUERIES, RESPONSES, pad_id=PAD, masks=masks)
    expected = critic.values(ragged()).clone()
    expected[0, 1] = 0.0
    assert_close(critic.values(partly), expected)


@torch.no_grad()
def test_a_reward_turned_round_turns_its_critic_round() -> None:
    plain, turned = Critic(classifier()), Critic(classifier(), scale=-2.0)
    assert_close(turned.values(ragged()), -2.0 * plain.values(ragged()))


@torch.no_grad()
def test_of_several_outputs_the_one_that_is_the_score_is_kept(tmp_path: Path) -> None:
    full, model = classifier(labels=3), classifier(labels=3)
    critic = Critic(model, index=2)
    value = critic.values(ragged())[0, 0]
    assert_close(value, full(torch.tensor([QUERIES[0]])).logits[0, 2])
    critic.save_pretrained(tmp_path)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.num_labels == 1


@torch.no_grad()
def test_the_bias_that_is_kept_is_that_of_the_score() -> None:
    model = classifier(labels=3)
    model.score = torch.nn.Linear(16, 3)
    weight, bias = model.score.weight[1].clone(), model.score.bias.copy_(torch.arange(3.0))[1]
    head = Critic(model, index=1).model.score
    assert_close(head.weight[0], weight)
    assert head.bias.tolist() == [bias]


@pytest.mark.parametrize("rows", [258, 259])
def test_a_critic_has_a_row_for_every_token(rows: int) -> None:
    """The byte tokenizer's last token is 258."""
    with nullcontext() if rows == 259 else pytest.raises(ConfigError, match="has 258 rows for 259"):
        check_shared_vocabulary("judge", byte_tokenizer(), byte_tokenizer(), rows)


@torch.no_grad()
def test_a_critic_has_no_dropout_in_either_mode() -> None:
    wild = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    critic = Critic(classifier("gpt2", **wild))
    assert_close(critic.train().values(ragged()), critic.eval().values(ragged()))


def test_what_does_not_read_from_left_to_right_is_no_critic() -> None:
    config = transformers.BertConfig(vocab_size=64, num_labels=1, **WIDE_BERT)
    with pytest.raises(ConfigError, match="BertForSequenceClassification is no decoder"):
        Critic(AutoModelForSequenceClassification.from_config(config))


WIDE_BERT = {k: v for k, v in WIDE.items() if k != "num_key_value_heads"}


# --- learning


def test_gradients_of_values_reach_the_critic_alone() -> None:
    made = judged()
    made.critic.values(ragged()).sum().backward()
    assert all(p.grad is not None for p in made.critic.parameters())
    assert all(p.grad is None for p in made.policy.parameters())
    made.critic.zero_grad()
    made.policy.score(ragged(), temperature=1.0).logprobs.sum().backward()
    assert all(p.grad is None for p in made.critic.parameters())


def test_the_values_of_collection_are_the_critic_s() -> None:
    made = judged(scale=-1.0)
    rollout = made.collect(ragged())
    with torch.no_grad():
        assert_close(rollout.values, made.critic.values(ragged()))
    assert not rollout.values.requires_grad


@pytest.mark.parametrize("lora", [False, True])
def test_policy_and_critic_learn_at_their_own_rates_and_the_value_head_rests(lora: bool) -> None:
    made = judged(policy_settings={"lora": lora}, learning_rate=1e-3, value_learning_rate=1e-2)
    assert [group["lr"] for group in made.optimizer.param_groups] == [1e-3, 1e-2]
    before, judge = weights(made.policy), weights(made.critic)
    step(made)
    moved = {n for n, p in weights(made.policy).items() if not torch.equal(p, before[n])}
    assert moved
    assert not any("v_head" in n for n in before)
    assert all(("lora" in n) == lora for n in moved)
    assert {n for n, p in weights(made.critic).items() if torch.equal(p, judge[n])} == set()
    assert not any("lora" in n for n, _ in made.critic.named_parameters())


def test_a_head_s_step_goes_with_the_width_and_a_model_s_with_the_policy_s(tmp_path: Path) -> None:
    def step_size(critic: CriticSection, width: int, **ppo: float) -> float:
        config = Config(critic=critic, ppo=PPOSection(**ppo))
        return ppo_config(config, width=width).value_learning_rate

    assert step_size(HeadCritic(), 64) == pytest.approx(2 * step_size(HeadCritic(), 128))
    assert step_size(HeadCritic(), 64, learning_rate=1.0) == pytest.approx(0.2 / 64)
    assert step_size(HeadCritic(learning_rate=0.5), 64) == 0.5
    assert step_size(ModelCritic(), 64, learning_rate=1e-3) == 1e-3
    assert step_size(ModelCritic(learning_rate=0.5), 64) == 0.5
    made = experiment.build(tiny(tmp_path), tmp_path / "run").trainer
    assert [group["lr"] for group in made.optimizer.param_groups] == [
        made.config.learning_rate,
        pytest.approx(0.2 / tiny_runs.ARCHITECTURE["hidden_size"]),
    ]


def test_the_loss_in_all_is_the_one_that_is_trained_on() -> None:
    for made, weight in ((judged(vf_coef=0.3), 1.0), (trainer(vf_coef=0.3), 0.3)):
        stats = step(made)
        total = stats["ppo/loss/policy"] + weight * stats["ppo/loss/value"]
        assert stats["ppo/loss/value"] > 0.01
        assert stats["ppo/loss/total"] == pytest.approx(total)


def test_a_critic_apart_has_no_part_in_the_policy_s_step() -> None:
    """Whatever returns it regresses on: neither its gradient nor its norm touches the policy."""
    moved = []
    for shift in (0.0, 50.0):
        made = judged(whiten_advantages=False, max_grad_norm=0.5)
        rollout = made.collect(ragged())
        shaped = made.shape(rollout, SCORED)
        batch = replace(shaped.batch, returns=shaped.batch.returns + shift)
        stats = made.updates.outcome(made.updates.launch(batch, temperature=1.0, seed=(0, 0)))
        moved.append((weights(made.policy), stats.grad_norm, stats.critic_grad_norm))
    (one, norm, critic_norm), (other, same_norm, larger) = moved
    assert all(torch.equal(p, other[n]) for n, p in one.items())
    assert norm == same_norm
    assert larger > 5 * critic_norm


def test_the_size_of_a_pass_changes_nothing_for_a_critic_either() -> None:
    results = []
    for settings in ({}, {"mini_batch_size": 1, "gradient_accumulation_steps": 4}):
        model = policy("gpt2").double()
        critic = Critic(classifier().double())
        parameters = [*model.pretrained_model.parameters(), *critic.parameters()]
        sgd = torch.optim.SGD(parameters, lr=0.05)
        made = trainer(model, critic=critic, optimizer=sgd, **settings)
        made.learn(made.collect(ragged()), SCORED)
        results.append(weights(critic))
    for name, weight in results[0].items():
        assert_close(weight, results[1][name], rtol=1e-6, atol=1e-7)


def test_a_critic_learns_what_is_scored() -> None:
    made = judged(value_learning_rate=1e-2, ppo_epochs=4, learning_rate=1e-6, cliprange_value=0.0)
    errors = [step(made)["ppo/val/error"] for _ in range(12)]
    assert errors[-1] < 0.2 * errors[0]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_a_critic_that_warms_up_leaves_the_policy_as_it_is(apart: bool, lora: bool) -> None:
    settings = {"critic_warmup_steps": 2, "adap_kl_ctrl": True, "horizon": 10}
    made = (
        judged(policy_settings={"lora": lora}, **settings)
        if apart
        else trainer(policy("gpt2", lora=lora), **settings)
    )
    before = weights(made.policy)
    judge = weights(made.critic if apart else made.policy.v_head)
    for _ in range(2):
        stats = step(made)
        assert stats["ppo/policy/ratio"] == stats["ppo/policy/ratio_max"] == 1.0
        assert stats["clip_fraction"] == stats["kl"] == 0.0
    changed = {n for n, p in weights(made.policy).items() if not torch.equal(p, before[n])}
    assert all("v_head" in n for n in changed)
    assert all(
        not torch.equal(p, judge[n])
        for n, p in weights(made.critic if apart else made.policy.v_head).items()
    )
    assert made.kl_controller.value == 0.2
    step(made)
    assert any(
        not torch.equal(p, before[n]) for n, p in weights(made.policy).items() if "v_head" not in n
    )


@pytest.mark.parametrize("apart", [False, True])
def test_a_critic_that_warms_up_makes_no_pass_from_which_nobody_learns(apart: bool) -> None:
    settings = {"critic_warmup_steps": 1, "critic_epochs": 2, "mini_batch_size": 2}

    def warmed(epochs: int) -> tuple[Any, dict[str, float]]:
        config = {**settings, "ppo_epochs": epochs}
        made = judged(**config) if apart else trainer(policy("gpt2"), **config)
        return made, timeless(step(made))

    (several, stats), (two, wanted) = warmed(4), warmed(2)
    assert stats == wanted
    judges = [weights(made.critic if apart else made.policy) for made in (several, two)]
    assert all(torch.equal(p, judges[1][n]) for n, p in judges[0].items())
    assert step(several)["ppo/policy/ratio_max"] > 1.0


@pytest.mark.parametrize("apart", [False, True])
def test_a_critic_may_learn_from_the_first_passes_alone(apart: bool) -> None:
    """It is then where one epoch takes it, while the policy goes on; so are its statistics."""

    def learned(**settings: Any) -> tuple[Any, dict[str, float]]:
        settings = {"mini_batch_size": 2, **settings}
        made = judged(**settings) if apart else trainer(policy("gpt2"), **settings)
        stats = step(made)
        return made, stats

    one, first = learned(ppo_epochs=1)
    several, later = learned(ppo_epochs=3, critic_epochs=1)
    always, _ = learned(ppo_epochs=3)

    def judge(made: Any) -> dict[str, Any]:
        return weights(made.critic if apart else made.policy.v_head)

    assert all(torch.equal(p, judge(several)[n]) for n, p in judge(one).items())
    assert any(not torch.equal(p, judge(always)[n]) for n, p in judge(one).items())
    assert any(
        not torch.equal(p, weights(several.policy)[n]) for n, p in weights(one.policy).items()
    )
    for name in ("ppo/val/error", "ppo/val/vpred", "ppo/loss/value", "ppo/val/clipfrac"):
        assert first[name] == later[name]
    assert first["ppo/loss/policy"] != later["ppo/loss/policy"]


def test_memory_that_runs_out_in_the_critic_halves_the_passes() -> None:
    made, expected = judged(mini_batch_size=2), judged().collect(ragged()).values
    whole, made.updates.passes.most = made.critic.values, 4

    def small(tokens: Tokens) -> Any:
        if len(tokens) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(tokens)

    made.critic.values = small
    rollout = made.collect(ragged())
    assert_close(rollout.values, expected)
    assert made.updates.passes.most == 1
    made.updates.passes.most = 4
    assert made.learn(rollout, SCORED)["ppo/skipped_updates"] == 0
    assert made.updates.passes.most == 1


def test_gradient_checkpointing_reaches_the_critic() -> None:
    plain, thrifty = judged(), judged(gradient_checkpointing=True)
    block, calls = thrifty.critic.trunk.decoder.layers[0], Counter()
    block.self_attn.register_forward_pre_hook(lambda *_: calls.update(["passes"]))
    assert timeless(step(plain)) == pytest.approx(timeless(step(thrifty)), abs=1e-4)
    assert calls["passes"] == 1 + 2 * 2  # collected once, two epochs of a pass and its repetition


# --- state


def test_a_trainer_goes_on_exactly_with_its_critic() -> None:
    made = judged(critic_warmup_steps=1)
    for _ in range(2):
        step(made)
    state = copy.deepcopy(made.state_dict())
    other = judged(critic_warmup_steps=1)
    other.load_state_dict(state)
    assert timeless(step(other)) == timeless(step(made))
    assert all(torch.equal(p, weights(made.critic)[n]) for n, p in weights(other.critic).items())
    with pytest.raises(KeyError):
        other.load_state_dict({**state, "critic": {}})


@torch.no_grad()
def test_a_saved_critic_loads_again_as_a_classifier_and_as_a_critic(tmp_path: Path) -> None:
    """C-06."""
    made = judged(scale=-1.0)
    with torch.enable_grad():
        step(made)
    made.save_pretrained(str(tmp_path))
    assert not (tmp_path / "value_head.safetensors").exists()
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic")
    assert_close(
        again(torch.tensor([QUERIES[0]])).logits[0, 0], -made.critic.values(ragged())[0, 0]
    )
    values = Critic(again, scale=-1.0).values(ragged())
    assert_close(values, made.critic.values(ragged()))
    kept = transformers.AutoTokenizer.from_pretrained(tmp_path / "critic")
    assert kept.get_vocab() == tokenizer().get_vocab()


# --- what is refused


def test_an_optimizer_without_the_critic_is_refused() -> None:
    model = policy()
    alone = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="no parameter of the critic"):
        trainer(model, critic=classifier(), optimizer=alone)


def test_a_policy_whose_embedding_is_adapted_may_have_a_critic() -> None:
    """PEFT's wrapper of an embedding has no num_embeddings."""
    peft_config = lora_config("llama", trainable_token_indices=[5, 6])
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        causal_lm("llama"), peft_config=peft_config
    )
    assert step(trainer(model, critic=classifier()))["objective/kl"] == pytest.approx(0, abs=1e-5)


def test_a_critic_of_fewer_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"63 rows and the policy's 64, .* may sample"):
        trainer(policy(), critic=classifier(vocab_size=63))
    with pytest.raises(ValueError, match="critic must be a sequence classifier"):
        trainer(policy(), critic="reward")


# --- whole runs


def judge_folder(folder: Path, **changes: Any) -> Path:
    """A classifier of the tiny runs' architecture, with their tokenizer."""
    architecture = {**tiny_runs.ARCHITECTURE, "pad_token_id": 0, "num_labels": 1} | changes
    kind = architecture.pop("model_type")
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(kind, **architecture)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_run_with_a_critic_killed_and_resumed_ends_with_the_same_numbers(tmp_path: Path) -> None:
    critic = ModelCritic(path=str(judge_folder(tmp_path / "judge")), warmup_steps=1)
    config = tiny(tmp_path, critic=replace(critic, learning_rate=1e-3), seed=7)
    fuses.clear()
    experiment.run(config, tmp_path / "whole")
    fuses.update({7: kill})
    with pytest.raises(tiny_runs.Killed):
        experiment.run(config, tmp_path / "killed")
    fuses.clear()
    resumed = replace(config, resume=str(tmp_path / "killed"))
    experiment.run(resumed, tmp_path / "killed")
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "killed")
    one, other = (
        load_file(tmp_path / run / "model" / "critic" / "model.safetensors")
        for run in ("whole", "killed")
    )
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())
    first = load_file(tmp_path / "judge" / "model.safetensors")
    assert any(not torch.equal(weight, first[name]) for name, weight in one.items())


def test_a_critic_starts_from_the_reward_s_own_model_and_weight(tmp_path: Path) -> None:
    path = str(judge_folder(tmp_path / "judge", num_labels=2))
    reward = ModelReward(path=path, label="1", weight=-0.5)
    config = tiny(tmp_path, reward=reward, critic=ModelCritic())
    made = load_critic(config, load_tokenizer(config.model), "cpu")
    assert made is not None
    assert made.scale == -0.5
    full = AutoModelForSequenceClassification.from_pretrained(path)
    assert torch.equal(made.model.score.weight, full.score.weight[1:])
    assert load_critic(tiny(tmp_path), load_tokenizer(config.model), "cpu") is None


def test_a_critic_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = judge_folder(tmp_path / "judge")
    tokenizer().save_pretrained(folder)
    config = tiny(tmp_path, critic=ModelCritic(path=str(folder)))
    with pytest.raises(ConfigError, match=r"critic\.path=.*tokens are others in its tokenizer"):
        load_critic(config, load_tokenizer(config.model), "cpu")


def test_a_critic_that_memory_cannot_hold_is_refused_with_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = judge_folder(tmp_path / "judge")
    config = tiny(tmp_path, critic=ModelCritic(path=str(folder)))
    check_fits(config, "cpu")
    size = transformers.AutoConfig.from_pretrained(folder)
    size.update({"hidden_size": 8192, "intermediate_size": 65536, "num_hidden_layers": 400})
    size.save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"critic \d.*critic=head"):
        check_fits(config, "cpu")
    assert GIB == 2**30


def test_a_function_s_critic_is_named_by_its_path(tmp_path: Path) -> None:
    config = tiny(tmp_path, critic=ModelCritic(path=str(judge_folder(tmp_path / "judge"))))
    assert isinstance(config.reward, FunctionReward)
    assert isinstance(config.model, ModelSection)
    assert load_critic(config, load_tokenizer(config.model), "cpu").scale == 1.0  # type: ignore[union-attr]
