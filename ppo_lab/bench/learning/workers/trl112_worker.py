"""TRL 1.12.0's experimental trainer: a separate critic, started from the reward model."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer  # noqa: E402


def main() -> None:
    """Train as asked, and save the policy."""
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    tokenizer = AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
    lines = Path(spec["prompts"]).read_text().splitlines()
    rows = [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines]
    data = Dataset.from_dict({"input_ids": rows})
    causal, classifier = AutoModelForCausalLM, AutoModelForSequenceClassification
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=settings(spec, folder),
            processing_class=tokenizer,
            model=causal.from_pretrained(spec["model"]),
            ref_model=causal.from_pretrained(spec["model"]),
            reward_model=classifier.from_pretrained(spec["reward_model"]),
            value_model=classifier.from_pretrained(spec["reward_model"]),
            train_dataset=data,
            eval_dataset=data.select(range(spec["batch"])),
        )
        steps: list[None] = []
        register_optimizer_step_post_hook(lambda *_: steps.append(None))
        trainer.train()
    expected = spec["iterations"] * spec["epochs"] * spec["batch"] // spec["mini_batch"]
    assert len(steps) == expected, f"{len(steps)} optimizer steps, not {expected}"
    policy: Any = trainer.accelerator.unwrap_model(trainer.model).policy
    policy.save_pretrained(spec["output"])


def settings(spec: dict[str, Any], folder: str) -> PPOConfig:
    """The trainer's defaults, but for the work itself.

    Its batch is `per_device_train_batch_size` times the accumulated steps, and is then divided into
    mini-batches, with an optimizer step after each.
    """
    return PPOConfig(
        output_dir=folder,
        per_device_train_batch_size=spec["batch"],
        gradient_accumulation_steps=1,
        num_mini_batches=spec["batch"] // spec["mini_batch"],
        local_rollout_forward_batch_size=spec["batch"],
        total_episodes=spec["batch"] * spec["iterations"],
        num_ppo_epochs=spec["epochs"],
        num_sample_generations=0,
        response_length=spec["new_tokens"],
        temperature=1.0,
        kl_coef=spec["beta"],
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="constant",
        seed=spec["seed"],
        bf16=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )


if __name__ == "__main__":
    main()
