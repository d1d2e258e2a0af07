"""What is counted whatever the device: the work of each phase, and memory by part."""

from __future__ import annotations

from typing import NamedTuple

from ppo_lab.models.logprobs import TILE
from ppo_lab.plan import work
from ppo_lab.plan.architecture import Architecture
from ppo_lab.plan.memory import (
    Memory,
    average_bytes,
    cache_bytes,
    standing_bytes,
    trained_whole,
    update_bytes,
)
from ppo_lab.plan.rehearsal import Held
from ppo_lab.plan.subject import Subject, seen
from ppo_lab.plan.work import Amount, Work
from ppo_lab.trainer import PASS_TOKENS

# Bytes an entry of the vocabulary while the exact KL is made: both logits, both softmaxes, the
# probabilities, the difference and the product, in float32.
FULL_KL_HELD = 28.0


class Phase(NamedTuple):
    """What a phase of an iteration has to do, how long it takes, and what makes it so long."""

    work: Work
    seconds: float
    binds: str


class Estimate(NamedTuple):
    """What a run takes on one device, and the bytes that it has there."""

    memory: Memory
    room: float
    phases: dict[str, Phase]


def work_of(subject: Subject, *, with_critic: bool = False) -> dict[str, Work]:
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
    found["reference"] += full_kl_work(subject)
    if with_critic and subject.critic:
        found["reference"] += critic_work(subject, reading=True)
        found["update"] += critic_work(subject, reading=False)
    return found


def full_kl_work(subject: Subject) -> Work:
    """What `ppo.kl_penalty=full` adds to the reference's work: nothing with another penalty."""
    if subject.config.ppo.kl_penalty != "full":
        return Work()
    load, cached = subject.workload, subject.config.ppo.cache_trunk
    rows = [(row.prompt, row.response) for row in load.rows]
    return work.full_kl(subject.of, rows, passes=len(load.reading(PASS_TOKENS)), cached=cached)


def _scoring(subject: Subject) -> Work:
    """The reward models' pass over prompts and responses, as many tokens as the policy's."""
    rows = [(row.prompt + 1, row.response) for row in subject.workload.rows]
    found = Work()
    for of in subject.rewards:
        flops = work.forward_flops(of, Amount.of(rows)._replace(scored=0))
        found += Work(flops, float(of.weight_bytes))
    return found


def critic_work(subject: Subject, *, reading: bool) -> Work:
    """A critic's own passes: one when values are collected, and those of the updates."""
    assert subject.critic is not None
    load = subject.workload
    rows = [(row.prompt, row.response) for row in load.rows]
    if reading:
        return work.reference(subject.critic, rows, passes=len(load.reading(PASS_TOKENS)))
    passes, steps = len(load.passes()), len(load.steps())
    epochs = min(load.epochs, subject.config.critic.epochs or load.epochs)
    return work.update(subject.critic, rows, epochs=epochs, passes=passes, steps=steps)


class Peaks(NamedTuple):
    """What passes hold by the number of layers, and bytes of the head's largest steps: a draw, a
    pass that scores, one that learns.
    """

    held: Held
    drawn: float
    scored: float
    learnt: float


def memory_of(subject: Subject, peaks: Peaks, around: dict[str, float]) -> Memory:
    """Memory by part, with passes as large as `ppo.micro_batch_tokens` lets them be."""
    of, load, config = subject.of, subject.workload, subject.config
    standing = standing_bytes(of, adam=config.ppo.adam, in_4_bits=config.model.load_in_4bit)
    if config.ppo.ema_decay:
        standing["moving average"] = average_bytes(of)
    if subject.rewards:
        standing["reward model"] = float(sum(reward.weight_bytes for reward in subject.rewards))
    if subject.critic:
        judge = subject.critic
        standing["critic"] = trained_whole(
            judge.parameters, judge.weight_bytes, adam=config.ppo.adam
        )
    update = update_bytes(of, peaks.held, peaks.learnt)
    if subject.critic:
        update["critic's activations"] = update["activations"] * _relative_size(subject.critic, of)
    if config.ppo.cache_trunk:
        width = max(row.seen for row in load.rows)
        standing["states below the adapter"] = 4.0 * len(load.rows) * width * of.hidden
    chunk = max(load.chunks(), key=seen)
    positions = len(chunk) * (max(row.prompt for row in chunk) + load.longest)
    passing = {
        "update": update,
        "generate": {
            "KV cache": cache_bytes(of, positions),
            "sampling": max(peaks.drawn, peaks.held.reading.at(of.layers)),
        },
        "reference": {
            "reading": peaks.held.reading.at(of.layers) + max(peaks.scored, _full_kl_bytes(subject))
        },
    }
    return Memory(standing, passing, around)


def _full_kl_bytes(subject: Subject) -> float:
    """The most that the exact KL holds over the vocabulary, of the tokens that it takes at once."""
    if subject.config.ppo.kl_penalty != "full":
        return 0.0
    parts = subject.workload.reading(PASS_TOKENS)
    scored = max(sum(row.response for row in part) for part in parts)
    return FULL_KL_HELD * min(TILE, scored * subject.of.vocabulary)


def _relative_size(critic: Architecture, policy: Architecture) -> float:
    """A critic, trained whole, against the layers of the policy that gradients pass through."""
    return critic.hidden * critic.layers / (policy.hidden * max(policy.reached, 1))
