"""What the planner is asked beside the run itself: the device, how many, how long responses are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ppo_lab.devices import DEVICE
from ppo_lab.errors import ConfigError, suggestion
from ppo_lab.local_model import lacking_libraries
from ppo_lab.plan.devices import DEVICES, HERE, choices
from ppo_lab.rules import problems

OWN = ("device", "devices", "response_tokens")


@dataclass(frozen=True)
class Request:
    """A command of the planner: what is left of it is a command of a run."""

    run: list[str]
    device: str = "auto"
    devices: int = 1
    response_tokens: int = 0

    @property
    def is_here(self) -> bool:
        """Whether the plan is for this machine."""
        return self.device not in DEVICES

    def check(self, config: Any, stated: Any = ()) -> list[str]:
        """The problems of a configuration; a device of the table is not asked to be here, nor is
        what reads quantised weights there.
        """
        if self.is_here:
            return problems(config, stated)
        config = replace(config, model=replace(config.model, load_in_4bit=False))
        lacking = list(lacking_libraries(config.model))
        return [line for line in problems(config, stated) if line not in lacking]


def read(argv: Sequence[str]) -> Request:
    """The request that a command line makes.

    Raises:
        ConfigError: a device that is not known, or a number that is none.
    """
    given = {key: value for key, _, value in (text.partition("=") for text in argv) if key in OWN}
    device = given.get("device", "auto").lower()
    found = [] if _is_device(device) else [_unknown(device)]
    numbers = {}
    for key, least in (("devices", 1), ("response_tokens", 0)):
        text = given.get(key, str(least))
        if text.isdecimal() and int(text) >= least:
            numbers[key] = int(text)
        else:
            found.append(f"{key}={text}: must be a whole number, at least {least}")
    if found:
        raise ConfigError(found)
    run = [text for text in argv if text.partition("=")[0] not in OWN]
    here = device not in DEVICES and device != "auto"
    return Request(run=[*run, f"device={device}"] if here else run, device=device, **numbers)


def _is_device(name: str) -> bool:
    return name in DEVICES or name in HERE or bool(DEVICE.fullmatch(name))


def _unknown(device: str) -> str:
    near = suggestion(device, choices())
    listed = ", ".join(choices())
    return f"device={device}: not in the table; must be one of {listed}, or cuda:N{near}"
