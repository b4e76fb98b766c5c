"""Exact duplicates: requests that must come out alike run once, and each is given the result.

Two requests are duplicates when they have the same prompt tokens, salt and effective sampling, and their
draws do not depend on who they are: greedy, or with a seed of their own. The first one, the leader, runs;
those that come while it is unfinished follow it. When a leader is aborted its first follower takes its
place, with all that was computed.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import lru_cache

from engine.outputs import RequestMetrics, RequestOutput
from engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Follower:
    """A request that waits for another's result."""

    request_id: str
    prompt: str | None
    arrival_time: float


@dataclass(slots=True)
class _Leader:
    key: Hashable
    priority: int
    followers: list[Follower]


def duplicate_key(tokens: bytes, salt: str | None, sampling: SamplingParams) -> Hashable | None:
    """What duplicates with this packed prompt have in common; None for a request whose draws are its own."""
    shared = shared_sampling(sampling)
    return None if shared is None else _Key(tokens, salt, shared)


def shared_sampling(sampling: SamplingParams) -> SamplingParams | None:
    """The sampling in effect, the same for all that draw alike; None where draws depend on the request."""
    if sampling.is_greedy:
        return _greedy(sampling)
    return None if sampling.seed is None else sampling


class _Key:
    """Compares like its parts; it is looked up several times, and hashed once."""

    __slots__ = ("_hash", "_parts")

    def __init__(self, *parts: Hashable):
        self._parts = parts
        self._hash = hash(parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._hash == other._hash and self._parts == other._parts


@lru_cache(maxsize=256)
def _greedy(sampling: SamplingParams) -> SamplingParams:
    """Without what shapes a draw, which means nothing where the likeliest token is taken."""
    return replace(sampling, seed=None, top_k=0, top_p=1.0, min_p=0.0)


class Duplicates:
    """Which unfinished requests lead, and who follows them."""

    def __init__(self) -> None:
        self._leaders: dict[str, _Leader] = {}
        self._leading: dict[Hashable, str] = {}
        self._following: dict[str, str] = {}
        self.num_duplicates = 0
        """Requests that were given another one's result."""

    def __contains__(self, request_id: object) -> bool:
        """Whether this request follows another."""
        return request_id in self._following

    @property
    def num_following(self) -> int:
        return len(self._following)

    def follow(self, key: Hashable, follower: Follower, priority: int) -> bool:
        """Let a request wait for the leader with this key; False if there is none, or it is less urgent."""
        leader_id = self._leading.get(key)
        if leader_id is None or self._leaders[leader_id].priority > priority:
            return False
        self._leaders[leader_id].followers.append(follower)
        self._following[follower.request_id] = leader_id
        return True

    def lead(self, key: Hashable, request_id: str, priority: int) -> None:
        """A request with this key runs: those to come may follow it."""
        if key not in self._leading:
            self._leading[key] = request_id
            self._leaders[request_id] = _Leader(key, priority, [])

    def followed(self, request_id: str) -> tuple[str, Follower]:
        """Whom a follower follows, and the follower."""
        leader_id = self._following[request_id]
        followers = self._leaders[leader_id].followers
        return leader_id, next(each for each in followers if each.request_id == request_id)

    def leave(self, request_id: str) -> None:
        """A follower is aborted."""
        followers = self._leaders[self._following.pop(request_id)].followers
        followers[:] = [follower for follower in followers if follower.request_id != request_id]

    def abdicate(self, request_id: str) -> Follower | None:
        """A request that runs is aborted: the follower that now leads in its place, if there is one."""
        leader = self._leaders.pop(request_id, None)
        if leader is None:
            return None
        del self._leading[leader.key]
        if not leader.followers:
            return None
        heir = leader.followers.pop(0)
        del self._following[heir.request_id]
        for follower in leader.followers:
            self._following[follower.request_id] = heir.request_id
        self._leaders[heir.request_id] = leader
        self._leading[leader.key] = heir.request_id
        return heir

    def finish(self, output: RequestOutput) -> list[RequestOutput]:
        """A request has finished: what its followers are given."""
        leader = self._leaders.pop(output.request_id, None)
        if leader is None:
            return []
        del self._leading[leader.key]
        for follower in leader.followers:
            del self._following[follower.request_id]
        self.num_duplicates += len(leader.followers)
        return [as_if_its_own(output, follower) for follower in leader.followers]


def as_if_its_own(output: RequestOutput, follower: Follower) -> RequestOutput:
    """The leader's result for a follower: found as much of its prompt as can be, no time before it came."""
    arrival, times = follower.arrival_time, output.metrics

    def since(time: float | None) -> float | None:
        return None if time is None else max(time, arrival)

    return replace(
        output,
        request_id=follower.request_id,
        prompt=follower.prompt,
        num_cached_tokens=len(output.prompt_token_ids) - 1,  # of a prompt's last token nothing is ever found
        metrics=RequestMetrics(
            arrival_time=arrival,
            first_scheduled_time=since(times.first_scheduled_time),
            first_token_time=since(times.first_token_time),
            finished_time=since(times.finished_time),
        ),
    )
