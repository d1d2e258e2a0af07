"""TRL's classic interface around the trainer: what it accepts, what it refuses, and its
`generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppo_lab.config import PPOConfig
from ppo_lab.models.policy import AutoModelForCausalLMWithValueHead
from ppo_lab.rollout import NoiseKey, Sampling, sample
from ppo_lab.types import Tokens

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


def check_constructor(config: Any, model: Any, ref_model: Any, tokenizer: Any) -> None:
    """Refuse what no trainer can be made of.

    Raises:
        ValueError: naming the argument.
    """
    if config is not None and not isinstance(config, PPOConfig):
        raise ValueError(f"config must be a PPOConfig, not {type(config).__name__}")
    for name, value in (("model", model), ("ref_model", ref_model)):
        if value is not None and not isinstance(value, torch.nn.Module):
            raise ValueError(
                f"{name} must be a causal language model (torch.nn.Module), "
                f"not {type(value).__name__}"
            )
    if model is None:
        raise ValueError(
            "model is missing: give a causal language model, with or without a value head"
        )
    if tokenizer is None or not hasattr(tokenizer, "decode"):
        raise ValueError(
            f"tokenizer must be a transformers tokenizer, not {type(tokenizer).__name__}"
        )


def as_policy(model: Any) -> AutoModelForCausalLMWithValueHead:
    """`model` with a value head, which is drawn anew where it had none."""
    if isinstance(model, AutoModelForCausalLMWithValueHead):
        return model
    return AutoModelForCausalLMWithValueHead(model)


def default_sampling(policy: AutoModelForCausalLMWithValueHead, tokenizer: Any) -> Sampling:
    """The whole distribution at temperature 1, ending where model or tokenizer say that a text
    ends.
    """
    from ppo_lab.models.loading import eos_ids

    ends = eos_ids(tokenizer, policy.trunk.model)
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = ends[0] if ends else 0
    return Sampling(max_new_tokens=DEFAULT_NEW_TOKENS, eos_ids=ends, pad_id=pad)


def dataloader(dataset: Any, data_collator: Any, config: PPOConfig) -> Any:
    """Shuffled batches of the data set, None without one."""
    if dataset is None:
        return None
    generator = torch.Generator().manual_seed(config.seed)
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=config.batch_size,
        collate_fn=data_collator,
        shuffle=True,
        drop_last=True,
        generator=generator,
    )


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
    queries = _queries(query_tensor)
    if length_sampler is not None:
        kwargs["max_new_tokens"] = int(length_sampler())
    trainer.sampling = _sampling(trainer.sampling, kwargs, batch_size)
    answers = [_answers(trainer, queries, kwargs)]
    if generate_ref_response:
        with trainer.reference.active() as trunk:
            answers.append(_answers(trainer, queries, kwargs, trunk))
    if return_prompt:
        answers = [[torch.cat([q, r]) for q, r in zip(queries, a, strict=True)] for a in answers]
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


def _sampling(sampling: Sampling, kwargs: dict[str, Any], batch_size: int) -> Sampling:
    """The trainer's sampling as generation keywords change it; it stays so for later log-probs."""
    temperature = kwargs.get("temperature", sampling.temperature)
    eos = kwargs.get("eos_token_id", sampling.eos_ids)
    pad = kwargs.get("pad_token_id")
    stops = kwargs.get("stop_strings") or ()
    return replace(
        sampling,
        max_new_tokens=int(kwargs.get("max_new_tokens", sampling.max_new_tokens)),
        min_new_tokens=max(int(kwargs.get("min_new_tokens", 0) or 0), 0),
        temperature=float(temperature) if kwargs.get("do_sample", True) else 0.0,
        top_k=max(int(kwargs.get("top_k", 0) or 0), 0),
        top_p=float(kwargs.get("top_p", 1.0)),
        eos_ids=tuple(eos)
        if isinstance(eos, (list, tuple))
        else (int(eos),)
        if eos is not None
        else (),
        pad_id=sampling.pad_id if pad is None else int(pad),
        stop_strings=(stops,) if isinstance(stops, str) else tuple(stops),
        batch_size=batch_size,
    )


def _answers(
    trainer: PPOTrainer, queries: list[Tensor], kwargs: dict[str, Any], trunk: Any = None
) -> list[Tensor]:
    if set(kwargs) <= OWN and kwargs.get("min_length", -1) <= 0:
        trainer.policy.eval()
        noise = NoiseKey(trainer.config.seed, trainer.next_noise_stream())
        ids = [q.tolist() for q in queries]
        tokens, _ = sample(
            trainer.policy,
            ids,
            sampling=trainer.sampling,
            noise=noise,
            decode=trainer.decode,
            trunk=trunk,
        )
        return [torch.tensor(row) for row in tokens.response_lists()]
    return [_by_transformers(trainer, q, kwargs, trunk) for q in queries]


@torch.no_grad()
def _by_transformers(
    trainer: PPOTrainer, query: Tensor, kwargs: dict[str, Any], trunk: Any
) -> Tensor:
    """One response by transformers' own `generate`, for keywords that our sampler does not know."""
    model = trainer.policy.pretrained_model if trunk is None else trunk.model
    settings = {
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": DEFAULT_NEW_TOKENS,
        **kwargs,
    }
    settings.setdefault("pad_token_id", trainer.sampling.pad_id)
    if "stop_strings" in settings:
        settings["tokenizer"] = trainer.tokenizer
    ids = query[None].to(trainer.device)
    full = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    return full[0, len(query) :].cpu()


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
    for name, value in (
        ("responses", responses),
        ("scores", raw),
        ("response_masks", masks or queries),
    ):
        if len(value) != len(queries):
            raise ValueError(
                f"{name} has {len(value)} items and queries has {len(queries)}: one each is needed"
            )
    ids = [r.tolist() for r in responses]
    ends = set(trainer.sampling.eos_ids)
    tokens = Tokens.pack(
        [q.tolist() for q in queries],
        ids,
        pad_id=trainer.sampling.pad_id,
        masks=masks,
        ended=[not ends or bool(ends & set(r)) for r in ids],
    )
    _check_vocabulary(trainer, tokens)
    return tokens.to(trainer.device), raw.to(trainer.device)


def _check_ids(name: str, tensors: Sequence[Any]) -> None:
    if len(tensors) == 0:
        raise ValueError(f"{name} is empty: at least one sample is needed")
    for i, ids in enumerate(tensors):
        if not isinstance(ids, Tensor) or ids.dim() != 1:
            shape = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"{name}[{i}] must be a 1-D tensor of token ids, not {shape}")
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"{name}[{i}] must hold integers (token ids), not {ids.dtype}")
        if len(ids) == 0:
            raise ValueError(f"{name}[{i}] is empty: a sample needs at least one token")


def _scores(scores: Any) -> Tensor:
    if not isinstance(scores, (list, tuple, Tensor)):
        raise ValueError(
            f"scores must be a list of numbers or scalar tensors, not {type(scores).__name__}"
        )
    for i, score in enumerate(scores):
        single = (
            score.numel() == 1 if isinstance(score, Tensor) else isinstance(score, (int, float))
        )
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


def _check_vocabulary(trainer: PPOTrainer, tokens: Tokens) -> None:
    size = trainer.policy.trunk.model.get_input_embeddings().weight.shape[0]
    for name, ids in (("queries", tokens.queries), ("responses", tokens.responses)):
        worst = int(ids.max()), int(ids.min())
        if worst[0] >= size or worst[1] < 0:
            raise ValueError(
                f"{name} hold the token id {max(worst)}, and the model's vocabulary has {size}"
            )


def log_stats(
    trainer: PPOTrainer, stats: dict[str, Any], batch: dict[str, Any], rewards: Any
) -> None:
    """See `PPOTrainer.log_stats`."""
    if trainer.config.log_with == "none":
        return
    from ppo_lab.tracking import log_classic_stats

    log_classic_stats(
        stats, batch, _scores(list(rewards)).tolist(), project=trainer.config.tracker_project_name
    )
