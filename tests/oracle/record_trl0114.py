"""Records what TRL 0.11.4's classic PPOTrainer computes, as numbers for tests/test_parity.py.

TRL 0.11.4 needs packages older than this project's, so it runs in an environment of its own:

    python3.11 -m venv trl0114
    trl0114/bin/pip install torch==2.13.0 trl==0.11.4 transformers==4.45.2 peft==0.13.2 \
        accelerate==1.0.1 rich
    HF_HUB_OFFLINE=1 trl0114/bin/python tests/oracle/record_trl0114.py

It writes, beside itself:

    models.safetensors        tiny random policies and references, kept as float16
    steps.json, .safetensors  settings, statistics, numbers by token, moved weights
    core.json, .safetensors   its `compute_rewards`, `compute_advantages` and `loss` on random
                              float64 tensors, gradients included
    saved/                    folders written by its `save_pretrained`

A subclass looks at what TRL's methods are given and return. Two things are not TRL's own: the order
of samples, where two mini-batches are recorded in every order, and `Moments`, without which 0.11.4
crashes on `use_score_scaling`.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

HERE = Path(__file__).resolve().parent
VOCAB, PAD, EOS = 48, 0, 1
CONFIGS = {
    "bloom": {"vocab_size": VOCAB, "hidden_size": 8, "n_layer": 2, "n_head": 2},
    "gpt2": {"vocab_size": VOCAB, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16},
}
SPECIAL = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": EOS}
LORA = {"r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM", "target_modules": ["query_key_value"]}
ADAM_EPS = 1e-3  # so large that a step is a smooth function of the gradient, however small that is

torch.set_num_threads(1)
warnings.simplefilter("ignore")


# ---- models, tokens, scores


def tokenizer(side: str) -> PreTrainedTokenizerFast:
    words = models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t2")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="t0", eos_token="t1", padding_side=side
    )


def bare_model(family: str) -> torch.nn.Module:
    if family == "bloom":
        return BloomForCausalLM(BloomConfig(**CONFIGS[family], **SPECIAL))
    return GPT2LMHeadModel(GPT2Config(**CONFIGS[family], **SPECIAL))


def half_precise(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()


def policy_and_reference(family: str) -> tuple[Any, Any]:
    torch.manual_seed({"bloom": 1, "gpt2": 2}[family])
    policy, reference = (
        AutoModelForCausalLMWithValueHead.from_pretrained(bare_model(family)) for _ in range(2)
    )
    for parameter in policy.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    reference.pretrained_model.load_state_dict(policy.pretrained_model.state_dict())
    for parameter in reference.parameters():
        parameter.data += 0.08 * torch.randn_like(parameter)
    half_precise(policy)
    half_precise(reference)
    return policy, reference.eval()


def with_adapter(policy: Any) -> Any:
    """The policy frozen, under a fresh adapter; the value head stays trained."""
    torch.manual_seed(3)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        policy.pretrained_model, peft_config=LoraConfig(**LORA)
    )
    model.v_head.load_state_dict(policy.v_head.state_dict())
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data = torch.randn_like(parameter).half().float()
    return model


def flat(model: Any) -> dict[str, Tensor]:
    """Every parameter once: under its name in `pretrained_model`, or as `v_head.summary.*`."""
    trunk = dict(model.pretrained_model.named_parameters())
    head = {f"v_head.{name}": value for name, value in model.v_head.named_parameters()}
    return {name: value.detach().clone().contiguous() for name, value in {**trunk, **head}.items()}


def tokens(lengths: list[tuple[int, int]], seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Queries and responses of these lengths; every second response ends with EOS."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(3, VOCAB, (n,), generator=g).tolist()  # noqa: E731
    pairs = [(draw(q), draw(r)) for q, r in lengths]
    responses = [[*r[:-1], EOS] if i % 2 and len(r) > 1 else r for i, (_, r) in enumerate(pairs)]
    return [q for q, _ in pairs], responses


RAGGED = tokens([(2, 6), (5, 3), (3, 1), (4, 5), (1, 4), (3, 6)], seed=3)
EVEN = tokens([(3, 4)] * 6, seed=4)
FOUR = tokens([(3, 3), (2, 3), (4, 3), (1, 3)], seed=5)
ONE = tokens([(4, 5)], seed=6)
SCORES = [
    [1.5, -0.5, 0.25, 2.0, -1.0, 0.75],
    [0.1, 3.0, -2.5, 0.4, 1.2, -0.3],
    [2.0, 2.1, 1.9, 2.2, 1.8, 2.0],
]


# ---- PPOTrainer.step


class Watched(PPOTrainer):
    """PPOTrainer that keeps what its own methods computed in the last step."""

    def compute_rewards(self, scores, logprobs, ref_logprobs, masks):
        out = super().compute_rewards(scores, logprobs, ref_logprobs, masks)
        self.seen = {"mask": masks, "rewards": out[0], "kl": out[2]}
        return out

    def compute_advantages(self, values, rewards, mask):
        out = super().compute_advantages(values, rewards, mask)
        self.seen |= dict(zip(("values", "advantages", "returns"), out, strict=True))
        return out


class Moments:
    """TRL's running moments as tensors: `step` calls `.to` on them, but they are floats."""

    def __init__(self, running: Any) -> None:
        self.running = running

    def update(self, scores: Tensor) -> tuple[float, float]:
        return self.running.update(scores)

    @property
    def mean(self) -> Tensor:
        return torch.tensor(self.running.mean)

    @property
    def std(self) -> Tensor:
        return torch.tensor(self.running.std)


def aligned(x: Tensor, starts: list[int], lengths: list[int]) -> Tensor:
    """Column j is response token j; padding holds zeros."""
    out = torch.zeros(len(lengths), max(lengths), dtype=x.dtype)
    for row, (start, n) in enumerate(zip(starts, lengths, strict=True)):
        out[row, :n] = x[row, start : start + n]
    return out


def first_columns(width: int, queries: list, responses: list, side: str) -> list[int]:
    """Where the logits that predict each response's first token stand in TRL's padded matrices."""
    pads = [
        width - len(q) - len(r) if side == "left" else 0
        for q, r in zip(queries, responses, strict=True)
    ]
    return [pad + len(q) - 1 for pad, q in zip(pads, queries, strict=True)]


def scalar_statistics(stats: dict[str, Any]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        value = np.asarray(value, dtype=np.float64)
        if value.ndim == 0 or value.size == 1:
            number = float(value.reshape(-1)[0])
            return number if math.isfinite(number) else None
        return value.tolist() if value.ndim == 1 and value.size <= 8 else None

    skipped = ("time/", "objective/logprobs", "objective/ref_logprobs", "ppo/policy/advantages_")
    kept = {k: v for k, v in stats.items() if not k.startswith(skipped[:3])}
    kept.pop("ppo/policy/advantages"), kept.pop("ppo/policy/ratio")
    return {name: plain(value) for name, value in kept.items()}


def make_trainer(
    case: dict[str, Any], batch_size: int, order: list[int] | None
) -> tuple[Watched, Any]:
    policy, reference = policy_and_reference(case["family"])
    if case.get("lora"):
        policy, reference = with_adapter(policy), None
    settings = {
        "batch_size": batch_size,
        "mini_batch_size": batch_size,
        "ppo_epochs": 1,
        "adap_kl_ctrl": False,
    }
    config = PPOConfig(**{**settings, "learning_rate": 0.02, **case["config"]})
    adam = torch.optim.Adam(policy.parameters(), lr=config.learning_rate, eps=ADAM_EPS)
    trainer = Watched(config, policy, reference, tokenizer(case["side"]), optimizer=adam)
    trainer.running = Moments(trainer.running)
    if order is not None:
        np.random.permutation = lambda _: np.array(order)
    return trainer, policy


def run_case(
    case: dict[str, Any], order: list[int] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    queries, responses = case["tokens"]
    trainer, policy = make_trainer(case, len(queries), order)
    masks = case.get("response_masks")
    as_tensors = lambda rows: [torch.tensor(row) for row in rows]  # noqa: E731
    steps = []
    for scores in SCORES[: case.get("steps", 1)]:
        arguments = (as_tensors(queries), as_tensors(responses), as_tensors(scores[: len(queries)]))
        stats = trainer.step(*arguments, response_masks=as_tensors(masks) if masks else None)
        steps.append(scalar_statistics(stats))
    lengths = [len(r) for r in responses]
    starts = first_columns(trainer.seen["mask"].shape[1] + 1, queries, responses, case["side"])
    matrices = trainer.seen | {
        k: torch.tensor(stats[f"objective/{k}"]) for k in ("logprobs", "ref_logprobs")
    }
    tensors = {k: aligned(v, starts, lengths).float() for k, v in matrices.items()}
    return {"stats": steps}, tensors | {f"after.{k}": v for k, v in flat(policy).items()}


def case(
    family: str = "bloom", side: str = "left", batch: Any = RAGGED, **extra: Any
) -> dict[str, Any]:
    keys = {key: extra.pop(key) for key in ("steps", "response_masks", "lora") if key in extra}
    return {"family": family, "side": side, "tokens": batch, "config": extra, **keys}


EDGES = [[0] + [1] * 5, [1, 1, 0], [1], [0, 1, 1, 1, 0], [1] * 4, [1] * 6]
HOLES = [[1, 0, 0, 1, 1, 1], [1, 1, 1], [1], [1, 1, 0, 1, 1], [1] * 4, [1] * 6]
CASES = {
    "kl": case(),
    "abs": case(kl_penalty="abs"),
    "mse": case(kl_penalty="mse"),
    "full": case(kl_penalty="full"),
    "gpt2": case("gpt2", "right"),
    "gpt2 full discounted": case(
        "gpt2", "right", kl_penalty="full", gamma=0.9, lam=0.5, init_kl_coef=0.5
    ),
    "right padding": case(side="right"),
    "whitened rewards": case(whiten_rewards=True),
    "whitened rewards even gpt2": case(
        "gpt2", "right", EVEN, whiten_rewards=True, kl_penalty="abs"
    ),
    "whitened rewards right padding": case(side="right", whiten_rewards=True),
    "gamma lam": case(gamma=0.9, lam=0.5),
    "lam 0": case(lam=0.0),
    "lam 1": case(lam=1.0),
    "no penalty": case(init_kl_coef=0.0),
    "score scaling": case(steps=3, use_score_scaling=True),
    "score norm": case(steps=3, use_score_scaling=True, use_score_norm=True),
    "score clip": case(score_clip=0.8),
    "score norm clip": case(
        "gpt2", "right", steps=2, use_score_scaling=True, use_score_norm=True, score_clip=0.9
    ),
    "epochs": case(ppo_epochs=4, learning_rate=0.05),
    "epochs gpt2": case("gpt2", "right", ppo_epochs=4, learning_rate=0.05),
    "epochs narrow": case(
        ppo_epochs=3, learning_rate=0.05, cliprange=0.05, cliprange_value=0.1, vf_coef=0.5
    ),
    "adaptive": case(steps=3, adap_kl_ctrl=True, target=1.0, horizon=50, ppo_epochs=2),
    "accumulation even": case(batch=EVEN, mini_batch_size=3, gradient_accumulation_steps=2),
    "accumulation ragged": case(mini_batch_size=3, gradient_accumulation_steps=2),
    "clipped gradient": case(max_grad_norm=0.05),
    "early stop": case(ppo_epochs=8, learning_rate=0.05, early_stopping=True, target_kl=0.1),
    "masked edges": case(response_masks=EDGES),
    "masked holes": case(response_masks=HOLES),
    "masked holes lam 1": case(response_masks=HOLES, lam=1.0),
    "one sample": case(batch=ONE),
    "lora": case(lora=True, steps=3, ppo_epochs=2, learning_rate=0.05),
    "gpt2 left padding": case("gpt2"),
}
PERMUTED = case(batch=FOUR, mini_batch_size=2, learning_rate=0.05)


def two_halves(n: int) -> list[list[int]]:
    """Each way to cut `n` samples into a first and a second mini-batch."""
    firsts = itertools.combinations(range(n), n // 2)
    return [[*first, *(i for i in range(n) if i not in first)] for first in firsts]


def record_steps() -> None:
    written, tensors = {}, {}
    for name, this in CASES.items():
        numbers, arrays = run_case(this)
        written[name] = this | numbers
        # parameters of both families and of each kind of update; the rest would say nothing new
        kept = ("kl", "gpt2", "epochs", "clipped gradient")
        tensors |= {
            f"{name}/{k}": v
            for k, v in arrays.items()
            if not k.startswith("after.") or name in kept
        }
    genuine = np.random.permutation
    orders = {str(order): run_case(PERMUTED, order)[0]["stats"] for order in two_halves(4)}
    np.random.permutation = genuine
    written["two mini-batches"] = PERMUTED | {"stats_by_order": orders}
    meta = {
        "configs": CONFIGS,
        "special": SPECIAL,
        "lora": LORA,
        "adam_eps": ADAM_EPS,
        "scores": SCORES,
        "cases": written,
    }
    (HERE / "steps.json").write_text(json.dumps(rounded(meta)) + "\n")
    save_file(tensors, HERE / "steps.safetensors")


def rounded(value: Any) -> Any:
    """Eight significant digits, about what float32 has."""
    if isinstance(value, float):
        return float(f"{value:.8g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def record_models() -> None:
    tensors = {}
    for family in CONFIGS:
        for role, model in zip(("policy", "ref"), policy_and_reference(family), strict=True):
            tensors |= {f"{family}/{role}/{k}": v.half() for k, v in flat(model).items()}
    adapter = flat(with_adapter(policy_and_reference("bloom")[0]))
    tensors |= {f"lora/{k}": v.half() for k, v in adapter.items() if "lora_A" in k}
    save_file(tensors, HERE / "models.safetensors")


# ---- its functions alone, in float64


def bare_trainer(**config: Any) -> Watched:
    """A PPOTrainer that has settings and a KL coefficient: all that its mathematics reads."""
    trainer = Watched.__new__(Watched)
    trainer.config = PPOConfig(**config)
    trainer.kl_ctl = SimpleNamespace(value=trainer.config.init_kl_coef)
    return trainer


def core_inputs(side: str, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    lengths = torch.tensor([5, 2, 1, 4])[:, None]
    columns = torch.arange(5)[None]
    mask = columns < lengths if side == "right" else columns >= 5 - lengths
    names = ("logprobs", "ref_logprobs", "values", "new_logprobs", "new_values")
    inputs = {name: normal(4, 5) for name in names} | {"mask": mask.long(), "scores": normal(4)}
    inputs["new_logprobs"] = inputs["logprobs"] + 0.3 * inputs["new_logprobs"]
    inputs["new_values"] = inputs["values"] + 0.3 * inputs["new_values"]
    return inputs | {"logits": normal(4, 5, 6), "ref_logits": normal(4, 5, 6)}


def core_case(
    inputs: dict[str, Tensor], config: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    trainer, mask = bare_trainer(**config), inputs["mask"]
    pair = (inputs["logprobs"], inputs["ref_logprobs"])
    if config["kl_penalty"] == "full":
        pair = (inputs["logits"].log_softmax(-1), inputs["ref_logits"].log_softmax(-1))
    rewards, _, kls = trainer.compute_rewards(inputs["scores"], *pair, mask)
    values, advantages, returns = trainer.compute_advantages(inputs["values"], rewards, mask)
    new_logprobs, new_values = (
        inputs[k].clone().requires_grad_() for k in ("new_logprobs", "new_values")
    )
    loss_p, loss_v, stats = trainer.loss(
        inputs["logprobs"],
        values,
        inputs["logits"],
        new_values,
        new_logprobs,
        mask,
        advantages,
        returns,
    )
    (loss_p + loss_v).backward()
    out = {"kl": kls, "rewards": rewards, "advantages": advantages, "returns": returns}
    out |= {"grad_logprobs": new_logprobs.grad, "grad_values": new_values.grad}
    scalars = {k: float(v) for k, v in stats.items() if v.numel() == 1}
    return {k: (v * mask).contiguous() for k, v in out.items()}, scalars


def record_core() -> None:
    tensors, written = {}, {}
    for side, seed in (("right", 1), ("left", 2)):
        inputs = core_inputs(side, seed)
        tensors |= {f"{side}/{k}": v for k, v in inputs.items()}
        grid = itertools.product(
            ("kl", "abs", "mse", "full"), (False, True), ((1.0, 0.95), (0.9, 0.5))
        )
        for i, (kl_penalty, whiten, (gamma, lam)) in enumerate(grid):
            if whiten and side == "right":
                continue  # TRL lets whitened padding into the advantages before it; see test_parity
            config = {
                "kl_penalty": kl_penalty,
                "whiten_rewards": whiten,
                "gamma": gamma,
                "lam": lam,
            }
            config |= {
                "cliprange": (0.2, 0.1)[i % 2],
                "cliprange_value": (0.2, 0.05)[i % 2],
                "vf_coef": 0.3,
            }
            name = f"{side} {i}"
            arrays, scalars = core_case(inputs, config)
            tensors |= {f"{name}/{k}": v for k, v in arrays.items()}
            written[name] = {"side": side, "config": config, "stats": scalars}
    (HERE / "core.json").write_text(json.dumps(written) + "\n")
    save_file(tensors, HERE / "core.safetensors")


# ---- folders that its save_pretrained writes


def probe(model: Any) -> dict[str, Any]:
    """Log-probs and values of one sequence, to recognise the model by."""
    ids = torch.tensor([RAGGED[0][1] + RAGGED[1][1]])
    with torch.no_grad():
        logits, _, values = model.eval()(ids, attention_mask=torch.ones_like(ids))
    picked = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[0, :, 0]
    return {"ids": ids[0].tolist(), "logprobs": picked.tolist(), "values": values[0].tolist()}


def record_saved() -> None:
    shutil.rmtree(HERE / "saved", ignore_errors=True)
    policy, _ = policy_and_reference("gpt2")
    probes = {"full": probe(policy), "full_bin": probe(policy)}
    (HERE / "saved").mkdir()
    policy.save_pretrained(str(HERE / "saved/full"))
    policy.save_pretrained(str(HERE / "saved/full_bin"), safe_serialization=False)
    lora = LoraConfig(
        r=2, lora_alpha=4, task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True
    )
    peft = AutoModelForCausalLMWithValueHead.from_pretrained(
        str(HERE / "saved/full"), peft_config=lora
    )
    for name, parameter in peft.named_parameters():
        if "lora_" in name or "v_head" in name:
            parameter.data = (parameter.data + 0.3 * torch.randn_like(parameter)).half().float()
    probes["peft"] = probe(peft)
    (HERE / "saved/peft").mkdir()
    peft.save_pretrained(str(HERE / "saved/peft"))
    for file in ("README.md",):
        (HERE / "saved/peft" / file).unlink(missing_ok=True)
    forget_where_the_base_lay(HERE / "saved/peft/adapter_config.json")
    (HERE / "saved/probes.json").write_text(json.dumps(rounded(probes)) + "\n")


def forget_where_the_base_lay(config: Path) -> None:
    written = json.loads(config.read_text())
    written["base_model_name_or_path"] = "full"
    config.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    record_models()
    record_core()
    record_steps()
    record_saved()
