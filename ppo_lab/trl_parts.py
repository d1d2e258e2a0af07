"""The one place that imports TRL: what ppo_lab builds on of its maintained parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from ppo_lab.models.logprobs import Head


def chunked_logprobs(
    hidden: Tensor, head: Head, targets: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `targets` and entropies with their gradients, one tile of the
    vocabulary at a time.
    """
    from trl.kernels import ChunkedLogProbFunction

    tile = 32768 if hidden.is_cuda else 8192
    softcap = head.softcap or None
    outputs: Any = ChunkedLogProbFunction.apply(
        hidden,
        head.weight,
        head.bias,
        targets,
        temperature,
        tile,
        softcap,
        head.scale,
        ("entropy",),
    )
    return outputs[0].float(), outputs[1].float()


def sft_parts() -> tuple[Any, Any]:
    """TRL's SFTTrainer and SFTConfig, their telemetry off."""
    _without_telemetry()
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer, SFTConfig


def reward_parts() -> tuple[Any, Any]:
    """TRL's RewardTrainer and RewardConfig, their telemetry off."""
    _without_telemetry()
    from trl import RewardConfig, RewardTrainer

    return RewardTrainer, RewardConfig


def vllm_generation(model: Any, accelerator: Any, tokenizer: Any, **settings: Any) -> Any:
    """TRL's `VLLMGeneration`: an engine that samples, and takes the model's weights when told. They
    are sent by the names and in the shapes that they have in files, which are all that vLLM knows.
    """
    from transformers.core_model_loading import revert_weight_conversion
    from trl.generation.vllm_generation import VLLMGeneration

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    renamed: dict[str, str] = {}

    class FromFiles(VLLMGeneration):  # type: ignore[misc, unused-ignore]
        def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
            for name, weight in super()._iter_named_params():
                if name in renamed:
                    yield renamed[name], weight
                    continue
                found = list(revert_weight_conversion(base, {name: weight}).items())
                if len(found) == 1 and found[0][1] is weight:
                    renamed[name] = found[0][0]
                yield from found

    return FromFiles(model, accelerator, tokenizer, **settings)


def _without_telemetry() -> None:
    """TRL's trainers report each use to the hub unless told not to; the hub's client reads this
    when it sends.
    """
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True
