"""One PPO iteration of TRL 1.12.0's experimental trainer, measured by phase.

As it comes: its separate value model is trained in full, its `bf16=True` default stands (on
transformers 5.23 it does not reach the Accelerator). The reward model is two layers, so that the
comparison is one of trainers.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from metering import Meter, asked, lora, model_config, random_model, report, tokenizer  # noqa: E402
from transformers import AutoModelForSequenceClassification  # noqa: E402
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # noqa: E402


def main() -> None:
    """Warm up, measure, report."""
    spec = asked()
    torch.set_num_threads(spec["threads"])
    total = spec["warm_up"] + spec["measured"]
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=settings(spec, folder, total),
            processing_class=tokenizer(spec),
            model=random_model(spec),
            ref_model=None,
            reward_model=classifier(spec, layers=2),
            value_model=classifier(spec),
            train_dataset=Dataset.from_dict({"input_ids": spec["prompts"]}),
            eval_dataset=Dataset.from_dict({"input_ids": spec["prompts"]}),
            peft_config=lora(spec),
        )
        meters = hook(trainer)
        trainer.train()
    assert len(meters) == total
    report(meters[spec["warm_up"] :])


def settings(spec: dict[str, Any], folder: str, iterations: int) -> PPOConfig:
    """The trainer's defaults, but for the work itself.

    Its batch is `per_device_train_batch_size` times the accumulated steps, and is then divided into
    mini-batches, with an optimizer step after each.
    """
    batch, mini = len(spec["prompts"]), spec["mini_batch_size"]
    return PPOConfig(
        output_dir=folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        num_mini_batches=batch // mini,
        local_rollout_forward_batch_size=batch,
        total_episodes=batch * iterations,
        num_ppo_epochs=spec["ppo_epochs"],
        num_sample_generations=0,
        response_length=spec["new_tokens"],
        temperature=1.0,
        seed=spec["seed"],
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )


def classifier(spec: dict[str, Any], layers: int = 0) -> Any:
    """A model with one score, of the policy's shape and precision, with fewer layers if asked."""
    changed = {spec["layers_key"]: layers} if layers else {}
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, spec["dtype"]))
    try:
        return AutoModelForSequenceClassification.from_config(
            model_config(spec, num_labels=1, **changed)
        )
    finally:
        torch.set_default_dtype(before)


def hook(trainer: PPOTrainer) -> list[Meter]:
    """A meter for each iteration to come, switched by the trainer's own calls."""
    meters: list[Meter] = []
    generate, accumulate, log = (
        ppo_trainer.batch_generation,
        trainer.accelerator.accumulate,
        trainer.log,
    )

    def generating(*args: Any, **kwargs: Any) -> Any:
        meters.append(Meter())
        meters[-1].switch("generate")
        made = generate(*args, **kwargs)
        meters[-1].switch("score")
        assert made[1].shape[:2] == (len(trainer.train_dataset), trainer.args.response_length)
        return made

    def accumulating(*args: Any) -> Any:
        if meters[-1].running != "update":
            meters[-1].switch("update")
        return accumulate(*args)

    def logging(*args: Any, **kwargs: Any) -> Any:
        meters[-1].switch()
        return log(*args, **kwargs)

    ppo_trainer.batch_generation = generating
    trainer.accelerator.accumulate, trainer.log = accumulating, logging
    return meters


if __name__ == "__main__":
    main()
