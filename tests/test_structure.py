"""The rooms know of each other only what they may."""

from __future__ import annotations

import ast
import builtins
import subprocess
import sys
from pathlib import Path

import pytest

import ppo_lab

PACKAGE = Path(ppo_lab.__file__).parent
HYDRA = {"hydra", "omegaconf"}
MAY_IMPORT_HYDRA = {"__main__", "config", "command_line", "command_reader", "folders", "help"}
MAY_IMPORT_HYDRA |= {"multirun", "stages", "sft", "reward_model"}
FORBIDDEN_NAMES = {"utils", "helpers", "common", "base"}


def imports(file: Path) -> set[str]:
    """Every module that a file imports anywhere in it, as dotted names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules() -> list[Path]:
    return [f for f in sorted(PACKAGE.rglob("*.py")) if "conf" not in f.parts]


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("name", ["core", "kl", "types"])
def test_the_mathematics_imports_nothing_of_ours_but_types(name: str) -> None:
    ours = {m for m in imports(PACKAGE / f"{name}.py") if m.startswith("ppo_lab")}
    assert {m for m in ours if not m.startswith("ppo_lab.types")} == set()


def test_only_its_mirror_imports_wandb() -> None:
    guilty = {room(f) for f in modules() if any(m.split(".")[0] == "wandb" for m in imports(f))}
    # Reading finished runs back, and saved views, are W&B's other side.
    assert guilty <= {"wandb_mirror", "compare", "dashboard"}


def test_only_entries_import_hydra() -> None:
    guilty = {room(f) for f in modules() if any(m.split(".")[0] in HYDRA for m in imports(f))}
    assert guilty - MAY_IMPORT_HYDRA == set()


def test_only_the_processes_import_accelerate_and_torch_distributed() -> None:
    spoken = ("accelerate", "torch.distributed", "deepspeed")
    guilty = {
        room(f)
        for f in modules()
        if any(m == name or m.startswith(f"{name}.") for m in imports(f) for name in spoken)
    }
    assert guilty == {"processes"}


def test_a_run_of_one_process_loads_nothing_of_several() -> None:
    code = (
        "import sys, ppo_lab.experiment; from ppo_lab.processes.alone import joined;"
        "joined(device='cpu', timeout=1).__enter__();"
        "print([m for m in sys.modules if m.startswith('ppo_lab.processes')])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = ("", ".alone", ".launch")
    assert sorted(eval(said.stdout)) == [f"ppo_lab.processes{name}" for name in names]


def test_only_one_module_imports_trl() -> None:
    guilty = {f.stem for f in modules() if any(m.split(".")[0] == "trl" for m in imports(f))}
    # The benchmark's workers run older TRLs, each in an environment of its own.
    assert {name for name in guilty if not name.endswith("_worker")} == {"trl_parts"}


def test_only_the_experiment_and_the_entries_know_the_trainer_and_the_trackers() -> None:
    trackers = {"ppo_lab.tracking", "ppo_lab.wandb_mirror"}
    seen = {f: imports(f) for f in modules()}
    knowing = {room(f) for f in seen if "ppo_lab.trainer" in seen[f] and trackers & seen[f]}
    # The classic verbs name the trainer in their annotations.
    assert knowing <= {"experiment", "__main__", "classic"}


def names(file: Path) -> tuple[set[str], set[str]]:
    """The names that a file reads, and those that it defines or imports anywhere."""
    read, defined = set(), {*dir(builtins), "__file__"}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else defined).add(node.id)
        elif isinstance(node, ast.alias):
            defined.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            defined.add(node.name)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            defined.add(node.name)
    return read, defined


def test_no_name_is_read_that_is_not_defined() -> None:
    """Linter and types do not look, since they take jaxtyping's shapes for names."""
    tests = sorted(Path(__file__).parent.rglob("*.py"))
    found = {file: names(file) for file in [*modules(), *tests]}
    assert {f: read - defined for f, (read, defined) in found.items() if read - defined} == {}


def test_no_module_is_a_drawer_for_odds_and_ends() -> None:
    assert {f.stem for f in modules()} & FORBIDDEN_NAMES == set()


def test_asking_for_the_schema_loads_no_heavy_library() -> None:
    code = (
        "import sys, ppo_lab, ppo_lab.config, ppo_lab.rules;"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'wandb'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
