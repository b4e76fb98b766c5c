"""A driver for the tests of `jobs.ray`: the job without a model, slow enough to be disturbed.

python -m tests.jobs.ray_job <input> <output> <address> <workers> [key=value of RaySettings …]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from jobs.command import exit_code_of
from jobs.ray.driver import run_on_ray
from jobs.ray.settings import RaySettings
from jobs.sections import take_section
from pipeline import sharing
from pipeline.exit_codes import ExitCode
from pipeline.settings import Settings
from tests.pipeline.fake_engine import FakeEngine
from tests.pipeline.job_helpers import fake_engine, fake_model, job_settings

STEP_SECONDS = 0.1


def slow_engine(loaded: Any, settings: Settings) -> FakeEngine:
    sharing.HELD_POLL_SECONDS = 0.2
    engine = fake_engine(loaded, settings)
    step = engine.step

    def slow_step() -> Any:
        time.sleep(STEP_SECONDS)
        return step()

    engine.step = slow_step
    return engine


def main(arguments: list[str]) -> ExitCode:
    source, output, address, num_workers, *more = arguments
    given = [f"ray.address={address}", f"ray.num_workers={num_workers}", *more]
    cluster, rest = take_section(given, "ray", RaySettings)
    overrides: dict[str, Any] = {"progress": "lines", "progress_line_seconds": 0.5}
    overrides |= {
        key.replace(".", "__"): int(value) for key, _, value in (each.partition("=") for each in rest)
    }
    settings = job_settings(Path(source), output, **overrides)
    return exit_code_of(lambda: run_on_ray(settings, cluster, load_model=fake_model, make_engine=slow_engine))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
