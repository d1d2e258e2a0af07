"""What the config.json of a model in a folder tells against it, read before torch is imported.

Models on the hub are held to the same once they are loaded; nothing is fetched here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppo_lab.config import Config, ModelSection

VALUE_HEAD_FILE = "value_head.safetensors"  # beside a saved policy

# What the names of architectures end in that are no causal language models.
FOREIGN = ("ForSequenceClassification", "ForMaskedLM")
# Where architectures keep the most tokens that they read.
POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
# How weights were quantised -> the modules that read them.
READERS = {
    "aqlm": ("aqlm",),
    "auto-round": ("auto_round",),
    "awq": ("gptqmodel",),
    "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed_tensors",),
    "gptq": ("optimum", "gptqmodel"),
    "hqq": ("hqq",),
    "torchao": ("torchao",),
    "vptq": ("vptq",),
}


def problems(model: ModelSection) -> Iterator[str]:
    """Why the model in a folder cannot be the policy, a sentence each."""
    settings = read(model.path)
    yield from not_causal(
        model.path,
        architectures=settings.get("architectures"),
        is_encoder_decoder=bool(settings.get("is_encoder_decoder")),
    )
    yield from lacking_libraries(model)


def room_problems(config: Config) -> Iterator[str]:
    """Why no prompt fits beside the longest response, as far as a folder tells."""
    if context := _context(read(config.model.path)):
        yield from no_room(config, context)


def read(path: str) -> dict[str, Any]:
    """What config.json in this folder says; empty of a hub id, an adapter and what is damaged."""
    try:
        folder = Path(path).expanduser()
        if path in ("", "embedded") or (folder / "adapter_config.json").exists():
            return {}
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):
        return {}
    return found if isinstance(found, dict) else {}


def not_causal(
    path: str, *, architectures: Any, is_encoder_decoder: bool, reads_both_ways: bool = False
) -> Iterator[str]:
    """An encoder, with a decoder or without, or a classifier."""
    built = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    if is_encoder_decoder or reads_both_ways or built.endswith(FOREIGN):
        yield (
            f"model.path={path}: {built or 'an encoder with a decoder'} is not a causal "
            "language model; a classifier goes to reward.path"
        )


def lacking_libraries(model: ModelSection) -> Iterator[str]:
    """Quantised weights for which a library is missing on this machine."""
    quantization = read(model.path).get("quantization_config")
    if not isinstance(quantization, dict) or model.weights == "random":
        return
    by_bits = quantization.get("load_in_4bit") or quantization.get("load_in_8bit")
    method = str(quantization.get("quant_method") or ("bitsandbytes" if by_bits else ""))
    lacking = [name for name in READERS.get(method, ()) if find_spec(name) is None]
    if lacking:
        wanted = [_package(name) for name in lacking]
        yield (
            f"model.path={model.path}: its weights are quantised by {method} and need "
            f"{' and '.join(lacking)}: pip install {' '.join(wanted)}"
        )


def no_room(config: Config, context: int) -> Iterator[str]:
    """A model that reads `context` tokens, all of which the longest response may take."""
    new = max(config.generation.max_new_tokens, config.evaluation.max_new_tokens)
    if context <= new:
        yield (
            f"generation.max_new_tokens={new}: must be below the {context} tokens that "
            f"model.path={config.model.path} reads, prompt included"
        )


def _context(settings: Mapping[str, Any]) -> int | None:
    """The most tokens that the model reads; None where the file alone does not tell, or where
    positions are ALiBi's.
    """
    text = settings.get("text_config", settings)
    if not isinstance(text, dict) or text.get("alibi"):
        return None
    bounds = (text.get(name) for name in POSITIONS)
    return next((bound for bound in bounds if bound and isinstance(bound, int)), None)


def _package(module: str) -> str:
    """What pip installs it by."""
    return "'ppo_lab[quantization]'" if module == "bitsandbytes" else module.replace("_", "-")
