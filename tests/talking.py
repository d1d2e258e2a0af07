"""What the processes of a group say to each other, each checking what it hears; run by torchrun."""

from __future__ import annotations

import pytest
import torch

from ppo_lab.errors import ConfigError
from ppo_lab.processes.alone import joined
from ppo_lab.processes.launch import is_shared
from ppo_lab.rewards.function import FunctionScorer
from ppo_lab.rewards.scoring import WeightedSum
from ppo_lab.types import Forward, Tokens

ROWS = [[[5, 6, 7], [20]], [[8], [21, 22, 23]], [[9, 10], [24, 25]]]


def packed(rows: list[list[list[int]]]) -> Tokens:
    return Tokens.pack([q for q, _ in rows], [r for _, r in rows], pad_id=0)


def records_are_gathered_in_order_whatever_their_widths(group) -> None:
    for n in (1, 2, 3):
        share = group.share(n)
        own = packed(ROWS[share] or ROWS[:1])
        whole, expected = group.gather(own, n), packed(ROWS[:n])
        for name in ("queries", "query_mask", "responses", "mask", "lengths", "ended"):
            assert torch.equal(getattr(whole, name), getattr(expected, name)), (n, name)
    numbers = torch.arange(6.0).view(3, 2)
    own = numbers[group.share(3)]
    assert torch.equal(group.gather(own, 3), numbers)
    forward = group.gather(Forward(own, own), 3)
    assert torch.equal(forward.values, numbers)
    assert forward.entropy is None


def all_hear_the_same(group) -> None:
    rows = group.each(torch.tensor([float(group.rank)], dtype=torch.float64))
    assert rows.flatten().tolist() == list(range(group.size))
    assert group.any(group.rank == 1)
    assert not group.all(group.rank == 1)
    assert group.first("" if group.is_main else f"said by {group.rank}") == "said by 1"
    assert group.from_main(lambda: group.rank) == 0


def what_fails_for_one_fails_for_all_in_the_same_words(group) -> None:
    def fail() -> None:
        raise ConfigError("only the main process got here")

    for attempt in (lambda: group.from_main(fail), lambda: inside(group)):
        with pytest.raises(ConfigError, match="process") as caught:
            attempt()
        assert is_shared(caught.value)


def inside(group) -> None:
    with group.together():
        if group.rank == 1:
            raise ConfigError("a process that is not the main one")


def a_function_is_called_once_by_the_main_process(group) -> None:
    """D-09: it may keep a state, and sees the whole batch."""
    seen: list[list[str]] = []

    def counted(completions: list[str]) -> list[float]:
        seen.append(completions)
        return [float(len(seen))] * len(completions)

    parts = {"n": (1.0, FunctionScorer(counted, name="n"))}
    reward = WeightedSum("it", parts=parts, processes=group)
    for call in (1.0, 2.0):
        assert reward(["p"] * 3, ["a", "b", "c"]).total.tolist() == [call] * 3
    assert seen == ([["a", "b", "c"]] * 2 if group.is_main else [])


if __name__ == "__main__":
    with joined(device="cpu", timeout=60) as joint:
        records_are_gathered_in_order_whatever_their_widths(joint)
        all_hear_the_same(joint)
        what_fails_for_one_fails_for_all_in_the_same_words(joint)
        a_function_is_called_once_by_the_main_process(joint)
        if joint.is_main:
            print("all was heard")
