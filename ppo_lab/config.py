"""The schema: every key, its default, its meaning, unit and legal range, once.

Hydra composes `conf/` against these dataclasses, so that a misspelt key or a wrong type is
refused; `rules` says what else a run may not be asked to do. No value is None: whatever can be
off has an off value, named in its meaning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import Field, dataclass, field
from pathlib import Path
from typing import Any

from ppo_lab.errors import ConfigError

TEMPLATE_VARIABLES = "variables of the chat template, such as {enable_thinking: false}; {} = none"
_BY_TRAINING = re.compile(r"^\$\{by_training:([^,{}]+),([^,{}]+)\}$")

__all__ = ["Config", "ConfigError", "conf_folder", "register_schema"]


def knob(
    default: Any,
    meaning: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A field with its meaning and legal range in its metadata, which checks and help read."""
    ranges = {
        "at_least": at_least,
        "at_most": at_most,
        "above": above,
        "below": below,
        "choices": choices,
    }
    bounds = {name: bound for name, bound in ranges.items() if bound is not None}
    return field(default=default, metadata={"help": Meaning(meaning, bounds)})


class Meaning(str):
    """What a field means, for help of every kind, and with it the field's legal range.

    `HfArgumentParser` gives a field's whole metadata to argparse, which knows `help` and no ranges.
    """

    bounds: dict[str, Any]

    def __new__(cls, text: str, bounds: dict[str, Any]) -> Meaning:
        """A text with what is legal beside it."""
        made = super().__new__(cls, text)
        made.bounds = bounds
        return made


def meaning_of(knob: Field) -> str:
    """What a field means; empty where it is no knob."""
    return str(knob.metadata.get("help", ""))


def bounds_of(knob: Field) -> dict[str, Any]:
    """The legal range of a field: `at_least`, `at_most`, `above`, `below`, `choices`."""
    return getattr(knob.metadata.get("help"), "bounds", {})


@dataclass
class PPOSection:
    """`ppo`: the settings of the algorithm, named as TRL's classic PPOConfig named them."""

    steps: int = knob(100, "PPO iterations", at_least=1)
    batch_size: int = knob(16, "samples an iteration, over all processes", at_least=1)
    mini_batch_size: int = knob(
        0, "samples a forward and backward pass; 0 = the whole batch", at_least=0
    )
    gradient_accumulation_steps: int = knob(1, "mini-batches an optimizer step", at_least=1)
    micro_batch_tokens: int = knob(
        0,
        "most tokens in one pass through the model; splits a mini-batch without changing its "
        "result; 0 = no limit, -1 = as many as free memory holds when training begins",
        at_least=-1,
    )
    ppo_epochs: int = knob(4, "passes over each batch", at_least=1)
    learning_rate: float = knob(1.5e-5, "step size of Adam", above=0)
    lr_schedule: str = knob(
        "constant", "learning rate over the run", choices=("constant", "linear", "cosine")
    )
    warmup_steps: int = knob(0, "iterations over which the learning rate rises from 0", at_least=0)
    adam: str = knob(
        "torch",
        "torch's Adam; with TensorFlow 1's epsilon, outside the bias correction; or with moments "
        "in 8 bits (a quarter of their memory)",
        choices=("torch", "tf", "8bit"),
    )
    adam_eps: float = knob(1e-8, "Adam's epsilon", above=0)
    weight_decay: float = knob(0.0, "decoupled weight decay (AdamW)", at_least=0)
    max_grad_norm: float = knob(
        1.0, "largest gradient norm, over all trained parameters; 0 = unlimited", at_least=0
    )
    init_kl_coef: float = knob(0.2, "beta: coefficient of the KL penalty", at_least=0)
    kl_penalty: str = knob(
        "kl",
        "estimate of the KL in the reward; of them `kl` alone has the gradient of the KL",
        choices=("kl", "abs", "mse", "k3", "full"),
    )
    adap_kl_ctrl: bool = knob(False, "adapt beta so that KL tends to `target`")
    target: float = knob(6.0, "KL that an adaptive beta aims at, nats per sequence", above=0)
    horizon: int = knob(10000, "samples over which an adaptive beta reacts", at_least=1)
    gamma: float = knob(1.0, "discount a token", at_least=0, at_most=1)
    lam: float = knob(0.95, "lambda of generalised advantage estimation", at_least=0, at_most=1)
    cliprange: float = knob(
        0.2,
        "epsilon: the policy ratio is clipped to [1 - epsilon, 1 + epsilon]",
        above=0,
        below=1,
    )
    cliprange_high: float = knob(
        0.0, "another epsilon for the upper side; 0 = the same", at_least=0
    )
    cliprange_value: float = knob(
        0.2, "clip range of the value around the old value; 0 = off", at_least=0
    )
    vf_coef: float = knob(0.1, "weight of the value loss", at_least=0)
    entropy_coef: float = knob(0.0, "weight of the entropy bonus", at_least=0)
    whiten_rewards: bool = knob(
        False, "scale per-token rewards to unit variance, keeping their mean"
    )
    whiten_advantages: bool = knob(True, "scale advantages to zero mean and unit variance")
    use_score_scaling: bool = knob(False, "divide scores by their running standard deviation")
    use_score_norm: bool = knob(False, "subtract the running mean too; needs use_score_scaling")
    score_clip: float = knob(
        0.0, "clip scores to [-score_clip, score_clip], after scaling; 0 = off", at_least=0
    )
    missing_eos_penalty: float = knob(
        0.0, "taken from the score of a response that no stop condition ended; 0 = off", at_least=0
    )
    early_stopping: bool = knob(
        False, "end an iteration's epochs when KL(pi_old || pi) exceeds 1.5 target_kl"
    )
    target_kl: float = knob(0.1, "threshold of early_stopping, nats per token", above=0)
    ratio_threshold: float = knob(
        10.0, "skip an optimizer step whose mean ratio exceeds this; 0 = never", at_least=0
    )
    max_skipped_updates: int = knob(
        10,
        "optimizer steps skipped in a row (NaN, inf, ratio_threshold) before the run stops",
        at_least=1,
    )
    ema_decay: float = knob(
        0.0,
        "decay, an optimizer step, of the policy's moving average, which is then what is evaluated "
        "and saved; 0 = the policy itself",
        at_least=0,
        below=1,
    )
    max_kl: float = knob(
        0.0, "KL, nats per sequence, beyond which the run stops; 0 = no ceiling", at_least=0
    )
    cache_trunk: bool = knob(
        False,
        "compute the frozen layers below the adapter once a batch, for policy, reference and all "
        "epochs; keeps tokens x width numbers; needs lora.top_layers",
    )
    gradient_checkpointing: bool = knob(
        False, "recompute activations in the backward pass: less memory, more time"
    )


@dataclass
class ModelSection:
    """`model`: the policy to start from, which is also the reference."""

    name: str = knob("tiny", "short name, for logs and folders")
    path: str = knob("", "hub id, folder, or `embedded`: the policy that this project trains")
    weights: str = knob(
        "pretrained",
        "`random` builds the architecture from its config with a byte-level tokenizer",
        choices=("pretrained", "random"),
    )
    revision: str = knob("", "branch, tag or commit on the hub; empty = the newest")
    tokenizer: str = knob("", "hub id or folder of the tokenizer; empty = that of path")
    dtype: str = knob(
        "auto",
        "weights of the trunk; auto = bfloat16 on a GPU that computes in it, else float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    trust_remote_code: bool = knob(False, "run Python code that comes with the model")
    load_in_4bit: bool = knob(False, "QLoRA: keep the frozen trunk in 4 bits; needs a GPU")
    attn_implementation: str = knob(
        "",
        "transformers' attention kernel, such as sdpa or eager; empty = its choice; fast layers "
        "have their own",
    )
    torch_compile: bool = knob(
        False,
        "compile the decoder for the passes that are trained on; takes minutes once, and needs a "
        "C++ compiler",
    )
    fast_layers: bool = knob(
        True,
        "pass architectures that are known layer by layer through layers made for PPO, which must "
        "first prove equal; false = transformers' own",
    )
    cuda_graphs: bool = knob(
        True,
        "on a GPU, launch all kernels of a sampled token at once, and those of a pass over a "
        "batch; false = one by one",
    )
    pad_token: str = knob("", "token that pads; empty = the tokenizer's, or else its EOS")
    eos_token: str = knob("", "token that ends a text; empty = the tokenizer's")


@dataclass
class LoraSection:
    """`lora`: the adapter that is trained in place of the whole model."""

    r: int = knob(16, "rank; 0 = no adapter: train every weight", at_least=0)
    alpha: float = knob(32.0, "the update is scaled by alpha / r", above=0)
    dropout: float = knob(
        0.0, "dropout inside the adapter; off wherever log-probs are made", at_least=0, below=1
    )
    target_modules: list[str] = field(
        default_factory=list,
        metadata={"help": "names of the adapted modules; [all-linear], or [] = PEFT's choice"},
    )
    top_layers: int = knob(0, "adapt the uppermost layers alone, so many; 0 = all", at_least=0)
    use_rslora: bool = knob(False, "scale by alpha / sqrt(r) instead (rsLoRA)")
    use_dora: bool = knob(False, "learn magnitude and direction apart (DoRA)")
    learning_rate_factor: float = knob(
        1.0, "the adapter's step size, as a multiple of the learning rate", above=0
    )


@dataclass
class GenerationSection:
    """`generation`: how the policy samples responses while it trains."""

    max_new_tokens: int = knob(32, "longest response, tokens", at_least=1)
    min_new_tokens: int = knob(
        0, "shortest response, tokens; no end or stop string before it", at_least=0
    )
    temperature: float = knob(1.0, "divides the logits, in sampling and in log-probs", above=0)
    top_k: int = knob(0, "sample among the k likeliest tokens; 0 = all", at_least=0)
    top_p: float = knob(
        1.0,
        "sample among the likeliest tokens of this joint probability; 1 = all",
        above=0,
        at_most=1,
    )
    stop_strings: list[str] = field(
        default_factory=list,
        metadata={"help": "texts that end a response, special tokens included; [] = none"},
    )
    stop_token: str = knob("", "token that ends a response; empty = the model's EOS")
    batch_size: int = knob(0, "samples generated at a time; 0 = all at once", at_least=0)


@dataclass
class VLLMGeneration(GenerationSection):
    """Sampling by vLLM, on a GPU; evaluations are sampled by our own sampler all the same."""

    server: str = knob(
        "",
        "address of a running `vllm serve`, such as http://HOST:8000; empty = in this process",
    )
    gpu_memory: float = knob(
        0.3, "share of the GPU's memory that vLLM takes in this process", above=0, below=1
    )
    sleep: bool = knob(False, "give vLLM's memory back while the policy learns")
    max_gap: float = knob(
        0.1,
        "largest mean difference between vLLM's log-probs and the policy's, nats per token, before "
        "the run stops",
        above=0,
    )


@dataclass
class EvaluationSection:
    """`evaluation`: what is measured on held-out prompts, sampled as in training unless set."""

    every: int = knob(0, "iterations between evaluations; 0 = first and last only", at_least=0)
    prompts: int = knob(64, "held-out prompts used", at_least=1)
    samples: int = knob(8, "prompts with both answers kept in samples.jsonl", at_least=0)
    max_new_tokens: int = knob(32, "longest response, tokens", at_least=1)
    temperature: float = knob(1.0, "divides the logits; 0 = always the likeliest token", at_least=0)
    top_k: int = knob(0, "sample among the k likeliest tokens; 0 = all", at_least=0)
    top_p: float = knob(
        1.0,
        "sample among the likeliest tokens of this joint probability; 1 = all",
        above=0,
        at_most=1,
    )
    seed: int = knob(
        1, "seed of the sampling: the same noise in every evaluation", at_least=0, at_most=2**32 - 1
    )


@dataclass
class RewardSection:
    """`reward`: what scores a response. Each type is a class of its own with its own keys."""

    name: str = knob("", "name of the score in metrics and samples")
    weight: float = knob(1.0, "factor of the score; negative turns it round")


@dataclass
class EmbeddedReward(RewardSection):
    """The reward model of the embedded help desk."""

    batch_size: int = knob(64, "responses scored at a time", at_least=1)


@dataclass
class ModelReward(RewardSection):
    """Any `AutoModelForSequenceClassification`, with its own tokenizer."""

    path: str = knob("", "hub id or folder of the reward model")
    revision: str = knob("", "branch, tag or commit on the hub; empty = the newest")
    tokenizer: str = knob("", "hub id or folder of its tokenizer; empty = that of path")
    label: str = knob("", "label, or number of the output, that is the score; empty = the only one")
    output: str = knob(
        "logit",
        "what of it is the score",
        choices=("logit", "probability", "log_probability"),
    )
    text: str = knob(
        "prompt_and_completion",
        "what the model reads: one text, the response alone, or both as two texts with the "
        "tokenizer's separator, as encoders that judge answers to questions want",
        choices=("prompt_and_completion", "completion", "pair"),
    )
    batch_size: int = knob(16, "responses scored at a time", at_least=1)
    max_length: int = knob(
        0, "longest text read, tokens, its start is cut; 0 = all that the model can", at_least=0
    )
    chat_template: str = knob(
        "auto",
        "auto = the tokenizer's template where the prompt is a chat",
        choices=("auto", "always", "never"),
    )
    append_eos: str = knob(
        "auto",
        "end the text with EOS; auto = as TRL's RewardTrainer shows texts",
        choices=("auto", "always", "never"),
    )
    dtype: str = knob(
        "auto",
        "weights; auto = bfloat16 on a GPU that computes in it, else float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    device: str = knob(
        "auto",
        "auto = where the policy is, a copy for each process; cpu; cuda:N, one copy for all "
        "processes; sharded = over all processes",
    )
    trust_remote_code: bool = knob(False, "run Python code that comes with the model")


@dataclass
class FunctionReward(RewardSection):
    """A Python function, called as TRL calls reward functions."""

    target: str = knob("", "package.module:callable")
    kwargs: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "further keyword arguments of the function"}
    )
    none_score: float = knob(0.0, "score where the function returns None")
    timeout: float = knob(0.0, "seconds that one call may take; 0 = unlimited", at_least=0)
    retries: int = knob(0, "further attempts after the function raised", at_least=0)
    retry_wait: float = knob(
        1.0, "seconds before the first further attempt; doubled each time", at_least=0
    )


@dataclass
class VaderReward(RewardSection):
    """Sentiment by the VADER lexicon: -1 (sad) to 1 (happy)."""

    text: str = knob(
        "completion", "what is scored", choices=("prompt_and_completion", "completion")
    )


@dataclass
class LengthReward(RewardSection):
    """The response's length, or its distance from an ideal one."""

    unit: str = knob("words", "what is counted", choices=("words", "characters"))
    ideal: int = knob(
        0, "the score is -|length - ideal| / ideal; 0 = the length itself", at_least=0
    )


@dataclass
class ConstantReward(RewardSection):
    """The same score for every response."""

    value: float = knob(1.8, "the score")


@dataclass
class WeightedReward(RewardSection):
    """The weighted sum of several rewards, each logged under its name."""

    parts: dict[str, RewardSection] = field(
        default_factory=dict, metadata={"help": "the rewards, each with a weight of its own"}
    )


@dataclass
class CriticSection:
    """`critic`: what predicts the return from each token on. Each type is a class of its own with
    its own keys.
    """

    learning_rate: float = knob(
        0.0,
        "step size of the critic; 0 = ppo.learning_rate for a model of its own, 0.2 / width of the "
        "model's states for a value head",
        at_least=0,
    )
    warmup_steps: int = knob(
        0, "first iterations in which the critic learns and the policy does not", at_least=0
    )
    epochs: int = knob(
        0,
        "passes over each batch, of ppo.ppo_epochs, from which it learns too; 0 = all",
        at_least=0,
    )


@dataclass
class HeadCritic(CriticSection):
    """A value head on the policy's own trunk: its values fall out of the policy's passes."""

    v_head_init: str = knob("zero", "weights of a new value head", choices=("normal", "zero"))
    v_head_init_std: float = knob(0.2, "standard deviation of v_head_init=normal", above=0)


@dataclass
class ModelCritic(CriticSection):
    """A model of its own, started from a reward model with the policy's tokenizer."""

    path: str = knob(
        "", "hub id or folder of a sequence classifier, or `embedded`; empty = the reward's own"
    )
    revision: str = knob("", "branch, tag or commit on the hub; empty = the newest")
    label: str = knob("", "label, or number of the output, that is the score; empty = the only one")
    dtype: str = knob(
        "float32",
        "weights; in half precision Adam's small steps are lost to rounding",
        choices=("float32", "bfloat16"),
    )


@dataclass
class DataSection:
    """`data`: the prompts. Each source is a class of its own with its own keys."""

    name: str = knob("", "name of the prompt set, for logs")
    held_out: float = knob(
        0.1, "prompts kept to judge the run by: a share below 1, a number from 1 on", above=0
    )
    shuffle: bool = knob(True, "a new order every epoch; false = the order of the file")
    min_prompt_tokens: int = knob(1, "shorter prompts are left out", at_least=0)
    max_prompt_tokens: int = knob(512, "longest prompt; see long_prompts", at_least=1)
    long_prompts: str = knob(
        "drop",
        "longer prompts are left out, or cut to their beginning; rows that are chats are left out",
        choices=("drop", "truncate"),
    )
    chat: bool = knob(
        False, "put plain prompts, as a user's message, through the tokenizer's chat template"
    )
    template_kwargs: dict[str, Any] = field(
        default_factory=dict, metadata={"help": TEMPLATE_VARIABLES}
    )


@dataclass
class EmbeddedData(DataSection):
    """The customers' questions of the embedded help desk."""


@dataclass
class FileData(DataSection):
    """Prompts in a file: JSON lines, CSV or Parquet."""

    path: str = knob("", "the file: .jsonl, .json, .csv or .parquet")
    prompt_column: str = knob("prompt", "column that holds the prompts, texts or chat messages")
    messages_column: str = knob(
        "", "column of chats to use instead, their last answer left out; empty = prompt_column"
    )
    held_out_path: str = knob(
        "",
        "a file whose prompts judge the run, instead of some of `path`; empty = held_out of those",
    )
    limit: int = knob(0, "rows read of `path`, from the first; 0 = all", at_least=0)
    cut_min_tokens: int = knob(
        0,
        "cut each prompt's text to a random length of at least this many tokens; 0 = whole",
        at_least=0,
    )
    cut_max_tokens: int = knob(0, "and of at most this many; 0 = whole", at_least=0)


@dataclass
class HubData(FileData):
    """Prompts in a data set on the hub: `path` is its id, `held_out_path` that of another, of which
    subset and revision are its own.
    """

    subset: str = knob("", "configuration of the data set; empty = its only one")
    split: str = knob("train", "split to read")
    held_out_split: str = knob(
        "", "split whose prompts judge the run; empty = `split`, or held_out of its prompts"
    )
    revision: str = knob("", "branch, tag or commit on the hub; empty = the newest")


@dataclass
class TrackingSection:
    """`tracking`: where metrics go beside metrics.jsonl, which is always written."""

    type: str = knob(
        "wandb",
        "none, Weights & Biases, or TensorBoard",
        choices=("none", "wandb", "tensorboard"),
    )
    mode: str = knob(
        "auto",
        "auto = online for whoever is logged in, else offline",
        choices=("auto", "online", "offline"),
    )
    project: str = knob("", "W&B project; empty = WANDB_PROJECT, or else ppo_lab")
    entity: str = knob("", "W&B user or team; empty = your default")
    group: str = knob("", "group of runs; empty = none, or the sweep's")
    name: str = knob("", "name of the run; empty = `name`")
    id: str = knob("", "id of the run, which no other has; empty = a new one")
    tags: list[str] = field(default_factory=list, metadata={"help": "tags of the run"})
    notes: str = knob("", "notes of the run")
    samples_every: int = knob(10, "iterations between samples of training; 0 = none", at_least=0)
    log_model: bool = knob(False, "upload the trained adapter as an artifact")


@dataclass
class CheckpointSection:
    """`checkpoint`: what is kept in <run>/checkpoints, to resume from."""

    every: int = knob(10, "iterations between checkpoints; 0 = none but the last", at_least=0)
    keep: int = knob(2, "newest checkpoints kept", at_least=1)
    best_metric: str = knob(
        "",
        "also keep the checkpoint, with its model, where this held-out metric was highest, such as "
        "eval/mean_reward; empty = off",
    )


@dataclass
class ProcessesSection:
    """`processes`: several of them as one run, as torchrun or accelerate launch start them."""

    timeout: float = knob(
        1800.0,
        "seconds that a process waits for the others before the run ends: more than the slowest "
        "reward function takes for a batch",
        above=0,
    )


@dataclass
class Config:
    """A whole run."""

    name: str = knob("", "name of the run, in logs and trackers")
    seed: int = knob(
        0, "seed of sampling, shuffling and new weights", at_least=0, at_most=2**32 - 1
    )
    device: str = knob("auto", "auto = the GPU if there is one; cpu, cuda or cuda:N")
    resume: str = knob("", "run folder or checkpoint to continue; empty = start anew")
    profile: bool = knob(
        False,
        "trace the second to fourth iteration that this process makes, into <run>/profile, and "
        "print the ten largest operations",
    )
    objective: str = knob("eval/mean_reward", "metric that the run returns to a Hydra sweep")
    model: ModelSection = field(default_factory=ModelSection)
    lora: LoraSection = field(default_factory=LoraSection)
    ppo: PPOSection = field(default_factory=PPOSection)
    generation: GenerationSection = field(default_factory=GenerationSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    reward: RewardSection = field(default_factory=RewardSection)
    critic: CriticSection = field(default_factory=CriticSection)
    data: DataSection = field(default_factory=DataSection)
    tracking: TrackingSection = field(default_factory=TrackingSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    processes: ProcessesSection = field(default_factory=ProcessesSection)


REWARDS = {
    "embedded": EmbeddedReward,
    "model": ModelReward,
    "function": FunctionReward,
    "vader": VaderReward,
    "length": LengthReward,
    "constant": ConstantReward,
    "weighted": WeightedReward,
}
CRITICS = {"head": HeadCritic, "reward_model": ModelCritic}
SAMPLERS: dict[str, type] = {"default": GenerationSection, "vllm": VLLMGeneration}
SOURCES = {"embedded": EmbeddedData, "file": FileData, "hub": HubData}
TYPED: dict[str, dict[str, type]] = {
    "reward": REWARDS,
    "critic": CRITICS,
    "data": SOURCES,
    "generation": SAMPLERS,
}


def register_schema() -> None:
    """Tell Hydra `/schema/config` and `/schema/<group>/<type>` of each group with types, and what
    `${by_training:ADAPTER,WHOLE}` in a preset means.
    """
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("by_training", _by_training, replace=True)
    store = ConfigStore.instance()
    store.store(group="schema", name="config", node=Config)
    for group, types in TYPED.items():
        for name, section in types.items():
            store.store(group=f"schema/{group}", name=name, node=section)


def _by_training(adapter: Any, whole: Any, *, _root_: Any) -> Any:
    """What a preset has for an adapter, or for all weights where the adapter's rank is 0."""
    return adapter if _root_.lora.r else whole


def as_trained(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded configuration, under dotted keys, with what the run had for each
    `${by_training:ADAPTER,WHOLE}` in it.
    """
    rank = recorded.get("lora.r")
    return {key: _as_trained(value, rank) for key, value in recorded.items()}


def _as_trained(value: Any, rank: Any) -> Any:
    match = _BY_TRAINING.match(value) if isinstance(value, str) else None
    if match is None:
        return value
    chosen = match[1 if rank else 2]
    with suppress(ValueError):
        return float(chosen)
    return chosen


def conf_folder() -> Path:
    """The folder of YAML files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"
