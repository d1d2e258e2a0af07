"""Reward models and their tokenizers, from folders or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ppo_lab.rewards.scoring import RewardError


def load_classifier(
    path: str,
    *,
    revision: str = "",
    trust_remote_code: bool = False,
    dtype: str = "float32",
    device: str = "cpu",
) -> Any:
    """A sequence classifier from a folder or the hub, on its device.

    Raises:
        RewardError: it cannot be had, or its classification head was never trained.
    """
    from transformers import AutoModelForSequenceClassification

    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            str(Path(path).expanduser()),
            revision=revision or None,
            trust_remote_code=trust_remote_code,
            dtype=_dtype(dtype, device),
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise RewardError(_unavailable("the reward model", path, error)) from error
    if new := sorted(report["missing_keys"]):
        raise RewardError(
            f"reward.path={path}: this is no trained sequence classifier; its weights lack "
            f"{', '.join(new[:3])}. Train one with "
            "`python -m ppo_lab.reward_model`, or name another."
        )
    return model.to(device)


def load_reward_tokenizer(path: str, *, revision: str = "", trust_remote_code: bool = False) -> Any:
    """The tokenizer of a reward model.

    Raises:
        RewardError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(Path(path).expanduser()),
            revision=revision or None,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, KeyError) as error:
        raise RewardError(_unavailable("the tokenizer of the reward model", path, error)) from error


def _dtype(name: str, device: str) -> torch.dtype:
    """A number format by name; `auto` is bfloat16 on a GPU that computes in it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    on_gpu = str(device).startswith("cuda") and torch.cuda.is_bf16_supported(
        including_emulation=False
    )
    return torch.bfloat16 if on_gpu else torch.float32


def _unavailable(what: str, path: str, error: Exception) -> str:
    """One paragraph: what cannot be had, why, and the ways out."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"reward.path={path}: {what} cannot be loaded ({reason}). Give the folder of a saved "
        "model, or, where the hub cannot be reached, set HF_HOME to a cache that holds it; "
        "reward=embedded needs neither."
    )
