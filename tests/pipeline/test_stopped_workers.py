"""Eight processes on one run, started by two schedulers, some stopped (SIGSTOP) for longer than the lease.

A stopped worker wakes up in a run that others have gone on with, and commits what it had: the record decides.
Takes minutes: TIDEMILL_CHAOS=1, and TIDEMILL_ROUNDS for how often (3).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from pipeline.exit_codes import ExitCode
from pipeline.results import open_run
from pipeline.storage import open_storage
from pipeline.verify import Verifier
from tests.pipeline.job_helpers import final_bytes, job_settings, run_fake, write_shards

NUM_WORKERS = 8
TAKEOVER_S = 1.0
ROUNDS = int(os.environ.get("TIDEMILL_ROUNDS", "3"))
pytestmark = pytest.mark.skipif(
    not os.environ.get("TIDEMILL_CHAOS"), reason="takes minutes: TIDEMILL_CHAOS=1"
)

WORKER = """
import sys, time
from functools import partial
from pathlib import Path
from pipeline import sharing
from pipeline.ledger import Ledger
from pipeline.run import run_job
from tests.pipeline.job_helpers import fake_engine, fake_model, job_settings

sharing.HELD_POLL_SECONDS = 0.1

def slow_engine(loaded, settings):
    engine = fake_engine(loaded, settings)
    step = engine.step
    engine.step = lambda: time.sleep(0.2) or step()
    return engine

open_ledger = partial(Ledger.open, heartbeat_s=0.1, takeover_s=float(sys.argv[3]))
settings = job_settings(Path(sys.argv[1]), sys.argv[2])
code = run_job(settings, load_model=fake_model, make_engine=slow_engine, open_ledger=open_ledger)
sys.exit(int(code))
"""


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "disk" else request.getfixturevalue("s3_bucket")


def test_workers_that_were_stopped_for_longer_than_their_lease_change_nothing(
    place: str, tmp_path: Path, repository: Path
):
    shards = write_shards(tmp_path / "in", num_shards=6, rows_per_shard=12)
    assert run_fake(job_settings(shards, tmp_path / "undisturbed")) is ExitCode.DONE
    num_stops, num_takeovers = 0, 0
    for round_number in range(ROUNDS):
        chance = random.Random(round_number)
        output = f"{place}/{uuid.uuid4().hex}"
        command = [sys.executable, "-c", WORKER, str(shards), output, str(TAKEOVER_S)]
        workers = [
            subprocess.Popen(command, cwd=repository, stdout=subprocess.DEVNULL) for _ in range(NUM_WORKERS)
        ]
        try:
            while not open_storage(output).size("job.json"):
                time.sleep(0.2)  # the imports take long; nothing is at work before
            num_stops += disturb(workers, chance)
            codes = [worker.wait(timeout=300) for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        assert set(codes) <= {ExitCode.DONE, ExitCode.RETRY_LATER}
        assert ExitCode.DONE in codes
        assert final_bytes(output) == final_bytes(tmp_path / "undisturbed")
        assert Verifier(open_storage(output), tmp_path).run().findings == []
        epochs = {row["attempt"].partition("-")[0] for row in open_run(output).trace()}
        num_takeovers += len(epochs) > 1
    print(f"{place}: {ROUNDS} rounds, {num_stops} stops, take-overs in {num_takeovers} of the outputs")
    assert num_stops >= ROUNDS
    assert num_takeovers >= 1


def disturb(workers: list[subprocess.Popen[bytes]], chance: random.Random) -> int:
    """Stop workers at random, each for longer than a lease, while any works; how often."""
    num_stops = 0
    while any(worker.poll() is None for worker in workers):
        victims = [worker for worker in chance.sample(workers, 4) if worker.poll() is None]
        for victim in victims:
            victim.send_signal(signal.SIGSTOP)
        num_stops += len(victims)
        time.sleep(TAKEOVER_S * chance.uniform(1.5, 3.0))
        for victim in victims:
            victim.send_signal(signal.SIGCONT)
        time.sleep(chance.uniform(0.2, 1.0))
    return num_stops
