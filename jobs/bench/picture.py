"""The picture of a comparison: a panel a workload, a bar an engine, its spread as a whisker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.errors import MissingExtraError

_OURS, _PEERS = "#1b6ca8", "#b8bfc6"


def draw(data: dict[str, Any], path: Path) -> None:
    """Write `path` (PNG) from what a comparison found. Raises MissingExtraError without matplotlib."""
    try:
        # Without pyplot: no backend is chosen, and no figure is kept.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingExtraError("matplotlib", "notebooks", "the picture of the comparison") from error
    workloads = data["workloads"]
    most = max(len(workload["engines"]) for workload in workloads.values())
    figure = Figure(figsize=(4.2 * len(workloads) + 1.2, 0.42 * most + 1.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(workloads), squeeze=False)[0]
    for panel, (name, workload) in zip(panels, workloads.items(), strict=True):
        labels, medians, below, above, colours = [], [], [], [], []
        for engine, values in workload["engines"].items():
            rate = values["tokens_per_second"]
            part = "" if values["share_of_rows"] == 1 else f", {values['share_of_rows']:.0%} of the rows"
            labels.append(f"{engine}\n{values['precision']}{part}")
            medians.append(rate["median"])
            below.append(rate["median"] - rate["min"])
            above.append(rate["max"] - rate["median"])
            colours.append(_OURS if engine.startswith("tidemill") else _PEERS)
        places = range(len(labels))
        panel.barh(places, medians, xerr=(below, above), color=colours, capsize=2, ecolor="#444444")
        for place, median, over in zip(places, medians, above, strict=True):
            panel.annotate(
                f"{median:.0f}",
                (median + over, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
            )
        panel.set_yticks(places, labels, fontsize=7)
        panel.invert_yaxis()
        panel.margins(x=0.15)
        panel.set_title(f"{name}: output tokens/s", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    machine = data["machine"]
    figure.suptitle(f"{machine['cpu']}, {machine['num_cores']} cores; more is better", fontsize=9)
    figure.savefig(path, format="png")
