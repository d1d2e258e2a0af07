"""The schema, `conf` and the rules: what composes, and what is refused."""

from __future__ import annotations

import ast
import dataclasses
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ppo_lab import config as schema
from ppo_lab.command_reader import CommandReader, a_hydra
from ppo_lab.config import Config, ConfigError, bounds_of, conf_folder, meaning_of, register_schema
from ppo_lab.devices import device_problem
from ppo_lab.ppo_config import PPOConfig
from ppo_lab.rules import illegal_values, is_legal, problems

SECTIONS = [
    section
    for section in vars(schema).values()
    if dataclasses.is_dataclass(section) and section is not Config
] + [Config]
KNOBS = [(section, knob) for section in SECTIONS for knob in dataclasses.fields(section)]
NUMERIC = [(s, k) for s, k in KNOBS if get_type_hints(s)[k.name] in (int, float)]
CHOICES = [(s, k) for s, k in KNOBS if "choices" in bounds_of(k)]
PLAIN = [(s, k) for s, k in KNOBS if not dataclasses.is_dataclass(get_type_hints(s)[k.name])]
ANY_NUMBER = {"weight", "value", "none_score"}
OPTIONS = [
    f"{file.parent.name}={file.stem}"
    for file in sorted(conf_folder().glob("*/*.yaml"))
    if file.parent.name not in ("schema", "accelerate")
]
MODELS = [option for option in OPTIONS if option.startswith("model=") and option != "model=local"]


def name_of(case: Any) -> str:
    """How a test of a section and its field is called."""
    return getattr(case, "__name__", None) or case.name


def composed(*overrides: str) -> Config:
    """The configuration that these overrides compose."""
    register_schema()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config: Any = OmegaConf.to_object(compose("config", list(overrides)))
    return config


@cache
def reader() -> CommandReader:
    """One reader for many commands: it composes each choice of options once."""
    register_schema()
    with a_hydra() as composer:
        return CommandReader(composer, "config", problems)


def refused(*overrides: str) -> list[str]:
    """What is said against a command."""
    return reader().problems(list(overrides))


def test_no_argument_is_a_valid_run():
    """S-03: the values fall out of the policy's own passes."""
    assert refused() == []
    assert isinstance(composed().critic, schema.HeadCritic)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_against_the_schema(option):
    assert isinstance(composed(option), Config)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_says_in_its_first_comment_what_it_is(option):
    group, name = option.split("=")
    lines = (conf_folder() / group / f"{name}.yaml").read_text().splitlines()
    comments = [line for line in lines[:2] if line.startswith("# ") and "@package" not in line]
    assert comments
    assert len(comments[0]) < 90


@pytest.mark.parametrize("option", MODELS)
def test_every_model_preset_runs_with_the_embedded_prompts_and_reward(option):
    assert refused(option) == []


@pytest.mark.parametrize("option", [*MODELS, "model=local"])
def test_all_weights_move_by_a_tenth_of_an_adapters_step(option):
    adapter, whole = composed(option).ppo, composed(option, "lora=none").ppo
    assert whole.learning_rate == pytest.approx(adapter.learning_rate / 10)
    assert composed(option, "lora.r=0").ppo.learning_rate == whole.learning_rate
    assert composed(option, "lora=none", "ppo.learning_rate=0.5").ppo.learning_rate == 0.5
    assert composed("experiment=sad_stories", option).ppo.learning_rate == 3e-5


@pytest.mark.parametrize("name", ["smoke", "reward_hacking", "sentiment_gpt2", "bloom560m_hh"])
def test_presets_that_need_no_path_are_valid_as_they_are(name):
    assert refused(f"experiment={name}") == []


def test_another_model_keeps_the_embedded_prompts_and_reward():
    config = composed("model=bloom560m", "ppo.init_kl_coef=0.1")
    assert config.model.path == "bigscience/bloom-560m"
    assert config.lora.target_modules == ["query_key_value"]
    assert config.ppo.init_kl_coef == 0.1
    assert type(config.reward) is schema.EmbeddedReward
    assert type(config.data) is schema.EmbeddedData


def test_sad_stories_stands_for_its_groups_and_gives_way_to_the_command_line():
    config = composed("experiment=sad_stories", "model.path=a", "data.path=b")
    assert config.model.name == "local"
    assert type(config.data) is schema.FileData
    assert type(config.reward) is schema.VaderReward
    assert config.reward.weight == -1.0
    other = composed("experiment=sad_stories", "reward=model", "reward.path=rm", "lora=r8")
    assert isinstance(other.reward, schema.ModelReward)
    assert (other.reward.path, other.lora.r) == ("rm", 8)


def test_the_command_line_wins_over_model_and_experiment():
    config = composed("experiment=sentiment_gpt2", "model=gpt2", "ppo.batch_size=32", "lora=r8")
    assert config.model.path == "openai-community/gpt2"
    assert (config.ppo.batch_size, config.lora.r) == (32, 8)


def test_evaluation_samples_as_training_does_unless_told():
    config = composed("generation.temperature=0.7", "generation.max_new_tokens=9")
    assert (config.evaluation.temperature, config.evaluation.max_new_tokens) == (0.7, 9)
    assert composed("evaluation.temperature=0").generation.temperature == 1.0


def test_a_weighted_reward_takes_parts_of_any_type_each_with_its_weight():
    config = composed(
        "reward=weighted",
        "+reward@reward.parts.sad=vader",
        "reward.parts.sad.weight=-2",
        "reward@reward.parts.length=constant",
    )
    assert isinstance(config.reward, schema.WeightedReward)
    kinds = {name: type(part) for name, part in config.reward.parts.items()}
    assert kinds == {
        "embedded": schema.EmbeddedReward,
        "length": schema.ConstantReward,
        "sad": schema.VaderReward,
    }
    assert config.reward.parts["sad"].weight == -2


def test_a_key_of_another_reward_is_refused():
    with pytest.raises(Exception, match="path"):
        composed("reward=length", "reward.path=x")


@pytest.mark.parametrize(("section", "knob"), PLAIN, ids=name_of)
def test_every_knob_has_a_meaning_and_a_value_that_is_never_none(section, knob):
    assert meaning_of(knob)
    made = section()
    assert getattr(made, knob.name) is not None


def test_every_knob_is_read_by_more_than_its_rules():
    """By its name anywhere: a knob that loses its last reader is dead."""
    about = {"config.py", "rules.py", "dead.py", "help.py", "resume.py"}
    package = Path(schema.__file__).parent
    trees = [ast.parse(f.read_text()) for f in package.rglob("*.py") if f.name not in about]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    read = {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    assert [(s.__name__, knob.name) for s, knob in KNOBS if knob.name not in read] == []


@pytest.mark.parametrize(("section", "knob"), NUMERIC, ids=name_of)
def test_every_numeric_knob_has_a_legal_range_that_is_checked(section, knob):
    legal = bounds_of(knob)
    bounds = {"at_least", "at_most", "above", "below"} & set(legal)
    assert bounds or knob.name in ANY_NUMBER
    assert is_legal(knob, knob.default)
    wrong = [float("nan"), float("inf")]
    wrong += [legal["at_least"] - 1] if "at_least" in legal else []
    wrong += [legal["at_most"] + 1] if "at_most" in legal else []
    wrong += [legal[name] for name in ("above", "below") if name in legal]
    for value in wrong:
        instance = section()
        setattr(instance, knob.name, value)
        assert [line for line in illegal_values(instance) if line.startswith(f"{knob.name}=")]


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
@pytest.mark.parametrize("key", ["ppo.learning_rate", "ppo.init_kl_coef", "data.held_out"])
def test_what_is_no_finite_number_is_refused_as_such(key, value):
    assert refused(f"{key}={value}") == [f"{key}={value}: must be a finite number"]


@pytest.mark.parametrize(("section", "knob"), CHOICES, ids=name_of)
def test_every_choice_is_checked_with_the_nearest_name(section, knob):
    choice = max(bounds_of(knob)["choices"], key=len)
    instance = section()
    setattr(instance, knob.name, choice + "x")
    (line,) = (line for line in illegal_values(instance) if line.startswith(f"{knob.name}="))
    assert f"did you mean {choice}?" in line


RULES = [
    # the algorithm
    (["ppo.batch_size=10", "ppo.mini_batch_size=4"], "multiple of ppo.mini_batch_size"),
    (["ppo.batch_size=10", "ppo.mini_batch_size=4"], "4 x 1 = 4; 10 = 2 x 4 + 2"),
    (["ppo.batch_size=8", "ppo.mini_batch_size=4", "ppo.gradient_accumulation_steps=3"], "= 12"),
    (["ppo.mini_batch_size=0", "ppo.gradient_accumulation_steps=2"], "the whole batch"),
    (["ppo.use_score_norm=true"], "needs ppo.use_score_scaling=true"),
    (["ppo.adap_kl_ctrl=true", "ppo.init_kl_coef=0"], "would stay 0"),
    (["ppo.adap_kl_ctrl=true", "ppo.target=0"], "ppo.target=0.0: must be above 0"),
    (["ppo.target=6"], "ppo.target: has no effect"),
    (
        ["data=hub", "data.path=a/b", "data.held_out_split=test", "data.held_out=9"],
        "data.held_out: has no effect",
    ),
    (["ppo.horizon=100"], "ppo.horizon: has no effect"),
    (["ppo.target_kl=0.2"], "add ppo.early_stopping=true"),
    (["ppo.ratio_threshold=0.5"], "above 1, or 0"),
    (["ppo.adap_kl_ctrl=true", "ppo.batch_size=16", "ppo.horizon=3"], "must be above 3.2"),
    (["ppo.warmup_steps=40"], "below ppo.steps=40"),
    (["ppo.cache_trunk=true"], "with lora=r16 lora.top_layers=N"),
    (
        ["ppo.cache_trunk=true", "lora.top_layers=1", "model.fast_layers=false"],
        "which transformers does not",
    ),
    (
        ["ppo.cache_trunk=true", "lora.top_layers=1", "lora.use_dora=true"],
        "which is not known of DoRA's",
    ),
    (
        ["ppo.cache_trunk=true", "lora.top_layers=1", "ppo.gradient_checkpointing=true"],
        "computes again what ppo.cache_trunk=true keeps",
    ),
    (["lora=none", "lora.top_layers=1"], "lora.top_layers: has no effect"),
    # lengths and sampling
    (["generation=vllm"], "generation=vllm: needs vLLM: pip install 'ppo_lab[vllm]'"),
    (["generation=vllm", "device=cpu"], "needs a CUDA GPU"),
    (["generation=vllm", "model=bloom560m", "model.weights=random"], "reads weights from files"),
    (["generation=vllm", "generation.server=http://a:1", "generation.sleep=true"], "keeps its"),
    (["generation.min_new_tokens=99"], "at most generation.max_new_tokens"),
    (["generation.min_new_tokens=9", "evaluation.max_new_tokens=5"], "evaluation.max_new_tokens=5"),
    (["generation.stop_strings=['']"], "an empty text is in every response"),
    (["generation.temperature=0"], "generation.temperature=0.0: must be above 0"),
    (["generation.temperature=0", "generation.top_k=5"], "generation.top_k: has no effect"),
    (["evaluation.temperature=0", "evaluation.top_k=5"], "evaluation.top_k: has no effect"),
    (["evaluation.temperature=0", "evaluation.top_p=0.9"], "evaluation.top_p: has no effect"),
    # the model
    (["model=local"], "model.path=: missing"),
    (["model=local", "model.path=./nowhere"], "no such folder"),
    (["model=local", "model.path=conf"], "no config.json in this folder"),
    (["model=local", "model.path=pyproject.toml"], "is a file; must be a folder"),
    (["model.tokenizer=./nowhere"], "model.tokenizer=./nowhere: no such folder"),
    (["model.dtype=float16", "lora=none"], "model.dtype=float16: Adam's moments"),
    (["model.load_in_4bit=true", "device=cpu"], "needs a CUDA GPU"),
    (["model.load_in_4bit=true", "lora=none", "device=cpu"], "4-bit weights cannot be trained"),
    (["critic.v_head_init=zero", "critic.v_head_init_std=0.1"], "v_head_init_std: has no effect"),
    (["model.revision=main"], "the embedded policy comes from no hub"),
    (["model.dtype=float64"], "must be one of auto, float32, bfloat16, float16"),
    (["lora=none", "lora.use_dora=true"], "lora.use_dora: has no effect"),
    (["lora.r=0", "lora.alpha=8"], "lora.alpha: has no effect"),
    # devices and folders
    (["device=gpu"], "must be auto, cpu, cuda or cuda:N; did you mean cpu?"),
    (["device=cuda:99"], "device=cuda:99: "),
    (["reward=model", "reward.path=a/b", "reward.device=cdua"], "reward.device=cdua"),
    (["resume=./nowhere"], "resume=./nowhere: no such folder"),
    (["hydra.run.dir=pyproject.toml/runs"], "pyproject.toml is a file; must be a folder"),
    (["hydra.run.dir=/proc/1/runs"], "cannot be written"),
    # rewards
    (["reward=model"], "reward.path"),
    (["reward=model", "reward.path=conf"], "no config.json"),
    (["reward=function"], "package.module:callable"),
    (["reward=function", "reward.target=math"], "package.module:callable"),
    (["reward=function", "reward.target=no_such_module:f"], "no module 'no_such_module'"),
    (["reward=function", "reward.target=math:sqroot"], "math has no 'sqroot'"),
    (["reward=function", "reward.target=math:pi"], "not a function"),
    (["reward=function", "reward.target=math:sin", "reward.retry_wait=2"], "retry_wait: has no"),
    (["reward=weighted", "+reward@reward.parts.other=model"], "reward.parts.other.path"),
    (["reward=weighted", "reward.parts.length.ideal=-1"], "reward.parts.length.ideal=-1: must be"),
    (["reward.weight=nan"], "must be a finite number"),
    # the critic
    (["critic=reward_model", "ppo.vf_coef=0.5"], "ppo.vf_coef: has no effect"),
    (["critic=reward_model", "critic.revision=main"], "critic.revision: has no effect"),
    (["critic=reward_model", "critic.label=x"], "critic.label: has no effect, since the embedded"),
    (
        ["critic=reward_model", "critic.path=embedded", "critic.revision=main"],
        "critic.revision: has no effect, since critic.path is no hub id",
    ),
    (["ppo.vf_coef=0", "critic.warmup_steps=2"], "critic.warmup_steps: has no effect"),
    (["ppo.vf_coef=0", "critic.learning_rate=0.1"], "teaches the value head nothing"),
    (["evaluation.temperature=0", "evaluation.seed=4"], "evaluation.seed: has no effect"),
    (
        ["reward=weighted", "reward.parts.length.name=words"],
        "reward.parts.length.name: has no effect, since a part is called as its key is",
    ),
    (["critic=reward_model", "reward=length"], "this reward is no single reward model"),
    (["critic=reward_model", "reward=weighted"], "critic.path=FOLDER"),
    (["critic=reward_model", "critic.path=./nowhere"], "critic.path=./nowhere: no such folder"),
    (["critic=reward_model", "critic.path=conf"], "no config.json in this folder"),
    (
        ["critic=reward_model", "reward=model", "reward.path=a/b", "reward.output=probability"],
        "use reward.output=logit or critic=head",
    ),
    (["critic.warmup_steps=40"], "below ppo.steps=40"),
    (["critic.epochs=5"], "at most ppo.ppo_epochs=4"),
    (["critic.path=a/b"], "critic=reward_model has it"),
    (["ppo.value_learning_rate=1e-3"], "did you mean critic.learning_rate?"),
    (["model.v_head_init=normal"], "did you mean critic.v_head_init?"),
    # data
    (["data=file"], "data.path"),
    (["data=file", "data.path=nowhere.jsonl"], "no such file"),
    (["data=file", "data.path=conf"], "data.path=conf: "),
    (["data=file", "data.path=pyproject.toml"], ".jsonl"),
    (["data=hub"], "data.path"),
    (["data.min_prompt_tokens=9", "data.max_prompt_tokens=8"], "at most data.max_prompt_tokens=8"),
    (["data.held_out=1.5"], "a share below 1, or a whole number"),
    (["data=imdb", "data.cut_min_tokens=9"], "at most data.cut_max_tokens=8"),
    (["data=imdb", "data.path="], "reward: none named, and the default is the help desk's"),
    (["data=file", "experiment=smoke"], "name one, such as reward=function"),
    (
        ["data=imdb", "reward=weighted"],
        "~reward.parts.embedded takes it out, reward.parts.embedded.weight=1 means it",
    ),
    (
        ["reward=weighted", "~reward@reward.parts.embedded"],
        "a part is taken out by its key: ~reward.parts.embedded",
    ),
    (
        ["reward=weighted", "~reward.parts.embedded", "~reward.parts.length"],
        "reward.parts",
    ),
    (
        ["+data.template_kwargs.enable_thinking=false"],
        "data.template_kwargs.enable_thinking: has no effect, since no prompt is a chat",
    ),
    (
        ["data.chat=true", "+data.template_kwargs={tokenize: true}"],
        "data.template_kwargs.tokenize: is no variable of a template",
    ),
    (
        ["data=imdb", "data.messages_column=a", "data.prompt_column=b"],
        "prompt_column: has no effect",
    ),
    # metrics, tracking and checkpoints
    (["objective=eval/mean_rewards"], "did you mean eval/mean_reward?"),
    (["objective=eval/gold", "data=imdb"], "objective=eval/gold: must be one of"),
    (["checkpoint.best_metric=kl"], "checkpoint.best_metric=kl: must be one of"),
    (["tracking=none", "tracking.project=x"], "tracking.project: has no effect"),
    (["tracking=wandb", "tracking.project='my/runs?'"], "W&B's name of it may not hold / ?"),
    (["tracking=wandb", f"tracking.project={'x' * 129}"], "may have at most 128 characters"),
    (["tracking=wandb", "tracking.id='a:b'"], "W&B's name of it may not hold :"),
    (["tracking=wandb", f"tracking.tags=[{'x' * 65}]"], "has 65 characters; W&B takes 1 to 64"),
    (["checkpoint.keep=3", "checkpoint.every=0"], "checkpoint.keep: has no effect"),
    (
        ["tracking=none", "tracking.samples_every=6", "evaluation.every=3"],
        "tracking.samples_every: has no effect, since those iterations show",
    ),
    (["tracking.samples_every=6", "evaluation.samples=0"], "evaluation.samples=0 keeps no samples"),
    (["model.cuda_graphs=false", "device=cpu"], "model.cuda_graphs: has no effect"),
]


@pytest.mark.parametrize(
    ("overrides", "said"), RULES, ids=lambda x: " ".join(x) if isinstance(x, list) else ""
)
def test_what_cannot_run_is_refused_with_its_reason(overrides, said, monkeypatch):
    """T-04: of sizes that do not go together the reason is their arithmetic."""
    monkeypatch.chdir(Path(__file__).parents[1])
    assert [line for line in refused(*overrides) if said in line], refused(*overrides)


def test_how_a_value_head_begins_is_refused_where_the_folder_brings_one(tmp_path):
    model = ["model=local", f"model.path={tmp_path}"]
    (tmp_path / "config.json").write_text("{}")
    assert refused(*model, "critic.v_head_init=zero") == []
    (tmp_path / "value_head.safetensors").touch()
    (line,) = refused(*model, "critic.v_head_init=zero")
    assert line.startswith("critic.v_head_init: has no effect, since the value head beside the mod")
    assert refused(*model, "critic.v_head_init=zero", "model.weights=random") == []


@pytest.mark.parametrize(
    ("setting", "legal"),
    [
        ("ppo.steps=0", "at least 1"),
        ("data.max_prompt_tokens=0", "at least 1"),
        ("generation.max_new_tokens=-1", "at least 1"),
        ("generation.temperature=0.0", "above 0"),
    ],
)
def test_a_value_out_of_range_brings_no_complaint_about_what_was_not_typed(setting, legal):
    assert refused(setting) == [f"{setting}: must be {legal}"]


@pytest.mark.parametrize(
    ("key", "device", "launched", "said"),
    [
        ("device", "cuda", False, ""),
        ("device", "cuda:1", False, ""),
        ("device", "cuda:2", False, "the GPUs here are 0 to 1"),
        ("device", "cuda:1", True, "each of several processes has a GPU of its own"),
        ("reward.device", "cuda:1", True, ""),
        ("reward.device", "sharded", True, ""),
        ("reward.device", "sharded", False, "this is one process"),
        ("device", "sharded", True, "must be auto, cpu, cuda or cuda:N"),
        ("device", "cuda:", False, "must be auto, cpu, cuda or cuda:N"),
    ],
)
def test_a_device_must_be_one_that_is_here(key, device, launched, said, monkeypatch):
    monkeypatch.setattr("ppo_lab.devices.cuda_devices", lambda: 2)
    monkeypatch.setattr("ppo_lab.processes.launch.is_launched", lambda: launched)
    found = list(device_problem(key, device))
    assert [said in line for line in found] == ([True] if said else [])


def test_what_evaluation_is_told_itself_is_refused_beside_what_generation_is():
    assert len(refused("generation.top_k=-1", "evaluation.top_k=-1")) == 2


@pytest.mark.parametrize(
    "overrides",
    [
        ["tracking=none", "tracking.samples_every=5", "evaluation.every=3"],
        ["tracking=none", "tracking.samples_every=3", "evaluation.every=6"],
        ["tracking=wandb", "tracking.samples_every=6", "evaluation.every=3"],
        ["tracking.samples_every=6"],
        ["tracking.samples_every=0", "evaluation.every=3", "evaluation.samples=0"],
        ["model.cuda_graphs=false"],
    ],
    ids=" ".join,
)
def test_a_setting_that_is_read_now_and_then_may_be_given(overrides):
    assert refused(*overrides) == []


def test_a_setting_without_effect_may_come_with_a_preset():
    config = composed("lora=none")
    assert config.lora.target_modules, "the model preset names them whatever the adapter"
    assert problems(config) == []
    assert problems(config, ["lora.target_modules"]) != []


def test_a_file_without_the_prompt_column_is_refused_with_the_columns_it_has(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"promt": "Hello?"}\n')
    (line,) = refused("data=file", f"data.path={file}", "reward=length")
    assert "data.prompt_column=prompt" in line
    assert "promt" in line.replace("prompt", "")


LIVE = [
    ["ppo.adap_kl_ctrl=true", "ppo.target=5", "ppo.horizon=100"],
    ["ppo.early_stopping=true", "ppo.target_kl=0.2"],
    ["lora=r8", "lora.alpha=8", "lora.top_layers=1", "lora.learning_rate_factor=2"],
    ["lora=r8", "lora.dropout=0"],
    ["lora.use_rslora=true", "lora.use_dora=true", "lora.target_modules=[q_proj]"],
    ["data=imdb", "data.prompt_column=text", "data.held_out=9"],
    ["data.chat=true", "+data.template_kwargs.enable_thinking=false"],
    ["reward.parts.length.ideal=9", "reward=weighted", "reward.parts.length.weight=2"],
    ["reward=function", "reward.target=math:sin", "reward.retries=1", "reward.retry_wait=2"],
    ["critic.v_head_init=normal", "critic.v_head_init_std=0.1"],
    ["critic.warmup_steps=2", "critic.epochs=2", "critic.learning_rate=0.1", "ppo.vf_coef=0.3"],
    ["critic=reward_model", "critic.path=a/b", "critic.revision=main", "critic.label=x"],
    ["critic=reward_model", "critic.warmup_steps=2", "critic.learning_rate=0.1"],
    ["reward=model", "reward.path=a/b", "reward.revision=main"],
    ["critic=reward_model", "reward=model", "reward.path=a/b", "critic.label=x"],
    ["model=bloom560m", "model.revision=main", "model.trust_remote_code=true"],
    ["evaluation.temperature=0.7", "evaluation.top_k=5", "evaluation.top_p=0.5"],
    ["evaluation.temperature=1", "evaluation.seed=4", "generation.top_k=5", "generation.top_p=0.5"],
    ["tracking=wandb", "tracking.project=x", "tracking.mode=offline", "tracking.tags=[a]"],
    ["checkpoint.every=10", "checkpoint.keep=2"],
]


@pytest.mark.parametrize("overrides", LIVE, ids=" ".join)
def test_a_setting_that_is_read_is_not_called_one_without_effect(overrides):
    assert not [line for line in refused(*overrides) if "no effect" in line]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["critic=head", "critic.v_head_init_std=0.1"], "critic.v_head_init_std"),
        (["lora.dropout=0.1"], "lora.dropout"),
        (["evaluation.temperature=0", "evaluation.top_k=3"], "evaluation.top_k"),
        (["model.trust_remote_code=true"], "model.trust_remote_code"),
        (["model.revision=main"], "model.revision"),
        (["critic=reward_model", "critic.path=embedded", "critic.label=x"], "critic.label"),
    ],
)
def test_a_setting_that_nothing_reads_is_called_so(overrides, said):
    assert [line for line in refused(*overrides) if line.startswith(f"{said}: has no effect")]


def test_a_folder_has_no_revision(tmp_path):
    for name in ("model", "reward", "critic"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    found = refused(
        *("model=local", f"model.path={tmp_path}/model", "model.revision=v9"),
        *("reward=model", f"reward.path={tmp_path}/reward", "reward.revision=v9"),
        *("critic=reward_model", f"critic.path={tmp_path}/critic", "critic.revision=v9"),
    )
    for key in ("model", "reward", "critic"):
        (line,) = [line for line in found if line.startswith(f"{key}.revision")]
        assert line == f"{key}.revision: has no effect, since {key}.path is no hub id"
    bare = refused("critic=reward_model", "critic.revision=v9")
    assert [line for line in bare if "revision" in line] == [
        "critic.revision: has no effect, since the critic starts from the reward's own model; add "
        "critic.path=HUB_ID"
    ]
    on_the_hub = ("model=local", "model.path=some/model", "model.revision=v9")
    assert not [line for line in refused(*on_the_hub) if "revision" in line]


def test_a_misspelt_path_is_answered_with_what_lies_beside_it(tmp_path):
    (tmp_path / "stories").mkdir()
    (line,) = refused("model=local", f"model.path={tmp_path}/storys")
    assert line.endswith("did you mean stories?")


@pytest.mark.parametrize("folder", ["/" + "x" * 300, "'~nobody-of-this-name/m'"])
def test_paths_that_cannot_be_looked_at_are_refused_by_their_keys_all_at_once(folder):
    keys = {"model.path": folder, "critic.path": folder, "reward.path": folder}
    keys["data.path"] = folder.removesuffix("'") + ("/p.csv'" if "'" in folder else "/p.csv")
    groups = ("model=local", "reward=model", "critic=reward_model", "data=file")
    said = refused(*groups, "ppo.batch_size=7", *(f"{k}={path}" for k, path in keys.items()))
    assert said[0].startswith("ppo.batch_size=7: must be a multiple")
    for key, path in keys.items():
        bare = path.strip("'")
        assert any(line.startswith(f"{key}={bare}: cannot be read (") for line in said), (key, said)


@pytest.mark.parametrize(
    "overrides",
    [
        ["reward=embedded"],
        ["reward=length"],
        ["reward.weight=-1"],
        ["reward=weighted", "~reward.parts.embedded"],
        ["reward=weighted", "reward.parts.embedded.weight=0.5"],
        ["reward=weighted", "reward@reward.parts.embedded=vader"],
        ["reward=weighted", "reward@reward.parts.embedded=embedded"],
        ["experiment=sentiment_gpt2"],
    ],
    ids=" ".join,
)
def test_other_prompts_with_a_reward_that_is_named_may_run(overrides):
    assert refused("data=imdb", *overrides) == []


def test_the_help_desks_reward_is_only_asked_for_where_a_command_chose_other_prompts(tmp_path):
    config = composed("data=imdb")
    assert problems(config, ["data.limit"]) == [], "the prompts came with a preset"
    assert len(problems(config, ["data", "data.limit"])) == 1
    assert problems(config, ["data", "resume"]) == [], "a sweep that goes on"
    other = composed("data=imdb", "reward=weighted", "reward@reward.parts.embedded=vader")
    assert problems(other, ["data"]) == [], "a preset put another reward in its place"
    going_on = problems(dataclasses.replace(config, resume=str(tmp_path)), ["data"])
    assert not [line for line in going_on if line.startswith("reward")]


def test_every_run_of_a_sweep_is_asked_for_its_reward():
    reader_of = reader()
    sweep = ["data=imdb", "reward=embedded,length", "ppo.init_kl_coef=0.1,0.2"]
    assert reader_of.problems(sweep, multirun=True) == []
    unnamed = reader_of.problems([sweep[0], sweep[2]], multirun=True)
    assert [line.partition(":")[0] for line in unnamed] == ["reward"]


def test_a_template_is_given_variables_where_prompts_are_chats():
    assert refused("data.chat=true", "+data.template_kwargs.enable_thinking=false") == []
    config = composed("data.chat=true", "+data.template_kwargs={enable_thinking: false}")
    assert config.data.template_kwargs == {"enable_thinking": False}


def test_a_reward_of_no_type_is_refused():
    assert "reward: none chosen; it is an option of the group `reward`" in problems(Config())


def test_the_snippet_s_settings_are_legal_in_python():
    made = PPOConfig(
        model_name="bloom-560m",
        learning_rate=1.5e-5,
        batch_size=16,
        kl_penalty="kl",
        init_kl_coef=0.2,
    )
    assert (made.cliprange, made.adap_kl_ctrl, made.ppo_epochs) == (0.2, False, 4)


def test_python_s_settings_are_refused_all_at_once_with_the_nearest_choice():
    with pytest.raises(ValueError) as error:
        PPOConfig(kl_penalty="kll", cliprange=3, learning_rate=float("nan"), steps=0)
    assert len(str(error.value).splitlines()) == 4
    assert "kl_penalty=kll: must be one of kl, abs, mse, k3, full; did you mean kl?" in str(
        error.value
    )


def test_python_s_settings_of_a_wrong_type_are_refused():
    with pytest.raises(ConfigError) as error:
        PPOConfig(batch_size=1.5, learning_rate="fast", whiten_rewards=1)  # type: ignore[arg-type]
    assert error.value.problems == [
        "batch_size=1.5: must be a whole number",
        "learning_rate='fast': must be a number",
        "whiten_rewards=1: must be true or false",
    ]


def test_a_whole_number_is_a_number_in_python():
    assert PPOConfig(learning_rate=1).learning_rate == 1


def test_the_classic_section_refuses_what_the_run_refuses():
    with pytest.raises(ValueError, match="multiple of mini_batch_size"):
        PPOConfig(batch_size=10, mini_batch_size=4)


def test_frozen_schema_survives_a_round_trip_through_yaml():
    register_schema()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = compose("config", ["experiment=sentiment_gpt2"])
    again = OmegaConf.create(OmegaConf.to_yaml(config, resolve=True))
    assert OmegaConf.to_container(again) == OmegaConf.to_container(config, resolve=True)
    with pytest.raises(OmegaConfBaseException):
        config.ppo.epsilon = 0.1
