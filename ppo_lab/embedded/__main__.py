"""`python -m ppo_lab.embedded [--rebuild]`: build the help desk's models, say where they are."""

from __future__ import annotations

import argparse
import json

from ppo_lab import signals


def main() -> None:
    """Build what is not there yet (or everything again), then print the figures of the build."""
    parser = argparse.ArgumentParser(prog="python -m ppo_lab.embedded", description=__doc__)
    parser.add_argument("--rebuild", action="store_true", help="build again even if it is there")
    arguments = parser.parse_args()
    from ppo_lab.embedded.build import ensure
    from ppo_lab.errors import ConfigError, refuse

    try:
        folder = ensure(rebuild=arguments.rebuild)
    except ConfigError as error:
        refuse(error)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    policy, reward = report["policy"], report["reward"]
    print(f"folder         {folder}")
    print(f"policy         held-out loss {policy['held_out_loss']:.3f}, {policy['seconds']:.0f} s")
    print(f"reward model   accuracy {reward['held_out_accuracy']:.3f}, {reward['seconds']:.0f} s")
    print(f"whole build    {report['seconds']:.0f} s")


if __name__ == "__main__":
    signals.end_quietly()
    main()
