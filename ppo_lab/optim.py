"""Adam as torch has it and as TensorFlow 1 had it, and the learning rate over a run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ppo_lab.errors import ConfigError


class TFAdam(torch.optim.Optimizer):
    """Adam with epsilon where TensorFlow 1 put it: outside the bias correction of the second
    moment.

        theta <- theta - lr sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps)

    In the first steps, while v is small, this epsilon damps far more than torch's: updates are
    smaller, and fewer tokens are clipped.

    Source: Kingma and Ba 2015, arXiv:1412.6980, section 2 (last paragraph); Huang et al. 2023, "The
        N implementation
    details of RLHF with PPO", for its effect on the clip fraction.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "TFAdam takes no closure"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, (b1, b2) = self.state[parameter], group["betas"]
        if not state:
            state.update(
                step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter)
            )
        state["step"] += 1
        state["exp_avg"].lerp_(parameter.grad, 1 - b1)
        state["exp_avg_sq"].mul_(b2).addcmul_(parameter.grad, parameter.grad, value=1 - b2)
        rate = group["lr"] * math.sqrt(1 - b2 ** state["step"]) / (1 - b1 ** state["step"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(
            state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-rate
        )


def adam_8bit(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """AdamW whose moments lie in 8 bits, a block of 256 with a scale of its own; small parameters
    keep theirs in float32.

    Raises:
        ConfigError: bitsandbytes is missing.

    Source: Dettmers et al. 2022, arXiv:2110.02861; bitsandbytes.
    """
    if find_spec("bitsandbytes") is None:
        raise ConfigError("adam=8bit: needs bitsandbytes: pip install 'ppo_lab[quantization]'")
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, **settings)


def is_8bit(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is that of `adam_8bit`."""
    return type(optimizer).__name__ == "AdamW8bit"


def make_optimizer(
    model: torch.nn.Module,
    critic: torch.nn.Module,
    *,
    adam: str,
    learning_rate: float,
    value_learning_rate: float,
    eps: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """Adam over what is trained of `model`, and over the critic (a value head in it, or a model of
    its own) with a rate of its own and no weight decay; `adam` is "torch", "tf" or "8bit".

    Raises:
        ConfigError: weights in float16, whose moments only 8 bits hold.
    """
    judging = list(critic.parameters())
    in_critic = {id(p) for p in judging}
    trunk = [p for p in model.parameters() if p.requires_grad and id(p) not in in_critic]
    if adam != "8bit" and any(p.dtype == torch.float16 for p in trunk + judging):
        # 0.001 of a squared gradient below 0.008 is 0 there, and so is epsilon.
        raise ConfigError(
            "the trained weights are in float16, where Adam's moments fall to 0 and its steps "
            "destroy them; train float32 or bfloat16 weights, or an adapter"
        )
    groups = [
        {"params": trunk, "lr": learning_rate},
        {"params": judging, "lr": value_learning_rate or learning_rate, "weight_decay": 0.0},
    ]
    if adam == "tf":
        return TFAdam(groups, lr=learning_rate, eps=eps, weight_decay=weight_decay)
    if adam == "8bit":
        return adam_8bit(groups, lr=learning_rate, eps=eps, weight_decay=weight_decay)
    fused = all(p.device.type in ("cuda", "cpu") for p in trunk + judging)
    return torch.optim.AdamW(
        groups, lr=learning_rate, eps=eps, weight_decay=weight_decay, fused=fused
    )


def make_schedule(
    optimizer: torch.optim.Optimizer, *, lr_schedule: str, warmup_steps: int, steps: int
) -> LambdaLR:
    """The learning rate over `steps` iterations: a linear rise over `warmup_steps`, then the named
    course to 0.
    """

    def factor(done: int) -> float:
        if done < warmup_steps:
            return (done + 1) / (warmup_steps + 1)
        left = max(steps - done, 0) / max(steps - warmup_steps, 1)
        return {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}[
            lr_schedule
        ]

    return LambdaLR(optimizer, factor)


def advance(schedule: Any) -> None:
    """Take the schedule one iteration on, one whose optimizer steps were all skipped included."""
    with warnings.catch_warnings():
        # torch takes a schedule that moves before the first optimizer step for a mistake.
        warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step", UserWarning)
        schedule.step()
