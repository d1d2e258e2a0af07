"""What a run will take: memory by part, work and seconds by phase, and what binds.

On this machine seconds are counted work over rates that rehearsals measured. On a device of the
table they are the longest of three: FLOPs over its dense rate, bytes over its bandwidth, operations
over the rate at which Python launches them; nothing of that is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from ppo_lab.assembly import pick_device
from ppo_lab.config import Config
from ppo_lab.memory import free_bytes, resident_bytes
from ppo_lab.plan import work
from ppo_lab.plan.architecture import (
    Architecture,
    architecture_of,
    blueprint,
    classifier_blueprint,
)
from ppo_lab.plan.devices import Device
from ppo_lab.plan.heads import HeadShape
from ppo_lab.plan.known import (
    Classifier,
    critic_model,
    policy_dtype,
    reward_models,
    with_known_models,
)
from ppo_lab.plan.measured import Measured, measured
from ppo_lab.plan.memory import (
    CUDA_CONTEXT,
    CUDA_HOLES,
    Memory,
    allocator_bytes,
    cache_bytes,
    standing_bytes,
    update_bytes,
)
from ppo_lab.plan.rehearsal import Miniature, Rehearsal
from ppo_lab.plan.traced import Traced, published_head_bytes, traced
from ppo_lab.plan.work import Amount, Work
from ppo_lab.plan.workload import Row, Workload, workload_of
from ppo_lab.processes.alone import Alone
from ppo_lab.trainer import PASS_TOKENS

# What of a published rate large products reach, and long reads; seconds that Python takes to launch
# an operation of a model that is not compiled.
REACHED_FLOPS = 0.6
REACHED_BYTES = 0.8
LAUNCH_S = 9e-6
# Launches of a sampled token beside its pass: of its draw, and of what is kept of it. What a launch
# in a CUDA graph takes of one by Python, and how many passes a generation makes to record one.
DRAWN, KEPT = 40, 20
IN_A_GRAPH = 0.12
TO_RECORD = 3

# A phase that takes so many times as long as its FLOPs and bytes would is bound by what is between.
OVERHEAD = 2.5


@dataclass(frozen=True)
class Target:
    """Where a run is to be: so many of a device of the table, or of this machine's own."""

    device: Device | None = None
    count: int = 1

    @property
    def name(self) -> str:
        """As a report calls it."""
        return "this machine, measured" if self.device is None else self.device.name


class Phase(NamedTuple):
    """What a phase of an iteration has to do, how long it takes, and what makes it so long."""

    work: Work
    seconds: float
    binds: str


@dataclass(frozen=True)
class Plan:
    """What a run takes on its target; seconds, bytes and work are those of one device."""

    target: Target
    of: Architecture
    workload: Workload
    memory: Memory
    room: float
    phases: dict[str, Phase]
    evaluation_s: float
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the run finds room on one device."""
        return self.memory.total <= self.room

    @property
    def iteration_s(self) -> float:
        """Seconds of one iteration."""
        return sum(phase.seconds for phase in self.phases.values())

    @property
    def run_s(self) -> float:
        """Seconds of the run: iterations and evaluations; what comes before is left out."""
        load = self.workload
        return load.iterations * self.iteration_s + load.evaluations * self.evaluation_s

    @property
    def device_hours(self) -> float:
        """Hours that all devices together are taken."""
        return self.run_s * self.target.count / 3600


@dataclass(frozen=True)
class Subject:
    """The run that is planned, as far as it is known without loading anything."""

    config: Config
    model: PreTrainedConfig
    dtype: torch.dtype
    of: Architecture
    workload: Workload
    rewards: tuple[Architecture, ...]
    critic: Architecture | None

    @property
    def head(self) -> HeadShape:
        """The shape of the policy's head."""
        return HeadShape(self.of.vocabulary, self.of.hidden, self.of.head_trained, self.dtype)

    @property
    def largest_pass(self) -> tuple[Row, ...]:
        """The rows of the largest forward and backward pass."""
        return max(self.workload.passes(), key=_seen)


def plan_of(
    config: Config, target: Target, *, response_tokens: int = 0, processes: int = 1
) -> Plan:
    """The plan of a run on one of the target's devices, which has it alone or, with several
    `processes`, its share of every batch.

    Raises:
        ConfigError: the model is not known here, or lacks what `lora.target_modules` names.
    """
    subject = subject_of(config, target, response_tokens=response_tokens)
    subject = replace(subject, workload=subject.workload.shared_by(processes))
    return _published(subject, target) if target.device else _here(subject, target)


def subject_of(config: Config, target: Target, *, response_tokens: int = 0) -> Subject:
    """What is known of a run."""
    device = (
        torch.device("cpu") if target.device else torch.device(pick_device(config.device, Alone()))
    )
    config, model = with_known_models(config)
    dtype = (
        _published_dtype(config, target.device) if target.device else policy_dtype(config, device)
    )
    critic = critic_model(config, device)
    return Subject(
        config=config,
        model=model,
        dtype=dtype,
        of=architecture_of(blueprint(model, config.model, config.lora, dtype=dtype)),
        workload=workload_of(config, response_tokens=response_tokens),
        rewards=tuple(_sizes(found) for found in reward_models(config, device)),
        critic=None if critic is None else _sizes(critic),
    )


# ------ This machine ---------------------------------------------------------------------------


def _here(subject: Subject, target: Target) -> Plan:
    device = pick_device(subject.config.device, Alone())
    on_cpu = device == "cpu"
    around = {"Python and libraries": resident_bytes()} if on_cpu else {"CUDA": CUDA_CONTEXT}
    room = free_bytes() + around.get("Python and libraries", 0) if on_cpu else _gpu_bytes()
    found = measured(
        lambda: _rehearsal(subject, device),
        subject.head,
        subject.workload,
        key=_key(subject),
        pass_tokens=PASS_TOKENS,
        trained=subject.of.trained,
        device=device,
    )
    peaks = _Peaks(found.held, found.drawn_bytes, found.scored_bytes, found.learnt_bytes)
    memory = _memory(subject, peaks, around, room)
    memory = memory.with_around(
        "allocator",
        allocator_bytes(subject.of, found.held, widest=_widest(subject))
        if on_cpu
        else CUDA_HOLES * memory.tensors,
    )
    phases = _measured_phases(subject, found)
    return _plan(subject, target, memory, room, phases)


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
        )
        for layers in (1, 2)
    )
    return Rehearsal(one, two, subject.of.matrices // subject.of.layers)


def _measured_phases(subject: Subject, found: Measured) -> dict[str, Phase]:
    load, of = subject.workload, subject.of
    counted = _work_of(subject)
    epoch = sum(map(_seen, load.passes())) / _seen(subject.largest_pass)
    embedding = 3 * 4 * of.head / found.rates.bytes if of.head_trained else 0.0
    lower = _reading_a_layer(subject, found) * (of.layers - of.reached)
    again = 0.0 if subject.config.ppo.cache_trunk else lower
    learning = found.training.at(of.reached) + again + found.learnt_s + embedding
    drawing = sum(map(_seen, load.chunks())) / max(map(_seen, load.chunks()))
    reading = load.reading(PASS_TOKENS)
    read = found.reading.at(of.layers) + found.scored_s
    seconds = {
        "generate": drawing
        * (
            found.prefill.at(of.layers)
            + (load.longest - 1) * found.decoding.at(of.layers)
            + load.longest * found.drawn_s
        ),
        "reference": read * sum(map(_seen, reading)) / max(map(_seen, reading)),
        "update": load.epochs * (epoch * learning + len(load.steps()) * found.step_s),
    }
    rate = counted["reference"].flops / seconds["reference"]
    seconds["score"] = counted["score"].flops / rate
    if subject.critic:
        seconds["reference"] += _critic_work(subject, reading=True).flops / rate
        seconds["update"] += _critic_work(subject, reading=False).flops / rate
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


def _reading_a_layer(subject: Subject, found: Measured) -> float:
    """Seconds of one layer without gradients, over the rows of the largest pass of the updates."""
    reading = max(map(_seen, subject.workload.reading(PASS_TOKENS)))
    return found.reading.further * _seen(subject.largest_pass) / reading


def _binding(seconds: float, *, compute: float, memory: float) -> str:
    if seconds > OVERHEAD * max(compute, memory):
        return "overhead"
    return "compute" if compute >= memory else "memory bandwidth"


def _widest(subject: Subject) -> float:
    """Bytes of the widest tensor of a layer in the largest pass, about."""
    return 4.0 * _seen(subject.largest_pass) * 4 * subject.of.hidden


def _key(subject: Subject) -> Any:
    """What the measured figures depend on beside head, workload and machine."""
    config = subject.config
    return (
        subject.model.to_json_string(),
        asdict(config.lora),
        config.model.attn_implementation,
        str(subject.dtype),
        config.ppo.gradient_checkpointing,
    )


def _gpu_bytes() -> float:
    return float(torch.cuda.mem_get_info()[1])


# ------ A device of the table -------------------------------------------------------------------


def _published(subject: Subject, target: Target) -> Plan:
    assert target.device is not None
    found = traced(
        subject.model,
        subject.config,
        dtype=subject.dtype,
        training=subject.largest_pass,
        reading=max(subject.workload.reading(PASS_TOKENS), key=_seen),
    )
    head, chunk = subject.head, max(subject.workload.chunks(), key=_seen)
    peaks = _Peaks(
        found.held,
        drawn=3 * 4.0 * len(chunk) * head.vocabulary,
        scored=published_head_bytes(head, PASS_TOKENS, gradients=False),
        learnt=published_head_bytes(
            head, sum(row.response for row in subject.largest_pass), gradients=True
        ),
    )
    room = target.device.memory
    memory = _memory(subject, peaks, {"CUDA": CUDA_CONTEXT}, room)
    memory = memory.with_around("allocator", CUDA_HOLES * memory.tensors)
    phases = {
        name: _roofline(counted, target.device, str(subject.dtype).removeprefix("torch."), launches)
        for (name, counted), launches in zip(
            _work_of(subject, with_critic=True).items(), _launches(subject, found), strict=True
        )
    }
    return _plan(subject, target, memory, room, phases)


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


def _published_dtype(config: Config, device: Device | None) -> torch.dtype:
    """The precision of the weights on a device of the table, as a run there chooses it."""
    assert device is not None
    if config.model.dtype != "auto":
        return getattr(torch, config.model.dtype)
    return torch.bfloat16 if config.lora.r and device.bfloat16 else torch.float32


# ------ Both ------------------------------------------------------------------------------------


class _Peaks(NamedTuple):
    held: Any
    drawn: float
    scored: float
    learnt: float


def _memory(subject: Subject, peaks: _Peaks, around: dict[str, float], room: float) -> Memory:
    """Memory by part, with passes as large as `ppo.micro_batch_tokens` lets them be."""
    of, load, config = subject.of, subject.workload, subject.config
    standing = standing_bytes(of, adam=config.ppo.adam, in_4_bits=config.model.load_in_4bit)
    if config.ppo.ema_decay:
        standing["moving average"] = float(of.trained_bytes)
    if subject.rewards:
        standing["reward model"] = float(sum(reward.weight_bytes for reward in subject.rewards))
    if subject.critic:
        standing["critic"] = subject.critic.weight_bytes + 12.0 * subject.critic.parameters
    update = update_bytes(of, peaks.held, peaks.learnt)
    if subject.critic:
        update["critic's activations"] = update["activations"] * _relative_size(subject.critic, of)
    if config.ppo.cache_trunk:
        width = max(row.seen for row in load.rows)
        standing["states below the adapter"] = 4.0 * len(load.rows) * width * of.hidden
    chunk = max(load.chunks(), key=_seen)
    positions = len(chunk) * (max(row.prompt for row in chunk) + load.longest)
    passing = {
        "update": update,
        "generate": {
            "KV cache": cache_bytes(of, positions),
            "sampling": max(peaks.drawn, peaks.held.reading.at(of.layers)),
        },
        "reference": {"reading": peaks.held.reading.at(of.layers) + peaks.scored},
    }
    return Memory(standing, passing, around)


def _relative_size(critic: Architecture, policy: Architecture) -> float:
    return critic.hidden * critic.layers / (policy.hidden * policy.layers)


def _plan(
    subject: Subject, target: Target, memory: Memory, room: float, phases: dict[str, Phase]
) -> Plan:
    load = subject.workload
    share = load.evaluated / len(load.rows)
    evaluation = share * sum(phases[name].seconds for name in ("generate", "score", "reference"))
    notes = [*load.notes]
    if not subject.rewards:
        notes.append("what a reward function takes is not counted")
    if target.device:
        notes.append(
            f"published rates of {target.device.name}, of which products reach "
            f"{REACHED_FLOPS:.0%} and reads {REACHED_BYTES:.0%}: not measured"
        )
    return Plan(target, subject.of, load, memory, room, phases, evaluation, tuple(notes))


def _work_of(subject: Subject, *, with_critic: bool = False) -> dict[str, Work]:
    """FLOPs and bytes of each phase of an iteration."""
    of, load = subject.of, subject.workload
    rows = [(row.prompt, row.response) for row in load.rows]
    found = {
        "generate": work.generate(of, rows, chunks=len(load.chunks())),
        "score": _scoring(subject),
        "reference": work.reference(of, rows, passes=len(load.reading(PASS_TOKENS))),
        "update": work.update(
            of,
            rows,
            epochs=load.epochs,
            passes=len(load.passes()),
            steps=len(load.steps()),
            recomputed=subject.config.ppo.gradient_checkpointing,
            cached=subject.config.ppo.cache_trunk,
        ),
    }
    if with_critic and subject.critic:
        found["reference"] += _critic_work(subject, reading=True)
        found["update"] += _critic_work(subject, reading=False)
    return found


def _scoring(subject: Subject) -> Work:
    """The reward models' pass over prompts and responses, as many tokens as the policy's."""
    rows = [(row.prompt + 1, row.response) for row in subject.workload.rows]
    found = Work()
    for of in subject.rewards:
        flops = work.forward_flops(of, Amount.of(rows)._replace(scored=0))
        found += Work(flops, float(of.weight_bytes))
    return found


def _critic_work(subject: Subject, *, reading: bool) -> Work:
    """A critic's own passes: one when values are collected, and those of the updates."""
    assert subject.critic is not None
    load = subject.workload
    rows = [(row.prompt, row.response) for row in load.rows]
    if reading:
        return work.reference(subject.critic, rows, passes=len(load.reading(PASS_TOKENS)))
    passes, steps = len(load.passes()), len(load.steps())
    epochs = min(load.epochs, subject.config.critic.epochs or load.epochs)
    return work.update(subject.critic, rows, epochs=epochs, passes=passes, steps=steps)


def _sizes(found: Classifier) -> Architecture:
    return architecture_of(classifier_blueprint(found.config, dtype=found.dtype))


def _seen(rows: Sequence[Row]) -> int:
    return sum(row.seen for row in rows)
