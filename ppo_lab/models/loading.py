"""Tokenizers and causal language models from a folder, the hub or a bare config, ready for PPO.

Ready means: tokenizers pad on the left and have a pad token, models have no dropout left, and
whatever cannot be had or read is a `ConfigError` that names the key. Weights are read from
safetensors where there are any, else from PyTorch's format by its reader of tensors alone: nothing
that is loaded here can run code, unless `model.trust_remote_code` says so.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import huggingface_hub
import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ppo_lab.errors import ConfigError
from ppo_lab.local_model import POSITIONS, not_causal
from ppo_lab.models.byte_tokenizer import BYTE_VOCABULARY, byte_tokenizer
from ppo_lab.models.fitness import steady_context
from ppo_lab.models.sources import ModelUnavailable, Source, locate, packaged_config

if TYPE_CHECKING:
    from peft import PeftModel

    from ppo_lab.config import ModelSection

__all__ = [
    "ModelUnavailable",
    "check_vocabulary",
    "choose_dtype",
    "disable_dropout",
    "eos_ids",
    "keep_quiet",
    "load_causal_lm",
    "load_config",
    "load_tokenizer",
    "max_context",
    "parameter_bytes",
    "reads_on",
    "resolved_revision",
]

_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)

# transformers would ask a bot on the hub to convert a repository that has no safetensors.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer of `model.tokenizer` or else of `model.path`, padding on the left.

    With `model.weights=random` it is the tokenizer of bytes, unless `model.tokenizer` names
    another. The pad token is `model.pad_token`, or the tokenizer's own, or its EOS, or any other
    token: masks come from lengths, so that what pads is never confused with what it also means.

    Raises:
        ConfigError: no tokenizer there, one that cannot be read, or a token that it does not have.
        ModelUnavailable: as `locate`.
    """
    if section.weights == "random" and not section.tokenizer:
        tokenizer: PreTrainedTokenizerBase = byte_tokenizer()
    else:
        tokenizer = _read_tokenizer(section)
    tokenizer.padding_side = "left"
    if section.eos_token:
        _require_token(tokenizer, section.eos_token, "model.eos_token")
        tokenizer.eos_token = section.eos_token
    if section.pad_token:
        _require_token(tokenizer, section.pad_token, "model.pad_token")
    if section.pad_token or tokenizer.pad_token is None:
        tokenizer.pad_token = section.pad_token or _any_token(tokenizer)
    return tokenizer


def load_config(section: ModelSection) -> PreTrainedConfig:
    """The config of the model itself: of an adapter, that of the model under it.

    Raises:
        ConfigError: not a decoder-only language model, a config that cannot be read, or attention
            by a kernel that is not there.
        ModelUnavailable: as `locate`.
    """
    packaged = packaged_config(section.path) if section.weights == "random" else None
    if packaged and not Path(section.path).is_dir():
        config = AutoConfig.from_pretrained(packaged)
        _require_kernel(config, section)
        return config
    source = locate_model(section)
    if source.entry == "adapter_config.json":
        return load_config(_base_of(section, source))
    with _reading(f"model.path={section.path}", "config"):
        config = AutoConfig.from_pretrained(
            source.path, trust_remote_code=section.trust_remote_code, **source.loading_arguments
        )
    _require_causal(config, section)
    _require_kernel(config, section)
    return config


def load_causal_lm(
    section: ModelSection,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> PreTrainedModel | PeftModel:
    """The language model on `device`, in evaluation mode, all dropout off, its adapter trainable.

    `dtype` goes before `model.dtype`. `seed` makes the weights of `model.weights=random`, in place
    and in their final precision, without touching the global generators.

    Raises:
        ConfigError: nothing to load there, weights missing or unreadable, 4 bits without GPU or
            bitsandbytes.
        ModelUnavailable: as `locate`.
    """
    device = torch.device(device)
    dtype = dtype or choose_dtype(section.dtype, device)
    with _quiet():
        model = (
            _random_model(section, device, dtype, seed)
            if section.weights == "random"
            else _pretrained_model(section, device, dtype)
        )
    disable_dropout(model)
    return model.eval()


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision of the trunk: `auto` is bfloat16 on a GPU that computes in it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of the model to 0: train mode then computes what evaluation mode does.

    Modules are not enough: some architectures (BLOOM among them) call the function with a rate that
    they keep in an attribute or in their config.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _zero_rates(module)


def eos_ids(
    tokenizer: PreTrainedTokenizerBase, model: Any, *, eos_token: str = ""
) -> tuple[int, ...]:
    """The ids of the tokens that end a text: all of the generation config's, and the tokenizer's.

    `eos_token` (`model.eos_token`) is the only one where it is given. A tokenizer and model without
    any: empty.

    Raises:
        ConfigError: the generation config names what is no id.
    """
    if eos_token:
        return (_require_token(tokenizer, eos_token, "model.eos_token"),)
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, (list, tuple)) else [configured]
    if not all(i is None or isinstance(i, int) for i in listed):
        raise ConfigError(
            f"model.path: the model's generation config has eos_token_id={configured!r}, which is "
            "no token id nor a list of them; mend generation_config.json, or name the token that "
            "ends a text with model.eos_token"
        )
    rows = _embedding_rows(model)
    ids = [i for i in (*listed, tokenizer.eos_token_id) if i is not None and 0 <= i < rows]
    return tuple(dict.fromkeys(ids))


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    """Nothing, if every token of the tokenizer has a row in the model's embedding.

    Raises:
        ConfigError: otherwise; such a token would be an index error in the middle of a run.
    """
    tokens = max(tokenizer.get_vocab().values(), default=-1) + 1
    rows = _embedding_rows(model)
    if tokens > rows:
        raise ConfigError(
            f"model.tokenizer: {tokens} tokens, but the model's embedding has {rows} rows; "
            "this tokenizer is not the model's"
        )


def max_context(config: Any) -> int | None:
    """The most tokens that the model can read, response included; None where unbounded, as with
    ALiBi, but for MPT, whose biases are a table of `max_seq_len`.

    Of a rotary embedding that turns with the longest text of a batch it is where that begins.
    """
    config = getattr(config, "config", config).get_text_config(decoder=True)
    if getattr(config, "alibi", False):
        return None
    bounds = (steady_context(config), *(getattr(config, name, None) for name in POSITIONS))
    return next((bound for bound in bounds if bound), None)


def reads_on(config: Any) -> bool:
    """Whether the model computes positions beyond `max_context` as any other: a rotary embedding
    turns by the position alone. Learned positions, and tables of others, end there.
    """
    config = getattr(config, "config", config).get_text_config(decoder=True)
    return bool(getattr(config, "rope_parameters", None)) and steady_context(config) is None


def resolved_revision(section: ModelSection) -> str:
    """The commit on the hub that the weights are of; empty for a folder and for random weights."""
    return "" if section.weights == "random" else locate_model(section).revision


def parameter_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of an architecture's weights in this precision, tied ones once; allocates nothing."""
    model = _on_meta(config, dtype)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _read_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    if section.tokenizer:
        key, path, revision = "model.tokenizer", section.tokenizer, ""
    else:
        key, path, revision = "model.path", section.path, section.revision
    source = locate(
        path,
        revision=revision,
        entries=(*_TOKENIZER_FILES, "adapter_config.json"),
        wanted="tokenizer (tokenizer.json or the like); name one with model.tokenizer",
        key=key,
    )
    if source.entry == "adapter_config.json":
        return _read_tokenizer(replace(_base_of(section, source), tokenizer=""))
    with _quiet(), _reading(f"{key}={path}", "tokenizer"):
        return AutoTokenizer.from_pretrained(
            source.path, trust_remote_code=section.trust_remote_code, **source.loading_arguments
        )


def _any_token(tokenizer: PreTrainedTokenizerBase) -> str:
    special = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
    return str(special or tokenizer.convert_ids_to_tokens(0))


def _require_token(tokenizer: PreTrainedTokenizerBase, token: str, key: str) -> int:
    """The id of a token that the tokenizer has; setting an unknown one would quietly add it."""
    vocabulary = tokenizer.get_vocab()
    if token in vocabulary:
        return vocabulary[token]
    known = list(dict.fromkeys(tokenizer.all_special_tokens))
    near = get_close_matches(token, [*known, *list(vocabulary)[:50_000]], n=1)
    nearest = f"; the nearest is {near[0]!r}" if near else ""
    raise ConfigError(
        f"{key}={token}: not a token of this tokenizer{nearest}; its special tokens: "
        f"{', '.join(known) or 'none'}"
    )


def locate_model(section: ModelSection) -> Source:
    """Where the model is, folder or hub, as `locate` says."""
    return locate(section.path, revision=section.revision)


def _base_of(section: ModelSection, adapter: Source) -> ModelSection:
    """The section of the model under an adapter: a hub id, a path, or a path beside the adapter."""
    from peft import PeftConfig

    with _reading(f"model.path={section.path}", "adapter_config.json"):
        config = PeftConfig.from_pretrained(adapter.path, **adapter.loading_arguments)
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ConfigError(
            f"model.path={section.path}: an adapter for {config.task_type}, not for CAUSAL_LM"
        )
    base = str(config.base_model_name_or_path or "")
    beside = Path(adapter.path) / base
    if not base or Path(base).resolve() == Path(adapter.path).resolve():
        raise ConfigError(f"model.path={section.path}: adapter_config.json names no base model")
    if not Path(base).exists() and beside.is_dir():
        base = str(beside)
    return replace(section, path=base, revision=config.revision or "")


def _require_causal(config: PreTrainedConfig, section: ModelSection) -> None:
    found = not_causal(
        section.path,
        architectures=config.architectures or [config.model_type],
        is_encoder_decoder=config.is_encoder_decoder,
        reads_both_ways=_reads_both_ways(config),
    )
    for problem in found:
        raise ConfigError(problem)


def _require_kernel(config: PreTrainedConfig, section: ModelSection) -> None:
    """Refuse attention that this architecture does not have, or that lacks a library here."""
    if not section.attn_implementation:
        return
    settings: dict[str, Any] = {"trust_remote_code": section.trust_remote_code}
    settings["attn_implementation"] = section.attn_implementation
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(copy.deepcopy(config), **settings)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"model.attn_implementation={section.attn_implementation}: {_sentence(error)}"
        ) from error


def _reads_both_ways(config: PreTrainedConfig) -> bool:
    """Whether it is of BERT's kin, which fill gaps unless they are said to be decoders."""
    fills = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    return fills and getattr(config, "is_decoder", True) is False


def _random_model(
    section: ModelSection, device: torch.device, dtype: torch.dtype, seed: int
) -> PreTrainedModel:
    if section.load_in_4bit:
        raise ConfigError("model.load_in_4bit=true: only pretrained weights can be quantised")
    config = load_config(section)
    if not section.tokenizer:
        _speak_bytes(config)
    kind: Any = type(_on_meta(config, dtype))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        # An empty checkpoint: no memory for the modules, then each weight drawn once, in its place.
        return kind.from_pretrained(
            None, config=config, state_dict={}, **_placement(section, device, dtype)
        )


def _speak_bytes(config: PreTrainedConfig) -> None:
    """Give the config the special tokens of the byte tokenizer."""
    text = config.get_text_config(decoder=True)
    if text.vocab_size < BYTE_VOCABULARY:
        raise ConfigError(
            f"model.weights=random: a vocabulary of {text.vocab_size} is too small for the "
            f"{BYTE_VOCABULARY} tokens of the byte tokenizer; name one with model.tokenizer"
        )
    text.pad_token_id, text.bos_token_id, text.eos_token_id = 0, 1, 2


def _pretrained_model(
    section: ModelSection, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel | PeftModel:
    source = locate_model(section)
    if source.entry == "adapter_config.json":
        return _adapted_model(section, source, device, dtype)
    config = load_config(section)
    quantised = _quantisation(section, device, dtype)
    with _reading(f"model.path={section.path}", "model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.path,
            config=config,
            trust_remote_code=section.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **quantised,
            **source.loading_arguments,
            **_placement(section, device, dtype),
        )
    model, report = loaded
    _require_weights(report, type(model).__name__, section)
    if source.is_folder:  # adapters keep the name of their base, and are loaded from anywhere
        model.name_or_path = model.config._name_or_path = str(Path(source.path).absolute())
    return model


def _require_weights(report: dict[str, Any], name: str, section: ModelSection) -> None:
    """Refuse weights that the files lack, or have in another shape: they would be random."""
    mismatched = {key for key, *_ in report["mismatched_keys"]}
    lacking = sorted(set(report["missing_keys"]) | mismatched)
    if lacking:
        shapes = ", or have them in another shape" if mismatched else ""
        raise ConfigError(
            f"model.path={section.path}: its files lack {len(lacking)} weights of {name}{shapes}; "
            f"{lacking[0]} is one"
        )


def _adapted_model(
    section: ModelSection, source: Source, device: torch.device, dtype: torch.dtype
) -> PeftModel:
    from peft import PeftModel

    base = _pretrained_model(_base_of(section, source), device, dtype)
    with _reading(f"model.path={section.path}", "adapter"):
        adapted = PeftModel.from_pretrained(
            base, source.path, is_trainable=True, **source.loading_arguments
        )
    adapted.peft_config[adapted.active_adapter].base_model_name_or_path = base.name_or_path
    return adapted


def _on_meta(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _placement(section: ModelSection, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments that put the weights straight onto the device in their final precision."""
    on_device = {} if device.type == "cpu" else {"device_map": {"": device}}
    kernel = section.attn_implementation
    return {"dtype": dtype, **on_device, **({"attn_implementation": kernel} if kernel else {})}


def _quantisation(
    section: ModelSection, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Arguments for weights in 4 bits, as QLoRA has them: NF4, its constants quantised too."""
    if not section.load_in_4bit:
        return {}
    if device.type != "cuda":
        raise ConfigError("model.load_in_4bit=true: needs a CUDA GPU, and this run has none")
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            "model.load_in_4bit=true: needs bitsandbytes, `pip install 'ppo_lab[quantization]'`"
        )
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": settings}


def _zero_rates(owner: Any) -> None:
    """Set the numeric attributes whose names speak of dropout to 0, those of configs included."""
    for name, value in list(vars(owner).items()):
        if isinstance(value, PreTrainedConfig):
            _zero_rates(value)
        elif "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(owner, name, type(value)(0))  # some configs refuse a float for an int


def _embedding_rows(model: Any) -> int:
    return model.get_input_embeddings().weight.shape[0]


@contextmanager
def _reading(setting: str, what: str) -> Iterator[None]:
    """Turn what a damaged or foreign file raises into a sentence; a lack of memory stays itself."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except (ConfigError, torch.OutOfMemoryError):
        raise
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, ImportError) as error:
        raise ConfigError(f"{setting}: the {what} cannot be read: {_sentence(error)}") from error
    except UnpicklingError as error:
        raise ConfigError(
            f"{setting}: the {what} holds more than tensors, or is damaged; such a file could run "
            "code and is not read: convert it to safetensors"
        ) from error
    except StrictDataclassError as error:  # sizes that do not go together, or of another type
        raise ConfigError(f"{setting}: the {what} is not valid: {_sentence(error)}") from error
    except (SafetensorError, AttributeError) as error:
        raise ConfigError(f"{setting}: the {what} is damaged: {_sentence(error)}") from error


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."


def keep_quiet() -> None:
    """For a whole program: no bars but those of downloads, no warnings of libraries to
    libraries.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()
    for library in ("transformers", "peft", "trl", "accelerate", "torch"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=library)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' bars and load reports off the terminal: what matters of them is raised."""
    log = transformers.utils.logging
    verbosity, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bar:
            log.enable_progress_bar()
