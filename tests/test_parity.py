"""TRL 0.11.4's classic PPOTrainer as an oracle: its recorded numbers, and what differs on purpose.

The numbers in tests/oracle were recorded by `record_trl0114.py` from TRL's own functions. The first
half compares `core` with them in float64 (to 1e-6: TRL takes n / (n - 1) in float32), the second
half `PPOTrainer.step` in float32.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import timeless
from torch import Tensor
from torch.testing import assert_close

from ppo_lab import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, core
from ppo_lab.classic import check_step
from ppo_lab.types import Scores

ORACLE = Path(__file__).parent / "oracle"
CORE = json.loads((ORACLE / "core.json").read_text())
CORE_TENSORS = load_file(ORACLE / "core.safetensors")
STEPS = json.loads((ORACLE / "steps.json").read_text())
STEP_TENSORS = load_file(ORACLE / "steps.safetensors")
WEIGHTS = load_file(ORACLE / "models.safetensors")
CASES: dict[str, dict[str, Any]] = STEPS["cases"]
TWO_MINI_BATCHES = CASES.pop("two mini-batches")

RELATIVE, ABSOLUTE = 1e-4, 2e-6

# Classic statistics that are not among ours, or mean something else, in every run.
NOT_OURS = {
    "objective/kl_dist": "a vector a step; `objective/kl` is its mean, and only numbers are logged",
    "tokens/queries_dist": "a vector a step; its mean is logged",
    "tokens/queries_len_std": "says nothing of training; the mean is logged",
    "tokens/responses_dist": "a vector a step; its mean and deviation are logged",
}

# Classic statistics that differ in some cases: name of the case -> (statistics, reason).
LATER = {"ppo/policy/entropy"}
AVERAGED = {"ppo/returns/var", "ppo/val/var", "ppo/val/var_explained"}
WHITENED_PADDING = {"ppo/loss/value", "ppo/returns/mean", "ppo/returns/var"}
INTENDED: dict[str, tuple[set[str], str]] = {
    "epochs": (LATER, "the entropy is that of the policy that sampled, TRL's that of every pass"),
    "epochs gpt2": (LATER, "as above"),
    "epochs narrow": (LATER, "as above"),
    "adaptive": (LATER, "as above"),
    "early stop": (LATER, "as above"),
    "lora": (LATER, "as above"),
    "accumulation even": (
        AVERAGED,
        "variances are those of the whole batch, TRL's the mean over mini-batches",
    ),
    "one sample": (
        {"ppo/std_scores", "tokens/responses_len_std"},
        "the deviation of one number is 0 here, NaN in TRL",
    ),
}

# Cases in which training itself differs: name -> reason. Elsewhere even the moved parameters agree.
OTHERWISE = {
    "whitened rewards right padding": "TRL whitens padding too, (0 - mean) / std, and GAE carries "
    "what then stands after a response back into it; here padding never enters (N-16)",
    "accumulation ragged": "the loss is the mean over the tokens of the optimizer batch, TRL's the "
    "mean of its mini-batches' means (N-20)",
    "gpt2 left padding": "positions count real tokens, TRL's the padding before them too (N-06)",
    "masked holes": "GAE passes over masked tokens, TRL's takes them for states of value 0 (N-27)",
}


# --- core against TRL's functions


def core_case(name: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Settings and statistics, inputs, and what TRL computed from them."""
    case = CORE[name]
    inputs = {
        k.split("/")[1]: v for k, v in CORE_TENSORS.items() if k.startswith(case["side"] + "/")
    }
    outputs = {k.split("/")[1]: v for k, v in CORE_TENSORS.items() if k.startswith(name + "/")}
    return case, inputs, outputs


@pytest.mark.parametrize("name", CORE)
def test_core_agrees_with_the_functions_of_trl_gradients_included(name: str) -> None:
    case, x, expected = core_case(name)
    c, mask = case["config"], x["mask"].bool()
    kl = core.kl_estimate(
        x["logprobs"],
        x["ref_logprobs"],
        mask,
        kl_penalty=c["kl_penalty"],
        full_kl=core.full_kl(x["logits"], x["ref_logits"]),
    )
    rewards = core.shape_rewards(x["scores"], kl, mask, kl_coef=0.2)
    shaped = core.whiten(rewards, mask, shift_mean=False) if c["whiten_rewards"] else rewards
    raw, returns = core.gae(shaped, x["values"], mask, gamma=c["gamma"], lam=c["lam"])
    advantages = core.whiten(raw, mask)
    got = {"kl": kl, "rewards": rewards, "advantages": advantages, "returns": returns}
    for key, value in got.items():
        assert_close(
            value, expected[key], rtol=1e-6, atol=1e-7, msg=lambda m, key=key: f"{key}: {m}"
        )

    new_logprobs, new_values = (
        x[k].clone().requires_grad_() for k in ("new_logprobs", "new_values")
    )
    policy = core.policy_loss(
        new_logprobs, x["logprobs"], advantages, mask, cliprange=c["cliprange"]
    )
    value = core.value_loss(
        new_values, x["values"], returns, mask, cliprange_value=c["cliprange_value"]
    )
    policy_mean, value_mean = (
        core.masked_mean(policy.loss, mask),
        core.masked_mean(value.loss, mask),
    )
    (policy_mean + c["vf_coef"] * value_mean).backward()
    assert_close(new_logprobs.grad, expected["grad_logprobs"], rtol=1e-6, atol=1e-7)
    assert_close(new_values.grad, expected["grad_values"], rtol=1e-6, atol=1e-7)

    clipped = policy.clipped_low | policy.clipped_high
    numbers = {
        "loss/policy": policy_mean,
        "loss/value": value_mean,
        "policy/clipfrac": core.masked_mean(clipped.double(), mask),
        "policy/advantages_mean": core.masked_mean(advantages, mask),
        "returns/mean": core.masked_mean(returns, mask),
        "returns/var": core.masked_var(returns, mask),
        "val/clipfrac": core.masked_mean(value.clipped.double(), mask),
        "val/mean": core.masked_mean(x["values"], mask),
        "val/var": core.masked_var(x["values"], mask),
    }
    for key, number in numbers.items():
        assert number.item() == pytest.approx(case["stats"][key], rel=1e-6, abs=1e-7), key


def test_the_recorded_functions_clip_policy_and_value_somewhere() -> None:
    """Else the comparison above would say little about clipping."""
    for key in ("policy/clipfrac", "val/clipfrac"):
        assert any(case["stats"][key] > 0 for case in CORE.values())
        assert any(case["stats"][key] < 1 for case in CORE.values())


# --- PPOTrainer.step against TRL's


def tiny_tokenizer(side: str) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({f"t{i}": i for i in range(48)}, unk_token="t2")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="t0", eos_token="t1", padding_side=side
    )


def model_with_recorded_weights(family: str, role: str) -> AutoModelForCausalLMWithValueHead:
    from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

    settings = STEPS["configs"][family] | STEPS["special"]
    config, kind = {
        "bloom": (BloomConfig, BloomForCausalLM),
        "gpt2": (GPT2Config, GPT2LMHeadModel),
    }[family]
    model = AutoModelForCausalLMWithValueHead.from_pretrained(kind(config(**settings)))
    weights = recorded(WEIGHTS, f"{family}/{role}/")
    parameters = flat_parameters(model)
    assert parameters.keys() == weights.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    return model


def with_recorded_adapter(
    policy: AutoModelForCausalLMWithValueHead,
) -> AutoModelForCausalLMWithValueHead:
    from peft import LoraConfig

    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        policy.pretrained_model, peft_config=LoraConfig(**STEPS["lora"])
    )
    model.v_head.load_state_dict(policy.v_head.state_dict())
    parameters = flat_parameters(model)
    with torch.no_grad():
        for name, weights in recorded(WEIGHTS, "lora/").items():
            parameters[name].copy_(weights)
    return model


def flat_parameters(model: AutoModelForCausalLMWithValueHead) -> dict[str, Tensor]:
    head = {f"v_head.{name}": p for name, p in model.v_head.named_parameters()}
    return {**dict(model.pretrained_model.named_parameters()), **head}


def recorded(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def our_settings(case: dict[str, Any]) -> PPOConfig:
    """The case's TRL settings under our names; gradients are clipped only where TRL's were."""
    base = {
        "batch_size": len(case["tokens"][0]),
        "ppo_epochs": 1,
        "learning_rate": 0.02,
        "max_grad_norm": 0.0,
        "adam_eps": STEPS["adam_eps"],
    }
    return PPOConfig(**{**base, **case["config"]})


def our_trainer(case: dict[str, Any], **changes: Any) -> PPOTrainer:
    config = our_settings(case | {"config": case["config"] | changes})
    policy, ref = (model_with_recorded_weights(case["family"], r) for r in ("policy", "ref"))
    if case.get("lora"):
        policy, ref = with_recorded_adapter(policy), None
    return PPOTrainer(config, policy, ref, tokenizer=tiny_tokenizer(case["side"]), device="cpu")


def take_steps(trainer: PPOTrainer, case: dict[str, Any]) -> list[dict[str, Any]]:
    """The statistics of each recorded step of the case, by our trainer."""
    queries, responses = ([torch.tensor(row) for row in rows] for rows in case["tokens"])
    masks = case.get("response_masks")
    arguments = {"response_masks": [torch.tensor(m) for m in masks]} if masks else {}
    n = case.get("steps", 1)
    return [
        trainer.step(
            queries, responses, [torch.tensor(s) for s in row[: len(queries)]], **arguments
        )
        for row in STEPS["scores"][:n]
    ]


def differing(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The statistics that are missing or further apart than 1e-4 relative."""
    return {
        key: (ours.get(key), number)
        for key, number in theirs.items()
        if key not in NOT_OURS and not close(ours.get(key), number)
    }


def close(ours: Any, theirs: Any) -> bool:
    if ours is None or theirs is None:
        return False
    return math.isclose(ours, theirs, rel_tol=RELATIVE, abs_tol=ABSOLUTE)


@pytest.mark.parametrize("name", [name for name in CASES if name not in OTHERWISE])
def test_statistics_agree_with_trl(name: str) -> None:
    case = CASES[name]
    allowed, _ = INTENDED.get(name, (set(), ""))
    for ours, theirs in zip(take_steps(our_trainer(case), case), case["stats"], strict=True):
        apart = differing(ours, theirs)
        assert apart.keys() <= allowed, {k: v for k, v in apart.items() if k not in allowed}


@pytest.mark.parametrize("name", [name for name in INTENDED if name in CASES])
def test_every_intended_difference_is_one(name: str) -> None:
    """A difference that has gone is to be struck off the list."""
    case = CASES[name]
    ours = take_steps(our_trainer(case), case)
    found = [
        differing(mine, theirs).keys() for mine, theirs in zip(ours, case["stats"], strict=True)
    ]
    assert set().union(*found) == INTENDED[name][0]


@pytest.mark.parametrize("name", OTHERWISE)
def test_training_differs_from_trl_where_trl_is_wrong(name: str) -> None:
    case = CASES[name]
    ours = take_steps(our_trainer(case), case)[0]
    apart = differing(ours, case["stats"][0])
    assert apart.keys() & {"ppo/loss/policy", "ppo/loss/value"}
    collected = {"objective/kl", "objective/entropy", "ppo/mean_scores", "ppo/val/mean"}
    same_until_learning = name not in ("accumulation ragged", "gpt2 left padding")
    assert bool(apart.keys() & collected) != same_until_learning


@pytest.mark.parametrize("name", sorted({k.split("/")[0] for k in STEP_TENSORS if "/after." in k}))
def test_parameters_after_a_step_agree_with_trl(name: str) -> None:
    """And so do the gradients: with Adam's epsilon at 1e-3 a step is a smooth function of them."""
    case = CASES[name]
    trainer = our_trainer(case)
    before = {k: v.detach().clone() for k, v in flat_parameters(trainer.model).items()}
    take_steps(trainer, case)
    after, expected = flat_parameters(trainer.model), recorded(STEP_TENSORS, f"{name}/after.")
    assert after.keys() == expected.keys()
    for key, value in expected.items():
        moved, theirs = after[key].detach() - before[key], value - before[key]
        assert_close(moved, theirs, rtol=2e-3, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize(
    "name", [n for n in CASES if n not in OTHERWISE and "steps" not in CASES[n]]
)
def test_every_token_gets_the_numbers_that_trl_gave_it(name: str) -> None:
    """Log-probs, values, KL, advantages and returns, before anything is averaged."""
    case = CASES[name]
    trainer = our_trainer(case)
    queries, responses = ([torch.tensor(row) for row in rows] for rows in case["tokens"])
    masks = case.get("response_masks")
    tokens, scores = check_step(
        trainer,
        queries,
        responses,
        STEPS["scores"][0][: len(queries)],
        [torch.tensor(m) for m in masks] if masks else None,
    )
    rollout = trainer.collect(tokens)
    shaped = trainer.shape(rollout, Scores(scores))
    got = {
        "mask": tokens.mask.float(),
        "logprobs": rollout.logprobs,
        "ref_logprobs": rollout.ref_logprobs,
        "values": rollout.values,
        "kl": shaped.penalty_kl,
        "advantages": shaped.batch.advantages,
        "returns": shaped.batch.returns,
    }
    for key, value in got.items():
        theirs = STEP_TENSORS[f"{name}/{key}"].masked_fill(~tokens.mask, 0.0)
        assert_close(value, theirs, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


def test_two_mini_batches_give_what_trl_gives_for_some_order_of_the_samples() -> None:
    """TRL was recorded for every way to cut four samples in two; ours draws one of them."""
    averaged = AVERAGED | LATER
    for seed in range(3):
        ours = take_steps(our_trainer(TWO_MINI_BATCHES, seed=seed), TWO_MINI_BATCHES)[0]
        apart = {
            order: differing(ours, stats[0]).keys() - averaged
            for order, stats in TWO_MINI_BATCHES["stats_by_order"].items()
        }
        assert sum(not keys for keys in apart.values()) == 1, apart


def test_the_padding_side_of_the_tokenizer_changes_nothing() -> None:
    """N-06, N-24."""
    left, right = (
        take_steps(our_trainer(CASES["gpt2"] | {"side": s}), CASES["gpt2"])[0]
        for s in ("left", "right")
    )
    for key, number in timeless(left).items():
        assert right[key] == pytest.approx(number, rel=1e-5, abs=1e-6), key


# --- folders that TRL wrote

PROBES = json.loads((ORACLE / "saved" / "probes.json").read_text())


@pytest.mark.parametrize("kind", PROBES)
def test_folders_written_by_trl_load_with_their_value_head(kind: str, tmp_path: Path) -> None:
    """P-02: weights in safetensors, in a .bin, and an adapter with its value head beside it."""
    shutil.copytree(ORACLE / "saved", tmp_path / "saved")
    if kind == "peft":
        point_to_base(
            tmp_path / "saved" / "peft" / "adapter_config.json", tmp_path / "saved" / "full"
        )
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "saved" / kind).eval()
    ids = torch.tensor([PROBES[kind]["ids"]])
    with torch.no_grad():
        logits, _, values = model(ids)
    logprobs = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    assert_close(logprobs, torch.tensor(PROBES[kind]["logprobs"]), rtol=1e-4, atol=1e-5)
    assert_close(values[0], torch.tensor(PROBES[kind]["values"]), rtol=1e-4, atol=1e-5)


def point_to_base(config: Path, base: Path) -> None:
    written = json.loads(config.read_text()) | {"base_model_name_or_path": str(base)}
    config.write_text(json.dumps(written))
