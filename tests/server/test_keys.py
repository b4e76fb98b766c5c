"""The life of API keys: made, found, withdrawn, limited, and kept over restarts without being written
down."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from engine.errors import ConfigError, OutputError
from engine.server.api_key import ApiKey, KeyStateError, UnknownKeyError, key_digest
from engine.server.audit import AuditLog
from engine.server.key_limits import KeyLimits
from engine.server.keys import KeyRing


class Clock:
    """Seconds that pass when told to."""

    def __init__(self, now: float = 1_790_000_000.0):
        self.now = now

    def __call__(self) -> float:
        return self.now


def id_of(key: ApiKey) -> str:
    return key.id


def only_key(ring: KeyRing) -> ApiKey:
    (key,) = ring.keys()
    return key


def test_a_new_key_is_found_by_what_was_told_once_and_by_nothing_else():
    ring = KeyRing()
    secret = ring.generate_api_key(label="notebook")
    other = ring.generate_api_key()
    assert secret.startswith("sk-tm-")
    assert len(secret) > 40
    assert secret != other
    found = ring.find(secret)
    assert found is not None
    assert (found.label, found.role, found.status) == ("notebook", "user", "active")
    assert ring.find(secret.encode()) == found
    for wrong in ("", secret[:-1], secret + "x", secret.upper(), key_digest(secret).hex(), "x" * 10_000):
        assert ring.find(wrong) is None


def test_keys_known_beforehand_have_label_role_and_limits():
    ring = KeyRing(api_keys={"demo-key": {"label": "UI", "requests_per_minute": 2, "role": "admin"}})
    found = ring.find("demo-key")
    assert found is not None
    assert (found.label, found.role, found.limits) == ("UI", "admin", KeyLimits(requests_per_minute=2))
    assert KeyRing(api_keys=["a-key"]).find("a-key") is not None


@pytest.mark.parametrize(
    ("api_keys", "says"),
    [
        ({"": {}}, "1 to 512 visible"),
        ({"a b": {}}, "visible ASCII"),
        ({"k": {"role": "root"}}, "expected one of user, admin, monitor"),
        ({"k": {"label": "two\nlines"}}, "printable"),
        ({"k": {"label": "sk-tm-" + "x" * 20}}, "must not hold a key"),
        ({"k": {"tokens_per_week": 1}}, "unknown limit"),
        ({"k": {"expires_in_s": -1}}, "above 0"),
    ],
)
def test_what_cannot_be_a_key_is_refused(api_keys: dict, says: str):
    with pytest.raises(ConfigError, match=says):
        KeyRing(api_keys=api_keys)


def test_a_rotated_key_is_the_same_key_with_another_secret():
    clock = Clock()
    ring = KeyRing(clock=clock)
    old = ring.generate_api_key(label="a")
    key = only_key(ring)
    ring.record_usage(key.id, 3, 4)
    rotated, new = ring.rotate(key.id)
    assert rotated.id == key.id
    assert ring.find(old) is None
    assert ring.find(new) == key
    assert ring.usage(key.id)["total_tokens"] == 7
    _, newest = ring.rotate(key.id, grace_s=60.0)
    clock.now += 59
    assert ring.find(new) == ring.find(newest) == key
    clock.now += 1
    assert ring.find(new) is None
    assert ring.find(newest) == key


def test_suspended_is_until_reactivated_and_revoked_for_ever():
    ring = KeyRing()
    secret = ring.generate_api_key()
    key_id = only_key(ring).id
    ring.suspend(key_id)
    assert ring.why_refused(ring.get(key_id)) == "suspended"
    ring.reactivate(key_id)
    assert ring.why_refused(ring.get(key_id)) is None
    ring.revoke(key_id)
    found = ring.find(secret)
    assert found is not None
    assert ring.why_refused(found) == "revoked"
    for change in (ring.reactivate, ring.suspend, ring.rotate):
        with pytest.raises(KeyStateError, match="revoked"):
            change(key_id)
    with pytest.raises(UnknownKeyError, match="no API key 'key-none'"):
        ring.get("key-none")


def test_a_key_expires():
    clock = Clock()
    ring = KeyRing(clock=clock)
    ring.generate_api_key(expires_in_s=10.0)
    clock.now += 9.9
    assert ring.why_refused(only_key(ring)) is None
    clock.now += 0.1
    assert ring.why_refused(only_key(ring)) == "expired"


def test_limits_hold_and_other_keys_do_not_count():
    clock = Clock()
    ring = KeyRing(api_keys={"a": {"requests_per_minute": 2}, "b": {"requests_per_minute": 2}}, clock=clock)
    first, second = ring.keys()
    assert [ring.admit(first.id) is None for _ in range(3)] == [True, True, False]
    assert ring.admit(second.id) is None
    assert ring.usage(first.id) == {
        "requests": 2,
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "total_tokens": 0,
        "in_flight": 2,
    }
    clock.now += 61
    assert ring.admit(first.id) is None


def test_concurrency_is_what_is_not_released():
    ring = KeyRing(api_keys={"a": {"max_concurrent": 1}})
    key_id = only_key(ring).id
    assert ring.admit(key_id) is None
    exceeded = ring.admit(key_id)
    assert exceeded is not None
    assert exceeded.kind == "concurrency"
    ring.release(key_id)
    assert ring.admit(key_id) is None


def test_a_restart_keeps_keys_states_totals_and_windows(tmp_path: Path):
    clock = Clock()
    path = tmp_path / "keys.json"
    with_limit = {"demo-key": {"label": "UI", "requests_per_hour": 2}}
    ring = KeyRing(path, api_keys=with_limit, clock=clock)
    secret = ring.generate_api_key(label="made", limits=KeyLimits(tokens_per_lifetime=10))
    demo, made = ring.keys()
    assert ring.admit(demo.id) is None
    assert ring.admit(demo.id) is None
    ring.record_usage(made.id, 6, 4)
    ring.suspend(made.id)
    ring.close()
    again = KeyRing(path, api_keys=with_limit, clock=clock)
    assert list(map(id_of, again.keys())) == [demo.id, made.id]
    assert again.usage(made.id)["total_tokens"] == 10
    assert again.usage(demo.id)["in_flight"] == 0
    assert again.admit(demo.id) is not None
    assert again.admit(made.id) is not None
    found = again.find(secret)
    assert found is not None
    assert again.why_refused(found) == "suspended"
    again.close()


def test_a_key_known_beforehand_that_was_revoked_stays_so_and_takes_other_limits(tmp_path: Path):
    path = tmp_path / "keys.json"
    ring = KeyRing(path, api_keys={"demo-key": {"label": "UI"}})
    ring.revoke(only_key(ring).id)
    ring.close()
    again = KeyRing(path, api_keys={"demo-key": {"label": "new", "max_concurrent": 3}})
    key = only_key(again)
    again.close()
    assert (key.status, key.label, key.limits) == ("revoked", "new", KeyLimits(max_concurrent=3))


def test_the_file_holds_hashes_is_private_and_is_always_whole(tmp_path: Path):
    path = tmp_path / "keys.json"
    ring = KeyRing(path, api_keys={"demo-key": {"label": "UI"}})
    secret = ring.generate_api_key()
    text = path.read_text()
    assert key_digest(secret).hex() in text
    assert secret not in text
    assert "demo-key" not in text
    for file in tmp_path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert json.loads(text)["version"] == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["keys.json", "keys.json.lock"]
    ring.close()


def test_a_second_server_on_the_same_file_is_refused(tmp_path: Path):
    ring = KeyRing(tmp_path / "keys.json")
    with pytest.raises(ConfigError, match="in use by another server"):
        KeyRing(tmp_path / "keys.json")
    ring.close()
    KeyRing(tmp_path / "keys.json").close()


@pytest.mark.parametrize(
    ("content", "mode", "says"),
    [
        ('{"version": 1, "keys": []}', 0o644, "chmod 600"),
        ('{"version": 1, "keys"', 0o600, "not the JSON"),
        ('{"version": 2, "keys": []}', 0o600, "version 1"),
        ("[]", 0o600, "version 1"),
    ],
)
def test_a_file_that_is_not_to_be_trusted_is_refused(tmp_path: Path, content: str, mode: int, says: str):
    path = tmp_path / "keys.json"
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=says):
        KeyRing(path)
    path.unlink()
    KeyRing(path).close()  # what failed holds no lock


def test_a_change_that_cannot_be_saved_did_not_happen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ring = KeyRing(tmp_path / "keys.json")
    secret = ring.generate_api_key(label="before")
    key_id = only_key(ring).id
    before = (tmp_path / "keys.json").read_bytes()

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    for change in (
        lambda: ring.revoke(key_id),
        lambda: ring.rotate(key_id),
        lambda: ring.update(key_id, label="after"),
        lambda: ring.generate_api_key(),
    ):
        with pytest.raises(OutputError, match="No space left"):
            change()
    assert only_key(ring) == ring.find(secret)
    assert only_key(ring).label == "before"
    assert (tmp_path / "keys.json").read_bytes() == before
    assert ring.audit.recent(1)[0]["action"] == "key.create.failed"
    monkeypatch.undo()
    ring.close()


def test_usage_is_written_by_and_by(tmp_path: Path):
    path = tmp_path / "keys.json"
    ring = KeyRing(path, api_keys=["a"], save_interval_s=0.01)
    ring.record_usage(only_key(ring).id, 5, 6)
    saver = ring._saver
    assert saver is not None
    saver.join(10)
    assert json.loads(path.read_text())["keys"][0]["usage"]["total_tokens"] == 11
    ring.close()


def test_each_change_is_in_the_audit_log_and_no_key_is(tmp_path: Path):
    audit = AuditLog(tmp_path / "audit.jsonl")
    ring = KeyRing(api_keys={"demo-key": {"label": "UI"}}, audit=audit)
    secret = ring.generate_api_key(label="x", actor="key-admin")
    key_id = ring.keys()[1].id
    _, rotated = ring.rotate(key_id)
    ring.suspend(key_id)
    ring.reactivate(key_id)
    ring.update(key_id, limits=KeyLimits(max_concurrent=1))
    ring.revoke(key_id)
    text = (tmp_path / "audit.jsonl").read_text()
    events = [json.loads(line) for line in text.splitlines()]
    actions = ["provision", "create", "rotate", "suspend", "reactivate", "update", "revoke"]
    assert [event["action"] for event in events] == [f"key.{action}" for action in actions]
    assert events[1]["actor"] == "key-admin"
    assert events[1]["key_id"] == key_id
    assert audit.recent(1) == [events[-1]]
    for key in ("demo-key", secret, rotated):
        assert key not in text
        assert key_digest(key).hex() not in text
    assert stat.S_IMODE((tmp_path / "audit.jsonl").stat().st_mode) == 0o600


def test_the_audit_log_rotates_by_size_and_loses_only_the_oldest(tmp_path: Path):
    audit = AuditLog(tmp_path / "audit.jsonl", max_bytes=1000, num_kept=2, num_recent=5)
    for number in range(40):
        audit.record("key.create", actor="a", number=number)
    files = [tmp_path / name for name in ("audit.jsonl.2", "audit.jsonl.1", "audit.jsonl")]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert all(file.stat().st_size <= 1000 for file in files)
    lines = [line for file in files for line in file.read_text().splitlines()]
    numbers = [json.loads(line)["number"] for line in lines]
    assert numbers == list(range(numbers[0], 40))
    assert [event["number"] for event in audit.recent()] == [39, 38, 37, 36, 35]


def test_what_cannot_be_audited_does_not_happen(tmp_path: Path):
    ring = KeyRing(audit=AuditLog(tmp_path / "no folder" / "audit.jsonl"))
    with pytest.raises(OutputError, match="audit log"):
        ring.generate_api_key()
    assert ring.keys() == []
