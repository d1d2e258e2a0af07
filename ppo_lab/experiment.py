"""A configuration made into objects and run: the only place that wires rooms to each other."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

from safetensors import SafetensorError

from ppo_lab import checkpoint
from ppo_lab.config import Config, EvaluationSection, GenerationSection, PPOConfig
from ppo_lab.continuation import (
    Keeper,
    alone_in,
    find,
    identity,
    restore,
    seed_random_state,
    summarised,
)
from ppo_lab.errors import ConfigError
from ppo_lab.evaluation import Evaluation, Evaluator, Gold, latest_samples
from ppo_lab.guards import check_ceiling, explain, warn_of_remote_code
from ppo_lab.memory import check_fits
from ppo_lab.models.loading import (
    check_vocabulary,
    eos_ids,
    keep_quiet,
    load_causal_lm,
    load_config,
    load_tokenizer,
    max_context,
    resolved_revision,
)
from ppo_lab.models.lora import wrap_lora
from ppo_lab.models.policy import AutoModelForCausalLMWithValueHead
from ppo_lab.record import to_stderr
from ppo_lab.resume import RECORD, differences, record_again, resume_command, run_folder
from ppo_lab.rewards import build_reward
from ppo_lab.rewards.scoring import RewardError
from ppo_lab.rollout import Sampling
from ppo_lab.secrecy import hidden, hidden_text
from ppo_lab.signals import Preempted, Preemption
from ppo_lab.tracking import Tracker, open_trackers
from ppo_lab.trainer import PPOTrainer
from ppo_lab.update import TrainingDiverged

VERSIONED = ("ppo_lab", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "wandb")
Metrics = dict[str, float]


@dataclass
class Lab:
    """The objects of one run."""

    config: Config
    folder: Path
    trainer: PPOTrainer
    stream: Any
    evaluator: Evaluator
    trackers: Tracker
    keeper: Keeper
    identity: dict[str, str]
    started: float = field(default_factory=time.time)
    history: list[Metrics] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    place: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """The prompt stream's place is that after the last whole iteration."""
        self.place = self.stream.state_dict()


def run(config: Config, folder: Path, overrides: Sequence[str] = ()) -> float:
    """Train as `config` says, leave everything in `folder`, and return the objective.

    `overrides` is what the command line changed, for the run's name. With `config.resume` the run
    goes on in that folder.

    Raises:
        ConfigError: what only models and data could show to be wrong.
        Preempted: SIGTERM or SIGINT asked the run to stop, and it left a checkpoint.
    """
    keep_quiet()
    if config.resume:
        if found := differences(config):
            raise ConfigError(found)
        folder = run_folder(config.resume)
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder), Preemption() as preemption:
        if config.resume or not (folder / RECORD / "config.yaml").exists():
            with writing(folder, RECORD):
                record_again(folder, config, overrides)
        lab = build(resolve(config), folder, overrides)
        try:
            train(lab, preemption)
            with writing(folder, "model"):
                lab.trainer.save_pretrained(str(folder / "model"))
            summary = summarise(lab)
        except BaseException as error:
            fail(lab, error)
            raise
        lab.trackers.finish("finished", summary)
        return summary["objective"]


@contextmanager
def writing(folder: Path, name: str) -> Iterator[None]:
    """A disk that refuses what a run cannot do without ends it with a message."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{folder / name}: cannot be written ({error}); what was learnt is in the last "
            f"checkpoint: make room, then {resume_command(folder)}"
        ) from error


def fail(lab: Lab, error: BaseException) -> None:
    """What a run that ends early leaves: a checkpoint if its state is whole, a summary with why."""
    if isinstance(error, TrainingDiverged):
        explain(error, lab.folder, lab.trainer.iterations_done + (error.batch is not None))
    if isinstance(error, RewardError) and lab.trainer.iterations_done == len(lab.history) > 0:
        lab.keeper.keep(lab, {}, due=True)
    status = "preempted" if isinstance(error, Preempted | KeyboardInterrupt) else "failed"
    reason = hidden_text(f"{type(error).__name__}: {error}")
    lab.trackers.finish(status, {**summarise(lab), "reason": reason})


def resolve(config: Config) -> Config:
    """The configuration with the embedded policy's folder, built on its first use, where it asks for that policy."""
    if config.model.path != "embedded":
        return config
    from ppo_lab import embedded

    return replace(config, model=replace(config.model, path=str(embedded.policy_path())))


def build(config: Config, folder: Path, overrides: Sequence[str] = ()) -> Lab:
    """Everything that a run needs, loaded in the order in which mistakes are cheapest to find."""
    from ppo_lab.data import PromptStream, load_prompts

    device = pick_device(config.device)
    warn_of_remote_code(config.model, to_stderr)
    check_fits(config, device)
    tokenizer = load_tokenizer(config.model)
    prompts = load_prompts(
        config.data, tokenizer, max_prompt_tokens=longest_prompt(config), seed=config.seed
    )
    reward = build_reward(config.reward, device=device)
    policy = load_policy(config, tokenizer, device)
    trainer = PPOTrainer(
        ppo_config(config),
        policy,
        tokenizer=tokenizer,
        sampling=sampling(config.generation, policy, tokenizer, eos_token=config.model.eos_token),
        reward=reward,
        device=device,
    )
    evaluator = Evaluator(
        trainer,
        prompts.held_out[: config.evaluation.prompts],
        sampling=evaluation_sampling(config.evaluation, trainer.sampling),
        seed=config.evaluation.seed,
        kept=config.evaluation.samples,
        gold=gold_scorer(config),
    )
    stream = PromptStream(
        prompts.train,
        batch_size=config.ppo.batch_size,
        seed=config.seed,
        shuffle=config.data.shuffle,
    )
    begun = find(config.resume, folder) if config.resume else None
    trackers = open_trackers(
        config.tracking,
        folder,
        hidden(asdict(config)),
        total_steps=config.ppo.steps,
        overrides=overrides,
        resume_step=(checkpoint.step_of(begun) if begun else -1) if config.resume else None,
    )
    keeper = Keeper(config.checkpoint, folder, trackers.say)
    start = identity(prompts.train, policy)
    lab = Lab(config, folder, trainer, stream, evaluator, trackers, keeper, start)
    seed_random_state(config.seed)  # again: libraries draw numbers while they are first imported
    if begun:
        restore(lab, checkpoint.read(begun))
        checkpoint.set_aside_later(folder, trainer.iterations_done)
    return lab


def train(lab: Lab, preemption: Preemption) -> None:
    """Evaluate, iterate, evaluate; metrics to the trackers, state to checkpoints.

    Raises:
        TrainingDiverged: KL rose above `ppo.max_kl`.
        Preempted: the run was asked to stop; its last whole iteration is in a checkpoint.
    """
    every, steps = lab.config.evaluation.every, lab.config.ppo.steps
    shown = lab.config.tracking.samples_every
    preemption.deferred = True
    if not lab.evaluations:
        evaluate(lab, 0)
        objective(lab)
    for metrics in lab.trainer.train(lab.stream):
        step = lab.trainer.iterations_done
        if step == steps or (every and step % every == 0):
            metrics |= evaluate(lab, step)
        elif shown and step % shown == 0:
            samples = latest_samples(lab.trainer, lab.config.evaluation.samples)
            lab.trackers.log_samples(samples, step)
        lab.trackers.log(metrics, step)
        lab.history.append(summarised(metrics))
        lab.place = lab.stream.state_dict()
        too_far = 0 < lab.config.ppo.max_kl < metrics["kl"]
        lab.keeper.keep(lab, metrics, due=step == steps or too_far or bool(preemption.asked))
        check_ceiling(metrics, max_kl=lab.config.ppo.max_kl)
        if preemption.asked and step < steps:
            raise Preempted(preemption.asked)


def evaluate(lab: Lab, step: int) -> Metrics:
    """The metrics of an evaluation, its samples shown; the first evaluation and the last are kept."""
    evaluation = lab.evaluator()
    lab.evaluations[1:] = [evaluation]
    lab.trackers.log_samples(evaluation.samples, step)
    return {f"eval/{name}": value for name, value in evaluation.metrics.items()}


def ppo_config(config: Config) -> PPOConfig:
    """The `ppo` section as the trainer takes it; an adapter has a step size of its own."""
    settings = asdict(config.ppo)
    if config.lora.r:
        settings["value_learning_rate"] = config.ppo.value_learning_rate or config.ppo.learning_rate
        settings["learning_rate"] = config.ppo.learning_rate * config.lora.learning_rate_factor
    return PPOConfig(**settings, seed=config.seed, model_name=config.model.name)


def load_policy(config: Config, tokenizer: Any, device: str) -> AutoModelForCausalLMWithValueHead:
    """The trunk with its adapter, if there is one, and its value head."""
    import torch

    seed_random_state(config.seed)
    # Adam's small steps would be lost to rounding in bfloat16 weights; a frozen trunk may be coarse.
    dtype = torch.float32 if config.model.dtype == "auto" and not config.lora.r else None
    model = load_causal_lm(config.model, device=device, dtype=dtype, seed=config.seed)
    check_vocabulary(tokenizer, model)
    if config.lora.r:
        model = wrap_lora(model, config.lora)
    policy = AutoModelForCausalLMWithValueHead(
        model, v_head_init=config.model.v_head_init, v_head_init_std=config.model.v_head_init_std
    )
    policy.load_value_head(config.model.path)
    return policy


def sampling(
    section: GenerationSection,
    policy: AutoModelForCausalLMWithValueHead,
    tokenizer: Any,
    *,
    eos_token: str = "",
) -> Sampling:
    """The `generation` section as the sampler takes it.

    Raises:
        ConfigError: `stop_token` is not one token of this tokenizer.
    """
    ends = eos_ids(tokenizer, policy.trunk.model, eos_token=eos_token)
    if section.stop_token:
        ids = tokenizer.encode(section.stop_token, add_special_tokens=False)
        if len(ids) != 1:
            raise ConfigError(
                f"generation.stop_token={section.stop_token!r}: must be one token of this tokenizer, and is {len(ids)}; "
                "use generation.stop_strings for longer texts"
            )
        ends = tuple(ids)
    return Sampling(
        max_new_tokens=section.max_new_tokens,
        eos_ids=ends,
        pad_id=tokenizer.pad_token_id,
        min_new_tokens=section.min_new_tokens,
        temperature=section.temperature,
        top_k=section.top_k,
        top_p=section.top_p,
        stop_strings=tuple(section.stop_strings),
        batch_size=section.batch_size,
    )


def evaluation_sampling(section: EvaluationSection, training: Sampling) -> Sampling:
    """Sampling for evaluations: what `evaluation` sets, over what training uses."""
    return replace(
        training,
        max_new_tokens=section.max_new_tokens or training.max_new_tokens,
        min_new_tokens=min(training.min_new_tokens, section.max_new_tokens or training.max_new_tokens),
        temperature=section.temperature,
        top_k=section.top_k,
        top_p=section.top_p,
    )


def gold_scorer(config: Config) -> Gold | None:
    """The embedded world's rules, where its prompts are used; other data has no gold score."""
    if type(config.data).__name__ != "EmbeddedData":
        return None
    from ppo_lab import embedded

    return embedded.gold


def pick_device(wanted: str) -> str:
    """`auto` as the GPU, where there is one."""
    import torch

    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def longest_prompt(config: Config) -> int:
    """The most tokens that a prompt may have, so that the longest response still fits into the model's context.

    Raises:
        ConfigError: no prompt does.
    """
    context = max_context(load_config(config.model))
    new = max(config.generation.max_new_tokens, config.evaluation.max_new_tokens)
    if context is None:
        return config.data.max_prompt_tokens
    if context <= new:
        raise ConfigError(
            f"generation.max_new_tokens={new}: must be below the {context} tokens that model.path={config.model.path} "
            "reads, prompt included"
        )
    return min(config.data.max_prompt_tokens, context - new)


# ---- The summary -----------------------------------------------------------------------------------------------


def summarise(lab: Lab) -> dict[str, Any]:
    """What summary.json holds; of a run that failed, as far as it came."""
    tail = lab.history[-max(1, len(lab.history) // 10) :]
    summary: dict[str, Any] = {
        "status": "finished",
        "steps": lab.trainer.iterations_done,
        "eval": {
            name: evaluation.metrics
            for name, evaluation in zip(("first", "last"), lab.evaluations[:1] + lab.evaluations[-1:], strict=False)
        },
        "train": {},
        "objective": None,
        "wall_s": time.time() - lab.started,
        "peak_memory_gb": lab.trainer.clock.peak_memory_gb(),
        "seed": lab.config.seed,
        "versions": versions(),
        "git_commit": git_commit(),
        "revisions": {"model": resolved_revision(lab.config.model)},
    }
    if tail:
        summary["train"] = {
            "kl": fmean(m["kl"] for m in tail),
            "mean_reward": fmean(m["mean_reward"] for m in tail),
            "clip_fraction": fmean(m["clip_fraction"] for m in lab.history),
        }
        summary["tokens_per_second"] = fmean(m["tokens_per_second"] for m in lab.history)
        summary["objective"] = objective(lab)
    return summary


def objective(lab: Lab) -> float:
    """The number that a sweep maximises, out of the last evaluation.

    Raises:
        ConfigError: there is no such number in this run.
    """
    name = lab.config.objective.removeprefix("eval/")
    found = lab.evaluations[-1].metrics
    if name not in found:
        raise ConfigError(
            f"objective={lab.config.objective}: this run has no such metric; it has "
            + ", ".join(f"eval/{key}" for key in sorted(found))
        )
    return found[name]


def versions() -> dict[str, str]:
    """The versions of what the numbers rest on."""
    found = {}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str:
    """The commit that this package was checked out at, with `+` where files were changed; empty outside git."""
    here = Path(__file__).resolve().parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        return commit + ("+" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]  # noqa: S607
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()  # noqa: S603
