"""What every test may ask for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# What a shell may hold and a test must not read: a tracker's settings, the job or the launcher that
# it runs in, how wide and of which kind its terminal is.
FOREIGN = ("WANDB_", "SLURM_", "TORCHELASTIC_", "ACCELERATE_", "HYDRA_", "PPO_LAB_GPUS", "MASTER_")
OWN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "COLUMNS", "LINES", "CI", "NO_COLOR", "FORCE_COLOR")
for name in list(os.environ):
    if name in OWN or (name.startswith(FOREIGN) and name != "WANDB_MODE"):
        del os.environ[name]
os.environ["TERM"] = "xterm"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Operations on tiny models are too small to share: a second thread only waits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from all tests but those that ask for one: numbers are compared to the last bit,
    and tests run side by side.
    """
    chosen = config.getoption("markexpr", "")
    if "gpu" not in chosen or "not gpu" in chosen:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real small models and data beside the checkout; the test is skipped where
    there is none.
    """
    folder = Path(os.environ.get("PPO_LAB_ASSETS", SHARED / "assets"))
    if not folder.is_dir():
        pytest.skip(f"needs the real small models and data at {folder}")
    return folder
