"""From the grammar to tokenizer, SFT policy and reward model, by the same stages as anybody's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ppo_lab.embedded.cache import built, cache_folder, fingerprint
from ppo_lab.embedded.corpus import preference_rows, sft_rows
from ppo_lab.errors import ConfigError
from ppo_lab.on_disk import unwritable
from ppo_lab.processes import launch
from ppo_lab.record import brief
from ppo_lab.stages.config import FitSection

ELSEWHERE = "the embedded models are kept in PPO_LAB_CACHE=FOLDER, any with 10 MB of room"
PACKAGES = ("torch", "transformers", "trl", "tokenizers", "datasets")


@dataclass(frozen=True)
class Recipe:
    """Sizes and settings of the embedded models."""

    seed: int = 0
    vocab_size: int = 1024
    hidden_size: int = 128
    n_layer: int = 2
    n_head: int = 4
    initializer_range: float = 0.06
    sft_examples: int = 9_000
    pairs: int = 4_000
    held_out: int = 400
    sft: FitSection = field(
        default_factory=lambda: FitSection(
            epochs=2, batch_size=24, learning_rate=6e-3, lr_schedule="cosine", max_length=128
        )
    )
    reward: FitSection = field(
        default_factory=lambda: FitSection(
            epochs=1, batch_size=16, learning_rate=1e-3, lr_schedule="cosine", max_length=128
        )
    )


def folder_of_this_version() -> Path:
    """Where the models of exactly these sources and library versions lie, or will."""
    package = Path(__file__).resolve().parent
    home, stages = package.parent, package.parent / "stages"
    sources = [
        *package.glob("*.py"),
        *(stages / f"{n}.py" for n in ("sft", "reward_model", "fitting", "config")),
        *(home / f"{n}.py" for n in ("optim", "trl_parts")),
    ]
    return cache_folder() / f"embedded-{fingerprint(sources, packages=PACKAGES)}"


def ensure(*, rebuild: bool = False) -> Path:
    """The folder with `policy`, `reward` and `report.json`, built when it is not there.

    Raises:
        ConfigError: there is no writing where it is to be kept, or no room.
    """
    folder = folder_of_this_version()
    if rebuild or not folder.is_dir():
        _check_writable(folder.parent)
    if launch.is_launched() and not folder.is_dir():
        _build_apart()
    if rebuild or not folder.is_dir():
        say(f"Building the embedded help desk, about a minute, once: {folder}")
    try:
        return built(folder, build, anew=rebuild)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{folder}: could not be built ({brief(error)}); {ELSEWHERE}") from error


def _check_writable(place: Path) -> None:
    if found := list(unwritable("PPO_LAB_CACHE", str(place))):
        raise ConfigError([f"{problem}; {ELSEWHERE}" for problem in found])


def _build_apart() -> None:
    """Build in a process that is not one of several, which TRL's trainers would take it for."""
    told = None if launch.is_first_here() else subprocess.DEVNULL
    command = [sys.executable, "-m", "ppo_lab.embedded"]
    subprocess.run(  # noqa: S603
        command,
        env=launch.as_if_alone(os.environ),
        stdout=subprocess.DEVNULL,
        stderr=told,
        check=True,
    )


def say(line: str) -> None:
    """One line for the person who waits."""
    print(line, file=sys.stderr, flush=True)


def build(folder: Path, recipe: Recipe | None = None) -> dict[str, Any]:
    """Train both models into `folder` by the recipe; what came out, in numbers."""
    import torch

    recipe = recipe or Recipe()
    begun = time.perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        report: dict[str, Any] = {"policy": _build_policy(folder / "policy", recipe)}
        report["reward"] = _build_reward(folder, recipe)
    report["seconds"] = time.perf_counter() - begun
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _rows(maker: Any, count: int, recipe: Recipe, *, split: str) -> Any:
    from datasets import Dataset

    return Dataset.from_list(maker(count, split=split, seed=recipe.seed))


def _build_policy(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """A new BLOOM, taught to answer as the clerks do."""
    from transformers import BloomConfig, BloomForCausalLM

    from ppo_lab.embedded.tokenizer import train_tokenizer
    from ppo_lab.stages.sft import fit_sft

    train = _rows(sft_rows, recipe.sft_examples, recipe, split="train")
    texts = [row["prompt"] + row["completion"] for row in train]
    tokenizer = train_tokenizer(texts, vocab_size=recipe.vocab_size)
    config = BloomConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        n_layer=recipe.n_layer,
        n_head=recipe.n_head,
        initializer_range=recipe.initializer_range,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return fit_sft(
        BloomForCausalLM(config),
        tokenizer,
        train,
        _rows(sft_rows, recipe.held_out, recipe, split="held_out"),
        fit=recipe.sft,
        folder=folder,
        seed=recipe.seed,
        device="cpu",
        group_by_length=True,
        what="  policy (supervised fine-tuning)",
    )


def _build_reward(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """The policy's trunk with a new head, taught what the annotators prefer."""
    from transformers import AutoTokenizer, BloomForSequenceClassification

    from ppo_lab.embedded.tokenizer import for_reward
    from ppo_lab.stages.fitting import quiet
    from ppo_lab.stages.reward_model import fit_reward_model

    with quiet():
        model = BloomForSequenceClassification.from_pretrained(folder / "policy", num_labels=1)
    tokenizer = for_reward(AutoTokenizer.from_pretrained(folder / "policy"))
    report = fit_reward_model(
        model,
        tokenizer,
        _rows(preference_rows, recipe.pairs, recipe, split="train"),
        _rows(preference_rows, recipe.held_out, recipe, split="held_out"),
        fit=recipe.reward,
        folder=folder / "reward",
        seed=recipe.seed,
        device="cpu",
        what="  reward model (preference pairs)",
    )
    report["score_std_before_scaling"] = _scale_to_unit(model, tokenizer, folder / "reward", recipe)
    return report


def _scale_to_unit(model: Any, tokenizer: Any, folder: Path, recipe: Recipe) -> float:
    """Divide the head so that the clerks' answers score with standard deviation 1; what it was."""
    import torch

    from ppo_lab.stages.fitting import quiet

    rows = sft_rows(recipe.held_out, split="held_out", seed=recipe.seed)
    texts = [row["prompt"] + row["completion"] + tokenizer.eos_token for row in rows]
    with torch.inference_mode():
        std = model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits.std()
    with torch.no_grad():
        model.score.weight.div_(std)
    with quiet():
        model.save_pretrained(folder)
    return float(std)
