"""Reward modelling on compared pairs by TRL's RewardTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ppo_lab import trl_parts
from ppo_lab.stages.config import FitSection
from ppo_lab.stages.fitting import (
    begun,
    quiet,
    run,
    save,
    scratch_folder,
    training_arguments,
)


def fit_reward_model(
    model: Any,
    tokenizer: Any,
    train: Any,
    held_out: Any,
    *,
    fit: FitSection,
    folder: Path,
    center_rewards_coefficient: float = 0.01,
    seed: int = 0,
    device: str = "auto",
    mixed: bool = False,
    peft_config: Any = None,
    adapter_factor: float = 1.0,
    what: str = "reward modelling",
) -> dict[str, Any]:
    """Teach a sequence classifier with one output which answers are preferred; save it.

        loss = -log sigmoid(r(chosen) - r(rejected)) + c (r(chosen) + r(rejected))^2

    Rows hold `prompt`, `chosen` and `rejected`, all texts or all chat messages. Texts get the
    tokenizer's EOS at their end, which whoever scores with the model must append too. `held_out`
    (rows, or None) gives `held_out_accuracy`: the share of pairs whose chosen answer scores
    higher.

    Source: Bradley and Terry 1952; the centring is Eisenstein et al. 2023, arXiv:2312.09244,
    equation 2.
    """
    trainer_class, config_class = trl_parts.reward_parts()
    with scratch_folder(folder.parent) as scratch, quiet():
        arguments = config_class(
            **training_arguments(fit, scratch=scratch, seed=seed, device=device, mixed=mixed),
            center_rewards_coefficient=center_rewards_coefficient or None,
        )
        trainer = begun(
            trainer_class,
            arguments,
            model=model,
            tokenizer=tokenizer,
            train=train,
            held_out=held_out,
            fit=fit,
            peft_config=peft_config,
            adapter_factor=adapter_factor,
            what="pairs",
        )
        kept = len(trainer.train_dataset)
        report = {"pairs": kept, "pairs_too_long": len(train) - kept, **run(trainer, what)}
        if held_out is not None:
            report |= _held_out(trainer)
        save(trainer, tokenizer, folder, report)
    return report


def _held_out(trainer: Any) -> dict[str, float]:
    """Accuracy, loss and number of the held-out pairs that `max_length` kept."""
    import torch

    trainer.model.eval()
    right = pairs = 0
    loss = 0.0
    with torch.inference_mode():
        for batch in trainer.get_eval_dataloader():
            inputs = trainer._prepare_inputs(batch)
            chosen, rejected = trainer.model(**inputs).logits.float().squeeze(-1).chunk(2)
            right += int((chosen > rejected).sum())
            loss -= float(torch.nn.functional.logsigmoid(chosen - rejected).sum())
            pairs += len(chosen)
    return {
        "held_out": float(pairs),
        "held_out_accuracy": right / pairs,
        "held_out_loss": loss / pairs,
    }
