"""The schema of the two stages before PPO; `model` and `lora` are those of a PPO run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ppo_lab.config import (
    TEMPLATE_VARIABLES,
    EvaluationSection,
    GenerationSection,
    LoraSection,
    ModelSection,
    PPOSection,
    knob,
)


@dataclass
class FitSection:
    """`fit`: how long and how fast a stage trains."""

    epochs: float = knob(1.0, "passes over the data; may be a fraction", above=0)
    batch_size: int = knob(
        16, "examples (SFT) or pairs (reward model) in one pass through the model", at_least=1
    )
    gradient_accumulation_steps: int = knob(1, "batches an optimizer step", at_least=1)
    learning_rate: float = knob(
        1.0e-4, "largest step size of AdamW; 1e-4 unless stated, 1e-3 for an adapter", above=0
    )
    lr_schedule: str = knob(
        "linear", "learning rate over the stage", choices=("constant", "linear", "cosine")
    )
    warmup_ratio: float = knob(
        0.03,
        "share of the steps over which the learning rate rises, rounded down",
        at_least=0,
        below=1,
    )
    weight_decay: float = knob(0.0, "decoupled weight decay", at_least=0)
    max_grad_norm: float = knob(1.0, "largest gradient norm; 0 = unlimited", at_least=0)
    max_length: int = knob(
        512,
        "most tokens of an example: longer texts are cut, longer prompts and pairs left out",
        at_least=2,
    )
    gradient_checkpointing: bool = knob(
        False, "recompute activations in the backward pass: less memory, more time"
    )


@dataclass
class SFTDataSection:
    """`data` of `python -m ppo_lab.sft`: JSON lines, CSV or Parquet.

    A file with `completion_column` holds prompts and completions, of which the completions are
    learnt; else one with `messages_column` holds chats, of which every message is learnt, the
    user's too; else `text_column` holds whole texts. A chat is a list of messages, or one as JSON,
    as CSV files keep it. What the last message of a prompt begins of the answer is learnt with it.
    """

    path: str = knob("", "file (.jsonl, .json, .csv, .parquet) that holds the examples")
    text_column: str = knob("text", "column of whole texts")
    prompt_column: str = knob("prompt", "column of prompts, texts or chat messages")
    completion_column: str = knob("completion", "column of completions, texts or chat messages")
    messages_column: str = knob(
        "messages", "column of chats, all learnt: lists of role and content"
    )
    template_kwargs: dict[str, Any] = field(
        default_factory=dict, metadata={"help": TEMPLATE_VARIABLES}
    )
    held_out: float = knob(
        0.1,
        "kept for the held-out loss: a share below 1, else a number of examples; 0 = none",
        at_least=0,
    )
    limit: int = knob(0, "use this many examples at most, drawn by the seed; 0 = all", at_least=0)


@dataclass
class PairDataSection:
    """`data` of `python -m ppo_lab.reward_model`: JSON lines, CSV or Parquet of compared answers.

    Texts are read as `prompt + chosen` with nothing between: an answer brings the space that it
    begins with. Chat messages, a list or one as JSON, go through the tokenizer's chat template,
    whose variables the reward model keeps: PPO scores by them without being told.
    """

    path: str = knob("", "file (.jsonl, .json, .csv, .parquet) that holds the pairs")
    prompt_column: str = knob("prompt", "column of prompts, texts or chat messages")
    chosen_column: str = knob("chosen", "column of the better answers")
    rejected_column: str = knob("rejected", "column of the worse answers")
    template_kwargs: dict[str, Any] = field(
        default_factory=dict, metadata={"help": TEMPLATE_VARIABLES}
    )
    held_out: float = knob(
        0.1,
        "kept for the held-out accuracy: a share below 1, else a number of pairs; 0 = none",
        at_least=0,
    )
    limit: int = knob(0, "use this many pairs at most, drawn by the seed; 0 = all", at_least=0)


@dataclass
class StageSection:
    """What both stages share.

    `ppo`, `generation` and `evaluation` are where a model preset keeps settings of PPO; a stage
    does not read them, and refuses them on the command line.
    """

    seed: int = knob(0, "seed of the split, the order and the weights made anew", at_least=0)
    device: str = knob("auto", "auto, cpu, cuda or cuda:N")
    output: str = knob(
        "",
        "folder that receives the model; must not exist, or be empty; empty = <run folder>/model",
    )
    model: ModelSection = field(default_factory=ModelSection)
    lora: LoraSection = field(default_factory=LoraSection)
    fit: FitSection = field(default_factory=FitSection)
    ppo: PPOSection = field(default_factory=PPOSection)
    generation: GenerationSection = field(default_factory=GenerationSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)


@dataclass
class SFTConfig(StageSection):
    """A whole supervised fine-tuning, `python -m ppo_lab.sft`."""

    data: SFTDataSection = field(default_factory=SFTDataSection)


@dataclass
class RewardModelConfig(StageSection):
    """A whole reward modelling, `python -m ppo_lab.reward_model`."""

    center_rewards_coefficient: float = knob(
        0.01,
        "weight of the squared sum of a pair's scores, which keeps them around 0; 0 = off",
        at_least=0,
    )
    data: PairDataSection = field(default_factory=PairDataSection)


def register_stages() -> None:
    """Tell Hydra the schemas of the stages: `/schema/sft` and `/schema/reward_model`."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(group="schema", name="sft", node=SFTConfig)
    store.store(group="schema", name="reward_model", node=RewardModelConfig)
