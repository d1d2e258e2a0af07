"""What a configuration may not be: every wrong setting as one line, all of them at once.

A line holds the dotted key, its value, what is allowed and the nearest valid choice. Nothing here
imports torch unless the configuration asks for a GPU.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import Field, fields, is_dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

from ppo_lab import local_model
from ppo_lab.config import (
    Config,
    DataSection,
    EmbeddedData,
    EmbeddedReward,
    FileData,
    ModelCritic,
    ModelReward,
    PPOSection,
    RewardSection,
    TrackingSection,
    VLLMGeneration,
    WeightedReward,
    bounds_of,
)
from ppo_lab.data import problems as data_problems
from ppo_lab.dead import dead_settings, matches
from ppo_lab.devices import cuda_devices, device_problem
from ppo_lab.errors import suggestion
from ppo_lab.kl import LARGEST_ERROR as LARGEST_KL_ERROR
from ppo_lab.processes import launch
from ppo_lab.resume import MISSING_ONLY, differences
from ppo_lab.rewards.checks import problems as reward_problems

Problems = Iterator[str]
EVALUATED = (
    "mean_reward",
    "objective",
    "std_reward",
    "kl",
    "response_length",
    "eos_rate",
    "distinct_2",
)
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
TEMPLATE_ARGUMENTS = {
    *("add_generation_prompt", "continue_final_message", "conversation", "max_length", "messages"),
    *("padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize"),
    *("tokenizer_kwargs", "truncation"),
}
"""What `apply_chat_template` is told by us, or does not read where it gives texts."""
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def problems(config: Config, stated: Collection[str] = ()) -> list[str]:
    """Everything wrong with a composed configuration, a line each; empty when it may run.

    `stated` are the keys given on the command line: a setting that has no effect is refused where
    it was asked for, and passes where it merely came with a preset. A rule that quotes a value
    already refused is not told: what it blames is often a default, which nobody typed.
    """
    illegal = list(illegal_values(config))
    refused = [line.partition(": must be ")[0] for line in illegal]
    found = [line for line in illegal if not _is_copied(line, illegal, stated)]
    for rule in RULES:
        lines = (line for line in rule(config) if not any(value in line for value in refused))
        found += [line for line in lines if line not in found]
    return [*found, *unnamed_rewards(config, stated), *dead_settings(config, stated)]


def _is_copied(line: str, illegal: Collection[str], stated: Collection[str]) -> bool:
    """Whether a value of `evaluation` is refused that was merely taken over from `generation`."""
    section, _, rest = line.partition(".")
    typed = line.partition("=")[0] in stated
    return section == "evaluation" and not typed and f"generation.{rest}" in illegal


def ppo_problems(ppo: PPOSection) -> list[str]:
    """Everything wrong with the settings of the algorithm alone, under their Python names."""
    found = list(wrong_types(ppo)) or list(illegal_values(ppo))
    return found or [*batch_division(ppo), *ppo_conflicts(ppo)]


def allowed(knob: Field) -> str:
    """The legal range of a field in words; empty where everything of its type is legal."""
    legal = bounds_of(knob)
    if "choices" in legal:
        return "one of " + ", ".join(legal["choices"])
    words = (
        ("at_least", "at least"),
        ("above", "above"),
        ("at_most", "at most"),
        ("below", "below"),
    )
    return " and ".join(f"{word} {legal[name]}" for name, word in words if name in legal)


def is_legal(knob: Field, value: Any) -> bool:
    """Whether a value of the right type lies in its field's range."""
    legal = bounds_of(knob)
    if "choices" in legal:
        return value in legal["choices"]
    if _is_infinite(value):
        return False
    return (
        value >= legal.get("at_least", value)
        and value <= legal.get("at_most", value)
        and ("above" not in legal or value > legal["above"])
        and ("below" not in legal or value < legal["below"])
    )


def _is_infinite(value: Any) -> bool:
    """Whether a number is infinite or NaN, which no range of ours allows."""
    return isinstance(value, float) and not math.isfinite(value)


def illegal_values(section: Any, prefix: str = "") -> Problems:
    """Each value outside its field's range, in this section and those inside it."""
    for knob in fields(section):
        key, value = prefix + knob.name, getattr(section, knob.name)
        inner = value.items() if isinstance(value, dict) else [("", value)]
        for name, part in inner:
            if is_dataclass(part):
                yield from illegal_values(part, f"{key}.{name}." if name else f"{key}.")
        if isinstance(value, (str, int, float)) and not is_legal(knob, value):
            near = suggestion(value, bounds_of(knob)["choices"]) if isinstance(value, str) else ""
            legal = "a finite number" if _is_infinite(value) else allowed(knob)
            yield f"{key}={value}: must be {legal}{near}"


def wrong_types(section: Any) -> Problems:
    """Each value that is not of its field's type, for sections made in Python."""
    hints = get_type_hints(type(section))
    for knob in fields(section):
        value, kind = getattr(section, knob.name), hints[knob.name]
        number = kind is float and isinstance(value, int) and not isinstance(value, bool)
        if kind in TYPE_NAMES and type(value) is not kind and not number:
            yield f"{knob.name}={value!r}: must be {TYPE_NAMES[kind]}"


def batch_division(ppo: PPOSection, prefix: str = "") -> Problems:
    """A batch that does not fall into whole optimizer steps."""
    mini, accumulated = ppo.mini_batch_size or ppo.batch_size, ppo.gradient_accumulation_steps
    step = mini * accumulated
    if step <= 0 or ppo.batch_size % step == 0:
        return
    whole = " (0 = the whole batch)" if ppo.mini_batch_size == 0 else ""
    left = f"{ppo.batch_size} = {ppo.batch_size // step} x {step} + {ppo.batch_size % step}"
    yield (
        f"{prefix}batch_size={ppo.batch_size}: must be a multiple of {prefix}mini_batch_size x "
        f"{prefix}gradient_accumulation_steps = {mini}{whole} x {accumulated} = {step}; {left}"
    )


def ppo_conflicts(ppo: PPOSection, prefix: str = "") -> Problems:
    """Settings of the algorithm that contradict each other."""
    if ppo.use_score_norm and not ppo.use_score_scaling:
        yield f"{prefix}use_score_norm=true: needs {prefix}use_score_scaling=true"
    if ppo.adap_kl_ctrl and ppo.init_kl_coef == 0:
        yield (
            f"{prefix}init_kl_coef=0: an adaptive beta is multiplied and would stay 0; "
            f"set it above 0, or {prefix}adap_kl_ctrl=false"
        )
    if ppo.adap_kl_ctrl and LARGEST_KL_ERROR * ppo.batch_size >= ppo.horizon:
        yield (
            f"{prefix}horizon={ppo.horizon}: counts samples; at {prefix}batch_size="
            f"{ppo.batch_size} one iteration could take an adaptive beta to 0 or below; must be "
            f"above {LARGEST_KL_ERROR * ppo.batch_size:g}"
        )
    if 0 < ppo.ratio_threshold <= 1:
        yield (
            f"{prefix}ratio_threshold={ppo.ratio_threshold:g}: the ratio starts at 1, so this "
            "would skip every update; must be above 1, or 0 = never"
        )
    if ppo.cache_trunk and ppo.gradient_checkpointing:
        yield (
            f"{prefix}gradient_checkpointing=true: computes again what {prefix}cache_trunk=true "
            "keeps; leave one of them out"
        )
    if ppo.warmup_steps >= ppo.steps:
        yield f"{prefix}warmup_steps={ppo.warmup_steps}: must be below {prefix}steps={ppo.steps}"


def ppo_rules(config: Config) -> Problems:
    """`ppo` as a whole."""
    if config.ppo.cache_trunk and launch.sharding():
        yield (
            "ppo.cache_trunk=true: layers of sharded models are gathered by their own forward "
            "alone; leave it out, or use conf/accelerate/ddp.yaml"
        )
    if config.ppo.ema_decay and launch.sharding():
        yield (
            f"ppo.ema_decay={config.ppo.ema_decay:g}: an average of sharded weights or optimizers "
            "is not kept; use 0, or conf/accelerate/ddp.yaml"
        )
    yield from batch_division(config.ppo, "ppo.")
    yield from ppo_conflicts(config.ppo, "ppo.")
    if config.ppo.cache_trunk and not (config.lora.r and config.lora.top_layers):
        yield (
            "ppo.cache_trunk=true: needs frozen layers below the adapter; adapt the upper layers "
            "alone with lora=r16 lora.top_layers=N"
        )
    if config.ppo.cache_trunk and config.lora.use_dora:
        yield (
            "lora.use_dora=true: ppo.cache_trunk=true passes the layers one by one, which is not "
            "known of DoRA's; leave one of them out"
        )
    if config.ppo.cache_trunk and not config.model.fast_layers:
        yield (
            "model.fast_layers=false: ppo.cache_trunk=true passes the layers one by one, which "
            "transformers does not; leave one of them out"
        )


def adam_rules(config: Config) -> Problems:
    """8-bit Adam where it cannot be had."""
    if config.ppo.adam != "8bit":
        return
    if find_spec("bitsandbytes") is None:
        yield "ppo.adam=8bit: needs bitsandbytes: pip install 'ppo_lab[quantization]'"
    elif _version_of("bitsandbytes") < (0, 50) and config.device in ("auto", "cpu"):
        yield (
            "ppo.adam=8bit: this bitsandbytes has no 8-bit Adam for a CPU; needs version 0.50: "
            "pip install 'ppo_lab[quantization]'"
        )
    if launch.sharding():
        yield (
            "ppo.adam=8bit: its blocks of moments cannot be sharded; use ppo.adam=torch, or "
            "conf/accelerate/ddp.yaml"
        )


def compile_rules(config: Config) -> Problems:
    """A decoder to be compiled without a compiler, or beside what takes its place."""
    if not config.model.torch_compile:
        return
    if not os.environ.get("CXX") and not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        yield "model.torch_compile=true: needs a C++ compiler, and there is none on the path"
    if config.ppo.cache_trunk:
        yield (
            "model.torch_compile=true: ppo.cache_trunk=true passes the layers one by one; leave "
            "one of them out"
        )
    if config.ppo.gradient_checkpointing:
        yield (
            "model.torch_compile=true: a compiled decoder chooses by itself what it computes "
            "again; leave ppo.gradient_checkpointing out"
        )
    if launch.sharding():
        yield (
            "model.torch_compile=true: layers of sharded models are gathered by their own forward "
            "alone; leave it out, or use conf/accelerate/ddp.yaml"
        )


def micro_batch_rules(config: Config) -> Problems:
    """Passes as large as memory lets them be, where processes must make them together."""
    if config.ppo.micro_batch_tokens == -1 and launch.sharding():
        yield (
            "ppo.micro_batch_tokens=-1: processes with shards of a model make their passes "
            "together; give a number, 0 = no limit"
        )


def _version_of(package: str) -> tuple[int, ...]:
    """The first two numbers of an installed package's version."""
    return tuple(int(part) for part in re.findall(r"\d+", metadata.version(package))[:2])


def generation_rules(config: Config) -> Problems:
    """Lengths and sampling that contradict each other."""
    training, evaluation = config.generation, config.evaluation
    for name, longest in (("generation", training), ("evaluation", evaluation)):
        if training.min_new_tokens > longest.max_new_tokens:
            yield (
                f"generation.min_new_tokens={training.min_new_tokens}: must be at most "
                f"{name}.max_new_tokens={longest.max_new_tokens}"
            )
    if "" in training.stop_strings:
        yield (
            "generation.stop_strings: an empty text is in every response, and would end it at its "
            "first token; leave it out ([] = none)"
        )


def sampler_rules(config: Config) -> Problems:
    """vLLM where it cannot sample."""
    if not isinstance(config.generation, VLLMGeneration):
        return
    if find_spec("vllm") is None:
        yield "generation=vllm: needs vLLM: pip install 'ppo_lab[vllm]'"
    if config.device == "cpu" or not cuda_devices():
        yield "generation=vllm: needs a CUDA GPU, and there is none here; use generation=default"
    if config.model.weights == "random":
        yield "generation=vllm: reads weights from files, and model.weights=random has none"
    if config.generation.server and config.generation.sleep:
        yield "generation.sleep=true: is for vLLM in this process; a server keeps its memory"


def model_rules(config: Config) -> Problems:
    """A policy that cannot be had."""
    model = config.model
    yield from model_folder("model.path", model.path)
    yield from model_folder("model.tokenizer", model.tokenizer, holds="", needed=False)
    yield from local_model.problems(model)
    yield from local_model.room_problems(config)
    if model.dtype == "float16" and not config.lora.r and config.ppo.adam != "8bit":
        yield (
            "model.dtype=float16: Adam's moments of weights in float16 fall to 0, and its steps "
            "destroy them; train all weights (lora=none) in float32 or bfloat16, or an adapter"
        )
    if not model.load_in_4bit:
        return
    if config.lora.r == 0:
        yield "model.load_in_4bit=true: 4-bit weights cannot be trained; needs lora=r8, r16 or r64"
    if config.device == "cpu" or not cuda_devices():
        yield "model.load_in_4bit=true: needs a CUDA GPU, and there is none here"
    if find_spec("bitsandbytes") is None:
        yield "model.load_in_4bit=true: needs bitsandbytes: pip install 'ppo_lab[quantization]'"


def model_folder(
    key: str, path: str, *, holds: str = "config.json", needed: bool = True
) -> Problems:
    """A path that is neither a hub id nor a folder with a model in it."""
    if not path or path == "embedded":
        if needed and not path:
            yield f"{key}=: missing; give a folder with a model in it, or an id on the hub"
        return
    try:
        yield from _no_model(key, path, holds)
    except (OSError, RuntimeError) as error:  # no permission; a home folder of nobody
        yield f"{key}={path}: cannot be read ({error})"


def _no_model(key: str, path: str, holds: str) -> Problems:
    folder = Path(path).expanduser()
    if not folder.exists():
        if not HUB_ID.fullmatch(path):
            yield f"{key}={path}: no such folder{nearby(folder)}"
    elif not folder.is_dir():
        yield f"{key}={path}: is a file; must be a folder"
    elif holds and not any((folder / name).exists() for name in (holds, "adapter_config.json")):
        yield f"{key}={path}: no {holds} in this folder; it holds no model"


def nearby(path: Path) -> str:
    """The nearest name beside a path that does not exist, as a suggestion."""
    try:
        return suggestion(path.name, [entry.name for entry in path.parent.iterdir()])
    except OSError:
        return f"; {path.parent} does not exist either"


def device_rules(config: Config) -> Problems:
    """Devices that are no devices, or are not here."""
    wanted = {"device": config.device}
    for key, section in rewards(config.reward):
        if isinstance(section, ModelReward):
            wanted[f"{key}.device"] = section.device
    for key, device in wanted.items():
        yield from device_problem(key, device)


def rewards(section: RewardSection, key: str = "reward") -> Iterator[tuple[str, RewardSection]]:
    """A reward and, where it is a weighted sum, every part of it, with their dotted keys."""
    yield key, section
    if isinstance(section, WeightedReward):
        for name, part in section.parts.items():
            yield from rewards(part, f"{key}.parts.{name}")


def reward_rules(config: Config) -> Problems:
    """Rewards that could not score anything."""
    if type(config.reward) is RewardSection:
        yield "reward: none chosen; it is an option of the group `reward`"
    else:
        yield from reward_problems(config.reward)


def unnamed_rewards(config: Config, stated: Collection[str]) -> Problems:
    """The help desk's reward model where the command chose other prompts and did not name it.

    A preset may mean it, and a run that goes on has begun with it.
    """
    own_prompts = isinstance(config.data, FileData) and "data" in stated
    if not own_prompts or config.resume or "resume" in stated:
        return
    reward = config.reward
    if isinstance(reward, EmbeddedReward) and not any(
        matches(key.partition("@")[0], ("reward", "reward.")) for key in stated
    ):
        yield (
            "reward: none named, and the default is the help desk's reward model; name one, such "
            "as reward=function, reward=model or reward=vader, or reward=embedded to mean it"
        )
    part = "reward.parts.embedded"
    parts = reward.parts if isinstance(reward, WeightedReward) else {}
    is_left_in = isinstance(parts.get("embedded"), EmbeddedReward)
    if is_left_in and not any(matches(k, (part, f"{part}.", f"reward@{part}")) for k in stated):
        yield (
            f"{part}: part of reward=weighted by default, and the help desk's reward model; "
            f"~{part} takes it out, {part}.weight=1 means it"
        )


def critic_rules(config: Config) -> Problems:
    """A critic that could not be made of the reward, or that leaves the policy no iteration."""
    critic, reward = config.critic, config.reward
    if critic.warmup_steps >= config.ppo.steps:
        yield (
            f"critic.warmup_steps={critic.warmup_steps}: must be below ppo.steps={config.ppo.steps}"
            ", or the policy would never learn"
        )
    if critic.epochs > config.ppo.ppo_epochs:
        yield (
            f"critic.epochs={critic.epochs}: must be at most "
            f"ppo.ppo_epochs={config.ppo.ppo_epochs}; 0 = all"
        )
    if not isinstance(critic, ModelCritic):
        return
    if critic.path:
        yield from model_folder("critic.path", critic.path)
    elif not isinstance(reward, ModelReward | EmbeddedReward):
        yield (
            "critic=reward_model: this reward is no single reward model; name one with "
            "critic.path=FOLDER, or use critic=head"
        )
    elif isinstance(reward, ModelReward) and reward.output != "logit":
        yield (
            f"critic=reward_model: starts from the reward's logit, and its score is "
            f"reward.output={reward.output}; use reward.output=logit or critic=head"
        )


def data_rules(config: Config) -> Problems:
    """Prompts that cannot be had, or bounds that leave none."""
    data = config.data
    if type(data) is DataSection:
        yield "data: no source chosen; it is an option of the group `data`"
    if data.min_prompt_tokens > data.max_prompt_tokens:
        yield (
            f"data.min_prompt_tokens={data.min_prompt_tokens}: must be at most "
            f"data.max_prompt_tokens={data.max_prompt_tokens}"
        )
    if 1 < data.held_out < math.inf and data.held_out != int(data.held_out):
        yield f"data.held_out={data.held_out:g}: must be a share below 1, or a whole number"
    if isinstance(data, FileData) and data.cut_min_tokens > data.cut_max_tokens:
        yield (
            f"data.cut_min_tokens={data.cut_min_tokens}: must be at most "
            f"data.cut_max_tokens={data.cut_max_tokens}"
        )
    yield from template_problems(data.template_kwargs)
    yield from data_problems(data)


def template_problems(variables: Collection[str]) -> Problems:
    """Names that no chat template could be given as variables."""
    for name in sorted(TEMPLATE_ARGUMENTS.intersection(variables)):
        yield f"data.template_kwargs.{name}: is no variable of a template; leave it out"
    for name in sorted(name for name in variables if not str(name).isidentifier()):
        yield f"data.template_kwargs.{name}: no template can name it; use letters, digits and _"


def tracking_rules(config: Config) -> Problems:
    """A mirror whose package is not installed, and names that W&B would refuse."""
    if config.tracking.type == "wandb":
        yield from _wandb_names(config.tracking)
    if config.tracking.type == "tensorboard" and find_spec("tensorboard") is None:
        yield (
            "tracking=tensorboard: needs the package tensorboard; "
            "pip install 'ppo_lab[tensorboard]'"
        )


def _wandb_names(tracking: TrackingSection) -> Problems:
    for key, most, reserved in (("project", 128, "/\\#?%:"), ("id", 128, ":;,#?/'")):
        name = getattr(tracking, key)
        found = " ".join(sorted(set(name) & set(reserved)))
        if found or len(name) > most:
            wrong = f"may not hold {found}" if found else f"may have at most {most} characters"
            yield f"tracking.{key}={name}: W&B's name of it {wrong}"
    for tag in tracking.tags:
        if not 1 <= len(tag) <= 64:
            yield f"tracking.tags: {tag!r} has {len(tag)} characters; W&B takes 1 to 64"


def metric_rules(config: Config) -> Problems:
    """Held-out metrics that no evaluation has, found out before the run and not at its end."""
    valid = [f"eval/{name}" for name in EVALUATED]
    valid += ["eval/gold"] if isinstance(config.data, EmbeddedData) else []
    for key, metric in (
        ("objective", config.objective),
        ("checkpoint.best_metric", config.checkpoint.best_metric),
    ):
        part = metric.startswith("eval/reward/")
        off = key != "objective" and not metric
        if metric not in valid and not part and not off:
            yield f"{key}={metric}: must be one of {', '.join(valid)}{suggestion(metric, valid)}"


def profile_rules(config: Config) -> Problems:
    """A profile of iterations that a run does not have."""
    if config.profile and config.ppo.steps < 2 and not config.resume:
        yield (
            "profile=true: traces the iterations from the second to the fourth, and "
            f"ppo.steps={config.ppo.steps} has none of them; needs ppo.steps=2 or more"
        )


def resume_rules(config: Config) -> Problems:
    """A run to continue that is not there, or settings that would change its numbers."""
    if config.resume not in ("", *MISSING_ONLY):
        yield from differences(config)


RULES: tuple[Callable[[Config], Problems], ...] = (
    ppo_rules,
    adam_rules,
    micro_batch_rules,
    compile_rules,
    profile_rules,
    generation_rules,
    sampler_rules,
    model_rules,
    device_rules,
    reward_rules,
    critic_rules,
    data_rules,
    metric_rules,
    tracking_rules,
    resume_rules,
)
