"""The page at the end of a run: before and after, the verdict, answers, what lies where."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ppo_lab.console import Console
from ppo_lab.resume import resume_command
from ppo_lab.typed import shell_path, short_path
from ppo_lab.types import Sample

WIDE, NARROW = 110, 60

# A critic that explains a smaller share of the returns' variance is of no use; and the iterations
# after which that is said.
BLIND, SEEN_BY_THEN = 0.1, 20


def visible(text: str, *, limit: int = 300) -> str:
    """Text on one line that no terminal obeys: control characters spelt out, shortened."""
    shown = "".join(_visible_character(character) for character in text[: limit + 1])
    return shown if len(text) <= limit else shown[:limit].rstrip() + "…"


def _visible_character(character: str) -> str:
    if character.isprintable():
        return character
    if character == "\n":
        return "⏎"
    return " " if character.isspace() and character in " \t\u00a0\u3000" else ascii(character)[1:-1]


def number(value: float | None) -> str:
    """A number as people read it: three significant digits, `-` for none, 0 below 0.0001."""
    if value is None or value != value:
        return "-"
    value = 0.0 if abs(value) < 1e-4 else float(value)
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def percent(value: float | None) -> str:
    """A share in per cent, `-` for none."""
    return "-" if value is None or value != value else f"{100 * float(value):.1f} %"


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def verdict(
    summary: Mapping[str, Any], gold_history: Sequence[float] = ()
) -> list[tuple[str, str]]:
    """What the numbers say, each remark with a style: score, gold score, epsilon, critic.

    Gold counts as fallen below its own peak when it lost more than a tenth of what it had gained
    up to there.
    """
    status, steps = summary.get("status", "finished"), summary.get("steps")
    if status != "finished":
        reason = f": {visible(str(summary['reason']))}" if summary.get("reason") else ""
        ended = "failed" if status == "failed" else f"was {status}"
        done = "1 iteration" if steps == 1 else f"{steps or 0} iterations"
        return [(f"the run {ended} after {done}{reason}", "bold red")]
    first, last = _evaluations(summary)
    remarks = [*_about_score(first, last, summary.get("held_out_prompts"))]
    remarks += [*_about_objective(first, last), *_about_gold(first, last, gold_history)]
    remarks += _about_settings(summary.get("train") or {}, steps or 0)
    return remarks


def _about_settings(train: Mapping[str, Any], steps: int) -> Iterator[tuple[str, str]]:
    clipped, explained = train.get("clip_fraction"), train.get("explained_variance")
    if skipped := train.get("skipped_updates"):
        text = (
            f"{number(skipped)} optimizer steps were skipped, in {train['skipped_iterations']} of"
        )
        yield (
            f"{text} {steps} iterations: loss or gradient not finite, or ppo.ratio_threshold",
            "red",
        )
    if clipped is not None and clipped < 0.01:
        text = f"clip_fraction averages {percent(clipped)}: epsilon (ppo.cliprange) never binds"
        yield text, "yellow"
    if explained is not None and explained < BLIND and steps >= SEEN_BY_THEN:
        text = f"the critic explains {percent(max(0.0, explained))} of the returns' variance"
        yield (
            f"{text}: lean on it less (ppo.lam nearer to 1) or start it better (critic=)",
            "yellow",
        )


def _about_score(
    first: Mapping[str, Any], last: Mapping[str, Any], prompts: int | None
) -> Iterator[tuple[str, str]]:
    """How far the score moved, and whether chance may move the mean of so few answers as far: by
    two standard errors of a difference of means.

    That is an upper bound: both evaluations draw with the same noise, and a policy that hardly
    moved gives many an answer twice.
    """
    before, after, spread = (
        first.get("mean_reward"),
        last.get("mean_reward"),
        first.get("std_reward"),
    )
    if before is None or after is None or math.isnan(after - before):
        return
    rise = after - before
    if rise == 0:
        same = spread == last.get("std_reward") == 0 and (prompts or 0) > 1
        text = f"every held-out answer scored {number(before)}: there was nothing to learn from"
        yield text if same else "the held-out score is what it was", "yellow"
        return
    text = f"the held-out score {'rose' if rise > 0 else 'fell'} by {number(abs(rise))}"
    if spread:
        text += f", {abs(rise) / spread:.1f} standard deviations of the scores before"
    if spread and prompts:
        chance = 2 * math.sqrt((spread**2 + (last.get("std_reward") or 0.0) ** 2) / prompts)
        if abs(rise) < chance:
            text += f": no more than chance does with {prompts} prompts (up to {number(chance)})"
            yield (
                f"{text}; judge by more (evaluation.prompts, data.held_out), or train longer",
                "yellow",
            )
            return
    yield text, "bold green" if spread and rise > spread else "green" if rise > 0 else "yellow"


def _about_objective(
    first: Mapping[str, Any], last: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Whether the KL of a score that rose costs more, at the run's own beta, than it rose by."""
    before, after = first.get("objective"), last.get("objective")
    if before is None or after is None:
        return
    if after < before and (last.get("mean_reward") or 0.0) > (first.get("mean_reward") or 0.0):
        yield (
            f"beta times KL exceeds what the score gained: eval/objective fell from "
            f"{number(before)} to {number(after)} (a smaller ppo.learning_rate spends less KL)",
            "yellow",
        )


def _about_gold(
    first: Mapping[str, Any], last: Mapping[str, Any], history: Sequence[float]
) -> Iterator[tuple[str, str]]:
    before, after = first.get("gold"), last.get("gold")
    if before is None or after is None:
        return
    rise = (last.get("mean_reward") or 0.0) - (first.get("mean_reward") or 0.0)
    peak = max([before, after, *history])
    if rise <= 0:  # nothing was optimised, so nothing was over-optimised
        if rise < 0 and after < before and number(after) != number(before):
            yield f"gold fell with it, from {number(before)} to {number(after)}", "yellow"
    elif number(after) == number(before) == number(peak):
        yield f"gold is what it was, {number(after)}", "yellow"
    elif after < before and number(after) != number(before):
        text = f"proxy rose, gold fell from {number(before)} to {number(after)}: reward hacking"
        yield f"{text} (a larger ppo.init_kl_coef holds it back)", "bold red"
    elif peak - after > 0.1 * (peak - before):
        yield (
            f"gold fell below its own peak, {number(peak)} to {number(after)}: over-optimised",
            "red",
        )
    else:
        yield f"gold rose with it, from {number(before)} to {number(after)}", "green"


def _evaluations(summary: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    found = summary.get("eval") or {}
    return found.get("first") or {}, found.get("last") or {}


def summary_page(
    summary: Mapping[str, Any],
    samples: Sequence[Sample],
    folder: Path,
    commands: Sequence[str] = (),
    *,
    gold_history: Sequence[float] = (),
    width: int = 80,
) -> RenderableType:
    """The page at the end of a run: before and after, the verdict, three answers, what is where.

    `summary` is what summary.json holds; `commands` are shown as worth trying next.
    """
    status = summary.get("status", "finished")
    parts: list[RenderableType] = [Rule(Text(f"{status}: {short_path(folder)}"))]
    if _evaluations(summary)[0]:
        figures = _before_and_after(summary, narrow=width < NARROW)
        parts += [figures, Text(_costs(summary), style="dim"), ""]
    parts.append(_remarks(verdict(summary, gold_history)))
    parts += [part for sample in samples[:3] for part in ("", _answers(sample, wide=width >= WIDE))]
    parts += ["", _places(folder), "", Text("try next", style="bold")]
    parts += [
        Text(f"  {command}", no_wrap=True, overflow="ignore")
        for command in commands or next_commands(folder, status)
    ]
    return Group(*parts)


def print_summary(
    summary: Mapping[str, Any],
    samples: Sequence[Sample],
    folder: Path,
    commands: Sequence[str] = (),
    *,
    gold_history: Sequence[float] = (),
    console: Console | None = None,
) -> None:
    """Print the summary page."""
    console = console or Console(highlight=False)
    spell_out_missing_letters(console)
    page = summary_page(
        summary, samples, folder, commands, gold_history=gold_history, width=console.width
    )
    console.print(page, crop=False)  # a terminal wraps what must not be cut


def _remarks(remarks: Sequence[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 1))
    for text, style in remarks:
        table.add_row("*", Text(text, style=style))
    return table


_ROWS = (
    ("mean_reward", number),
    ("std_reward", number),
    ("gold", number),
    ("kl", number),
    ("response_length", number),
    ("distinct_2", number),
)


def _before_and_after(summary: Mapping[str, Any], *, narrow: bool) -> Table:
    """The held-out figures; the spread of scores beside their mean, or in a row of its own."""
    first, last = _evaluations(summary)
    table = Table(
        box=None, pad_edge=False, header_style="bold", padding=(0, 1 if narrow else 3, 0, 0)
    )
    count = summary.get("held_out_prompts")
    table.add_column(f"{count} held-out prompts" if count else "held-out prompts", overflow="fold")
    for title in ("before", "after", "change"):
        table.add_column(title, justify="right", overflow="fold")
    for name, shown in _ROWS:
        before, after = first.get(name), last.get(name)
        if (before is None and after is None) or (name == "std_reward" and not narrow):
            continue
        change = None if before is None or after is None else after - before
        spread = [
            f" ± {number(side['std_reward'])}"
            if name == "mean_reward" and side.get("std_reward") is not None and not narrow
            else ""
            for side in (first, last)
        ]
        signed = "" if change is None else f"{'+' if change >= 0 else ''}{number(change)}"
        table.add_row(name, shown(before) + spread[0], shown(after) + spread[1], signed)
    return table


def _costs(summary: Mapping[str, Any]) -> str:
    train = summary.get("train") or {}
    costs: list[tuple[str, Any, Callable[[Any], str]]] = [
        ("clip_fraction", train.get("clip_fraction"), percent),
        ("tokens/s", summary.get("tokens_per_second"), number),
        ("time", summary.get("wall_s"), duration),
        ("peak memory", summary.get("peak_memory_gb"), lambda value: f"{number(value)} GB"),
    ]
    told = "   ".join(f"{name} {shown(value)}" for name, value, shown in costs if value is not None)
    layers = summary.get("layers")
    return f"{told}\npasses through {layers} layers" if layers else told


def _answers(sample: Sample, *, wide: bool) -> RenderableType:
    """One prompt with both answers: side by side where there is room."""
    prompt = Text(visible(sample.prompt), style="bold")
    texts = [_answer("policy", sample.response, sample.score, sample.gold, "cyan")]
    if sample.reference_response is not None:
        response, score, gold = (
            sample.reference_response,
            sample.reference_score,
            sample.reference_gold,
        )
        texts.insert(0, _answer("reference", response, score, gold, "dim"))
    if not wide:
        return Group(prompt, *(Padding(text, (0, 0, 0, 2), expand=False) for text in texts))
    grid = Table.grid(padding=(0, 2), expand=True)
    for _ in texts:
        grid.add_column(ratio=1)
    grid.add_row(*texts)
    return Group(prompt, Padding(grid, (0, 0, 0, 2)))


def _answer(who: str, response: str, score: float | None, gold: float | None, style: str) -> Text:
    judged = f"score {number(score)}" + (f", gold {number(gold)}" if gold is not None else "")
    return Text.assemble((f"{who} ({judged}): ", style), visible(response))


_PLACES = {
    "metrics.jsonl": "every metric, a line an iteration",
    "samples.jsonl": "prompts and answers",
    "summary.json": "these figures",
    "model": "the trained model or adapter",
    "checkpoints": "to resume from",
    "wandb": "what W&B holds",
    "tensorboard": "what TensorBoard shows",
    "profile": "a trace of some iterations",
    ".hydra": "the composed config",
}


def _places(folder: Path) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for name, meaning in _PLACES.items():
        path = folder / name
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            table.add_row(Text(f"  {name}"), Text(meaning, style="dim"))
    where = Text("in ", style="bold").append(short_path(folder))
    where.no_wrap, where.overflow = True, "ignore"
    return Group(where, table)


def next_commands(folder: Path, status: str = "finished") -> list[str]:
    """Commands worth trying after this run."""
    commands, wandb = [] if status == "finished" else [resume_command(folder)], folder / "wandb"
    if find_spec("ppo_lab.compare"):
        commands.append(f"python -m ppo_lab.compare {shell_path(folder)}")
    commands.append("python -m ppo_lab -m ppo.init_kl_coef=0.05,0.2 ppo.cliprange=0.1,0.2")
    if wandb.is_dir():
        commands.append(f"wandb leet {shell_path(wandb)}")
    return commands


def spell_out_missing_letters(console: Console) -> None:
    """Where the output's encoding lacks a letter, spell it out."""
    if isinstance(console.file, io.TextIOWrapper):
        console.file.reconfigure(errors="backslashreplace")
