"""What scripts of TRL 0.11 use around its trainer: functions of `trl.core` and `trl.models`, and
attributes of the trainer that are not the algorithm's.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import set_seed

from ppo_lab.processes import launch
from ppo_lab.processes.alone import Alone
from ppo_lab.rollout import NoiseKey, Sampling, sample

__all__ = [
    "LengthSampler",
    "create_reference_model",
    "freeze_shared_layers",
    "respond_to_batch",
    "set_seed",
]

# The methods of TRL's trainer that scripts overrode, and what is called in their place here.
OVERRIDDEN = {
    "compute_rewards": "shape",
    "compute_advantages": "shape",
    "_kl_penalty": "shape",
    "loss": "learn",
    "train_minibatch": "learn",
    "batched_forward_pass": "collect",
    "record_step_stats": "learn",
}


class LengthSampler:
    """Draws whole numbers from [min_value, max_value), with NumPy's generator."""

    def __init__(self, min_value: int, max_value: int) -> None:
        self.values = list(range(min_value, max_value))

    def __call__(self) -> int:
        """The next one."""
        return int(np.random.choice(self.values))


def create_reference_model(
    model: nn.Module, num_shared_layers: int | None = None, pattern: str | None = None
) -> Any:
    """A frozen copy of a model, to be `ref_model`.

    With `num_shared_layers`, what lies before that layer is frozen in `model` too. `pattern` is
    what names of that layer's weights hold, with `{layer}` for its number.

    Raises:
        ValueError: no weights have such a name.
    """
    if num_shared_layers is not None:
        freeze_shared_layers(model, num_shared_layers, pattern)
    return copy.deepcopy(model).requires_grad_(False).eval()


def freeze_shared_layers(model: nn.Module, layers: int, pattern: str | None = None) -> None:
    """Freeze embeddings and the first `layers` layers of a model.

    Raises:
        ValueError: there is no layer of that number.
    """
    if pattern is None:
        wanted = re.compile(rf"\.(h|layers|blocks)\.{layers}\.")
    else:
        wanted = re.compile(re.escape(pattern.format(layer=layers)))
    names = [name for name, _ in model.named_parameters()]
    first = next((i for i, name in enumerate(names) if wanted.search(name)), None)
    if first is None:
        raise ValueError(f"num_shared_layers={layers}: the model has no layer of that number")
    for name in names[:first]:
        model.get_parameter(name).requires_grad_(False)


def respond_to_batch(
    model: Any,
    queries: Int[Tensor, "batch time"],
    txt_len: int = 20,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Int[Tensor, "batch txt_len"]:
    """`txt_len` tokens after each query, from a policy with a value head, whether or not a text
    ends among them. They follow torch's seed.
    """
    sampling = Sampling(txt_len, (), 0, top_k=int(top_k), top_p=float(top_p))
    noise = NoiseKey(int(torch.randint(2**31, ())), 0)
    with torch.no_grad():
        tokens, _ = sample(model, queries.tolist(), sampling=sampling, noise=noise)
    return tokens.responses.to(queries.device)


class ScriptAttributes:
    """Attributes of TRL's trainer that scripts read, for `PPOTrainer`."""

    device: torch.device
    processes: Alone
    model: Any
    kl_controller: Any
    reference: Any
    dataloader: Any
    iterations_done: int
    save_pretrained: Callable[..., None]
    is_distributed = False

    def __init_subclass__(cls) -> None:
        """Refuse methods that nothing would call.

        Raises:
            TypeError: naming them and what is called in their place.
        """
        if names := sorted(OVERRIDDEN.keys() & set(vars(cls))):
            instead = ", ".join(f"{name} (override {OVERRIDDEN[name]})" for name in names)
            raise TypeError(f"{cls.__name__} overrides what is never called here: {instead}")

    @property
    def accelerator(self) -> Any:
        """What scripts ask of TRL's Accelerator: where and in how many processes it trains."""
        main = self.processes.is_main
        return SimpleNamespace(
            device=self.device,
            num_processes=self.processes.size,
            process_index=self.processes.rank,
            local_process_index=self.device.index or 0,
            is_main_process=main,
            is_local_main_process=launch.is_first_here(),
            state=SimpleNamespace(deepspeed_plugin=None),
            print=print if main else lambda *_, **__: None,
            unwrap_model=lambda model, *_, **__: model,
            wait_for_everyone=lambda: None,
            gather=lambda x: x,
            prepare=lambda *x: x[0] if len(x) == 1 else x,
        )

    @property
    def current_device(self) -> torch.device:
        """Where the models are."""
        return self.device

    @property
    def kl_ctl(self) -> Any:
        """What holds beta, as `value`."""
        return self.kl_controller

    @property
    def ref_model(self) -> Any:
        """The reference as a model: the one given, or the copy of the policy; None where it is the
        policy with its adapter off.
        """
        return self.reference.given or self.reference.modules.get("reference")

    @property
    def is_peft_model(self) -> bool:
        """Whether an adapter is trained."""
        return self.model.is_peft_model

    @property
    def current_step(self) -> int:
        """Steps made."""
        return self.iterations_done

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: Any = None) -> str:
        """Upload what `save_pretrained` writes to the hub, and return its address."""
        return push(self.save_pretrained, repo_id, private=private, token=token)


def push(save: Callable[[str], Any], repo_id: str, *, private: bool | None, token: Any) -> str:
    """Upload to the hub what `save(folder)` writes, and return its address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with TemporaryDirectory() as folder:
        save(folder)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder))


def check_alone(processes: Any) -> None:
    """Refuse to train in one of several processes that know nothing of each other.

    Raises:
        ValueError: they were launched together.
    """
    if processes is None and launch.is_launched():
        raise ValueError(
            "several processes were launched, and each would train a model of its own: a script of "
            "classic verbs runs in one process; python -m ppo_lab runs in several"
        )


def share_layers(model: Any, ref_model: Any, layers: int | None) -> None:
    """Freeze what `num_shared_layers` says that policy and reference share.

    Raises:
        ValueError: there is no such layer.
    """
    if layers is None:
        return
    if ref_model is not None:
        warnings.warn("num_shared_layers has no effect: a ref_model is given", stacklevel=3)
        return
    freeze_shared_layers(model, layers)
