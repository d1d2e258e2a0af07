"""A checkpoint is there whole or not at all, and reading one runs no code."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ppo_lab import checkpoint
from ppo_lab.errors import ConfigError
from ppo_lab.on_disk import put_in_place

NUMBERS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
STATES = st.recursive(
    NUMBERS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)
SMALL = {"weights": torch.arange(6.0).reshape(2, 3), "done": 3, "group": {"betas": (0.9, 0.95)}}
SHARED = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def test_a_folder_takes_its_place_whole_and_what_a_killed_process_left_is_gone(
    tmp_path: Path,
) -> None:
    place, left = tmp_path / "model", tmp_path / ".model.unfinished"
    left.mkdir()
    (left / "torn").touch()
    for name in ("first", "second"):
        with put_in_place(place) as beside:
            assert not list(beside.iterdir())
            (beside / name).touch()
            assert not (place / name).exists()
        assert [file.name for file in place.iterdir()] == [name]
    with pytest.raises(OSError, match="full"), put_in_place(place) as beside:
        (beside / "third").touch()
        raise OSError("full")
    assert [file.name for file in tmp_path.rglob("*")] == ["model", "second"]


def test_a_folder_is_removed_only_when_another_has_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, remove, seen = tmp_path / "model", shutil.rmtree, []

    def look_and_remove(folder: Path, **options: Any) -> None:
        if folder.exists():  # a kill may come from here on
            seen.append([file.name for file in place.iterdir()])
        remove(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", look_and_remove)
    for name in ("first", "second"):
        with put_in_place(place) as beside:
            (beside / name).touch()
    assert seen == [["second"]]


def test_a_folder_whose_process_was_killed_between_two_names_is_put_back(tmp_path: Path) -> None:
    place, before = tmp_path / "model", tmp_path / ".model.replaced"
    before.mkdir()
    (before / "old").touch()
    with pytest.raises(OSError, match="full"), put_in_place(place):
        raise OSError("full")
    assert [file.name for file in tmp_path.rglob("*")] == ["model", "old"]


@SHARED
@given(STATES)
def test_whatever_goes_in_comes_out(tmp_path: Path, value: Any) -> None:
    folder = checkpoint.save(tmp_path, {"value": value}, step=1)
    assert checkpoint.read(folder) == {"value": value}


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.0),
        torch.arange(4).bool(),
        torch.randn(3, 4).T,
        torch.randn(5).bfloat16(),
        torch.empty(0),
        torch.tensor([float("nan"), float("inf")]),
        torch.get_rng_state(),
    ],
)
def test_tensors_come_out_to_the_bit(tmp_path: Path, tensor: torch.Tensor) -> None:
    folder = checkpoint.save(tmp_path, {"a": [{"b": (tensor,)}]}, step=1)
    found = checkpoint.read(folder)["a"][0]["b"][0]
    assert found.dtype == tensor.dtype
    torch.testing.assert_close(found, tensor, rtol=0, atol=0, equal_nan=True)


def test_tensors_that_share_memory_come_out_each_by_itself(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    state = {"a": whole, "b": whole, "c": whole[2:], "d": whole.view(2, 3).T}
    found = checkpoint.read(checkpoint.save(tmp_path, state, step=1))
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_keys_that_read_alike_keep_their_tensors(tmp_path: Path) -> None:
    one, two, three = torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)
    state = {"a.b": one, "a": {"b": two}, "a_": three, "of": {0: one, "0": two, "0_": three}}
    found = checkpoint.read(checkpoint.save(tmp_path, state, step=1))
    assert found == state


def test_infinities_and_the_last_bit_of_a_float_come_out(tmp_path: Path) -> None:
    state = {"x": [float("inf"), 0.1 + 0.2, 5e-324]}
    assert checkpoint.read(checkpoint.save(tmp_path, state, step=1)) == state


@SHARED
@given(st.data())
def test_any_changed_byte_is_noticed(tmp_path: Path, data: Any) -> None:
    folder = checkpoint.save(tmp_path, SMALL, step=1)
    file = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if file.name == checkpoint.MANIFEST and chr(content[place]).isspace():
        return  # spaces between the words of JSON mean nothing
    content[place] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    assert checkpoint.damage(folder)
    with pytest.raises(checkpoint.TornCheckpointError):
        checkpoint.read(folder)


@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.NUMBERS, checkpoint.MANIFEST])
@pytest.mark.parametrize("fault", ["missing", "empty", "short"])
def test_a_torn_file_is_noticed(tmp_path: Path, name: str, fault: str) -> None:
    file = checkpoint.save(tmp_path, SMALL, step=1) / name
    content = file.read_bytes()
    file.unlink()
    if fault != "missing":
        file.write_bytes(content[: len(content) // 2 if fault == "short" else 0])
    assert name in checkpoint.damage(file.parent)


def test_a_file_behind_a_link_is_not_read(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, SMALL, step=1)
    outside = tmp_path / "outside"
    (folder / checkpoint.NUMBERS).rename(outside)
    (folder / checkpoint.NUMBERS).symlink_to(outside)
    assert "leads out of the checkpoint" in checkpoint.damage(folder)


@pytest.mark.parametrize("name", ["../../secret", "/etc/hostname"])
def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    folder = checkpoint.save(tmp_path, SMALL, step=1)
    (tmp_path / "secret").write_text("")
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    manifest["files"][name] = {"bytes": 0, "sha256": ""}
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    assert "leads out" in checkpoint.damage(folder)


def test_a_checkpoint_that_is_a_link_is_refused(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, SMALL, step=1)
    folder.rename(tmp_path / "outside")
    folder.symlink_to(tmp_path / "outside")
    with pytest.raises(ConfigError, match="links are not followed"):
        checkpoint.latest(tmp_path)


def test_the_newest_whole_one_is_taken(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        checkpoint.save(tmp_path, {"step": step}, step=step)
    (tmp_path / "checkpoints/step-000100" / checkpoint.MANIFEST).unlink()
    said: list[str] = []
    found = checkpoint.latest(tmp_path, said.append)
    assert found is not None
    assert checkpoint.read(found) == {"step": 10}
    assert len(said) == 1
    assert "iteration 100 is torn" in said[0]


def test_a_run_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None


def test_the_newest_few_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in range(1, 8):
        checkpoint.save(tmp_path, SMALL, step=step)
    (tmp_path / "checkpoints/.step-000008.123").mkdir()
    checkpoint.prune(tmp_path, keep=2, best=3)
    left = sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-000003", "step-000006", "step-000007"]


def test_a_full_disk_leaves_what_was_there_and_nothing_half(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, SMALL, step=1)
    big = {"weights": torch.zeros(100_000)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError):
            checkpoint.save(tmp_path, big, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def test_a_process_killed_while_it_writes_leaves_no_checkpoint_half(tmp_path: Path) -> None:
    code = """
        import os, signal, sys
        import torch
        from pathlib import Path
        from ppo_lab import checkpoint
        def die(folder): os.kill(os.getpid(), signal.SIGKILL)
        run = Path(sys.argv[1])
        checkpoint.save(run, {"step": 1}, step=1)
        checkpoint.save(run, {"step": 2}, step=2, save_model=die)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
    )
    assert done.returncode == -9
    left = checkpoint.latest(tmp_path)
    assert left is not None
    assert checkpoint.read(left) == {"step": 1}
    checkpoint.prune(tmp_path, keep=1)
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def test_no_code_of_a_checkpoint_is_run(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, SMALL, step=1)
    held = {file.name for file in folder.iterdir()}
    assert held == {checkpoint.TENSORS, checkpoint.NUMBERS, checkpoint.MANIFEST}
    source = Path(checkpoint.__file__).read_text()
    assert "pickle" not in source
    assert "torch.load" not in source
