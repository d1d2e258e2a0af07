"""The work that every contestant is given, and the prompts that none of them sees."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Task:
    """A start model, its reward model and prompts (JSON lines with `prompt`), and how much of PPO.

    Full fine-tuning in float32 at a constant learning rate, sampling at temperature 1.
    """

    model: str
    reward_model: str
    prompts: str
    iterations: int = 60
    batch: int = 64
    mini_batch: int = 16
    epochs: int = 4
    new_tokens: int = 48
    learning_rate: float = 1e-4
    held_out: int = 256

    def split(self, folder: Path) -> tuple[Path, Path]:
        """Two files of distinct prompts in `folder`: to train on, and for the judge alone."""
        texts = prompts_in(Path(self.prompts))
        random.Random(0).shuffle(texts)
        parts = {"judged": texts[: self.held_out], "train": texts[self.held_out :]}
        if not parts["train"]:
            raise RuntimeError(
                f"{self.prompts}: {len(texts)} distinct prompts leave none to train on"
            )
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in parts.items():
            lines = "".join(json.dumps({"prompt": text}) + "\n" for text in part)
            (folder / f"{name}.jsonl").write_text(lines)
        return folder / "train.jsonl", folder / "judged.jsonl"

    def spec(self, *, prompts: Path, beta: float, seed: int, threads: int) -> dict[str, Any]:
        """What a worker is told, as JSON's types."""
        settings = asdict(self) | {"prompts": str(prompts)}
        return settings | {"beta": beta, "seed": seed, "threads": threads}

    def named(self) -> dict[str, Any]:
        """The task as a record tells of it: files and folders by their names alone."""
        return {k: Path(v).name if isinstance(v, str) else v for k, v in asdict(self).items()}

    def fingerprint(self) -> str:
        """What tells whether results are of the same work; where the files lie is no part of it."""
        sizes = {k: v for k, v in asdict(self).items() if isinstance(v, int | float)}
        digest = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode())
        for folder in (self.model, self.reward_model):
            digest.update((Path(folder) / "config.json").read_bytes())
            for weights in weights_in(Path(folder)):
                with weights.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        digest.update(Path(self.prompts).read_bytes())
        return digest.hexdigest()[:16]


def weights_in(folder: Path) -> list[Path]:
    """The files of a model's weights, in the order of their names."""
    return sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))


def prompts_in(file: Path) -> list[str]:
    """The distinct prompts of a file of JSON lines, in its order."""
    lines = [line for line in file.read_text().splitlines() if line.strip()]
    return list(dict.fromkeys(json.loads(line)["prompt"] for line in lines))
