"""`mode=verify`, `mode=repair` and `mode=gc`: look at an output as it stands, say what there is, mend it."""

from __future__ import annotations

from pipeline.exit_codes import ExitCode
from pipeline.garbage import find_garbage, remove_garbage
from pipeline.repair import repair
from pipeline.run_state import read_job
from pipeline.settings import GcSettings
from pipeline.spool import open_spool
from pipeline.storage import Storage
from pipeline.verify import Finding, Verified, Verifier

_SHOWN = 50


def verify_job(storage: Storage, spool_dir: str | None) -> ExitCode:
    """Read everything again and say what is wrong: DAMAGED when something is. A run in progress is whole."""
    verified = _verify(storage, spool_dir)
    print(*_lines(storage, verified), sep="\n", flush=True)
    return ExitCode.DAMAGED if verified.findings else ExitCode.DONE


def repair_output(storage: Storage, spool_dir: str | None) -> None:
    """Take away what is missing or damaged and what was made from it, for the run that follows to make again.

    Raises as `repair`, and OutputError when there is no output yet.
    """
    verified = _verify(storage, spool_dir)
    print(*_lines(storage, verified), sep="\n", flush=True)
    if not verified.findings:
        return
    job = read_job(storage)
    assert job is not None, "verified"
    removed = repair(storage, job["fingerprint"], verified.findings)
    print(f"removed {len(removed)} objects; what they held is made again", flush=True)


def gc_job(storage: Storage, settings: GcSettings) -> ExitCode:
    """List what dead workers left behind, and with `settings.remove` remove it."""
    garbage = find_garbage(storage, settings.min_age_hours * 3600.0)
    for path in (*garbage.attempts, *garbage.leftovers):
        print(f"{storage.url}/{path}")
    number = len(garbage.attempts) + len(garbage.leftovers)
    age = f"at least {settings.min_age_hours:g} hours old"
    if settings.remove:
        remove_garbage(storage, garbage)
        print(f"removed {number} objects that nothing refers to, {age}", flush=True)
    else:
        hint = "; add --yes to remove them" if number else ""
        print(f"{number} objects that nothing refers to, {age}{hint}", flush=True)
    return ExitCode.DONE


def _verify(storage: Storage, spool_dir: str | None) -> Verified:
    with open_spool(spool_dir) as spool:
        return Verifier(storage, spool).run()


def _lines(storage: Storage, verified: Verified) -> list[str]:
    counts = verified.counts
    state = "finished" if verified.is_finished else "in progress"
    lines = [
        f"{storage.url}: {state}, {verified.num_finished} of {verified.num_shards} shards finished",
        f"  read      {verified.num_files:,} files, {verified.num_bytes:,} bytes, "
        f"{verified.num_chunks:,} chunks",
        f"  rows      {counts['rows']:,} committed: {counts['ok']:,} ok, {counts['rejected']:,} rejected, "
        f"{counts['duplicates']:,} duplicates",
    ]
    lines += [f"  WRONG     {_line(finding)}" for finding in verified.findings[:_SHOWN]]
    if len(verified.findings) > _SHOWN:
        lines.append(f"  WRONG     and {len(verified.findings) - _SHOWN:,} more")
    lines.append(f"  verdict   {f'{len(verified.findings)} wrong' if verified.findings else 'whole'}")
    return lines


def _line(finding: Finding) -> str:
    text = " ".join(finding.problem.split())
    return text if finding.path in text else f"{finding.path}: {text}"
