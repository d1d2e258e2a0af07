"""What a run will take: memory by part, work and seconds by phase, and what binds."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ppo_lab.config import Config
from ppo_lab.plan.architecture import Architecture
from ppo_lab.plan.counted import Phase
from ppo_lab.plan.devices import Device
from ppo_lab.plan.here import estimate_here
from ppo_lab.plan.memory import Memory
from ppo_lab.plan.published import REACHED_BYTES, REACHED_FLOPS, estimate_published
from ppo_lab.plan.subject import Subject, Target, seen, subject_of
from ppo_lab.plan.workload import Workload


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


def plan_of(
    config: Config, target: Target, *, response_tokens: int = 0, processes: int = 1
) -> Plan:
    """The plan of a run on one of the target's devices, which has it alone or, with several
    `processes`, its share of every batch.

    Raises:
        ConfigError: the model is not known here, or lacks what `lora.target_modules` names.
    """
    subject = subject_of(config, target, response_tokens=response_tokens)
    subject = replace(subject, workload=subject.workload.shared_by(processes), processes=processes)
    device = target.device
    found = estimate_published(subject, device) if device else estimate_here(subject)
    load, of_phases = subject.workload, found.phases
    return Plan(
        target=target,
        of=subject.of,
        workload=load,
        memory=found.memory,
        room=found.room,
        phases=of_phases,
        evaluation_s=_evaluation_s(load, of_phases),
        notes=_notes(subject, device),
    )


def _evaluation_s(load: Workload, of_phases: dict[str, Phase]) -> float:
    """Seconds of an evaluation, by what an iteration's sampling and reading take: sampling goes
    with the rows and the longest response, reading with the tokens.
    """
    if not load.examined:
        return 0.0
    longest = max(row.response for row in load.examined) / load.longest
    sampled = len(load.examined) / len(load.rows) * longest
    read = seen(load.examined) / seen(load.rows)
    return sampled * of_phases["generate"].seconds + read * (
        of_phases["score"].seconds + of_phases["reference"].seconds
    )


def _notes(subject: Subject, device: Device | None) -> tuple[str, ...]:
    """What the reader of a plan should know that its figures do not say."""
    notes = [*subject.workload.notes]
    if not subject.rewards:
        notes.append("what a reward function takes is not counted")
    if subject.config.model.torch_compile:
        notes.append("what model.torch_compile saves is not counted")
    if device:
        notes.append(
            f"published rates of {device.name}, of which passes are taken to reach "
            f"{REACHED_FLOPS:.0%} and reads {REACHED_BYTES:.0%}: not measured"
        )
    return tuple(notes)
