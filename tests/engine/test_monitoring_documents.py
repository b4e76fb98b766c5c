"""What is documented and queried is what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from engine.monitoring.__main__ import main
from engine.monitoring.definitions import ENGINE_METRICS, PREFIX, table
from engine.monitoring.key_usage import KEY_METRICS
from pipeline.job_metrics import JOB_METRICS

ALL = (*ENGINE_METRICS, *KEY_METRICS, *JOB_METRICS)
# Named by eSurge, with the prefix `esurge_`.
ESURGE = (
    "requests_total",
    "request_duration_seconds",
    "time_to_first_token_seconds",
    "tokens_generated_total",
    "tokens_per_second",
    "waiting_requests",
    "running_requests",
    "scheduled_tokens",
    "preempted_requests_total",
    "schedule_duration_seconds",
    "model_execution_duration_seconds",
    "batch_size",
    "cache_pages_total",
    "cache_pages_used",
    "cache_hit_rate",
    "system_info",
)


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    import engine.monitoring

    return json.loads((Path(engine.monitoring.__file__).parent / "grafana.json").read_text())


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in panels(dashboard) for target in panel["targets"]]


def test_the_tables_are_those_of_the_definitions(repository: Path):
    text = (repository / "engine/monitoring/MONITORING.md").read_text()
    _, engines, keys, job = re.split(r"^## .+\n\n", text, flags=re.MULTILINE)
    assert engines.strip() == table(ENGINE_METRICS).strip(), "python -m engine.monitoring metrics prints it"
    assert keys.strip() == table(KEY_METRICS).strip()
    assert job.strip() == table(JOB_METRICS).strip()


def test_names_keep_to_prometheus_conventions():
    assert len({each.name for each in ALL}) == len(ALL)
    for each in ALL:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", each.name)
        assert each.help.endswith(".")
        assert each.name.endswith("_total") == (each.kind == "counter") or each.name == "cache_pages_total"
        assert bool(each.buckets) == (each.kind == "histogram")
        assert list(each.buckets) == sorted(set(each.buckets))
        if re.search(r"duration|latency|time_to", each.name):
            assert each.name.endswith("_seconds")


def test_every_name_that_esurge_documents_is_there():
    assert set(ESURGE) <= {each.name for each in ENGINE_METRICS}


def test_every_metric_that_grafana_queries_exists(dashboard: dict[str, Any]):
    known = {name: each for each in ALL for name in each.sample_names}
    found = set()
    for expression in expressions(dashboard):
        names = re.findall(rf"{PREFIX}\w+", expression)
        assert names
        for name in names:
            assert name in known, f"{name} in {expression}"
            found.add(known[name].name)
        for by in re.findall(r"sum by \(([^)]+)\) \((?:rate\()?(\w+)", expression):
            labels, name = by[0].split(", "), by[1]
            assert set(labels) - {"le"} <= set(known[name].labels), expression
        for name in re.findall(rf"rate\(({PREFIX}\w+)", expression):
            assert known[name].kind in ("counter", "histogram"), f"{name} does not only grow"
        for name in re.findall(rf"({PREFIX}\w+)\{{engine=~", expression):
            assert "engine" in known[name].labels
    variables = {each["name"]: each for each in dashboard["templating"]["list"]}
    assert variables["engine"]["query"]["query"] == f"label_values({PREFIX}system_info, engine)"
    assert {"requests_total", "prefix_cached_tokens_total", "job_rows_done_total"} <= found


def test_expressions_are_balanced_and_ask_only_for_declared_variables(dashboard: dict[str, Any]):
    declared = {each["name"] for each in dashboard["templating"]["list"]} | {"__rate_interval"}
    for expression in expressions(dashboard):
        assert set(re.findall(r"\$\{?(\w+)", expression)) <= declared
        for opening, closing in ("()", "{}", "[]"):
            assert expression.count(opening) == expression.count(closing), expression
        assert len(re.findall(r"rate\(", expression)) == expression.count("[$__rate_interval]")


def test_the_grafana_dashboard_is_laid_out_as_grafana_wants_it(dashboard: dict[str, Any]):
    assert {"title", "uid", "schemaVersion", "panels", "templating", "time", "annotations"} <= set(dashboard)
    assert isinstance(dashboard["schemaVersion"], int)
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, f"{panel['title']} lies over another panel"
        taken |= cells
    for panel in panels(dashboard):
        assert panel["type"] in ("timeseries", "stat")
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"] in ("short", "reqps", "percentunit", "s", "bytes")
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs) > 0
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_the_command_prints_what_is_packaged(dashboard: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    assert main(["grafana"]) == 0
    assert json.loads(capsys.readouterr().out) == dashboard
    assert main(["metrics"]) == 0
    assert capsys.readouterr().out == table(ENGINE_METRICS)
