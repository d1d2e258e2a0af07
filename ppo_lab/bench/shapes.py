"""The work that every trainer is given, and what it costs at least."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A BLOOM of random weights, and one PPO iteration on it."""

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

    def spec(self, precision: str, *, threads: int, seed: int) -> dict[str, Any]:
        """What a worker is told, as JSON's types."""
        return {
            "model": {
                "hidden_size": self.hidden_size,
                "n_layer": self.n_layer,
                "n_head": self.n_head,
                "vocab_size": self.vocab_size,
            },
            "lora": {"r": 16, "lora_alpha": 32, "target_modules": ["query_key_value"]},
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
        return 12 * self.n_layer * self.hidden_size**2

    @property
    def head_weights(self) -> int:
        """Weights of the output head."""
        return self.vocab_size * self.hidden_size


SHAPES = {
    "small": Shape("small", 256, 4, 4, 8192, measured=3),
    "560m": Shape("560m", 1024, 24, 16, 250880, warm_up=0),
    "tiny": Shape("tiny", 64, 2, 2, 512, batch=8, new_tokens=8),
}
