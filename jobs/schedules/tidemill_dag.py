"""An Airflow DAG: one run a day, by Airflow's own date. To Airflow's dags/ folder, edited.

Airflow decides when a date is started, catches up and tries again; however often it does, a date is one run.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import subprocess
from datetime import datetime, timedelta

from airflow.exceptions import AirflowException, AirflowFailException
from airflow.sdk import DAG, task

FOLDER = "/srv/tidemill"
PYTHON = f"{FOLDER}/.venv/bin/python"
JOB = ["input.path=s3://bucket/prompts/{date}", "output.path=s3://bucket/answers/{date}", "progress=lines"]

# Bad configuration, too many rejects, refused by the publish gate: somebody has to look. The rest passes.
FINAL = (2, 3, 5)


def run(*command: str) -> None:
    code = subprocess.run([PYTHON, "-m", *command], cwd=FOLDER, check=False).returncode
    if code in FINAL:
        raise AirflowFailException(f"{command[0]} ended with {code}: see its last lines")
    if code != 0:
        raise AirflowException(f"{command[0]} ended with {code}: to be started again")


with DAG(
    "tidemill",
    schedule="15 2 * * *",
    start_date=datetime(2026, 11, 1),
    catchup=True,
    max_active_runs=2,
    default_args={"retries": 20, "retry_delay": timedelta(minutes=1)},
    tags=["tidemill"],
) as dag:

    @task
    def generate(ds: str) -> str:
        run("jobs.schedule", f"schedule.date={ds}", "schedule.overlap=queue", *JOB)
        return ds

    @task
    def publish(date: str) -> None:
        run("jobs.publish", f"output.path=s3://bucket/answers/{date}")

    publish(generate(ds="{{ ds }}"))
