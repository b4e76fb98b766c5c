"""Batch files of OpenAI's API as a job's input and output: answers, refusals, and the ledger's laws.

The cases of bad files are those of vLLM's public tests of its batch runner, as this job sees them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError
from pipeline.audit_mode import repair_output
from pipeline.exit_codes import ExitCode
from pipeline.openai_batch import output_line
from pipeline.results import open_run
from pipeline.run import run_job
from pipeline.settings import Settings
from pipeline.spool import open_spool
from pipeline.storage import open_storage
from pipeline.verify import Verifier
from tests.pipeline.batch_lines import (
    CREATED,
    MODEL,
    batch_settings,
    chat_line,
    completion_line,
    lines_of,
    write_batch,
)
from tests.pipeline.fake_engine import FakeEngine
from tests.pipeline.job_helpers import fake_model, final_bytes, run_fake

TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}


class Crash(BaseException):
    """Ends a run where it stands; nothing in the pipeline catches it."""


class DyingEngine(FakeEngine):
    """Dies at its step number `dies_at`."""

    def __init__(self, settings: Settings, dies_at: int):
        super().__init__(max_num_seqs=settings.engine.max_num_seqs, seed=settings.engine.seed)
        self.steps_left = dies_at

    def step(self) -> list[Any]:
        self.steps_left -= 1
        if self.steps_left < 0:
            raise Crash
        return super().step()


def good_lines() -> list[dict[str, Any]]:
    return [
        chat_line("plain", "one"),
        chat_line("two samples", "two", n=2, temperature=0.7),
        chat_line("likely", "three", logprobs=True, top_logprobs=1, temperature=0),
        completion_line("completion", "four", seed=3),
        completion_line("echoed", "five", echo=True, logprobs=1),
        completion_line("tokens", [5, 6, 7]),
        chat_line("until the end", "six", max_tokens=None, stop=["zz"]),
        chat_line("parts", "", messages=[{"role": "user", "content": [{"type": "text", "text": "seven"}]}]),
    ]


BAD = {
    "not json": ('{"custom_id": "x", ', "not_json"),
    "missing custom_id": ({"method": "POST", "url": "/v1/completions", "body": {}}, "missing_column"),
    "number as custom_id": (chat_line(7_000), "wrong_type"),
    "method": (chat_line() | {"method": "GET"}, "bad_method"),
    "bad url": (chat_line(url="/v1/wrong"), "bad_url"),
    "no body": ({"custom_id": "a", "method": "POST", "url": "/v1/completions"}, "missing_column"),
    "body of text": (chat_line() | {"body": "hello"}, "wrong_type"),
    "no model": (chat_line(model=None), "missing_column"),
    "stream": (chat_line(stream=True), "not_supported"),
    "no messages": (chat_line(messages=[]), "empty_prompt"),
    "image": (chat_line(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "not_supported"),
    "role": (chat_line(messages=[{"role": "king", "content": "x"}]), "bad_role"),
    "unknown field": (chat_line(temprature=1), "unknown_field"),
    "temperature": (chat_line(temperature=-1), "bad_sampling"),
    "no tokens": (chat_line(max_tokens=0), "bad_sampling"),
    "too long": (completion_line(prompt="x y " * 600), "prompt_too_long"),
    "too many tokens": (completion_line(max_tokens=100_000), "prompt_too_long"),
    "bias beyond the vocabulary": (chat_line(logit_bias={"99999999": 1}), "bad_sampling"),
    "unknown token": (completion_line(prompt=[99_999_999]), "bad_token_id"),
    "two prompts": (completion_line(prompt=["a", "b"]), "not_supported"),
    "suffix": (completion_line(suffix="end"), "not_supported"),
    "unnamed tool": (
        chat_line(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "x"}}),
        "bad_request",
    ),
}


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files, with good and bad lines mixed."""
    folder = tmp_path_factory.mktemp("input")
    lines = good_lines()
    write_batch(
        folder / "0.jsonl", [*lines[:4], '{"custom_id": "torn', chat_line("stream", stream=True), *lines[4:]]
    )
    write_batch(folder / "1.jsonl", [chat_line(f"more-{i}", f"say {i % 3}", temperature=0) for i in range(9)])
    return folder


@pytest.fixture(scope="module")
def undisturbed(batch: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert run_fake(batch_settings(batch, output)) == ExitCode.DONE
    return output


def everything(output: Path) -> dict[str, bytes]:
    errors = {f"errors/{path.name}": path.read_bytes() for path in (output / "errors").glob("*")}
    return final_bytes(output) | errors


def test_every_good_line_is_answered_in_order(undisturbed: Path) -> None:
    answers = lines_of(undisturbed, "data")
    wanted = [line["custom_id"] for line in good_lines()] + [f"more-{i}" for i in range(9)]
    assert [answer["custom_id"] for answer in answers] == wanted
    assert len({answer["id"] for answer in answers}) == len(answers)
    for answer in answers:
        assert set(answer) == {"id", "custom_id", "response", "error"}
        assert answer["error"] is None
        assert answer["response"]["status_code"] == 200
        body = answer["response"]["body"]
        assert body["model"] == MODEL
        assert body["created"] == CREATED
        assert (
            body["usage"]["total_tokens"]
            == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]
        )


def test_answers_have_the_form_that_their_bodies_asked_for(undisturbed: Path) -> None:
    bodies = {line["custom_id"]: line["response"]["body"] for line in lines_of(undisturbed, "data")}
    chat = bodies["plain"]
    assert chat["object"] == "chat.completion"
    assert chat["choices"][0]["message"]["role"] == "assistant"
    assert chat["choices"][0]["message"]["content"]
    assert chat["choices"][0]["logprobs"] is None
    assert [choice["index"] for choice in bodies["two samples"]["choices"]] == [0, 1]
    [entry, *_] = bodies["likely"]["choices"][0]["logprobs"]["content"]
    assert bytes(entry["bytes"]).decode("utf-8", "replace") == entry["token"]
    assert len(entry["top_logprobs"]) == 1
    assert bodies["completion"]["object"] == "text_completion"
    echoed = bodies["echoed"]["choices"][0]
    assert echoed["text"].startswith("five")
    assert echoed["logprobs"]["token_logprobs"][0] is None
    assert len(echoed["logprobs"]["tokens"]) == bodies["echoed"]["usage"]["total_tokens"]
    longest = bodies["until the end"]["usage"]
    assert longest["total_tokens"] <= 256


def test_what_is_wrong_with_a_line_is_its_error(undisturbed: Path) -> None:
    torn, stream = lines_of(undisturbed, "errors")
    assert torn["custom_id"] is None
    assert torn["response"]["body"]["error"]["code"] == "not_json"
    assert stream["custom_id"] == "stream"
    assert stream["response"]["status_code"] == 400
    assert "stream" in stream["response"]["body"]["error"]["message"]
    assert stream["response"]["body"]["error"]["type"] == "invalid_request_error"


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("bad")
    lines = []
    for number, (line, _) in enumerate(BAD.values()):
        is_named = isinstance(line, dict) and isinstance(line.get("custom_id"), str)
        lines.append(line | {"custom_id": str(number)} if is_named else line)
    run_fake(batch_settings(write_batch(folder / "in.jsonl", lines), folder / "out"))
    assert lines_of(folder / "out", "data") == []
    return lines_of(folder / "out", "errors")


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_refused_for_its_reason(refused: list[dict[str, Any]], name: str) -> None:
    assert len(refused) == len(BAD)
    found = refused[list(BAD).index(name)]["response"]["body"]["error"]
    assert found["code"] == BAD[name][1], found["message"]


def test_an_id_that_comes_twice_is_answered_once(tmp_path: Path) -> None:
    path = write_batch(tmp_path / "in.jsonl", [chat_line("a"), chat_line("b"), chat_line("a", "again")])
    run_fake(batch_settings(path, tmp_path / "out"))
    assert [line["custom_id"] for line in lines_of(tmp_path / "out", "data")] == ["a", "b"]
    [error] = lines_of(tmp_path / "out", "errors")
    assert (error["custom_id"], error["response"]["body"]["error"]["code"]) == ("a", "duplicate_id")


def test_a_batch_holds_its_lines_to_one_endpoint_and_model(tmp_path: Path) -> None:
    lines = [chat_line("a"), completion_line("b"), chat_line("c", model="other")]
    path = write_batch(tmp_path / "in.jsonl", lines)
    only = {"input__endpoint": "/v1/chat/completions", "input__served_model": MODEL}
    run_fake(batch_settings(path, tmp_path / "out", **only))
    assert [line["custom_id"] for line in lines_of(tmp_path / "out", "data")] == ["a"]
    codes = [line["response"]["body"]["error"]["code"] for line in lines_of(tmp_path / "out", "errors")]
    assert codes == ["bad_url", "wrong_model"]


def test_what_a_body_leaves_out_is_the_jobs_sampling(tmp_path: Path) -> None:
    path = write_batch(tmp_path / "in.jsonl", [chat_line("a", max_tokens=None), chat_line("b", max_tokens=2)])
    settings = batch_settings(path, tmp_path / "out", sampling__max_tokens=9, sampling__ignore_eos=True)
    run_fake(settings)
    used = [
        line["response"]["body"]["usage"]["completion_tokens"] for line in lines_of(tmp_path / "out", "data")
    ]
    assert used == [9, 2]


@pytest.mark.parametrize("dies_at", [1, 4, 9, 14])
def test_a_killed_batch_goes_on_to_the_same_bytes(
    batch: Path, undisturbed: Path, tmp_path: Path, dies_at: int
) -> None:
    settings = batch_settings(batch, tmp_path / "out")
    with pytest.raises(Crash):
        run_fake(settings, make_engine=lambda loaded, settings: DyingEngine(settings, dies_at))
    assert run_fake(settings) == ExitCode.DONE
    assert everything(tmp_path / "out") == everything(undisturbed)


def test_the_time_of_answers_is_when_the_run_was_planned(batch: Path, tmp_path: Path) -> None:
    settings = batch_settings(batch, tmp_path / "out", output__created=None)
    with pytest.raises(Crash):
        run_fake(settings, make_engine=lambda loaded, settings: DyingEngine(settings, 9))
    run_fake(settings)
    times = {line["response"]["body"]["created"] for line in lines_of(tmp_path / "out", "data")}
    assert len(times) == 1
    [plan] = (tmp_path / "out" / "_state").glob("*/plan.json")
    assert times == {json.loads(plan.read_bytes())["created"]}


def findings(output: Path) -> list[str]:
    with open_spool(None) as spool:
        return [finding.path for finding in Verifier(open_storage(str(output)), spool).run().findings]


def test_a_batch_can_be_verified_and_repaired(batch: Path, undisturbed: Path, tmp_path: Path) -> None:
    settings = batch_settings(batch, tmp_path / "out")
    run_fake(settings)
    assert findings(tmp_path / "out") == []
    [errors] = (tmp_path / "out" / "errors").glob("*.jsonl")
    (tmp_path / "out" / "data" / "part-00001-of-00002.jsonl").unlink()
    errors.chmod(0o644)
    errors.write_bytes(errors.read_bytes()[:-2])
    assert any("errors/" in path for path in findings(tmp_path / "out"))
    repair_output(open_storage(str(tmp_path / "out")), None)
    assert run_fake(settings) == ExitCode.DONE
    assert findings(tmp_path / "out") == []
    assert everything(tmp_path / "out") == everything(undisturbed)


def test_results_of_a_batch_can_be_opened(undisturbed: Path) -> None:
    rows = list(open_run(undisturbed).rows(["row_id", "sample_index", "text", "response"]))
    answered = [row for row in rows if row["sample_index"] == 0]
    assert all(row["response"] is None for row in rows if row["sample_index"])
    written = (
        (undisturbed / "data" / "part-00000-of-00002.jsonl").read_text(encoding="utf-8").splitlines(True)
    )
    assert [output_line(row["row_id"], row["response"]) for row in answered][: len(written)] == written


def test_the_usual_results_of_a_batch_file_can_be_had_too(batch: Path, tmp_path: Path) -> None:
    run_fake(batch_settings(batch, tmp_path / "out", output__format="parquet", output__created=None))
    assert "response" not in open_run(tmp_path / "out").to_arrow().column_names


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"input__format": "jsonl"}, "input.format"),
        ({"prompt__chat": True}, "prompt.chat"),
        ({"input__id_column": "id"}, "input.id_column"),
        ({"input__endpoint": "/v1/embeddings"}, "input.endpoint"),
        ({"output__format": "jsonl"}, "output.created"),
        ({"input__format": "jsonl", "input__served_model": "m"}, "input.served_model"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    batch: Path, tmp_path: Path, overrides: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        batch_settings(batch, tmp_path / "out", **overrides)


class CallingEngine(FakeEngine):
    """Says what a model that calls a tool says."""

    def _tokens(self, *_: Any) -> list[int]:
        return list(b'Let me see. <tool_call>{"name": "weather", "arguments": {"city": "Bern"}}</tool_call>')


def test_tool_calls_are_found_in_the_text(tmp_path: Path) -> None:
    lines = [
        chat_line("tools", tools=[TOOL], max_tokens=100),
        chat_line("function", functions=[TOOL["function"]], max_tokens=100),
        chat_line("none", tools=[TOOL], tool_choice="none", max_tokens=100),
    ]
    path = write_batch(tmp_path / "in.jsonl", lines)

    def load_model(settings: Settings) -> Any:
        loaded = fake_model(settings)
        loaded.config.max_position_embeddings = 2048
        return loaded

    settings = batch_settings(path, tmp_path / "out")
    assert run_job(settings, load_model=load_model, make_engine=lambda *_: CallingEngine()) == ExitCode.DONE
    found = {line["custom_id"]: line["response"]["body"] for line in lines_of(tmp_path / "out", "data")}
    choice = found["tools"]["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Bern"}
    assert "tool_call" not in choice["message"]["content"]
    old = found["function"]["choices"][0]
    assert old["finish_reason"] == "function_call"
    assert old["message"]["function_call"] == call["function"]
    assert "<tool_call>" in found["none"]["choices"][0]["message"]["content"]
    # The template tells of no tools, so the system message does.
    told = {name: body["usage"]["prompt_tokens"] for name, body in found.items()}
    assert told["tools"] == told["function"] > told["none"]
