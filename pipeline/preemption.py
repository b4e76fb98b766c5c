"""The notice that this machine is about to be taken away: a file that appears, or a cloud's metadata server.

Spot machines are told some time before they vanish (30 seconds on Google Compute Engine, two minutes on
EC2). A notice drains the job as SIGTERM does.

    gce   instance/preempted, instance/maintenance-event
          https://cloud.google.com/compute/docs/instances/create-use-spot
    ec2   spot/instance-action, with a session token (IMDSv2)
          https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
"""

from __future__ import annotations

import http.client
import json
import logging
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.errors import ConfigError
from pipeline.exit_codes import ExitCode
from pipeline.signals import GRACE_SECONDS, StopRequest, end_now

logger = logging.getLogger(__name__)

Notice = Callable[[], str | None]
"""Why this machine is about to go; None while it is not. Raises OSError when that cannot be found out."""

_TIMEOUT_S = 2.0
_MAX_ANSWER_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class PreemptionSettings:
    """notice: where the end of this machine is announced. file: whose appearance is the notice. metadata_url:
    of the cloud's metadata server; None is the usual one. poll_seconds: from one look to the next.
    """

    notice: Literal["none", "file", "gce", "ec2"] = "none"
    file: str | None = None
    metadata_url: str | None = None
    poll_seconds: float = 5.0

    def __post_init__(self) -> None:
        if (self.notice == "file") != bool(self.file):
            raise ConfigError(
                "preemption.notice=file and preemption.file=<path> go together: give both, or neither"
            )
        if not 0.01 <= self.poll_seconds <= 3600:
            raise ConfigError(f"preemption.poll_seconds={self.poll_seconds:g}: must be from 0.01 to 3600")
        if self.metadata_url is not None and not self.metadata_url.startswith("http://"):
            raise ConfigError(f"preemption.metadata_url={self.metadata_url!r}: give an http:// URL")


def notice_of(settings: PreemptionSettings) -> Notice | None:
    """What to look at; None for nothing."""
    if settings.notice == "file":
        assert settings.file is not None, "checked when the settings were made"
        return FileNotice(Path(settings.file).expanduser())
    if settings.notice == "gce":
        return GceNotice(settings.metadata_url or "http://metadata.google.internal")
    if settings.notice == "ec2":
        return Ec2Notice(settings.metadata_url or "http://169.254.169.254")
    return None


class FileNotice:
    """A file that whoever knows better creates, such as a hook of a scheduler."""

    def __init__(self, path: Path):
        self._path = path

    def __call__(self) -> str | None:
        return f"a notice ({self._path})" if self._path.exists() else None


class GceNotice:
    """Google Compute Engine's metadata server, on TPU machines too."""

    def __init__(self, url: str):
        self._url = f"{url.rstrip('/')}/computeMetadata/v1/instance/"

    def __call__(self) -> str | None:
        if self._get("preempted") == "TRUE":
            return "a preemption notice of GCE"
        event = self._get("maintenance-event")
        # A machine that migrates goes on; one with an accelerator is ended instead.
        return f"a notice of GCE ({event})" if event.startswith("TERMINATE") else None

    def _get(self, name: str) -> str:
        headers = {"Metadata-Flavor": "Google"}
        status, answer, answered = _request("GET", self._url + name, headers)
        if status != 200 or answered.get("Metadata-Flavor") != "Google":
            raise OSError(f"{self._url}{name} answered {status}, which is no metadata server of GCE")
        return answer.strip()


class Ec2Notice:
    """EC2's instance metadata service, version 2."""

    def __init__(self, url: str):
        self._url = f"{url.rstrip('/')}/latest/"
        self._token: str | None = None

    def __call__(self) -> str | None:
        url = f"{self._url}meta-data/spot/instance-action"
        status, answer, _ = _request(
            "GET", url, {"X-aws-ec2-metadata-token": self._token or self._new_token()}
        )
        if status == 404:  # so it answers while no end is planned
            return None
        if status == 401:  # the token has expired
            self._token = None
        if status != 200:
            raise OSError(f"{url} answered {status}")
        try:
            action = json.loads(answer)
            return f"a spot notice of EC2 ({action['action']} at {action['time']})"
        except (ValueError, KeyError, TypeError):
            return "a spot notice of EC2"

    def _new_token(self) -> str:
        url = f"{self._url}api/token"
        status, token, _ = _request("PUT", url, {"X-aws-ec2-metadata-token-ttl-seconds": "21600"})
        if status != 200:
            raise OSError(f"{url} answered {status}")
        self._token = token.strip()
        return self._token


class NoticeWatch:
    """Within its block a notice calls `stop.ask`. A drain that is then not over in time ends the process, as
    after a signal.
    """

    def __init__(self, notice: Notice | None, stop: StopRequest, poll_seconds: float):
        self._notice = notice
        self._stop = stop
        self._poll_seconds = poll_seconds
        self._over = threading.Event()
        self._has_warned = False
        self._thread = threading.Thread(target=self._watch, name="tidemill-preemption", daemon=True)

    def __enter__(self) -> NoticeWatch:
        if self._notice is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._notice is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._over.is_set():
            cause = self._look()
            if cause is not None:
                self._stop.ask(cause)
                if not self._over.wait(max(self._stop.seconds_left, 0.0) + GRACE_SECONDS):
                    end_now(ExitCode.DRAINED, "stopped before the end of a long step")
                return
            self._over.wait(self._poll_seconds)

    def _look(self) -> str | None:
        assert self._notice is not None, "nothing is watched otherwise"
        try:
            return self._notice()
        except (OSError, http.client.HTTPException) as error:
            if not self._has_warned:
                logger.warning("no notice of preemption can be read, trying on: %s", error)
                self._has_warned = True
            return None


def _request(method: str, url: str, headers: Mapping[str, str]) -> tuple[int, str, Mapping[str, str]]:
    """Status, text and headers of an answer. Proxies are for the world outside, not for the machine's own
    metadata.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, method=method, headers=dict(headers))
    try:
        with opener.open(request, timeout=_TIMEOUT_S) as answer:
            return answer.status, answer.read(_MAX_ANSWER_BYTES).decode("utf-8", "replace"), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, "", {}
