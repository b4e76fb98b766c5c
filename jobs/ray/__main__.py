"""`python -m jobs.ray <overrides of pipeline.run> ray.num_workers=4 ray.address=auto`: the job on Ray.

The same overrides mean the same run as under `python -m pipeline.run`, and either goes on with what the other
began. `--help` lists them all.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.errors import ConfigError
from jobs.command import exit_code_of
from jobs.ray.driver import run_on_ray
from jobs.ray.settings import RaySettings
from jobs.sections import section_help, take_section
from pipeline.compose import compose
from pipeline.exit_codes import ExitCode
from pipeline.settings import KNOWN_KEYS, from_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Compose and run; every expected error is one line and an exit code."""
    return exit_code_of(lambda: _run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: Sequence[str]) -> ExitCode:
    cluster, rest = take_section(arguments, "ray", RaySettings)
    if {"--help", "-h"} & set(rest):
        print(f"== python -m jobs.ray ==\n{section_help('ray', RaySettings)}\n", flush=True)
    config = compose(rest, KNOWN_KEYS)
    if config is None:
        return ExitCode.DONE
    settings = from_config(config)
    if settings.mode != "run":
        raise ConfigError(f"mode={settings.mode} needs no workers: use python -m pipeline.run")
    return run_on_ray(settings, cluster)


if __name__ == "__main__":
    sys.exit(main())
