"""How much memory a run takes, by part.

What stands the whole time (weights, reference, gradients, Adam's moments, the reward model) is
counted; what comes and goes is what rehearsals hold. On a CPU two things come on top: Python with
its libraries, and what the C library's allocator keeps.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ppo_lab.plan.architecture import Architecture

if TYPE_CHECKING:
    from ppo_lab.plan.rehearsal import Held

GIB = 2**30

# Bytes of Adam's two moments a trained weight where they lie in 8 bits.
MOMENTS_IN_8_BITS = 2.04

# Bytes of a weight in 4 bits, its quantised constants included (QLoRA: Dettmers et al. 2023,
# arXiv:2305.14314, section 3).
IN_4_BITS = 0.516

# What is made and let go of between tensors that stay leaves holes, of which glibc gives this share
# to nobody; measured on Llama, GPT-2, GPT-NeoX and BLOOM. Larger blocks it maps one by one.
HOLES = 0.3
MAPPED = 32 * 2**20

# What of the free memory passes may take: activations are known well, what is around them less so.
SHARE_OF_FREE = 0.7

# What CUDA's own kernels and libraries take of a GPU, and what its caching allocator keeps.
CUDA_CONTEXT = 0.5 * GIB
CUDA_HOLES = 0.1


def standing_bytes(
    of: Architecture, *, adam: str = "torch", in_4_bits: bool = False
) -> dict[str, float]:
    """Bytes that a policy takes the whole time, by part; without an adapter it is trained whole,
    and held to a frozen copy.
    """
    adapter = of.trained_bytes if not of.has_own_reference else 0
    weights: float = of.weight_bytes - adapter
    if in_4_bits:
        weights += (of.matrices - of.in_experts) * (IN_4_BITS - of.bytes_per_weight)
    moments = moment_bytes(of.trained, of.trained_bytes, in_8_bits=adam == "8bit")
    if of.has_own_reference:
        return {
            "weights": weights,
            "reference": weights,
            "gradients": of.trained_bytes,
            "Adam's moments": moments,
        }
    return {"weights": weights, "adapter and optimizer": 2 * adapter + moments}


def moment_bytes(weights: int, size: int, *, in_8_bits: bool = False) -> float:
    """Bytes of Adam's two moments of so many trained weights, which themselves take `size` bytes:
    but for 8 bits, moments are in the precision of what they are of.
    """
    return MOMENTS_IN_8_BITS * weights if in_8_bits else 2.0 * size


def average_bytes(of: Architecture) -> float:
    """Bytes of the policy's moving average, which is float32."""
    return 4.0 * of.trained


def trained_whole(weights: int, size: int, *, adam: str = "torch") -> float:
    """Bytes of so many weights of `size` bytes, all of them trained, as a critic's of its own are:
    themselves, their gradients and Adam's moments.
    """
    return 2.0 * size + moment_bytes(weights, size, in_8_bits=adam == "8bit")


@dataclass(frozen=True)
class Memory:
    """Bytes by part. `standing` lasts; of `passing` (what a phase holds beside it, by phase and
    part) the largest phase counts; `around` is what is not tensors.
    """

    standing: dict[str, float]
    passing: dict[str, dict[str, float]]
    around: dict[str, float] = field(default_factory=dict)

    def with_around(self, name: str, size: float) -> Memory:
        """The same with something more that is not tensors."""
        return replace(self, around={**self.around, name: size})

    @property
    def largest_phase(self) -> str:
        """The phase that holds most."""
        return max(self.passing, key=lambda phase: sum(self.passing[phase].values()))

    @property
    def tensors(self) -> float:
        """The most bytes that tensors take at once: what a GPU's own figure shows."""
        return sum(self.standing.values()) + sum(self.passing[self.largest_phase].values())

    @property
    def total(self) -> float:
        """Everything at its highest."""
        return self.tensors + sum(self.around.values())

    @property
    def elsewhere(self) -> dict[str, float]:
        """What other phases than the largest hold, by part and phase: never beside its own."""
        return {
            f"{part}, in {phase}": size
            for phase, parts in self.passing.items()
            if phase != self.largest_phase
            for part, size in parts.items()
        }

    @property
    def parts(self) -> dict[str, float]:
        """What the total is made of."""
        return {**self.standing, **self.passing[self.largest_phase], **self.around}


def update_bytes(of: Architecture, held: Held, head: float) -> dict[str, float]:
    """What a forward and backward pass holds: activations of the layers that gradients pass
    through, and at their end the head's tiles with the gradient of a trained head.
    """
    head_gradient = of.head * 4 if of.head_trained else 0
    return {
        "activations": held.kept.at(of.reached),
        "log-prob tiles": max(head, held.passing.at(of.reached)) + head_gradient,
    }


def cache_bytes(of: Architecture, positions: int) -> float:
    """Keys and values of so many positions, of every layer."""
    return positions * of.cached * of.bytes_per_weight


def allocator_bytes(of: Architecture, held: Held, *, widest: float) -> float:
    """What glibc keeps of a forward pass; `widest` are the bytes of its largest tensors, which
    leave no holes where they are mapped one by one.
    """
    return HOLES * held.churned.at(of.reached) * (1.0 if widest < MAPPED else 0.5)
