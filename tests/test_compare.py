"""Runs side by side: read whatever became of them, grouped, fitted, and shown on one page."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from html import unescape
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from made_up_runs import (
    ALPHA_GOLD,
    ALPHA_PROXY,
    BETA_GOLD,
    BETA_PROXY,
    make_run,
    make_sweep,
    rise,
)
from rich.console import Console

from ppo_lab.compare.command import _told, main
from ppo_lab.compare.comparison import (
    clip_fraction_by_epsilon,
    compare,
    describe,
    frame,
    remarks,
)
from ppo_lab.compare.figures import _colours, _lines, objectives, save_figures
from ppo_lab.compare.groups import Group, differing_keys, enough_digits, grouped, short, shown
from ppo_lab.compare.outcomes import evaluations, outcomes
from ppo_lab.compare.overoptimisation import fit_overoptimisation, peak_of
from ppo_lab.compare.page import CURVE_BYTES, as_json, page, payload, points_a_curve
from ppo_lab.compare.runs import Run, columns, read_run, read_runs, resolved
from ppo_lab.compare.statistics import pareto_front, rank_correlation, t_interval, thinned
from ppo_lab.compare.terminal import show
from ppo_lab.compare.wandb_runs import _config
from ppo_lab.record import flat

SMALL = {"betas": (0.0, 0.1), "epsilons": (0.1, 0.4), "seeds": (0, 1), "steps": 20}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep of two betas, two epsilons and two seeds."""
    folder = tmp_path_factory.mktemp("sweep")
    make_sweep(folder, **SMALL)
    return folder


# ---- Statistics --------------------------------------------------------------------------------


def test_an_interval_over_seeds_is_students() -> None:
    found = t_interval([1.0, 2.0, 3.0, float("nan")])
    assert found.mean == 2.0
    assert found.n == 3
    assert found.half_width == pytest.approx(4.302653 / 3**0.5)  # t of 2 degrees, s = 1


def test_one_seed_has_no_interval_and_none_has_no_mean() -> None:
    assert np.isnan(t_interval([5.0]).half_width)
    assert str(t_interval([5.0])) == "5"
    assert str(t_interval([])) == "-"


def test_the_pareto_front_holds_what_no_other_run_beats_in_both() -> None:
    cost, gain = [1.0, 2.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 2.5, 4.0]
    assert pareto_front(cost, gain) == [0, 1, 4]


def test_rank_correlation_sees_order_alone() -> None:
    assert rank_correlation([1, 2, 3, 4], [1, 8, 27, 64]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3], [9, 4, np.nan]) != rank_correlation([1, 2, 3], [9, 4, 1])
    assert np.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))


def test_a_thinned_curve_holds_means_of_equal_stretches() -> None:
    steps, values = np.arange(1.0, 9.0), np.array([0.0, 2, 4, 6, np.nan, 8, 10, np.nan])
    at, thin = thinned(steps, values, most=3)
    assert at.tolist() == [1.5, 3.5, 6.5]
    assert thin.tolist() == [1.0, 5.0, 9.0]
    assert thinned(steps, values, most=6)[1].tolist() == [0, 2, 4, 6, 8, 10]


# ---- Over-optimisation -------------------------------------------------------------------------


def exact_run(folder: Path, kl: np.ndarray, **gains: np.ndarray) -> Run:
    """A run whose evaluations lie exactly on curves, by these gains over the reference."""
    first = {"kl": 0.0, "mean_reward": -2.0, "gold": 0.5}
    history = {"step": np.arange(1.0, len(kl) + 1), "eval/kl": kl}
    history |= {f"eval/{name}": first[name] + gain for name, gain in gains.items()}
    return Run(folder.name, str(folder), history=history, summary={"eval": {"first": first}})


def test_the_fit_finds_the_curve_that_the_points_lie_on(tmp_path: Path) -> None:
    runs = []
    for n in range(3):
        kl = np.linspace(0.5 + n, 9, 6)
        d = np.sqrt(kl)
        gold, proxy = rise(d, ALPHA_GOLD, BETA_GOLD), rise(d, ALPHA_PROXY, BETA_PROXY)
        runs.append(exact_run(tmp_path / str(n), kl, mean_reward=proxy, gold=gold))
    fit = fit_overoptimisation(runs)
    assert not isinstance(fit, str)
    assert (fit.gold.alpha, fit.gold.beta) == pytest.approx((ALPHA_GOLD, BETA_GOLD))
    assert (fit.proxy.alpha, fit.proxy.beta) == pytest.approx((ALPHA_PROXY, BETA_PROXY))
    assert fit.gold.peak == pytest.approx(np.exp(ALPHA_GOLD / BETA_GOLD - 1))
    assert fit.gold.peak_interval == pytest.approx((fit.gold.peak, fit.gold.peak))
    assert fit.peak_is_seen
    assert "it peaks at d* = 1.4" in describe(fit)


def test_the_fitted_peak_is_the_highest_point_of_the_curve() -> None:
    d = np.linspace(0.01, 5, 100_000)
    highest = d[rise(d, ALPHA_GOLD, BETA_GOLD).argmax()]
    assert peak_of(alpha=ALPHA_GOLD, beta=BETA_GOLD) == pytest.approx(highest, abs=1e-4)
    assert np.isnan(peak_of(alpha=1.0, beta=-0.1))


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        ((0.1, 1.0), "beyond the largest KL measured, 1"),
        ((20.0, 40.0), "below the smallest KL measured, 20"),
    ],
)
def test_a_peak_outside_of_what_was_measured_is_called_so(
    tmp_path: Path, measured: tuple[float, float], said: str
) -> None:
    kl = np.linspace(*measured, 6)  # d* is 1.4
    gold = rise(np.sqrt(kl), ALPHA_GOLD, BETA_GOLD)
    runs = [exact_run(tmp_path / str(n), kl, mean_reward=gold, gold=gold) for n in range(2)]
    fit = fit_overoptimisation(runs)
    assert not isinstance(fit, str)
    assert not fit.peak_is_seen
    assert said in describe(fit)


def test_of_runs_whose_start_is_not_known_no_fit_is_made_and_why_is_said(tmp_path: Path) -> None:
    kl = np.linspace(0.1, 1.0, 6)
    runs = [exact_run(tmp_path / str(n), kl, mean_reward=kl, gold=kl) for n in range(2)]
    runs[1].summary.clear()
    said = fit_overoptimisation(runs)
    assert isinstance(said, str)
    assert said.endswith("; 1 runs lack the evaluation before training")


def test_a_terminal_is_told_first_how_runs_ended() -> None:
    said = [f"remark {n}" for n in range(50)]
    told = _told(said)
    assert len(told) == 21
    assert told[:3] == ["remark 0", "(30 more remarks are on the page)", "remark 31"]
    assert _told(said[:20]) == said[:20]


def test_without_a_gold_score_nothing_is_fitted_and_it_is_said(tmp_path: Path) -> None:
    make_sweep(tmp_path, gold=False, **SMALL)
    said = fit_overoptimisation(read_runs([str(tmp_path)]))
    assert said == "no over-optimisation fit: no run has a gold score"


def test_gold_without_any_kl_is_not_called_no_gold(tmp_path: Path) -> None:
    zeros = np.zeros(4)
    runs = [exact_run(tmp_path / str(n), zeros, mean_reward=zeros, gold=zeros) for n in range(2)]
    said = fit_overoptimisation(runs)
    assert isinstance(said, str)
    assert "0 evaluations of 0 runs with a gold score and KL above 0" in said


# ---- Reading -----------------------------------------------------------------------------------


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "a", beta=0.05, steps=10, every=5), "a")
    assert (run.status, run.steps) == ("finished", 10)
    assert run.config["ppo.init_kl_coef"] == 0.05
    assert run.config["evaluation.max_new_tokens"] == run.config["generation.max_new_tokens"]
    assert np.isfinite(run.history["eval/kl"]).nonzero()[0].tolist() == [4, 9]
    assert [e.step for e in evaluations(run)] == [0, 5, 10]
    assert outcomes(run)["eval/gold"] == pytest.approx(run.history["eval/gold"][9])
    assert outcomes(run)["clip_fraction"] == pytest.approx(run.history["clip_fraction"].mean())
    assert len(run.samples) == 4


@pytest.mark.parametrize(
    ("fractions", "way"),
    [((0.3, 0.2, 0.1), "falls"), ((0.3, 0.1, 0.1), "does not fall"), ((0.2, 0.3, 0.1), "does not")],
)
def test_what_does_not_fall_with_every_step_is_not_said_to_fall(
    fractions: tuple[float, ...], way: str
) -> None:
    runs = [
        Run(
            f"{n}",
            f"/{n}",
            status="finished",
            config={"ppo.cliprange": 0.1 * (n + 1)},
            summary={"train": {"clip_fraction": fraction}},
        )
        for n, fraction in enumerate(fractions)
    ]
    (said,) = [line for line in remarks(compare(runs)) if "monotonically" in line]
    assert said.startswith(f"clip_fraction {way}")


def test_a_run_without_a_summary_is_told_by_the_last_tenth_of_its_iterations() -> None:
    rows = [{"step": n, "kl": float(n), "mean_reward": -float(n)} for n in range(1, 41)]
    found = outcomes(Run("a", "a", history=columns(rows)))
    assert (found["kl"], found["mean_reward"]) == (38.5, -38.5)
    assert outcomes(Run("a", "a", history=columns(rows[:3])))["kl"] == 3.0


def test_an_evaluation_in_a_second_row_of_its_iteration_counts() -> None:
    """As loops write it that log what they evaluate by itself."""
    rows = [{"step": 1, "kl": 0.1}, {"step": 2, "kl": 0.2}]
    rows.append({"step": 2, "eval/kl": 1.5, "eval/mean_reward": 2.0})
    (found,) = evaluations(Run("a", "a", history=columns(rows)))
    assert found[:3] == (2, 1.5, 2.0)
    assert np.isnan(found.gold)


def test_each_fate_of_a_run_is_told_by_its_folder(tmp_path: Path) -> None:
    fates = ("finished", "failed", "running", "crashed", "torn", "rotten", "torn_summary")
    folders = {name: make_run(tmp_path / name, steps=8) for name in fates}
    (tmp_path / "empty").mkdir()
    failed = {"status": "failed", "reason": "RewardError: NaN"}
    (folders["failed"] / "summary.json").write_text(json.dumps(failed))
    for name in ("running", "crashed", "torn"):
        (folders[name] / "summary.json").unlink()
    for file in folders["crashed"].rglob("*"):
        os.utime(file, (0, 0))
    with (folders["torn"] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "kl": 0.')
    (folders["rotten"] / ".hydra" / "config.yaml").write_text("ppo: [")
    (folders["torn_summary"] / "summary.json").write_text('{"status": ')
    runs = {run.name: run for run in read_runs([str(tmp_path), str(tmp_path / "nowhere")])}
    assert {name: run.status for name, run in runs.items()} == {
        "finished": "finished",
        "failed": "failed",
        "running": "running",
        "crashed": "crashed",
        "torn": "running",
        "rotten": "broken",
        "torn_summary": "broken",
        "empty": "empty",
        "nowhere": "broken",
    }
    assert runs["failed"].reason == "RewardError: NaN"
    assert "config.yaml cannot be read" in runs["rotten"].reason
    assert runs["nowhere"].reason == "no such folder"
    assert runs["torn"].steps == 8
    assert page(compare(list(runs.values())), [], title="fates")


def test_answers_are_the_last_evaluations_and_not_those_from_training(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", steps=10)
    rows = [{"step": 20, "prompt": "p", "response": "r", "score": 1.0, "reference_response": None}]
    with (folder / "samples.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    assert {row["step"] for row in read_run(folder, "a").samples} == {10}
    (folder / "samples.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert len(read_run(folder, "a").samples) == 1


def test_globs_folders_and_runs_mix_and_each_run_is_read_once(sweep: Path) -> None:
    runs = read_runs([str(sweep / "*"), str(sweep), str(sweep / "3")])
    assert [run.name for run in runs] == [str(i) for i in range(8)]


def test_metrics_of_other_types_and_nulls_do_no_harm(tmp_path: Path) -> None:
    rows = ['{"step": 1, "kl": null, "note": "x"}', '{"step": 2, "kl": 1, "note": 3}', "", "[1]"]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    run = read_run(tmp_path, "odd")
    assert run.history["kl"].tolist()[1] == 1.0
    assert np.isnan(run.history["kl"][0])
    assert run.steps == 2


# ---- Groups and words --------------------------------------------------------------------------


def test_seeds_are_one_group_and_groups_stand_by_objective(sweep: Path) -> None:
    runs = read_runs([str(sweep)])
    keys = differing_keys(runs)
    assert keys == ["ppo.init_kl_coef", "ppo.cliprange"]
    groups = grouped(runs, keys)
    assert [len(group.runs) for group in groups] == [2, 2, 2, 2]
    means = [group.results["objective"].mean for group in groups]
    assert means == sorted(means, reverse=True)
    pair = [outcomes(run)["objective"] for run in groups[0].runs]
    assert groups[0].results["objective"].mean == pytest.approx(sum(pair) / 2)


def test_keys_of_one_name_keep_the_sections_that_tell_them_apart() -> None:
    keys = ["ppo.batch_size", "reward.batch_size", "ppo.lam", "seed", "a.b.c", "x.b.c"]
    called = [short(key, keys) for key in keys]
    assert called == ["ppo.batch_size", "reward.batch_size", "lam", "seed", "a.b.c", "x.b.c"]
    assert [short("ppo.batch_size"), short("batch_size", ["ppo.batch_size"])] == ["batch_size"] * 2
    group = Group({"generation.temperature": 0.7, "evaluation.temperature": 1.0, "ppo.lam": 0.9})
    assert group.label == "generation.temperature=0.7 evaluation.temperature=1 lam=0.9"


def test_settings_that_differ_late_are_not_written_alike(tmp_path: Path) -> None:
    close = (0.12345678, 0.12345679, 0.2)
    runs = [
        read_run(make_run(tmp_path / str(beta), beta=beta, epsilon=0.1 + beta), str(beta))
        for beta in close
    ]
    comparison = compare(runs)
    labels = {group.label.split()[0] for group in comparison.groups}
    assert labels == {"init_kl_coef=0.12345678", "init_kl_coef=0.12345679", "init_kl_coef=0.2"}
    assert len(_colours(comparison)) == 3
    differing = [run["differing"] for run in payload(comparison, [], title="t")["runs"]]
    assert len(set(map(tuple, differing))) == 3
    assert enough_digits([0.1, 0.12345678, 16384, "x", None, True]) == 6
    assert shown(0.1 + 0.2, enough_digits([0.1 + 0.2, 0.3])) == "0.30000000000000004"
    assert shown(0.3, enough_digits([0.1 + 0.2, 0.3])) == "0.3"


def test_a_failed_seed_is_shown_and_does_not_enter_the_mean(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / str(seed), seed=seed) for seed in range(3)]
    (folders[2] / "summary.json").write_text('{"status": "failed", "objective": -99}')
    (group,) = compare(read_runs([str(tmp_path)])).groups
    assert group.status == "2 finished, 1 failed"
    assert group.results["objective"].n == 2
    assert group.results["objective"].mean > -99


def test_a_last_evaluation_without_a_number_is_not_filled_from_an_earlier_one(
    tmp_path: Path,
) -> None:
    summary = make_run(tmp_path) / "summary.json"
    stated = json.loads(summary.read_text())
    stated["eval"]["last"]["gold"] = None
    summary.write_text(json.dumps(stated))
    assert np.isnan(outcomes(read_run(tmp_path, "a"))["eval/gold"])
    summary.write_text(json.dumps(stated | {"status": "failed"}))
    assert np.isfinite(outcomes(read_run(tmp_path, "a"))["eval/gold"])


@pytest.mark.parametrize(
    ("written", "read"),
    [("${by_training:2.0e-3,2.0e-4}", 2e-4), ("${by_training:fast,slow}", "slow"), ("a", "a")],
)
def test_what_a_preset_leaves_to_the_kind_of_training_is_read_as_the_run_had_it(
    written: str, read: object
) -> None:
    config = {"lora.r": 0, "ppo.learning_rate": written, "critic.learning_rate": "${ppo.x}"}
    assert resolved(config) == config | {"ppo.learning_rate": read}
    also = {"lora.r": 8, "a": "${b}", "b": "${by_training:1,2}"}
    assert resolved(also) == {"lora.r": 8, "a": 1.0, "b": 1.0}


def test_slow_iterations_count_for_as_long_as_they_took() -> None:
    history = {"step": np.array([1.0, 2.0]), "tokens_per_second": np.array([10.0, 10 / 9])}
    alone = outcomes(Run("a", "a", history=history))["tokens_per_second"]
    assert alone == pytest.approx(5 + 5 / 9)  # all that can be said without the times
    history["time/iteration"] = np.array([1.0, 9.0])
    assert outcomes(Run("a", "a", history=history))["tokens_per_second"] == pytest.approx(2.0)
    assert np.isnan(outcomes(Run("a", "a"))["tokens_per_second"])


def test_a_copied_sweep_is_told_of(sweep: Path, tmp_path: Path) -> None:
    shutil.copytree(sweep, tmp_path / "copy")
    said = remarks(compare(read_runs([str(sweep), str(tmp_path)])))
    (line,) = [line for line in said if "same seed" in line]
    assert line.startswith("4 of 4 settings have runs of the same seed")
    assert not [line for line in remarks(compare(read_runs([str(sweep)]))) if "same seed" in line]


def test_scores_of_different_rewards_are_not_put_in_one_order_unsaid(tmp_path: Path) -> None:
    def said(**rewards: dict[str, object]) -> list[str]:
        runs = [Run(name, name, config={"seed": 0} | own) for name, own in rewards.items()]
        return [line for line in remarks(compare(runs)) if "the rewards differ" in line]

    words = {"reward.name": "length"}
    feeling = {"reward.name": "vader", "reward.text": "completion"}
    (line,) = said(a=words, b=feeling)
    assert line.startswith("the rewards differ (by name, text), and with them")
    assert not said(a=words, b=words | {"ppo.cliprange": 0.1})
    assert not said(a=words | {"reward.batch_size": 4}, b=words | {"reward.batch_size": 8})
    (line,) = said(a={f"reward.parts.{i}.weight": 1.0 for i in "abcde"}, b=words)
    assert "and 3 more" in line


def test_a_sweep_beside_its_copy_has_no_more_seeds_than_alone(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(tmp_path / "sweep" / str(seed), seed=seed)
    (alone,) = compare(read_runs([str(tmp_path)])).groups
    shutil.copytree(tmp_path / "sweep", tmp_path / "copy")
    (both,) = compare(read_runs([str(tmp_path)])).groups
    assert len(both.runs) == 4
    assert both.results == alone.results
    assert both.results["objective"].n == 2


def test_a_run_that_stands_twice_counts_once_in_every_mean_fit_and_picture(tmp_path: Path) -> None:
    for beta, seed in product((0.05, 0.3), (0, 1)):
        make_run(tmp_path / "sweep" / f"{beta}-{seed}", beta=beta, seed=seed, epsilon=0.1 + beta)
    alone = compare(read_runs([str(tmp_path)]))
    shutil.copytree(tmp_path / "sweep" / "0.05-0", tmp_path / "copy")
    both = compare(read_runs([str(tmp_path)]))
    assert (len(alone.runs), len(both.runs)) == (4, 5)
    np.testing.assert_allclose(objectives(both)[2], objectives(alone)[2])
    assert clip_fraction_by_epsilon(both) == clip_fraction_by_epsilon(alone)
    fits, others = (list(one.fits.values()) for one in (both, alone))
    for one, other in zip(fits, others, strict=True):
        assert describe(one) == describe(other)
    told = [line for line in remarks(both) if "same seed" not in line]
    assert told == remarks(alone)
    (line,), _ = _lines([run for run in both.runs if run.config["ppo.init_kl_coef"] < 0.1], "kl")
    (plain,), _ = _lines([run for run in alone.runs if run.config["ppo.init_kl_coef"] < 0.1], "kl")
    np.testing.assert_allclose(line, plain)


def test_runs_without_a_seed_count_one_by_one() -> None:
    runs = [Run(name, name, summary={"objective": value}) for name, value in (("a", 1), ("b", 3))]
    interval = Group({}, runs).results["objective"]
    assert (interval.mean, interval.n) == (2.0, 2)


def test_remarks_tell_order_and_an_epsilon_that_never_binds(sweep: Path) -> None:
    said = remarks(compare(read_runs([str(sweep)])))
    assert any("clip_fraction falls monotonically with cliprange" in line for line in said)
    assert any("rho over 8 runs: -0.8" in line for line in said)
    idle = [line for line in said if "hardly ever binds" in line]
    assert len(idle) == 1
    assert idle[0].startswith("cliprange=0.4")


def test_the_table_of_runs_holds_differing_keys_and_outcomes(sweep: Path) -> None:
    table = frame(compare(read_runs([str(sweep)])))
    assert len(table) == 8
    assert table["ppo.cliprange"].tolist() == [0.1, 0.1, 0.4, 0.4] * 2
    assert table["group"].nunique() == 4
    assert table["objective"].notna().all()


def test_a_run_that_lacks_beta_or_epsilon_does_not_keep_the_others_from_being_drawn(
    sweep: Path, tmp_path: Path
) -> None:
    runs = read_runs([str(sweep)])
    for key, run in zip(("ppo.init_kl_coef", "ppo.cliprange"), runs, strict=False):
        del run.config[key]
    names = {file.name for file in save_figures(compare(runs), tmp_path)}
    assert "compare_objective.png" in names


def test_runs_that_differ_in_a_list_are_drawn_in_a_colour_each(tmp_path: Path) -> None:
    for number, modules in enumerate((["q_proj"], ["q_proj", "v_proj"], None, True, 1)):
        make_run(tmp_path / str(number), seed=0, lora__target_modules=modules)
    comparison = compare(read_runs([str(tmp_path)]))
    assert comparison.keys == ["lora.target_modules"]
    save_figures(comparison, tmp_path)
    drawing = (tmp_path / "compare_curves.svg").read_text()
    assert all(f">{value}</text>" in drawing for value in ("['q_proj']", "None", "True", "1"))


def test_runs_that_differ_in_a_list_are_drawn(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / name), name) for name in ("few", "many")]
    runs[1].config["lora.target_modules"] = ["query_key_value", "dense"]
    names = {file.name for file in save_figures(compare(runs), tmp_path)}
    assert {"compare_curves.png", "compare_frontier.png"} <= names


def test_a_run_that_ended_before_its_first_iteration_is_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    stated = json.loads((run / "summary.json").read_text())
    stated |= {"status": "failed", "steps": 0, "eval": {"first": stated["eval"]["first"]}}
    (run / "summary.json").write_text(json.dumps(stated))
    names = {file.name for file in save_figures(compare(read_runs([str(run)])), tmp_path)}
    assert names == {"compare_frontier.png", "compare_frontier.svg"}


def test_pictures_and_page_count_the_same_runs(tmp_path: Path) -> None:
    for beta, epsilon in product((0.1, 0.3), (0.1, 0.2)):
        for seed, steps in ((0, 40), (1, 40), (0, 20)):  # the third differs in more than its seed
            make_run(
                tmp_path / f"{beta}-{epsilon}-{seed}-{steps}",
                beta=beta,
                epsilon=epsilon,
                seed=seed,
                steps=steps,
            )
    for folder in tmp_path.glob("*-20"):
        failed = {"status": "failed", "objective": -99, "train": {"clip_fraction": 0.0}}
        (folder / "summary.json").write_text(json.dumps(failed))
    comparison = compare(read_runs([str(tmp_path)]))
    xs, ys, table = objectives(comparison)
    assert (xs, ys) == ([0.1, 0.3], [0.1, 0.2])
    finished = [run for run in comparison.runs if run.status == "finished"]
    first = [
        r for r in finished if r.config["ppo.init_kl_coef"] == r.config["ppo.cliprange"] == 0.1
    ]
    assert table[0][0] == np.mean([outcomes(run)["objective"] for run in first])
    assert np.min(table) > -99
    fractions = clip_fraction_by_epsilon(comparison)
    assert [len(some) for some in fractions.values()] == [4, 4]
    assert min(map(min, fractions.values())) > 0.0


def test_a_setting_called_like_an_outcome_keeps_a_column_of_its_own(tmp_path: Path) -> None:
    for name in ("eval/mean_reward", "eval/gold"):
        make_run(tmp_path / name.replace("/", "-"), objective=name)
    table = frame(compare(read_runs([str(tmp_path)])))
    assert sorted(table["config.objective"]) == ["eval/gold", "eval/mean_reward"]
    assert table["objective"].dtype == float


@pytest.mark.parametrize("width", [160, 80, 40, 24])
def test_no_terminal_is_too_narrow_for_a_number_of_the_comparison(sweep: Path, width: int) -> None:
    comparison, out = compare(read_runs([str(sweep)])), io.StringIO()
    show(comparison, [], Console(file=out, width=width))
    said = out.getvalue().split()
    for group in comparison.groups:
        numbers = [group.results[name] for name in ("objective", "eval/gold", "eval/kl")]
        for wanted in [part for number in numbers for part in str(number).split()]:
            assert wanted in said
    assert max(map(len, out.getvalue().splitlines())) <= width
    assert any("cliprange" in word for word in said)


# ---- The page ----------------------------------------------------------------------------------


def data_in(html: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_the_page_needs_no_network_and_runs_no_text_of_a_model(sweep: Path) -> None:
    html = page(compare(read_runs([str(sweep)])), ["<b>remark</b>"], title="<i>sweep</i>")
    assert "default-src 'none'" in html
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=", html)
    assert "document.title='hacked'</script>" not in html
    assert "<i>sweep</i>" not in html
    assert "<b>remark</b>" not in html
    data = data_in(html)
    assert any("</script>" in text for text in data["texts"])
    assert data["remarks"] == ["<b>remark</b>"]


def test_a_page_without_scripts_says_where_its_numbers_are(sweep: Path) -> None:
    html = page(compare(read_runs([str(sweep)])), [], title="t")
    (said,) = re.findall(r"<noscript><p>(.*?)</p></noscript>", html, re.DOTALL)
    assert "compare.csv" in said


def test_json_inside_a_script_element_cannot_end_it() -> None:
    text = as_json({"x": "</script><!-- & \u2028"})
    assert "<" not in text
    assert json.loads(text) == {"x": "</script><!-- & \u2028"}


def test_the_page_holds_every_run_with_its_curves(sweep: Path) -> None:
    runs = read_runs([str(sweep)])
    data = payload(compare(runs), [], title="t")
    first = data["runs"][0]
    kl = np.frombuffer(base64.b64decode(first["curves"]["kl"]), "<f4")
    assert kl == pytest.approx(runs[0].history["kl"], rel=1e-6)
    sparse = np.frombuffer(base64.b64decode(first["curves"]["@eval/kl"]), "<f4")
    assert sparse.tolist() == [5, 10, 15, 20]
    assert first["evaluations"][0][:2] == [0, 0]
    assert data["metrics"]["kl"][0] == "nats/sequence"
    assert [run["group"] for run in data["runs"]] == sorted(run["group"] for run in data["runs"])
    assert data["fits"][0]["gold"]["peak"] == pytest.approx(1.396, abs=0.02)
    json.dumps(data, allow_nan=False)


def test_two_hundred_long_runs_keep_the_page_light() -> None:
    history = {f"m{i}": np.zeros(1000) for i in range(60)}
    runs = [Run(str(i), str(i), history=history) for i in range(200)]
    bytes_used = points_a_curve(runs) * 200 * 60 * 4 * 4 / 3
    assert bytes_used <= CURVE_BYTES
    assert points_a_curve(runs) >= 100


def test_one_command_writes_page_tables_and_figures(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([str(sweep), "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "2 finished" in said
    assert "gold gain R(d)" in said
    kinds = {"html", "csv", "parquet"}
    assert {f"compare.{kind}" for kind in kinds} <= {f.name for f in tmp_path.iterdir()}
    for name in ("curves", "frontier", "objective", "clip_fraction", "overoptimisation"):
        for kind in ("png", "svg"):
            assert (tmp_path / f"compare_{name}.{kind}").stat().st_size > 3000
    assert len(pandas.read_parquet(tmp_path / "compare.parquet")) == 8


def test_a_folder_that_cannot_be_written_is_said_and_where_else_to_write(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    assert main([str(sweep), "--output", str(tmp_path / "file")]) == 1
    said = capsys.readouterr().out
    assert "clip fraction" in said
    assert f"{tmp_path / 'file'}: cannot be written" in said
    assert "--output FOLDER" in said


def test_no_setting_is_taken_for_an_emoji(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for number, name in enumerate(("a:boom:", "a:fire:")):
        make_run(tmp_path / str(number), reward__name=name)
    assert main([str(tmp_path)]) == 0
    assert "name=a:boom:: no over-optimisation fit" in capsys.readouterr().out


def test_the_page_is_written_whoever_reads_the_table(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main([str(sweep), "--output", str(tmp_path)]) == 0
    assert (tmp_path / "compare.html").exists()


def test_nothing_to_compare_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")]) == 1
    assert "no such folder" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_runs_without_config_or_evaluations_make_a_page_too(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 1, "kl": 0.5}\n')
    assert main([str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    assert "1 running" in capsys.readouterr().out
    assert data_in((tmp_path / "out" / "compare.html").read_text())["runs"][0]["steps"] == 1


@pytest.mark.slow
def test_a_thousand_run_folders_take_less_than_twenty_seconds(tmp_path: Path) -> None:
    names = [f"metric/{i}" for i in range(50)]
    betas = np.geomspace(0.001, 1, 100)
    make_sweep(
        tmp_path / "runs", betas=betas, seeds=range(5), steps=50, names=names, epsilons=(0.1, 0.2)
    )
    started = time.process_time()
    assert main([str(tmp_path / "runs"), "--output", str(tmp_path / "out")]) == 0
    assert time.process_time() - started < 20
    assert (tmp_path / "out" / "compare.html").stat().st_size < 20e6


def in_a_browser(html: Path, *, width: int, height: int = 6000) -> subprocess.CompletedProcess[str]:
    """What a browser makes of a page, and in stderr what it says of it."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium")
    flags = "--headless --no-sandbox --use-angle=swiftshader --enable-unsafe-swiftshader "
    flags += "--no-first-run --disable-background-networking --disable-sync --dump-dom "
    flags += f"--window-size={width},{height} --virtual-time-budget=20000 --enable-logging=stderr"
    command = [browser, *flags.split(), f"--user-data-dir={html.parent / 'profile'}"]
    return subprocess.run([*command, html.as_uri()], capture_output=True, text=True, timeout=120)


def asked_of_the_page(runs: Path, folder: Path, expression: str, *, width: int = 1500) -> Any:
    """What a script finds on the page of these runs when it is drawn."""
    assert main([str(runs), "--output", str(folder / "out")]) == 0
    html = folder / "out" / "compare.html"
    asking = f"setTimeout(() => document.title = JSON.stringify({expression}), 9000)"
    html.write_text(html.read_text().replace("</body>", f"<script>{asking}</script></body>"))
    title = re.search("<title>(.*?)</title>", in_a_browser(html, width=width).stdout)[1]
    return json.loads(unescape(title))


def without(run: Path, *, metric: str = "", after: int = 1000) -> None:
    """Take a metric and the later iterations out of a run's record."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if k != metric} for row in rows if row["step"] <= after]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))


@pytest.mark.slow
def test_no_curve_is_cut_short_and_a_group_has_one_colour_in_every_panel(tmp_path: Path) -> None:
    for beta, seed in product((0.02, 0.1, 0.4), (0, 1)):
        make_run(tmp_path / f"{beta}-{seed}", beta=beta, seed=seed)
    (tmp_path / "empty").mkdir()
    without(tmp_path / "0.1-1", after=20)
    for seed in (0, 1):
        without(tmp_path / f"0.02-{seed}", metric="clip_fraction")
    assert main([str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    html = tmp_path / "out" / "compare.html"
    text = html.read_text()
    asking = """<script>setTimeout(() => document.title = JSON.stringify(
      [0, 2].map((i) => byId(`curve-${i}`).data.filter((t) => t.line.width > 0)
        .map((t) => [t.legendgroup, t.line.color, t.x.at(-1)]))), 9000)</script></body>"""
    html.write_text(text.replace("</body>", asking))
    shown = in_a_browser(html, width=1500).stdout
    kl, clipped = json.loads(re.search("<title>(.*?)</title>", shown)[1])
    assert sorted(end for label, _, end in kl if label == "init_kl_coef=0.1") == [20, 40]
    assert len(kl) == 4
    colours = {label: colour for label, colour, _ in kl}
    assert len(set(colours.values())) == 3
    assert [colours[label] for label, _, _ in clipped] == [colour for _, colour, _ in clipped]


@pytest.mark.slow
def test_what_was_never_scrolled_to_is_printed_too(sweep: Path, tmp_path: Path) -> None:
    assert main([str(sweep), "--output", str(tmp_path)]) == 0
    html = tmp_path / "compare.html"
    asking = """<script>const drawn = () => document.querySelectorAll(".js-plotly-plot").length;
      setTimeout(() => { const before = drawn(); window.dispatchEvent(new Event("beforeprint"));
        document.title = JSON.stringify([before, drawn()]); }, 9000)</script></body>"""
    html.write_text(html.read_text().replace("</body>", asking))
    shown = in_a_browser(html, width=1300, height=700).stdout
    before, printed = json.loads(re.search("<title>(.*?)</title>", shown)[1])
    assert before < 9
    assert printed == 9


@pytest.mark.slow
def test_plots_fit_a_narrow_window(sweep: Path, tmp_path: Path) -> None:
    assert main([str(sweep), "--output", str(tmp_path)]) == 0
    html = tmp_path / "compare.html"
    asking = """<script>document.querySelector("main").style.width = "400px";
      setTimeout(() => document.title = JSON.stringify(
        [...document.querySelectorAll(".plot:not(.absent)")]
        .map((p) => [p, p.closest("section")].map((e) => e.getBoundingClientRect().right))
        .map(([plot, section]) => plot - section)),
      9000)</script></body>"""
    html.write_text(html.read_text().replace("</body>", asking))
    shown = in_a_browser(html, width=600).stdout
    beyond = json.loads(re.search("<title>(.*?)</title>", shown)[1])
    assert len(beyond) >= 8
    assert max(beyond) < 0


@pytest.mark.slow
def test_a_browser_draws_every_plot_and_reports_no_error(sweep: Path, tmp_path: Path) -> None:
    assert main([str(sweep), "--output", str(tmp_path)]) == 0
    shown = in_a_browser(tmp_path / "compare.html", width=1500)
    console = [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
    assert [line for line in console if "GL Driver Message" not in line] == []
    plots = ["curve-0", "curve-1", "curve-2", "frontier-score", "frontier-gold", "heat", "clip"]
    for name in [*plots, "parallel", "fit-0"]:
        assert re.search(rf'class="[^"]*js-plotly-plot[^"]*"[^>]*id="{name}"', shown.stdout) or (
            re.search(rf'id="{name}"[^>]*class="[^"]*js-plotly-plot', shown.stdout)
        ), name
    assert "<title>ppo_lab" in shown.stdout
    assert "hacked</title>" not in shown.stdout


@pytest.mark.slow
def test_the_page_counts_a_seed_once_as_the_terminal_does(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(tmp_path / "sweep" / str(seed), seed=seed)
    shutil.copytree(tmp_path / "sweep" / "0", tmp_path / "copy")
    (group,) = compare(read_runs([str(tmp_path)])).groups
    (line,), _ = _lines(group.runs, "kl")
    assert main([str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    html = tmp_path / "out" / "compare.html"
    asking = """<script>setTimeout(() => document.title = JSON.stringify(
      [outcome(DATA.runs, "objective"), average(DATA.runs, "objective"),
        band(DATA.runs, "kl").y]), 5000)</script></body>"""
    html.write_text(html.read_text().replace("</body>", asking))
    title = re.search("<title>(.*?)</title>", in_a_browser(html, width=1500).stdout)[1]
    mean, half_width, _ = group.results["objective"]
    told, cell, curve = json.loads(title)
    assert told == pytest.approx({"mean": mean, "half": half_width})
    assert cell == pytest.approx(mean)
    assert curve == pytest.approx(line[:, 1].tolist(), rel=1e-5)


@pytest.mark.slow
def test_the_page_tells_settings_apart_that_differ_late(tmp_path: Path) -> None:
    for beta, size in ((0.12345678, 16384), (0.12345679, 16385)):
        make_run(tmp_path / str(beta), beta=beta, ppo__batch_size=size)
    assert main([str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    html = tmp_path / "out" / "compare.html"
    asking = """<script>setTimeout(() => { byId("filter").value = "init_kl_coef=0.12345678";
      document.title = JSON.stringify([visibleRuns().length, byId("heat").layout.xaxis.ticktext,
        byId("curve-0").data.map((t) => t.name),
        [...document.querySelectorAll("#table tr")].map((row) => row.innerText.split("\t")[1])]);
      }, 9000)</script></body>"""
    html.write_text(html.read_text().replace("</body>", asking))
    title = re.search("<title>(.*?)</title>", in_a_browser(html, width=1500).stdout)[1]
    passed, ticks, legend, sizes = json.loads(title)
    assert passed == 1
    assert ticks == ["0.12345678", "0.12345679"]
    assert {name.removeprefix("init_kl_coef=") for name in legend} == set(ticks)
    assert {"16384", "16385"} < set(sizes)


@pytest.mark.slow
def test_the_heat_map_says_what_the_runs_of_a_cell_differ_in(tmp_path: Path) -> None:
    for beta, rate, seed in product((0.02, 0.1), (1e-5, 1e-4), (0, 1)):
        make_run(tmp_path / f"{beta}-{rate}-{seed}", beta=beta, seed=seed, ppo__learning_rate=rate)
    drawn = """(() => { const titles = [byId("heat").layout.title.text];
      byId("heat-y").value = "seed"; drawHeat(); titles.push(byId("heat").layout.title.text);
      byId("filter").value = "learning_rate=0.0001"; drawHeat();
      return [...titles, byId("heat").layout.title.text]; })()"""
    both, rates, one = asked_of_the_page(tmp_path, tmp_path, drawn)
    assert both == "objective, mean over seed"
    assert rates == "objective, mean over learning_rate"
    assert one == "objective"


@pytest.mark.slow
def test_a_filter_that_nothing_passed_leaves_no_words_above_the_plots(
    sweep: Path, tmp_path: Path
) -> None:
    assert main([str(sweep), "--output", str(tmp_path)]) == 0
    html = tmp_path / "compare.html"
    asking = """<script>
      const filter = (text) => { byId("filter").value = text; byId("filter").oninput(); };
      setTimeout(() => filter("no such run"), 7000);
      setTimeout(() => { window.said = byId("heat").textContent; filter(""); }, 11000);
      setTimeout(() => document.title = JSON.stringify([window.said,
        [...document.querySelectorAll(".plot")].map((place) => place.firstChild.nodeType)]),
      15000)</script></body>"""
    html.write_text(html.read_text().replace("</body>", asking))
    title = re.search("<title>(.*?)</title>", in_a_browser(html, width=1500).stdout)[1]
    said, kinds = json.loads(title)
    assert said == "no run has a value of objective"
    assert kinds == [1] * 9  # elements, no text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bands", "wanted"),
    [(True, "init_kl_coef=0.3 cliprange=0.2, 2 seeds"), (False, "init_kl_coef=0.3 cliprange=0.2")],
)
def test_a_curve_under_the_mouse_says_whose_it_is(tmp_path: Path, bands: bool, wanted: str) -> None:
    for beta, epsilon, seed in ((0.1, 0.1, 0), (0.3, 0.2, 0), (0.3, 0.2, 1)):
        make_run(tmp_path / f"{beta} <b>{seed}", beta=beta, epsilon=epsilon, seed=seed)
    assert main([str(tmp_path), "--output", str(tmp_path)]) == 0
    html = tmp_path / "compare.html"
    asking = """<script>byId("bands").checked = BANDS;
      setTimeout(() => {
        const place = byId("curve-0");
        const curveNumber = place.data.findLastIndex((t) => t.legendgroup === "init_kl_coef=0.3");
        Plotly.Fx.hover(place, [{ curveNumber, pointNumber: 20 }]);
      }, 7000);
      setTimeout(() => document.title = JSON.stringify(
        [...document.querySelectorAll("#curve-0 .hoverlayer text")].map((t) => t.textContent)),
      9000)</script></body>"""
    asking = asking.replace("BANDS", json.dumps(bands))
    html.write_text(html.read_text().replace("</body>", asking))
    title = re.search("<title>(.*?)</title>", in_a_browser(html, width=1500).stdout)[1]
    said = "".join(json.loads(unescape(title)))
    assert wanted in said
    assert ("<b>1" in said) == (not bands)


@pytest.mark.slow
def test_what_was_measured_once_is_drawn_as_a_point(tmp_path: Path) -> None:
    for beta in (0.1, 0.3):
        make_run(tmp_path / str(beta), beta=beta, every=1000)
    assert main([str(tmp_path), "--output", str(tmp_path)]) == 0
    html = tmp_path / "compare.html"
    asking = """<script>setTimeout(() => {
        const choice = document.querySelector("select.metric");
        choice.value = "eval/gold";
        choice.onchange();
      }, 7000);
      setTimeout(() => document.title = JSON.stringify([0, 1].map((i) =>
        byId(`curve-${i}`).data.map((t) => [t.mode, t.marker.color === t.line.color]))),
      11000)</script></body>"""
    html.write_text(html.read_text().replace("</body>", asking))
    title = re.search("<title>(.*?)</title>", in_a_browser(html, width=1500).stdout)[1]
    assert json.loads(title) == [[["markers", True]] * 2, [["lines", True]] * 2]


@pytest.mark.slow
def test_the_page_puts_written_numbers_in_their_order(sweep: Path, tmp_path: Path) -> None:
    asking = """[["0.1", "0.02", "-", "1e-05", "0"], ["10", "9", "a2", "a10"]]
      .map((some) => some.sort(inOrder))"""
    numbers, names = asked_of_the_page(sweep, tmp_path, asking)
    assert numbers == ["-", "0", "1e-05", "0.02", "0.1"]
    assert names == ["9", "10", "a2", "a10"]


@pytest.mark.slow
def test_neither_many_seeds_nor_a_long_name_hide_the_other_columns(tmp_path: Path) -> None:
    for seed in range(10):
        make_run(tmp_path / "runs" / str(seed), seed=seed)
    make_run(tmp_path / "runs" / ("long_name_" * 20), beta=0.3)
    asking = """[...document.querySelectorAll("#table tr")].slice(1)
      .map((row) => [row.clientHeight, row.cells[1].clientWidth])"""
    shapes = asked_of_the_page(tmp_path / "runs", tmp_path, asking)
    assert len(shapes) == 2
    assert max(height for height, _ in shapes) < 250
    assert max(width for _, width in shapes) < 700


@pytest.mark.slow
def test_the_table_is_sorted_by_the_keyboard_too(sweep: Path, tmp_path: Path) -> None:
    asking = """(() => {
      const heading = () => document.querySelectorAll("#table th")[0];
      heading().firstChild.focus();
      document.activeElement.click();
      const told = () => [heading().ariaSort, heading().contains(document.activeElement),
        [...document.querySelectorAll("#table tr")].slice(1).map((r) => r.cells[0].textContent)];
      const first = told();
      document.activeElement.click();
      return [first, told()];
    })()"""
    falling, rising = asked_of_the_page(sweep, tmp_path, asking)
    assert falling == ["descending", True, ["0.1", "0.1", "0", "0"]]
    assert rising == ["ascending", True, ["0", "0", "0.1", "0.1"]]


@pytest.mark.slow
@pytest.mark.parametrize("width", [500, 1300])
def test_a_long_legend_stands_below_the_axis_in_rising_order(tmp_path: Path, width: int) -> None:
    betas = (0.1, 0.9, 0.2, 0.5, 0.3, 0.4, 0.05, 0.6, 0.7)
    for i, beta in enumerate(betas):
        make_run(tmp_path / "runs" / str(i), beta=beta)
    asking = """["curve-0", "frontier-score"].map((id) => [
      byId(id).querySelector(".xtitle").getBoundingClientRect().bottom,
      byId(id).querySelector(".legend").getBoundingClientRect().top,
      byId(id)._fullLayout._size.h,
      [...byId(id).querySelectorAll(".legendtext")].map((text) => text.textContent)])"""
    for axis, legend, height, names in asked_of_the_page(
        tmp_path / "runs", tmp_path, asking, width=width
    ):
        assert axis <= legend
        assert height > 100
        assert [n for n in names if "=" in n] == [f"init_kl_coef={b:g}" for b in sorted(betas)]


def test_what_a_sweep_handed_out_as_text_does_not_hide_the_run_s_own_number() -> None:
    own = {"ppo": {"init_kl_coef": 0.2}, "model_cfg": {"path": "x"}}
    handed_out = {"ppo.init_kl_coef": "2e-1", "model": "tiny"}
    for config in ({**own, **handed_out}, {**handed_out, **own}):
        assert _config(config) == {"ppo.init_kl_coef": 0.2, "model.path": "x"}


def test_an_empty_section_is_no_setting_since_wandb_keeps_none() -> None:
    section = {"chat": False, "template_kwargs": {}}
    with_empty, without = flat({"data": section}), _config({"data": {"chat": False}})
    assert with_empty == without == {"data.chat": False}


def test_a_trial_that_was_refused_has_no_config_to_differ_in() -> None:
    assert _config({"ppo.init_kl_coef": -1, "seed": 0}) == {}
