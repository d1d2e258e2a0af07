"""compare.html: one page that needs nothing but itself, with every plot and the data behind it.

Python puts the data in; the script in page_files/ draws them with Plotly. Whatever a model wrote
goes into the page as JSON and out of it as text nodes, never as markup.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from ppo_lab.compare.comparison import BINDS_FROM, Comparison, describe
from ppo_lab.compare.groups import ABSENT, all_differing_keys, enough_digits, shown
from ppo_lab.compare.outcomes import OUTCOMES, evaluations, outcomes
from ppo_lab.compare.overoptimisation import Curve, Overoptimisation
from ppo_lab.compare.runs import Run
from ppo_lab.compare.statistics import t_quantile, thinned

CURVE_BYTES = 9_000_000  # of the page, for all curves together
MOST_POINTS = 1000
FEWEST_POINTS = 20
MOST_EVALUATIONS = 40  # of a run's path through training
MOST_FITTED_POINTS = 2000  # drawn; all are fitted
SAMPLE_CHARACTERS = 3_000_000
LONGEST_TEXT = 4000
SAMPLE_FIELDS = (
    "prompt",
    "response",
    "score",
    "gold",
    "reference_response",
    "reference_score",
    "reference_gold",
)


def page(comparison: Comparison, remarks: Sequence[str], *, title: str) -> str:
    """The whole page as text."""
    from jinja2 import Environment
    from plotly.offline import get_plotlyjs

    folder = files("ppo_lab.compare") / "page_files"
    parts = {
        name: (folder / name).read_text("utf-8") for name in ("page.html", "page.css", "page.js")
    }
    template = Environment(autoescape=True).from_string(parts["page.html"])
    return template.render(
        title=title,
        css=parts["page.css"],
        script=parts["page.js"],
        plotly=get_plotlyjs(),
        data=as_json(payload(comparison, remarks, title=title)),
    )


def as_json(data: Any) -> str:
    """JSON that can stand inside a script element: no text in it can end the element."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def payload(comparison: Comparison, remarks: Sequence[str], *, title: str) -> dict[str, Any]:
    """Everything that the page's script draws."""
    runs = comparison.runs
    number = {id(run): i for i, group in enumerate(comparison.groups) for run in group.runs}
    differing = all_differing_keys(runs)
    digits = {key: enough_digits(run.config.get(key) for run in runs) for key in differing}
    texts = _Texts(SAMPLE_CHARACTERS)
    points = points_a_curve(runs)
    return {
        "title": title,
        "remarks": list(remarks),
        "keys": comparison.keys,
        "differing": differing,
        "metrics": _metrics(runs),
        "outcomes": {name: meaning for name, (_, meaning) in OUTCOMES.items()},
        "groups": [group.label for group in comparison.groups],
        "runs": [
            _run(run, comparison.keys, points)
            | {"group": number[id(run)], "samples": _samples(run, texts)}
            | {"differing": [shown(run.config.get(k, ABSENT), digits[k]) for k in differing]}
            for run in runs
        ],
        "texts": texts.kept,
        "fits": [_fit(task, fit) for task, fit in comparison.fits.items()],
        "bindsFrom": BINDS_FROM,
        "points": points,
        "t": [t_quantile(n) for n in range(1, 31)],
    }


def points_a_curve(runs: Sequence[Run]) -> int:
    """How many points each curve may have, so that the page keeps its size."""
    curves = sum(len(run.history) for run in runs)
    affordable = CURVE_BYTES // max(1, curves * 16 // 3)  # four bytes a number, 4/3 in base 64
    return int(np.clip(affordable, FEWEST_POINTS, MOST_POINTS))


def _metrics(runs: Sequence[Run]) -> dict[str, tuple[str, str]]:
    """Every metric that any run logged: name -> (unit, meaning), the headline ones first."""
    from ppo_lab.metric_names import METRICS, described

    names = dict.fromkeys([*METRICS, *(name for run in runs for name in run.history)])
    logged = {name for run in runs for name in run.history} - {"step"}
    return {name: described(name) for name in names if name in logged}


def _run(run: Run, keys: Sequence[str], points: int) -> dict[str, Any]:
    """One run without its samples."""
    return {
        "name": run.name,
        "path": run.path,
        "status": run.status,
        "reason": run.reason,
        "steps": run.steps,
        "seed": _plain(run.config.get("seed")),
        "config": {key: _plain(run.config[key]) for key in keys if key in run.config},
        "outcomes": {name: _finite(value) for name, value in outcomes(run).items()},
        "curves": _curves(run, points),
        "evaluations": _evaluations(run),
    }


def _evaluations(run: Run) -> list[list[float | None]]:
    """The evaluations of a run, the first and the last among at most `MOST_EVALUATIONS`."""
    path = evaluations(run)
    return [
        [_finite(float(f"{v:.5g}")) for v in path[i]] for i in _spread(len(path), MOST_EVALUATIONS)
    ]


def _spread(n: int, most: int) -> list[int]:
    """At most `most` places among n, evenly from the first to the last."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).astype(int)).tolist() if n else []


def _curves(run: Run, points: int) -> dict[str, Any]:
    """metric -> float32 values in base 64; `@` holds the steps, `@metric` those of a sparse one."""
    found: dict[str, str] = {}
    step = run.history.get("step", np.array([]))
    full = None
    for name, values in run.history.items():
        measured = np.isfinite(values)
        if name == "step" or not measured.any():
            continue
        at, thin = thinned(step, values, most=points)
        if measured.all():
            full = at if full is None else full
        else:
            found[f"@{name}"] = _packed(at)
        found[name] = _packed(thin)
    return found if full is None else {"@": _packed(full), **found}


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode()


class _Texts:
    """Texts by number, each kept once; beyond the budget of characters they are left out."""

    def __init__(self, budget: int) -> None:
        self.kept: list[str] = []
        self._numbers: dict[str, int] = {}
        self._left = budget

    def number(self, text: str) -> int:
        """Where a text stands, -1 when there was no room for it."""
        text = text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " [...]"
        if text not in self._numbers:
            self._left -= len(text)
            if self._left < 0:
                return -1
            self._numbers[text] = len(self.kept)
            self.kept.append(text)
        return self._numbers[text]


def _samples(run: Run, texts: _Texts) -> list[list[Any]]:
    """The last samples of a run, in the order of SAMPLE_FIELDS, texts by number."""
    rows = [[row.get(name) for name in SAMPLE_FIELDS] for row in run.samples]
    return [[texts.number(v) if isinstance(v, str) else _plain(v) for v in row] for row in rows]


def _fit(task: str, fit: Overoptimisation | str) -> dict[str, Any]:
    if isinstance(fit, str):
        return {"task": task, "text": describe(fit)}
    grid = np.linspace(0, fit.d.max() * 1.1, 120)
    some = _spread(len(fit.d), MOST_FITTED_POINTS)
    return {
        "task": task,
        "text": describe(fit),
        "d": _rounded(fit.d[some]),
        "grid": _rounded(grid),
        "proxy": _curve(fit.proxy, fit.proxy_gain[some], grid),
        "gold": _curve(fit.gold, fit.gold_gain[some], grid),
    }


def _curve(curve: Curve, gains: np.ndarray, grid: np.ndarray) -> dict[str, Any]:
    peak = _finite(curve.peak)
    return {"gains": _rounded(gains), "line": _rounded(curve.at(grid)), "peak": peak}


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _plain(value: Any) -> Any:
    """A setting as JSON has it; what is no number, truth value or text is written out."""
    return _finite(value) if isinstance(value, str | bool | int | float | None) else str(value)
