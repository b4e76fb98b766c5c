"""The recipes for Kubernetes, systemd, cron and Airflow: valid where they go, their commands compose."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from jobs.publish import PublishSettings
from jobs.schedule import Schedule, ScheduleSettings
from jobs.sections import take_section
from pipeline.compose import compose
from pipeline.exit_codes import ExitCode
from pipeline.settings import KNOWN_KEYS, Settings, from_config

MANIFESTS = ("job.yaml", "cronjob.yaml", "service-account.yaml")


def documents(repository: Path, name: str) -> list[dict[str, Any]]:
    import yaml

    return list(yaml.safe_load_all((repository / "jobs" / "kubernetes" / name).read_text()))


def pod_of(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    return (spec["jobTemplate"]["spec"] if document["kind"] == "CronJob" else spec)["template"]["spec"]


def check_schedule(arguments: list[str]) -> None:
    settings, rest = take_section(arguments, "schedule", ScheduleSettings)
    publishing, rest = take_section(rest, "publish", PublishSettings)
    schedule = Schedule(settings, tuple(rest), publishing)
    assert isinstance(schedule.job("2026-11-28"), Settings)
    assert schedule.folder


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_are_what_kubernetes_accepts(name: str, repository: Path):
    if find_spec("kubernetes_validate") is None:
        pytest.skip("kubernetes-validate is not installed")
    import kubernetes_validate

    for document in documents(repository, name):
        kubernetes_validate.validate(document, "1.33", strict=True)
        broken = document | {"spex": {}}
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(broken, "1.33", strict=True)


def test_commands_in_manifests_compose(repository: Path):
    (job,), (cronjob,) = (documents(repository, name) for name in MANIFESTS[:2])
    (worker,) = pod_of(job)["containers"]
    assert worker["command"] == ["python", "-m", "pipeline.run"]
    config = compose([each.replace("$(JOB_COMPLETION_INDEX)", "7") for each in worker["args"]], KNOWN_KEYS)
    assert config is not None
    settings = from_config(config)
    assert settings.worker.index == 7
    assert settings.worker.count == job["spec"]["completions"] == job["spec"]["parallelism"]
    (scheduler,) = pod_of(cronjob)["containers"]
    assert scheduler["command"] == ["python", "-m", "jobs.schedule"]
    check_schedule(scheduler["args"])


@pytest.mark.parametrize("name", MANIFESTS[:2])
def test_pods_find_what_they_refer_to_and_have_time_to_drain(name: str, repository: Path):
    (document,) = documents(repository, name)
    pod = pod_of(document)
    account, secret = documents(repository, "service-account.yaml")
    assert pod["serviceAccountName"] == account["metadata"]["name"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert pod["terminationGracePeriodSeconds"] > Settings.__dataclass_fields__["drain_seconds"].default
    for container in pod["containers"]:
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert [each["secretRef"]["name"] for each in container["envFrom"]] == [secret["metadata"]["name"]]
    spec = document["spec"]["jobTemplate"]["spec"] if document["kind"] == "CronJob" else document["spec"]
    fatal, disrupted = spec["podFailurePolicy"]["rules"]
    assert fatal["onExitCodes"]["containerName"] in {container["name"] for container in pod["containers"]}
    final = {ExitCode.BAD_CONFIG, ExitCode.TOO_MANY_REJECTS}
    assert set(fatal["onExitCodes"]["values"]) - {ExitCode.NOT_PUBLISHED} == final
    assert disrupted["action"] == "Ignore"


def test_the_crontab_composes(repository: Path):
    text = (repository / "jobs" / "schedules" / "crontab").read_text()
    (entry,) = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert re.match(r"(\S+ ){5} *\S", entry)
    assert "%" not in entry
    command = entry.partition("-m jobs.schedule")[2].partition(">>")[0]
    check_schedule(shlex.split(command))


def test_the_systemd_units_are_accepted_and_compose(repository: Path, tmp_path: Path):
    folder = repository / "jobs" / "schedules"
    service = (folder / "tidemill.service").read_text()
    command = re.search(r"^ExecStart=((?:.*\\\n)*.*)", service, re.MULTILINE)
    assert command is not None
    check_schedule(shlex.split(command[1].replace("\\\n", " ").partition("-m jobs.schedule")[2]))
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not here; the command composes")
    # The interpreter and the user that it names are not on this machine.
    local = service.replace("/srv/tidemill/.venv/bin/python", sys.executable).replace("User=tidemill\n", "")
    local = local.replace("WorkingDirectory=/srv/tidemill", f"WorkingDirectory={tmp_path}")
    (tmp_path / "tidemill.service").write_text(local)
    shutil.copy(folder / "tidemill.timer", tmp_path)
    units = [str(tmp_path / f"tidemill.{kind}") for kind in ("service", "timer")]
    found = subprocess.run([analyze, "verify", "--man=no", *units], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "tidemill" not in found.stderr, found.stderr
    fatal = re.search(r"^RestartPreventExitStatus=(.*)$", service, re.MULTILINE)
    assert fatal is not None
    assert [int(code) for code in fatal[1].split()] == [
        ExitCode.BAD_CONFIG,
        ExitCode.TOO_MANY_REJECTS,
        ExitCode.NOT_PUBLISHED,
    ]


@pytest.mark.filterwarnings("ignore")  # Airflow's own
def test_airflow_loads_the_dag(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if find_spec("airflow") is None:
        pytest.skip("Airflow is not installed: it wants an environment of its own")
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path))
    # By name: neither it nor its types are there where types are checked.
    dagbag = import_module("airflow.dag_processing.dagbag")
    bag = dagbag.DagBag(str(repository / "jobs" / "schedules"))
    assert bag.import_errors == {}
    dag = bag.dags["tidemill"]
    assert {task.task_id: task.downstream_task_ids for task in dag.tasks} == {
        "generate": {"publish"},
        "publish": set(),
    }
