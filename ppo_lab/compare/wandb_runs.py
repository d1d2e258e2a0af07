"""The same records from Weights & Biases: a project's runs, or a sweep's, through its API."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ppo_lab.compare.runs import Run, columns
from ppo_lab.record import flat
from ppo_lab.wandb_mirror import X_AXIS

ALIASES = ("beta", "epsilon", "_wandb")  # said again elsewhere in the config
OF_SUMMARY = ("status", "reason", "steps", "objective", "wall_s", "tokens_per_second")
AT_ONCE = 8


def fetch_runs(path: str) -> list[Run]:
    """Every run of `entity/project`, or of `entity/project/sweep`, oldest first.

    Raises:
        ValueError: the path has another form.
    """
    parts = path.strip("/").split("/")
    if len(parts) not in (2, 3):
        raise ValueError(f"{path}: must be entity/project or entity/project/sweep")
    import wandb

    api = wandb.Api()
    found = api.sweep(path).runs if len(parts) == 3 else api.runs(path, order="+created_at")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(_fetched, found))


def _fetched(remote: Any) -> Run:
    """One run; what cannot be had of it is named in `reason`."""
    run = Run(remote.name or remote.id, str(getattr(remote, "url", remote.id)))
    try:
        run.config = _config(remote.config)
        run.summary = _summary(dict(remote.summary))
        rows = ({"step": row.get(X_AXIS), **row} for row in remote.scan_history())
        run.history = columns(row for row in rows if row["step"] is not None)
        run.status = str(run.summary.get("status") or remote.state)
        run.reason = str(run.summary.get("reason", ""))
    except Exception as error:  # W&B's client raises many kinds, and one run must not cost the rest
        run.status, run.reason = "broken", f"{type(error).__name__}: {error}"
    return run


def _config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys; groups that a sweep's own values displaced come back under their names.

    What a sweep handed out may be a text, as 2e-1 is in YAML: the run's own number goes before it.
    Of a trial that was refused nothing else is there, and it counts as a run without a config.
    """
    own = {key: value for key, value in config.items() if key not in ALIASES}
    displaced = {
        key.removesuffix("_cfg"): own.pop(key) for key in list(own) if key.endswith("_cfg")
    }
    if not any(isinstance(value, Mapping) for value in (*own.values(), *displaced.values())):
        return {}
    handed_out = {key: value for key, value in own.items() if "." in key}
    return flat({**handed_out, **{k: v for k, v in own.items() if "." not in k}, **displaced})


def _summary(summary: Mapping[str, Any]) -> dict[str, Any]:
    """summary.json as the tracker sent it, nested again."""
    nested: dict[str, Any] = {name: summary[name] for name in OF_SUMMARY if name in summary}
    for key, value in summary.items():
        first, *rest = key.split("/", 2)
        if first == "eval" and len(rest) == 2:
            nested.setdefault("eval", {}).setdefault(rest[0], {})[rest[1]] = value
        elif first == "train" and rest:
            nested.setdefault("train", {})[rest[0]] = value
    return nested
