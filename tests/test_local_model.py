"""What the config.json of a folder tells against its model, before anything heavy is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import ARCHITECTURE

from ppo_lab import local_model
from ppo_lab.assembly import longest_prompt
from ppo_lab.config import Config, GenerationSection, ModelSection
from ppo_lab.errors import ConfigError
from ppo_lab.models.loading import load_config
from ppo_lab.plan.request import Request
from ppo_lab.rules import model_rules
from ppo_lab.stages.config import SFTConfig
from ppo_lab.stages.jobs import problems as stage_problems

T5 = {"model_type": "t5", "architectures": ["T5Model"], "is_encoder_decoder": True}
CLASSIFIER = {**ARCHITECTURE, "architectures": ["LlamaForSequenceClassification"]}


def folder(place: Path, settings: dict[str, Any]) -> str:
    """A folder with this config.json."""
    (place / "config.json").write_text(json.dumps(settings))
    return str(place)


def run_of(path: str, **settings: Any) -> Config:
    """A run from this folder with responses of 96 tokens, as many as the tiny model reads."""
    long = GenerationSection(max_new_tokens=96)
    return Config(model=ModelSection(path=path, **settings), generation=long)


@pytest.mark.parametrize("settings", [T5, CLASSIFIER])
def test_what_is_no_causal_model_is_refused_early_as_it_is_later(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    path = folder(tmp_path, settings)
    (line,) = local_model.problems(ModelSection(path=path))
    assert "is not a causal language model" in line
    with pytest.raises(ConfigError) as later:
        load_config(ModelSection(path=path))
    assert later.value.problems == [line]


MPT = {"model_type": "mpt", "max_seq_len": 96, "attn_config": {"alibi": True}, "d_model": 128}


@pytest.mark.parametrize("settings", [ARCHITECTURE, MPT])
def test_a_response_that_leaves_no_room_is_refused_early_as_it_is_later(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    config = run_of(folder(tmp_path, settings))
    (line,) = model_rules(config)
    assert line.startswith("generation.max_new_tokens=96: must be below the 96 tokens")
    with pytest.raises(ConfigError) as later:
        longest_prompt(config)
    assert later.value.problems == [line]


@pytest.mark.parametrize(
    "other",
    [
        {"alibi": True},
        {"text_config": {"max_position_embeddings": 97}},
        {"max_position_embeddings": None},
    ],
)
def test_a_context_that_the_file_alone_does_not_bound_is_left_to_the_model(
    other: dict[str, Any], tmp_path: Path
) -> None:
    assert not list(model_rules(run_of(folder(tmp_path, {**ARCHITECTURE, **other}))))


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "pip install optimum gptqmodel"),
        ({"quant_method": "awq", "bits": 4}, "pip install gptqmodel"),
        ({"load_in_4bit": True}, "pip install 'ppo_lab[quantization]'"),
        ({"quant_method": "auto-round"}, "need auto_round: pip install auto-round"),
    ],
)
def test_quantised_weights_name_what_reads_them(
    quantization: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder(tmp_path, {**ARCHITECTURE, "quantization_config": quantization})
    monkeypatch.setattr(local_model, "find_spec", lambda name: None)
    (line,) = local_model.problems(ModelSection(path=path))
    assert said in line
    assert not list(local_model.problems(ModelSection(path=path, weights="random")))
    monkeypatch.setattr(local_model, "find_spec", lambda name: object())
    assert not list(local_model.problems(ModelSection(path=path)))


def test_a_plan_for_another_machine_asks_for_no_library_here(tmp_path: Path) -> None:
    quantised = {**ARCHITECTURE, "quantization_config": {"quant_method": "gptq"}}
    config = Config(model=ModelSection(path=folder(tmp_path, quantised)))
    said = {name: Request(run=[], device=name).check(config) for name in ("auto", "a100-80")}
    assert [line for line in said["auto"] if "quantised by gptq" in line]
    assert not [line for line in said["a100-80"] if "quantised by gptq" in line]


def test_a_stage_refuses_such_a_folder_too(tmp_path: Path) -> None:
    config = SFTConfig(model=ModelSection(path=folder(tmp_path, T5)))
    assert [line for line in stage_problems(config) if "not a causal language model" in line]


@pytest.mark.parametrize("text", ["{bad", "[]", '{"architectures": 3, "quantization_config": 4}'])
def test_a_file_that_cannot_be_read_is_left_to_whoever_loads_it(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    assert not list(model_rules(run_of(str(tmp_path))))


def test_neither_a_hub_id_nor_an_adapter_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "embedded").mkdir()
    folder(tmp_path / "embedded", T5)
    monkeypatch.chdir(tmp_path)
    assert local_model.read("embedded") == {}, "is the policy of this project, wherever one is"
    assert local_model.read("owner/name") == {}
    (tmp_path / "adapter_config.json").write_text("{}")
    assert local_model.read(folder(tmp_path, T5)) == {}


def test_asking_imports_nothing_heavy(tmp_path: Path) -> None:
    path = folder(tmp_path, {**T5, "max_position_embeddings": 8})
    code = (
        "import sys; from ppo_lab.config import Config, ModelSection\n"
        "from ppo_lab.rules import model_rules\n"
        f"assert len(list(model_rules(Config(model=ModelSection(path={path!r}))))) == 2\n"
        "assert not {'torch', 'transformers', 'optimum', 'bitsandbytes'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
