"""The command line of `python -m ppo_lab.plan`, which takes that of a run."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from ppo_lab.command_line import configurations
from ppo_lab.errors import ConfigError, refuse
from ppo_lab.plan.devices import DEVICES
from ppo_lab.plan.request import Request, read

# Keys that change nothing of what a run costs: runs that differ in them alone share a plan.
FREE = ("name", "seed", "resume", "objective", "tracking", "checkpoint")
FREE_PPO = ("learning_rate", "init_kl_coef", "cliprange", "gamma", "lam", "vf_coef", "target")

HELP = f"""\
python -m ppo_lab.plan [device=NAME] [devices=N] [response_tokens=N] [GROUP=OPTION ...] [KEY=VALUE]
python -m ppo_lab.plan check

Says what `python -m ppo_lab` with the same arguments would take: memory by part, FLOPs and bytes
by phase, seconds an iteration, hours of the run, how it could be shared out, and what binds. No
weights are loaded. With -m and several values, a sweep in all.

  device=NAME          {", ".join(DEVICES)};
                       by default this machine, which is measured (some seconds, then kept)
  devices=N            so many of them (1)
  response_tokens=N    mean length of a response; by default the longest that may be generated
  check                compare plans of three small models with runs of them, here
"""


def main() -> None:
    """Answer, or say what is wrong with the question."""
    words = sys.argv[1:]
    if {"--help", "-h"} & set(words):
        print(HELP, end="")
        return
    if words == ["check"]:
        from ppo_lab.plan.check import check

        sys.exit(check())
    try:
        request = read(words)
        _show(request, configurations(request.run, check=request.check))
    except ConfigError as error:
        refuse(error)


def _show(request: Request, runs: list[tuple[list[str], Any, int]]) -> None:
    """Plan every run and print what comes out."""
    from rich.console import Console

    from ppo_lab import experiment  # noqa: F401, what a run imports is part of what it takes
    from ppo_lab.models.loading import keep_quiet
    from ppo_lab.plan.report import Planned, show

    keep_quiet()
    plans: dict[str, Any] = {}
    planned = []
    for changes, config, times in runs:
        key = _what_costs(config)
        if key not in plans:
            plans[key] = _plan(request, config)
        planned.append(Planned(changes, times, *plans[key]))
    console = Console(highlight=False)
    console.width = min(console.width, 110)
    show(planned, console)


def figures(words: list[str]) -> None:
    """Print bytes and seconds an iteration of one run, as JSON."""
    import json

    from ppo_lab import experiment  # noqa: F401

    request = read(words)
    ((_, config, _),) = configurations(request.run, check=request.check)
    plan, _ = _plan(request, config)
    print(json.dumps({"bytes": plan.memory.total, "seconds": plan.iteration_s}))


def _plan(request: Request, config: Any) -> tuple[Any, Any]:
    """A run's plan, and the ways to share it out."""
    from ppo_lab.plan.estimate import plan_of
    from ppo_lab.plan.parallel import ways
    from ppo_lab.plan.subject import Target

    target = Target(DEVICES.get(request.device), request.devices)
    alone = plan_of(config, target, response_tokens=request.response_tokens)
    if request.devices == 1:
        return alone, ways(alone, alone)
    shared = plan_of(
        config, target, response_tokens=request.response_tokens, processes=request.devices
    )
    return alone, ways(alone, shared)


def _what_costs(config: Any) -> str:
    settings = {key: value for key, value in asdict(config).items() if key not in FREE}
    settings["ppo"] = {k: v for k, v in settings["ppo"].items() if k not in FREE_PPO}
    return str(settings)
