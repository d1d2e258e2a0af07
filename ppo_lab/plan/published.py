"""A plan for a device of the table: the longest of FLOPs over its dense rate, bytes over its
bandwidth, and operations over the rate at which Python launches them. The last is measured, on one
machine; nothing else is.
"""

from __future__ import annotations

from ppo_lab.plan.counted import Estimate, Peaks, Phase, memory_of, work_of
from ppo_lab.plan.devices import Device
from ppo_lab.plan.memory import CUDA_CONTEXT, CUDA_HOLES
from ppo_lab.plan.subject import Subject, seen
from ppo_lab.plan.traced import Traced, published_head_bytes, traced
from ppo_lab.plan.work import Work
from ppo_lab.trainer import PASS_TOKENS

# What of a published rate large products reach, and long reads; seconds that Python takes for each
# operation of a model that is not compiled, so that BLOOM 560m takes what it took on an H200 (1.3 s
# an iteration of 64 x (64 + 128) tokens; by phase within a third).
REACHED_FLOPS = 0.6
REACHED_BYTES = 0.8
LAUNCH_S = 55e-6
# Launches of a sampled token beside its pass: of its draw, and of what is kept of it. What a launch
# in a CUDA graph takes of one by Python, and how many passes a generation makes to record one.
DRAWN, KEPT = 40, 20
IN_A_GRAPH = 0.12
TO_RECORD = 3


def estimate_published(subject: Subject, device: Device) -> Estimate:
    """What a run takes on such a device."""
    found = traced(
        subject.model,
        subject.config,
        dtype=subject.dtype,
        training=subject.largest_pass,
        reading=max(subject.workload.reading(PASS_TOKENS), key=seen),
    )
    head, chunk = subject.head, max(subject.workload.chunks(), key=seen)
    peaks = Peaks(
        found.held,
        drawn=3 * 4.0 * len(chunk) * head.vocabulary,
        scored=published_head_bytes(head, PASS_TOKENS, gradients=False),
        learnt=published_head_bytes(
            head, sum(row.response for row in subject.largest_pass), gradients=True
        ),
    )
    memory = memory_of(subject, peaks, {"CUDA": CUDA_CONTEXT})
    memory = memory.with_around("allocator", CUDA_HOLES * memory.tensors)
    phases = {
        name: _roofline(counted, device, str(subject.dtype).removeprefix("torch."), launches)
        for (name, counted), launches in zip(
            work_of(subject, with_critic=True).items(), _launches(subject, found), strict=True
        )
    }
    return Estimate(memory, device.memory, phases)


def _launches(subject: Subject, found: Traced) -> tuple[float, ...]:
    """Operations that are launched in each phase."""
    load, layers = subject.workload, subject.of.layers
    forward, backward = found.forward.at(layers), found.backward.at(layers)
    passes = load.epochs * len(load.passes())
    model = subject.config.model
    token = found.token.at(layers) if model.cuda_graphs and model.fast_layers else 0.0
    drawing = load.longest * (forward + DRAWN + KEPT)
    if token:
        drawing = load.longest * (IN_A_GRAPH * (token + DRAWN) + KEPT) + TO_RECORD * token
    return (
        len(load.chunks()) * drawing,
        0.0,
        len(load.reading(PASS_TOKENS)) * forward,
        passes * (forward + backward * subject.of.reached_share),
    )


def _roofline(counted: Work, device: Device, dtype: str, launches: float) -> Phase:
    seconds = {
        "compute": counted.flops / (REACHED_FLOPS * device.flops(dtype)),
        "memory bandwidth": counted.bytes / (REACHED_BYTES * device.bytes_per_second),
        "launches": launches * LAUNCH_S,
    }
    binds = max(seconds, key=lambda name: seconds[name])
    return Phase(counted, seconds[binds], binds)
