"""What a process keeps of the memory that its passes freed, and the most that it took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import tiny

from ppo_lab import memory
from ppo_lab.experiment import run
from ppo_lab.memory import peak_resident_bytes, resident_bytes

# Four tensors of 8 MiB, made and freed eight times over; the faults of the last four times, since
# what else lies on the heap costs a tensor's pages once more in the second or the third.
FAULTS = """
import resource, sys, torch
from ppo_lab.memory import keep_freed_memory

torch.set_num_threads(1)
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
for again in range(8):
    tensors = [torch.ones(2**21) for _ in range(4)]
    del tensors
    if again == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **environment: str) -> tuple[bool, int]:
    plain = {name: v for name, v in os.environ.items() if not name.startswith("MALLOC_")}
    said = subprocess.run(
        [sys.executable, "-c", FAULTS, how],
        env=plain | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    kept, count = said.stdout.split()
    return bool(int(kept)), int(count)


def test_freed_memory_comes_again_without_faults() -> None:
    kept, few = faults("keep")
    if not kept:
        pytest.skip("the allocator is not glibc's")
    # By itself it gives back in some processes alone: not where something lies at the heap's end.
    assert any(few < faults("leave")[1] / 10 for _ in range(10))


def test_an_allocator_that_somebody_has_set_is_left_alone() -> None:
    kept, _ = faults("keep", MALLOC_TRIM_THRESHOLD_="1000000")
    assert not kept


@pytest.mark.parametrize(
    ("limit", "free"),
    [("5000000", 3_000_000 + 1_000_000), ("90000000", 8_192_000), ("max", 8_192_000)],
)
def test_what_is_free_is_the_machines_or_the_control_groups_cached_files_included(
    limit: str, free: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text("2000000\n")
    (group / "memory.stat").write_text("anon 700000\nactive_file 300000\ninactive_file 1000000\n")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    monkeypatch.setattr(memory, "Path", lambda place: tmp_path / place.lstrip("/"))
    assert memory.free_bytes() == free


def test_the_peak_of_a_run_is_not_that_of_the_run_before(tmp_path: Path) -> None:
    large = torch.ones(2**28)  # 1 GiB
    del large
    before = peak_resident_bytes()
    if not os.access("/proc/self/clear_refs", os.W_OK) or before < resident_bytes() + 2**29:
        pytest.skip("the system tells no peak, or not how to forget it")
    run(tiny(tmp_path, ppo={"steps": 1}), tmp_path / "run")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert 0 < summary["peak_memory_gb"] * 2**30 < before - 2**28
