"""Every sampling field is checked, normalised, and refused with its name, value and range."""

import math

import numpy as np
import pytest

from engine.errors import RequestError
from engine.sampling_params import SamplingParams

BAD_VALUES = [
    ("n", 0), ("n", True), ("n", 1.0), ("n", "1"), ("n", 10**6), ("n", None),
    ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 2.5), ("max_tokens", None),
    ("min_tokens", -1), ("min_tokens", 17), ("min_tokens", False),
    ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "hot"),
    ("temperature", 1e-9), ("temperature", True), ("temperature", None),
    ("top_k", -1), ("top_k", 1.5), ("top_k", True),
    ("top_p", 0), ("top_p", 1.01), ("top_p", math.nan), ("top_p", -0.5),
    ("min_p", -0.1), ("min_p", 1.1), ("min_p", math.nan),
    ("presence_penalty", 2.1), ("presence_penalty", math.nan),
    ("frequency_penalty", -2.1), ("frequency_penalty", math.inf),
    ("repetition_penalty", 0), ("repetition_penalty", -1.0), ("repetition_penalty", math.nan),
    ("seed", -1), ("seed", 2**63), ("seed", 1.0), ("seed", True),
    ("stop", [""]), ("stop", [1]), ("stop", ["x"] * 65), ("stop", 5), ("stop", ["\ud800"]), ("stop", None),
    ("stop_token_ids", [-1]), ("stop_token_ids", [1.0]), ("stop_token_ids", "12"), ("stop_token_ids", 3),
    ("stop_token_ids", [True]), ("stop_token_ids", range(2000)),
    ("ignore_eos", 1), ("ignore_eos", None), ("ignore_eos", "true"),
    ("logit_bias", {1: 101}), ("logit_bias", {-1: 0.0}), ("logit_bias", {1: math.nan}), ("logit_bias", [1]),
    ("logit_bias", dict.fromkeys(range(301), 1.0)), ("logit_bias", [(1, 2.0), (1, 3.0)]),
    ("logit_bias", {"x": 1.0}), ("logit_bias", [("1", 2.0, 3.0)]), ("logit_bias", ["12"]), ("logit_bias", 4),
    ("bad_words", [""]), ("bad_words", [b"x"]), ("bad_words", ["x"] * 300), ("bad_words", ["x" * 2000]),
    ("allowed_token_ids", []), ("allowed_token_ids", [-5]), ("allowed_token_ids", 7),
    ("logprobs", 21), ("logprobs", -1), ("logprobs", True), ("logprobs", 1.0),
    ("prompt_logprobs", 21), ("prompt_logprobs", -1), ("prompt_logprobs", False),
    ("include_stop_str_in_output", 0), ("skip_special_tokens", "no"), ("structured", "must be a regex"),
    ("stop_pattern", 5), ("detokenize", 0), ("spaces_between_special_tokens", "no"),
    ("best_of", 0), ("best_of", 1.0), ("output_kind", "all"), ("output_kind", 7),
    ("truncate_prompt_tokens", 0), ("truncate_prompt_tokens", True),
    ("extra_args", 4), ("extra_args", {"a": [1]}), ("extra_args", {1: 2}), ("extra_args", ["ab"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_VALUES, ids=lambda part: str(part)[:20])
def test_a_bad_value_is_refused_on_one_line_that_names_it(name: str, value: object):
    with pytest.raises(RequestError) as caught:
        SamplingParams.from_dict({name: value})
    assert caught.value.reason == "bad_sampling"
    assert f"sampling.{name}" in str(caught.value)
    assert "must be" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_every_field_has_a_refused_value():
    assert {name for name, _ in BAD_VALUES} == set(SamplingParams.__dataclass_fields__)


def test_lists_mappings_and_numpy_numbers_are_normalised():
    params = SamplingParams.from_dict(
        {
            "max_new_tokens": np.int64(7),
            "temperature": 1,
            "top_p": np.float32(0.5),
            "stop": ["b", "a", "b"],
            "stop_token_ids": [9, 3, 3],
            "logit_bias": {"5": 1, 2: -1.5},
            "allowed_token_ids": [4, 1],
            "bad_words": "one word",
        }
    )
    assert params.max_tokens == 7
    assert type(params.max_tokens) is int
    assert type(params.temperature) is float
    assert params.top_p == 0.5
    assert params.stop == ("b", "a")
    assert params.stop_token_ids == (3, 9)
    assert params.logit_bias == ((2, -1.5), (5, 1.0))
    assert params.allowed_token_ids == (1, 4)
    assert params.bad_words == ("one word",)


def test_params_that_mean_the_same_are_equal_and_hash_alike():
    one = SamplingParams(logit_bias={3: 1.0, 1: 2.0}, stop_token_ids=[2, 1], temperature=0)  # type: ignore[arg-type]
    two = SamplingParams(logit_bias=((1, 2), (3, 1)), stop_token_ids=(1, 2), temperature=0.0)
    assert one == two
    assert hash(one) == hash(two)
    assert one != two.replace(temperature=0.5)


def test_a_single_stop_string_is_one_stop():
    assert SamplingParams.from_dict({"stop": "###"}).stop == ("###",)


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("temprature", "temperature"),
        ("max_token", "max_tokens"),
        ("max_new_token", "max_new_tokens"),
        ("topk", "top_k"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(given: str, nearest: str):
    with pytest.raises(RequestError, match=f"sampling.{given} does not exist.*'{nearest}'"):
        SamplingParams.from_dict({given: 1})
    with pytest.raises(RequestError, match=f"'{nearest}'"):
        SamplingParams().replace(**{given: 1})


def test_an_alias_beside_its_name_is_refused():
    with pytest.raises(RequestError, match="given twice"):
        SamplingParams.from_dict({"max_tokens": 1, "max_new_tokens": 2})


@pytest.mark.parametrize("values", [None, [1], "x"])
def test_something_other_than_a_mapping_is_refused(values: object):
    with pytest.raises(RequestError, match="must be a mapping"):
        SamplingParams.from_dict(values)  # type: ignore[arg-type]


def test_replace_validates_again():
    params = SamplingParams(max_tokens=8, min_tokens=4)
    assert params.replace(max_new_tokens=5).max_tokens == 5
    with pytest.raises(RequestError, match="no more than max_tokens"):
        params.replace(max_tokens=3)


def test_zero_temperature_is_greedy():
    assert SamplingParams(temperature=0).is_greedy
    assert not SamplingParams(temperature=1e-5).is_greedy


def test_token_ids_outside_the_vocabulary_are_refused():
    for name, value in (("stop_token_ids", [1, 50]), ("logit_bias", {50: 1}), ("allowed_token_ids", [50, 2])):
        params = SamplingParams.from_dict({name: value})
        params.check_vocab(51)
        with pytest.raises(RequestError, match=rf"sampling.{name} is 50.*50"):
            params.check_vocab(50)
