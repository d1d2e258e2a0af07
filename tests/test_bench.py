"""The benchmark's arithmetic, and its gate."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from ppo_lab.bench import command, command_lines, equality, growth, options, report, venvs
from ppo_lab.bench.command import parser
from ppo_lab.bench.floor import Floor, Rates, floor
from ppo_lab.bench.runs import WORKERS, Contestant, Result, medians, optimizer_steps, pairwise, run
from ppo_lab.bench.shapes import ARCHITECTURES, SHAPES, Shape
from ppo_lab.bench.venvs import REQUIREMENTS
from ppo_lab.bench.workers import metering
from ppo_lab.models import policy
from ppo_lab.models.fast import products
from ppo_lab.models.fast.attention import KeysAndValues
from ppo_lab.models.fast.gemm import computed_in
from ppo_lab.models.reference import Reference

WORK = Shape("hand", 10, 1, 1, 100, batch=2, mini_batch=1, epochs=3, new_tokens=4)


def result(name: str, turn: int, seconds: float, peak: float) -> Result:
    phases = {"generate": seconds, "score": 0.0, "update": 1.0}
    return Result(name, turn, phases, {k: 2 * v for k, v in phases.items()}, peak, {"torch": "2"})


def test_the_floor_counts_what_its_equations_say() -> None:
    lengths = list(map(len, WORK.prompts(0)))
    trunk, head, width = 2 * 12 * 100, 2 * 100 * 10, 10
    seen = [n + 3 for n in lengths]  # four new tokens, the last of which predicts nothing
    attention = 4 * width * sum(n * (n + 1) // 2 for n in seen)
    one_pass = trunk * sum(seen) + attention + head * 8
    prefill = trunk * sum(lengths) + 4 * width * sum(n * (n + 1) // 2 for n in lengths) + head * 2
    least = floor(WORK, "fp32", Rates(flops=1.0, bytes=1e9), seed=0)
    assert least.score == one_pass
    backward = trunk * sum(seen) + 2 * attention + head * 8
    assert least.update == 3 * (one_pass + backward)
    assert least.generate == one_pass
    reading = floor(WORK, "bf16", Rates(flops=1e18, bytes=1.0), seed=0)
    assert reading.generate == pytest.approx(3 * (1200 + 1000) * 2)
    assert prefill < least.generate


def test_prompts_have_the_longest_and_the_shortest_and_are_the_same_every_time() -> None:
    lengths = [len(ids) for ids in SHAPES["560m"].prompts(0)]
    assert (max(lengths), min(lengths), len(lengths)) == (32, 16, 16)
    assert SHAPES["560m"].prompts(0) == SHAPES["560m"].prompts(0) != SHAPES["560m"].prompts(1)


def test_ratios_are_of_the_pairs_of_one_round() -> None:
    results = [result("ppo_lab fp32", 0, 1, 2), result("trl112 fp32", 0, 9, 8)]
    results += [result("ppo_lab fp32", 1, 3, 2), result("trl112 fp32", 1, 7, 8)]
    assert pairwise(results, "ppo_lab fp32", "trl112 fp32", lambda r: r.wall_s) == [5.0, 2.0]
    assert medians(results, "trl112 fp32")["wall_s"] == 9.0


def test_the_record_holds_every_ratio_and_shows_as_tables() -> None:
    results = [
        result("trl0114 fp32", 0, 9, 8),
        result("ppo_lab fp32", 0, 1, 2),
        result("trl0114 bf16", 0, 5, 8),
        result("ppo_lab bf16", 0, 0.5, 1),
    ]
    floors = {p: (Rates(1.0, 1.0), Floor(0.1, 0.1, 0.1)) for p in ("fp32", "bf16")}
    kept = json.loads(json.dumps(report.record(WORK, results, [], floors, threads=1, seed=0)))
    shown = {(r["ours"], r["theirs"], r["why"]): r["wall"]["median"] for r in kept["ratios"]}
    assert shown[("ppo_lab bf16", "trl0114 bf16", "best against best")] == 4.0
    assert shown[("ppo_lab fp32", "trl0114 fp32", "same precision")] == 5.0
    (best,) = (r for r in kept["ratios"] if r["why"] == "best against best")
    assert (best["cpu"]["median"], best["memory"]["median"]) == (4.0, 8.0)
    assert kept["medians"]["ppo_lab bf16"]["tokens_per_second"] == pytest.approx(2 * 4 / 1.5)
    assert kept["medians"]["ppo_lab bf16"]["times_the_floor"] == pytest.approx(1.5 / 0.3)
    assert {"date", "machine", "git_commit", "seed", "versions"} <= kept.keys()
    console = Console(record=True, width=200)
    report.show(kept, console)
    assert "4.00" in console.export_text()


def test_a_machine_that_was_busy_is_said() -> None:
    floors = {"fp32": (Rates(1.0, 1.0), Floor(0.1, 0.1, 0.1))}
    results = [result("trl112 fp32", 0, 9, 8), result("ppo_lab fp32", 0, 1, 2)]
    kept = report.record(WORK, results, [], floors, threads=1, seed=0)
    for share, said in ((1.0, False), (0.34, True)):
        theirs = kept["results"][0]
        theirs["cpu"] = {phase: share * seconds for phase, seconds in theirs["wall"].items()}
        kept["results"][1]["cpu"] = dict(kept["results"][1]["wall"])
        console = Console(record=True, width=200)
        report.show(kept, console)
        shown = console.export_text()
        assert ("the machine was busy: trl112 fp32 had 34% in round 1" in shown) is said


def test_rounds_that_are_over_are_kept_when_a_later_one_breaks_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken_off(rivals: list[Contestant], *args: object, **kwargs: object) -> Iterator[Result]:
        yield from (result(rival.name, 0, 2.0 + i, 1.0) for i, rival in enumerate(rivals))
        yield result(rivals[0].name, 1, 2.0, 1.0)
        raise KeyboardInterrupt

    rates = Rates(1.0, 1.0)
    monkeypatch.setattr("ppo_lab.bench.runs.interleaved", broken_off)
    monkeypatch.setattr(
        "ppo_lab.bench.equality.gate", lambda *args: equality.Gate("fp32", 1.0, {"values": 0.0})
    )
    monkeypatch.setattr(command, "floors", lambda asked: {"fp32": (rates, Floor(0.1, 0.1, 0.1))})
    monkeypatch.setattr("ppo_lab.bench.venvs.python_of", lambda name, *_, **__: Path(name))
    asked = command.parser().parse_args(
        ["--vs", "trl112", "--precision", "fp32", "--json", str(tmp_path / "kept.json")]
    )
    console = Console(record=True, width=200, quiet=False, file=io.StringIO())
    with pytest.raises(KeyboardInterrupt):
        command.bench(asked, console)
    assert "theirs / ours" in console.export_text()
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert {r["contestant"] for r in kept["results"]} == {"ppo_lab fp32", "trl112 fp32"}
    assert [ratio["wall"]["median"] for ratio in kept["ratios"]]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        *(([f"--{name}", n], "from 1 on") for name in ("rounds", "threads") for n in ("0", "1.5")),
        (["--seed", "-1"], "from 0 to 4294967295"),
        (["--precision", "none"], "at least one of fp32, bf16"),
        (["--precision", ""], "at least one of fp32, bf16"),
        (["--json", "/proc/nowhere/kept.json"], "cannot be written"),
        (["--json", "/"], "is a folder"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_runs(
    wrong: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(wrong)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("benchmark", ["growth", "options"])
def test_the_other_benchmarks_refuse_alike(
    benchmark: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong in (["--threads", "0"], ["--rounds", "0"], ["--json", "/proc/nowhere/kept.json"]):
        with pytest.raises(SystemExit):
            command.main([benchmark, *wrong])
        assert f"argument {wrong[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("benchmark", ["growth", "options", "features", "learning"])
def test_a_command_line_is_read_before_torch_is_imported(benchmark: str) -> None:
    asked = (
        "import sys\n"
        "from ppo_lab.bench.command import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    for words in (["--help"], ["--nope"]):
        found = subprocess.run(
            [sys.executable, "-c", asked, benchmark, *words], capture_output=True, text=True
        )
        assert found.stdout.splitlines()[-1:] == ["False"], found.stdout + found.stderr
        assert f"ppo_lab.bench {benchmark}" in found.stdout + found.stderr


def test_an_option_that_needs_what_is_not_here_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(options.options(SHAPES["small"])) == set(command_lines.OPTIONS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["options", "--only", "cuda_graphs"]) == 1
    assert "cuda_graphs needs a GPU" in capsys.readouterr().out
    assert "cuda_graphs" not in options.chosen([])
    assert "fast road" in options.chosen([])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "cuda_graphs" in options.chosen([])


def test_a_read_only_file_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "kept.json"
    kept.write_text("{}")
    kept.chmod(0o444)
    with pytest.raises(SystemExit):
        command.main(["--json", str(kept)])
    assert "read-only" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["kept.json"]


def test_precisions_named_twice_are_measured_once() -> None:
    assert parser().parse_args(["--precision", "bf16,fp32,bf16"]).precision == ["bf16", "fp32"]


def test_growth_keeps_each_measurement_with_when_and_by_what_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def broken_off(asked: argparse.Namespace, grow: Any) -> dict[str, Any]:
        if seen:
            raise KeyboardInterrupt
        seen.append(grow)
        return {"seconds": {"1": 1.0}, "exponent": 1.0}

    monkeypatch.setattr(growth, "times", broken_off)
    monkeypatch.setattr(growth, "loss_memory", lambda vocabulary, kind: 1.0)
    monkeypatch.setattr(growth, "loss_time", lambda kind: 1.0)
    with pytest.raises(KeyboardInterrupt):
        command.main(["growth", "--json", str(tmp_path / "kept.json")])
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert list(kept["time"]) == ["batch"]
    assert kept["loss_time"] == dict.fromkeys(growth.KINDS, 1.0)
    assert {"date", "machine", "versions", "git_commit"} <= kept.keys()


def test_the_gate_passes_and_fails() -> None:
    assert equality.Gate("fp32", 1e-5, {"values": 1e-6}).passed
    assert not equality.Gate("fp32", 1e-5, {"values": 1e-4}).passed


@pytest.fixture
def few_words(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The gate on a vocabulary that takes it no time."""
    monkeypatch.setattr(equality, "VOCABULARIES", (97,))
    return monkeypatch


def unscaled_adapters(patch: pytest.MonkeyPatch) -> None:
    made = products._adapted
    patch.setattr(products, "_adapted", lambda x, w, b, s, m: made(x, w, b, [1.0] * len(s), m))


def an_adapter_that_stays_on_under_the_reference(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Reference, "active", lambda self: nullcontext(self.trunk))


def the_adapter_of_a_generation_before(patch: pytest.MonkeyPatch) -> None:
    made, kept = KeysAndValues.__init__, {}

    def begin(self: KeysAndValues, positions: int) -> None:
        made(self, positions)
        self.linears = kept

    patch.setattr(KeysAndValues, "__init__", begin)


def log_probs_at_temperature_one(patch: pytest.MonkeyPatch) -> None:
    made = policy.token_logprobs
    patch.setattr(policy, "token_logprobs", lambda *a, **k: made(*a, **{**k, "temperature": 1.0}))


@pytest.mark.parametrize(
    ("fault", "wrong", "precisions"),
    [
        (unscaled_adapters, "log-probs of sampling", ("fp32", "bf16")),
        (an_adapter_that_stays_on_under_the_reference, "reference", ("fp32", "bf16")),
        # In float32 what is kept are the weights themselves, which are never stale.
        (the_adapter_of_a_generation_before, "log-probs of sampling", ("bf16",)),
        (log_probs_at_temperature_one, "log-probs", ("fp32", "bf16")),
    ],
)
def test_the_gate_stays_shut_on_a_fault(
    fault: Callable[[pytest.MonkeyPatch], None],
    wrong: str,
    precisions: tuple[str, ...],
    few_words: pytest.MonkeyPatch,
) -> None:
    fault(few_words)
    if (
        fault is the_adapter_of_a_generation_before
        and computed_in(torch.bfloat16) != torch.bfloat16
    ):
        pytest.skip("this processor computes bfloat16 models in float32, where it is no fault")
    for precision in precisions:
        found = equality.gate(precision)
        assert not found.passed
        assert found.errors[f"{wrong}/bloom/97"] > found.tolerance


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_gate_holds_on_few_words(
    precision: str, architecture: str, few_words: pytest.MonkeyPatch
) -> None:
    assert equality.gate(precision, architecture).passed


def test_behind_a_shut_gate_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shut = equality.Gate("fp32", 1e-5, {"values": float("nan")})
    monkeypatch.setattr("ppo_lab.bench.equality.gate", lambda *args: shut)
    monkeypatch.setattr(
        "ppo_lab.bench.runs.interleaved", lambda *args, **kwargs: pytest.fail("ran")
    )
    monkeypatch.setattr("ppo_lab.bench.venvs.python_of", lambda *_, **__: pytest.fail("ran"))
    asked = parser().parse_args(["--precision", "fp32", "--json", str(tmp_path / "kept.json")])
    console = Console(record=True, width=200, file=io.StringIO())
    assert command.bench(asked, console) == 1
    assert "equality gate fp32 FAILED" in console.export_text()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [1e-3, 1e-6])
def test_options_are_measured_behind_an_open_gate_alone(
    error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    found = equality.Gate("fp32", 1e-5, {"values": error})
    monkeypatch.setattr(options, "gate", lambda *args: found)
    ratios = {kind: [1.0] for kind in ("wall", "cpu", "memory")}
    monkeypatch.setattr(options, "measured", lambda *args: measured.append("one") or ratios)
    assert command.main(["options", "--only", "fast road"]) == (0 if found.passed else 1)
    assert len(measured) == found.passed


def test_of_two_pairs_the_middle_between_them_is_shown() -> None:
    ratios: dict[str, Any] = {"wall": [3.0, 1.0], "cpu": [1.0, 4.0, 2.0], "memory": [1.0]}
    console = Console(record=True, width=110)
    options.show({"shape": "tiny", "options": {"fast road": ratios}}, console)
    said = console.export_text()
    for text in ("2.00 (1.00-3.00)", "2.00 (1.00-4.00)", "1.00 (1.00-1.00)"):
        assert text in said


def test_a_phase_takes_wall_and_cpu_seconds_of_its_own() -> None:
    meter = metering.Meter()
    meter.switch("waits")
    time.sleep(0.2)
    meter.switch("works")
    until = time.process_time() + 0.1
    while time.process_time() < until:
        pass
    meter.switch()
    assert meter.phases["waits"]["wall_s"] > 0.15 > meter.phases["waits"]["cpu_s"] + 0.1
    assert meter.phases["works"]["cpu_s"] >= 0.1


def test_our_worker_reports_the_measured_iterations_alone() -> None:
    shape = replace(SHAPES["tiny"], warm_up=1, measured=2)
    spec = shape.spec("fp32", threads=1, seed=0)
    script = [sys.executable, str(WORKERS / "ppo_lab_worker.py"), json.dumps(spec)]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    assert [set(phases) for phases in said["iterations"]] == [{"generate", "score", "update"}] * 2
    assert said["optimizer_steps"] == optimizer_steps(spec) == 3 * 4 * 2
    assert 0 < said["peak_gb"] < 64


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_gate_holds_here(precision: str, architecture: str) -> None:
    assert equality.gate(precision, architecture).passed


def test_a_worker_that_takes_other_optimizer_steps_than_asked_for_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A trainer whose settings divide the batch otherwise is not measured on less work."""
    phases = {name: {"wall_s": 1.0, "cpu_s": 1.0} for name in ("generate", "score", "update")}
    said = {"iterations": [phases], "peak_gb": 1.0, "versions": {}}
    shape = SHAPES["tiny"]  # 8 samples, mini-batches of 4, 4 epochs, one iteration to warm up

    def answer(steps: int) -> None:
        line = json.dumps({**said, "optimizer_steps": steps})
        done = subprocess.CompletedProcess([], 0, stdout=line, stderr="")
        monkeypatch.setattr("ppo_lab.bench.runs.subprocess.run", lambda *a, **k: done)

    one = Contestant("trl112", "fp32", Path("python"))
    answer(16)
    assert run(one, shape, turn=0, threads=1, seed=0).wall_s == 3.0
    answer(4)
    with pytest.raises(RuntimeError, match="4 optimizer steps, not 16"):
        run(one, shape, turn=0, threads=1, seed=0)


def test_a_worker_that_is_killed_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], -9, stdout="", stderr="")
    monkeypatch.setattr("ppo_lab.bench.runs.subprocess.run", lambda *a, **k: done)
    one = Contestant("trl112", "fp32", Path("python"))
    with pytest.raises(RuntimeError, match=r"trl112 fp32 failed \(killed by SIGKILL, as when mem"):
        run(one, SHAPES["tiny"], turn=0, threads=1, seed=0)


def test_every_trainer_has_its_worker() -> None:
    assert {p.name.removesuffix("_worker.py") for p in Path(WORKERS).glob("*_worker.py")} == {
        *REQUIREMENTS,
        "ppo_lab",
    }


def test_an_environment_of_other_versions_is_not_compared_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor thrown away: it may take a network to make another."""
    torch_here = version("torch").partition("+")[0]
    there = dict(text.split("==") for text in REQUIREMENTS["trl112"] if "==" in text)
    monkeypatch.setattr(venvs, "_installed", lambda python: {**there, "torch": torch_here})
    monkeypatch.setattr(venvs, "_install", lambda *args: pytest.fail("made anew"))
    assert venvs.python_of("trl112", tmp_path, print) == tmp_path / "trl112/bin/python"
    monkeypatch.setattr(venvs, "_installed", lambda python: {**there, "torch": "1.0"})
    with pytest.raises(RuntimeError, match=r"trl112 has torch 1\.0, where torch 2.*remove it"):
        venvs.python_of("trl112", tmp_path, print)
    found = venvs.python_of("trl112", tmp_path, print, as_found=True)
    assert found == tmp_path / "trl112/bin/python"
    monkeypatch.setattr(venvs, "_installed", lambda python: {**there, "trl": "1.16.0"})
    with pytest.raises(RuntimeError, match=r"has trl 1\.16\.0, where trl 1\.12\.0 are"):
        venvs.python_of("trl112", tmp_path, print, as_found=True)


def test_versions_of_an_environment_are_asked_of_its_own_python(tmp_path: Path) -> None:
    assert venvs._installed(Path(sys.executable))["torch"] == version("torch").partition("+")[0]
    assert venvs._installed(tmp_path / "nowhere") == {}


def test_a_trainer_that_is_not_known_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--vs", "trl113"])
    assert "trl112" in capsys.readouterr().err
    assert parser().parse_args(["--vs", ""]).vs == []


@pytest.mark.parametrize("kind", growth.KINDS)
def test_memory_of_the_loss_does_not_grow_with_the_vocabulary(kind: str) -> None:
    less, more = growth.loss_memory(2**15, kind), growth.loss_memory(2**18, kind)
    assert 0 < more < 1.01 * less
    assert more < 4e-6 * growth.TOKENS * 2**15, "not even the smaller one's logits"
