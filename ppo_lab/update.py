"""The clipped updates: a fixed batch in, a moved policy and what happened on the way out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_lab import core
from ppo_lab.arrivals import Asked
from ppo_lab.averaging import MovingAverage
from ppo_lab.config import PPOSection
from ppo_lab.memory import Passes, tokens_that_fit
from ppo_lab.packing import pack_by_tokens
from ppo_lab.processes.alone import Alone, Whole
from ppo_lab.recorded import RecordedPasses, looked_up
from ppo_lab.steps import (
    OF_VALUES,
    SUMS,
    OptimizerStep,
    UpdateStats,
    may_be_taken,
    summary,
    sums_of,
)
from ppo_lab.types import Batch, Forward, Tokens, brought


class Turn(NamedTuple):
    """Who learns from a pass over the batch."""

    policy: bool = True
    critic: bool = True


EVERYBODY = Turn()


class TrainingDiverged(RuntimeError):
    """The run cannot go on to any use; the message says which checks to make.

    `batch` is the optimizer batch that was at fault, where there is one. Several processes find
    out together.
    """

    shared = True

    def __init__(self, message: str, batch: Batch | None = None) -> None:
        super().__init__(message)
        self.batch = batch


class ClippedUpdates:
    """Several epochs of clipped, mini-batched updates on one batch, of a policy and its critic.

    `critic` gives the values: the policy itself, whose head stands on its trunk, or a model of its
    own, whose loss and gradient norm are then its own too.

    The loss of an optimizer step is the mean over the real tokens of its optimizer batch, so that
    neither the mini-batch size nor `micro_batch_tokens` changes a step whose optimizer batch stays
    the same.
    """

    def __init__(
        self,
        policy: Any,
        critic: Any,
        models: Whole,
        config: PPOSection,
        processes: Alone | None = None,
        *,
        recorded: RecordedPasses | None = None,
        average: MovingAverage | None = None,
    ) -> None:
        self.policy, self.critic, self.models, self.config = policy, critic, models, config
        self.processes, self.recorded, self.average = processes or Alone(), recorded, average
        self.apart = critic is not policy
        self.clipped_together = _by_model(models.parameters, critic if self.apart else None)
        self.passes = Passes("training", recorded.let_go if recorded else bool)
        self.skipped_in_a_row = 0
        self.most_tokens = 0  # of a pass, once chosen
        self._unheard: tuple[OptimizerStep, Batch] | None = None

    def prepare(self, tokens: Tokens) -> None:
        """Ask what must be asked before updates on these tokens."""
        if self.recorded is not None:
            self.recorded.begin(tokens)

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.models.parameters[0].device

    def launch(
        self,
        batch: Batch,
        *,
        temperature: float,
        seed: tuple[int, int],
        critic_only: bool = False,
        critic_epochs: int = 0,
    ) -> list[list[OptimizerStep]]:
        """The optimizer steps of all epochs, the last of which a device may still be at work on;
        `prepare` comes first.

        `batch` lies on the host, but for `tokens.below`, for all that a step depends on must be
        known there. `seed` is (run seed, iteration) and fixes the order of the mini-batches. With
        `critic_only` the policy stays as it is; the critic learns in the first `critic_epochs`
        epochs (0 = all).

        Raises:
            TrainingDiverged: `max_skipped_updates` optimizer steps in a row had to be skipped.
        """
        epochs: list[list[OptimizerStep]] = []
        made = self.config.ppo_epochs
        if critic_only:  # in later ones nobody would learn
            made = min(made, critic_epochs or made)
        for epoch in range(made):
            epochs.append([])
            turn = Turn(not critic_only, not 0 < critic_epochs <= epoch)
            for rows in self.optimizer_batches(len(batch), seed=(*seed, epoch)):
                epochs[-1].append(self.optimizer_step(batch[rows], temperature, turn))
            if self.config.early_stopping and self._moved_too_far(epochs[-1]):
                break
        return epochs

    def outcome(self, epochs: list[list[OptimizerStep]]) -> UpdateStats:
        """What the steps of all epochs did, once the last is done.

        Raises:
            TrainingDiverged: as in `launch`.
        """
        self._hear_of_the_last()
        return summary(epochs)

    def optimizer_batches(self, n: int, *, seed: tuple[int, ...]) -> Iterator[Tensor]:
        """The rows of each optimizer step, shuffled; the last batch may be smaller, and no row is
        left out.
        """
        generator = torch.Generator().manual_seed(hash_seed(*seed))
        mini = self.config.mini_batch_size or self.config.batch_size
        yield from torch.randperm(n, generator=generator).split(
            mini * self.config.gradient_accumulation_steps
        )

    def optimizer_step(
        self, batch: Batch, temperature: float, turn: Turn = EVERYBODY
    ) -> OptimizerStep:
        """One step on one optimizer batch, in as many passes as memory asks for.

        Each process passes its share of the samples; sums, gradients and the decision are of all.
        A GPU of one process decides by itself, so that it never waits for the host, which hears of
        it a step late.
        """
        groups = self._groups(batch)
        sums, extremes = self.passes.until_it_fits(
            lambda size: self._backward(
                batch, [p for rows in groups for p in rows.split(size)], temperature, turn
            ),
            max(map(len, groups), default=1),
            bool if self.processes.size == 1 else None,
        )
        made, late = [], self.models.steps_late

        def judge(norms: Tensor) -> bool | Tensor:
            numbers = torch.cat([sums, extremes, brought(norms, sums.device)]).double()
            limit = self.config.ratio_threshold
            made.append(OptimizerStep(Asked(numbers), self.processes.each, limit))
            if late:
                return may_be_taken(numbers, ratio_threshold=limit)
            return self._heard(made[0], batch)

        self.models.step(judge, self.clipped_together, max_norm=self.config.max_grad_norm)
        if self.average is not None:
            self.average.update()
        self._hear_of_the_last()
        self._unheard = (made[0], batch) if late else None
        return made[0]

    def _backward(
        self, batch: Batch, passes: list[Tensor], temperature: float, turn: Turn
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the batch's mean loss, summed over all passes; the sums and ratio extremes
        of those made here.
        """
        self.models.zero_grad()
        n_tokens = batch.tokens.mask.sum().clamp(min=1)
        passes = self.models.evened(passes)
        if len(passes) == 1:  # as is usual: nothing is to be added up
            with self.models.accumulating(last=True):
                return self._pass(_part(batch, passes[0]), n_tokens, temperature, turn, only=True)
        sums = torch.zeros(len(SUMS), device=self.device)
        extremes = torch.ones(2, device=self.device)
        for i, rows in enumerate(passes):
            part = _part(batch, rows)
            with self.models.accumulating(last=i == len(passes) - 1):
                pass_sums, pass_extremes = self._pass(part, n_tokens, temperature, turn)
            sums += pass_sums
            extremes = torch.stack(
                [extremes[0].minimum(pass_extremes[0]), extremes[1].maximum(pass_extremes[1])]
            )
        return sums, extremes

    def _pass(
        self, batch: Batch, n_tokens: Tensor, temperature: float, turn: Turn, *, only: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Adds the gradients of one pass, which may be the only one of its optimizer step; its sums
        and ratio extremes.
        """
        # Passes of a token limit are of a shape each.
        c = self.config
        if self.recorded is not None and turn.policy and not c.micro_batch_tokens:
            ranges = (c.cliprange, c.cliprange_high, c.cliprange_value)
            done = self.recorded.learn(
                partial(self._losses, temperature=temperature, turn=turn),
                batch,
                n_tokens,
                key=(temperature, turn, *ranges, c.vf_coef, c.entropy_coef),
                only=only,
            )
            if done is not None:
                return done
        there = self._there(batch)
        loss, sums, extremes = self.models.call(self._losses, there, temperature, turn)
        self.models.backward(loss / n_tokens)
        return sums, extremes

    def _there(self, batch: Batch) -> Batch:
        """The batch where the models are."""
        behind = self.models.is_behind
        return looked_up(batch, self.device) if behind else batch.to(self.device)

    def _losses(
        self, batch: Batch, temperature: float, turn: Turn
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The summed loss of one pass, its sums for the statistics, and its smallest and largest
        ratio.
        """
        c, mask = self.config, batch.tokens.mask
        new = self._forward(batch, temperature, turn)
        policy = core.policy_loss(
            new.logprobs,
            batch.logprobs,
            batch.advantages,
            mask,
            cliprange=c.cliprange,
            cliprange_high=c.cliprange_high or None,
        )
        value = core.value_loss(
            new.values, batch.values, batch.returns, mask, cliprange_value=c.cliprange_value
        )
        entropy = torch.zeros_like(new.logprobs) if new.entropy is None else new.entropy
        loss = policy.loss - c.entropy_coef * entropy
        if turn.critic:  # one apart shares no gradient, and has no weight in the loss
            loss = loss + (1.0 if self.apart else c.vf_coef) * value.loss
        log_ratio = new.logprobs.detach() - batch.logprobs
        ratio = policy.ratio.detach().masked_fill(~mask, 1.0)
        per_token = (
            torch.ones_like(log_ratio),
            policy.loss.detach(),
            value.loss.detach(),
            entropy.detach(),
            0.5 * log_ratio**2,
            -log_ratio,
            policy.clipped_low.float(),
            policy.clipped_high.float(),
            ratio,
            new.values.detach(),
            (new.values.detach() - batch.returns) ** 2,
            value.clipped.float(),
            torch.ones_like(log_ratio),
        )
        # All at once: on a GPU each operation costs a launch.
        sums = torch.stack(per_token).masked_fill(~mask, 0.0).sum((1, 2))
        for name in () if turn.critic else OF_VALUES:  # by numbers, and no list from the host
            sums[SUMS.index(name)].zero_()
        return core.masked_sum(loss, mask), sums, torch.stack([ratio.min(), ratio.max()])

    def _forward(self, batch: Batch, temperature: float, turn: Turn) -> Forward:
        """Log-probs, values and entropies as the models stand; of whom it is not the turn, what
        was at sampling.
        """
        if not turn.policy:
            return Forward(batch.logprobs, self.critic.values(batch.tokens))
        entropy = self.config.entropy_coef > 0
        new = self.policy.score(batch.tokens, temperature=temperature, entropy=entropy)
        if not self.apart:
            return new
        values = self.critic.values(batch.tokens) if turn.critic else batch.values
        return replace(new, values=values)

    def _groups(self, batch: Batch) -> list[Tensor]:
        """This process's rows of each forward and backward pass: its part of each mini-batch,
        split further by `micro_batch_tokens`.

        Under a token limit rows are sorted by length, so that little padding is computed.
        """
        mini = self.config.mini_batch_size or self.config.batch_size
        own = torch.arange(len(batch))[self.processes.share(len(batch))]
        if not self.config.micro_batch_tokens or not len(own):
            return list(own.split(math.ceil(mini / self.processes.size))) if len(own) else []
        lengths = batch.tokens.query_mask.sum(1) + batch.tokens.lengths
        limit = self._most_tokens(batch[own[lengths[own].argmax()][None]])
        return [own[rows] for rows in pack_by_tokens(lengths[own], limit=limit)]

    def _most_tokens(self, longest: Batch) -> int:
        """`micro_batch_tokens`, or what of it free memory holds, found once by a pass over the
        longest sample; a run that is resumed keeps to it, for other passes round otherwise.
        """
        if self.config.micro_batch_tokens > 0:
            return self.config.micro_batch_tokens
        if not self.most_tokens:
            tokens, there = longest.tokens, self._there(longest)
            self.most_tokens = tokens_that_fit(
                lambda: self._losses(there, 1.0, EVERYBODY),
                tokens=int(tokens.query_mask.sum() + tokens.lengths.sum()),
                optimizer=self.models.optimizer,
                share=1.0 / self.processes.here,
            )
        return self.most_tokens

    def _hear_of_the_last(self) -> None:
        """Count the last step, if it was the device that decided on it."""
        unheard, self._unheard = self._unheard, None
        if unheard is not None:
            self._heard(*unheard)

    def _heard(self, step: OptimizerStep, batch: Batch) -> bool:
        """Whether the step may be taken, or was; counts those that may not."""
        self.skipped_in_a_row = 0 if step.taken else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= self.config.max_skipped_updates:
            raise TrainingDiverged(
                f"{self.skipped_in_a_row} optimizer steps in a row were skipped, the last with "
                f"gradient norm {step.grad_norm:.3g} and mean ratio {step.ratio:.3g}: a loss or "
                "gradient is not finite, or the policy moved too far in one iteration. Lower "
                "ppo.learning_rate or ppo.ppo_epochs, and look at "
                "ppo/policy/first_minibatch_ratio_error, which should be near 0",
                batch,
            )
        return step.taken

    def _moved_too_far(self, steps: list[OptimizerStep]) -> bool:
        sums = sums_of(steps)
        return bool(
            sums[SUMS.index("policykl")] / sums[0].clamp(min=1) > 1.5 * self.config.target_kl
        )


def hash_seed(*numbers: int) -> int:
    """One 63-bit seed out of several numbers, by NumPy's SeedSequence."""
    import numpy as np

    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _part(batch: Batch, rows: Tensor) -> Batch:
    """These samples in any order: the batch itself where they are all, a blank one for none."""
    if len(rows) == len(batch):
        return batch
    return batch[rows] if len(rows) else batch.blank()


def _by_model(parameters: list[Any], critic: Any) -> list[list[Any]]:
    """The trained parameters whose gradients are clipped together: all, or those of a critic apart
    by themselves.
    """
    own = {id(p) for p in critic.parameters()} if critic is not None else set()
    policy = [p for p in parameters if id(p) not in own]
    return [policy, [p for p in parameters if id(p) in own]] if own else [policy]
