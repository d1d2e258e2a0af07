"""A configuration made into objects and run: the only place that wires rooms to each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from ppo_lab import checkpoint
from ppo_lab.assembly import (
    evaluation_sampling,
    gold_scorer,
    load_critic,
    load_policy,
    longest_prompt,
    pick_device,
    ppo_config,
    resolve,
    sampling,
    tell_of_other_gpus,
)
from ppo_lab.config import Config, VLLMGeneration
from ppo_lab.continuation import (
    Keeper,
    find,
    identity,
    random_state,
    restore,
    seed_random_state,
    set_random_state,
    summarised,
)
from ppo_lab.errors import ConfigError
from ppo_lab.evaluation import Evaluation, Evaluator, latest_samples
from ppo_lab.guards import (
    check_ceiling,
    explain,
    warn_of_escapes,
    warn_of_large_scores,
    warn_of_remote_code,
    warn_of_scaled_critic,
    warn_of_weak_penalty,
)
from ppo_lab.memory import check_fits, forget_peak
from ppo_lab.models.loading import keep_quiet, load_tokenizer
from ppo_lab.on_disk import put_in_place
from ppo_lab.outcome import check_metrics, summarise
from ppo_lab.processes import launch
from ppo_lab.processes.alone import Alone, joined
from ppo_lab.processes.launch import shared
from ppo_lab.record import Say, to_stderr, write_summary
from ppo_lab.resume import check_new, differences, record_again, resume_command, run_folder
from ppo_lab.rewards import build_reward, check_columns
from ppo_lab.rewards.scoring import RewardError
from ppo_lab.run_lock import alone_in
from ppo_lab.run_state import RECORD, read_summary
from ppo_lab.secrecy import hidden, reason_of
from ppo_lab.signals import Preempted, Preemption
from ppo_lab.sweep_index import indexed
from ppo_lab.tracking import Composite, Tracker, open_trackers
from ppo_lab.trainer import PPOTrainer
from ppo_lab.update import TrainingDiverged
from ppo_lab.vllm_sampler import VLLMSampler, engine_for

if TYPE_CHECKING:
    from ppo_lab.data import PromptSets

Metrics = dict[str, float]
BY_HYDRA = ("config.yaml", "hydra.yaml")  # without the other, config.yaml is of a run before
ALONE = Alone()


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
    processes: Alone = field(default_factory=Alone)
    started: float = field(default_factory=time.monotonic)  # clocks are set back at times
    history: list[Metrics] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    place: dict[str, int] = field(default_factory=dict)
    random: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.note_place()

    def note_place(self) -> None:
        """Where the prompt stream and all random numbers are after the last whole iteration: of one
        that breaks off nothing must be left.
        """
        self.place, self.random = self.stream.state_dict(), random_state()


def run(config: Config, folder: Path, overrides: Sequence[str] = ()) -> float:
    """Train as `config` says, leave everything in `folder`, and return the objective.

    `overrides` is what the command line changed, for the run's name. With `config.resume` the run
    goes on in that folder. Of several processes each runs this, and the main one writes.

    Raises:
        ConfigError: what only models and data could show to be wrong.
        Preempted: SIGTERM or SIGINT asked the run to stop, and it left a checkpoint.
    """
    keep_quiet()
    forget_peak()
    with (
        Preemption(tells=launch.is_main()) as preemption,
        joined(device=config.device, timeout=config.processes.timeout) as processes,
    ):
        config = processes.from_main(lambda: config)  # whether the run goes on is for one to say
        place = processes.from_main(lambda: place_of(config, folder))
        with taken(place, processes):
            lab = begin(config, place, overrides, processes)
            try:
                train(lab, preemption)
                save = lab.trainer.saver()
                processes.from_main(lambda: write_model(save, place))
                summary = summarise(lab)
            except BaseException as error:
                fail(lab, error)
                raise
            lab.trackers.finish("finished", summary)
            return summary["objective"]


def place_of(config: Config, folder: Path) -> Path:
    """The run's folder: a new one, or that of the run that goes on.

    Raises:
        ConfigError: that run cannot go on with these settings, or it is one and is not asked to.
    """
    if not config.resume:
        check_new(folder.absolute())
        return folder.absolute()
    if found := differences(config):
        raise ConfigError(found)
    return run_folder(config.resume)


@contextmanager
def taken(folder: Path, processes: Alone) -> Iterator[None]:
    """The run's folder, in which nobody else trains meanwhile."""
    with ExitStack() as stack:
        with processes.together():
            if processes.is_main:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(indexed(folder))
                stack.enter_context(alone_in(folder))
        yield


def begin(config: Config, folder: Path, overrides: Sequence[str], processes: Alone) -> Lab:
    """The run, written down and built; of one that comes no further the folder says why."""
    try:
        processes.from_main(lambda: record(config, folder, overrides))
        return build(config, folder, overrides, processes)
    except BaseException as error:
        if processes.is_main and "steps" not in read_summary(folder):
            with suppress(OSError):
                write_summary(folder, {"status": status_of(error), "reason": reason_of(error)})
        raise


def record(config: Config, folder: Path, overrides: Sequence[str]) -> None:
    """Write down what the run is, unless Hydra has."""
    if config.resume or not all((folder / RECORD / name).exists() for name in BY_HYDRA):
        with writing(folder, RECORD):
            record_again(folder, config, overrides)


def write_model(save: Callable[[str], None], folder: Path) -> None:
    """Leave the trained model in the run's folder, whole or not at all."""
    with writing(folder, "model"), put_in_place((folder / "model").resolve()) as beside:
        save(str(beside))


def silent(text: str) -> None:
    """What the main process says for all."""


@contextmanager
def writing(folder: Path, name: str) -> Iterator[None]:
    """A disk that refuses what a run cannot do without ends it with a message."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{folder / name}: cannot be written ({error}); {what_is_kept(folder)}"
        ) from error


def what_is_kept(folder: Path) -> str:
    """What of a run that cannot be written is on the disk, and what to do."""
    if step := checkpoint.newest_step(folder):
        return (
            f"what was learnt up to iteration {step} is in the last checkpoint: make room, then "
            f"{resume_command(folder)}"
        )
    return "there is no checkpoint, so that nothing learnt is kept: make room, then start again"


def fail(lab: Lab, error: BaseException) -> None:
    """What a run that ends early leaves: a checkpoint if its state is whole, a summary with why."""
    if isinstance(error, TrainingDiverged) and lab.processes.is_main:
        explain(error, lab.folder, lab.trainer.iterations_done + (error.batch is not None))
    if isinstance(error, RewardError) and _is_whole_and_not_kept(lab):
        lab.keeper.keep(lab, {}, due=True)
    lab.trackers.finish(status_of(error), {**summarise(lab), "reason": reason_of(error)})


def status_of(error: BaseException) -> str:
    """What a run is that this ended."""
    return "preempted" if isinstance(error, Preempted | KeyboardInterrupt) else "failed"


def _is_whole_and_not_kept(lab: Lab) -> bool:
    """Whether the last iteration is done, and in no checkpoint yet, which may hold a model too."""
    step = lab.trainer.iterations_done
    if step != len(lab.history) or step == 0:
        return False
    return lab.processes.from_main(lambda: not checkpoint.has(lab.folder, step))


def build(
    config: Config,
    folder: Path,
    overrides: Sequence[str] = (),
    processes: Alone = ALONE,
) -> Lab:
    """Everything that a run needs, loaded in the order in which mistakes are cheapest to find.

    Trackers are given the configuration as it was asked for: where a machine keeps the embedded
    policy would tell its runs from those of the others.
    """
    from ppo_lab.data import PromptStream, judging

    asked, config = config, processes.from_main(lambda: resolve(config))
    device, say = pick_device(config.device, processes), to_stderr if processes.is_main else silent
    tell_of_other_gpus(device, say)
    tokenizer, prompts, reward, policy, start = _load(config, device, processes, say)
    trainer = make_trainer(config, policy, tokenizer, reward, device, processes)
    evaluator = Evaluator(
        trainer,
        judging(config.data, prompts.held_out, config.evaluation.prompts),
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
    begun = processes.from_main(lambda: find(config.resume, folder)) if config.resume else None
    keeper, none = Keeper(config.checkpoint, folder, say), Composite([], say=say)
    lab = Lab(config, folder, trainer, stream, evaluator, none, keeper, start, processes)
    seed_random_state(config.seed)  # again: libraries draw numbers while they are first imported
    if begun:
        go_on(lab, begun)
    numbers = random_state()
    # Not before: trackers change what a run has left, and one that is refused keeps all of it.
    trackers = make_trackers(asked, folder, overrides, begun, is_main=processes.is_main)
    lab.trackers, keeper.say = trackers, trackers.say
    set_random_state(numbers)
    return lab


def _load(
    config: Config, device: Any, processes: Alone, say: Say
) -> tuple[Any, PromptSets, Any, Any, dict[str, str]]:
    """Tokenizer, prompts, reward and policy, what is soonest found wrong with them first, and the
    digests of what the run starts from.
    """
    from ppo_lab.data import load_prompts

    with processes.together():
        warn_of_remote_code(config.model, say)
        warn_of_weak_penalty(config.ppo, say)
        warn_of_escapes(config.generation, say)
        warn_of_scaled_critic(config, say)
        check_fits(config, device, processes=processes.here)
        tokenizer = load_tokenizer(config.model)
        prompts = load_prompts(
            config.data,  # type: ignore[arg-type]
            tokenizer,
            max_prompt_tokens=longest_prompt(config),
            seed=config.seed,
        )
        sets = (prompts.train, prompts.held_out)
        for part in sets:
            check_columns(config.reward, part.columns)
        reward = build_reward(config.reward, device=device, processes=processes)
        reward.check_prompts([text for part in sets for text in part.texts])
        policy = load_policy(config, tokenizer, device)
        start = identity(prompts, policy)
    for name, digest in processes.from_main(lambda: reward.fingerprints).items():
        start[f"weights of the reward model {name!r}"] = digest
    return tokenizer, prompts, reward, policy, start


def make_trainer(
    config: Config, policy: Any, tokenizer: Any, reward: Any, device: Any, processes: Alone
) -> PPOTrainer:
    """The trainer of a run, with its critic and its sampler."""
    with processes.together():
        critic = load_critic(config, tokenizer, device)
        drawn = sampling(config.generation, policy, tokenizer, eos_token=config.model.eos_token)
    trainer = PPOTrainer(
        ppo_config(config, width=policy.v_head.summary.in_features),
        policy,
        tokenizer=tokenizer,
        critic=critic,
        sampling=drawn,
        reward=reward,
        device=device,
        processes=processes,
    )
    if isinstance(config.generation, VLLMGeneration):
        engine = engine_for(
            trainer,
            config.generation,
            trainer.sampling,
            context=longest_prompt(config) + config.generation.max_new_tokens,
            trust_remote_code=config.model.trust_remote_code,
        )
        trainer.sampler = VLLMSampler(trainer, engine, max_gap=config.generation.max_gap)
    return trainer


def make_trackers(
    config: Config, folder: Path, overrides: Sequence[str], begun: Path | None, *, is_main: bool
) -> Composite:
    """Where a run's metrics go: with several processes, those of the main one alone."""
    if not is_main:
        return Composite([], say=silent)
    return open_trackers(
        config.tracking,
        folder,
        hidden(asdict(config)),
        total_steps=config.ppo.steps,
        overrides=overrides,
        resume_step=(checkpoint.step_of(begun) if begun else -1) if config.resume else None,
    )


def go_on(lab: Lab, begun: Path) -> None:
    """Take everything up where a checkpoint left it."""
    with lab.processes.together():
        state = checkpoint.read(begun)
    try:
        restore(lab, state)
    except ConfigError as error:
        raise shared(error) from None
    lab.processes.from_main(
        lambda: checkpoint.set_aside_later(lab.folder, lab.trainer.iterations_done)
    )


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
    elif lab.evaluations[-1].step < lab.trainer.iterations_done >= steps:  # resumed, to end here
        evaluate(lab, lab.trainer.iterations_done)
    with lab.processes.together():
        check_metrics(lab)
    for metrics in iterations(lab):
        step = lab.trainer.iterations_done
        if step == steps or (every and step % every == 0):
            metrics |= evaluate(lab, step, beta=metrics["kl_coef"])
        elif shown and step % shown == 0:
            samples = latest_samples(lab.trainer, lab.config.evaluation.samples)
            lab.trackers.log_samples(samples, step)
        lab.trackers.log(metrics, step)
        if step == 1:
            warn_of_large_scores(lab.config, metrics, lab.keeper.say)
        lab.history.append(summarised(metrics))
        lab.note_place()
        too_far = 0 < lab.config.ppo.max_kl < metrics["kl"]
        asked = lab.processes.first(preemption.asked)
        lab.keeper.keep(lab, metrics, due=step == steps or too_far or bool(asked))
        check_ceiling(metrics, max_kl=lab.config.ppo.max_kl)
        if asked and step < steps:
            raise Preempted(asked)


def iterations(lab: Lab) -> Iterator[Metrics]:
    """The metrics of each iteration that is left, some of them traced where that is asked for."""
    found = lab.trainer.train(lab.stream)
    if not (lab.config.profile and lab.processes.is_main):
        return found
    from ppo_lab.profiling import profiled

    return profiled(found, lab.folder, lab.keeper.say, done=lab.trainer.iterations_done)


def evaluate(lab: Lab, step: int, *, beta: float | None = None) -> Metrics:
    """The metrics of an evaluation, its samples shown; the first evaluation and the last are
    kept. `beta` is the one in force in the iteration before: an adaptive one has moved since.
    """
    with lab.trainer.average.in_place():
        evaluation = replace(lab.evaluator(beta), step=step)
    lab.evaluations[1:] = [evaluation]
    lab.trackers.log_samples(evaluation.samples, step)
    return {f"eval/{name}": value for name, value in evaluation.metrics.items()}
