"""A plan for a device of the table: the longer of FLOPs over its dense rate and bytes over its
bandwidth, and what operations cost however small they are, launched by Python or in CUDA graphs.
What is not published is fitted to one model on one machine.
"""

from __future__ import annotations

from typing import NamedTuple

from ppo_lab.plan.counted import Estimate, Peaks, Phase, memory_of, work_of
from ppo_lab.plan.devices import Device
from ppo_lab.plan.graphs import Recorded, has_room, recorded_by, records_again, with_kept
from ppo_lab.plan.memory import CUDA_CONTEXT, CUDA_HOLES, Memory
from ppo_lab.plan.subject import Subject, seen
from ppo_lab.plan.traced import Traced, published_head_bytes, traced
from ppo_lab.plan.work import Work
from ppo_lab.trainer import PASS_TOKENS

# Fitted to one iteration of BLOOM 560m on one H200 (64 x (64 + 128) tokens, LoRA, torch 2.11), each
# phase of which is met within a third: what of a published rate passes reach, with all that stands
# between their products; seconds that a GPU takes for an operation of a CUDA graph, however small,
# of which there are fewer than operations counted, a sum and its norm being one kernel, say;
# operations of a sampled token beside its pass, of its draw and of what is kept of it; and those
# that Python launches, while the GPU waits, beside a pass and beside an optimizer step.
REACHED_FLOPS = 0.58
IN_A_GRAPH_S = 2.1e-6
DRAWN = 20
BESIDE_A_PASS, BESIDE_A_STEP = 10, 30

# Seconds that Python takes for an operation of a model that is not compiled: fitted to the same
# iteration when updates were not recorded yet (0.78 s for them).
LAUNCH_S = 55e-6

# What long reads reach of a published rate; and how many passes are made to record one.
REACHED_BYTES = 0.8
TO_RECORD = 3


class Launches(NamedTuple):
    """Operations that a phase launches: `queued` by Python while the GPU works at earlier ones,
    `waited` by Python while the GPU waits, `together` in CUDA graphs.
    """

    queued: float = 0.0
    waited: float = 0.0
    together: float = 0.0


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
    plain = memory_of(subject, peaks, {"CUDA": CUDA_CONTEXT})
    recorded = recorded_by(subject, known=found.token.first > 0)
    memory = _with_holes(with_kept(plain, subject, recorded))
    if not has_room(memory, device.memory):
        recorded, memory = recorded.without_room(), _with_holes(plain)
    launches, dtype = _launches(subject, found, recorded), str(subject.dtype)
    phases = {
        name: _roofline(counted, device, dtype.removeprefix("torch."), launches[name])
        for name, counted in work_of(subject, with_critic=True).items()
    }
    return Estimate(memory, device.memory, phases)


def _with_holes(memory: Memory) -> Memory:
    return memory.with_around("allocator", CUDA_HOLES * memory.tensors)


def _launches(subject: Subject, found: Traced, recorded: Recorded) -> dict[str, Launches]:
    """What is launched in each phase; of a reward nothing is known."""
    load, layers = subject.workload, subject.of.layers
    forward = found.forward.at(layers)
    learning = forward + found.backward.at(layers) * subject.of.reached_share
    passes, steps = load.epochs * len(load.passes()), load.epochs * len(load.steps())
    # The exact KL passes through the policy and the reference once more.
    exact = subject.config.ppo.kl_penalty == "full"
    reading = len(load.reading(PASS_TOKENS)) * (3 if exact else 1)
    update = _of_passes(passes, learning, recorded=recorded.learning)
    return {
        "generate": _of_sampling(subject, found, recorded),
        "score": Launches(),
        "reference": _of_passes(reading, forward, recorded=recorded.reading),
        "update": update._replace(waited=update.waited + steps * BESIDE_A_STEP),
    }


def _of_sampling(subject: Subject, found: Traced, recorded: Recorded) -> Launches:
    """A generation's; its tokens are recorded anew where no graph was kept."""
    layers, parts = subject.of.layers, len(subject.workload.chunks())
    tokens = parts * subject.workload.longest
    if not recorded.tokens:
        return Launches(queued=tokens * (found.forward.at(layers) + DRAWN))
    token = found.token.at(layers)
    anew = not recorded.kept or records_again(subject)
    return Launches(
        waited=parts * TO_RECORD * token if anew else 0.0,
        together=tokens * (token + DRAWN),
    )


def _of_passes(count: int, each: float, *, recorded: bool) -> Launches:
    launches, waited = count * each, float(count * BESIDE_A_PASS)
    return Launches(0.0, waited, launches) if recorded else Launches(launches, waited)


def _roofline(counted: Work, device: Device, dtype: str, launches: Launches) -> Phase:
    compute = counted.flops / (REACHED_FLOPS * device.flops(dtype))
    memory = counted.bytes / (REACHED_BYTES * device.bytes_per_second)
    queued, waited = (n * LAUNCH_S for n in (launches.queued, launches.waited))
    together = launches.together * IN_A_GRAPH_S
    parts = {
        "compute": compute,
        "memory bandwidth": memory,
        "launches": max(queued, together) + waited,
    }
    seconds = max(queued, max(compute, memory) + together) + waited
    return Phase(counted, seconds, max(parts, key=lambda name: parts[name]))
