"""Passes over batches as CUDA graphs: the clipped updates', and those that only read.

A GPU works through the pass of a small model faster than Python launches its kernels, and the
passes of a run are alike: so each is recorded once for every shape that it comes in. Batches are
padded to a few shapes, and where the trained tokens lie is looked up before a pass, for nothing in
it may ask.

The first recorded pass of the updates is made by launching too, and its gradients are compared.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from ppo_lab.models.fast.recording import ByShape, Recorder, has_room, rounded_up
from ppo_lab.modules import parameters_of
from ppo_lab.processes.alone import Whole
from ppo_lab.types import Batch, Tokens, brought, tensors_of, with_tensors

log = logging.getLogger(__name__)

Record = TypeVar("Record", Batch, Tokens)

# Columns come in multiples of this, and looked-at tokens in so many steps up to all.
COLUMNS = 16
STEPS = 8

# How far the gradients of a recorded pass may be from those of the same pass launched.
TOLERANCE = 1e-2

Losses = Callable[[Batch], tuple[Tensor, Tensor, Tensor]]


class RecordedPasses:
    """Passes that are launched at once where that is possible, and otherwise left to the caller."""

    def __init__(
        self,
        trunks: Sequence[Any],
        trained: Sequence[Tensor],
        *,
        alone: bool,
        device: torch.device | str = "cpu",
    ) -> None:
        """`trunks` are those that passes go through, on the device, and `trained` what gradients
        are taken of; with `alone`, no other process has a part in either.
        """
        self.trunks, self.trained, self.alone = trunks, list(trained), alone
        self.device = torch.device(device)
        self._passes: ByShape | None = None
        self._used: dict[Hashable, list[Tensor]] = {}
        self._gradients: dict[Tensor, Tensor] = {}
        self._templates: dict[Hashable, Any] = {}
        self._weights: list[tuple[int, bool]] = []
        self._proved = False
        self._begun: ByShape | None = None

    @classmethod
    def of(cls, policy: Any, critic: Any, reference: Any, models: Whole) -> RecordedPasses:
        """Those of a trainer's models."""
        trunks = list(dict.fromkeys((policy.trunk, critic.trunk, reference.trunk)))
        trained = models.parameters
        return cls(trunks, trained, alone=type(models) is Whole, device=trained[0].device)

    def begin(self, tokens: Tokens) -> Tokens:
        """Ask what must be asked before passes over parts of these tokens: whether they may be
        recorded, and then where the trained tokens lie.
        """
        self._begun = self._ready(tokens)
        return tokens if self._begun is None else tokens.heard()

    def learn(
        self,
        losses: Losses,
        batch: Batch,
        n_tokens: Tensor,
        *,
        key: Hashable,
        only: bool = False,
    ) -> tuple[Tensor, Tensor] | None:
        """Add the gradients of summed losses over `n_tokens`; what `losses` gives beside the loss.

        Batch and `n_tokens` are on the host. None where nothing was done. `key` stands for all of
        `losses` that the batch does not say. With `only` there are no gradients yet, and none come
        before these are forgotten.
        """
        passes = self._begun
        if passes is None or not passes.recorder.works:
            return None
        key = ("learn", key)
        part = fitted(batch)

        def gradients(n_tokens: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
            loss, sums, extremes = losses(with_tensors(part, given))
            found = torch.autograd.grad(loss / n_tokens, self.trained, allow_unused=True)
            pairs = [(p, g) for p, g in zip(self.trained, found, strict=True) if g is not None]
            self._used[key] = [p for p, _ in pairs]
            return (sums, extremes, *self._put(pairs))

        given = (n_tokens, *tensors_of(part))
        sums, extremes, *found = passes(key, gradients, *given)
        if passes.was_recorded and not self._proved:
            found = [x.clone() for x in found]  # launched ones come to the same place
            launched = gradients(*(brought(x, self.device) for x in given))
            sums, extremes, *found = self._prove(launched, found)
        if only:  # they may stay where the next pass will write
            for parameter, gradient in zip(self._used[key], found, strict=True):
                parameter.grad = gradient
        else:
            add_gradients(self._used[key], found)
        return sums, extremes

    def read(self, function: Callable[..., Any], tokens: Tokens, **at: Any) -> Any:
        """What `function(tokens, **at)` gives: a tensor, or a record of tensors, of the samples'
        (batch, time); None where nothing was done.
        """
        passes = self._begun
        if passes is None or not passes.recorder.works:
            return None
        key = ("read", function, *at.items())
        assert tokens.host is not None, "begin() comes first"
        part, time = fitted(tokens.host), tokens.responses.shape[1]

        def reading(*given: Tensor) -> tuple[Tensor, ...]:
            result = function(with_tensors(part, given), **at)
            self._templates[key] = without_numbers(result)
            return tuple(tensors_of(result))

        found = passes(key, reading, *tensors_of(part))
        return with_tensors(self._templates[key], [x[:, :time].clone() for x in found])

    def let_go(self) -> bool:
        """Give back the memory that recorded passes keep, and record no more; whether there was
        any.
        """
        freed = sum(trunk.let_go() for trunk in self.trunks) > 0
        if self._passes is not None and len(self._passes):
            log.warning("GPU memory ran out: passes are no longer recorded as CUDA graphs")
            self._stop()
            freed = True
        return freed

    def _ready(self, tokens: Tokens) -> ByShape | None:
        """What records passes over these tokens, if they may be; all is forgotten where weights
        have moved to other addresses.
        """
        seen = tokens.queries.shape[1] + tokens.responses.shape[1] + 2 * COLUMNS
        if not self.alone or any(map(is_watched, self.trained)):
            return None
        if not all(trunk.passes_may_be_recorded(seen) for trunk in self.trunks):
            return None
        if self._passes is None:
            self._passes = ByShape(Recorder(self.device), self.device)
        if not self._passes.recorder.works or not (len(self._passes) or has_room(self.device)):
            return None
        held = [p for trunk in self.trunks for p in parameters_of(trunk.model)]
        weights = [(p.data_ptr(), p.requires_grad) for p in (*held, *self.trained)]
        if weights != self._weights:
            self._forget()
            self._weights = weights
        return self._passes

    def _put(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Parameters' gradients in places that passes of all shapes share: a recording keeps what
        it gives.
        """
        for parameter, gradient in pairs:
            if parameter not in self._gradients:
                self._gradients[parameter] = torch.empty_like(gradient)
        there = [self._gradients[parameter] for parameter, _ in pairs]
        torch._foreach_copy_(there, [gradient for _, gradient in pairs])
        return there

    def _forget(self) -> None:
        assert self._passes is not None
        self._passes.forget()
        self._gradients.clear()

    def _prove(self, launched: Sequence[Tensor], found: Sequence[Tensor]) -> Sequence[Tensor]:
        """The results of the pass as launched; where the recorded one's gradients are others, no
        pass is recorded from now on. What is not finite proves nothing.
        """
        pairs = list(zip(launched[2:], found, strict=True))
        equal = all(bool((a - b).norm() <= TOLERANCE * a.norm() + 1e-12) for a, b in pairs)
        finite = all(bool(a.isfinite().all()) for a, _ in pairs)
        self._proved = equal and finite
        if finite and not equal:
            log.warning("passes are not recorded as CUDA graphs: their gradients prove unequal")
            self._stop()
        return launched

    def _stop(self) -> None:
        assert self._passes is not None
        self._forget()
        self._passes.recorder.let_go()
        self._passes.recorder.works = False


def fitted(record: Record) -> Record:
    """The record, which is on the host, in one of a few shapes, and with the places that are
    looked at.
    """
    tokens = record.tokens if isinstance(record, Batch) else record
    wide = record.padded(
        rounded_up(tokens.queries.shape[1], COLUMNS), rounded_up(tokens.responses.shape[1], COLUMNS)
    )
    tokens = wide.tokens if isinstance(wide, Batch) else wide
    mask = tokens.mask
    wanted = rounded_up(max(int(mask.sum()), 1), -(-mask.numel() // STEPS))
    tokens = replace(tokens, kept=_places(mask, wanted))
    return replace(wide, tokens=tokens) if isinstance(wide, Batch) else tokens  # type: ignore


def looked_up(batch: Batch, device: torch.device) -> Batch:
    """The batch, which is on the host but for `tokens.below`, on a device, with the places that are
    looked at, of trained tokens alone, and with what the host knows of the tokens.
    """
    tokens = replace(batch.tokens, kept=_places(batch.tokens.mask, 0))
    there = replace(batch, tokens=tokens).brought(device)
    known = replace(batch.tokens, below=None)
    return replace(there, tokens=replace(there.tokens, host=known))


def _places(mask: Bool[Tensor, "batch time"], least: int) -> Tensor:
    """The places where the mask is True, and others up to the least number."""
    flat = mask.flatten().numpy()  # NumPy starts no threads for so little
    real, padding = np.flatnonzero(flat), np.flatnonzero(~flat)
    more = padding[: max(0, least - len(real))]
    return torch.from_numpy(np.sort(np.concatenate([real, more])))


def add_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Add to `.grad`, which never is one of these tensors itself."""
    held = [p.grad for p in parameters if p.grad is not None]
    if len(held) == len(parameters):
        torch._foreach_add_(held, list(gradients))
        return
    assert not held, "either all have a gradient or none"
    for parameter, gradient in zip(
        parameters, torch._foreach_add(list(gradients), 0.0), strict=True
    ):
        parameter.grad = gradient


def is_watched(parameter: Tensor) -> bool:
    """Whether Python is to be called with its gradient, which a recording would not do."""
    hooks = parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    return bool(hooks)


def without_numbers(record: Any) -> Any:
    """What `with_tensors` needs of a record, and none of its memory."""
    return with_tensors(record, [x.new_empty(0) for x in tensors_of(record)])
