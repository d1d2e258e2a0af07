"""PPO for language models: a trainer with TRL's classic verbs, and Hydra-configured runs built on
it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppo_lab.models.policy import AutoModelForCausalLMWithValueHead
    from ppo_lab.ppo_config import PPOConfig
    from ppo_lab.scripts import (
        LengthSampler,
        create_reference_model,
        respond_to_batch,
        set_seed,
    )
    from ppo_lab.trainer import PPOTrainer

__version__ = "0.1.0"

if sys.platform == "win32":
    raise ImportError(
        "ppo_lab locks files and hears signals as POSIX has them: on Windows run it in WSL"
    )

__all__ = [
    "AutoModelForCausalLMWithValueHead",
    "LengthSampler",
    "PPOConfig",
    "PPOTrainer",
    "create_reference_model",
    "respond_to_batch",
    "set_seed",
]

_HOMES = {
    "AutoModelForCausalLMWithValueHead": "ppo_lab.models.policy",
    "PPOConfig": "ppo_lab.ppo_config",
    "PPOTrainer": "ppo_lab.trainer",
    "LengthSampler": "ppo_lab.scripts",
    "create_reference_model": "ppo_lab.scripts",
    "respond_to_batch": "ppo_lab.scripts",
    "set_seed": "ppo_lab.scripts",
}
_LATER = "TRL 0.12's interface; PPOTrainer(reward=...).train, or python -m ppo_lab, does its work"
_NOT_HERE = {
    "AutoModelForSeq2SeqLMWithValueHead": "only decoders are trained here, no encoder-decoders",
    "PPOv2Config": _LATER,
    "PPOv2Trainer": _LATER,
}


def __getattr__(name: str) -> Any:
    """The public names, imported when first asked for: `import ppo_lab` loads no torch."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _NOT_HERE:
        raise ImportError(f"ppo_lab has no {name}: {_NOT_HERE[name]}")
    raise AttributeError(f"module 'ppo_lab' has no attribute {name!r}")
