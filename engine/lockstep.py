"""Several processes, on one machine or many, run one engine: the first plans each step, all run it.

    process 0     plan → inputs → send → run        one scheduler, the only one that knows of requests
    the others              receive  → run          the same calls of JAX in the same order

A message is the host's part of a step's inputs (`HostStep`). Each carries a digest of all before it, so that
processes which lose their step stop instead of exchanging what does not belong together. Before an engine is
made its options, weights and versions are compared, part by part.

The processes find each other through `jax.distributed`, which also hands out the key that their connections
are authenticated with; what is sent is numbers and JSON, nothing that could be run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import jax
import numpy as np

from engine.buckets import Bucket
from engine.config import EngineConfig
from engine.errors import ConfigError, RetryLater
from engine.replica_batch import HostStep

_DIGEST_SIZE = 16
_KEY_SIZE = 32
_GREETING_SIZE = 256
_ENGINE, _STEP, _END = b"engine", b"step", b"end"


class Lockstep:
    """One process's connections to the others: of process 0 to each, of each to process 0."""

    def __init__(self, connections: Sequence[Connection], leads: bool):
        self.leads = leads
        self._connections = connections
        self._chain = bytes(_DIGEST_SIZE)
        self._received: tuple[bytes, bytes] | None = None
        self._has_ended = False

    # -- process 0 ---------------------------------------------------------------------------------

    def begin(self, facts: Mapping[str, str]) -> None:
        """An engine is about to be made: all make one, of the same `facts`. Raises ConfigError, in every
        process, naming those that differ."""
        if not self.leads:
            self._agree(facts)
            return
        self._send(_ENGINE, json.dumps(dict(facts)).encode())
        answers = [connection.recv_bytes().decode() for connection in self._connections]
        for process, answer in enumerate(answers, 1):
            if answer:
                raise ConfigError(f"process {process}: {answer}")

    def send(self, step: HostStep) -> None:
        """A step that all run."""
        self._send(_STEP, encode(step))

    def end(self) -> None:
        """No more steps; said once."""
        if self.leads and not self._has_ended:
            self._has_ended = True
            self._send(_END, b"")

    def _send(self, kind: bytes, body: bytes) -> None:
        self._chain = _next_digest(self._chain, kind, body)
        message = b"\n".join((kind, self._chain + body))
        try:
            for connection in self._connections:
                connection.send_bytes(message)
        except OSError as error:
            raise RetryLater(
                f"a process of this engine is gone ({error}): start all of them again"
            ) from error

    # -- the others --------------------------------------------------------------------------------

    def waits_for_engine(self) -> bool:
        """Whether an engine is to be made next; False: process 0 has ended."""
        return self._next()[0] == _ENGINE

    def steps(self) -> Iterator[HostStep]:
        """The steps of the engine that was made, until process 0 has no more."""
        while self._next()[0] == _STEP:
            yield decode(self._taken())
        if self._next()[0] != _END:
            raise RetryLater("process 0 makes another engine while this one runs: start all of them again")

    def _agree(self, facts: Mapping[str, str]) -> None:
        kind, _ = self._next()
        if kind != _ENGINE:
            raise RetryLater(f"process 0 sent {kind.decode()} where an engine was to be made")
        theirs = json.loads(self._taken())
        names = sorted(name for name in facts.keys() | theirs.keys() if facts.get(name) != theirs.get(name))
        problem = f"{', '.join(names)} differ from those of process 0: start all alike" if names else ""
        self._connections[0].send_bytes(problem.encode())
        if problem:
            raise ConfigError(problem)

    def _next(self) -> tuple[bytes, bytes]:
        """The message that was received and not yet taken; waits for one."""
        if self._received is None:
            try:
                message = self._connections[0].recv_bytes()
            except (EOFError, OSError) as error:
                raise RetryLater("process 0 of this engine is gone: start all of them again") from error
            kind, _, rest = message.partition(b"\n")
            digest, body = rest[:_DIGEST_SIZE], rest[_DIGEST_SIZE:]
            self._chain = _next_digest(self._chain, kind, body)
            if digest != self._chain:
                raise RetryLater("this process has lost its step with process 0: start all of them again")
            self._received = kind, body
        return self._received

    def _taken(self) -> bytes:
        _, body = self._next()
        self._received = None
        return body


def _next_digest(chain: bytes, kind: bytes, body: bytes) -> bytes:
    return hashlib.blake2b(chain + kind + body, digest_size=_DIGEST_SIZE).digest()


def facts_of(config: EngineConfig, fingerprint: str) -> dict[str, str]:
    """What processes that run one engine must have in common. `fingerprint`: of the model's files."""
    own = ("process_id", "compilation_cache_dir")
    values = {name: str(value) for name, value in dataclasses.asdict(config).items() if name not in own}
    versions = {package: version(package) for package in ("jax", "jaxlib", "flax", "numpy")}
    return {f"engine.{name}": value for name, value in values.items()} | versions | {"model": fingerprint}


def connect(config: EngineConfig) -> Lockstep | None:
    """Connect this process with the others; None where it is alone. All must call it."""
    if jax.process_count() == 1:
        return None
    from jax.experimental import multihost_utils

    greeting = np.zeros(_GREETING_SIZE, np.uint8)
    if jax.process_index() > 0:
        told = bytes(multihost_utils.broadcast_one_to_all(greeting).astype(np.uint8))
        key, (host, port) = told[:_KEY_SIZE], json.loads(told[_KEY_SIZE:].rstrip(b"\0"))
        connection = Client((host, port), authkey=key)
        connection.send_bytes(str(jax.process_index()).encode())
        return Lockstep([connection], leads=False)
    host = (config.coordinator_address or "").rpartition(":")[0] or socket.gethostbyname(socket.gethostname())
    key = os.urandom(_KEY_SIZE)
    num_others = jax.process_count() - 1
    with Listener((host, 0), backlog=num_others, authkey=key) as listener:
        told = key + json.dumps(listener.address).encode()
        greeting[: len(told)] = np.frombuffer(told, np.uint8)
        multihost_utils.broadcast_one_to_all(greeting)
        connections: dict[int, Connection] = {}
        for _ in range(num_others):
            connection = listener.accept()
            connections[int(connection.recv_bytes())] = connection
    return Lockstep([connections[process] for process in sorted(connections)], leads=True)


def encode(step: HostStep) -> bytes:
    """A step as a line of JSON and the bytes of its arrays."""
    arrays = {"numbers": step.numbers, **step.unusual}
    head = {
        "bucket": step.bucket,
        "continues": step.continues,
        "copies": step.copies,
        "arrays": [(name, array.dtype.str, array.shape) for name, array in arrays.items()],
    }
    return b"\n".join((json.dumps(head).encode(), b"".join(array.tobytes() for array in arrays.values())))


def decode(message: bytes) -> HostStep:
    """What `encode` was given."""
    line, _, rest = message.partition(b"\n")
    head: dict[str, Any] = json.loads(line)
    arrays, start = {}, 0
    for name, dtype, shape in head["arrays"]:
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(rest, dtype, count, start).reshape(shape)
        start += arrays[name].nbytes
    return HostStep(Bucket(*head["bucket"]), head["copies"], head["continues"], arrays.pop("numbers"), arrays)
