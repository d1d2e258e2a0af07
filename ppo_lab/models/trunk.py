"""Any causal language model as a trunk that gives hidden states and a head that gives logits; of a
classifier, the trunk alone.

PPO needs log-probabilities and values of response tokens alone. Asking the model for its logits
would build them for every position and the whole vocabulary; asking its decoder for hidden states,
and the head for what is needed, does not.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ppo_lab.errors import ConfigError
from ppo_lab.models.fast.attention import KeysAndValues, avoid_plans_of_attention
from ppo_lab.models.fast.decoder import FastDecoder
from ppo_lab.models.fast.graphed import Graphed, Then
from ppo_lab.models.fast.kernels import kernels_for, leave_out, without_kernels
from ppo_lab.models.fast.proof import ROOM, Proof, prove_draws
from ppo_lab.models.fast.recording import Recorder, Results, has_room
from ppo_lab.models.fitness import steady_context, what_fails
from ppo_lab.models.logprobs import Head

log = logging.getLogger(__name__)

# Architectures whose logits are multiplied by `logits_scaling`, by which others divide.
MULTIPLIES = ("hyperclovax",)


class UnfitModel(ConfigError):
    """A model that cannot be trained here, for what it makes of a few tokens."""


class Trunk:
    """The decoder of a causal language model, LoRA layers in it included, and its head."""

    def __init__(self, model: Any) -> None:
        self.model: Any = _base_of(model)
        self._parts = [weakref.ref(module) for module in self.model.modules()]
        self.decoder: Any = _decoder_of(self.model)
        parameters = inspect.signature(self.decoder.forward).parameters
        self._takes_positions = "position_ids" in parameters
        known = ("past_key_values", "cache_params")
        self._cache_argument = next((name for name in known if name in parameters), "")
        self._steady = steady_context(self.model.config)
        self.kept_below = 0  # the layers whose output is taken from where it is kept
        self.fast_layers = True  # where they are known and prove equal
        self.records_graphs = True  # on a GPU, until they prove not to work
        self._recorder: Recorder | None = None
        self._kept: Graphed | None = None  # of the generation before
        self._keeps = True
        self._compiled: Any = None
        self._proved_on = self._device
        self._fast = self._proved()

    def __getstate__(self) -> dict[str, Any]:
        """All but what is recorded on a device, which a copy makes anew, and the parts, which are
        others there.
        """
        return {**self.__dict__, "_recorder": None, "_kept": None, "_parts": []}

    def is_of(self, model: Any) -> bool:
        """Whether this was made of a model as it is now, and no module of it was put in later."""
        now = list(_base_of(model).modules())
        seen = [part() for part in self._parts]
        return len(seen) == len(now) and all(a is b for a, b in zip(seen, now, strict=True))

    @property
    def road(self) -> str:
        """Which layers passes go through, in words."""
        fast = self._fast_here()
        if fast is None:
            return "transformers'"
        window = fast.anatomy.window
        return f"ppo_lab's, over {window} tokens transformers'" if window else "ppo_lab's"

    @property
    def hidden_size(self) -> int:
        """The width of the hidden states."""
        return self.model.get_output_embeddings().weight.shape[1]

    @property
    def _device(self) -> str:
        """The kind of device that the weights are on."""
        return self.decoder.get_input_embeddings().weight.device.type

    @property
    def head(self) -> Head:
        """The head as it stands now."""
        output, config = self.model.get_output_embeddings(), self.model.config.get_text_config()
        scaling = getattr(config, "logits_scaling", None) or 1.0
        scaling = scaling if config.model_type in MULTIPLIES else 1.0 / scaling
        scale = getattr(config, "logit_scale", None) or scaling
        scale = scale * (getattr(config, "lm_head_multiplier", None) or 1.0)
        softcap = getattr(config, "final_logit_softcapping", None) or 0.0
        return Head(output.weight, getattr(output, "bias", None), float(scale), float(softcap))

    def hidden(
        self,
        ids: Int[Tensor, "batch new"],
        attention: Bool[Tensor, "batch seen"],
        *,
        cache: Any = None,
        last: int = 0,
        below: Float[Tensor, "batch new hidden"] | None = None,
    ) -> Float[Tensor, "batch columns hidden"]:
        """The last hidden states of `ids`, the newest of the `seen` positions; `cache` holds the
        earlier ones. With `last`, only those of so many last columns of `ids` are given. `below`
        are the states of `ids` that enter the first adapted layer, where they are known already.

        Positions count real tokens alone, so that left padding moves nothing. Padding's hidden
        states have no meaning.
        """
        if self._compiled is not None and cache is None and torch.is_grad_enabled():
            return self._by_transformers(ids, attention, by=self._compiled)[:, -last:]
        if below is not None or _has_begun(cache):
            assert self._fast is not None, "what has begun on the fast road stays there"
            start = self.kept_below if below is not None else 0
            return self._fast.hidden(ids, attention, cache, last=last, below=below, start=start)
        may = cache is None or isinstance(cache, KeysAndValues)
        if may and (fast := self._fast_here(attention.shape[1])):
            return fast.hidden(ids, attention, cache, last=last)
        return self._by_transformers(ids, attention, cache)[:, -last:]

    def newest(
        self,
        ids: Int[Tensor, "batch new"],
        attention: Bool[Tensor, "batch seen"],
        cache: Any,
        then: Then,
        *given: Tensor,
    ) -> Results:
        """What `then(states, *given)` makes of the hidden states (batch, hidden) of the newest
        column of `ids`, as `hidden` gives them: where passes are recorded, recorded with them.

        `then` may write into what it is given; `placed` says which tensors that should be. `ids`
        may be one of those.
        """
        if isinstance(cache, Graphed):
            return cache.newest(ids, attention, then, *given)
        return then(self.hidden(ids, attention, cache=cache, last=1)[:, -1], *given)

    def placed(self, cache: Any, *room: Tensor) -> Results:
        """Tensors that stay where they are, for `newest` to give to `then`: those of the generation
        before if they are of these shapes, where passes are recorded, and else these. Of the first
        dimension there may be more.
        """
        return cache.placed(*room) if isinstance(cache, Graphed) else room

    def keep_below(self) -> None:
        """From now on take the states below the first adapted layer from where they are kept.

        Raises:
            ConfigError: there is nothing frozen below, or the architecture is not known in parts.
        """
        name, fast = type(self.model).__name__, self._fast_here()
        if fast is None or fast.anatomy.window:
            dora = any(getattr(m, "lora_magnitude_vector", None) for m in self.decoder.modules())
            why = ", since its adapter is DoRA (lora.use_dora=true)" if dora else ""
            raise ConfigError(
                f"ppo.cache_trunk=true: the layers of {name} are not known one by one{why}; leave "
                "it out"
            )
        if fast.first_trained() == 0:
            raise ConfigError(
                f"ppo.cache_trunk=true: the first layer of {name} is trained, so that nothing is "
                "computed twice; adapt the upper layers alone with lora.top_layers=N"
            )
        # Counted once: PEFT has nothing trained while an adapter is off.
        self.kept_below = fast.first_trained()

    def below(self, ids: Tensor, attention: Tensor) -> Float[Tensor, "batch new hidden"]:
        """The hidden states that enter the first adapted layer."""
        assert self._fast is not None, "keep_below() comes first"
        return self._fast.below(ids, attention, self.kept_below)

    def new_cache(self, positions: int) -> Any:
        """An empty cache for `hidden`, with room for so many positions."""
        fast = self._fast_here(positions)
        if fast and self._device == "cpu":
            return KeysAndValues(positions)
        if fast and self._may_record(fast):
            return self._generation(fast, positions)
        return self._new_cache_of_transformers()

    def let_go(self) -> bool:
        """Give back what generations keep for the next, now and from now on; whether there was
        any.
        """
        kept, self._kept, self._keeps = self._kept, None, False
        if kept is not None and self._recorder is not None:
            self._recorder.let_go()
        return kept is not None

    def passes_may_be_recorded(self, positions: int) -> bool:
        """Whether a pass over so many positions launches the same kernels whenever it is made, and
        is allowed to be recorded.
        """
        asked = self.records_graphs and not self.kept_below and self._compiled is None
        if self._device != "cuda" or not asked:
            return False
        return self._fast_here(positions) is not None

    def compile(self) -> None:
        """From now on pass batches with gradients through a compiled decoder.

        One graph serves batches of all widths: those change with every batch, and a graph for each
        would never be done compiling.
        """
        self._compiled = torch.compile(self.decoder, dynamic=True)

    def _by_transformers(
        self, ids: Tensor, attention: Tensor, cache: Any = None, by: Any = None
    ) -> Tensor:
        self._check_length(attention)
        # A cache of states rather than of positions has taken in which of them were padding.
        of_states = self._cache_argument == "cache_params"
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": attention[:, -ids.shape[1] if of_states else 0 :].long(),
            "use_cache": cache is not None,
        }
        if cache is not None:
            inputs[self._cache_argument] = cache
        if self._takes_positions:
            inputs["position_ids"] = (attention.long().cumsum(1) - 1).clamp(min=0)[
                :, -ids.shape[1] :
            ]
        decoder = self.decoder if by is None else by  # a compiled one has no truth value
        return decoder(**inputs).last_hidden_state

    def _check_length(self, attention: Tensor) -> None:
        """Refuse texts over which rotary angles would be those of the batch that they are in."""
        most = self._steady
        if not most or attention.shape[1] <= most:
            return
        if (tokens := int(attention.sum(1).max())) <= most:
            return
        raise ConfigError(
            f"a text of {tokens} tokens: over {most}, the rotary embedding of "
            f"{type(self.model).__name__} turns all texts of a batch by other angles (rope_type "
            "dynamic or longrope), so that log-probs would depend on what stands beside; shorten "
            "prompts or responses"
        )

    def _new_cache_of_transformers(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    @torch.no_grad()
    def check(self) -> None:
        """Prove on a few tokens that head and decoder together give the model's own logits and,
        where layers are passed transformers' way, that sampling and scoring see the same.

        Raises:
            UnfitModel: they do not, for this architecture or for weights that are no numbers.
        """
        self.check_cache()
        training = self.model.training
        self.model.eval()  # as it samples: transformers takes no cache while it checkpoints
        try:
            problem = self._foreign_head() or ("" if self._fast else self._unfit())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of what is built otherwise than any decoder that is known
            said = " ".join(str(error).split())[:200]
            what = f"it does not pass a few tokens as a decoder does ({said})"
            raise self._refusal(what) from error
        finally:
            self.model.train(training)
        if problem and (spoilt := self._spoilt()):
            raise UnfitModel(
                f"model: {spoilt} holds NaN or infinity; its files are damaged, or what trained it "
                "diverged"
            )
        if problem:
            raise self._refusal(problem)

    def _spoilt(self) -> str:
        """The first weight that is not finite throughout; empty where all are."""
        named = self.model.named_parameters()
        return next((name for name, weight in named if not weight.isfinite().all()), "")

    def check_cache(self) -> None:
        """Refuse a decoder that could not go on from a cache; no weights are needed to see it.

        Raises:
            UnfitModel: it takes none of transformers'.
        """
        if not self._cache_argument:
            raise self._refusal("it takes no cache of transformers', and is sampled with one")

    def _refusal(self, problem: str) -> UnfitModel:
        name = type(self.model).__name__
        return UnfitModel(f"model: {name}: {problem}; this architecture cannot be trained here")

    def _foreign_head(self) -> str:
        """How far its logits are from its head on its decoder's states; "" where they agree."""
        ids = torch.arange(4, device=self.head.weight.device)[None] % len(self.head.weight)
        attention = torch.ones_like(ids, dtype=torch.bool)
        ours = self.head.logits(self.hidden(ids, attention)[:, -1])
        theirs = (
            self.model(input_ids=ids, attention_mask=attention.long(), use_cache=False)
            .logits[:, -1]
            .float()
        )
        tolerance = 1e-3 if theirs.dtype == self.head.weight.dtype else 5e-2
        error = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6)
        if error <= tolerance:
            return ""
        return (
            "its logits are not its head applied to its decoder's last hidden state (relative "
            f"error {error.item():.2g})"
        )

    def _unfit(self) -> str:
        """What sampling and scoring would not see alike; "" if nothing."""
        words = self.decoder.get_input_embeddings().weight
        return what_fails(
            self._by_transformers,
            self._new_cache_of_transformers,
            words,
            self.model.parameters(),
        )

    def _fast_here(self, positions: int = 0) -> FastDecoder | None:
        """The fast road, where it may be taken over so many positions now and has proved itself on
        this kind of device.
        """
        if self._device != self._proved_on:
            self._proved_on = self._device
            self._fast = self._proved()
        fast = self._fast if self.fast_layers else None
        return fast if fast and fast.anatomy.covers(positions) and fast.usable() else None

    def _proved(self) -> FastDecoder | None:
        """The fast road of the decoder where it is, if there is one that proves equal."""
        if self._device == "cuda":
            avoid_plans_of_attention()
        fast = FastDecoder.of(self.decoder)
        if fast is None or not fast.usable():
            return None
        problem = self._problem(lambda: self._proves(fast))
        if problem:
            log.warning("layers are passed transformers' way, for the fast ones %s", problem)
        return None if problem else fast

    def _proves(self, fast: FastDecoder) -> bool:
        proof = self._proof()
        if self._device == "cpu":
            return proof.of_passes(fast)
        output = self.model.get_output_embeddings()
        return proof.of_learning(fast) and (output is None or prove_draws(self.head))

    def _may_record(self, fast: FastDecoder) -> bool:
        """Whether a token's pass may be recorded: it is asked for, and has proved equal."""
        if self.records_graphs and self._recorder is None:
            problem = self._problem(lambda: self._proves_recorded(fast))
            if problem:
                log.warning("decoding goes transformers' way, for recorded passes %s", problem)
            self.records_graphs = not problem
        return self.records_graphs

    def _proves_recorded(self, fast: FastDecoder) -> bool:
        self._recorder = Recorder(self.head.weight.device)
        return self._proof().of_decoding(Graphed(fast.anatomy, ROOM, self._recorder))

    def _problem(self, proves: Callable[[], bool]) -> str:
        """What is wrong with a road, "" if nothing; where it is right without this project's
        kernels, they are left out.
        """
        found = self._tried(proves)
        if not found or kernels_for(torch.device(self._device)) is None:
            return found
        with without_kernels():
            without = self._tried(proves)
        if not without:
            leave_out(found)
        return without

    def _tried(self, proves: Callable[[], bool]) -> str:
        try:
            return "" if proves() else f"do not prove equal on {type(self.model).__name__}"
        except Exception as error:  # of a compiler, a driver, a device
            return f"fail: {error}"

    def _generation(self, fast: FastDecoder, positions: int) -> Graphed:
        """The passes of the next generation, which begins when the one before has ended."""
        made, self._kept = self._kept, None
        if made is None or made.anatomy is not fast.anatomy:
            made = Graphed(fast.anatomy, positions, self._recorder)
        made.again(positions)
        if self._keeps and has_room(self.head.weight.device):
            self._kept = made
        return made

    def _proof(self) -> Proof:
        words = self.decoder.get_input_embeddings().weight
        return Proof(self._by_transformers, self.decoder.parameters(), words)


def _base_of(model: Any) -> Any:
    """The model that an adapter is in, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _decoder_of(model: Any) -> Any:
    """What of a model gives hidden states. Some say that it is the model itself, or a part of the
    head that has the name.
    """
    said = model.get_decoder() if hasattr(model, "get_decoder") else None
    found = (said, model.base_model, getattr(model, "model", None))
    return next((m for m in found if hasattr(m, "get_input_embeddings") and m is not model), model)


def _has_begun(cache: Any) -> bool:
    """Whether earlier positions went the fast road, so that these do too."""
    return isinstance(cache, KeysAndValues) and cache.seen > 0
