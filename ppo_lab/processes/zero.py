"""Models and optimizer partitioned over the processes by DeepSpeed's ZeRO, stages 2 and 3.

Tried on CPUs (gloo) with LoRA and full fine-tuning. Not run here: GPUs, offloading, and bfloat16
trunks, for which DeepSpeed keeps adapters in bfloat16 and their masters in float32.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ppo_lab.errors import ConfigError
from ppo_lab.processes.alone import Judge
from ppo_lab.processes.wrapped import Caller, Sharded, each_once

if TYPE_CHECKING:
    from ppo_lab.processes.group import Group

T = TypeVar("T")
MOMENTS = ("exp_avg", "exp_avg_sq")


class Partitioned(Sharded):
    """Models and optimizer in DeepSpeed's engine, which sums, clips and steps by itself.

    The optimizer that it is given asks before it steps, so that a step may be refused once the
    gradient's norm is known. Its learning rates stay those of the run's own schedule.
    """

    def __init__(self, group: Group, caller: Caller, optimizer: torch.optim.Optimizer) -> None:
        self._judge: Judge | None = None
        self._verdict: bool | None = None
        self._linked = False
        self._trained = [p for part in optimizer.param_groups for p in part["params"]]
        self._layout = optimizer.state_dict()["param_groups"]
        if caller.models["policy"] is not caller.models["critic"]:
            raise ConfigError(
                "critic=reward_model: DeepSpeed clips and steps all weights as one; use "
                "critic=head, or conf/accelerate/ddp.yaml or fsdp2.yaml"
            )
        super().__init__(group, caller, optimizer)
        self.sharded = self.wrapped.zero_optimization_partition_weights()

    def _wrapped(self, caller: Caller) -> nn.Module:
        accelerator = _as_deepspeed(self.group.accelerator)
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        # Passes and clipping are ours to say; the engine wants them to be known.
        config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
        config |= {"gradient_clipping": 0.0}
        if any(p.dtype == torch.bfloat16 for p in caller.parameters()):
            config["bf16"] = {"enabled": True}
        self._take_step = self.optimizer.step
        self.optimizer.step = self._ask  # type: ignore[method-assign, assignment]
        return accelerator.prepare(caller, self.optimizer)[0]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer moves, as the models have it."""
        return self._trained

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """What the function returns, called inside of the engine."""
        with self.group.answering():
            return self.wrapped(function, *args, **kwargs)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """A context in which many tokens are sampled; stage 3 gathers each layer for each."""
        yield

    def accumulating(self, *, last: bool) -> Any:
        """A context for one pass; after the last one the engine may step."""
        self.wrapped.set_gradient_accumulation_boundary(is_boundary=last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this process's part of the loss; the engine takes means."""
        with self.group.answering():
            self.wrapped.backward(loss * self.group.size)

    def zero_grad(self) -> None:
        """Nothing: the engine forgets gradients when it has stepped."""

    def step(
        self,
        judge: Judge,
        clipped_together: list[list[nn.Parameter]],
        *,
        max_norm: float,
    ) -> None:
        """An optimizer step with clipped gradients, if `judge` lets it pass, given their norm."""
        self.wrapped.optimizer.clip_grad = max_norm
        self._judge, self._verdict = judge, None
        with self.group.answering():
            self.wrapped.step()
        if self._verdict is None:  # the engine found the gradient not to be finite
            judge(torch.tensor([math.inf]))
        self._judge = None
        self._link_states()

    def _link_states(self) -> None:
        """Have stage 2 look for the state of every group: it looks once, after the first group's
        step, when the others have none.
        """
        engine = self.wrapped.optimizer
        if self._verdict and not self._linked and hasattr(engine, "_hp_optimizer_states_linked"):
            engine._hp_optimizer_states_linked = False
            engine._lazy_init_hp_params_optimizer_state()
        self._linked = self._linked or bool(self._verdict)

    def _ask(self, closure: Any = None) -> None:
        """The optimizer's step as the engine calls it, once for each group of parameters."""
        assert self._judge is not None, "the engine steps only when it is told to"
        if self._verdict is None:
            norm = float(self.wrapped.optimizer._global_grad_norm)
            self._verdict = bool(self._judge(torch.tensor([norm if norm >= 0 else math.nan])))
        if self._verdict:
            self._take_step()

    def whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameters and buffers in full, on the main process; the others only help."""
        return each_once(self._in_full, tensors)

    def put(self, parameter: Tensor, whole: Tensor) -> None:
        """Set a parameter and its master copy."""
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(whole)
        self._set(parameter, whole)

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state as a process with whole models has it, on the main process."""
        from deepspeed.utils import safe_get_full_optimizer_state

        groups = [
            {**now, "params": was["params"]}
            for now, was in zip(self._settings(), self._layout, strict=True)
        ]
        steps = [state["step"] for state in self.optimizer.state.values()]
        if not steps:
            return {"state": {}, "param_groups": groups}
        state = {
            number: {
                "step": copy.deepcopy(steps[0]),
                **{m: self._mine(safe_get_full_optimizer_state(p, m)) for m in MOMENTS},
            }
            for number, p in enumerate(self._trained)
        }
        return {"state": state, "param_groups": groups}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Continue from a state whose tensors are in full."""
        if not state["state"]:
            return
        self._make_state()
        for number, parameter in enumerate(self._trained):
            for moment in MOMENTS:
                self._set(parameter, state["state"][number][moment], moment)
        for own in self.optimizer.state.values():
            own["step"] = _like_step(own["step"], state["state"][0]["step"])
        for group, saved in zip(self.optimizer.param_groups, state["param_groups"], strict=True):
            group |= {name: value for name, value in saved.items() if name != "params"}

    def _set(self, parameter: Any, whole: Tensor, *moment: str) -> None:
        """Set a parameter's master copy, or a moment of its, from a tensor given in full."""
        from deepspeed import utils

        setter = "optimizer_state" if moment else "fp32_param"
        value = whole.to(self.group.device, torch.float32)
        if not self.sharded:
            getattr(utils, f"safe_set_full_{setter}")(parameter, value, *moment)
            return
        # By parts: the setters of whole values fail on sizes that do not divide.
        part = parameter.ds_tensor.numel()
        missing = part * self.group.size - value.numel()
        padded = torch.nn.functional.pad(value.flatten(), (0, missing))
        own = padded[part * self.group.rank :][:part]
        getattr(utils, f"safe_set_local_{setter}")(parameter, own, *moment)

    def _make_state(self) -> None:
        """Have the optimizer make its state, by a step that moves nothing."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        with self.accumulating(last=True):
            loss = self.call(self._nothing)
            self.backward(loss)
        self.step(lambda _: True, [self._trained], max_norm=0.0)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _nothing(self) -> Tensor:
        """0, by way of every parameter that is trained."""
        ids = torch.zeros(1, 2, dtype=torch.long, device=self.group.device)
        logits, _, values = self.caller.models["policy"](ids)
        return 0.0 * (logits.sum() + values.sum())

    def _settings(self) -> list[dict[str, Any]]:
        return [
            {name: value for name, value in group.items() if name != "params"}
            for group in self.optimizer.param_groups
        ]

    def _in_full(self, tensor: Tensor) -> Tensor:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        if tensor.requires_grad and (found := safe_get_full_fp32_param(tensor)) is not None:
            return self._mine(found)
        with GatheredParameters([tensor]):
            return self._mine(tensor.detach())

    def _mine(self, full: Tensor) -> Tensor:
        return full.detach().cpu().clone() if self.group.is_main else torch.empty(0)


def _like_step(own: Any, saved: Any) -> Any:
    """A count of steps, as a number or a tensor, whichever the optimizer keeps."""
    count = float(saved)
    return torch.full_like(own, count) if isinstance(own, Tensor) else int(count)


def _as_deepspeed(accelerator: Any) -> Any:
    """The accelerator, which takes DeepSpeed for something of accelerators alone; gloo will do."""
    from accelerate.utils import DistributedType

    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        from accelerate.utils import DeepSpeedPlugin

        plugin = DeepSpeedPlugin(zero3_init_flag=False)
        plugin.set_mixed_precision("no")
        state.deepspeed_plugins = plugin
        plugin.select(_from_accelerator_state=True)
        state.distributed_type = DistributedType.DEEPSPEED
    return accelerator
