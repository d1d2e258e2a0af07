"""How two processes leave `joined`: which of them waits for the main one, which still writes."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from typing import Any

import torch.distributed as dist

from ppo_lab.errors import ConfigError
from ppo_lab.processes.alone import joined
from ppo_lab.processes.group import ProcessLost
from ppo_lab.processes.launch import shared
from ppo_lab.signals import Preempted

WRITING = 0.5  # seconds that the main process goes on for while the other one leaves
LONGEST = 10.0  # seconds that it waits for the other to be gone
FORK = get_context("fork")

# How both leave, but for the last two by which the other one leaves alone; whether it waits.
ENDINGS: dict[str, tuple[Callable[[], BaseException | None], bool]] = {
    "well": (lambda: None, True),
    "with an error of all": (lambda: shared(ConfigError("of all")), True),
    "preempted": (lambda: Preempted("SIGTERM"), True),
    "with an error of its own": (lambda: ConfigError("its own"), False),
    "since another is lost": (lambda: ProcessLost("another is gone"), False),
}


def leave(rank: int, port: int, ending: str, leaving: Any, gone: Any, left: Any) -> None:
    """One process of two, which says when the main one was done and when the other had left."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    make, waits = ENDINGS[ending]
    error = make() if rank or waits else None
    with suppress(ConfigError, Preempted), joined(device="cpu", timeout=60) as group:
        group.any(False)
        if rank:
            leaving.set()
        else:
            leaving.wait()
            gone.wait(WRITING if waits else LONGEST)
            left.put(("main", time.monotonic()))
        if error:
            raise error
    if rank:
        left.put(("other", time.monotonic()))
        gone.set()
    assert not (waits and dist.is_initialized())  # or torch complains of what was left open


def order(ending: str) -> list[str]:
    """Who was done first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    leaving, gone, left = FORK.Event(), FORK.Event(), FORK.SimpleQueue()
    both = [
        FORK.Process(target=leave, args=(rank, port, ending, leaving, gone, left))
        for rank in (0, 1)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0], ending
    times = dict([left.get(), left.get()])
    return sorted(times, key=lambda who: times[who])


if __name__ == "__main__":
    for name, (_, waits) in ENDINGS.items():
        expected = ["main", "other"] if waits else ["other", "main"]
        assert order(name) == expected, name
    print("all have parted")
