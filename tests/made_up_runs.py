"""Run folders as a sweep would leave them, out of a toy formula: for tests and to look at."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from itertools import product
from pathlib import Path

import numpy as np
import yaml

from ppo_lab.config import Config, EmbeddedData, EmbeddedReward

ALPHA_GOLD, BETA_GOLD = 1.2, 0.9
ALPHA_PROXY, BETA_PROXY = 1.4, 0.15


def rise(d: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """Gao's curve, R(d) = d (alpha - beta log d); 0 at 0."""
    safe = np.maximum(d, 1e-9)
    return np.where(d > 0, d * (alpha - beta * np.log(safe)), 0.0)


def composed(**settings: object) -> dict:
    """A whole configuration, with these dotted keys (`ppo__cliprange`) set."""
    config = asdict(
        Config(reward=EmbeddedReward(name="embedded"), data=EmbeddedData(name="embedded"))
    )
    config["evaluation"]["max_new_tokens"] = "${generation.max_new_tokens}"
    for key, value in settings.items():
        *sections, last = key.split("__")
        place = config
        for section in sections:
            place = place[section]
        place[last] = value
    return config


def make_run(
    folder: Path,
    *,
    beta: float = 0.1,
    epsilon: float = 0.2,
    seed: int = 0,
    steps: int = 40,
    every: int = 5,
    gold: bool = True,
    names: Iterable[str] = (),
    overrides: Iterable[str] | None = None,
    **settings: object,
) -> Path:
    """One finished run; `names` are further metrics, filled with noise."""
    random = np.random.default_rng([seed, int(beta * 1e6), int(epsilon * 1e6)])
    step = np.arange(1, steps + 1)
    kl = 30 / (1 + 12 * beta) * (1 - np.exp(-3 * step / steps)) * (0.9 + 0.2 * random.random())
    d = np.sqrt(kl)
    columns = {
        "kl": kl + 0.05 * random.standard_normal(steps),
        "mean_reward": -1 + rise(d, ALPHA_PROXY, BETA_PROXY) + 0.05 * random.standard_normal(steps),
        "clip_fraction": 0.25 * np.exp(-epsilon / 0.08) * (0.8 + 0.4 * random.random(steps)),
        "kl_coef": np.full(steps, beta),
        "cliprange": np.full(steps, epsilon),
        "tokens_per_second": np.full(steps, 900.0),
    }
    columns |= {name: random.standard_normal(steps) for name in names if name not in columns}
    rows = [
        {"step": int(s), **{name: float(column[i]) for name, column in columns.items()}}
        for i, s in enumerate(step)
    ]
    for i in sorted({*range(every - 1, steps, every), steps - 1}):
        rows[i] |= evaluation(kl[i], beta=beta, gold=gold, noise=0.02 * random.standard_normal(2))
    first = {
        name[5:]: value
        for name, value in evaluation(0.0, beta=beta, gold=gold, noise=(0, 0)).items()
    }
    last = {name[5:]: value for name, value in rows[-1].items() if name.startswith("eval/")}
    write_run(
        folder,
        rows,
        first,
        last,
        composed(
            ppo__init_kl_coef=beta, ppo__cliprange=epsilon, seed=seed, ppo__steps=steps, **settings
        ),
    )
    if overrides is not None:
        (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
    return folder


def evaluation(kl: float, *, beta: float, gold: bool, noise: Iterable[float]) -> dict[str, float]:
    """The metrics of one evaluation."""
    d, (noise_proxy, noise_gold) = np.sqrt(kl), noise
    reward = float(-1 + rise(d, ALPHA_PROXY, BETA_PROXY) + noise_proxy)
    found = {
        "mean_reward": reward,
        "std_reward": 1.0,
        "kl": float(kl),
        "objective": reward - beta * float(kl),
    }
    if gold:
        found["gold"] = float(rise(d, ALPHA_GOLD, BETA_GOLD) + noise_gold)
    return {f"eval/{name}": value for name, value in found.items()}


def write_run(folder: Path, rows: list[dict], first: dict, last: dict, config: dict) -> None:
    """The files of a finished run."""
    (folder / ".hydra").mkdir(parents=True, exist_ok=True)
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    overrides = [f"ppo.init_kl_coef={config['ppo']['init_kl_coef']}", f"seed={config['seed']}"]
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = [sample(config, n, step) for step in (0, len(rows)) for n in range(4)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    summary = {
        "status": "finished",
        "steps": len(rows),
        "eval": {"first": first, "last": last},
        "objective": last[config["objective"].removeprefix("eval/")],
        "wall_s": 100.0,
        "tokens_per_second": 900.0,
        "seed": config["seed"],
    }
    (folder / "summary.json").write_text(json.dumps(summary))


def sample(config: dict, number: int, step: int) -> dict:
    """One prompt with an answer that a careless page would run as a script."""
    evil = "</script><script>document.title='hacked'</script><b onmouseover=alert(1)>bold</b>"
    return {
        "step": step,
        "prompt": f"How do I reset my password? ({number})",
        "response": f"At beta {config['ppo']['init_kl_coef']}: {evil}",
        "score": 1.5,
        "reference_response": "No idea.",
        "reference_score": -1.0,
        "gold": 0.7,
        "reference_gold": 0.0,
    }


def make_sweep(
    folder: Path,
    *,
    betas: Iterable[float] = (0.0, 0.02, 0.05, 0.1, 0.3),
    epsilons: Iterable[float] = (0.1, 0.2, 0.4),
    seeds: Iterable[int] = (0, 1),
    **options: object,
) -> list[Path]:
    """A grid of runs in numbered folders."""
    grid = product(betas, epsilons, seeds)
    return [
        make_run(folder / str(i), beta=float(beta), epsilon=epsilon, seed=seed, **options)
        for i, (beta, epsilon, seed) in enumerate(grid)
    ]
