"""What is wrong with the overrides of a command, against the groups of `conf` and the schema.

Hydra stops at the first key it does not know and says nothing of values out of range. So each
override is first read by itself and held against the schema, then the composed configuration
against the rules.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from ppo_lab.config import TYPED, conf_folder, meaning_of
from ppo_lab.errors import ConfigError, suggestion
from ppo_lab.on_disk import unwritable
from ppo_lab.processes import launch as processes
from ppo_lab.rules import TYPE_NAMES, allowed

Check = Callable[[Any, frozenset[str]], list[str]]

MOST_RUNS_CHECKED = 512
# Launchers and sweepers -> (the plugin's package, the extra that installs it).
PLUGINS = {
    "joblib": ("hydra_joblib_launcher", "joblib"),
    "submitit_local": ("hydra_submitit_launcher", "slurm"),
    "submitit_slurm": ("hydra_submitit_launcher", "slurm"),
    "slurm_gpu": ("hydra_submitit_launcher", "slurm"),
    "slurm_node": ("hydra_submitit_launcher", "slurm"),
    "slurm_nodes": ("hydra_submitit_launcher", "slurm"),
    "ray": ("hydra_ray_launcher", "ray"),
    "ray_gpu": ("hydra_ray_launcher", "ray"),
    "optuna": ("hydra_optuna_sweeper", "optuna"),
}
ALIASES = {
    "beta": "ppo.init_kl_coef",
    "kl_coef": "ppo.init_kl_coef",
    "epsilon": "ppo.cliprange",
    "clip_range": "ppo.cliprange",
    "lr": "ppo.learning_rate",
    "value_learning_rate": "critic.learning_rate",
    "v_head_init": "critic.v_head_init",
    "v_head_init_std": "critic.v_head_init_std",
    "critic_learning_rate": "critic.learning_rate",
    "critic_warmup": "critic.warmup_steps",
    "value_model_path": "critic.path",
    "epochs": "ppo.ppo_epochs",
    "num_ppo_epochs": "ppo.ppo_epochs",
    "iterations": "ppo.steps",
    "total_episodes": "ppo.steps",
    "response_length": "generation.max_new_tokens",
    "model_name_or_path": "model.path",
    "reward_model_path": "reward.path",
    "output_dir": "hydra.run.dir",
}


@contextmanager
def a_hydra(config_dir: str | None = None) -> Iterator[Hydra]:
    """A Hydra that composes from `conf`, and from one more folder where there is one."""
    search_path = create_config_search_path(str(conf_folder()))
    if config_dir is not None:
        folder = Path(config_dir).absolute()
        if not folder.is_dir():
            raise ConfigError(f"--config-dir {config_dir}: no such folder")
        where = SearchPathQuery(provider="schema")
        search_path.prepend(provider="command-line", path=f"file://{folder}", anchor=where)
    hydra.version.setbase("1.3")
    GlobalHydra.instance().clear()
    try:
        yield Hydra.create_main_hydra2("ppo_lab", search_path)
    finally:
        GlobalHydra.instance().clear()


class CommandReader:
    """Reads overrides against the groups of `conf` and the schema."""

    def __init__(self, composer: Hydra, config_name: str, check: Check) -> None:
        """A reader for one primary config; `check` gives the problems of a composed one."""
        self.composer, self.config_name, self.check = composer, config_name, check
        self.loader = composer.config_loader
        self.parser = OverridesParser.create(config_loader=self.loader)
        self.composed: dict[tuple[str, ...], DictConfig] = {}
        self.options = cache(self.loader.get_group_options)  # Hydra takes long over each question

    def problems(self, texts: list[str], *, multirun: bool = False) -> list[str]:
        """Everything wrong with these overrides, over all runs of a sweep, each said once."""
        found: list[str] = []
        overrides = self._parsed(texts, found)
        self._look_where_told(overrides)
        multirun = multirun or "hydra.mode=MULTIRUN" in texts
        if multirun and processes.is_launched():
            return ["-m: several processes make one run together; launch each run by itself"]
        if not multirun:
            swept = [o for o in overrides if o.is_sweep_override()]
            found += [f"{o.input_line}: several values need -m: ppo_lab -m ..." for o in swept]
            overrides = [o for o in overrides if o not in swept]
        else:
            found += [
                f"{o.input_line}: is one run's, and not of all runs of a sweep; leave it out"
                for o in overrides
                if o.key_or_group == "tracking.id" and not o.is_sweep_override()
            ]
        runs = list(self._runs(overrides, found)) if multirun else [overrides]
        if not runs:
            found.append("-m: the sweep has no runs; one of its keys has no values")
        for run in runs:
            found += self._run_problems(run)
        return list(dict.fromkeys(found)) or self._final_problems(runs, multirun)

    def configurations(
        self, texts: list[str], *, multirun: bool = False
    ) -> Iterator[tuple[list[str], Any, int]]:
        """What each run changes, its configuration and how often it comes; see `configurations`."""
        overrides = self._parsed(texts, [])
        self._look_where_told(overrides)
        swept = multirun or "hydra.mode=MULTIRUN" in texts
        for run in self._runs(overrides, [], most=None) if swept else [overrides]:
            config = self._compose(tuple(map(_text, run)))
            trials = int(OmegaConf.select(config, "hydra.sweeper.n_trials") or 1) if swept else 1
            with open_dict(config):
                config.pop("hydra")
            yield [_text(o) for o in run], OmegaConf.to_object(config), trials

    def _parsed(self, texts: list[str], found: list[str]) -> list[Override]:
        overrides = []
        for text in texts:
            try:
                (override,) = self.parser.parse_overrides([text])
                if not override.key_or_group:
                    raise ValueError(text)
                overrides.append(override)
            except Exception:  # the grammar's errors are of many kinds, all of the user's making
                found.append(f"{text}: cannot be read; must be key=value{_grammar_hint(text)}")
        return overrides

    def _look_where_told(self, overrides: list[Override]) -> None:
        """Know the options in the folders of `hydra.searchpath`, as Hydra will once it composes."""
        loader: Any = self.loader
        with suppress(Exception):  # of no list and the like, composing tells
            loader._process_config_searchpath(self.config_name, overrides, loader.repository)

    def _runs(
        self, overrides: list[Override], found: list[str], most: int | None = MOST_RUNS_CHECKED
    ) -> Iterator[list[Override]]:
        """The overrides of each run of a sweep, the first `most`; of a search, of one run."""
        if any(o.key_or_group == "hydra/sweeper" for o in overrides):
            yield self._parsed([_one_of(override) for override in overrides], found)
            return
        try:
            batches = BasicSweeper.split_arguments(overrides, max_batch_size=None)
        except Exception as error:
            found.append(_first_line(error))
            return
        for texts in batches[0][:most]:
            yield self._parsed(texts, found)

    def _run_problems(self, overrides: list[Override]) -> list[str]:
        chosen = [o for o in overrides if self._is_group(o)]
        said = [list(self._option_problems(o)) for o in chosen]
        found = [line for lines in said for line in lines]
        options = tuple(_text(o) for o, lines in zip(chosen, said, strict=True) if not lines)
        try:
            if options not in self.composed:
                self.composed[options] = self._compose(options)
        except Exception as error:
            return [*found, _first_line(error)]
        config = copy.deepcopy(self.composed[options])
        unknown = _unknown([o for o, lines in zip(chosen, said, strict=True) if lines])
        settings = [
            o for o in overrides if o not in chosen and not o.key_or_group.startswith(unknown)
        ]
        found += [line for o in settings for line in self._setting_problems(config, o)]
        stated = frozenset(o.get_key_element().lstrip("+~") for o in [*chosen, *settings])
        return found + _composed_problems(config, self.check, stated)

    def _final_problems(self, runs: list[list[Override]], multirun: bool) -> list[str]:
        """What Hydra itself says of a whole command, and whether its folder can be written."""
        key = "hydra.sweep.dir" if multirun else "hydra.run.dir"
        try:
            for run in runs[:1]:
                config = self._compose(tuple(map(_text, run)))
                return list(unwritable(key, str(OmegaConf.select(config, key))))
        except Exception as error:
            return [_first_line(error)]
        return []

    def _compose(self, texts: tuple[str, ...]) -> DictConfig:
        return self.composer.compose_config(
            self.config_name,
            list(texts),
            RunMode.RUN,
            with_log_configuration=False,
            from_shell=False,
        )

    def _is_group(self, override: Override) -> bool:
        return self.loader.repository.group_exists(override.key_or_group)  # type: ignore[attr-defined]

    def _option_problems(self, override: Override) -> Iterator[str]:
        """What is wrong with the choice of an option of a group."""
        if override.is_delete():
            yield from self._removal_problems(override)
            return
        value, options = override.value(), self.options(override.key_or_group)
        if override.key_or_group == "accelerate":
            yield (
                f"{override.input_line}: is for the launcher: accelerate launch --config_file "
                f"conf/accelerate/{value}.yaml -m ppo_lab ..."
            )
            return
        if extra := _missing_extra(override):
            yield f"{override.input_line}: needs an extra: pip install 'ppo_lab[{extra}]'"
        elif not isinstance(value, str) or value not in options:
            near = suggestion(str(value), options)
            listed = ", ".join(options)
            yield f"{override.input_line}: no such option; must be one of {listed}{near}"

    def _removal_problems(self, override: Override) -> Iterator[str]:
        """A group is never empty: its schema's defaults would stand where an option was. So would
        what a sum of rewards says of a part.
        """
        group = override.key_or_group
        if group == "reward" and override.package is not None:
            yield f"{override.input_line}: a part is taken out by its key: ~{override.package}"
        elif override.package is None and group != "experiment" and not group.startswith("hydra/"):
            options = self.options(group)
            off = f"{group}=none" if "none" in options else "one of " + ", ".join(options)
            yield f"{override.input_line}: a group cannot be left out; choose {off}"

    def _setting_problems(self, config: DictConfig, override: Override) -> Iterator[str]:
        """What is wrong with the value of a key; where nothing is, the key is set."""
        key, text = override.key_or_group, override.input_line
        parent = _select(config, key.rpartition(".")[0])
        is_open = OmegaConf.is_config(parent) and not is_dataclass(OmegaConf.get_type(parent))
        exists = isinstance(parent, DictConfig) and key.rpartition(".")[2] in parent
        if override.package is not None or not (exists or is_open):
            yield f"{text}: no such key{self._nearest(config, key)}"
        elif override.is_delete():
            if not is_open:
                yield f"{text}: a key cannot be removed; give it its off value"
            elif exists:
                with open_dict(parent):
                    parent.pop(key.rpartition(".")[2])
        elif override.is_add() and exists and not isinstance(override.value(), (dict, list)):
            yield f"{text}: the key is there already; leave out the +"
        else:
            yield from _set(config, parent, override)

    def _nearest(self, config: DictConfig, key: str) -> str:
        """The key, or the group, that an unknown key was probably meant to be."""
        section, _, last = key.rpartition(".")
        if ALIASES.get(last, key) != key:
            return f"; did you mean {ALIASES[last]}?"
        for group, types in TYPED.items():
            having = [name for name, kind in types.items() if last in _names(kind)]
            if section == group and having:
                return (
                    f" in this {group}; "
                    + ", ".join(f"{group}={name}" for name in having)
                    + " has it"
                )
        keys = list(_keys(config))
        groups = [g for g in self.loader.list_groups("") if g not in ("hydra", "schema")]
        same = [valid for valid in keys if valid.rpartition(".")[2] == last]
        siblings = [valid for valid in [*keys, *groups] if valid.rpartition(".")[0] == section]
        near = suggestion(last, [valid.rpartition(".")[2] for valid in siblings])
        if near and section:
            return near.replace("did you mean ", f"did you mean {section}.")
        return near or (f"; did you mean {same[0]}?" if same else suggestion(key, keys, cutoff=0.8))


def _text(override: Override) -> str:
    """An override as it was typed."""
    return override.input_line or ""


def _unknown(refused: list[Override]) -> tuple[str, ...]:
    """The sections whose keys depend on a choice that was refused, so that none can be judged."""
    groups = [o.key_or_group for o in refused if o.package is None]
    typed = [group for group in groups if group in TYPED or group.startswith("hydra/")]
    return tuple(f"{group.replace('/', '.')}." for group in typed)


def _names(section: type) -> list[str]:
    return [knob.name for knob in fields(section)]


def _keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a configuration, but for Hydra's own."""
    for name in map(str, config):
        if prefix or name != "hydra":
            yield f"{prefix}{name}"
            inner = _select(config, name)
            if isinstance(inner, DictConfig):
                yield from _keys(inner, f"{prefix}{name}.")


def _select(config: DictConfig, key: str) -> Any:
    """The node at a dotted key, or None where there is none."""
    try:
        return OmegaConf.select(config, key) if key else config
    except Exception:  # a broken interpolation, or no key at all
        return None


def _set(config: DictConfig, parent: Any, override: Override) -> Iterator[str]:
    """Set a key that exists, or say what its value should have been."""
    key, value = override.key_or_group, override.value()
    add = override.is_add() or override.is_force_add()
    try:
        OmegaConf.update(config, key, value, merge=True, force_add=add)
    except (ConfigAttributeError, ConfigKeyError):
        yield f"{override.input_line}: a new entry needs a +: +{override.input_line}"
    except Exception as error:
        expected = _expected(parent, key.rpartition(".")[2])
        yield f"{override.input_line}: {expected or _first_line(error)}"


def _expected(parent: Any, name: str) -> str:
    """What a field holds, in words; empty where its section is no dataclass."""
    section = OmegaConf.get_type(parent)
    if not is_dataclass(section):
        return ""
    knob = next(knob for knob in fields(section) if knob.name == name)
    kind = get_type_hints(section)[name]
    if is_dataclass(kind):
        return "is a section; set its keys one by one"
    words = TYPE_NAMES.get(kind, "a list: [a,b]" if "list" in str(kind) else "a mapping: {a: 1}")
    legal = f", {allowed(knob)}" if allowed(knob) else ""
    return f"must be {words}{legal} ({meaning_of(knob) or name})"


def _composed_problems(config: DictConfig, check: Check, stated: frozenset[str]) -> list[str]:
    """What the rules say of a composed configuration."""
    with open_dict(config):
        config.pop("hydra")
    try:
        return check(OmegaConf.to_object(config), stated)
    except Exception as error:
        return [_first_line(error)]


def _missing_extra(override: Override) -> str:
    """The extra of this project that brings a launcher or sweeper, where it is not installed."""
    is_plugin = override.key_or_group in ("hydra/launcher", "hydra/sweeper")
    plugin, extra = PLUGINS.get(str(override.value()), ("", "")) if is_plugin else ("", "")
    found = find_spec("hydra_plugins") and find_spec(f"hydra_plugins.{plugin}")
    return "" if found else extra


def _one_of(override: Override) -> str:
    """An override with one value, the first, of those that a search may choose from."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        return f"{override.get_key_element()}={value.start}"
    if override.is_sweep_override():
        return f"{override.get_key_element()}={next(override.sweep_string_iterator())}"
    return str(override.input_line)


def _grammar_hint(text: str) -> str:
    """How to write a value that holds what Hydra's grammar takes for its own."""
    key, equals, value = text.partition("=")
    if not equals:
        return ""
    quoted = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"; quote a text with special characters: \"{key}='{quoted}'\""


def _first_line(error: Exception) -> str:
    """What an error says, without the lines that explain it to programmers."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith(("full_key:", "object_type", "See "))]
    return " ".join(said[:2]) or type(error).__name__
