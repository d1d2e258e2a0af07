"""Supervised fine-tuning by TRL's SFTTrainer."""

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


def fit_sft(
    model: Any,
    tokenizer: Any,
    train: Any,
    held_out: Any,
    *,
    fit: FitSection,
    folder: Path,
    seed: int = 0,
    device: str = "auto",
    mixed: bool = False,
    peft_config: Any = None,
    adapter_factor: float = 1.0,
    group_by_length: bool = False,
    what: str = "supervised fine-tuning",
) -> dict[str, Any]:
    """Teach `model` the rows of `train` and save it into `folder`; what came out, in numbers.

    Rows hold `text`, or `prompt` and `completion` (the loss is then on completions alone), or chat
    `messages`. Texts get the tokenizer's EOS at their end. A prompt as long as `fit.max_length`
    leaves nothing of its completion to learn from, and is left out. `held_out` (rows, or None)
    gives `held_out_loss`: nats per token, before (`held_out_loss_before`) and after. An adapter
    learns `adapter_factor` times as fast as `fit.learning_rate`. `group_by_length` makes batches of
    texts of like length: less padding, a less random order.
    """
    trainer_class, config_class = trl_parts.sft_parts()
    with scratch_folder(folder.parent) as scratch, quiet():
        arguments = config_class(
            **training_arguments(fit, scratch=scratch, seed=seed, device=device, mixed=mixed),
            train_sampling_strategy="group_by_length" if group_by_length else "random",
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
            what="prompts",
        )
        kept = len(trainer.train_dataset)
        before = _held_out_loss(trainer, held_out)
        report: dict[str, Any] = {
            "examples": kept,
            "examples_too_long": len(train) - kept,
            **run(trainer, what),
        }
        after = _held_out_loss(trainer, held_out)
        if held_out is not None:
            report |= {
                "held_out": len(trainer.eval_dataset),
                "held_out_loss_before": before,
                "held_out_loss": after,
            }
        save(trainer, tokenizer, folder, report)
    return report


def _held_out_loss(trainer: Any, held_out: Any) -> float | None:
    """Nats per token over all tokens held out.

    The trainer's own `evaluate` takes the mean over batches, whatever number of tokens each has, so
    that short texts weigh more and the result follows `fit.batch_size`.
    """
    if held_out is None:
        return None
    trainer.model.eval()
    nats = tokens = 0.0
    with trainer.accelerator.autocast():
        for batch in trainer.get_eval_dataloader():
            learnt = int((batch["labels"][:, 1:] != -100).sum())
            mean, *_ = trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)
            nats, tokens = nats + float(mean) * learnt, tokens + learnt
    return nats / tokens
