"""The work that every trainer is given, and what it costs at least."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """How a family of models spells its sizes, which layers its adapter goes on, and its options.

    `feed_forward` is the width of the feed-forward part as a multiple of the hidden states',
    `gated` whether it has a third matrix.
    """

    hidden: str
    layers: str
    heads: str
    targets: tuple[str, ...]
    options: dict[str, Any]
    inner: str = ""
    feed_forward: float = 4.0
    gated: bool = False


ARCHITECTURES = {
    "bloom": Architecture(
        "hidden_size",
        "n_layer",
        "n_head",
        ("query_key_value",),
        {"hidden_dropout": 0.0, "attention_dropout": 0.0},
    ),
    "gpt2": Architecture(
        "n_embd",
        "n_layer",
        "n_head",
        ("c_attn",),
        {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    ),
    "gpt_neox": Architecture(
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        ("query_key_value",),
        {"hidden_dropout": 0.0, "attention_dropout": 0.0},
        inner="intermediate_size",
    ),
    "llama": Architecture(
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        ("q_proj", "k_proj", "v_proj"),
        {"attention_dropout": 0.0},
        inner="intermediate_size",
        feed_forward=2.75,
        gated=True,
    ),
}


@dataclass(frozen=True)
class Shape:
    """A model of random weights, and one PPO iteration on it."""

    name: str
    hidden_size: int
    n_layer: int
    n_head: int
    vocab_size: int
    batch: int = 16
    mini_batch: int = 4
    epochs: int = 4
    shortest_prompt: int = 16
    longest_prompt: int = 32
    new_tokens: int = 32
    warm_up: int = 1
    measured: int = 1
    architecture: str = "bloom"

    @property
    def family(self) -> Architecture:
        """How its architecture spells what it is."""
        return ARCHITECTURES[self.architecture]

    @property
    def inner_size(self) -> int:
        """The width of the feed-forward part."""
        return int(self.family.feed_forward * self.hidden_size)

    def spec(self, precision: str, *, threads: int, seed: int) -> dict[str, Any]:
        """What a worker is told, as JSON's types."""
        return {
            "model": self.model(),
            "layers_key": self.family.layers,
            "lora": {"r": 16, "lora_alpha": 32, "target_modules": list(self.family.targets)},
            "dtype": {"fp32": "float32", "bf16": "bfloat16"}[precision],
            "prompts": self.prompts(seed),
            "new_tokens": self.new_tokens,
            "mini_batch_size": self.mini_batch,
            "ppo_epochs": self.epochs,
            "warm_up": self.warm_up,
            "measured": self.measured,
            "threads": threads,
            "seed": seed,
        }

    def model(self) -> dict[str, Any]:
        """The keywords of the model's configuration."""
        family = self.family
        sizes = {
            family.hidden: self.hidden_size,
            family.layers: self.n_layer,
            family.heads: self.n_head,
            "vocab_size": self.vocab_size,
        }
        inner = {family.inner: self.inner_size} if family.inner else {}
        return {"model_type": self.architecture, **sizes, **inner, **family.options}

    def prompts(self, seed: int) -> list[list[int]]:
        """Token ids without meaning; the first rows have the longest and the shortest prompt."""
        draw = random.Random(seed)
        lengths = [self.longest_prompt, self.shortest_prompt]
        lengths += [
            draw.randint(self.shortest_prompt, self.longest_prompt) for _ in range(self.batch - 2)
        ]
        return [[draw.randrange(3, self.vocab_size) for _ in range(n)] for n in lengths]

    @property
    def trunk_weights(self) -> int:
        """Weights of the layers' matrices; the adapter's and the norms' are left out."""
        matrices = 3 if self.family.gated else 2
        inner = matrices * self.hidden_size * self.inner_size
        return self.n_layer * (4 * self.hidden_size**2 + inner)

    @property
    def head_weights(self) -> int:
        """Weights of the output head."""
        return self.vocab_size * self.hidden_size


SHAPES = {
    "small": Shape("small", 256, 4, 4, 8192, measured=3),
    "560m": Shape("560m", 1024, 24, 16, 250880, warm_up=0),
    "560m-gpu": Shape(
        "560m-gpu",
        1024,
        24,
        16,
        250880,
        batch=64,
        mini_batch=16,
        shortest_prompt=64,
        longest_prompt=64,
        new_tokens=128,
        warm_up=2,
        measured=5,
    ),
    "tiny": Shape("tiny", 64, 2, 2, 512, batch=8, new_tokens=8),
}
