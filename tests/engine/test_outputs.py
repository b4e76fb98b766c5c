"""A completion's text is made once, by who reads it, and looks like any other field."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest

from engine import request_group
from engine.outputs import CompletionOutput
from engine.sampling_params import SamplingParams
from tests.engine.engines import tiny_engine, varied_model


class Maker:
    """Makes "abc", and counts how often."""

    def __init__(self) -> None:
        self.num_made = 0

    def __call__(self) -> str:
        self.num_made += 1
        return "abc"

    def __reduce__(self):
        raise TypeError("what makes a text is not sent along")


def completion(text) -> CompletionOutput:
    return CompletionOutput(index=0, token_ids=(5, 6), finish_reason="length", text=text)


def test_a_text_is_made_when_it_is_read_and_only_once():
    make = Maker()
    output = completion(make)
    assert make.num_made == 0
    assert output.text == output.text == "abc"
    assert make.num_made == 1


@pytest.mark.parametrize(
    "same", [lambda one: pickle.loads(pickle.dumps(one)), copy.deepcopy, copy.copy, dataclasses.replace]
)
def test_a_text_to_come_is_a_field_like_any_other(same):
    plain = completion("abc")
    assert same(completion(Maker())) == plain
    assert repr(same(completion(Maker()))) == repr(plain)
    assert dataclasses.asdict(same(completion(Maker()))) == dataclasses.asdict(plain)
    assert same(completion(Maker())) != completion("abd")


def test_a_text_cannot_be_left_out_or_changed():
    with pytest.raises(TypeError, match="text"):
        CompletionOutput(index=0, token_ids=(), finish_reason=None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        completion("abc").text = "d"  # type: ignore[misc]


def test_no_step_makes_a_text_that_it_does_not_need(monkeypatch: pytest.MonkeyPatch):
    made, make = [], request_group.whole_text

    def noting(tokenizer, token_ids, *how):
        made.append(token_ids)
        return make(tokenizer, token_ids, *how)

    monkeypatch.setattr(request_group, "whole_text", noting)
    outputs = tiny_engine().generate(
        [[5, 6, 7], [9, 8]], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, n=2)
    )
    assert made == []
    samples = [sample for output in outputs for sample in output.outputs]
    texts = [sample.text for sample in samples]
    assert texts == [varied_model().tokenizer.decode(sample.token_ids) for sample in samples]
    assert sorted(made) == sorted(sample.token_ids for sample in samples)
