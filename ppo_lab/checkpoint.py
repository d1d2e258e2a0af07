"""Checkpoints: a run's state on disk, there whole or not at all.

A checkpoint is a folder `step-000010` with the tensors as safetensors, everything else as JSON,
and a manifest of sizes and SHA-256 sums. It is written beside its place, flushed to the disk and
renamed; whatever is not what its manifest says is torn, and is never read. Reading runs no code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ppo_lab.errors import ConfigError
from ppo_lab.on_disk import put_in_place
from ppo_lab.record import Say, to_stderr

FORMAT = 1
FOLDER = "checkpoints"
TENSORS, NUMBERS, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
NAME = re.compile(r"step-(\d{6,})")
CHUNK = 1 << 20


class TornCheckpointError(ConfigError):
    """A checkpoint that is not whole: a piece is missing, cut short or changed."""


def save(
    run: Path,
    state: dict[str, Any],
    *,
    step: int,
    save_model: Callable[[str], object] | None = None,
) -> Path:
    """Write the state after iteration `step` into the run's folder; the checkpoint's folder.

    `state` is made of dictionaries, lists, tuples, numbers, texts and tensors.
    `save_model` may write the model, to be used by itself, into a folder that it is given.

    Raises:
        OSError: the disk refuses; what was there before is still there.
    """
    place = _safe(run, run / FOLDER / f"step-{step:06}")
    try:
        with put_in_place(place) as beside:
            _write(beside, state)
            if save_model is not None:
                save_model(str(beside / "model"))
            _seal(beside)
        _flush(place.parent)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    return place


def read(folder: Path) -> dict[str, Any]:
    """The state that a checkpoint holds, tensors on the CPU.

    Raises:
        TornCheckpointError: it is not whole.
    """
    if reason := damage(folder):
        raise TornCheckpointError(f"{folder}: {reason}")
    tensors = load_file(folder / TENSORS)
    return _unpacked(json.loads((folder / NUMBERS).read_text()), tensors)


def latest(run: Path, say: Say = to_stderr) -> Path | None:
    """The newest whole checkpoint of a run, None where there is none at all; torn ones are said.

    Raises:
        TornCheckpointError: there are checkpoints and none is whole.
        ConfigError: the checkpoints lie outside of the run's folder.
    """
    reasons = []
    for step, folder in sorted(all_in(run), reverse=True):
        reason = damage(folder)
        if not reason:
            return folder
        reasons.append(f"{folder}: {reason}")
        say(f"checkpoint of iteration {step} is torn and passed over ({reason})")
    if reasons:
        raise TornCheckpointError(
            [*reasons, f"no whole checkpoint is left; remove {run / FOLDER} to start anew"]
        )
    return None


def has(run: Path, step: int) -> bool:
    """Whether there is a whole checkpoint of this iteration."""
    return any(there == step and not damage(folder) for there, folder in all_in(run))


def all_in(run: Path) -> list[tuple[int, Path]]:
    """(iteration, folder) of every checkpoint of a run, whole or torn.

    Raises:
        ConfigError: one is a link, and so leads out of the run's folder.
    """
    folder = _safe(run, run / FOLDER)
    named = [entry for entry in folder.glob("step-*") if NAME.fullmatch(entry.name)]
    return [(step_of(entry), _safe(run, entry)) for entry in named]


def newest_step(run: Path) -> int:
    """The iteration of a run's newest checkpoint, 0 where there is none."""
    return max((step for step, _ in all_in(run)), default=0)


def step_of(folder: Path) -> int:
    """The iteration after which a checkpoint was written."""
    found = NAME.fullmatch(folder.name)
    if not found:
        raise ConfigError(f"{folder}: is no checkpoint; they are called step-000010 and the like")
    return int(found[1])


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint, in words; empty if it is whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        entries, version = dict(manifest["files"]), manifest["format"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {MANIFEST} is missing or cannot be read"
    if version != FORMAT:
        return f"its format is {version}, this version reads {FORMAT}"
    if missing := {TENSORS, NUMBERS} - set(entries):
        return f"{', '.join(sorted(missing))} is missing"
    return next((f"{name} {said}" for name, said in _wrong(folder, entries)), "")


def prune(run: Path, *, keep: int, best: int | None = None) -> None:
    """Remove all but the newest `keep` checkpoints and the best one; and what a kill left."""
    found = sorted(all_in(run))
    for step, folder in found[:-keep]:
        if step != best:
            shutil.rmtree(folder, ignore_errors=True)
    for unfinished in (run / FOLDER).glob(".step-*"):
        shutil.rmtree(unfinished, ignore_errors=True)


def set_aside_later(run: Path, step: int) -> None:
    """Rename the checkpoints after iteration `step`: a run that goes on there makes its own.

    Torn ones are of no use to anybody and go.
    """
    for later, folder in all_in(run):
        if later > step:
            old = folder.with_name(f"{folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            if damage(folder):
                shutil.rmtree(folder)
            else:
                folder.rename(old)


def _write(folder: Path, state: dict[str, Any]) -> None:
    tensors: dict[str, Tensor] = {}
    numbers = json.dumps(_packed(state, "", tensors))
    save_file(_apart(tensors), folder / TENSORS)
    (folder / NUMBERS).write_text(numbers)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, each with memory of its own: safetensors refuses what several share, such as
    8-bit Adam's tables.
    """
    found, taken = {}, set()
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.untyped_storage().data_ptr())
        found[name] = (tensor.clone() if place in taken else tensor).detach().contiguous()
        taken.add(place)
    return found


def _seal(folder: Path) -> None:
    """Write the manifest, and see everything onto the disk."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        files[path.relative_to(folder).as_posix()] = {
            "bytes": path.stat().st_size,
            "sha256": _digest(path),
        }
        _flush(path)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))
    _flush(manifest)
    for inner in [*(p for p in folder.rglob("*") if p.is_dir()), folder]:
        _flush(inner)


def _wrong(folder: Path, entries: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each file of a manifest that is not what it should be."""
    for name, entry in entries.items():
        path = folder / name
        if _leads_out(folder, path):
            yield name, "leads out of the checkpoint"
        elif not path.is_file():
            yield name, "is missing"
        elif path.stat().st_size != entry.get("bytes"):
            yield name, f"has {path.stat().st_size} bytes in place of {entry.get('bytes')}"
        elif _digest(path) != entry.get("sha256"):
            yield name, "was changed: its SHA-256 sum is another"


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()


def _flush(path: Path) -> None:
    """See a file or folder onto the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _safe(run: Path, path: Path) -> Path:
    """The path, which no link takes out of the run's folder."""
    if _leads_out(run, path):
        raise ConfigError(f"{path}: leads out of the run's folder {run}; links are not followed")
    return path


def _leads_out(folder: Path, path: Path) -> bool:
    """Whether a path, `..` and links resolved, is another than it seems to be."""
    with suppress(ValueError):
        return path.resolve() != folder.resolve() / path.relative_to(folder)
    return True


def _packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON can hold it, its tensors put into `tensors` under dotted names."""
    if isinstance(value, Tensor):
        while name in tensors:  # keys may hold dots, and 0 and "0" read alike
            name += "_"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        pairs = [[k, _packed(v, f"{name}.{k}".lstrip("."), tensors)] for k, v in value.items()]
        return {"pairs": pairs}
    if isinstance(value, list | tuple):
        items = [_packed(v, f"{name}.{i}".lstrip("."), tensors) for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    return value


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "tensor":
        return tensors[held]
    if kind == "tuple":
        return tuple(_unpacked(item, tensors) for item in held)
    return {key: _unpacked(item, tensors) for key, item in held}
