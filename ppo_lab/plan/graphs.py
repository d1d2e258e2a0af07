"""Which passes of a run a GPU of the table records as CUDA graphs, and what is kept for them: the
conditions of `Trunk` and of `ppo_lab.recorded`, read off a run's settings.

Passes are taken to be of shapes that came before, so that none is recorded anew; where the lengths
of a run's texts differ much, some are.
"""

from __future__ import annotations

from typing import NamedTuple

from ppo_lab.models.fast.graphed import ALIGNED, ROOMY
from ppo_lab.models.fast.recording import ROOM, rounded_up
from ppo_lab.plan.memory import Memory, cache_bytes
from ppo_lab.plan.subject import Subject, seen
from ppo_lab.plan.workload import Row


class Recorded(NamedTuple):
    """What is launched as CUDA graphs: a sampled token, the passes that only read, those of the
    updates. `kept`: buffers and graphs of a generation serve the next one.
    """

    tokens: bool
    kept: bool
    reading: bool
    learning: bool

    def without_room(self) -> Recorded:
        """What is left where a GPU is too full to keep anything from one pass to the next."""
        return Recorded(self.tokens, kept=False, reading=False, learning=False)


def recorded_by(subject: Subject, *, known: bool) -> Recorded:
    """What is recorded where there is room; `known` are policies whose layers are known one by one,
    and may be passed so.
    """
    model, ppo = subject.config.model, subject.config.ppo
    tokens = known and model.cuda_graphs and model.fast_layers
    alike = subject.critic_is_known and not (ppo.cache_trunk or model.torch_compile)
    passes = tokens and alike and subject.processes == 1
    apart = ppo.gradient_checkpointing or ppo.micro_batch_tokens != 0
    return Recorded(tokens, kept=tokens, reading=passes, learning=passes and not apart)


def records_again(subject: Subject) -> bool:
    """Whether a generation's parts are of more than one shape: only the latest is kept."""
    shapes = {(len(part), rounded_up(_prompt(part), ALIGNED)) for part in subject.workload.chunks()}
    return len(shapes) > 1


def with_kept(memory: Memory, subject: Subject, recorded: Recorded) -> Memory:
    """The same where a generation's buffers stand beside later passes, and recorded passes work in
    memory that nobody else is given; what the first, launched ones took goes back when asked for.
    """
    passing = dict(memory.passing)
    if recorded.kept:
        for phase in ("update", "reference"):
            passing[phase] = {**passing[phase], "KV cache, kept": _buffers(subject)}
    pools = [sum(memory.passing["reference"].values())] if recorded.reading else []
    pools += [sum(memory.passing["update"].values())] if recorded.learning else []
    found = Memory(memory.standing, passing, memory.around)
    return found.with_around("recorded passes", max(pools)) if pools else found


def has_room(memory: Memory, room: float) -> bool:
    """Whether enough of a GPU is free, beside what stands and is kept, for anything to be kept; and
    whether all of it fits.
    """
    kept = memory.passing["update"].get("KV cache, kept", 0.0)
    taken = sum(memory.standing.values()) + kept + memory.around["CUDA"]
    return taken <= (1 - ROOM) * room and memory.total <= room


def _buffers(subject: Subject) -> float:
    """Bytes of the buffers of a generation, which has room for the longest response."""
    chunk = max(subject.workload.chunks(), key=seen)
    width = rounded_up(_prompt(chunk), ALIGNED)
    columns = rounded_up(width + subject.config.generation.max_new_tokens, ROOMY)
    return cache_bytes(subject.of, len(chunk) * columns)


def _prompt(rows: tuple[Row, ...]) -> int:
    return max(row.prompt for row in rows)
