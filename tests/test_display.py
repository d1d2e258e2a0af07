from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ppo_lab import summary
from ppo_lab.console import plain_warnings
from ppo_lab.display import TerminalTracker, has_terminal
from ppo_lab.summary import (
    duration,
    next_commands,
    number,
    percent,
    print_summary,
    verdict,
    visible,
)
from ppo_lab.tracking import Composite
from ppo_lab.types import Sample

METRICS = {"kl": 3.2, "mean_reward": 0.51, "clip_fraction": 0.123, "tokens_per_second": 2345.6}
SAMPLES = [
    Sample(f"Question {i}?", "Of course. Thank you!", 2.0, "No.", -1.0, 0.9, 0.1) for i in range(5)
]


def run(**changes: Any) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "status": "finished",
        "steps": 20,
        "eval": {
            "first": {"mean_reward": -0.5, "std_reward": 0.8, "kl": 0.0, "gold": 0.2},
            "last": {"mean_reward": 1.5, "std_reward": 0.4, "kl": 4.2, "gold": 0.9},
        },
        "train": {"clip_fraction": 0.08},
        "wall_s": 161.0,
    }
    for path, value in changes.items():
        *groups, name = path.split("__")
        place = summary
        for group in groups:
            place = place[group]
        place[name] = value
    return summary


def page(summary: dict, samples: list[Sample] = SAMPLES, *, width: int = 80, **kwargs: Any) -> str:
    out = io.StringIO()
    folder = kwargs.pop("folder", Path("outputs/now"))
    console = Console(file=out, width=width)
    print_summary(summary, samples, folder, console=console, **kwargs)
    return out.getvalue()


def remarks(summary: dict, gold: tuple[float, ...] = ()) -> str:
    return "\n".join(text for text, _ in verdict(summary, gold))


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Console:
    for name in ("CI", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return Console(file=io.StringIO(), force_terminal=True, width=80)


def tracker(tmp_path: Path, console: Console, steps: int = 10) -> TerminalTracker:
    return TerminalTracker(total_steps=steps, folder=tmp_path, console=console)


def test_without_a_terminal_progress_is_plain_lines(tmp_path):
    out = io.StringIO()
    shown = tracker(tmp_path, Console(file=out, width=80), steps=2)
    shown.log(METRICS, 1)
    shown.log({**METRICS, "eval/mean_reward": 0.9, "eval/gold": 0.5}, 2)
    lines = out.getvalue().splitlines()
    first = "kl 3.2  mean_reward 0.51  clip_fraction 12.3 %  tokens/s 2,346"
    assert lines[0].startswith(f"iteration 1/2  {first}  0:00 left")
    assert lines[1] == "iteration 2, held-out prompts:  mean_reward 0.9  gold 0.5"
    assert lines[2].startswith("iteration 2/2")
    assert "\x1b" not in out.getvalue()


def test_fast_iterations_do_not_flood_a_log_and_the_last_is_always_shown(tmp_path):
    out = io.StringIO()
    shown = tracker(tmp_path, Console(file=out, width=80), steps=300)
    for step in range(1, 301):
        shown.log(METRICS, step)
    steps = [int(step) for step in re.findall(r"^iteration (\d+)/", out.getvalue(), re.MULTILINE)]
    assert steps == [1, 300]


def test_slow_iterations_have_a_line_each(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("ppo_lab.display.time.monotonic", lambda: now[0])
    out = io.StringIO()
    shown = tracker(tmp_path, Console(file=out, width=80), steps=5)
    for step in range(1, 6):
        now[0] += 3.0
        shown.log(METRICS, step)
    lines = out.getvalue().splitlines()
    assert len(lines) == 5
    assert lines[0].endswith("0:12 left")
    assert lines[-1].endswith("0:00 left")


def test_the_time_left_follows_an_iteration_that_took_long_by_a_fifth(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("ppo_lab.display.time.monotonic", lambda: now[0])
    out = io.StringIO()
    shown = tracker(tmp_path, Console(file=out, width=80), steps=102)
    for step, seconds in ((1, 2.0), (2, 12.0)):
        now[0] += seconds
        shown.log(METRICS, step)
        shown.log({"eval/mean_reward": 0.9}, step)  # no iteration, and no time of one
    lines = [line for line in out.getvalue().splitlines() if "/102" in line]
    assert [line.split()[-2] for line in lines] == ["3:22", "6:40"]


def test_in_a_terminal_the_display_is_redrawn_in_place_and_leaves_the_page(tmp_path, terminal):
    shown = tracker(tmp_path, terminal)
    for step in range(1, 11):
        shown.log(METRICS, step)
    shown.say("W&B: offline [not markup]")
    shown.log_samples(SAMPLES, 10)
    shown.finish("finished", run())
    text = terminal.file.getvalue()
    assert "10/10" in text
    assert "\x1b[?25l" in text
    assert text.rindex("\x1b[?25h") < text.index("Question 0?")
    assert "W&B: offline [not markup]" in text
    assert "rose by 2" in text


def test_the_bar_of_a_resumed_run_begins_where_the_run_goes_on(tmp_path, terminal):
    """L-04: and not at 0 until the first iteration is done."""
    shown = TerminalTracker(total_steps=10, folder=tmp_path, first_step=7, console=terminal)
    shown.finish("preempted", run())
    text = terminal.file.getvalue()
    assert " 7/10" in text
    assert " 0/10" not in text


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb"), ("CI", "true")])
def test_what_cannot_or_will_not_redraw_gets_plain_lines(terminal, monkeypatch, name, value):
    assert has_terminal(terminal)
    monkeypatch.setenv(name, value)
    assert not has_terminal(Console(file=io.StringIO(), force_terminal=True))


def test_colours_in_a_file_are_coloured_lines_and_no_live_display(tmp_path, monkeypatch):
    for name in ("CI", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = io.StringIO()
    shown = tracker(tmp_path, Console(file=out, width=40), steps=2)
    shown.log(METRICS, 2)
    (line,) = out.getvalue().splitlines()
    assert "\x1b[?25l" not in line
    assert "\x1b[1;36m3.2" in line
    plain = re.sub(r"\x1b\[[\d;]*m", "", line)
    assert plain.startswith("iteration 2/2  kl 3.2  mean_reward 0.51  clip_fraction 12.3 %")


def test_a_closed_pipe_stops_nothing(tmp_path):
    out = io.StringIO()
    shown = tracker(tmp_path, Console(file=out, width=80))
    out.close()
    shown.say("nobody hears this")


@pytest.mark.parametrize("colours", ["", "1"])
def test_a_reader_that_goes_stops_nothing(tmp_path, monkeypatch, colours):
    monkeypatch.setenv("FORCE_COLOR", colours)
    read, write = os.pipe()
    with os.fdopen(write, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        told = Composite([TerminalTracker(total_steps=2, folder=tmp_path)])
        os.close(read)
        told.log(METRICS, 1)
        told.log(METRICS, 2)
        told.finish("finished", run())


def test_a_program_whose_reader_has_gone_ends_without_a_word():
    """As under `| head -1`: what is left in buffers is not complained of at the end either."""
    code = (
        "from ppo_lab.console import Console\n"
        "console = Console()\n"
        "input()\n"
        "for _ in range(3): console.print('x' * 9000)\n"
        "print('the end')\n"
    )
    command = [sys.executable, "-c", code]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, text=True, **pipes) as process:
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.flush()
        said = process.stderr.read()
    assert (process.returncode, said) == (0, "")


def test_a_resumed_run_counts_from_where_it_was(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("ppo_lab.display.time.monotonic", lambda: now[0])
    out = io.StringIO()
    console = Console(file=out, width=80)
    shown = TerminalTracker(total_steps=100, folder=tmp_path, first_step=90, console=console)
    now[0] = 4.0
    shown.log(METRICS, 91)
    assert out.getvalue().endswith("0:36 left\n")


def test_the_page_tells_before_and_after_and_three_answers():
    text = page(run())
    assert re.search(r"mean_reward +-0.5 ± 0.8 +1.5 ± 0.4 +\+2", text)
    assert re.search(r"kl +0 +4.2 +\+4.2", text)
    assert "Question 2?" in text
    assert "Question 3?" not in text
    assert "reference (score -1, gold 0.1): No." in text
    assert "policy (score 2, gold 0.9): Of course. Thank you!" in text
    assert "python -m ppo_lab -m ppo.init_kl_coef=" in text


def test_the_page_tells_by_how_many_prompts_it_judges():
    """Fewer than evaluation.prompts, where no more are held out."""
    assert "10 held-out prompts " in page(run(held_out_prompts=10))


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_the_page_fits_the_terminal(width):
    long = Sample("Why? " * 40, "Because. " * 60, 1.0, "No. " * 50, 0.0)
    text = page(run(), [long], width=width)
    commands = text.index("try next")
    assert max(len(line) for line in text[:commands].splitlines()) <= width


@pytest.mark.parametrize("width", [20, 40, 80])
def test_no_terminal_is_too_narrow_for_a_command(width):
    folder = Path("outputs") / ("a_rather_long_name_for_the_folder_of_a_run_" * 3)
    lines = page(run(), width=width, folder=folder).splitlines()
    for command in next_commands(folder):
        assert f"  {command}" in lines
    assert f"in {folder}" in lines


@pytest.mark.parametrize("width", [40, 50, 59, 60, 80])
def test_no_terminal_is_too_narrow_for_a_number(width):
    first = {"mean_reward": -1234.5, "std_reward": 1.21, "kl": 0.0, "response_length": 8.0}
    last = {"mean_reward": 4.52, "std_reward": 1.19, "kl": 0.0366, "response_length": 7.93}
    text = page(run(eval__first=first, eval__last=last), width=width)
    lines = text[: text.index("clip_fraction")].splitlines()[1:]
    for shown in ("-1,234", "1.21", "4.52", "1.19", "0.0366", "7.93", "+1,239"):
        assert any(shown in line.split() for line in lines)
    spread = [line for line in lines if "1.21" in line]
    assert len(spread) == 1
    assert "±" in spread[0] or spread[0].startswith("std_reward")


def test_what_a_model_writes_cannot_command_the_terminal_or_the_markup():
    evil = "[bold]hi[/bold] \x1b[2J\x00\x07\r\n\u202e[/] :smile:"
    text = page(run(), [Sample(evil, evil, 1.0, evil, 0.0)])
    assert "[bold]hi[/bold] \\x1b[2J\\x00\\x07\\r⏎\\u202e[/] :smile:" in text
    assert not set(text) & set("\x1b\x00\x07\r\u202e")


def test_text_on_a_page_is_one_line_and_not_endless():
    assert visible("a\tb\u00a0c") == "a b c"
    assert visible("x" * 500, limit=10) == "x" * 10 + "…"
    assert visible("\ud800é🙂") == "\\ud800é🙂"


def test_letters_that_the_output_lacks_are_spelt_out():
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"), width=80)
    print_summary(run(), [Sample("é?", "♥", 1.0)], Path("outputs/now"), console=console)
    console.file.flush()
    assert b"\\xe9?" in raw.getvalue()


def test_a_rise_is_measured_in_standard_deviations_of_the_scores_before():
    assert "rose by 2, 2.5 standard deviations" in remarks(run())
    assert "fell by 0.4" in remarks(run(eval__last__mean_reward=-0.9))


def test_a_move_that_chance_makes_too_is_no_rise():
    # Two standard errors: 2 sqrt((0.8^2 + 0.6^2) / 64) = 0.25.
    measured = {"held_out_prompts": 64, "eval__last__std_reward": 0.6}
    by_chance = verdict(run(eval__last__mean_reward=-0.26, **measured))
    assert "rose by 0.24" in by_chance[0][0]
    assert "no more than chance does with 64 prompts (up to 0.25)" in by_chance[0][0]
    assert by_chance[0][1] == "yellow"
    assert "chance" in remarks(run(eval__last__mean_reward=-0.74, **measured))
    assert "chance" not in remarks(run(eval__last__mean_reward=-0.24, **measured))
    assert "chance" not in remarks(run(eval__last__mean_reward=-0.26))  # of an older run


def test_a_reward_that_tells_no_answers_apart_is_named():
    same = {"eval__last__mean_reward": -0.5, "held_out_prompts": 64}
    never = run(eval__first__std_reward=0.0, eval__last__std_reward=0.0, **same)
    assert "every held-out answer scored -0.5: there was nothing to learn from" in remarks(never)
    assert "the held-out score is what it was" in remarks(run(**same))
    one = never | {"held_out_prompts": 1}
    assert "the held-out score is what it was" in remarks(one)


def test_kl_that_costs_more_than_the_score_gained_is_said():
    dear = run(eval__first__objective=-0.5, eval__last__objective=-0.6)
    assert "eval/objective fell from -0.5 to -0.6" in remarks(dear)
    assert "objective" not in remarks(run(eval__first__objective=-0.5, eval__last__objective=0.66))
    fell = run(
        eval__first__objective=-0.5, eval__last__objective=-2.0, eval__last__mean_reward=-0.9
    )
    assert "objective" not in remarks(fell)  # the score says it


def test_proxy_up_and_gold_down_is_called_reward_hacking():
    assert "reward hacking" in remarks(run(eval__last__gold=0.1))
    assert "reward hacking" not in remarks(run())
    assert "reward hacking" not in remarks(run(eval__last__gold=0.1, eval__last__mean_reward=-1.0))


def test_gold_that_stands_still_or_falls_with_the_score_is_neither_risen_nor_over_optimised():
    same = run(eval__first__gold=-0.3001, eval__last__gold=-0.3)
    assert "gold is what it was, -0.3" in remarks(same)
    assert "gold" not in remarks(run(eval__last__mean_reward=-0.5))
    fell = remarks(run(eval__last__mean_reward=-0.9, eval__last__gold=0.1), (0.5,))
    assert "gold fell with it, from 0.2 to 0.1" in fell
    assert "over-optimised" not in fell
    assert "below its own peak, 0.5 to 0.2" in remarks(run(eval__last__gold=0.2), (0.5,))


def test_gold_below_its_own_peak_is_said():
    assert "below its own peak, 1.4 to 0.9" in remarks(run(), (0.2, 1.4, 1.0))
    assert "peak" not in remarks(run(), (0.2, 0.92, 0.9))


def test_an_epsilon_that_never_binds_is_said():
    assert "never binds" in remarks(run(train__clip_fraction=0.009))
    assert "never binds" not in remarks(run(train__clip_fraction=0.011))


def test_updates_that_were_skipped_are_told_on_the_page_and_only_then():
    said = remarks(run(train__skipped_updates=16, train__skipped_iterations=2, steps=2))
    assert "16 optimizer steps were skipped, in 2 of 2 iterations" in said
    assert "skipped" not in remarks(run(train__skipped_updates=0, train__skipped_iterations=0))
    assert "skipped" not in remarks(run())


def test_a_critic_that_sees_nothing_is_said_once_it_should_see():
    assert "critic explains 6.0 % of" in remarks(run(train__explained_variance=0.06))
    assert "critic explains 0.0 % of" in remarks(run(train__explained_variance=-0.3))
    assert "critic" not in remarks(run(train__explained_variance=0.11))
    assert "critic" not in remarks(run(train__explained_variance=0.06, steps=19))
    assert "critic" not in remarks(run())


@pytest.mark.parametrize(
    ("status", "said"), [("failed", "the run failed"), ("preempted", "the run was preempted")]
)
def test_a_run_that_did_not_finish_has_no_verdict(status, said):
    text = remarks(run(status=status, reason="loss is NaN"))
    assert text == f"{said} after 20 iterations: loss is NaN"
    assert remarks(run(status=status, steps=1)) == f"{said} after 1 iteration"


@pytest.mark.parametrize("summary", [{}, {"status": "failed"}, run(eval={}), run(train={})])
def test_a_summary_with_gaps_still_has_a_page(summary):
    assert "try next" in page(summary, [])


def test_the_page_says_what_the_run_cost_and_by_which_layers():
    shown = page(run(peak_memory_gb=0.52, layers="transformers'"))
    assert "clip_fraction 8.0 %   time 2:41   peak memory 0.52 GB" in shown
    assert "passes through transformers' layers" in shown


def test_missing_and_not_a_number_are_dashes():
    assert (number(None), number(float("nan")), percent(None)) == ("-", "-", "-")
    text = page(run(eval__last__mean_reward=None, eval__last__gold=float("nan")))
    assert re.search(r"mean_reward +-0.5 ± 0.8 +- ± 0.4", text)


def test_numbers_are_short_and_rounding_noise_is_zero():
    shown = [number(x) for x in (5.9e-08, -5.9e-08, 0.00123456, -1.23456, 12345.6)]
    assert shown == ["0", "0", "0.00123", "-1.23", "12,346"]
    assert [number(x) for x in (999.4, 999.6, -999.96, 1000)] == ["999", "1,000", "-1,000", "1,000"]


def test_our_own_warnings_are_said_without_a_place_in_the_code():
    def shown(filename):
        return warnings.formatwarning("too dear", RuntimeWarning, filename, 7, "line")

    usual = shown("/somewhere/else.py")
    with plain_warnings():
        assert shown(summary.__file__) == "warning: too dear\n"
        assert shown("/somewhere/else.py") == usual
    assert shown(summary.__file__) != "warning: too dear\n"


def test_durations_read_like_a_clock():
    assert [duration(s) for s in (0, 59.6, 3600, 100000)] == ["0:00", "1:00", "1:00:00", "27:46:40"]


def test_a_run_that_was_interrupted_is_told_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert next_commands(tmp_path / "a b", "preempted")[0] == "python -m ppo_lab resume=\"'a b'\""
    assert not any("resume" in command for command in next_commands(tmp_path / "a b"))


def test_the_page_names_what_lies_in_the_folder(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    text = page(run(), folder=tmp_path)
    assert "metrics.jsonl" in text
    assert "checkpoints" not in text
