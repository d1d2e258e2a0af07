"""`python -m ppo_lab --help`: one page, read off the schema and the first lines of `conf`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ppo_lab.config import Config, bounds_of, conf_folder, meaning_of, register_schema

GROUPS = {
    "model": "the policy to start from",
    "lora": "how it is trained",
    "reward": "what scores its responses",
    "critic": "what predicts the score, token by token",
    "data": "the prompts",
    "tracking": "where metrics go, beside metrics.jsonl",
    "experiment": "all of it at once; none by default",
}
KNOBS = (
    "ppo.init_kl_coef",
    "ppo.cliprange",
    "ppo.steps",
    "ppo.learning_rate",
    "ppo.batch_size",
    "ppo.mini_batch_size",
    "ppo.ppo_epochs",
    "ppo.kl_penalty",
    "ppo.adap_kl_ctrl",
    "generation.max_new_tokens",
    "generation.temperature",
    "evaluation.every",
    "reward.weight",
    "seed",
)
COMMANDS = (
    ("python -m ppo_lab", "the embedded default: no network, no GPU, minutes"),
    ("python -m ppo_lab model=bloom560m ppo.init_kl_coef=0.1", "a real model from the hub"),
    ("python -m ppo_lab experiment=reward_hacking", "what happens without a KL penalty"),
    (
        "python -m ppo_lab -m ppo.init_kl_coef=0.05,0.2 ppo.cliprange=0.1,0.2",
        "four runs: a sweep over beta and epsilon",
    ),
    ("python -m ppo_lab.compare outputs/multirun", "runs side by side: table, plots, one page"),
)


def print_page() -> None:
    """Print the page, as wide as the terminal and at most 110 columns."""
    console = Console(highlight=False)
    console.width = min(console.width, 110)
    console.print(page())


def page() -> RenderableType:
    """What there is, what to turn, what to try, and where it goes."""
    return Group(
        Text.assemble(("ppo_lab", "bold"), " trains a language model with PPO, on one machine.\n"),
        Text.assemble(("python -m ppo_lab ", "cyan"), "[GROUP=OPTION ...] [KEY=VALUE ...]"),
        heading("Five commands to try"),
        *(
            Text.assemble((f"  # {what}\n", "dim"), (f"  {command}", "cyan"))
            for command, what in COMMANDS
        ),
        heading("Groups", "GROUP=OPTION, the first is the default"),
        options_table(),
        heading("The most used knobs", "KEY=VALUE, with the values of the embedded default"),
        knobs_table(),
        heading("Where it goes"),
        two_columns(OUTPUTS),
        heading("More"),
        two_columns(MORE),
    )


def print_stage(program: str, purpose: str, settings: Any) -> None:
    """Print the page of a stage before PPO: how it is called, and every key of its own."""
    console = Console(highlight=False)
    console.width = min(console.width, 110)
    table = grid()
    for key, knob in stage_keys(settings):
        table.add_row(f"  {key}", escape(meaning_of(knob)))
    called = Text.assemble((f"python -m {program} ", "cyan"), "[GROUP=OPTION ...] [KEY=VALUE ...]")
    groups = "GROUP=OPTION as of python -m ppo_lab: model, lora"
    console.print(Group(Text(f"{purpose}\n"), called, heading("Keys", groups), table))


def stage_keys(settings: Any, sections: tuple[str, ...] = ("data", "fit")) -> Iterator[Any]:
    """(dotted key, field) of a stage's own settings."""
    for knob in fields(settings):
        if knob.name in sections:
            inner = getattr(settings, knob.name)
            yield from ((f"{knob.name}.{own.name}", own) for own in fields(inner))
        elif meaning_of(knob):
            yield knob.name, knob


OUTPUTS = (
    ("outputs/<date>/<time>/", "one folder a run; hydra.run.dir=FOLDER puts it elsewhere"),
    ("  summary.json", "before and after on held-out prompts, and what the run cost"),
    ("  metrics.jsonl", "one line an iteration: kl, mean_reward, clip_fraction, ..."),
    ("  samples.jsonl", "prompts, responses, scores"),
    ("  model/, checkpoints/", "what PeftModel or AutoModelForCausalLM loads; what resume= takes"),
    ("outputs/multirun/", "the runs of a sweep"),
)
MORE = (
    ("python -m ppo_lab.runs", "what became of each run: finished, running, failed, missing"),
    ("python -m ppo_lab --cfg job", "every key with its value; add overrides to see what they do"),
    ("python -m ppo_lab.plan ...", "what a run would take: memory, seconds, GPUs that it fits"),
    ("python -m ppo_lab.sft", "the stage before: fine-tune a model on texts of your own"),
    ("python -m ppo_lab.reward_model", "and train a reward model on pairs of answers"),
)


def heading(title: str, note: str = "") -> Text:
    """The title of a part of the page."""
    return Text.assemble("\n", (title, "bold yellow"), (f"  {note}" if note else "", "dim"))


def two_columns(rows: tuple[tuple[str, str], ...]) -> Table:
    """Names on the left, what they are on the right."""
    table = grid()
    for left, right in rows:
        table.add_row(f"  {left}", right)
    return table


def grid() -> Table:
    """A table without lines, whose first column never breaks."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    return table


def options_table() -> Table:
    """Every option of the groups that a newcomer chooses from, a line each."""
    table = grid()
    for group, meaning in GROUPS.items():
        table.add_row(f"  [bold]{group}[/]", f"[dim]{meaning}[/]")
        for option in options(group):
            table.add_row(f"    [green]{option.stem}[/]", escape(first_comment(option)))
    return table


def options(group: str) -> list[Path]:
    """The YAML files of a group, its default first."""
    files = sorted((conf_folder() / group).glob("*.yaml"))
    default = f"  - {group}: "
    lines = (conf_folder() / "config.yaml").read_text(encoding="utf-8").splitlines()
    chosen = next(line.removeprefix(default) for line in lines if line.startswith(default))
    return sorted(files, key=lambda file: file.stem != chosen)


def first_comment(file: Path) -> str:
    """The first line of a YAML file that says what it is."""
    lines = file.read_text(encoding="utf-8").splitlines()
    comments = (line.removeprefix("# ") for line in lines if line.startswith("# "))
    return next((line for line in comments if not line.startswith("@package")), "")


def knobs_table() -> Table:
    """The most used keys with their defaults and meanings."""
    table = grid()
    table.add_column(justify="right", style="green", no_wrap=True)
    defaults = embedded_default()
    for key in KNOBS:
        default, meaning = default_and_meaning(key, defaults)
        table.add_row(f"  {key}", default, escape(meaning))
    return table


def embedded_default() -> Any:
    """The configuration that no argument at all composes."""
    from hydra import compose, initialize_config_dir

    register_schema()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose("config")


def default_and_meaning(key: str, section: Any) -> tuple[str, str]:
    """A key's value in a configuration, as the command line writes it, and what the key means."""
    kind: Any = Config()
    *parents, name = key.split(".")
    for parent in parents:
        section, kind = section[parent], getattr(kind, parent)
    knob = next(knob for knob in fields(kind) if knob.name == name)
    value, choices = section[name], bounds_of(knob).get("choices")
    written = str(value).lower() if isinstance(value, bool) else str(value)
    return written, meaning_of(knob) + (f": {', '.join(choices)}" if choices else "")
