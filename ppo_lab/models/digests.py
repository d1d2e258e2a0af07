"""A model's weights told by a few of them: cheap, and other weights are told from these."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

FINGERPRINTED = 64  # of each weight the first elements


def digest_of_weights(
    named: Iterable[tuple[str, Tensor]], *, rounded_to: torch.dtype | None = None
) -> str:
    """SHA-256 of names, shapes and first elements, these as they are or rounded."""
    weights = hashlib.sha256()
    for name, weight in named:
        first = weight.detach().flatten()[:FINGERPRINTED].to(rounded_to or weight.dtype).cpu()
        weights.update(f"{name} {tuple(weight.shape)}".encode())
        weights.update(first.contiguous().view(torch.uint8).numpy().tobytes())
    return weights.hexdigest()
