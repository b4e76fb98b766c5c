"""The console: what every engine does, live on a terminal by rich (extra `monitoring`), or as plain lines.

Where the stream is no terminal a line an engine is written each `LINE_SECONDS`, as the job's progress does.
"""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, TextIO

from engine.errors import MissingExtraError
from engine.monitoring.history import EngineHistory, Point
from engine.monitoring.metrics import Metrics, resident_bytes

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

LINE_SECONDS = 30.0
REFRESH_SECONDS = 1.0


class ConsoleMonitor:
    """Shows `metrics` on `stream` (standard error) until it is closed.

    Raises:
        MissingExtraError: the stream is a terminal, and rich is not installed.
    """

    def __init__(
        self, metrics: Metrics, stream: TextIO | None = None, *, line_seconds: float = LINE_SECONDS
    ) -> None:
        self._metrics = metrics
        self._stream = stream or sys.stderr
        self._line_seconds = line_seconds
        self._over = threading.Event()
        metrics.remember()  # from now on
        show = self._show_lines
        if self._stream.isatty():
            self._console = make_console(self._stream)
            show = self._show_live
        self._thread = threading.Thread(target=show, name="tidemill-console", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Show how things stand, and stop."""
        self._over.set()
        self._thread.join()

    def _show_lines(self) -> None:
        while not self._over.wait(self._line_seconds):
            self._write_lines()
        self._metrics.remember().look()
        self._write_lines()

    def _write_lines(self) -> None:
        self._stream.write("".join(f"{line}\n" for line in lines(self._metrics)))
        self._stream.flush()

    def _show_live(self) -> None:
        from rich.live import Live

        # Nothing is redirected: a chat that streams its answer to standard output goes on as it was.
        with Live(
            overview(self._metrics),
            console=self._console,
            auto_refresh=False,
            redirect_stdout=self._stream is not sys.stderr,
            redirect_stderr=True,
        ) as live:
            while not self._over.wait(REFRESH_SECONDS):
                live.update(overview(self._metrics), refresh=True)
            self._metrics.remember().look()
            live.update(overview(self._metrics), refresh=True)


def make_console(stream: TextIO) -> Console:
    """Raises MissingExtraError without rich."""
    try:
        from rich.console import Console
    except ImportError as error:
        raise MissingExtraError("rich", "monitoring", "the console on a terminal") from error
    return Console(file=stream)


def overview(metrics: Metrics) -> RenderableType:
    """All engines as a table, one a column, and the facts of other sources below."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Tidemill", title_justify="left", header_style="bold", expand=False)
    table.add_column("", style="dim")
    engines = metrics.remember().engines
    columns = [dict(readings(history)) for history in engines.values()]
    for name in engines:
        table.add_column(Text(name), justify="right")
    for label in columns[0] if columns else ():
        table.add_row(label, *[Text(column[label]) for column in columns])
    rest = [f"{name}: {text}" for name, text in _process_facts(metrics).items()]
    return Group(table, Text("   ".join(rest)))


def lines(metrics: Metrics) -> list[str]:
    """The same without a terminal: a line an engine, and one of what other sources say."""
    found = []
    for name, history in metrics.remember().engines.items():
        found.append(f"{name}: " + ", ".join(f"{text} {label}" for label, text in readings(history)))
    found.append(", ".join(f"{name}: {text}" for name, text in _process_facts(metrics).items()))
    return [line for line in found if line]


def readings(history: EngineHistory) -> list[tuple[str, str]]:
    """What is shown of an engine: a label and a text each."""
    now, points = history.watch.now(), history.points()
    point = points[-1] if points else None
    stats = now.stats
    num_pages = stats.pages_free + stats.pages_cached + stats.pages_held
    ended = sum(now.num_ended.values())
    return [
        ("requests/s", f"{point.requests_per_second:,.2f}" if point else "-"),
        ("tokens/s", f"{now.tokens_per_second:,.1f}"),
        ("prompt tokens/s", f"{point.prompt_per_second:,.1f}" if point else "-"),
        ("active requests", f"{now.num_active:,}"),
        ("running", f"{stats.running:,}"),
        ("waiting", f"{stats.waiting:,}"),
        ("finished requests", f"{ended:,}"),
        (
            "pages in use",
            f"{stats.pages_held:,} of {num_pages:,} ({stats.pages_held / max(num_pages, 1):.0%})",
        ),
        ("of prompt tokens cached", _share(stats.num_cached_tokens, stats.num_prompt_tokens)),
        ("to first token", _latency(point, "first_token")),
        ("between tokens", _latency(point, "inter_token")),
    ]


def _process_facts(metrics: Metrics) -> dict[str, str]:
    held = resident_bytes()
    memory = {} if held is None else {"memory": f"{held / (1 << 30):.2f} GiB"}
    return metrics.facts() | memory


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _latency(point: Point | None, name: str) -> str:
    """Median and 95th percentile, in milliseconds."""
    median = getattr(point, f"{name}_p50", None)
    if median is None:
        return "-"
    return f"{1000 * median:,.0f} / {1000 * getattr(point, f'{name}_p95'):,.0f} ms"
