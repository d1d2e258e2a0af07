"""The settings of `PPOTrainer` in Python, under TRL 0.11's names and with its defaults."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields
from math import ceil
from numbers import Integral, Real
from typing import Any, get_type_hints

from ppo_lab.config import PPOSection, knob
from ppo_lab.errors import ConfigError
from ppo_lab.record import flat

# What None said in TRL 0.11, and the value that says it here.
OFF = {"log_with": "none", "max_grad_norm": 0.0, "score_clip": 0.0, "model_name": ""}


def _as_before(name: str, default: Any) -> Any:
    """A knob of the section with TRL 0.11's default."""
    own = next(own for own in fields(PPOSection) if own.name == name)
    return field(default=default, metadata=own.metadata)


def _unread(default: Any, meaning: str) -> Any:
    """A field of TRL 0.11 that changes nothing here; a tracker is told of it."""
    return field(default=default, metadata={"help": meaning})


@dataclass
class PPOConfig(PPOSection):
    """The settings of `PPOTrainer` in Python: the `ppo` section and what a run keeps elsewhere.

    The fields of TRL 0.11's PPOConfig are all there, and transformers' `HfArgumentParser` reads
    them from a command line. `steps` counts samples in `total_ppo_epochs`, as it did there, and
    iterations in `PPOTrainer.train`.

    Raises:
        ValueError: naming every field whose value is not legal, all at once.
    """

    steps: int = _as_before("steps", 20000)
    batch_size: int = _as_before("batch_size", 128)
    learning_rate: float = _as_before("learning_rate", 1.41e-5)
    max_grad_norm: float = _as_before("max_grad_norm", 0.0)
    target_kl: float = _as_before("target_kl", 1.0)
    value_learning_rate: float = knob(0.0, "step size of the critic; 0 = learning_rate", at_least=0)
    critic_warmup_steps: int = knob(
        0, "first iterations in which the critic learns and the policy does not", at_least=0
    )
    critic_epochs: int = knob(
        0, "passes over each batch from which the critic learns too; 0 = all", at_least=0
    )
    model_name: str = knob("gpt2", "name of the run that `log_stats` opens, if another than gpt2")
    seed: int = knob(
        0, "seed of the sampling, the shuffling and the new weights", at_least=0, at_most=2**32 - 1
    )
    log_with: str = knob(
        "none", "where `log_stats` sends statistics", choices=("none", "wandb", "tensorboard")
    )
    tracker_project_name: str = knob("ppo_lab", "project of the tracker")
    tracker_kwargs: dict = field(
        default_factory=dict,
        metadata={"help": "of the tracker: {'wandb': {...}}"},
    )
    project_kwargs: dict = field(
        default_factory=dict, metadata={"help": "logging_dir of tensorboard"}
    )
    accelerator_kwargs: dict = field(default_factory=dict, metadata={"help": "not read"})
    push_to_hub_if_best_kwargs: dict = field(default_factory=dict, metadata={"help": "refused"})
    exp_name: str = _unread("", "name of the experiment")
    task_name: str | None = _unread(None, "name of the task")
    query_dataset: str | None = _unread("stanfordnlp/imdb", "name of the data set")
    reward_model: str | None = _unread(
        "sentiment-analysis:lvwerra/distilbert-imdb", "name of the reward model"
    )
    remove_unused_columns: bool = _unread(True, "all columns of a data set stay")
    dataset_num_proc: int | None = _unread(None, "a data set is not mapped over here")
    forward_batch_size: int | None = _unread(None, "an older name of mini_batch_size")
    backward_batch_size: int | None = _unread(None, "set here: samples an optimizer step")
    optimize_device_cache: bool = _unread(False, "memory is kept low without")
    optimize_cuda_cache: bool | None = _unread(None, "an older name of optimize_device_cache")
    compare_steps: int = _unread(1, "was never read")
    world_size: int | None = _unread(None, "processes are the trainer's")
    global_batch_size: int | None = _unread(None, "processes are the trainer's")
    global_backward_batch_size: int | None = _unread(None, "processes are the trainer's")
    is_peft_model: bool | None = _unread(None, "is seen of the model")
    is_encoder_decoder: bool | None = _unread(None, "True is refused: decoders alone are trained")

    def __post_init__(self) -> None:
        """Take older names and values, and refuse what is not legal."""
        from ppo_lab.rules import ppo_problems

        if self.forward_batch_size is not None:
            self.mini_batch_size = self.forward_batch_size
        self._translate()
        if problems := [*ppo_problems(self), *self._left_behind()]:
            raise ConfigError(problems)
        step = (self.mini_batch_size or self.batch_size) * self.gradient_accumulation_steps
        self.backward_batch_size = step
        if self.accelerator_kwargs:
            warnings.warn("accelerator_kwargs has no effect: no Accelerator is made", stacklevel=3)

    @property
    def total_ppo_epochs(self) -> int:
        """How many batches `steps` samples are."""
        return ceil(self.steps / self.batch_size)

    def to_dict(self) -> dict[str, Any]:
        """Every field, those that hold dictionaries as `field/key`."""
        return flat({own.name: getattr(self, own.name) for own in fields(self)}, separator="/")

    def _translate(self) -> None:
        """None, whole floats and NumPy's numbers as the values that they stand for."""
        kinds = get_type_hints(type(self))
        for own in fields(self):
            value, kind = getattr(self, own.name), kinds[own.name]
            if value is None and own.name in OFF:
                setattr(self, own.name, OFF[own.name])
            elif kind is int and _is_number(value) and value == value // 1:
                setattr(self, own.name, int(value))
            elif kind is float and _is_number(value):
                setattr(self, own.name, float(value))

    def _left_behind(self) -> list[str]:
        found = []
        if self.is_encoder_decoder:
            found.append("is_encoder_decoder=True: decoders alone are trained here")
        if self.push_to_hub_if_best_kwargs:
            found.append(
                "push_to_hub_if_best_kwargs: nothing is pushed while training; "
                "PPOTrainer.push_to_hub(repo_id) does at the end"
            )
        return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (Integral, Real)) and not isinstance(value, bool)
