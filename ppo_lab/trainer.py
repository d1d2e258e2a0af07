"""The PPO trainer. One iteration is the page that everything serves; the classic verbs of TRL call
the same page.

prompts -> sample -> score -> collect (log-probs, values, reference log-probs) -> KL-shaped rewards
        -> advantages (GAE, whitened) -> clipped updates -> metrics
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppo_lab import classic, core, scripts
from ppo_lab.averaging import MovingAverage
from ppo_lab.clock import Clock
from ppo_lab.kl import AdaptiveKLController, FixedKLController
from ppo_lab.memory import Passes, keep_freed_memory
from ppo_lab.metrics import Shaped, known_metrics, update_metrics
from ppo_lab.models.policy import AutoModelForCausalLMWithValueHead
from ppo_lab.models.reference import Reference
from ppo_lab.modules import set_training
from ppo_lab.optim import advance, make_optimizer, make_schedule
from ppo_lab.plan.machine import peak_flops
from ppo_lab.plan.meter import Meter
from ppo_lab.ppo_config import PPOConfig
from ppo_lab.processes import launch
from ppo_lab.processes.alone import Alone
from ppo_lab.prompt_tokens import continuation, written_by
from ppo_lab.recorded import RecordedPasses
from ppo_lab.rollout import NoiseKey, Sampling, sample
from ppo_lab.scaling import RunningMoments, penalise_unended, scale_scores
from ppo_lab.scripts import ScriptAttributes
from ppo_lab.types import Batch, Forward, Prompts, Rollout, Scores, Tokens
from ppo_lab.update import ClippedUpdates

# Tokens of a pass without gradients: large matrix products, a few dozen MB of activations.
PASS_TOKENS = 2048

# Where a critic of its own is saved, in the folder of the policy.
CRITIC_FOLDER = "critic"

# Largest |log ratio| before the first optimizer step that rounding explains.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.1}

Reward = Callable[..., Scores]
Sampler = Callable[[Prompts, Sampling, NoiseKey], tuple[Tokens, Forward]]


class PPOTrainer(ScriptAttributes):
    """Proximal policy optimisation of a language model against a reward, held to a reference by a
    KL penalty.

    With `reward`, `iteration(prompts)` and `train(stream)` do everything. Without one, TRL's
    classic verbs are there: `generate` answers queries and `step(queries, responses, scores)`
    learns from them; one query is enough.

    Args:
        config: the settings; `PPOConfig()` when None.
        model: the policy, a plain or PEFT causal language model (which is then given a value head).
        ref_model: the reference; None for the policy as it is now (its trunk with the adapter off
            under PEFT).
        tokenizer: for padding, end of sequence and texts.
        dataset: optional; `dataloader` then yields batches of `config.batch_size` through
            `data_collator`.
        optimizer, lr_scheduler: in place of Adam and the schedule of the config; stepped once an
            optimizer step, and once an iteration.
        num_shared_layers: without a `ref_model`, how many of the first layers are frozen.
        critic: what gives the values: a `Critic`, or a sequence classifier (a reward model, say)
            that shares the policy's tokenizer; None for the policy's own value head.
        sampling: how `iteration` draws responses.
        reward: called as `reward(prompts=..., completions=..., **columns)`, returning `Scores`.
        device: where to train; by default the GPU if there is one.
        processes: those that train together, by default this one alone. All of them give the same
            arguments and call the same verbs, and all get the same metrics.

    Raises:
        ValueError: naming the argument that is missing or of the wrong type.

    Source: Schulman et al. 2017, arXiv:1707.06347; Ziegler et al. 2019, arXiv:1909.08593; the verbs
        are TRL 0.11's.
    """

    def __init__(
        self,
        config: PPOConfig | None = None,
        model: Any = None,
        ref_model: Any = None,
        tokenizer: Any = None,
        dataset: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Any = None,
        num_shared_layers: int | None = None,
        lr_scheduler: Any = None,
        *,
        critic: Any = None,
        sampling: Sampling | None = None,
        reward: Reward | None = None,
        device: torch.device | str | None = None,
        processes: Alone | None = None,
    ) -> None:
        classic.check_constructor(config, model, ref_model, tokenizer, critic)
        scripts.check_alone(processes)
        scripts.share_layers(model, ref_model, num_shared_layers)
        self.config = config or PPOConfig()
        self.tokenizer, self.reward, self.dataset = tokenizer, reward, dataset
        self.processes = processes or Alone()
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device.type == "cpu":
            keep_freed_memory()
        self.policy = classic.as_policy(model).to(self.device)
        self.reference = Reference(
            self.policy,
            None if ref_model is None else ref_model.to(self.device),
            exact_kl=self.config.kl_penalty == "full",
        )
        self.critic = classic.as_critic(critic, self.policy).to(self.device)
        self.sampling = sampling or classic.default_sampling(self.policy, tokenizer)
        self.drawn = self.sampling  # how the responses at hand were drawn, which log-probs follow
        if self.config.gradient_checkpointing:
            for trained in {self.policy, self.critic}:
                trained.gradient_checkpointing_enable()
        classic.check_optimizer(optimizer, self.policy, self.critic)
        classic.check_schedule(lr_scheduler)
        self.policy.trunk.kept_below = 0  # as a trainer before this one may have left it
        if self.config.cache_trunk:
            self.policy.trunk.keep_below()
        self.optimizer = optimizer or _optimizer(self.policy, self.critic, self.config)
        self.lr_scheduler = lr_scheduler or _schedule(self.optimizer, self.config)
        # Before models are shared out: partitioned weights have no size of their own.
        exact = self.config.kl_penalty == "full"
        self.meter = Meter(self.policy, self.critic if self.has_critic else None, full_kl=exact)
        modules = {"policy": self.policy, "critic": self.critic, **self.reference.modules}
        self.models = self.processes.wrap(modules, self.optimizer)
        self.average = self._moving_average()
        self.recorded = RecordedPasses.of(self.policy, self.critic, self.reference, self.models)
        self.updates = ClippedUpdates(
            self.policy,
            self.critic,
            self.models,
            self.config,
            self.processes,
            recorded=self.recorded,
            average=self.average,
        )
        self.sampler: Sampler = self.draw
        self.noted: dict[str, float] = {}  # metrics of this iteration that others left
        self.drawing = Passes("sampling", self.recorded.let_go)
        self.kl_controller = _controller(self.config)
        self.moments = RunningMoments()
        self.iterations_done = 0
        self.clock = Clock(self.device, partial(peak_flops, str(self.device), self.policy.dtype))
        self.data_collator = data_collator
        self.dataloader = classic.dataloader(dataset, data_collator, self.config)
        self.logs = classic.logs(self.config) if self.processes.is_main else None
        self.latest: tuple[Prompts, Tokens, Scores] | None = None
        self._noise_streams = 0
        self._warned: set[str] = set()

    # ------ The page -----------------------------------------------------------------------------

    def train(self, stream: Any) -> Iterator[dict[str, float]]:
        """The metrics of each iteration up to `config.steps`, one iteration made whenever the next
        are asked for.
        """
        while self.iterations_done < self.config.steps:
            yield self.iteration(stream.next_batch())

    def iteration(self, prompts: Prompts) -> dict[str, float]:
        """One PPO iteration on a batch of prompts: sample, score, learn. Returns its metrics."""
        tokens, seen = self.sample(prompts)
        scores = self.score(prompts, tokens)
        rollout = self.collect(tokens, seen)
        self.latest = (prompts, tokens, scores)
        return self.learn(rollout, scores)

    def sample(self, prompts: Prompts) -> tuple[Tokens, Forward]:
        """Responses of the policy, with the log-probs and values that fell out of sampling them."""
        noise = self._noise()
        self.drawn = self.sampling
        with self.clock("generate"):
            tokens, seen = self.sampler(prompts, self.sampling, noise)
            return self._heard(tokens), seen

    def score(self, prompts: Prompts, tokens: Tokens) -> Scores:
        """What the reward says of the responses, as texts."""
        assert self.reward is not None, "iteration() and train() need a reward; step() takes scores"
        with self.clock("score"):
            responses = self.responses(prompts, tokens)
            return self.reward(
                prompts=prompts.texts, completions=responses, **self.columns(prompts, tokens)
            )

    @torch.no_grad()
    def collect(self, tokens: Tokens, seen: Forward | None = None) -> Rollout:
        """Log-probs, values and entropies of the responses under the policy, and the reference's
        log-probs.

        `seen` is what sampling left; responses from elsewhere are passed through the policy once.
        """
        with self.clock("reference"):
            self._train_mode(False)
            tokens = self._keep_below(self._heard(tokens))
            at = {"temperature": self.drawn.logprob_temperature}
            forward = seen or self.in_passes(tokens, self.policy.score, **at, entropy=True)
            values = forward.values
            if self.has_critic:
                values = self.in_passes(tokens, self.critic.values)
            ref_logprobs = self.in_passes(tokens, self.reference.logprobs, **at)
            full_kl = None
            if self.config.kl_penalty == "full":
                full_kl = self.in_passes(tokens, self.reference.full_kl, **at)
        return Rollout(tokens, forward.logprobs, values, ref_logprobs, forward.entropy, full_kl)

    def learn(self, rollout: Rollout, scores: Scores) -> dict[str, float]:
        """Everything after collection: rewards, advantages, clipped updates, KL controller.
        Returns the metrics.
        """
        scores = scores.on_host()
        self._train_mode(True)
        self.updates.prepare(rollout.tokens)  # a GPU is still at work on the reference
        shaped = self.shape(rollout, scores)
        with self.clock("update"):
            launched = self.updates.launch(
                shaped.batch,
                temperature=self.drawn.logprob_temperature,
                seed=(self.config.seed, self.iterations_done),
                critic_only=self.warms_up,
                critic_epochs=self.config.critic_epochs,
            )
            # A GPU is still at work on the updates.
            metrics = known_metrics(shaped, scores)
            if self.models.is_behind:
                self._noise(1).uniforms(len(rollout), self.sampling.max_new_tokens)
            update = self.updates.outcome(launched)
        metrics |= update_metrics(
            update,
            returns_var=metrics["ppo/returns/var"],
            cliprange=self.config.cliprange,
            vf_coef=1.0 if self.updates.apart else self.config.vf_coef,
            entropy_coef=self.config.entropy_coef,
        )
        metrics["ppo/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        self._check_invariants(metrics)
        if not self.warms_up:
            self.kl_controller.update(metrics["objective/kl"], n_samples=len(rollout))
        metrics |= self._taken(shaped.rollout.tokens, update.epochs)
        advance(self.lr_scheduler)
        self.iterations_done += 1
        return metrics

    def shape(self, rollout: Rollout, scores: Scores) -> Shaped:
        """KL-shaped rewards, and the advantages and returns that the updates aim at.

        All of it on the host: a GPU would take longer to be told of so few numbers than a CPU to
        work them out.
        """
        rollout = rollout.heard()
        c, mask = self.config, rollout.tokens.mask
        total = scores.total.cpu().float()
        total = penalise_unended(
            total, rollout.tokens.ended, missing_eos_penalty=c.missing_eos_penalty
        )
        total = scale_scores(
            total,
            self.moments,
            use_score_scaling=c.use_score_scaling,
            use_score_norm=c.use_score_norm,
            score_clip=c.score_clip,
        )
        kl = core.kl_estimate(
            rollout.logprobs,
            rollout.ref_logprobs,
            mask,
            kl_penalty=c.kl_penalty,
            full_kl=rollout.full_kl,
        )
        beta = self.kl_controller.value
        rewards = core.shape_rewards(total, kl, mask, kl_coef=beta)
        if c.whiten_rewards:
            rewards = core.whiten(rewards, mask, shift_mean=False)
        advantages, returns = core.gae(rewards, rollout.values, mask, gamma=c.gamma, lam=c.lam)
        if c.whiten_advantages:
            advantages = core.whiten(advantages, mask)
        batch = Batch(rollout.tokens, rollout.logprobs, rollout.values, advantages, returns)
        return Shaped(rollout, batch, total, kl, beta)

    # ------ TRL's classic verbs ------------------------------------------------------------------

    def generate(
        self,
        query_tensor: Tensor | Sequence[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 0,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        **generation_kwargs: Any,
    ) -> Any:
        """Responses to a list of queries as a list of 1-D tensors of token ids; to one query, as a
        tensor of one row.

        With `return_prompt` each begins with its query, in which nothing is cut. `length_sampler()`
        draws the number of new tokens; `generate_ref_response` also returns the reference's
        responses, beside the others. Keywords are those of transformers' generation, and hold for
        this call and the `step` after it, whose log-probs are taken at the same temperature. What
        they leave open is as the trainer's `sampling`: by default the whole distribution at
        temperature 1, whatever the model's own generation config says.
        """
        return classic.generate(
            self,
            query_tensor,
            length_sampler,
            batch_size,
            return_prompt,
            generate_ref_response,
            generation_kwargs,
        )

    def step(
        self,
        queries: Sequence[Tensor],
        responses: Sequence[Tensor],
        scores: Sequence[Tensor] | Tensor | Sequence[float],
        response_masks: Sequence[Tensor] | None = None,
    ) -> dict[str, Any]:
        """Learn from responses that were made anywhere, one score each; returns the statistics.

        Queries and responses are 1-D tensors of token ids, responses without their query. Any
        non-empty batch will do. `response_masks` are True on the response tokens to train on; the
        others stay context.

        Raises:
            ValueError: naming the argument, where types, lengths or emptiness are wrong.
        """
        tokens, raw = classic.check_step(self, queries, responses, scores, response_masks)
        return self.learn(self.collect(tokens), Scores(raw))

    def log_stats(
        self,
        stats: dict[str, Any],
        batch: dict[str, Any],
        rewards: Any,
        columns_to_log: Sequence[str] = ("query", "response"),
    ) -> None:
        """Send one step's statistics, and a table of these columns of its batch and the rewards, to
        the tracker that `config.log_with` names.

        Raises:
            ValueError: the batch lacks one of the columns.
        """
        if self.logs is not None:
            classic.log_stats(self, stats, batch, rewards, columns_to_log)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write model or adapter, value head and tokenizer, as safetensors; a critic of its own
        goes into the folder `critic` there. Of the policy it is the moving average, if one is
        kept.
        """
        save = self.saver(**kwargs)
        if self.processes.is_main:
            save(save_directory)

    def saver(self, **kwargs: Any) -> Callable[[str], None]:
        """What writes the models as they are now into a folder; all processes make one, the main
        one calls it.
        """
        policy, critic = map(self.models.state_of, (self.policy, self.critic))

        def save(folder: str) -> None:
            with self.average.in_place():
                self.policy.save_pretrained(folder, state_dict=policy, **kwargs)
            self.tokenizer.save_pretrained(folder)
            if self.has_critic:
                self.critic.save_pretrained(Path(folder) / CRITIC_FOLDER, state_dict=critic)
                self.tokenizer.save_pretrained(Path(folder) / CRITIC_FOLDER)

        return save

    @property
    def model(self) -> AutoModelForCausalLMWithValueHead:
        """The policy, under its classic name."""
        return self.policy

    @property
    def has_critic(self) -> bool:
        """Whether a model of its own gives the values, and not the policy's value head."""
        return self.critic is not self.policy

    @property
    def warms_up(self) -> bool:
        """Whether the critic learns alone in this iteration."""
        return self.iterations_done < self.config.critic_warmup_steps

    def next_noise_stream(self) -> int:
        """A stream of noise of its own for every call of `generate`."""
        self._noise_streams += 1
        return self._noise_streams

    # ------ State and invariants -----------------------------------------------------------------

    def decode(self, ids: list[int]) -> str:
        """A response as text, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    @cached_property
    def written(self) -> Callable[[list[int]], str]:
        """A response as the text that stop strings are looked for in."""
        return written_by(self.tokenizer)

    def responses(self, prompts: Prompts, tokens: Tokens) -> list[str]:
        """The responses as rewards are shown them: as what they add to their prompts' texts, and of
        a chat as texts of their own, what the prompt holds of the answer before them.
        """
        prefills = prompts.prefills or [""] * len(prompts)
        rows = zip(prompts.texts, prefills, prompts.ids, tokens.response_lists(), strict=True)
        return [
            prefill + continuation(self.tokenizer, query, ids)
            if prefill or isinstance(text, str)
            else self.decode(ids)
            for text, prefill, query, ids in rows
        ]

    def columns(self, prompts: Prompts, tokens: Tokens) -> dict[str, list[Any]]:
        """What a reward is shown beside the texts: the data's columns, and the responses' ids if it
        reads them.
        """
        reads_ids = getattr(self.reward, "reads_ids", False)
        ids = {"completion_ids": tokens.response_lists()} if reads_ids else {}
        return {**ids, **prompts.columns}

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes while training but the prompt stream; all else follows from the
        config.
        """
        return {
            "iterations_done": self.iterations_done,
            "policy": self.models.whole(_trained(self.policy)),
            "critic": self.models.whole(_trained(self.critic)) if self.has_critic else {},
            "average": self.average.state_dict(),
            "optimizer": self.models.optimizer_state(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "kl_controller": self.kl_controller.state_dict(),
            "moments": self.moments.state_dict(),
            "skipped_in_a_row": self.updates.skipped_in_a_row,
            "most_tokens": self.updates.most_tokens,
            "noise_streams": self._noise_streams,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises:
            KeyError: a part of the state is missing.
        """
        self._restore(self.policy, state["policy"])
        if self.has_critic:
            self._restore(self.critic, state["critic"])
        self.average.load_state_dict(state["average"])
        self.models.load_optimizer_state(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        self.kl_controller.load_state_dict(state["kl_controller"])
        self.moments.load_state_dict(state["moments"])
        self.updates.skipped_in_a_row = state["skipped_in_a_row"]
        self.updates.most_tokens = state["most_tokens"]
        self._noise_streams = state["noise_streams"]
        self.iterations_done = state["iterations_done"]

    def _moving_average(self) -> MovingAverage:
        if self.config.ema_decay and launch.sharding():
            raise ValueError("ema_decay: an average of sharded weights or optimizers is not kept")
        return MovingAverage(self.policy.pretrained_model, decay=self.config.ema_decay)

    @torch.no_grad()
    def _restore(self, model: torch.nn.Module, saved: dict[str, Tensor]) -> None:
        for name, parameter in _trained(model).items():
            self.models.put(parameter, saved[name])

    def _check_invariants(self, metrics: dict[str, float]) -> None:
        """Warn, once each, where ratios or KL before an update are not what they must be."""
        if self.drawn.departures:
            self.warn_once(
                "departures",
                f"responses are drawn with {', '.join(self.drawn.departures)}, not from the whole "
                "distribution, which log-probs are of: KL estimates are biased and may be negative",
            )
        rounding = ROUNDING.get(self.policy.dtype, 1e-3)
        error = metrics["ppo/policy/first_minibatch_ratio_error"]
        if error > rounding:
            self.warn_once(
                "ratio",
                f"the policy's log-probs changed by {error:.2g} before any update: sampling and "
                "training do not see the same model (dropout, padding, or an adapter that did not "
                "reach the sampler)",
            )
        if (
            self.iterations_done == 0
            and self.reference.is_start
            and not abs(metrics["kl_per_token"]) <= rounding  # nor is NaN 0
        ):
            self.warn_once(
                "kl",
                f"KL to the reference is {metrics['kl']:.3g} nats before the first update, "
                "where it must be 0",
            )

    def warn_once(self, key: str, message: str) -> None:
        """A warning, unless there was one of this key."""
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    def in_passes(self, tokens: Tokens, function: Callable[..., Any], **at: Any) -> Any:
        """`function(tokens, **at)`, which gives a tensor or a `Forward`, over all samples: a
        mini-batch at a time, or as many more as PASS_TOKENS allows, since nothing is kept for a
        backward pass.
        """
        own = self.recorded.begin(tokens[self.models.rows(len(tokens))])

        def one(part: Tokens) -> Any:
            found = self.recorded.read(function, part, **at)
            return self.models.call(function, part, **at) if found is None else found

        def attempt(size: int) -> Any:
            parts = [one(own[i : i + size]) for i in range(0, len(own), size)]
            return Forward.join(parts) if isinstance(parts[0], Forward) else torch.cat(parts)

        width = tokens.queries.shape[1] + tokens.responses.shape[1]
        mini_batch = self.config.mini_batch_size or self.config.batch_size
        wanted = max(mini_batch, PASS_TOKENS // width)
        found = self.updates.passes.until_it_fits(attempt, wanted, self._again)
        return self.processes.gather(found, len(tokens))

    def _noise(self, ahead: int = 0) -> NoiseKey:
        """That of this iteration, or of one ahead of it."""
        return NoiseKey(self.config.seed, self.iterations_done + ahead)

    def _heard(self, tokens: Tokens) -> Tokens:
        """The tokens, with what a device that is behind knows of them on the host too."""
        return tokens.heard() if self.models.is_behind else tokens

    def _keep_below(self, tokens: Tokens) -> Tokens:
        """With `cache_trunk`, the tokens and what the frozen layers below the adapter make of them,
        from which reference and updates go on.
        """
        if not self.config.cache_trunk:
            return tokens
        return replace(tokens, below=self.in_passes(tokens, self.policy.below))

    @property
    def _again(self) -> Callable[[bool], bool] | None:
        """How processes agree to make smaller passes; sharded models wait inside of each."""
        return None if self.models.sharded else self.processes.any

    def _taken(self, tokens: Tokens, epochs: int) -> dict[str, float]:
        """What this iteration took, and what others noted of it."""
        flops = self.meter.flops(
            tokens,
            epochs=epochs,
            critic_epochs=min(epochs, self.config.critic_epochs or epochs),
            policy_learns=not self.warms_up,
        )
        noted, self.noted = self.noted, {}
        speed = self.clock.read(tokens=int(tokens.mask.sum()), flops=flops / self.processes.size)
        return {**noted, **speed}

    def _train_mode(self, on: bool) -> None:
        """Dropout is off either way; what gradient checkpointing recomputes hangs on it."""
        for model in {self.policy, self.critic}:
            set_training(model, on)

    @torch.no_grad()
    def draw(
        self, prompts: Prompts, sampling: Sampling, noise: NoiseKey, trunk: Any = None
    ) -> tuple[Tokens, Forward]:
        """Responses of the policy, or of another `trunk`, to all prompts, in as many parts as
        memory asks for.
        """
        set_training(self.policy, False)
        n, own = len(prompts), prompts[self.models.rows(len(prompts))]
        with self.models.sampling():
            tokens, seen = self.drawing.until_it_fits(
                lambda size: self.models.call(
                    sample,
                    self.policy,
                    own,
                    sampling=replace(sampling, batch_size=size),
                    noise=replace(noise, first_sample=self.processes.share(n).start),
                    decode=self.written if sampling.stop_strings else None,
                    trunk=trunk,
                    all_ended=self.models.all_ended,
                ),
                sampling.batch_size or n,
                self._again,
            )
        return self.processes.gather(tokens, n), self.processes.gather(seen, n)


def _controller(config: PPOConfig) -> FixedKLController:
    if config.adap_kl_ctrl:
        return AdaptiveKLController(
            config.init_kl_coef, target=config.target, horizon=config.horizon
        )
    return FixedKLController(config.init_kl_coef)


def _trained(model: torch.nn.Module) -> dict[str, Tensor]:
    """The weights that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _optimizer(
    policy: AutoModelForCausalLMWithValueHead, critic: Any, config: PPOConfig
) -> torch.optim.Optimizer:
    return make_optimizer(
        policy,
        policy.v_head if critic is policy else critic,
        adam=config.adam,
        learning_rate=config.learning_rate,
        value_learning_rate=config.value_learning_rate,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )


def _schedule(optimizer: torch.optim.Optimizer, config: PPOConfig) -> Any:
    return make_schedule(
        optimizer,
        lr_schedule=config.lr_schedule,
        warmup_steps=config.warmup_steps,
        steps=config.steps,
    )
