"""TRL's classic interface around the trainer: what it accepts, what it refuses, and its
`generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppo_lab.errors import ConfigError
from ppo_lab.models.critic import Critic
from ppo_lab.models.loading import disable_dropout, eos_ids, max_context, reads_on
from ppo_lab.models.policy import AutoModelForCausalLMWithValueHead
from ppo_lab.ppo_config import PPOConfig
from ppo_lab.rollout import NoiseKey, Sampling
from ppo_lab.types import Prompts, Tokens

if TYPE_CHECKING:
    from ppo_lab.trainer import PPOTrainer

DEFAULT_NEW_TOKENS = 32
# Generation keywords that our own sampler honours; any other goes to transformers' `generate`.
OWN = {
    "max_new_tokens",
    "min_new_tokens",
    "min_length",
    "temperature",
    "top_k",
    "top_p",
    "do_sample",
}
OWN |= {"eos_token_id", "pad_token_id", "stop_strings"}
# Of the others, those that leave every token's probability as it is.
NEUTRAL = {"max_length", "max_time", "use_cache", "cache_implementation", "tokenizer", "streamer"}
# What a generation config says of itself.
NO_SETTINGS = {"transformers_version", "_from_model_config"}
# The streams of noise that `generate` draws from begin here: no iteration has these numbers.
CLASSIC_STREAM = 2**62


def check_constructor(
    config: Any, model: Any, ref_model: Any, tokenizer: Any, critic: Any = None
) -> None:
    """Refuse what no trainer can be made of.

    Raises:
        ValueError: naming the argument.
    """
    if config is not None and not isinstance(config, PPOConfig):
        raise ValueError(f"config must be a PPOConfig, not {type(config).__name__}")
    causal, classifier = "a causal language model", "a sequence classifier"
    given = (("model", model, causal), ("ref_model", ref_model, causal))
    for name, value, kind in (*given, ("critic", critic, classifier)):
        if value is not None and not isinstance(value, torch.nn.Module):
            raise ValueError(f"{name} must be {kind} (torch.nn.Module), not {type(value).__name__}")
    if model is None:
        raise ValueError(
            "model is missing: give a causal language model, with or without a value head"
        )
    if ref_model is not None and _trained_in_both(model, ref_model):
        raise ValueError(
            "ref_model shares weights with model that are to be trained: give a copy, or leave it "
            "out, and the model as it is now is the reference"
        )
    if tokenizer is None or not hasattr(tokenizer, "decode"):
        raise ValueError(
            f"tokenizer must be a transformers tokenizer, not {type(tokenizer).__name__}"
        )


def _trained_in_both(model: torch.nn.Module, ref_model: torch.nn.Module) -> bool:
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    return any(id(p) in trained for p in ref_model.parameters())


def as_policy(model: Any) -> AutoModelForCausalLMWithValueHead:
    """`model` with a value head, which is drawn anew where it had none, and without dropout.

    Raises:
        ValueError: nothing of the model is trainable, or several adapters act together.
    """
    policy = model
    if not isinstance(model, AutoModelForCausalLMWithValueHead):
        policy = AutoModelForCausalLMWithValueHead(model)
    policy.look_again()
    disable_dropout(policy)  # adapters that came after the value head brought their own
    if not any(p.requires_grad for p in policy.pretrained_model.parameters()):
        raise ValueError(
            "model: none of its weights is trainable (requires_grad); load a saved adapter with "
            "is_trainable=True"
        )
    together = policy.pretrained_model.active_adapters if policy.is_peft_model else []
    if len(together) > 1:
        raise ValueError(
            f"model: the adapters {' and '.join(together)} act together, and one alone is trained, "
            "switched off for the reference and saved; merge the others into the weights first "
            "(merge_and_unload), and put the one to be trained on the outcome"
        )
    return policy


def as_critic(critic: Any, policy: AutoModelForCausalLMWithValueHead) -> Any:
    """What gives the values: `critic`, made of a classifier if need be, or the policy with its own
    value head, which is otherwise not trained.

    Raises:
        ConfigError: the classifier cannot read the policy's tokens.
    """
    if critic is None:
        policy.v_head.requires_grad_(True)  # another trainer's critic may have stood in for it
        return policy
    made = critic if isinstance(critic, Critic) else Critic(critic)
    models = (made.model, policy.trunk.model)
    theirs, ours = (len(model.get_input_embeddings().weight) for model in models)
    if theirs < ours:
        raise ConfigError(
            f"critic: its embedding has {theirs} rows and the policy's {ours}, each of which the "
            "policy may sample, those that pad its vocabulary too; the critic's must be as many "
            "(transformers' resize_token_embeddings adds rows)"
        )
    policy.v_head.requires_grad_(False)
    return made


def check_optimizer(
    optimizer: Any, policy: AutoModelForCausalLMWithValueHead, critic: torch.nn.Module
) -> None:
    """Refuse an optimizer that would leave the policy or the critic as it is.

    Raises:
        ValueError: it holds no parameter of one of them that is trained, or steps by calling the
            loss itself.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("optimizer: LBFGS computes the loss by itself, which a step here cannot")
    groups = [] if optimizer is None else optimizer.param_groups
    if not groups:
        return
    held = {id(p) for group in groups for p in group["params"]}
    values = policy.v_head if critic is policy else critic
    for name, taught in (("model", policy.pretrained_model), ("critic", values)):
        trained = [id(p) for p in taught.parameters() if p.requires_grad]
        if trained and held.isdisjoint(trained):
            raise ValueError(
                f"optimizer holds no parameter of the {name} that is trained, so that it would "
                "never learn: make it of the parameters as they are now (an adapter that came "
                "later has its own)"
            )


def check_schedule(lr_scheduler: Any) -> None:
    """Refuse a schedule that asks for a figure at every step.

    Raises:
        ValueError: it is such a one.
    """
    if isinstance(lr_scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ValueError(
            "lr_scheduler: ReduceLROnPlateau is told a figure at every step, and is not here; call "
            "its step(stats[...]) after ppo_trainer.step in your own loop"
        )


def default_sampling(policy: AutoModelForCausalLMWithValueHead, tokenizer: Any) -> Sampling:
    """The whole distribution at temperature 1, ending where model or tokenizer say that a text
    ends.
    """
    ends = eos_ids(tokenizer, policy.trunk.model)
    pad, rows = tokenizer.pad_token_id, policy.trunk.model.get_input_embeddings().weight.shape[0]
    # Padding is never looked at, and must only have a row in the embedding, which a token added
    # later has not.
    if pad is None or pad >= rows:
        pad = ends[0] if ends else 0
    return Sampling(max_new_tokens=DEFAULT_NEW_TOKENS, eos_ids=ends, pad_id=pad)


def dataloader(dataset: Any, data_collator: Any, config: PPOConfig) -> Any:
    """Shuffled batches of the data set, None without one; without a collator each column is a list.

    Raises:
        ValueError: the data set has fewer rows than a batch.
    """
    if dataset is None:
        return None
    if len(dataset) < config.batch_size:
        raise ValueError(
            f"dataset has {len(dataset)} rows, fewer than one batch of batch_size="
            f"{config.batch_size}"
        )
    generator = torch.Generator().manual_seed(config.seed)
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=config.batch_size,
        collate_fn=data_collator or _columns,
        shuffle=True,
        drop_last=True,
        generator=generator,
    )


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def generate(
    trainer: PPOTrainer,
    query_tensor: Any,
    length_sampler: Callable[[], int] | None,
    batch_size: int,
    return_prompt: bool,
    generate_ref_response: bool,
    kwargs: dict[str, Any],
) -> Any:
    """See `PPOTrainer.generate`."""
    queries, alone = _queries(query_tensor), isinstance(query_tensor, Tensor)
    kwargs = _without_config(kwargs)
    cut = _cut(trainer, kwargs) and not alone
    _refuse_what_no_list_of_ids_holds(kwargs)
    longest: list[int] = []
    if length_sampler is not None:
        longest = [int(length_sampler()) for _ in queries]
        kwargs["max_new_tokens"] = max(longest)
    _check_vocabulary(trainer, query_tensor=queries)
    drawn = _sampling(trainer.sampling, kwargs, batch_size)
    _check_drawn(drawn, longest)
    if not 0 <= drawn.pad_id < _rows(trainer):
        drawn = replace(drawn, pad_id=trainer.sampling.pad_id)  # as `default_sampling` does
    if "max_length" not in kwargs:
        room = [len(query) + drawn.max_new_tokens for query in queries]
        _check_context(trainer, room, f"with its max_new_tokens={drawn.max_new_tokens}")
    trainer.drawn = drawn
    answers: list[Any] = [_answers(trainer, queries, kwargs)]
    if generate_ref_response:
        _check_unmerged(trainer)
        with trainer.reference.active() as trunk:
            answers.append(_answers(trainer, queries, kwargs, trunk))
    if longest:
        answers = [[r[:n] for r, n in zip(a, longest, strict=True)] for a in answers]
    if cut and drawn.eos_ids:
        end = trainer.tokenizer.eos_token_id
        answers = [[_until(end, r) for r in a] for a in answers]
        ends = dict.fromkeys((*drawn.eos_ids, end))
        trainer.drawn = replace(drawn, eos_ids=tuple(ends))
    if return_prompt:
        answers = [[torch.cat([q, r]) for q, r in zip(queries, a, strict=True)] for a in answers]
    answers = [[row.to(trainer.device) for row in a] for a in answers]
    if alone:
        answers = [answer[0][None] for answer in answers]
    return tuple(answers) if generate_ref_response else answers[0]


def _queries(query_tensor: Any) -> list[Tensor]:
    queries = (
        [query_tensor]
        if isinstance(query_tensor, Tensor) and query_tensor.dim() == 1
        else query_tensor
    )
    if not isinstance(queries, (list, tuple)):
        raise ValueError(
            "query_tensor must be a 1-D tensor of token ids or a list of them, not "
            + (
                f"a tensor of {queries.dim()} dimensions"
                if isinstance(queries, Tensor)
                else type(queries).__name__
            )
        )
    _check_ids("query_tensor", queries)
    return [q.detach().cpu().long() for q in queries]


def _without_config(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords, with what a `generation_config` among them says where they say nothing."""
    kwargs = dict(kwargs)
    config = kwargs.pop("generation_config", None)
    said = {} if config is None else config.to_diff_dict()
    return {name: x for name, x in said.items() if name not in NO_SETTINGS} | kwargs


def _cut(trainer: PPOTrainer, kwargs: dict[str, Any]) -> bool:
    """Whether responses to a list end with the tokenizer's end of sequence, whatever else ends
    their sampling. Takes TRL's two keywords of padding out of the others.
    """
    kwargs.pop("pad_to_multiple_of", None)
    return kwargs.pop("remove_padding", True) and trainer.tokenizer.eos_token_id is not None


def _until(end: int, response: Tensor) -> Tensor:
    """The response up to the first token that ends it."""
    found = (response == end).nonzero()
    return response[: int(found[0]) + 1] if len(found) else response


def _refuse_what_no_list_of_ids_holds(kwargs: dict[str, Any]) -> None:
    mask = kwargs.pop("attention_mask", None)
    if mask is not None and not bool(torch.as_tensor(mask).all()):
        raise ValueError("attention_mask hides tokens: give the query without its padding")
    if (kwargs.pop("num_return_sequences", None) or 1) > 1:
        raise ValueError(
            "num_return_sequences: one response a query is returned; repeat the query in a list"
        )
    for name in ("return_dict_in_generate", "output_scores", "output_logits"):
        if kwargs.pop(name, False):
            raise ValueError(f"{name}: token ids alone are returned")


def _sampling(sampling: Sampling, kwargs: dict[str, Any], batch_size: int) -> Sampling:
    """The trainer's sampling as generation keywords change it."""
    given = {name: value for name, value in kwargs.items() if value is not None}
    eos = kwargs.get("eos_token_id", sampling.eos_ids)
    eos = eos.tolist() if isinstance(eos, Tensor) else eos
    stops = given.get("stop_strings", sampling.stop_strings)
    temperature = float(given.get("temperature", sampling.temperature))
    foreign = sorted(set(given) - OWN - NEUTRAL)
    return replace(
        sampling,
        max_new_tokens=int(given.get("max_new_tokens", sampling.max_new_tokens)),
        min_new_tokens=max(int(given.get("min_new_tokens", sampling.min_new_tokens)), 0),
        temperature=temperature if given.get("do_sample", True) else 0.0,
        top_k=max(int(given.get("top_k", sampling.top_k)), 0),
        top_p=float(given.get("top_p", sampling.top_p)),
        eos_ids=tuple(eos)
        if isinstance(eos, (list, tuple))
        else (int(eos),)
        if eos is not None
        else (),
        pad_id=int(given.get("pad_token_id", sampling.pad_id)),
        stop_strings=(stops,) if isinstance(stops, str) else tuple(stops),
        batch_size=batch_size or sampling.batch_size,
        foreign=tuple(f"{name}={given[name]!r}" for name in foreign),
    )


def _check_drawn(drawn: Sampling, longest: Sequence[int]) -> None:
    """Refuse numbers that no distribution can be drawn from; `longest` are the most tokens of each
    response, where they differ.

    Raises:
        ValueError: naming the keyword.
    """
    if (fewest := min(longest, default=drawn.max_new_tokens)) < 1:
        raise ValueError(f"max_new_tokens={fewest}: must be at least 1")
    if not 0.0 <= drawn.temperature < float("inf"):
        raise ValueError(f"temperature={drawn.temperature}: must be a number, at least 0")
    if not 0.0 < drawn.top_p <= 1.0:
        raise ValueError(f"top_p={drawn.top_p}: must be above 0 and at most 1")


def _answers(
    trainer: PPOTrainer, queries: list[Tensor], kwargs: dict[str, Any], trunk: Any = None
) -> list[Tensor]:
    if set(kwargs) <= OWN and (kwargs.get("min_length") or 0) <= 0:
        noise = NoiseKey(trainer.config.seed, CLASSIC_STREAM + trainer.next_noise_stream())
        tokens, _ = trainer.draw(
            Prompts([q.tolist() for q in queries], []), trainer.drawn, noise, trunk
        )
        return [torch.tensor(row) for row in tokens.response_lists()]
    trainer.policy.eval()
    model = (trunk or trainer.policy.trunk).model
    settings = _for_transformers(trainer, kwargs)
    return [_by_transformers(model, q.to(trainer.device), settings).cpu() for q in queries]


def _for_transformers(trainer: PPOTrainer, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The sampling in transformers' words, and the keywords that only it knows."""
    drawn = trainer.drawn
    settings: dict[str, Any] = {
        "do_sample": drawn.temperature > 0,
        "eos_token_id": list(drawn.eos_ids) or None,
        "pad_token_id": drawn.pad_id,
        "min_new_tokens": drawn.min_new_tokens or None,
    }
    if drawn.temperature > 0:
        settings |= {"temperature": drawn.temperature, "top_k": drawn.top_k, "top_p": drawn.top_p}
    if "max_length" not in kwargs:
        settings["max_new_tokens"] = drawn.max_new_tokens
    if drawn.stop_strings:
        settings |= {"stop_strings": list(drawn.stop_strings), "tokenizer": trainer.tokenizer}
    return settings | {name: value for name, value in kwargs.items() if name not in settings}


@torch.no_grad()
def _by_transformers(model: Any, query: Tensor, settings: dict[str, Any]) -> Tensor:
    """One response by transformers' own `generate`, free of the model's own settings."""
    from transformers import GenerationConfig

    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        full = model.generate(
            input_ids=query[None], attention_mask=torch.ones_like(query[None]), **settings
        )
    finally:
        model.generation_config = own
    return full[0, len(query) :]


def check_step(
    trainer: PPOTrainer, queries: Any, responses: Any, scores: Any, response_masks: Any
) -> tuple[Tokens, Tensor]:
    """The arguments of `step` as tokens and a float32 tensor of scores.

    Raises:
        ValueError: naming the argument whose type, length, shape or content is wrong.
    """
    for name, value in (("queries", queries), ("responses", responses)):
        if not isinstance(value, (list, tuple)):
            raise ValueError(
                f"{name} must be a list of 1-D tensors of token ids, not {type(value).__name__}"
            )
        _check_ids(name, value)
    raw = _scores(scores)
    masks = (
        None
        if response_masks is None
        else [m.bool().tolist() for m in _masks(response_masks, responses)]
    )
    each = (
        ("responses", responses),
        ("scores", raw),
        ("response_masks", queries if masks is None else masks),
    )
    for name, value in each:
        if len(value) != len(queries):
            raise ValueError(
                f"{name} has {len(value)} items and queries has {len(queries)}: one each is needed"
            )
    _check_vocabulary(trainer, queries=queries, responses=responses)
    _check_unmerged(trainer)
    texts = [len(q) + len(r) for q, r in zip(queries, responses, strict=True)]
    _check_context(trainer, texts, "with its response")
    ids = [r.tolist() for r in responses]
    tokens = Tokens.pack(
        [q.tolist() for q in queries],
        ids,
        pad_id=trainer.drawn.pad_id,
        masks=masks,
        ended=[_has_ended(trainer, r) for r in ids],
    )
    return tokens.to(trainer.device), raw.to(trainer.device)


def _has_ended(trainer: PPOTrainer, response: list[int]) -> bool:
    """Whether a stop condition is in the response; True where none is known."""
    ends, stops = trainer.drawn.eos_ids, trainer.drawn.stop_strings
    text = trainer.written(response) if stops else ""
    return not (ends or stops) or any(i in response for i in ends) or any(s in text for s in stops)


def _check_ids(name: str, tensors: Sequence[Any]) -> None:
    if len(tensors) == 0:
        raise ValueError(f"{name} is empty: at least one sample is needed")
    for i, ids in enumerate(tensors):
        if not isinstance(ids, Tensor) or ids.dim() != 1:
            shape = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"{name}[{i}] must be a 1-D tensor of token ids, not {shape}")
        if len(ids) == 0:
            raise ValueError(f"{name}[{i}] is empty: a sample needs at least one token")
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"{name}[{i}] must hold integers (token ids), not {ids.dtype}")


def _scores(scores: Any) -> Tensor:
    if not isinstance(scores, (list, tuple, Tensor)) or (
        isinstance(scores, Tensor) and scores.dim() == 0
    ):
        raise ValueError(
            f"scores must be a list of numbers or scalar tensors, not {type(scores).__name__}"
        )
    for i, score in enumerate(scores):
        single = score.numel() == 1 if isinstance(score, Tensor) else isinstance(score, Real)
        if not single:
            raise ValueError(f"scores[{i}] must be one number, not {score!r}")
    raw = torch.tensor([float(score) for score in scores], dtype=torch.float32)
    bad = (~raw.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"scores[{bad[0]}] is {raw[bad[0]].item()}: every score must be a finite number"
        )
    return raw


def _masks(response_masks: Any, responses: Sequence[Tensor]) -> Sequence[Tensor]:
    if not isinstance(response_masks, (list, tuple)):
        raise ValueError(
            f"response_masks must be a list of 1-D tensors, not {type(response_masks).__name__}"
        )
    for i, (mask, response) in enumerate(zip(response_masks, responses, strict=False)):
        if not isinstance(mask, Tensor) or mask.shape != response.shape:
            raise ValueError(
                f"response_masks[{i}] must be a tensor as long as responses[{i}]: "
                f"{len(response)} tokens"
            )
        if not bool(mask.any()):
            raise ValueError(
                f"response_masks[{i}] masks every token of responses[{i}]: nothing would be trained"
            )
    return response_masks


def _check_vocabulary(trainer: PPOTrainer, **named: Sequence[Tensor]) -> None:
    size = _rows(trainer)
    for name, tensors in named.items():
        for i, ids in enumerate(tensors):
            ids = ids.long()  # of a narrower type the size would wrap around
            wrong = ids[(ids < 0) | (ids >= size)].tolist()
            if wrong:
                raise ValueError(
                    f"{name}[{i}] holds the token id {wrong[0]}; the model's vocabulary has {size}"
                )


def _rows(trainer: PPOTrainer) -> int:
    """The tokens that the model's embedding holds."""
    return trainer.policy.trunk.model.get_input_embeddings().weight.shape[0]


def _check_unmerged(trainer: PPOTrainer) -> None:
    """Refuse an adapter that is merged into the weights: it would not be trained, and could not be
    switched off for the reference.
    """
    if any(getattr(module, "merged", False) for module in trainer.policy.modules()):
        raise ValueError(
            "model: its adapter is merged into its weights, where it is not trained; call "
            "unmerge_adapter() of the model first"
        )


def _check_context(trainer: PPOTrainer, lengths: Sequence[int], what: str) -> None:
    """Refuse texts of more tokens than a model has positions; of one whose positions have no end,
    warn of those that are longer than it was trained for.
    """
    models = {"model": trainer.policy.trunk.model, "ref_model": trainer.reference.trunk.model}
    if trainer.has_critic:
        models["critic"] = trainer.critic.model
    length = max(lengths)
    text = f"queries[{lengths.index(length)}] {what} has {length} tokens"
    for name, model in models.items():
        context = max_context(model)
        if context is None or length <= context:
            continue
        if not reads_on(model):
            raise ValueError(f"{text}, and the {name} reads at most {context}")
        trainer.warn_once(
            "context", f"{text}, and the {name} was made for {context}; training goes on"
        )


def logs(config: PPOConfig) -> Any:
    """The tracker that `log_with` names, opened; None without one.

    Raises:
        ValueError: it is not installed.
    """
    if config.log_with == "none":
        return None
    if config.log_with == "wandb":
        from ppo_lab.wandb_mirror import ClassicRun

        options = config.tracker_kwargs.get("wandb", {})
        project, name = config.tracker_project_name, config.model_name
        name = "" if name == PPOConfig.model_name else name  # which nobody need have chosen
        return ClassicRun(project, name, config.to_dict(), options)
    if find_spec("tensorboard") is None:
        raise ValueError("log_with=tensorboard needs pip install 'ppo_lab[tensorboard]'")
    from ppo_lab.tensorboard_mirror import ClassicTensorBoard

    folder = Path(config.project_kwargs.get("logging_dir") or "outputs")
    return ClassicTensorBoard(folder / config.tracker_project_name)


def log_stats(
    trainer: PPOTrainer,
    stats: dict[str, Any],
    batch: dict[str, Any],
    rewards: Any,
    columns: Sequence[str],
) -> None:
    """See `PPOTrainer.log_stats`."""
    if absent := [name for name in columns if name not in batch]:
        raise ValueError(
            f"columns_to_log: the batch has no {', '.join(absent)}; it has {', '.join(batch)}"
        )
    scores = _scores(list(rewards)).tolist()
    spread = stdev(scores) if len(scores) > 1 else 0.0
    known = {"env/reward_mean": fmean(scores), "env/reward_std": spread, "env/reward_dist": scores}
    rows = zip(*(map(_cell, batch[name]) for name in columns), scores, strict=False)
    assert trainer.logs is not None, "whoever calls this has looked"
    trainer.logs.log({**stats, **known}, [*columns, "reward"], list(rows), trainer.current_step)


def _cell(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value
