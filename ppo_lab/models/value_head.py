"""The value head, and the files in which it travels: ours and those of TRL's classic
`save_pretrained`.
"""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ppo_lab.local_model import VALUE_HEAD_FILE

_PREFIX = "v_head."
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WHOLE = ("model.safetensors", "pytorch_model.bin")


class ValueHead(nn.Module):
    """A linear map in float32 from the hidden state that predicts a token to the value of that
    state.

    `init` "normal" draws weights from N(0, std^2), std 1 / sqrt(hidden_size + 1) when given as 0;
    "zero" starts at 0.

    Source: Ziegler et al. 2019's released code for the default scale; parameter names are TRL's.
    """

    def __init__(self, hidden_size: int, *, init: str = "normal", std: float = 0.0) -> None:
        super().__init__()
        self.summary = nn.Linear(hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.summary.bias)
        if init == "zero":
            nn.init.zeros_(self.summary.weight)
        else:
            nn.init.normal_(self.summary.weight, std=std or 1.0 / math.sqrt(hidden_size + 1))

    def forward(self, hidden: Float[Tensor, "... hidden"]) -> Float[Tensor, ...]:
        """The values, in float32 whatever the trunk's dtype."""
        return self.summary(hidden.to(self.summary.weight.dtype)).squeeze(-1)


def save_value_head(weights: dict[str, Tensor], folder: Path) -> None:
    """Write a head's weights beside a saved model, as safetensors."""
    save_file(
        {_PREFIX + k: v.detach().cpu().contiguous() for k, v in weights.items()},
        folder / VALUE_HEAD_FILE,
    )


def model_folder(source: Any, **asked: Any) -> Path | None:
    """The folder with a model's files: itself, or the hub's in the cache, which then has the value
    head that lies beside the model there; None of what is neither.

    `asked` is what the hub was asked for the model by: `revision`, `token`, `cache_dir`,
    `local_files_only`.
    """
    if not isinstance(source, (str, Path)):
        return None
    if (path := Path(source).expanduser()).is_dir():
        return path
    from transformers.utils import cached_file

    whatever = ("gated_repo", "missing_entries", "connection_errors")
    calmly = {f"_raise_exceptions_for_{what}": False for what in whatever}
    for file in (VALUE_HEAD_FILE, *_INDICES, *_WHOLE):
        try:
            found = cached_file(str(source), file, **asked, **calmly)
        except OSError:
            found = None
        if found:
            return Path(found).parent
        asked["local_files_only"] = True  # what the model was made of is there already
    return None


def find_value_head(folder: Path) -> dict[str, Tensor] | None:
    """The value head's weights in a saved folder, None where there is none.

    Looks in our own file, then where TRL 0.11 put it: among the model's weights (safetensors, or a
    .bin that is read with `weights_only=True`), sharded or not.
    """
    for names in ([VALUE_HEAD_FILE], _shards(folder), *([name] for name in _WHOLE)):
        found: dict[str, Tensor] = {}
        for name in names:  # a shard may end between weight and bias
            found |= _read_prefixed(folder / name) if (folder / name).is_file() else {}
        if found:
            return found
    return None


def _shards(folder: Path) -> list[str]:
    for index in _INDICES:
        if (folder / index).is_file():
            weight_map: dict[str, str] = json.loads((folder / index).read_text())["weight_map"]
            return sorted({file for key, file in weight_map.items() if key.startswith(_PREFIX)})
    return []


def _read_prefixed(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".bin":
        # Of files in torch's format of today only what is asked for is read.
        lazily = zipfile.is_zipfile(file)
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=lazily)
        return {
            k.removeprefix(_PREFIX): v.float() for k, v in weights.items() if k.startswith(_PREFIX)
        }
    with safe_open(file, framework="pt") as f:
        return {
            k.removeprefix(_PREFIX): f.get_tensor(k).float()
            for k in f.keys()  # noqa: SIM118, a file is no mapping
            if k.startswith(_PREFIX)
        }
