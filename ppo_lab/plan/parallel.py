"""Which way of sharing a run out among devices fits: memory and seconds of one of them.

| way | a device holds | passes between devices an optimizer step |
|---|---|---|
| one device | everything | nothing |
| DDP | everything, and a share of the batch | gradients, summed |
| ZeRO-2 | a share of gradients and Adam's moments | the same |
| FSDP2, ZeRO-3 | a share of weights, too | and the weights, gathered for each pass |

Source: Rajbhandari et al. 2020, arXiv:1910.02054, for ZeRO's stages and what they send; Zhao et al.
2023, arXiv:2304.11277, for FSDP. Nothing of this is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from ppo_lab.plan.estimate import Plan
from ppo_lab.trainer import PASS_TOKENS

# A sharded model gathers one layer while it computes another.
GATHERED_LAYERS = 2

HARDLY_LONGER = 1.1

SHARDED = {
    "DDP": (),
    "ZeRO-2": ("gradients", "Adam's moments"),
    "FSDP2": ("weights", "reference", "gradients", "Adam's moments", "adapter and optimizer"),
    "ZeRO-3": ("weights", "reference", "gradients", "Adam's moments", "adapter and optimizer"),
}
FILES = {"DDP": "ddp", "ZeRO-2": "zero2", "FSDP2": "fsdp2", "ZeRO-3": "zero3"}


@dataclass(frozen=True)
class Way:
    """A way of sharing out: bytes on a device, seconds of an iteration, whether it finds room."""

    name: str
    bytes: float
    seconds: float
    fits: bool

    @property
    def file(self) -> str:
        """The name of its configuration for `accelerate launch`; empty for one device."""
        return FILES.get(self.name, "")


def ways(alone: Plan, shared: Plan) -> list[Way]:
    """Every way, simplest first: `alone` is the plan of one device with the whole batch, `shared`
    that of one of several with its share.
    """
    one = Way("one device", alone.memory.total, alone.iteration_s, alone.fits)
    count = alone.target.count
    return [one] if count == 1 else [one, *(_way(name, shared, count) for name in SHARDED)]


def fitting(found: list[Way]) -> Way | None:
    """The simplest way that finds room and takes hardly longer than the fastest that does."""
    room = [way for way in found if way.fits]
    fastest = min((way.seconds for way in room), default=0.0)
    return next((way for way in room if way.seconds <= HARDLY_LONGER * fastest), None)


def _way(name: str, plan: Plan, count: int) -> Way:
    standing, of = plan.memory.standing, plan.of
    sharded = sum(standing.get(part, 0.0) for part in SHARDED[name])
    buckets = 4.0 * of.trained  # gradients while they are summed
    gathered = of.head * of.bytes_per_weight if "weights" in SHARDED[name] else 0.0
    if "weights" in SHARDED[name]:
        gathered += GATHERED_LAYERS * of.matrices / of.layers * of.bytes_per_weight
    size = plan.memory.total - sharded * (1 - 1 / count) + gathered + buckets / count
    if "weights" in SHARDED[name]:  # a model is loaded whole before it is sharded
        size = max(size, standing["weights"] + standing.get("reference", 0.0))
    seconds = plan.iteration_s + _sent(name, plan, count) / _link(plan)
    return Way(name, size, seconds, size <= plan.room)


def _sent(name: str, plan: Plan, count: int) -> float:
    """Bytes that a device sends an iteration: in a ring, all but its own share, twice for a sum."""
    load, of = plan.workload, plan.of
    steps = load.epochs * len(load.steps())
    ring = (count - 1) / count
    sent = steps * 2 * ring * 4.0 * of.trained
    if "weights" in SHARDED[name]:
        forward_passes = len(load.chunks()) * load.longest + len(load.reading(PASS_TOKENS))
        passes = forward_passes + 2 * load.epochs * len(load.passes())
        sent += passes * ring * of.weight_bytes
    return sent


def _link(plan: Plan) -> float:
    """Bytes a second between devices; of this machine nothing is known but its memory."""
    return plan.target.device.link if plan.target.device else 1e10
