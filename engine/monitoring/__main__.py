"""`python -m engine.monitoring grafana` prints the Grafana dashboard, `… metrics` the table of metrics."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.resources import files

from engine.monitoring.definitions import ENGINE_METRICS, table


def grafana_dashboard() -> str:
    """The dashboard as JSON, to be imported in Grafana; it asks which Prometheus to read."""
    return (files("engine.monitoring") / "grafana.json").read_text(encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m engine.monitoring", description=__doc__)
    parser.add_argument("what", choices=("grafana", "metrics"))
    what = parser.parse_args(arguments).what
    sys.stdout.write(grafana_dashboard() if what == "grafana" else table(ENGINE_METRICS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
