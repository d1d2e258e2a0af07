"""A language model with its head replaced by a new one that gives a single score."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
)

from ppo_lab.config import ModelSection
from ppo_lab.errors import ConfigError
from ppo_lab.models.loading import disable_dropout, load_causal_lm, load_config
from ppo_lab.models.lora import merged


def classifier_from(
    section: ModelSection, *, device: torch.device, dtype: torch.dtype, seed: int
) -> Any:
    """The trunk that `model` names under a new head with one output, drawn by `seed`.

    An adapter that the model comes with is merged first.

    Raises:
        ConfigError: transformers has no sequence classifier of this architecture.
    """
    architecture = load_config(section)
    if type(architecture) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ConfigError(
            f"model.path={section.path}: transformers has no sequence classifier of "
            f"{architecture.model_type}; start a reward model from another architecture"
        )
    causal: Any = merged(load_causal_lm(section, device=device, dtype=dtype, seed=seed))
    config = causal.config
    config.num_labels = 1
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    classifier.base_model.load_state_dict(causal.base_model.state_dict())
    disable_dropout(classifier)
    return classifier.to(device)
