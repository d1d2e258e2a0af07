"""Models, tokens and trainers small enough to be made anew in every test."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ppo_lab import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from ppo_lab.types import Tokens

VOCABULARY, PAD, EOS = 64, 0, 1
LORA_TARGETS = {"bloom": ["query_key_value"], "gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}
# Ragged on purpose: two queries and two responses of different lengths.
QUERIES = [[5, 6, 7], [8], [9, 10, 11, 12], [13, 14]]
RESPONSES = [[20, 21, 22, EOS], [23, 24], [25, 26, 27, 28, 29], [30, 31, EOS]]
SCORES = [1.0, -0.5, 2.0, 0.25]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: `w0` pads, `w1` ends a text."""
    words = {f"w{i}": i for i in range(VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="w2"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", eos_token="w1")


def causal_lm(kind: str = "bloom", seed: int = 0, **changes: Any) -> Any:
    """Two layers, 16 wide, with random weights large enough that distributions are not flat."""
    special = {"pad_token_id": PAD, "bos_token_id": EOS, "eos_token_id": EOS}
    llama = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    makers = {
        "bloom": (transformers.BloomConfig, {"hidden_size": 16, "n_layer": 2, "n_head": 2}),
        "gpt2": (transformers.GPT2Config, {"n_embd": 16, "n_layer": 2, "n_head": 2}),
        "llama": (transformers.LlamaConfig, {"hidden_size": 16} | llama),
    }
    maker, settings = makers[kind]
    torch.manual_seed(seed)
    config = maker(
        **{"vocab_size": VOCABULARY, "initializer_range": 0.3} | settings | special | changes
    )
    return AutoModelForCausalLM.from_config(config).eval()


def policy(kind: str = "bloom", *, lora: bool = False, seed: int = 0, **changes: Any) -> Any:
    """A policy with a value head, and with a fresh adapter on request."""
    peft_config = lora_config(kind) if lora else None
    torch.manual_seed(seed + 1)
    model = causal_lm(kind, seed, **changes)
    return AutoModelForCausalLMWithValueHead.from_pretrained(model, peft_config=peft_config)


def lora_config(kind: str = "bloom", **changes: Any) -> LoraConfig:
    """A small adapter on the attention."""
    settings: dict[str, Any] = {"r": 4, "target_modules": LORA_TARGETS[kind]}
    settings |= {"fan_in_fan_out": kind == "gpt2", "task_type": "CAUSAL_LM"}
    return LoraConfig(**settings | changes)


def train_adapter(policy: Any, size: float = 0.3) -> None:
    """Give a fresh adapter weights that change the model."""
    torch.manual_seed(9)
    with torch.no_grad():
        for name, parameter in policy.pretrained_model.named_parameters():
            if "lora_B.default" in name:
                parameter.normal_(0.0, size)


def trainer(model: Any = None, ref_model: Any = None, **settings: Any) -> PPOTrainer:
    """A trainer of a tiny policy; keywords that are settings of PPO go to the config."""
    own = {"sampling", "reward", "optimizer", "lr_scheduler", "dataset", "data_collator"}
    own |= {"critic", "processes", "num_shared_layers"}
    extra = {k: settings.pop(k) for k in own & set(settings)}
    config = PPOConfig(**{"learning_rate": 1e-2, "ppo_epochs": 2, "batch_size": 4} | settings)
    model = policy() if model is None else model
    return PPOTrainer(config, model, ref_model, tokenizer(), device="cpu", **extra)


def tensors(rows: list[list[int]]) -> list[Tensor]:
    """Lists of token ids as the classic verbs take them."""
    return [torch.tensor(row) for row in rows]


def step(trainer: PPOTrainer, **changes: Any) -> dict[str, Any]:
    """One classic step on the ragged batch."""
    arguments = {"queries": tensors(QUERIES), "responses": tensors(RESPONSES)}
    return trainer.step(**arguments | {"scores": tensors(SCORES)} | changes)  # type: ignore[arg-type]


def ragged() -> Tokens:
    """The ragged batch as rectangles."""
    ended = [row[-1] == EOS for row in RESPONSES]
    return Tokens.pack(QUERIES, RESPONSES, pad_id=PAD, ended=ended)


def weights(model: Any) -> dict[str, Tensor]:
    """What is trained, as it is now."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def timeless(stats: dict[str, float]) -> dict[str, float]:
    """The statistics that say nothing of this machine."""
    machine = ("time/", "tokens_per_second", "peak_memory", "mfu")
    return {name: value for name, value in stats.items() if not name.startswith(machine)}
