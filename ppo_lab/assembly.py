"""The sections of a configuration as the rooms take them: models, sampling, settings."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from ppo_lab.config import (
    Config,
    EmbeddedData,
    EmbeddedReward,
    EvaluationSection,
    GenerationSection,
    HeadCritic,
    ModelCritic,
    ModelReward,
    RewardSection,
)
from ppo_lab.continuation import seed_random_state
from ppo_lab.errors import ConfigError
from ppo_lab.evaluation import Gold, as_text
from ppo_lab.local_model import no_room
from ppo_lab.models.critic import Critic, check_shared_vocabulary
from ppo_lab.models.fitness import steady_context
from ppo_lab.models.loading import (
    check_vocabulary,
    eos_ids,
    load_causal_lm,
    load_config,
    locate_model,
    max_context,
)
from ppo_lab.models.lora import merged, wrap_lora
from ppo_lab.models.policy import AutoModelForCausalLMWithValueHead
from ppo_lab.ppo_config import PPOConfig
from ppo_lab.processes.alone import Alone
from ppo_lab.record import Say
from ppo_lab.rewards.classifier import label_index
from ppo_lab.rewards.loading import load_classifier, load_reward_tokenizer
from ppo_lab.rollout import Sampling


def resolve(config: Config) -> Config:
    """The configuration with the embedded policy's folder, built on its first use, where it asks
    for that policy.
    """
    if config.model.path != "embedded":
        return config
    from ppo_lab import embedded

    return replace(config, model=replace(config.model, path=str(embedded.policy_path())))


# How far a step of Adam moves the values of a new head, whose inputs are of the order of 1.
VALUES_MOVE = 0.2


def ppo_config(config: Config, *, width: int) -> PPOConfig:
    """The `ppo` section as the trainer takes it, for a trunk with states of `width` numbers; an
    adapter has a step size of its own, and so has a critic.
    """
    settings = asdict(config.ppo)
    if config.lora.r:
        settings["learning_rate"] = config.ppo.learning_rate * config.lora.learning_rate_factor
    return PPOConfig(
        **settings,
        value_learning_rate=critic_step(config, width),
        critic_warmup_steps=config.critic.warmup_steps,
        critic_epochs=config.critic.epochs,
        seed=config.seed,
        model_name=config.model.name,
    )


def critic_step(config: Config, width: int) -> float:
    """The step size of the critic.

    Adam moves every weight of a head by its step size, and with it the values by up to `width`
    times as much: what suits a head goes with one over the width, whatever suits the trunk.
    """
    if config.critic.learning_rate:
        return config.critic.learning_rate
    is_apart = isinstance(config.critic, ModelCritic)
    return config.ppo.learning_rate if is_apart else VALUES_MOVE / width


def load_policy(config: Config, tokenizer: Any, device: str) -> AutoModelForCausalLMWithValueHead:
    """The trunk with its adapter, if there is one, and its value head."""
    seed_random_state(config.seed)
    # Adam's small steps would be lost to rounding in bfloat16 weights; a frozen trunk may be
    # coarse.
    dtype = torch.float32 if config.model.dtype == "auto" and not config.lora.r else None
    model = load_causal_lm(config.model, device=device, dtype=dtype, seed=config.seed)
    check_vocabulary(tokenizer, model)
    if config.model.eos_token and model.generation_config:  # saved with the model
        (end,) = eos_ids(tokenizer, model, eos_token=config.model.eos_token)
        model.generation_config.eos_token_id = end
    model = wrap_lora(model, config.lora) if config.lora.r else merged(model)
    head = config.critic if isinstance(config.critic, HeadCritic) else HeadCritic()
    policy = AutoModelForCausalLMWithValueHead(
        model, v_head_init=head.v_head_init, v_head_init_std=head.v_head_init_std
    )
    if config.model.weights != "random":
        source = locate_model(config.model)
        policy.load_value_head(source.path, **source.loading_arguments)
    policy.trunk.fast_layers = config.model.fast_layers
    policy.trunk.records_graphs = config.model.cuda_graphs
    if config.model.torch_compile:
        policy.trunk.compile()
    return policy


def load_critic(config: Config, tokenizer: Any, device: str) -> Critic | None:
    """The critic of its own, None where the policy's value head is it.

    Raises:
        ConfigError: it cannot be had, is no decoder, or does not share the policy's tokenizer.
    """
    if not isinstance(config.critic, ModelCritic):
        return None
    start = critic_start(config.critic, config.reward)
    source: dict[str, Any] = {
        "revision": start.revision,
        "trust_remote_code": start.trust_remote_code,
        "key": "critic.path",
    }
    model = load_classifier(start.path, dtype=config.critic.dtype, device=device, **source)
    theirs = load_reward_tokenizer(start.path, **source)
    rows = model.get_input_embeddings().num_embeddings
    check_shared_vocabulary(start.path, theirs, tokenizer, rows)
    index = label_index(model.config, start.label, key="critic.label")
    critic = Critic(model, index=index, scale=config.reward.weight or 1.0)
    critic.trunk.fast_layers = config.model.fast_layers
    return critic


def critic_start(critic: ModelCritic, reward: RewardSection) -> ModelReward:
    """The classifier that a critic starts from: that of `critic.path`, or else the reward's own."""
    if critic.path == "embedded" or (not critic.path and isinstance(reward, EmbeddedReward)):
        from ppo_lab import embedded

        return ModelReward(path=str(embedded.reward_path()))
    if critic.path:
        return ModelReward(path=critic.path, revision=critic.revision, label=critic.label)
    assert isinstance(reward, ModelReward), "the rules see to it that there is one"
    return replace(reward, label=critic.label or reward.label)


def sampling(
    section: GenerationSection,
    policy: AutoModelForCausalLMWithValueHead,
    tokenizer: Any,
    *,
    eos_token: str = "",
) -> Sampling:
    """The `generation` section as the sampler takes it.

    Raises:
        ConfigError: `stop_token` is not one token of this tokenizer.
    """
    ends = eos_ids(tokenizer, policy.trunk.model, eos_token=eos_token)
    if section.stop_token:
        ends = (_one_token(section.stop_token, tokenizer),)
    return Sampling(
        max_new_tokens=section.max_new_tokens,
        eos_ids=ends,
        pad_id=tokenizer.pad_token_id,
        min_new_tokens=section.min_new_tokens,
        temperature=section.temperature,
        top_k=section.top_k,
        top_p=section.top_p,
        stop_strings=tuple(section.stop_strings),
        batch_size=section.batch_size,
    )


def _one_token(text: str, tokenizer: Any) -> int:
    """The id of the token that says this, or has this name in the vocabulary.

    Tokenizers of SentencePiece's kin put a space before a text, so that what is one token after a
    word may be two at the beginning.
    """

    def ids_of(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    alone, before, after = ids_of(text), ids_of("a"), ids_of(f"a{text}")
    if len(alone) == 1 and alone[0] != tokenizer.unk_token_id:
        return alone[0]
    named = tokenizer.get_vocab().get(text)
    # The name of a byte looks like a letter that is written with other bytes.
    if named is not None and (text.isascii() or text.strip("▁") in tokenizer.decode([named])):
        return named
    rest = after[len(before) :] if after[: len(before)] == before else []
    if len(rest) == 1 and rest[0] != tokenizer.unk_token_id:
        return rest[0]
    unknown = tokenizer.unk_token_id in alone
    is_what = "does not have it" if unknown else f"takes {len(alone)} for it"
    raise ConfigError(
        f"generation.stop_token={text!r}: must be one token of this tokenizer, which {is_what}; "
        "use generation.stop_strings for other texts"
    )


def evaluation_sampling(section: EvaluationSection, training: Sampling) -> Sampling:
    """Sampling for evaluations: what `evaluation` sets, over what training uses."""
    return replace(
        training,
        max_new_tokens=section.max_new_tokens or training.max_new_tokens,
        min_new_tokens=min(
            training.min_new_tokens, section.max_new_tokens or training.max_new_tokens
        ),
        temperature=section.temperature,
        top_k=section.top_k,
        top_p=section.top_p,
    )


def gold_scorer(config: Config) -> Gold | None:
    """The embedded world's rules, where its prompts are used, as texts or as chats; other data has
    no gold score.
    """
    if not isinstance(config.data, EmbeddedData):
        return None
    from ppo_lab import embedded

    return lambda prompts, answers: embedded.gold([as_text(p) for p in prompts], answers)


def pick_device(wanted: str, processes: Alone) -> str:
    """`auto` as the GPU, where there is one; of several processes each has one of its own."""
    if processes.size > 1:
        return processes.device
    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def tell_of_other_gpus(device: str, say: Say) -> None:
    """Say how all GPUs are used, where this run uses one of several; not run here."""
    count = torch.cuda.device_count()
    if device == "cuda" and count > 1:
        say(
            f"one of the {count} GPUs here is used; all of them: "
            f"accelerate launch --num_processes {count} -m ppo_lab ..."
        )


def longest_prompt(config: Config) -> int:
    """The most tokens that a prompt may have, so that the longest response still fits into the
    model's context.

    Raises:
        ConfigError: no prompt does.
    """
    model = load_config(config.model)
    context = max_context(model)
    if context is None:
        return config.data.max_prompt_tokens
    turned = " (beyond, rope_type dynamic or longrope turns a text by others beside it)"
    for problem in no_room(config, context):
        raise ConfigError(f"{problem}{turned if steady_context(model) == context else ''}")
    longest = max(config.generation.max_new_tokens, config.evaluation.max_new_tokens)
    return min(config.data.max_prompt_tokens, context - longest)
