"""Outputs follow what they were asked to, whatever the weights want and whatever befalls the request."""

from __future__ import annotations

import re
import sys
import time
from typing import Any

import pytest

from engine.drawn import DrawnTokens
from engine.errors import MissingExtraError, RequestError
from engine.outputs import CompletionOutput, RequestOutput
from engine.structured import grammars
from engine.structured.spec import StructuredOutput
from tests.engine.engines import tiny_engine, tokens_of, varied_model
from tests.engine.structured_cases import PLAIN, POINT, PROMPT, SPECS, ended, engine, follows, sampled


@pytest.fixture(scope="module")
def closing() -> dict[int, float]:
    """A bias to what ends texts, which random weights seldom draw."""
    tokenizer = varied_model().tokenizer
    return {tokenizer(text)["input_ids"][0]: 5.0 for text in '"}],0'}


@pytest.mark.parametrize("name", SPECS)
def test_what_ends_by_itself_is_what_was_asked_for(name: str, closing: dict[int, float]) -> None:
    spec = SPECS[name]
    samplings = [
        sampled(spec, n=3, seed=seed, temperature=temperature, logit_bias=closing)
        for seed, temperature in ((0, 1.0), (1, 1.5), (2, 0.7))
    ] + [sampled(spec, temperature=0.0, logit_bias=closing)]
    outputs = engine().generate([PROMPT] * len(samplings), samplings)
    samples = [sample for output in outputs for sample in output.outputs]
    assert {sample.finish_reason for sample in samples} <= {"stop", "length"}
    stopped = ended(outputs)
    assert len(stopped) >= 3, "nothing was tested"
    for sample in stopped:
        assert follows(sample.text, spec), sample.text
        assert sample.token_ids[-1] in varied_model().config.eos_token_ids
    if name != "json_object":
        assert len({sample.text for sample in stopped}) > 1, "samples are draws of their own"


def test_what_allows_everything_changes_nothing() -> None:
    everything = {"grammar": "start: <[*]>*"}
    for values in ({"temperature": 0.0}, {"n": 2}, {"min_tokens": 9, "bad_words": ["e"], "logprobs": 1}):
        plain, structured = (
            engine().generate([PROMPT, "on"], sampled(spec, **values)) for spec in (None, everything)
        )
        assert tokens_of(plain) == tokens_of(structured)


def test_rows_beside_structured_ones_come_out_as_alone() -> None:
    plain = [sampled(None, seed=seed, max_tokens=20) for seed in range(3)]
    alone = engine().generate([PROMPT] * 3, plain)
    structured = [sampled(SPECS[name], max_tokens=30) for name in ("json", "choice", "regex")]
    mixed = engine().generate([PROMPT] * 6, [*plain, *structured])
    assert tokens_of(mixed[:3]) == tokens_of(alone)
    apart = [engine().generate(PROMPT, each)[0] for each in structured]
    assert tokens_of(mixed[3:]) == tokens_of(apart)


def test_neither_preemption_nor_the_order_of_steps_changes_an_output(closing: dict[int, float]) -> None:
    samplings = [sampled(SPECS[name], n=2, seed=9, logit_bias=closing) for name in SPECS]
    samplings += [sampled(SPECS["json_object"], n=4, seed=8, min_tokens=60)]
    wanted = tokens_of(engine().generate([PROMPT * 3] * len(samplings), samplings))
    small = tiny_engine(num_pages=9)
    before = small.stats().preemptions
    assert tokens_of(small.generate([PROMPT * 3] * len(samplings), samplings)) == wanted
    assert small.stats().preemptions > before, "nothing was tested"
    in_turn = tiny_engine(async_scheduling=False)
    assert tokens_of(in_turn.generate([PROMPT * 3] * len(samplings), samplings)) == wanted


def test_a_request_of_higher_priority_takes_the_pages_of_a_structured_one(closing: dict[int, float]) -> None:
    small = tiny_engine(num_pages=12, scheduling_policy="priority")
    sampling = sampled(SPECS["json_object"], logit_bias=closing, n=4, min_tokens=40)
    wanted = tokens_of([engine().generate(PROMPT * 3, sampling)[0]])
    outputs: dict[str, RequestOutput] = {}
    small.add_request("low", prompt=PROMPT * 3, sampling=sampling, priority=5)
    for number in range(300):
        if number == 12:
            small.add_request("high", prompt=PROMPT * 6, sampling=sampled(None, max_tokens=60), priority=0)
        outputs |= {output.request_id: output for output in small.step()}
        if not small.has_unfinished:
            break
    assert outputs["low"].metrics.num_preemptions > 0, "nothing was tested"
    assert tokens_of([outputs["low"]]) == wanted


@pytest.mark.parametrize("name", ["json", "grammar", "choice"])
def test_it_goes_on_from_the_tokens_of_an_earlier_engine(name: str, closing: dict[int, float]) -> None:
    sampling = sampled(SPECS[name], n=2, logit_bias=closing)
    wanted = engine().generate(PROMPT, sampling)
    for num_steps in (2, 5, 9):
        first = engine()
        first.add_request("a", prompt=PROMPT, sampling=sampling)
        done = [output for _ in range(num_steps) for output in first.step()]
        drawn = first.drawn_tokens("a")
        first.abort_request("a")
        if done or drawn is None:
            continue
        first.add_request("b", prompt=PROMPT, sampling=sampling, drawn=drawn, identity="whoever")
        outputs = [output for _ in range(200) for output in first.step()]
        assert tokens_of(outputs) == tokens_of(wanted)


def test_tokens_that_do_not_follow_it_are_no_beginning() -> None:
    with pytest.raises(RequestError, match="do not follow its structured output") as refused:
        engine().add_request(
            "a", prompt=PROMPT, sampling=sampled({"choice": ["yes"]}), drawn=[DrawnTokens((100, 101))]
        )
    assert refused.value.reason == "bad_drawn"
    assert not engine().has_unfinished


def only(spec: dict[str, Any], **values: Any) -> CompletionOutput:
    return engine().generate(PROMPT, sampled(spec, **values))[0].outputs[0]


def test_an_end_comes_only_where_the_text_is_complete_and_then_must_come() -> None:
    [eos] = varied_model().config.eos_token_ids
    for values in ({}, {"logit_bias": {eos: 100.0}}, {"logit_bias": {eos: -100.0}}):
        sample = only({"choice": ["the answer"]}, **values)
        assert (sample.text, sample.finish_reason, sample.stop_reason) == ("the answer", "stop", None)
        assert sample.token_ids[-1] == eos
    assert only({"regex": "a{3,9}"}, logit_bias={eos: 100.0}).text == "aaa"
    assert only({"regex": "a*"}, logit_bias={eos: 100.0}, min_tokens=5).text == "a" * 5
    forced = only({"regex": "a{3}"}, logit_bias={eos: 100.0}, min_tokens=9)
    assert (forced.text, forced.token_ids.count(eos)) == ("aaa", 1), "nothing else may come"
    cut = only({"regex": "a{30}"}, max_tokens=4)
    assert (cut.text, cut.finish_reason) == ("aaaa", "length")


def test_a_stop_token_waits_for_a_complete_text() -> None:
    tokenizer = varied_model().tokenizer
    [comma] = tokenizer(",")["input_ids"]
    [a] = tokenizer("a")["input_ids"]
    sample = only({"regex": "[ab]{4}"}, stop_token_ids=[comma], logit_bias={comma: 50.0})
    assert re.fullmatch("[ab]{4}", sample.text)
    assert (sample.finish_reason, sample.stop_reason) == ("stop", comma)
    needed = only({"regex": "a{4}"}, stop_token_ids=[a])
    assert (needed.text, needed.finish_reason, needed.stop_reason) == ("", "stop", a)


def test_other_restrictions_hold_where_the_text_leaves_a_choice() -> None:
    tokenizer = varied_model().tokenizer
    a, b, c = (tokenizer(letter)["input_ids"][0] for letter in "abc")
    eos = {varied_model().config.eos_token_ids[0]: -100.0}
    free = only({"regex": "[abc]{12}"}, temperature=5.0).text
    assert set(free) == set("abc")
    assert set(only({"regex": "[abc]{12}"}, temperature=5.0, bad_words=["b"]).text) == set("ac")
    assert set(only({"regex": "[abc]{12}"}, allowed_token_ids=[a, c], temperature=5.0).text) == set("ac")
    assert only({"regex": "[abc]{12}"}, logit_bias={b: 100.0}).text == "b" * 12
    assert only({"regex": "a{3}"}, bad_words=["a"], allowed_token_ids=[b]).text == "aaa", "it needs it"
    assert "cc" not in only({"regex": "[abc]{40}"}, bad_words=["cc"], temperature=5.0, logit_bias=eos).text


def test_a_streamed_text_is_the_whole_one() -> None:
    sampling = sampled(SPECS["json"], stop=["never"])
    whole = engine().generate(PROMPT, sampling)[0].outputs[0].text
    deltas = [output.delta_text for output in engine().stream(PROMPT, sampling)]
    assert "".join(deltas) == whole


def test_duplicates_are_those_that_ask_for_the_same() -> None:
    before = engine().stats().num_duplicates
    greedy = [sampled(SPECS[name], temperature=0.0) for name in ("json", "regex", "json")]
    outputs = engine().generate([PROMPT] * 3, greedy)
    assert engine().stats().num_duplicates == before + 1
    assert tokens_of(outputs)[0] == tokens_of(outputs)[2] != tokens_of(outputs)[1]


HOSTILE: dict[str, dict[str, Any]] = {
    "counted repetition": {"regex": "((a{1,900}){1,900}){1,900}"},
    "a blow-up of states": {"regex": "(a|b)*a(a|b){4000}"},
    "nested quantifiers": {"regex": "(((((a+)+)+)+)+)+b" * 500},
    "intersections": {"grammar": "start: X\nX: /(.*a.{800})/ & /(.*b.{800})/ & /(.*c.{800})/"},
    "deep brackets in a pattern": {"regex": "(" * 5000 + "a" + ")" * 5000},
    "unbalanced": {"regex": "(a"},
    "look-around": {"regex": "(?=a)a"},
    "unknown rule": {"grammar": "start: nothing"},
    "left to itself": {"grammar": "start: start"},
    "long repetition": {"grammar": 'start: ("a" "b"){1,1000000000}'},
    "many rules": {"grammar": "\n".join(["start: r0", *(f"r{i}: r{i + 1} r{i + 1}" for i in range(3000))])},
    "products of choices": {
        "json": {"allOf": [{"anyOf": [{"const": f"{i}{j}"} for j in range(12)]} for i in range(12)]}
    },
    "many optional keys in turn": {
        "json": {
            "allOf": [
                {"anyOf": [{"properties": {f"p{i}_{j}": {"type": "integer"}}} for j in range(8)]}
                for i in range(8)
            ]
        }
    },
    "items without end": {"json": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9}},
    "a long string": {"json": {"type": "string", "minLength": 10**8}},
    "references in a circle": {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
    "references that double": {
        "json": {
            "$ref": "#/$defs/d0",
            "$defs": {
                **{f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(24)},
                "d24": {"type": "object", "properties": {"a": {"type": "integer"}}},
            },
        }
    },
    "patterns of keys": {
        "json": {"patternProperties": {f"(a|b)*a(a|b){{{i}}}": {"type": "integer"} for i in range(40, 60)}}
    },
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_would_cost_too_much_is_refused_or_ends_in_time(name: str) -> None:
    engine().add_request("beside", prompt=PROMPT, sampling=PLAIN)
    started, refusal = time.perf_counter(), None
    try:
        engine().add_request("hostile", prompt=PROMPT, sampling=sampled(HOSTILE[name], max_tokens=6))
    except RequestError as error:
        refusal = error
    seconds = time.perf_counter() - started
    outputs = [output for _ in range(40) for output in engine().step()]
    assert not engine().has_unfinished
    assert {output.request_id for output in outputs} <= {"beside", "hostile"}
    assert len(next(output for output in outputs if output.request_id == "beside").outputs[0].token_ids) == 8
    if refusal is not None:
        assert refusal.reason == "bad_sampling"
        assert len(str(refusal)) < 500
        assert "\n" not in str(refusal)
    assert seconds < 5, f"{name} held its thread for {seconds:.1f} s"
    assert time.perf_counter() - started < 8


def test_a_text_that_costs_too_much_to_follow_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(grammars.LIMITS, "step_max_items", 10)
    outputs = engine().generate(
        [PROMPT] * 2, [sampled({"json": {"type": "array", "title": "costly"}}), PLAIN]
    )
    failed, beside = outputs[0].outputs[0], outputs[1].outputs[0]
    assert failed.finish_reason == "error"
    assert isinstance(failed.stop_reason, str)
    assert failed.stop_reason
    assert beside.finish_reason == "length"


def test_a_refusal_is_remembered_and_a_grammar_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[StructuredOutput | None] = []
    compile = grammars.Grammars.compile
    monkeypatch.setattr(
        grammars.Grammars, "compile", lambda self, asked: made.append(asked) or compile(self, asked)
    )
    of = grammars.Grammars(varied_model().tokenizer, varied_model().config.vocab_size, (2,))
    good, bad = sampled({"regex": "remembered"}), sampled({"regex": "(remembered"})
    assert of.compiled(good) is of.compiled(good) is not None
    for _ in range(2):
        with pytest.raises(RequestError, match="cannot be compiled"):
            of.compiled(bad)
    assert made == [good.structured, bad.structured]
    monkeypatch.setattr(grammars, "MAX_KEPT", 2)
    of.compiled(sampled({"regex": "another"}))
    of.compiled(sampled({"regex": "and another"}))
    of.compiled(good)
    assert made.count(good.structured) == 2, "the one used longest ago is given up"


def test_without_llguidance_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match=r"tidemill\[structured\]"):
        engine().add_request("a", prompt=PROMPT, sampling=sampled({"regex": "not installed"}))


def test_a_model_that_names_no_end_cannot_be_held() -> None:
    of = grammars.Grammars(varied_model().tokenizer, varied_model().config.vocab_size, ())
    with pytest.raises(RequestError, match="end-of-sequence"):
        of.compiled(sampled({"regex": "a"}))


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"format": "date", "type": "string"}, '"2024-02-29"', '"2023-02-29"'),
        ({"format": "date-time"}, '"2024-02-29T00:00:00Z"', '"2024-02-29T00:00:60Z"'),
        (
            POINT | {"additionalProperties": {"type": "null"}},
            '{"x":1,"kind":"a","y":null}',
            '{"x":1,"kind":"a","\\u0078":null}',
        ),
        ({"type": "array"}, "[ 1,\n    2]", "[  1"),
        ({"const": 0.1}, "0.1", "0.10000000000000001"),
        ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, "5", "5.5"),
        ({"allOf": [{"multipleOf": 4}, {"multipleOf": 6}], "type": "integer"}, "12", "8"),
    ],
)
def test_a_schema_is_followed_to_the_letter(schema: dict[str, Any], right: str, wrong: str) -> None:
    grammar = engine().grammars.compiled(sampled({"json": schema}))
    assert grammar is not None
    tokenizer, [eos] = varied_model().tokenizer, varied_model().config.eos_token_ids
    for text, is_right in ((right, True), (wrong, False)):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert grammar.begin().accepts([*tokens, eos]) == is_right, text
