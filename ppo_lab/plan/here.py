"""A plan for this machine: seconds are counted work over rates that rehearsals measured."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from ppo_lab.assembly import pick_device
from ppo_lab.memory import free_bytes, resident_bytes
from ppo_lab.plan.architecture import blueprint
from ppo_lab.plan.counted import (
    Estimate,
    Peaks,
    Phase,
    critic_work,
    full_kl_work,
    memory_of,
    work_of,
)
from ppo_lab.plan.heads import full_kl_seconds
from ppo_lab.plan.measured import Measured, measured
from ppo_lab.plan.memory import CUDA_CONTEXT, CUDA_HOLES, allocator_bytes
from ppo_lab.plan.rehearsal import Miniature, Rehearsal
from ppo_lab.plan.subject import Subject, seen
from ppo_lab.processes.alone import Alone
from ppo_lab.trainer import PASS_TOKENS

# A phase that takes so many times as long as its FLOPs and bytes would is bound by what is between.
OVERHEAD = 2.5


def estimate_here(subject: Subject) -> Estimate:
    """What a run takes on this machine, as rehearsals of its model measure it."""
    device = pick_device(subject.config.device, Alone())
    on_cpu = device == "cpu"
    around = {"Python and libraries": resident_bytes()} if on_cpu else {"CUDA": CUDA_CONTEXT}
    room = free_bytes() + around.get("Python and libraries", 0) if on_cpu else _gpu_bytes()
    found = measured(
        lambda: _rehearsal(subject, device),
        replace(subject.head, device=device),
        subject.workload,
        key=_key(subject),
        pass_tokens=PASS_TOKENS,
        trained=subject.of.trained,
        device=device,
    )
    peaks = Peaks(found.held, found.drawn_bytes, found.scored_bytes, found.learnt_bytes)
    memory = memory_of(subject, peaks, around)
    memory = memory.with_around(
        "allocator",
        allocator_bytes(subject.of, found.held, widest=_widest(subject))
        if on_cpu
        else CUDA_HOLES * memory.tensors,
    )
    return Estimate(memory, room, _measured_phases(subject, found, device))


def _rehearsal(subject: Subject, device: str) -> Rehearsal:
    config = subject.config
    one, two = (
        Miniature(
            blueprint(
                subject.model,
                config.model,
                replace(config.lora, top_layers=0),
                dtype=subject.dtype,
                device=device,
                layers=layers,
            ),
            checkpointing=config.ppo.gradient_checkpointing,
            fast_layers=config.model.fast_layers,
        )
        for layers in (1, 2)
    )
    return Rehearsal(one, two, subject.of.matrices // subject.of.layers)


def _measured_phases(subject: Subject, found: Measured, device: str) -> dict[str, Phase]:
    load, of = subject.workload, subject.of
    counted = work_of(subject)
    epoch = sum(map(seen, load.passes())) / seen(subject.largest_pass)
    embedding = 3 * 4 * of.head / found.rates.bytes if of.head_trained else 0.0
    lower = _reading_a_layer(subject, found) * (of.layers - of.reached)
    again = 0.0 if subject.config.ppo.cache_trunk else lower
    learning = found.training.at(of.reached) + again + found.learnt_s + embedding
    drawing = sum(map(seen, load.chunks())) / max(map(seen, load.chunks()))
    reading = load.reading(PASS_TOKENS)
    read = found.reading.at(of.layers) + found.scored_s
    seconds = {
        "generate": drawing
        * (
            found.prefill.at(of.layers)
            + (load.longest - 1) * found.decoding.at(of.layers)
            + load.longest * found.drawn_s
        ),
        "reference": read * sum(map(seen, reading)) / max(map(seen, reading)),
        "update": load.epochs * (epoch * learning + len(load.steps()) * found.step_s),
    }
    exact = full_kl_work(subject).flops
    rate = (counted["reference"].flops - exact) / seconds["reference"]
    seconds["score"] = counted["score"].flops / rate
    if exact:
        seconds["reference"] += _full_kl_seconds(subject, found, device)
    if subject.critic:
        seconds["reference"] += critic_work(subject, reading=True).flops / rate
        seconds["update"] += critic_work(subject, reading=False).flops / rate
    return {
        name: Phase(
            counted[name],
            seconds[name],
            _binding(
                seconds[name],
                compute=counted[name].flops / found.rates.flops,
                memory=counted[name].bytes / found.rates.bytes,
            ),
        )
        for name in counted
    }


def _full_kl_seconds(subject: Subject, found: Measured, device: str) -> float:
    """Seconds of the exact KL: two more passes through the trunk, and the vocabulary of both."""
    load, of = subject.workload, subject.of
    reading = load.reading(PASS_TOKENS)
    passes = sum(map(seen, reading)) / max(map(seen, reading))
    scored = sum(row.response for row in load.rows)
    layers = of.reached if subject.config.ppo.cache_trunk else of.layers
    trunks = 2 * passes * found.reading.at(layers)
    return trunks + full_kl_seconds(replace(subject.head, device=device), scored)


def _reading_a_layer(subject: Subject, found: Measured) -> float:
    """Seconds of one layer without gradients, over the rows of the largest pass of the updates."""
    reading = max(map(seen, subject.workload.reading(PASS_TOKENS)))
    return found.reading.further * seen(subject.largest_pass) / reading


def _binding(seconds: float, *, compute: float, memory: float) -> str:
    if seconds > OVERHEAD * max(compute, memory):
        return "overhead"
    return "compute" if compute >= memory else "memory bandwidth"


def _widest(subject: Subject) -> float:
    """Bytes of the widest tensor of a layer in the largest pass, about."""
    return 4.0 * seen(subject.largest_pass) * 4 * subject.of.hidden


def _key(subject: Subject) -> Any:
    """What the measured figures depend on beside head, workload and machine."""
    config = subject.config
    return (
        subject.model.to_json_string(),
        asdict(config.lora),
        config.model.attn_implementation,
        config.model.fast_layers,
        str(subject.dtype),
        config.ppo.gradient_checkpointing,
    )


def _gpu_bytes() -> float:
    return float(torch.cuda.mem_get_info()[1])
