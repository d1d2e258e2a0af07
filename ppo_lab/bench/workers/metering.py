"""Wall and CPU seconds by phase, and peak memory: what every worker of the benchmark reports.

The workers are scripts that run in other environments, where this package is not installed; they
find this module beside them.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

STEPS: list[None] = []
"""An entry for every step that any optimizer of this process took."""

PACKAGES = ("ppo_lab", "torch", "transformers", "trl", "peft", "accelerate")


class Meter:
    """Wall and CPU seconds by phase; a phase lasts until the next is switched to."""

    def __init__(self) -> None:
        self.phases: dict[str, dict[str, float]] = {}
        self._name = ""
        self._since = (0.0, 0.0)

    def switch(self, name: str = "") -> None:
        """End the phase that runs, and start `name`; with no name, stop."""
        _finish_device_work()
        now = (time.perf_counter(), time.process_time())
        if self._name:
            spent = self.phases.setdefault(self._name, {"wall_s": 0.0, "cpu_s": 0.0})
            spent["wall_s"] += now[0] - self._since[0]
            spent["cpu_s"] += now[1] - self._since[1]
        self._name, self._since = name, now

    @property
    def running(self) -> str:
        """The phase that runs now."""
        return self._name


def asked() -> dict[str, Any]:
    """The work to do, as the benchmark passes it on the command line; from here on optimizer steps
    are counted.
    """
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(lambda *_: STEPS.append(None))
    return json.loads(sys.argv[1])


def report(iterations: list[Meter], **more: Any) -> None:
    """Print the phases of every measured iteration, the optimizer steps taken in all, peak memory
    and versions, as the last line.
    """
    result = {
        "iterations": [meter.phases for meter in iterations],
        "optimizer_steps": len(STEPS),
        "peak_gb": peak_gb(),
        "versions": versions(),
        **more,
    }
    print(json.dumps(result), flush=True)


def peak_gb() -> float:
    """The process's largest resident set so far (VmHWM), or CUDA's own figure; in 1e9 bytes."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used * (1 if sys.platform == "darwin" else 1024) / 1e9


def versions() -> dict[str, str]:
    """The versions of what this environment has of the packages that matter."""
    found = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def random_model(spec: dict[str, Any]) -> Any:
    """The language model of this shape, its random weights made in their final precision."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(spec["seed"])
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, spec["dtype"]))
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(model_config(spec))
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    return model


def model_config(spec: dict[str, Any], **changed: Any) -> Any:
    """The architecture's configuration, without dropout."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**{**spec["model"], **changed}, pad_token_id=0)


def lora(spec: dict[str, Any]) -> Any:
    """PEFT's settings for the adapter; GPT-2's layers hold transposed weights."""
    from peft import LoraConfig

    transposed = spec["model"]["model_type"] == "gpt2"
    return LoraConfig(
        task_type="CAUSAL_LM", lora_dropout=0.0, fan_in_fan_out=transposed, **spec["lora"]
    )


def tokenizer(spec: dict[str, Any]) -> Any:
    """A tokenizer that pads, and whose end-of-sequence token no model can sample."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<unk>": 1, "<eos>": spec["model"]["vocab_size"]}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",  # noqa: S106
        eos_token="<eos>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        padding_side="left",
    )


def _finish_device_work() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
