"""Whole runs of a model of a few thousand weights, and a reward that can be told to break."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppo_lab import checkpoint
from ppo_lab.config import (
    CheckpointSection,
    Config,
    EvaluationSection,
    FileData,
    FunctionReward,
    GenerationSection,
    LoraSection,
    ModelSection,
    PPOSection,
    TrackingSection,
)

ARCHITECTURE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.4,
}
TIMINGS = ("tokens_per_second", "peak_memory_gb", "mfu")

# Done by the reward's n-th call, counted from now on: {n: what}.
fuses: dict[int, Callable[[], Any]] = {}


def variety(completions: list[str], **_: Any) -> list[float]:
    """How many different characters a response has; sets off what `fuses` holds for this call."""
    for left in sorted(fuses):
        todo = fuses.pop(left)
        if left > 1:
            fuses[left - 1] = todo
        else:
            todo()
    return [float(len(set(text))) for text in completions]


def noisy(completions: list[str], **_: Any) -> list[float]:
    """The same with noise of every global generator on it."""
    noise = random.random() + np.random.random() + float(torch.rand(()))
    return [score + noise for score in variety(completions)]


class Killed(BaseException):
    """Stands for a process that is gone: nothing in the package catches it."""


def kill() -> None:
    raise Killed


def inputs(
    folder: Path, prompts: list[str] | None = None, **architecture: Any
) -> tuple[Path, Path]:
    """A model's folder and a file of prompts."""
    model, data = folder / "model", folder / "prompts.jsonl"
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps({**ARCHITECTURE, **architecture}))
    texts = prompts or [f"Question {i}: why is {i * 7 % 13} so?" for i in range(22)]
    data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return model, data


def tiny(folder: Path, **changes: Any) -> Config:
    """A run of seconds; changes are whole sections, or dictionaries of what is other in them."""
    model, data = inputs(folder)
    config = Config(
        name="tiny",
        device="cpu",
        model=ModelSection(name="tiny", path=str(model), weights="random"),
        lora=LoraSection(r=4, alpha=8),
        ppo=PPOSection(
            steps=6,
            batch_size=8,
            mini_batch_size=4,
            ppo_epochs=2,
            learning_rate=0.05,
            use_score_scaling=True,
            use_score_norm=True,
        ),
        generation=GenerationSection(max_new_tokens=6),
        evaluation=EvaluationSection(every=2, prompts=4, samples=2, max_new_tokens=6),
        reward=FunctionReward(name="variety", target="tiny_runs:variety"),
        data=FileData(name="file", path=str(data), held_out=4),
        tracking=TrackingSection(type="none"),
        checkpoint=CheckpointSection(every=3),
    )
    for name, change in changes.items():
        before = getattr(config, name)
        after = replace(before, **change) if isinstance(change, dict) else change
        config = replace(config, **{name: after})
    return config


def command(folder: Path, *overrides: str) -> list[str]:
    """The same run as a command line, its reward the length of a response."""
    model, data = inputs(folder)
    return [
        *("model=local", f"model.path={model}", "model.weights=random", "lora=r8", "device=cpu"),
        *("data=file", f"data.path={data}", "data.held_out=4", "reward=length", "tracking=none"),
        *("reward.unit=characters", "ppo.steps=6", "ppo.batch_size=8", "ppo.mini_batch_size=4"),
        *("ppo.ppo_epochs=2", "ppo.learning_rate=1e-2", "ppo.use_score_scaling=true"),
        *("generation.max_new_tokens=6", "evaluation.every=2", "evaluation.prompts=4"),
        *("checkpoint.every=1", *overrides),
    ]


def start(folder: Path, *overrides: str, **settings: Any) -> subprocess.Popen[str]:
    """`python -m ppo_lab` with these overrides in that folder, its output to be read."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **settings.pop("env", {})}
    root = str(Path(__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, str(Path(__file__).parent)])
    return subprocess.Popen(
        [sys.executable, "-m", "ppo_lab", *overrides],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **settings,
    )


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what is measured in seconds and bytes."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k not in TIMINGS and not k.startswith("time/")}
        for row in rows
    ]


def outcome(run: Path) -> dict[str, Any]:
    """All that two runs with the same numbers have in common, to the last bit."""
    files = [*sorted((run / "model").glob("*.safetensors")), run / "samples.jsonl"]
    files += [folder / checkpoint.TENSORS for _, folder in sorted(checkpoint.all_in(run))[-1:]]
    digests = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    summary = json.loads((run / "summary.json").read_text())
    shared = {name: summary[name] for name in ("status", "steps", "eval", "train", "objective")}
    return {"metrics": metrics(run), "files": digests, "summary": shared}
