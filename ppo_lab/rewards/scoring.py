"""Raw scores made into `Scores`: checked sample by sample, and weighted in this one place."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ppo_lab.errors import ConfigError
from ppo_lab.processes.alone import Alone
from ppo_lab.record import brief
from ppo_lab.rewards.conversation import as_text
from ppo_lab.types import Scores

Scorer = Callable[..., Any]
"""`scorer(prompts, completions, **columns)` gives one raw number a sample."""


class RewardError(ConfigError):
    """A reward that cannot be made, or that did not give every sample one finite number."""


class WeightedSum:
    """A reward made of named raw scorers: total = weight * (w_1 s_1 + w_2 s_2 + ...).

    A reward of a single kind is the sum of one part. `Scores.parts` holds s_1, s_2, ... before any
    weight. Of several processes each scores its share; a scorer with `sees_whole_batch` is asked
    once for all samples, by the main process.
    """

    def __init__(
        self,
        name: str,
        *,
        weight: float = 1.0,
        parts: dict[str, tuple[float, Scorer]],
        processes: Alone | None = None,
    ) -> None:
        """A reward called `name`; `parts` maps a name to (weight within the sum, scorer)."""
        self.name = name
        self.weight = weight
        self._parts = parts
        self._processes = processes or Alone()

    def __call__(
        self, /, prompts: list[Any], completions: list[str], **columns: list[Any]
    ) -> Scores:
        """The checked scores of these completions.

        Raises:
            RewardError: a part gave a wrong number of scores, or one that is not a finite number.
        """
        raw: dict[str, torch.Tensor] = {}
        total = torch.zeros(len(completions), dtype=torch.float64)
        for name, (weight, scorer) in self._parts.items():
            raw[name] = self._scores(name, scorer, prompts, completions, columns)
            total += weight * raw[name].double()
        return Scores(total=(self.weight * total).float(), parts=raw)

    @property
    def reads_ids(self) -> bool:
        """Whether a part takes `completion_ids`, the responses' token ids."""
        return any(getattr(scorer, "reads_ids", False) for _, scorer in self._parts.values())

    @property
    def fingerprints(self) -> dict[str, str]:
        """A digest of each part's model, of those that have one."""
        found = {
            name: getattr(scorer, "fingerprint", "") for name, (_, scorer) in self._parts.items()
        }
        return {name: digest for name, digest in found.items() if digest}

    def check_prompts(self, prompts: Sequence[Any]) -> None:
        """Nothing, where every part can read prompts like these.

        Raises:
            RewardError: a reward model's chat template refuses one.
        """
        for _, scorer in self._parts.values():
            if hasattr(scorer, "check_prompts"):
                scorer.check_prompts(prompts)

    def _scores(
        self,
        name: str,
        scorer: Scorer,
        prompts: list[Any],
        completions: list[str],
        columns: dict[str, list[Any]],
    ) -> torch.Tensor:
        """One part's checked scores of all samples, on every process."""

        def judge(rows: Sequence[int]) -> torch.Tensor:
            own = {key: [column[i] for i in rows] for key, column in columns.items()}
            shown = [prompts[i] for i in rows], [completions[i] for i in rows]
            return checked_scores(name, scorer(*shown, **own), prompts, completions, rows)

        processes, n = self._processes, len(completions)
        if getattr(scorer, "sees_whole_batch", False):
            return processes.from_main(lambda: judge(range(n)))
        with processes.together():
            rows = processes.evened(n) if getattr(scorer, "in_step", False) else processes.rows(n)
            own = judge(rows) if rows else torch.empty(0)
        return processes.gather(own, n)


def checked_scores(
    name: str,
    scores: Any,
    prompts: Sequence[Any],
    completions: Sequence[str],
    rows: Sequence[int] | None = None,
) -> torch.Tensor:
    """What a scorer returned for these rows of a batch, or all, as a float32 tensor.

    Raises:
        RewardError: it is no list (nor tensor, nor array), has not one item a sample, or an
            item is not a finite number; the message names the reward and the first such sample.
    """
    items, rows = _as_list(name, scores), range(len(completions)) if rows is None else rows
    if len(items) != len(rows):
        raise RewardError(
            f"reward {name!r}: {len(items)} scores came back for {len(rows)} samples; "
            "it must return one number a sample."
        )
    values = [
        _as_float(name, item, i, prompts, completions) for i, item in zip(rows, items, strict=True)
    ]
    result = torch.tensor(values, dtype=torch.float32)
    for i in (~result.isfinite()).nonzero().flatten().tolist():
        where = describe(rows[i], prompts, completions)
        raise RewardError(
            f"reward {name!r}: the score of {where} is {values[i]}, not a finite number."
        )
    return result


def describe(index: int, prompts: Sequence[Any], completions: Sequence[str]) -> str:
    """A sample as an error message names it: its number in the batch and its shortened texts."""
    prompt, completion = _shortened(prompts[index]), _shortened(completions[index])
    return f"sample {index} of the batch (prompt {prompt}, completion {completion})"


def _shortened(text: Any, length: int = 60) -> str:
    flat = as_text(text)
    return repr(flat if len(flat) <= length else flat[: length - 1] + "…")


def _as_list(name: str, scores: Any) -> list[Any]:
    """Lists, tuples, tensors and arrays as a list; a trailing dimension of one is dropped."""
    if hasattr(scores, "tolist") and hasattr(scores, "shape"):
        with _readable(name, scores):
            shape = tuple(scores.shape)
            if len(shape) == 2 and shape[1] == 1:
                scores = scores.reshape(-1)
            scores = scores.tolist()
    if isinstance(scores, (list, tuple)):
        return list(scores)
    made = " What it returned can be called: name that, in a module of your own, as the function."
    raise RewardError(
        f"reward {name!r}: it returned {type(scores).__name__} ({_shortened(repr(scores))}); "
        f"it must return a list with one number a sample.{made if callable(scores) else ''}"
    )


@contextmanager
def _readable(name: str, scores: Any) -> Iterator[None]:
    """Refuse tensors whose numbers cannot be had, as sparse ones and those without storage."""
    try:
        yield
    except (RuntimeError, TypeError) as error:
        raise RewardError(
            f"reward {name!r}: the numbers of what it returned ({_shortened(repr(scores))}) cannot "
            f"be read ({brief(error)}); it must return plain numbers or a dense tensor."
        ) from error


def _as_float(
    name: str, item: Any, index: int, prompts: Sequence[Any], completions: Sequence[str]
) -> float:
    """One score as a float; scalars of torch and numpy included."""
    with _readable(name, item):
        value = (
            item.item()
            if hasattr(item, "item") and getattr(item, "shape", None) in ((), (1,))
            else item
        )
    if isinstance(value, numbers.Real):
        try:
            return float(value)
        except OverflowError:  # an integer beyond all floats
            return math.inf
    where = describe(index, prompts, completions)
    raise RewardError(
        f"reward {name!r}: the score of {where} is {_shortened(repr(item))} "
        f"({type(item).__name__}), not a number."
    )
