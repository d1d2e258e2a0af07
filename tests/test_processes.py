"""One run on several processes: the experiment stays what it is on one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import several
import torch
from safetensors import safe_open
from tiny_models import policy, ragged, trainer
from torch import nn
from torch.testing import assert_close

from ppo_lab.command_line import command_problems
from ppo_lab.config import conf_folder, register_schema
from ppo_lab.processes import launch
from ppo_lab.processes.alone import Alone, Whole
from ppo_lab.processes.relaunch import count_in
from ppo_lab.rules import problems
from ppo_lab.types import Batch, Forward, Tokens

TWO = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


class Nth(Alone):
    """A process with a number, that says nothing."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [0, 1, 7, 16])
def test_every_sample_is_in_one_share_and_shares_differ_by_one_at_most(n: int, size: int) -> None:
    shares = [list(range(n))[Nth(rank, size).share(n)] for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_joined_records_are_padded_queries_on_the_left_and_responses_on_the_right() -> None:
    one = Tokens.pack([[5]], [[7, 8, 9]], pad_id=0)
    other = Tokens.pack([[1, 2, 3], [4]], [[6], [10, 11]], pad_id=0)
    whole = Tokens.pack([[5], [1, 2, 3], [4]], [[7, 8, 9], [6], [10, 11]], pad_id=0)
    joined = Tokens.join([one, other])
    for name in ("queries", "query_mask", "responses", "mask", "lengths", "ended"):
        assert torch.equal(getattr(joined, name), getattr(whole, name)), name
    numbers = Forward(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 2))
    assert Forward.join([numbers, numbers]).entropy.shape == (2, 2)


@pytest.mark.parametrize("kind", ["bloom", "gpt2", "llama"])
@pytest.mark.parametrize("vocab_size", [64, 70_000])
def test_a_pass_without_samples_reaches_every_weight_and_moves_none(
    kind: str, vocab_size: int
) -> None:
    """What a process without a share computes, so that the others need not wait in vain."""
    model = policy(kind, lora=True, vocab_size=vocab_size).train()
    tokens = ragged()
    zeros = torch.zeros(tokens.mask.shape)
    blank = Batch(tokens, zeros, zeros, zeros, zeros).blank()
    found = model.score(blank.tokens, temperature=1.0)
    (found.logprobs.sum() + found.values.sum()).backward()
    for parameter in (p for p in model.parameters() if p.requires_grad):
        assert_close(parameter.grad, torch.zeros_like(parameter))


class Partitioning(Alone):
    """A process whose models have no weights of their own once they are wrapped, as with ZeRO-3."""

    def wrap(self, models: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> Whole:
        for parameter in (p for model in models.values() for p in model.parameters()):
            parameter.data = parameter.data.new_empty(0)
        return super().wrap(models, optimizer)


def test_sizes_are_those_of_the_models_before_they_are_shared_out() -> None:
    whole, partitioned = trainer(), trainer(processes=Partitioning())
    assert sum(p.numel() for p in partitioned.policy.parameters()) == 0
    assert partitioned.meter.policy == whole.meter.policy
    assert whole.meter.policy.parameters > 0


def test_the_main_process_alone_saves(tmp_path: Path) -> None:
    """C-07."""
    for rank in (1, 0):
        trainer(processes=Nth(rank, 2)).save_pretrained(str(tmp_path / f"by-{rank}"))
    assert [folder.name for folder in tmp_path.iterdir()] == ["by-0"]


def test_a_process_is_alone_unless_a_launcher_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in (*TWO, "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    assert not launch.is_launched()
    assert launch.is_main()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not launch.is_launched()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert launch.is_launched(), "a single GPU may shard to offload"


def test_every_process_but_the_main_one_leaves_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["seed=3", "hydra.run.dir=somewhere"]
    assert launch.without_a_folder(argv) == argv
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)
    assert launch.without_a_folder(argv) == [
        "seed=3",
        "hydra.run.dir=.",
        "hydra.output_subdir=null",
    ]
    assert launch.processes_here() == 2


def test_an_error_of_all_is_said_by_the_first_and_one_of_its_own_by_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)
    assert not launch.speaks(launch.shared(ValueError()))
    assert launch.speaks(ValueError())
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert launch.speaks(launch.shared(ValueError()))


def test_a_child_that_runs_by_itself_sees_no_launcher() -> None:
    own = launch.as_if_alone({**TWO, "MASTER_PORT": "1", "FSDP_VERSION": "2", "HOME": "/h"})
    assert own == {"HOME": "/h"}


def test_several_processes_refuse_a_sweep_and_a_gpu_by_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)
    register_schema()
    (said,) = command_problems(["-m", "seed=0,1"], check=problems)
    assert "launch each run by itself" in said
    (said,) = command_problems(["device=cuda:1"], check=problems)
    assert "device=cuda:1" in said
    assert "auto or cpu" in said


@pytest.mark.parametrize(
    "asked", ["ppo.ema_decay=0.9", "ppo.micro_batch_tokens=-1", "model.torch_compile=true"]
)
@pytest.mark.parametrize("kind", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_what_sharded_models_cannot_do_is_refused_before_they_are_loaded(
    asked: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_schema()
    assert not any(asked in said for said in command_problems([asked], check=problems))
    monkeypatch.setenv(kind, "true")
    assert any(asked in said for said in command_problems([asked], check=problems))


def test_accelerates_files_are_named_to_whoever_takes_them_for_options() -> None:
    register_schema()
    (said,) = command_problems(["accelerate=ddp"], check=problems)
    assert "accelerate launch --config_file" in said


@pytest.mark.parametrize("file", sorted((conf_folder() / "accelerate").glob("*.yaml")))
def test_accelerate_reads_each_of_its_files(file: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert config.num_processes > 1
    kinds = {"ddp": "MULTI_GPU", "multi_node": "MULTI_GPU", "fsdp2": "FSDP"}
    assert config.distributed_type.value == kinds.get(file.stem, "DEEPSPEED")
    assert file.read_text().startswith("# ")


def test_the_number_of_processes_is_read_from_accelerates_command() -> None:
    assert count_in(["python", "accelerate", "launch", "--num_processes", "3", "-m", "x"]) == 3
    assert count_in(["accelerate", "launch", "--cpu", "--num-processes=4"]) == 4
    assert count_in(["accelerate", "launch", "-m", "x"]) == 1


def test_two_processes_hear_the_same_and_fail_together(tmp_path: Path) -> None:
    """D-09: and a reward function is called by one of them."""
    process = several.launch(2, tmp_path, str(Path(__file__).parent / "talking.py"))
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said[-3000:]
    assert said.count("all was heard") == 1


def test_who_ends_as_the_main_process_does_waits_for_it_and_nobody_else(tmp_path: Path) -> None:
    process = several.launch(1, tmp_path, str(Path(__file__).parent / "parting.py"))
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said[-3000:]
    assert "all have parted" in said


def test_two_processes_make_the_run_that_one_makes_and_one_of_them_writes(tmp_path: Path) -> None:
    """C-07, D-03, D-04, L-02: metrics, samples and files are those of all samples, also where a
    pass leaves the policy without gradients.
    """
    words = several.tiny(tmp_path, "critic.warmup_steps=1")
    one = several.run(1, tmp_path, *words)
    two = several.run(2, tmp_path, *words)
    assert several.disagreements(one, two) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "of-1", "of-2", "prompts.jsonl"]
    assert sorted(p.name for p in two.rglob("*")) == sorted(p.name for p in one.rglob("*"))
    given = [p.name for p in (tmp_path / "model").iterdir()]
    assert given == ["config.json"], "a process has left a model in the folder where it works"


# --- slow: more models, more processes, faults


ROADS = {
    "llama-lora": ("lora=r8",),
    "llama-full": ("lora=none", "ppo.learning_rate=1e-5"),
    "bloom": ("lora=r8", "ppo.mini_batch_size=9", "ppo.micro_batch_tokens=64"),
    "gpt2": ("lora=none", "ppo.learning_rate=1e-5", "ppo.batch_size=3", "ppo.kl_penalty=full"),
    "settings": (
        *("ppo.gradient_accumulation_steps=3", "ppo.whiten_rewards=true", "ppo.target_kl=1e-4"),
        *("ppo.use_score_norm=true", "ppo.adap_kl_ctrl=true", "ppo.early_stopping=true"),
    ),
}
SHAPES = {
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 96},
}
NAMES = {"bloom": "BloomForCausalLM", "gpt2": "GPT2LMHeadModel"}


def words_of(road: str, folder: Path) -> list[str]:
    """A road's command, its model's configuration in the folder."""
    words = several.tiny(folder, *ROADS[road])
    if road in SHAPES:
        shape = {"model_type": road, "architectures": [NAMES[road]], "vocab_size": 320}
        config = {**shape, "initializer_range": 0.2, **SHAPES[road]}
        (folder / "model" / "config.json").write_text(json.dumps(config))
    return words


@pytest.mark.slow
@pytest.mark.parametrize("road", ROADS)
def test_one_two_and_four_processes_agree(tmp_path: Path, road: str) -> None:
    """D-02, D-06: also when epochs are cut short."""
    words = words_of(road, tmp_path)
    one = several.run(1, tmp_path, *words)
    for count in (2, 4):
        assert several.disagreements(one, several.run(count, tmp_path, *words)) == []


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("road", ["llama-lora", "llama-full", "bloom", "gpt2"])
def test_sharded_by_fsdp2_the_run_stays_the_same(tmp_path: Path, road: str, count: int) -> None:
    """D-07."""
    words = words_of(road, tmp_path)
    one = several.run(1, tmp_path, *words)
    other = several.run(count, tmp_path, *words, **several.FSDP2)
    assert several.disagreements(one, other) == []
    assert weights_of(other) == weights_of(one)


def weights_of(run: Path) -> set[str]:
    """The names of the weights that a run has left; tied ones have one."""
    (file,) = (run / "model").glob("*model.safetensors")
    with safe_open(file, "pt") as weights:
        return set(weights.keys())


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("stage", ["2", "3"])
@pytest.mark.parametrize("road", ["llama-lora", "llama-full", "gpt2"])
def test_partitioned_by_deepspeed_the_run_stays_the_same(
    tmp_path: Path, road: str, stage: str
) -> None:
    """D-01, D-08: with stage 3, and with a reference of its own too."""
    words = words_of(road, tmp_path)
    one = several.run(1, tmp_path, *words)
    environment = {**several.ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}
    other = several.run(2, tmp_path, *words, **environment)
    assert several.disagreements(one, other) == []


BACKENDS = {"ddp": {}, "fsdp2": several.FSDP2}
if find_spec("deepspeed"):
    BACKENDS |= {
        f"zero{stage}": {**several.ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}
        for stage in ("2", "3")
    }


@pytest.mark.slow
@pytest.mark.parametrize("road", ["llama-lora", "gpt2"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_goes_on_with_other_processes_than_it_began_with(
    tmp_path: Path, backend: str, road: str
) -> None:
    words = [*words_of(road, tmp_path), "checkpoint.every=1"]
    part = [*words, "ppo.steps=2", "evaluation.every=1"]
    straight = several.run(1, tmp_path, *words, "evaluation.every=1")
    for first, then in (((2, BACKENDS[backend]), (1, {})), ((1, {}), (3, BACKENDS[backend]))):
        place = f"from-{first[0]}"
        folder = several.run(first[0], tmp_path, *part, place=place, **first[1])
        resumed = (f"resume={folder}", "ppo.steps=5")
        process = several.launch(then[0], tmp_path, "-m", "ppo_lab", *resumed, **then[1])
        said, _ = process.communicate(timeout=280)
        assert process.returncode == 0, said[-4000:]
        assert several.disagreements(straight, folder) == []


def begun(run: Path, process: subprocess.Popen[str], *, lines: int) -> None:
    """Wait until a run has made some iterations."""
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        file = run / "metrics.jsonl"
        if file.exists() and len(file.read_text().splitlines()) >= lines:
            return
        time.sleep(0.1)
    raise AssertionError("the run did not begin")


def children(launcher: int) -> list[int]:
    """The processes that a launcher started, in their order."""
    found = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return sorted(map(int, found))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_takes_the_run_down_and_it_goes_on(tmp_path: Path, victim: int) -> None:
    words = [*several.tiny(tmp_path, "ppo.steps=2000", "checkpoint.every=1"), "hydra.run.dir=run"]
    process = several.launch(2, tmp_path, "-m", "ppo_lab", *words)
    begun(tmp_path / "run", process, lines=2)
    killed = time.monotonic()
    os.kill(children(process.pid)[victim], signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert time.monotonic() - killed < 60
    assert process.returncode != 0
    assert "SIGKILL" in said
    done = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    resumed = ("resume=run", f"ppo.steps={done + 2}")
    process = several.launch(2, tmp_path, "-m", "ppo_lab", *resumed)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said[-3000:]
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, done + 3))


@pytest.mark.slow
def test_sigterm_to_the_launcher_ends_all_after_the_same_iteration(tmp_path: Path) -> None:
    words = [*several.tiny(tmp_path, "ppo.steps=2000"), "hydra.run.dir=run"]
    process = several.launch(2, tmp_path, "-m", "ppo_lab", *words)
    begun(tmp_path / "run", process, lines=3)
    process.terminate()
    said, _ = process.communicate(timeout=60)
    assert said.count("the iteration is finished first") == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "preempted"
    last = max((tmp_path / "run" / "checkpoints").glob("step-*")).name
    assert last == f"step-{summary['steps']:06}"


FAULTS = {
    "ZeroDivisionError('the tenth pass')": "raise ZeroDivisionError('the tenth pass')",
    "__import__('torch').OutOfMemoryError('full')": "GPU memory ran out in process",
}


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_of_one_process_is_said_once_and_ends_all(
    tmp_path: Path, fault: str, rank: str
) -> None:
    (tmp_path / "faulty.py").write_text(
        "import os, runpy\n"
        "from ppo_lab.models.policy import AutoModelForCausalLMWithValueHead as Policy\n"
        "score, calls = Policy.score, []\n"
        "def failing(self, *args, **kwargs):\n"
        "    calls.append(1)\n"
        f"    if os.environ['RANK'] == '{rank}' and len(calls) > 9:\n"
        f"        raise {fault}\n"
        "    return score(self, *args, **kwargs)\n"
        "Policy.score = failing\n"
        "runpy.run_module('ppo_lab', run_name='__main__')\n"
    )
    begin = time.monotonic()
    process = several.launch(2, tmp_path, "faulty.py", *several.tiny(tmp_path))
    said, _ = process.communicate(timeout=100)
    assert process.returncode != 0
    assert said.count(FAULTS[fault]) == 1
    assert time.monotonic() - begin < 60


@pytest.mark.slow
def test_a_reward_that_fails_is_said_once_and_its_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "rewards_of_mine.py").write_text(
        "import os\n"
        "calls = []\n"
        "def moody(completions, **_):\n"
        "    calls.append(len(completions))\n"
        "    if len(calls) == 4 and 'CALM' not in os.environ:\n"
        "        raise ValueError('not today')\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    words = several.tiny(tmp_path)
    words = [w for w in words if not w.startswith("reward")]
    words += ["reward=function", "reward.target=rewards_of_mine:moody", "hydra.run.dir=run"]
    process = several.launch(2, tmp_path, "-m", "ppo_lab", *words)
    said, _ = process.communicate(timeout=100)
    assert process.returncode != 0
    assert said.count("\n  reward function rewards_of_mine:moody raised on") == 1
    process = several.launch(3, tmp_path, "-m", "ppo_lab", "resume=run", CALM="1")
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 0, said[-3000:]


# What models alone show to be wrong, and where a run ends by itself; some words of what is said.
FOUND_BY_ALL = {
    "generation.stop_token=two words": "must be one token of this tokenizer",
    "ppo.max_kl=1e-9": "above ppo.max_kl=1e-09",
}


@pytest.mark.slow
@pytest.mark.parametrize("word", FOUND_BY_ALL)
def test_what_every_process_finds_is_told_by_one(tmp_path: Path, word: str) -> None:
    words = several.tiny(tmp_path, word, "hydra.run.dir=run")
    process = several.launch(2, tmp_path, "-m", "ppo_lab", *words)
    said, _ = process.communicate(timeout=280)
    assert process.returncode != 0
    assert said.count("ppo_lab: this cannot run:") == 1, said[-3000:]
    assert FOUND_BY_ALL[word] in said.partition("ppo_lab: this cannot run:")[2]


@pytest.mark.slow
def test_ctrl_c_to_accelerate_lets_the_iteration_finish(tmp_path: Path) -> None:
    (tmp_path / "slow_reward.py").write_text(
        "import pathlib, time\n"
        "def length(completions, **_):\n"
        "    if pathlib.Path('run/samples.jsonl').exists():\n"
        "        pathlib.Path('called').touch()\n"
        "        time.sleep(12)\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    words = [w for w in several.tiny(tmp_path) if not w.startswith("reward")]
    words += ["reward=function", "reward.target=slow_reward:length", "hydra.run.dir=run"]
    accelerate = ("-m", "accelerate.commands.launch", "--num_processes", "2")
    process = several.launch(1, tmp_path, *accelerate, "-m", "ppo_lab", *words, own_group=True)
    until = time.monotonic() + 200
    while not (tmp_path / "called").exists() and time.monotonic() < until:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said, _ = process.communicate(timeout=100)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("preempted", 1), said[-3000:]


@pytest.mark.slow
def test_a_wrong_command_is_told_by_a_process_that_is_late(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(
        "import os, runpy, time\n"
        "time.sleep(2 if os.environ['RANK'] == '0' else 0)\n"
        "runpy.run_module('ppo_lab', run_name='__main__')\n"
    )
    process = several.launch(2, tmp_path, "late.py", *several.tiny(tmp_path, "ppo.batch_size=10"))
    said, _ = process.communicate(timeout=280)
    assert process.returncode != 0
    assert said.count("ppo.batch_size=10: must be a multiple") == 1, said[-3000:]


@pytest.mark.slow
def test_a_reward_that_hangs_is_told_by_a_process_that_waits_for_it(tmp_path: Path) -> None:
    (tmp_path / "hanging_reward.py").write_text(
        "import pathlib, time\n"
        "def length(completions, **_):\n"
        "    time.sleep(1000 if pathlib.Path('run/samples.jsonl').exists() else 0)\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    words = [w for w in several.tiny(tmp_path) if not w.startswith("reward")]
    words += ["reward=function", "reward.target=hanging_reward:length", "hydra.run.dir=run"]
    patience = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2"}
    process = several.launch(
        2, tmp_path, "-m", "ppo_lab", *words, "processes.timeout=30", **patience
    )
    said, _ = process.communicate(timeout=280)
    assert process.returncode != 0
    assert (
        said.count("the main process has ended, or has not answered for processes.timeout=30") == 1
    )
