"""Lengths and ranges of a request, and the key that makes its draws its own."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.request import request_key
from tests.engine.host import make_request


@given(
    st.lists(st.integers(0, 99), min_size=1, max_size=8), st.lists(st.integers(0, 99), max_size=8), st.data()
)
def test_token_ids_are_a_range_of_prompt_and_output(
    prompt: list[int], output: list[int], data: st.DataObject
):
    request = make_request("a", prompt)
    request.output_token_ids += output
    assert request.num_tokens == len(prompt) + len(output)
    start = data.draw(st.integers(0, request.num_tokens))
    stop = data.draw(st.integers(start, request.num_tokens))
    assert request.token_ids(start, stop) == (prompt + output)[start:stop]


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 5)])
def test_tokens_that_do_not_exist_are_refused(start: int, stop: int):
    with pytest.raises(IndexError, match="of a request of 4"):
        make_request("a", range(4)).token_ids(start, stop)


def test_what_remains_is_what_is_known_and_not_computed():
    request = make_request("a", range(5))
    assert request.remain_len == 5
    request.num_computed = 5
    request.output_token_ids.append(7)
    assert (request.remain_len, request.num_output_tokens, request.is_finished) == (1, 1, False)


def test_a_key_is_the_identity_and_nothing_else():
    keys = {
        request_key(run_seed, row_id, sample_index, seed)
        for run_seed in (0, 1, 10)
        for row_id in ("", "a", "0:a", "1", "\ud800")
        for sample_index in (0, 1, 11)
        for seed in (None, 0, 1)
    }
    # Given a seed, neither the run nor the row matters.
    assert len(keys) == 3 * 5 * 3 + 3 * 2
    assert all(0 <= word < 2**32 for key in keys for word in key)
    assert request_key(3, "row", 2, 5) == request_key(4, "other", 2, 5)


def test_a_key_never_changes():
    """Outputs of earlier versions are reproduced only if these stay."""
    assert request_key(0, "row-0", 0, None) == (2037197425, 3755509023)
    assert request_key(0, "row-0", 0, 42) == (2196794470, 477426494)


HOST_MODULES = [
    "sampling_params",
    "request",
    "page_pool",
    "prefix_cache",
    "plan",
    "seat_table",
    "admission",
    "scheduler_settings",
    "step_results",
    "scheduler",
    "detokenizer",
]


def test_the_host_side_never_imports_jax():
    code = (
        "import importlib, sys\n"
        f"for name in {HOST_MODULES!r}: importlib.import_module('engine.' + name)\n"
        "heavy = {'jax', 'jaxlib', 'flax', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported: {sorted(heavy)}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
