"""What both stages ask of TRL's trainers: quiet, one line of progress, a folder at the end."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ppo_lab.errors import ConfigError
from ppo_lab.optim import make_schedule
from ppo_lab.rewards.conversation import one_day
from ppo_lab.stages.config import FitSection


def training_arguments(
    fit: FitSection, *, scratch: str, seed: int, device: str, mixed: bool
) -> dict[str, Any]:
    """The arguments of both; `mixed` computes in bfloat16 beside float32 weights."""
    return {
        "output_dir": scratch,
        "num_train_epochs": fit.epochs,
        "per_device_train_batch_size": fit.batch_size,
        "per_device_eval_batch_size": fit.batch_size,
        "gradient_accumulation_steps": fit.gradient_accumulation_steps,
        "learning_rate": fit.learning_rate,
        "weight_decay": fit.weight_decay,
        "max_grad_norm": fit.max_grad_norm,
        "max_length": fit.max_length,
        "gradient_checkpointing": fit.gradient_checkpointing,
        "use_cpu": device == "cpu",
        "bf16": mixed,
        "seed": seed,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "eval_strategy": "no",
        "dataloader_pin_memory": device != "cpu",
    }


@contextmanager
def scratch_folder(beside: Path) -> Iterator[str]:
    """A temporary folder for what the trainers insist on writing."""
    beside.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=".fit-", dir=beside)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings of the libraries underneath."""
    import datasets
    import transformers

    verbosity = transformers.logging.get_verbosity()
    bars = datasets.are_progress_bars_disabled()
    hub_bars = transformers.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    logging.getLogger("trl").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if hub_bars:
            transformers.logging.enable_progress_bar()
        if not bars:
            datasets.enable_progress_bars()


def begun(
    trainer_class: Any,
    arguments: Any,
    *,
    model: Any,
    tokenizer: Any,
    train: Any,
    held_out: Any,
    fit: FitSection,
    peft_config: Any,
    adapter_factor: float,
    what: str,
) -> Any:
    """One of TRL's trainers with its rows as tokens, its learning rate PPO's; `what` is what a
    message calls rows that are too long.

    Raises:
        ConfigError: all rows are.
    """
    with one_day(tokenizer):
        trainer = trainer_class(
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            peft_config=peft_config,
        )
    _silence(trainer)
    _follow_schedule(trainer, fit, adapter_factor=adapter_factor)
    _refuse_empty(trainer, train, held_out, max_length=fit.max_length, what=what)
    return trainer


def _silence(trainer: Any) -> None:
    """Take away the callback that prints every dictionary of metrics."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _follow_schedule(trainer: Any, fit: FitSection, *, adapter_factor: float) -> None:
    """Give the trainer the course of the learning rate that PPO has, and an adapter
    `adapter_factor` times that rate.

    transformers' own begins a warm-up at 0 and makes it a step long at least: a stage of one
    optimizer step would learn nothing.
    """

    def create(num_training_steps: int, optimizer: Any = None) -> Any:
        optimizer = optimizer or trainer.optimizer
        _set_apart(optimizer, adapter_weights(trainer.model), factor=adapter_factor)
        trainer.lr_scheduler = make_schedule(
            optimizer,
            lr_schedule=fit.lr_schedule,
            warmup_steps=int(fit.warmup_ratio * num_training_steps),
            steps=num_training_steps,
        )
        return trainer.lr_scheduler

    trainer.create_scheduler = create


def adapter_weights(model: Any) -> list[Any]:
    """The weights of an adapter; none of a head that is trained beside it."""
    return [p for name, p in model.named_parameters() if "lora_" in name]


def _set_apart(optimizer: Any, weights: list[Any], *, factor: float) -> None:
    """Move some weights into groups of their own, `factor` times as fast as those they were in."""
    apart = {id(p) for p in weights}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in apart]
        if moved:
            group["params"] = [p for p in group["params"] if id(p) not in apart]
            optimizer.add_param_group({**group, "params": moved, "lr": factor * group["lr"]})


def _refuse_empty(trainer: Any, train: Any, held_out: Any, *, max_length: int, what: str) -> None:
    """Nothing, if the length bound leaves rows to train on and to hold out; `what` is what a
    message calls what is too long.

    Raises:
        ConfigError: otherwise; a loss or an accuracy over nothing would say nothing.
    """
    for use, given, kept in (
        ("to train on", train, trainer.train_dataset),
        ("held out", held_out, trainer.eval_dataset),
    ):
        if given is not None and not len(kept):
            raise ConfigError(
                f"fit.max_length={max_length}: all {len(given)} {what} {use} are longer; raise it."
            )


def run(trainer: Any, what: str) -> dict[str, float]:
    """Train with one line of progress; the mean loss, the optimizer steps and the seconds."""
    trainer.add_callback(_progress_line(what))
    begun = time.perf_counter()
    outcome = trainer.train()
    return {
        "train_loss": outcome.training_loss,
        "steps": float(outcome.global_step),
        "seconds": time.perf_counter() - begun,
    }


def _progress_line(what: str) -> Any:
    """A callback that keeps one line up to date: on a terminal every step, else at the end."""
    from transformers import TrainerCallback

    class ProgressLine(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if sys.stderr.isatty():
                self._write(state, end="")

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._write(state, end="\n")

        def _write(self, state: Any, end: str) -> None:
            seconds = time.perf_counter() - self.begun
            line = f"{what}: step {state.global_step}/{state.max_steps}, {seconds:.0f} s"
            print(
                f"\r{line}" if sys.stderr.isatty() else line, end=end, file=sys.stderr, flush=True
            )

    return ProgressLine()


def save(trainer: Any, tokenizer: Any, folder: Path, report: dict[str, Any]) -> None:
    """Write model, tokenizer and `report.json` into `folder`; an adapter is merged first.

    What is written loads by `from_pretrained` without PEFT.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    model.config.use_cache = True
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
