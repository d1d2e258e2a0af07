"""A run's parts, measured here: what rehearsals and heads say of one model and one batch, kept in
the cache for a while, so that a second plan of the like costs nothing.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import ppo_lab
from ppo_lab.embedded.cache import cache_folder, fingerprint
from ppo_lab.plan.heads import (
    HeadShape,
    logprob_bytes,
    logprob_seconds,
    sampling_bytes,
    sampling_seconds,
)
from ppo_lab.plan.machine import Rates, kind_of_machine, measure_rates, seconds_of
from ppo_lab.plan.rehearsal import ByDepth, Held, Rehearsal
from ppo_lab.plan.workload import Workload
from ppo_lab.record import write_atomically

PACKAGES = ("torch", "transformers", "peft")

# Seconds for which a measurement is believed: what else a machine does changes.
BELIEVED_S = 3600.0

# Weights that one step of the optimizer is measured on.
STEPPED = 2**22


@dataclass(frozen=True)
class Measured:
    """Of the largest pass of each kind, and of one decoding step: seconds and bytes."""

    held: Held
    training: ByDepth
    reading: ByDepth
    prefill: ByDepth
    decoding: ByDepth
    drawn_s: float
    scored_s: float
    learnt_s: float
    step_s: float
    drawn_bytes: float
    scored_bytes: float
    learnt_bytes: float
    rates: Rates

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Measured:
        """From what `asdict` made of one."""
        by_depth = {
            name: ByDepth(*saved[name]) for name in ("training", "reading", "prefill", "decoding")
        }
        held = Held(**{name: ByDepth(*pair) for name, pair in saved["held"].items()})
        return cls(**{**saved, **by_depth, "held": held, "rates": Rates(**saved["rates"])})


def measured(
    rehearsal: Callable[[], Rehearsal],
    head: HeadShape,
    workload: Workload,
    *,
    key: Any,
    pass_tokens: int,
    trained: int,
    device: str,
) -> Measured:
    """What the parts of a run take on this machine; `key` is what else they depend on."""
    place = _place((key, asdict(workload), asdict(head), trained, device))
    with suppress(OSError, ValueError, KeyError, TypeError):
        if time.time() - place.stat().st_mtime < BELIEVED_S:
            return Measured.of(json.loads(place.read_text()))
    found = _measure(rehearsal(), head, workload, pass_tokens, trained, device)
    with suppress(OSError):
        write_atomically(place, json.dumps(asdict(found)))
    return found


def _measure(
    rehearsal: Rehearsal,
    head: HeadShape,
    workload: Workload,
    pass_tokens: int,
    trained: int,
    device: str,
) -> Measured:
    training = max(workload.passes(), key=_tokens)
    reading = max(workload.reading(pass_tokens), key=_tokens)
    chunk = max(workload.chunks(), key=_tokens)
    learnt, scored = (sum(row.response for row in rows) for rows in (training, reading))
    prefill, decoding = rehearsal.sampling(chunk)
    return Measured(
        held=rehearsal.held(training),
        training=rehearsal.training(training),
        reading=rehearsal.reading(reading),
        prefill=prefill,
        decoding=decoding,
        drawn_s=sampling_seconds(head, len(chunk)),
        scored_s=logprob_seconds(head, scored, gradients=False),
        learnt_s=logprob_seconds(head, learnt, gradients=True),
        step_s=_step_seconds(device) * trained / STEPPED,
        drawn_bytes=sampling_bytes(head, len(chunk)),
        scored_bytes=logprob_bytes(head, scored, gradients=False),
        learnt_bytes=logprob_bytes(head, learnt, gradients=True),
        rates=measure_rates(head.dtype, device),
    )


def _step_seconds(device: str) -> float:
    """Seconds of one optimizer step on STEPPED weights, the gradient's norm included."""
    weight = torch.nn.Parameter(torch.zeros(STEPPED, device=device))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight], lr=1e-9, fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()

    return seconds_of(step)


def _tokens(rows: Any) -> int:
    return sum(row.seen for row in rows)


def _place(key: Any) -> Path:
    """Where the measurement lies: named by all that it depends on, this project's own code too."""
    package = Path(ppo_lab.__file__).parent
    sources = [*(package / "models").rglob("*.py"), *(package / "plan").glob("*.py")]
    code = fingerprint([*sources, package / "rollout.py"], packages=PACKAGES)
    text = json.dumps([key, kind_of_machine(), code], sort_keys=True, default=str)
    return cache_folder() / "plan" / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"
