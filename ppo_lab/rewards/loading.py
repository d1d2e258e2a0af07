"""Reward models and their tokenizers, from folders or the hub."""

from __future__ import annotations

from typing import Any

import torch

from ppo_lab.models.loading import choose_dtype
from ppo_lab.models.sources import locate
from ppo_lab.rewards.scoring import RewardError


def load_classifier(
    path: str,
    *,
    revision: str = "",
    trust_remote_code: bool = False,
    dtype: str = "float32",
    device: str = "cpu",
    key: str = "reward.path",
) -> Any:
    """A sequence classifier from a folder or the hub, on its device; `key` names it in errors.

    Raises:
        ConfigError: it cannot be had.
        RewardError: it is no sequence classifier, or its classification head was never trained.
    """
    from transformers import AutoModelForSequenceClassification

    source = locate(path, revision=revision, entries=("config.json",), key=key)
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            source.path,
            trust_remote_code=trust_remote_code,
            dtype=choose_dtype(dtype, torch.device(device)),
            output_loading_info=True,
            **source.loading_arguments,
        )
    except (OSError, ValueError, KeyError) as error:
        raise _unloadable(key, path, error) from error
    if new := sorted(report["missing_keys"]):
        raise RewardError(
            f"{key}={path}: this is no trained sequence classifier; its weights lack "
            f"{', '.join(new[:3])}. Train one with "
            "`python -m ppo_lab.reward_model`, or name another."
        )
    return model.to(device)


def classifier_bytes(path: str, *, revision: str = "", dtype: torch.dtype, key: str) -> int:
    """Bytes of a sequence classifier's weights in this precision; none of them is read."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    source = locate(path, revision=revision, entries=("config.json",), key=key)
    try:
        config = AutoConfig.from_pretrained(source.path, **source.loading_arguments)
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise _unloadable(key, path, error) from error
    return sum(p.numel() * p.element_size() for p in model.parameters())


def load_reward_tokenizer(
    path: str,
    *,
    revision: str = "",
    trust_remote_code: bool = False,
    key: str = "reward.tokenizer",
) -> Any:
    """The tokenizer of a reward model; `key` names it in errors.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoTokenizer

    source = locate(
        path,
        revision=revision,
        entries=("tokenizer_config.json", "tokenizer.json"),
        wanted="tokenizer",
        key=key,
    )
    try:
        return AutoTokenizer.from_pretrained(
            source.path, trust_remote_code=trust_remote_code, **source.loading_arguments
        )
    except (OSError, ValueError, KeyError) as error:
        raise _unloadable(key, path, error) from error


def _unloadable(key: str, path: str, error: Exception) -> RewardError:
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    return RewardError(f"{key}={path}: it cannot be loaded ({reason}).")
