"""The command line: help, bad input, and what Hydra hands to a run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from ppo_lab.command_line import command_problems, flags_first
from ppo_lab.command_reader import CommandReader, a_hydra
from ppo_lab.config import ConfigError, conf_folder, register_schema
from ppo_lab.devices import has_driver
from ppo_lab.rules import problems

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "wandb", "accelerate")


def command(
    *words: str, folder: Path, program: tuple[str, ...] = ("-m", "ppo_lab")
) -> subprocess.CompletedProcess[str]:
    """A command's exit code and output, run in `folder` as a user would."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "110"}
    environment.pop("WANDB_SWEEP_ID", None)
    return subprocess.run(
        [sys.executable, *program, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


def refused(*words: str) -> list[str]:
    """What is said against a command, in this process."""
    register_schema()
    try:
        return command_problems(list(words), check=problems)
    except ConfigError as error:
        return error.problems


@cache
def reader() -> CommandReader:
    """One reader for many commands: it composes each choice of options once."""
    register_schema()
    with a_hydra() as composer:
        return CommandReader(composer, "config", problems)


# What Python 3.14's argparse does with each argument that is added.
OF_3_14 = """
import argparse, runpy, sys

def check(self, action):
    help = self._get_formatter()._get_help_string(action)
    if help is not None and "%" in help:
        help % {"prog": "", "default": "", "choices": "", "type": "", "dest": "", "metavar": ""}

def add(self, action):
    if hasattr(self, "_get_formatter"):
        self._check_help(action)
    return plainly(self, action)

plainly = argparse.ArgumentParser._add_action
argparse.ArgumentParser._check_help, argparse.ArgumentParser._add_action = check, add
runpy.run_module(sys.argv[1], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("module", ["ppo_lab", "ppo_lab.sft", "ppo_lab.runs", "ppo_lab.compare"])
def test_no_help_is_looked_into_before_it_is_shown(module, tmp_path):
    """Where argparse asks what an argument's help says as soon as it is added."""
    done = command("--nonsense", folder=tmp_path, program=("-c", f"{OF_3_14}", module))
    assert "Traceback" not in done.stderr
    assert "unrecognized arguments: --nonsense" in done.stderr


def test_everything_wrong_is_said_at_once_in_one_message_without_traceback(tmp_path):
    began = time.perf_counter()
    done = command(
        "modle=bloom560m",
        "model=bloom560",
        "ppo.init_kl_coeff=0.1",
        "ppo.steps=many",
        "ppo.cliprange=7",
        "ppo.batch_size=10",
        folder=tmp_path,
    )
    assert time.perf_counter() - began < 5
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for said in (
        "ppo_lab: this cannot run, for 6 reasons:",
        "modle=bloom560m: no such key; did you mean model?",
        "model=bloom560: no such option",
        "did you mean bloom560m?",
        "ppo.init_kl_coeff=0.1: no such key; did you mean ppo.init_kl_coef?",
        "ppo.steps=many: must be a whole number, at least 1",
        "ppo.cliprange=7.0: must be above 0 and below 1",
        "ppo.batch_size=10: must be a multiple",
    ):
        assert said in done.stderr
    assert not list(tmp_path.iterdir()), "a refused command leaves nothing behind"


WITHOUT_A_DRIVER = [["device=cuda"], ["generation=vllm"]] if not has_driver() else []


@pytest.mark.parametrize(
    "words", [["ppo.cliprange=7"], ["--help"], ["--version"], *WITHOUT_A_DRIVER]
)
def test_answers_come_without_importing_anything_heavy(words, tmp_path):
    done = command(*words, folder=tmp_path, program=("-X", "importtime", "-m", "ppo_lab"))
    loaded = {
        line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()
    }
    assert "ppo_lab" in loaded
    assert not loaded & set(HEAVY)


def test_the_help_page_names_every_option_and_the_headline_knobs(tmp_path):
    done = command("--help", folder=tmp_path)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    for group in ("model", "lora", "reward", "data", "tracking", "experiment"):
        for file in (conf_folder() / group).glob("*.yaml"):
            assert any(line.split()[:1] == [file.stem] for line in lines), file
    for said in ("ppo.init_kl_coef", "ppo.cliprange", "outputs/", "python -m ppo_lab.compare"):
        assert said in done.stdout
    assert sum(line.startswith("  python -m ppo_lab") for line in lines) >= 5
    assert max(map(len, lines)) <= 110


@pytest.mark.parametrize("module", ["ppo_lab", "ppo_lab.plan"])
def test_without_docstrings_a_run_is_refused_before_transformers_is(module, tmp_path):
    done = command(folder=tmp_path, program=("-OO", "-m", module))
    assert done.returncode == 1
    first, line = done.stderr.splitlines()
    assert first == "ppo_lab: this cannot run:"
    assert "-OO" in line


def test_windows_is_told_where_it_runs() -> None:
    code = "import sys; sys.platform = 'win32'; import ppo_lab"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "on Windows run it in WSL" in done.stderr


def test_the_version_is_that_of_the_package(tmp_path):
    import ppo_lab

    assert command("--version", folder=tmp_path).stdout == f"ppo_lab {ppo_lab.__version__}\n"


def test_conf_is_found_from_any_folder(tmp_path):
    done = command("--cfg", "job", "ppo.init_kl_coef=0.37", folder=tmp_path)
    assert done.returncode == 0
    assert OmegaConf.create(done.stdout).ppo.init_kl_coef == 0.37


SCRIPT = """
import sys
from ppo_lab.command_line import launch
from ppo_lab.errors import ConfigError
from ppo_lab.rules import problems

def job(config, folder, overrides):
    print(type(config).__name__, config.ppo.cliprange, folder.is_absolute(), overrides)
    (folder / "here").touch()
    if config.ppo.cliprange == 0.3:
        raise ConfigError("the data is empty")
    return 1.0

launch(job, check=problems)
"""


@pytest.fixture
def script(tmp_path) -> tuple[str, ...]:
    """A program with a job that fails at one epsilon."""
    (tmp_path / "script.py").write_text(SCRIPT)
    return ("script.py",)


def test_a_run_gets_its_config_its_folder_and_what_was_overridden(script, tmp_path):
    done = command("ppo.cliprange=0.1", folder=tmp_path, program=script)
    assert done.returncode == 0
    assert done.stdout == "Config 0.1 True ['ppo.cliprange=0.1']\n"
    (folder,) = (tmp_path / "outputs").glob("*/*")
    assert (folder / ".hydra" / "config.yaml").is_file()
    assert not list(folder.glob("*.log"))


def test_a_mistake_found_while_running_is_a_message_too(script, tmp_path):
    done = command("ppo.cliprange=0.3", folder=tmp_path, program=script)
    assert done.returncode == 1
    assert done.stderr == "ppo_lab: this cannot run:\n  the data is empty\n"


def test_a_run_of_a_sweep_that_fails_lets_the_others_go_on(script, tmp_path):
    done = command("-m", "ppo.cliprange=0.1,0.3,0.2", folder=tmp_path, program=script)
    assert done.returncode == 1
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["0.1", "0.3", "0.2"]
    assert "the data is empty" in done.stderr
    assert "Traceback" not in done.stderr
    folders = sorted(
        path.parent.name for path in (tmp_path / "outputs").glob("multirun/*/*/*/.hydra")
    )
    assert folders == ["0", "1", "2"]


def test_a_sweep_is_refused_as_a_whole_before_its_first_run():
    found = refused("-m", "ppo.cliprange=0.1,2", "ppo.batch_size=64,10")
    assert len(found) == 2
    assert refused("-m", "ppo.cliprange=0.1,0.2", "ppo.lam=range(0.9,1.0,0.05)") == []


def test_of_a_large_sweep_the_last_value_is_looked_at_too():
    sweep = ["ppo.init_kl_coef=0.02,0.05,0.1,0.2,-0.5", "ppo.cliprange=0.1,0.2,0.3", "seed=0,1,2"]
    assert refused("-m", *sweep) == ["ppo.init_kl_coef=-0.5: must be at least 0"]


@pytest.mark.parametrize("word", ["seed=range(2,0)", "model=glob(zz*)"])
def test_a_sweep_without_runs_is_refused(word):
    assert refused("-m", word) == ["-m: the sweep has no runs; one of its keys has no values"]


@pytest.mark.parametrize("flag", ["--cfg=job", "--info"])
def test_what_shows_one_run_is_no_sweep(flag):
    assert refused("-m", "seed=0,1", flag)[0].startswith("-m: --cfg and --info show what one run")
    assert refused("seed=0", flag) == []


def test_a_configuration_is_shown_with_its_mistakes_and_no_key_that_is_none():
    assert refused("--cfg=job", "ppo.stepz=3") == [
        "ppo.stepz=3: no such key; did you mean ppo.steps?"
    ]
    assert refused("--cfg=job", "ppo.cliprange=7") == []


def test_a_stage_is_not_resumed(tmp_path):
    done = command(f"resume={tmp_path}", folder=tmp_path, program=("-m", "ppo_lab.sft"))
    assert done.returncode == 1
    assert f"resume={tmp_path}: a stage is started anew; leave it out" in done.stderr
    (tmp_path / ".hydra").mkdir()
    for name in ("config", "overrides"):
        (tmp_path / f".hydra/{name}.yaml").write_text("seed: 0\nfit:\n  epochs: 1\n")
    done = command(f"resume={tmp_path}", folder=tmp_path)
    assert done.returncode == 1
    assert "is a stage before PPO and no run" in done.stderr


def test_runs_of_a_sweep_share_no_id():
    (line,) = refused("-m", "seed=0,1", "tracking=wandb", "tracking.id=mine")
    assert line.startswith("tracking.id=mine: is one run's, and not of all runs of a sweep")
    assert refused("-m", "tracking=wandb", "tracking.id=mine,yours") == []
    assert refused("tracking=wandb", "tracking.id=mine") == []


@pytest.mark.parametrize(
    ("word", "instead"),
    [("~tracking", "tracking=none"), ("~lora", "lora=none"), ("~ppo", "one of default")],
)
def test_a_group_is_not_left_out_since_its_schema_s_defaults_would_stand(word, instead):
    assert refused("experiment=smoke", word) == [
        f"{word}: a group cannot be left out; choose {instead}"
    ]


def test_flags_stand_wherever_they_like():
    words = ["seed=1", "--config-dir", "my conf", "ppo.steps=2", "-m", "model=tiny"]
    assert flags_first(words) == [
        *("--multirun", "--config-dir=my conf", "seed=1", "ppo.steps=2", "model=tiny")
    ]
    assert flags_first(["--cfg", "job", "seed=1"]) == ["--cfg=job", "seed=1"]
    assert flags_first([]) == []


def test_options_of_folders_on_the_search_path_are_options(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "own.yaml").write_text("# @package _global_\nseed: 7\n")
    (tmp_path / "main.yaml").write_text(
        f"defaults: [config, _self_]\nhydra: {{searchpath: ['file://{tmp_path}']}}\n"
    )
    path = f"hydra.searchpath=['file://{tmp_path}']"
    assert refused(path, "experiment=own") == []
    assert refused("-m", path, "experiment=own,smoke") == []
    assert refused(f"--config-dir={tmp_path}", "--config-name=main", "experiment=own") == []
    assert "own" in refused(path, "experiment=owm")[0]
    (line,) = refused("hydra.searchpath=7")
    assert "hydra.searchpath" in line


def test_several_values_without_m_are_refused():
    assert refused("ppo.cliprange=0.1,0.2") == [
        "ppo.cliprange=0.1,0.2: several values need -m: ppo_lab -m ..."
    ]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("beta=0.1", "did you mean ppo.init_kl_coef?"),
        ("epsilon=0.1", "did you mean ppo.cliprange?"),
        ("cliprange=0.1", "did you mean ppo.cliprange?"),
        ("num_ppo_epochs=2", "did you mean ppo.ppo_epochs?"),
        ("ppoo.steps=2", "did you mean ppo.steps?"),
        ("ppo.step=2", "did you mean ppo.steps?"),
        ("reward.path=x", "no such key in this reward; reward=model has it"),
        ("data.split=x", "no such key in this data; data=hub has it"),
        ("model=blom560m", "did you mean bloom560m?"),
        ("model=null", "no such option"),
        ("reward=[embedded,length]", "no such option"),
        ("ppo=0.1", "no such option"),
        ("ppo.lam=null", "must be a number"),
        ("lora.use_dora=maybe", "must be true or false"),
        ("lora.target_modules=q_proj", "must be a list: [a,b]"),
        ("ppo.steps=1.5", "must be a whole number"),
        ("+ppo.steps=2", "leave out the +"),
        ("+ppo.foo=2", "no such key"),
        ("~ppo.steps", "cannot be removed"),
        ("ppo.steps", "must be key=value"),
        ("=", "must be key=value"),
        ("", "must be key=value"),
        ("tracking.notes=it's", "tracking.notes='it\\'s'"),
        ("tracking.tags=[a,b", "cannot be read"),
        ("name=${nowhere}", "nowhere"),
        ("name=${oc.env:NO_SUCH_VARIABLE}", "NO_SUCH_VARIABLE"),
        ("hydra.run.dir=${nowhere}", "nowhere"),
        ("hydra/launcher=nope", "no such option"),
        ("hydra.mode=FOO", "hydra.mode=FOO"),
        ("--config-dir=nowhere", "no such folder"),
        ("--config-name=nowhere", "Cannot find primary config"),
    ],
)
def test_a_wrong_word_is_answered_with_the_right_one(word, said):
    (line,) = refused(word) if word.startswith("-") else reader().problems([word])
    assert said in line


@pytest.mark.parametrize(
    "words",
    [
        ("hydra/sweeper=nosuch", "hydra.sweeper.direction=maximize"),
        ("reward=nosuch", "reward.path=x"),
    ],
)
def test_keys_of_an_option_that_is_refused_are_not_judged(words):
    (line,) = reader().problems(list(words))
    assert line.startswith(f"{words[0]}: no such option")


def test_a_misspelt_flag_is_answered_with_the_right_one(tmp_path):
    done = command("--mutlirun", "ppo.cliprange=0.1,0.2", folder=tmp_path)
    assert done.returncode == 1
    assert "did you mean --multirun?" in done.stderr


def test_a_function_takes_keyword_arguments_of_any_name():
    function = ["reward=function", "reward.target=tiny_runs:variety"]
    assert reader().problems([*function, "+reward.kwargs={x: 1}", "+reward.kwargs.y=[1,2]"]) == []
    (line,) = reader().problems([*function, "reward.kwargs.x=1"])
    assert line.endswith("a new entry needs a +: +reward.kwargs.x=1")


def test_a_sweep_may_go_over_all_options_of_a_group():
    assert refused("-m", "lora=glob(r*)") == []


def test_text_with_special_characters_passes_as_the_message_says_to_quote_it():
    assert refused("tracking.notes='it\\'s'") == []


def run_folder(**environment: str) -> str:
    """Where a run goes, as Hydra resolves it."""
    register_schema()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID"):
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            config = compose("config", ["hydra.job.num=7"], return_hydra_config=True)
            return f"{config.hydra.run.dir} {config.hydra.sweep.dir}/{config.hydra.sweep.subdir}"


def test_runs_of_the_same_second_and_of_a_sweep_s_agent_have_folders_of_their_own():
    run, sweep = run_folder().split()
    assert len(Path(run).name.split("-")[-1]) == 6, "microseconds"
    assert sweep.startswith("outputs/multirun/")
    assert sweep.endswith("/7")
    assert run_folder(WANDB_SWEEP_ID="abc", WANDB_RUN_ID="r1").split()[0] == "outputs/abc/r1"


KEYS = [
    "ppo.steps",
    "ppo.cliprange",
    "model",
    "reward",
    "lora.target_modules",
    "reward.weight",
    "model.path",
    "device",
    "tracking.tags",
    "hydra.run.dir",
    "experiment",
    "seed",
    "name",
]
WORDS = st.one_of(
    st.text(max_size=20),
    st.from_regex(r"[~+]{0,2}[a-z_.@/]{1,20}=?[\w\[\]{},:$'\"()\\. -]{0,20}", fullmatch=True),
    st.builds(
        "{}={}".format,
        st.sampled_from(KEYS),
        st.text(max_size=12),
    ),
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(WORDS, max_size=3))
def test_odd_words_never_end_in_a_traceback(words):
    found = reader().problems(words)
    assert all(isinstance(line, str) and line for line in found)
