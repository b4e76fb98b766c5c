"""`python -m jobs.publish output.path=…`: mark a finished run as published, if it looks like the one before.

    <series>/_published/000001.json, 000002.json, …     created once each: a run, its numbers, its predecessor

The record is the mark: readers take the run that the highest number names. A run that differs from the last
published one by more than the limits allow is not marked, and the exit code is 5.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from engine.errors import ConfigError, OutputError
from jobs.command import exit_code_of
from jobs.run_statistics import RunStatistics
from jobs.sections import section_help, take_section
from pipeline.commits import parse_record, publish_record, retrying
from pipeline.compose import compose
from pipeline.exit_codes import ExitCode
from pipeline.fingerprint import readable_json
from pipeline.results import Run
from pipeline.run import open_output
from pipeline.run_state import MANIFEST, read_job
from pipeline.settings import KNOWN_KEYS, audit_settings
from pipeline.storage import Storage, open_storage

PUBLISH_VERSION = 1
FOLDER = "_published"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishSettings:
    """series: the folder whose published runs are compared; null is the one that the output lies in.
    max_length_change: of the mean number of generated tokens, as a share of the former. The others are
    differences of shares, of 0.1 for example from 2 % to 12 %: max_finish_change of any finish reason, either
    way; max_duplicate_rise, max_empty_rise and max_reject_rise upwards only. force: publish beyond the limits
    too, which the record then says.
    """

    series: str | None = None
    max_length_change: float = 0.25
    max_finish_change: float = 0.1
    max_duplicate_rise: float = 0.05
    max_empty_rise: float = 0.02
    max_reject_rise: float = 0.02
    force: bool = False

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name.startswith("max_") and not value >= 0:
                raise ConfigError(f"publish.{name}={value:g}: must be 0 or more")


def exceeded(now: RunStatistics, before: RunStatistics, limits: PublishSettings) -> list[str]:
    """What differs by more than the limits allow, a sentence each; empty when the run may be published."""
    found = []
    change = abs(now.mean_length - before.mean_length)
    if change > limits.max_length_change * before.mean_length:
        share = change / before.mean_length if before.mean_length else float("inf")
        found.append(
            f"length: {now.mean_length:.1f} tokens a sample after {before.mean_length:.1f}, a change of "
            f"{share:.1%} where publish.max_length_change={limits.max_length_change:g} allows "
            f"{limits.max_length_change:.1%}"
        )
    for reason in sorted({*now.finish_reasons, *before.finish_reasons}):
        shares = now.finish_reasons.get(reason, 0.0), before.finish_reasons.get(reason, 0.0)
        if abs(shares[0] - shares[1]) > limits.max_finish_change:
            found.append(_moved(f"finish reason {reason!r}", *shares, "max_finish_change", limits))
    for what in ("duplicate", "empty", "reject"):
        rates = getattr(now, f"{what}_rate"), getattr(before, f"{what}_rate")
        if rates[0] - rates[1] > getattr(limits, f"max_{what}_rise"):
            found.append(_moved(f"{what} rate", *rates, f"max_{what}_rise", limits))
    return found


def _moved(what: str, now: float, before: float, name: str, limits: PublishSettings) -> str:
    limit = getattr(limits, name)
    return (
        f"{what}: {now:.1%} after {before:.1%}, {100 * abs(now - before):.1f} points apart where "
        f"publish.{name}={limit:g} allows {100 * limit:.1f}"
    )


def published_as(storage: Storage, settings: PublishSettings) -> int | None:
    """The number under which the run in `storage` is published; None when it is not."""
    series, run = _series(storage, settings), _identity(storage)
    for number in reversed(_numbers(series)):
        record = _read(series, number)
        if {key: record[key] for key in run} == run:
            return number
    return None


def publish(storage: Storage, settings: PublishSettings) -> ExitCode:
    """Publish the run in `storage`, or say why not. Raises OutputError when it is not finished."""
    number = published_as(storage, settings)
    if number is not None:
        print(f"{storage.url} is published already, as number {number}.", flush=True)
        return ExitCode.DONE
    series = _series(storage, settings)
    series.check()
    run = _open(storage)
    now = RunStatistics.of(run)
    while True:
        numbers = _numbers(series)
        latest = _read(series, numbers[-1]) if numbers else None
        beyond = [] if latest is None else exceeded(now, RunStatistics(**latest["statistics"]), settings)
        if beyond and not settings.force:
            assert latest is not None
            print(f"{storage.url} is not published, for it differs from {latest['output']}:", file=sys.stderr)
            print(*(f"  {each}" for each in beyond), sep="\n", file=sys.stderr)
            print("publish.force=true publishes it all the same.", file=sys.stderr, flush=True)
            return ExitCode.NOT_PUBLISHED
        number = numbers[-1] + 1 if numbers else 1
        record = readable_json(
            {
                "publish_version": PUBLISH_VERSION,
                "number": number,
                **_identity(storage),
                "statistics": now.to_json(),
                "compared_with": None if latest is None else latest["output"],
                "exceeded": beyond,
                "time": time.time(),  # for people; nothing compares it
            }
        )
        # Somebody else's run may take the number: then that one is what this run is compared with.
        if publish_record(series, _path(number), record) == record:
            after = "" if latest is None else f", after {latest['output']}"
            print(f"{storage.url} is published as number {number}{after}.", flush=True)
            return ExitCode.DONE


def _series(storage: Storage, settings: PublishSettings) -> Storage:
    folder = settings.series or storage.url.rstrip("/").rpartition("/")[0]
    if not folder or folder.endswith(":/"):
        raise ConfigError(f"{storage.url} lies in no folder: say publish.series=…")
    return open_storage(folder)


def _identity(storage: Storage) -> dict[str, Any]:
    """Which run it is: where, and what its manifest holds."""
    data = retrying(lambda: storage.read(MANIFEST))
    if data is None:
        raise OutputError(f"{storage.url} holds no {MANIFEST}, so no finished run; start its job first")
    return {"output": storage.url, "manifest_sha256": hashlib.sha256(data).hexdigest()}


def _open(storage: Storage) -> Run:
    job = read_job(storage)
    if job is None:
        raise OutputError(f"{storage.url} holds no job.json, so it is not an output of Tidemill")
    return Run(storage, job)


def _numbers(series: Storage) -> list[int]:
    names = retrying(lambda: series.list(FOLDER))
    stems = [name.removesuffix(".json") for name in names if name.endswith(".json")]
    return sorted(int(stem) for stem in stems if stem.isdigit())


def _path(number: int) -> str:
    return f"{FOLDER}/{number:06d}.json"


def _read(series: Storage, number: int) -> dict[str, Any]:
    place = f"{series.url}/{_path(number)}"
    record = parse_record(retrying(lambda: series.read(_path(number))) or b"", place)
    version = record.get("publish_version")
    if version != PUBLISH_VERSION:
        raise OutputError(f"{place}: a record of version {version}, and this program reads {PUBLISH_VERSION}")
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    """Publish; every expected error is one line and an exit code."""
    return exit_code_of(lambda: _run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: Sequence[str]) -> ExitCode:
    if {"--help", "-h"} & set(arguments):
        print(__doc__)
        print(section_help("publish", PublishSettings))
        return ExitCode.DONE
    settings, rest = take_section(arguments, "publish", PublishSettings)
    config = compose(rest, KNOWN_KEYS)
    if config is None:
        return ExitCode.DONE
    return publish(open_output(audit_settings(config).output), settings)


if __name__ == "__main__":
    sys.exit(main())
