"""A stage from its configuration: what is wrong with it, and the run itself."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ppo_lab import local_model
from ppo_lab.dead import matches
from ppo_lab.devices import device_problem
from ppo_lab.errors import ConfigError
from ppo_lab.on_disk import unwritable
from ppo_lab.processes.launch import is_launched
from ppo_lab.record import brief
from ppo_lab.rewards.conversation import keep_variables
from ppo_lab.rules import illegal_values, model_folder, template_problems
from ppo_lab.stages.config import RewardModelConfig, SFTConfig, StageSection
from ppo_lab.stages.examples import (
    chat_template,
    data_problems,
    merging_prompts,
    read_rows,
    split_rows,
    with_variables,
)
from ppo_lab.typed import shell_override

MOST_LOOKED_AT = 1000  # prompts of which is asked how their tokens end
UNREAD_OF_MODEL = ("model.torch_compile", "model.fast_layers", "model.cuda_graphs")
UNREAD = ("ppo.", "generation.", "evaluation.", "critic.", *UNREAD_OF_MODEL)


def problems(config: Any, stated: Collection[str] = ()) -> list[str]:
    """Everything wrong with a composed stage, a line each; empty when it may run."""
    found = list(illegal_values(config))
    found += model_folder("model.path", config.model.path)
    found += model_folder("model.tokenizer", config.model.tokenizer, holds="", needed=False)
    found += local_model.problems(config.model)
    found += device_problem("device", config.device)
    if is_launched():
        found.append(
            "several processes were launched: a stage before PPO trains in one; start it "
            "without torchrun or accelerate launch"
        )
    found += template_problems(config.data.template_kwargs)
    found += data_problems(config.data)
    found += _output_problems(config.output)
    return list(dict.fromkeys([*found, *_dead(config, stated)]))


def _dead(config: StageSection, stated: Collection[str]) -> Iterator[str]:
    """What this stage would not read."""
    if config.model.load_in_4bit:
        yield "model.load_in_4bit=true: the stages before PPO train in full precision"
    for key in stated:
        if matches(key, UNREAD):
            yield f"{key}: has no effect here, it belongs to python -m ppo_lab"
        elif config.lora.r == 0 and key.startswith("lora.") and key != "lora.r":
            yield f"{key}: has no effect, lora.r is 0; needs lora=r8, r16 or r64"


def _output_problems(output: str) -> Iterator[str]:
    folder = Path(output).expanduser()
    if output and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        yield f"output={output}: exists and is not an empty folder; must be a new one"
    elif output:
        yield from unwritable("output", str(folder))


def run_sft(config: SFTConfig, folder: Path, overrides: list[str]) -> float:
    """Fine-tune as configured, say what came out, and return the held-out loss (nats per token)."""
    from ppo_lab.models.loading import load_causal_lm
    from ppo_lab.models.lora import merged
    from ppo_lab.stages.sft import fit_sft

    parts = _Parts(config)
    looked_at = parts.train[:MOST_LOOKED_AT]
    if merging := merging_prompts(looked_at, parts.tokenizer):
        print(
            f"prompts         {merging} of {len(looked_at)} end within a token that their "
            "completion goes on with, and a run goes on from other tokens; let the completion "
            "begin with the space"
        )
    loaded = load_causal_lm(
        parts.model_section, device=parts.device, dtype=parts.dtype, seed=config.seed
    )
    model = merged(loaded)
    out, arguments = _output(config, folder), parts.arguments(model)
    with _whole(out):
        report = fit_sft(model, folder=out, **arguments)
    if report["examples_too_long"]:
        print(f"left out        {report['examples_too_long']} prompts as long as fit.max_length")
    if "held_out_loss" in report:
        before, after = report["held_out_loss_before"], report["held_out_loss"]
        print(f"held-out loss   {before:.4f} -> {after:.4f} nats per token")
    print(
        f"model           {out}\n"
        f"next            python -m ppo_lab model=local {shell_override('model.path', out)} ..."
    )
    return float(report.get("held_out_loss", report["train_loss"]))


def run_reward_model(config: RewardModelConfig, folder: Path, overrides: list[str]) -> float:
    """Train a reward model as configured, say what came out, and return its held-out accuracy."""
    from ppo_lab.stages.classifier import classifier_from
    from ppo_lab.stages.reward_model import fit_reward_model

    parts = _Parts(config)
    model = classifier_from(
        parts.model_section, device=parts.device, dtype=parts.dtype, seed=config.seed
    )
    out, arguments = _output(config, folder), parts.arguments(model, task="SEQ_CLS")
    center = config.center_rewards_coefficient
    with _whole(out):
        report = fit_reward_model(model, folder=out, center_rewards_coefficient=center, **arguments)
        keep_variables(parts.tokenizer, config.data.template_kwargs, folder=out)
    if report["pairs_too_long"]:
        print(f"left out           {report['pairs_too_long']} pairs longer than fit.max_length")
    if "held_out_accuracy" in report:
        accuracy, count = report["held_out_accuracy"], int(report["held_out"])
        print(f"held-out accuracy  {accuracy:.3f} ({count} {'pair' if count == 1 else 'pairs'})")
    path = shell_override("reward.path", out)
    print(f"reward model       {out}\nnext               python -m ppo_lab reward=model {path} ...")
    return float(report.get("held_out_accuracy", 0.0))


def _output(config: StageSection, folder: Path) -> Path:
    return Path(config.output).expanduser() if config.output else folder / "model"


@contextmanager
def _whole(folder: Path) -> Iterator[None]:
    """A folder that is left as it was, not there or empty, where what goes into it is not whole.

    Raises:
        ConfigError: the disk refuses.
    """
    place = folder.resolve()
    there = place.exists()
    is_new = not there or not any(place.iterdir())
    try:
        yield
    except BaseException as error:
        if is_new:
            shutil.rmtree(place, ignore_errors=True)
        if is_new and there:
            place.mkdir(exist_ok=True)
        if isinstance(error, OSError | SafetensorError):
            raise ConfigError(
                f"{folder}: cannot be written ({brief(error)}), and nothing was kept; make room "
                "and start again, or choose another disk with output=FOLDER"
            ) from error
        raise


class _Parts:
    """What both stages load: device, precision, tokenizer and rows."""

    def __init__(self, config: SFTConfig | RewardModelConfig) -> None:
        import torch

        from ppo_lab.models.loading import choose_dtype, load_tokenizer

        self.config = config
        self.device = _device(config.device)
        chosen = choose_dtype(config.model.dtype, self.device)
        self.mixed = self.device.type == "cuda" and chosen == torch.bfloat16 and config.lora.r == 0
        self.dtype = chosen if config.lora.r else torch.float32
        self.model_section = _resolved(config.model)
        self.tokenizer = load_tokenizer(self.model_section)
        variables = config.data.template_kwargs
        render = chat_template(self.tokenizer, variables)
        rows = read_rows(config.data, render=render, seed=config.seed)
        self.train, self.held_out = split_rows(
            with_variables(rows, variables), config.data.held_out
        )
        if self.tokenizer.eos_token is None:
            raise ConfigError(
                "model.eos_token: this tokenizer has none; name the token that ends a text"
            )

    def arguments(self, model: Any, task: str = "CAUSAL_LM") -> dict[str, Any]:
        """The arguments that both fits share."""
        from datasets import Dataset

        from ppo_lab.models.lora import lora_config

        if self.config.fit.gradient_checkpointing and not model.supports_gradient_checkpointing:
            raise ConfigError(
                "fit.gradient_checkpointing=true: this architecture cannot recompute activations"
            )
        adapter = lora_config(self.config.lora, model) if self.config.lora.r else None
        if adapter is not None:
            adapter.task_type = task
            adapter.modules_to_save = ["score"] if task == "SEQ_CLS" else None
        return {
            "tokenizer": self.tokenizer,
            "train": Dataset.from_list(self.train),
            "held_out": Dataset.from_list(self.held_out) if self.held_out else None,
            "fit": self.config.fit,
            "seed": self.config.seed,
            "device": self.device.type,
            "mixed": self.mixed,
            "peft_config": adapter,
            "adapter_factor": self.config.lora.learning_rate_factor,
        }


def _device(name: str) -> Any:
    """The device; TRL's trainers take the first GPU that they see, so others are hidden."""
    import os

    number = name.partition(":")[2] or "0"
    if name != "cpu":
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", number)
    import torch

    usable = name != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if usable else "cpu")


def _resolved(section: Any) -> Any:
    """The model section with the embedded policy's folder in place of its name."""
    if section.path != "embedded":
        return section
    from ppo_lab import embedded

    return replace(section, path=str(embedded.policy_path()))
