"""What is known of a run's models without loading or building any: their configs.

The hub and its cache are asked as a run asks them; what they do not have is looked for among the
configs that travel with this package. The embedded models are not built, for they are known.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from ppo_lab.config import Config, EmbeddedReward, ModelCritic, ModelReward, ModelSection
from ppo_lab.models.loading import choose_dtype, load_config
from ppo_lab.models.sources import ModelUnavailable, locate, packaged_config
from ppo_lab.rules import rewards


@dataclass(frozen=True)
class Classifier:
    """A sequence classifier: its config, its precision, how many texts it reads at a time."""

    config: PreTrainedConfig
    dtype: torch.dtype
    batch_size: int = 1


def with_known_models(config: Config) -> tuple[Config, PreTrainedConfig]:
    """The configuration, such that nothing is fetched or built for it, and the policy's config.

    Raises:
        ConfigError: nobody here knows the model.
    """
    if config.model.path == "embedded":
        return _with_embedded(config)
    try:
        return config, load_config(config.model)
    except ModelUnavailable:
        if packaged_config(config.model.path) is None:
            raise
    known = replace(config.model, weights="random")
    return replace(config, model=known), load_config(known)


def policy_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The precision of the policy's weights on this device, as a run chooses it."""
    trained_whole = config.model.dtype == "auto" and not config.lora.r
    return torch.float32 if trained_whole else choose_dtype(config.model.dtype, device)


def reward_models(config: Config, device: torch.device) -> list[Classifier]:
    """The classifiers that score; functions and rules are none."""
    found = [_classifier(section, device) for _, section in rewards(config.reward)]
    return [classifier for classifier in found if classifier]


def critic_model(config: Config, device: torch.device) -> Classifier | None:
    """The critic's own model; None where it is a head on the policy."""
    critic = config.critic
    if not isinstance(critic, ModelCritic):
        return None
    dtype = choose_dtype(critic.dtype, device)
    if critic.path == "embedded" or (not critic.path and isinstance(config.reward, EmbeddedReward)):
        return Classifier(_embedded_config("reward"), dtype)
    if critic.path:
        return Classifier(_config_at(critic.path, critic.revision), dtype)
    start = _classifier(config.reward, device)
    assert start is not None, "the rules see to it that there is one"
    return replace(start, dtype=dtype)


def _classifier(section: Any, device: torch.device) -> Classifier | None:
    if isinstance(section, EmbeddedReward):
        return Classifier(_embedded_config("reward"), torch.float32, section.batch_size)
    if not isinstance(section, ModelReward):
        return None
    config = _config_at(section.path, section.revision)
    return Classifier(config, choose_dtype(section.dtype, device), section.batch_size)


def _config_at(path: str, revision: str) -> PreTrainedConfig:
    source = locate(path, revision=revision, entries=("config.json",), key="reward.path")
    return AutoConfig.from_pretrained(source.path, **source.loading_arguments)


def _with_embedded(config: Config) -> tuple[Config, PreTrainedConfig]:
    """The embedded policy's folder where it has been built, else its shape and bytes for tokens."""
    from ppo_lab.embedded.build import folder_of_this_version

    folder = folder_of_this_version() / "policy"
    section = replace(config.model, path=str(folder))
    if not folder.is_dir():
        section = ModelSection(name=config.model.name, path="gpt2", weights="random")
    return replace(config, model=section), _embedded_config("policy")


def _embedded_config(which: str) -> PreTrainedConfig:
    from transformers import BloomConfig

    from ppo_lab.embedded.build import Recipe, folder_of_this_version

    folder = folder_of_this_version() / which
    if folder.is_dir():
        return AutoConfig.from_pretrained(folder)
    recipe = Recipe()
    return BloomConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        n_layer=recipe.n_layer,
        n_head=recipe.n_head,
    )
