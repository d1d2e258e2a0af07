"""`python -m ppo_lab.dashboard --entity E --project P`: a saved view of a W&B project.

It needs the extra `dashboard` and an account. Without one: `python -m ppo_lab.compare`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from ppo_lab import signals

HEADLINE = ("kl", "mean_reward", "clip_fraction")
LATER = ("kl_coef", "ppo/policy/entropy", "tokens/responses_len_mean", "ppo/grad_norm")
BETA, EPSILON = "ppo.init_kl_coef", "ppo.cliprange"


def main(arguments: Sequence[str] | None = None) -> int:
    """Save the view and print its address; 1 when it cannot be saved."""
    asked = _parser().parse_args(arguments)
    if find_spec("wandb_workspaces") is None:
        print("it needs an extra: pip install 'ppo_lab[dashboard]'", file=sys.stderr)
        return 1
    try:
        saved = workspace(asked.entity, asked.project, name=asked.name).save()
    except Exception as error:  # no network, no account, no such project: W&B raises many kinds
        print(f"could not be saved: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(saved.url)
    return 0


def workspace(entity: str, project: str, *, name: str) -> Any:
    """The view: headline curves, the frontier, beta and epsilon against outcomes, samples."""
    import wandb_workspaces.workspaces as ws

    from ppo_lab.wandb_mirror import X_AXIS

    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            _section("Through training", [_lines(metric) for metric in HEADLINE]),
            _section("Frontier", [_frontier("mean_reward"), _frontier("gold")], columns=2),
            _section("Beta and epsilon", _knobs(), columns=2),
            _section("Answers", _answers(), columns=1),
            _section("Health", [_lines(metric) for metric in LATER]),
        ],
        settings=ws.WorkspaceSettings(x_axis=X_AXIS, max_runs=50),
        runset_settings=ws.RunsetSettings(
            groupby=[ws.Metric("Sweep"), ws.Config(BETA), ws.Config(EPSILON)],
            pinned_columns=[f"summary:{metric}" for metric in HEADLINE],
        ),
    )


def _section(name: str, panels: list[Any], *, columns: int = 3) -> Any:
    import wandb_workspaces.workspaces as ws

    layout = ws.SectionLayoutSettings(columns=columns, rows=-(-len(panels) // columns))
    return ws.Section(name=name, panels=panels, is_open=True, layout_settings=layout)


def _lines(metric: str) -> Any:
    """One metric against the iteration: the mean of each group of runs with its range."""
    import wandb_workspaces.reports.v2 as wr

    from ppo_lab.wandb_mirror import X_AXIS

    return wr.LinePlot(
        title=metric, x=X_AXIS, y=[metric], groupby_aggfunc="mean", groupby_rangefunc="minmax"
    )


def _frontier(score: str) -> Any:
    """Held-out score against KL at the end of each run, with the best so far as a line."""
    import wandb_workspaces.reports.v2 as wr

    return wr.ScatterPlot(
        title=f"held-out {score} against KL",
        x=wr.SummaryMetric("eval/kl"),
        y=wr.SummaryMetric(f"eval/{score}"),
        z=wr.Config(BETA),
        running_ymax=True,
    )


def _knobs() -> list[Any]:
    """Beta and epsilon beside what they led to."""
    import wandb_workspaces.reports.v2 as wr

    column = wr.ParallelCoordinatesPlotColumn
    outcomes = ("eval/kl", "eval/mean_reward", "eval/gold", "clip_fraction")
    return [
        wr.ParallelCoordinatesPlot(
            title="all knobs at once",
            columns=[
                column(wr.Config(BETA), display_name="beta"),
                column(wr.Config(EPSILON), display_name="epsilon"),
                *(column(wr.SummaryMetric(name), display_name=name) for name in outcomes),
            ],
        ),
        wr.ScatterPlot(
            title="epsilon against clip_fraction",
            x=wr.Config(EPSILON),
            y=wr.SummaryMetric("clip_fraction"),
            z=wr.Config(BETA),
        ),
        wr.ParameterImportancePlot(with_respect_to="eval/mean_reward"),
        wr.RunComparer(diff_only="split"),
    ]


def _answers() -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    return [wr.WeavePanelSummaryTable(table_name="samples")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ppo_lab.dashboard", description="Save a view of a W&B project's runs."
    )
    parser.add_argument("--entity", required=True, help="W&B user or team")
    parser.add_argument("--project", default="ppo_lab", help="default: ppo_lab")
    parser.add_argument("--name", default="beta and epsilon", help="name of the saved view")
    return parser


if __name__ == "__main__":
    signals.end_quietly()
    sys.exit(main())
