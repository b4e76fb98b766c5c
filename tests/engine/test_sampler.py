"""A row is drawn as its own parameters say, whatever the other rows of the step ask for."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampler import MAX_LOGIT_BIAS, MAX_LOGPROBS, SamplingInputs, sample
from kernels.sampling import available_backends

NUM_ROWS, VOCAB, MAX_LEN = 16, 101, 24
BACKENDS = {name: jax.jit(partial(sample, backend=name)) for name in available_backends()}
run = BACKENDS["xla"]


@pytest.fixture(params=available_backends(), scope="module", autouse=True)
def _backend(request: pytest.FixtureRequest):
    """Every law below holds for each backend."""
    global run
    run = BACKENDS[request.param]
    yield
    run = BACKENDS["xla"]


@dataclass
class Row:
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    key: tuple[int, int] = (0, 0)
    position: int = 0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    allowed: list[int] | None = None
    bias: dict[int, float] = field(default_factory=dict)
    target: int | None = None


def make_inputs(rows: list[Row], logprobs: bool = False) -> SamplingInputs:
    rows = rows + [Row()] * (NUM_ROWS - len(rows))
    history = np.zeros((NUM_ROWS, MAX_LEN), np.int32)
    mask = np.zeros((NUM_ROWS, -(-VOCAB // 32) * 32), bool)
    bias_ids = np.full((NUM_ROWS, MAX_LOGIT_BIAS), VOCAB, np.int32)
    bias_values = np.zeros((NUM_ROWS, MAX_LOGIT_BIAS), np.float32)
    for index, row in enumerate(rows):
        tokens = row.prompt + row.output
        history[index, : len(tokens)] = tokens
        mask[index, range(VOCAB) if row.allowed is None else row.allowed] = True
        bias_ids[index, : len(row.bias)] = list(row.bias)
        bias_values[index, : len(row.bias)] = list(row.bias.values())

    def column(name: str, dtype: Any) -> jax.Array:
        return jnp.asarray([getattr(row, name) for row in rows], dtype)

    penalised = [row.repetition != 1 or row.presence or row.frequency for row in rows]
    return SamplingInputs(
        temperature=column("temperature", jnp.float32),
        top_k=jnp.asarray([row.top_k or VOCAB for row in rows], jnp.int32),
        top_p=column("top_p", jnp.float32),
        min_p=column("min_p", jnp.float32),
        keys=jnp.asarray([row.key for row in rows], jnp.uint32),
        positions=column("position", jnp.int32),
        num_rows=jnp.int32(NUM_ROWS),
        repetition_penalty=column("repetition", jnp.float32),
        presence_penalty=column("presence", jnp.float32),
        frequency_penalty=column("frequency", jnp.float32),
        history=jnp.asarray(history),
        prompt_len=jnp.asarray([len(row.prompt) for row in rows], jnp.int32),
        history_len=jnp.asarray([len(row.prompt + row.output) for row in rows], jnp.int32),
        token_mask=jnp.asarray(np.packbits(mask, axis=1, bitorder="little").view(np.uint32)),
        bias_ids=jnp.asarray(bias_ids),
        bias_values=jnp.asarray(bias_values),
        targets=jnp.asarray([row.target or 0 for row in rows], jnp.int32),
        has_target=jnp.asarray([row.target is not None for row in rows]),
        any_penalty=jnp.asarray(any(map(bool, penalised))),
        any_mask=jnp.asarray(any(row.allowed is not None for row in rows)),
        any_bias=jnp.asarray(any(row.bias for row in rows)),
        any_logprobs=jnp.asarray(logprobs),
    )


def reference(logits: np.ndarray, row: Row) -> tuple[np.ndarray, int]:
    """The probabilities a row is drawn from, by sorting, in float64; and its argmax."""
    x = logits.astype(np.float64).copy()
    for token, value in row.bias.items():
        x[token] += value
    seen = np.zeros(VOCAB, bool)
    seen[row.prompt + row.output] = True
    x = np.where(seen, np.where(x > 0, x / row.repetition, x * row.repetition), x)
    counts = np.bincount(row.output, minlength=VOCAB)
    x = x - row.frequency * counts - row.presence * (counts > 0)
    if row.allowed is not None:
        x[np.setdiff1d(np.arange(VOCAB), row.allowed)] = -np.inf
    best = int(x.argmax())
    if row.temperature == 0:
        return np.eye(VOCAB)[best], best
    x = (x - x.max()) / row.temperature
    if row.min_p:
        x[x < np.log(row.min_p)] = -np.inf
    if row.top_k and row.top_k < VOCAB:
        x[x < np.sort(x)[-row.top_k]] = -np.inf
    p = np.exp(x) / np.exp(x).sum()
    if row.top_p < 1:
        order = np.argsort(-p, kind="stable")
        needed = np.cumsum(p[order]) - p[order] < row.top_p
        p[p < p[order[needed]].min()] = 0
        p /= p.sum()
    return p, best


def random_logits(seed: int, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((NUM_ROWS, VOCAB)) * scale).astype(np.float32)


def draw_many(logits: np.ndarray, row: Row, count: int) -> np.ndarray:
    """Tokens drawn for one row of logits at many positions."""
    tiled = jnp.asarray(np.tile(logits, (NUM_ROWS, 1)))
    tokens = []
    for start in range(0, count, NUM_ROWS):
        rows = [Row(**{**vars(row), "position": start + index}) for index in range(NUM_ROWS)]
        tokens.append(np.asarray(run(tiled, make_inputs(rows)).token_ids))
    return np.concatenate(tokens)[:count]


@pytest.mark.parametrize(
    "row",
    [
        Row(temperature=1.0),
        Row(temperature=0.5, top_k=5),
        Row(temperature=1.5, top_p=0.7),
        Row(temperature=1.0, min_p=0.05),
        Row(temperature=1.3, top_k=20, top_p=0.8, min_p=0.01),
        Row(temperature=0.8, presence=1.5, frequency=0.5, repetition=1.4, prompt=[3, 4, 5], output=[6, 6, 7]),
        Row(temperature=1.0, bias={3: 8.0, 9: -100.0}, allowed=[3, 9, 20, 40]),
    ],
)
def test_draws_follow_the_distribution_the_parameters_describe(row):
    logits = random_logits(1)[0]
    wanted, _ = reference(logits, row)
    count = 4000
    drawn = np.bincount(draw_many(logits, row, count), minlength=VOCAB)
    assert not drawn[wanted == 0].any(), "a removed token was drawn"
    # Pearson's chi-squared over tokens expected at least 5 times, the rest pooled; 5 sigma of its own spread.
    often = wanted * count >= 5
    seen = np.append(drawn[often], drawn[~often].sum())
    expected = np.append(wanted[often], wanted[~often].sum()) * count
    seen, expected = seen[expected > 0], expected[expected > 0]
    statistic = ((seen - expected) ** 2 / expected).sum()
    freedom = len(seen) - 1
    assert statistic < freedom + 5 * np.sqrt(2 * freedom) + 5


@given(
    seed=st.integers(0, 10_000),
    top_k=st.integers(1, VOCAB),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 0.5),
    temperature=st.floats(0.1, 3.0),
)
@settings(max_examples=60)
def test_only_kept_tokens_are_drawn(seed, top_k, top_p, min_p, temperature):
    logits = random_logits(seed)
    rows = [
        Row(temperature, top_k, top_p, min_p, key=(seed, index), position=index) for index in range(NUM_ROWS)
    ]
    tokens = np.asarray(run(jnp.asarray(logits), make_inputs(rows)).token_ids)
    for index, row in enumerate(rows):
        # A hair of slack: what float64 puts just outside, float32 may put just inside.
        loose = Row(temperature, top_k, min(1.0, top_p + 1e-4), max(0.0, min_p - 1e-6))
        assert reference(logits[index], loose)[0][tokens[index]] > 0, row


def test_ties_at_the_threshold_are_all_kept():
    logits = np.full(VOCAB, -5.0, np.float32)
    logits[:4] = 2.0
    assert set(draw_many(logits, Row(temperature=1.0, top_k=2), 200)) == {0, 1, 2, 3}


def test_greedy_rows_are_argmax_in_any_company():
    logits = random_logits(2)
    rows = [Row(temperature=1.0, top_k=3) if index % 2 else Row() for index in range(NUM_ROWS)]
    rows[1] = Row(
        temperature=1.0, repetition=3.0, presence=2.0, prompt=[1], output=[2], bias={5: 50.0}, allowed=[7]
    )
    mixed = np.asarray(run(jnp.asarray(logits), make_inputs(rows, logprobs=True)).token_ids)
    assert np.array_equal(mixed[::2], logits.argmax(-1)[::2])
    assert mixed[1] == 7


@given(data=st.data())
@settings(max_examples=40)
def test_greedy_rows_with_penalties_bias_and_masks(data):
    token = st.integers(0, VOCAB - 1)
    rows = [
        Row(
            repetition=data.draw(st.sampled_from([1.0, 0.5, 2.0])),
            presence=data.draw(st.sampled_from([0.0, 1.0, -1.0])),
            frequency=data.draw(st.sampled_from([0.0, 0.5])),
            prompt=data.draw(st.lists(token, max_size=8)),
            output=data.draw(st.lists(token, max_size=8)),
            allowed=data.draw(st.none() | st.lists(token, min_size=1, max_size=5, unique=True)),
            bias=data.draw(st.dictionaries(token, st.sampled_from([-100.0, -2.0, 3.0, 100.0]), max_size=4)),
        )
        for _ in range(4)
    ]
    logits = random_logits(data.draw(st.integers(0, 1000)))
    tokens = np.asarray(run(jnp.asarray(logits), make_inputs(rows)).token_ids)
    assert [reference(logits[index], row)[1] for index, row in enumerate(rows)] == tokens[:4].tolist()


def test_a_draw_depends_on_identity_position_and_logits_alone():
    logits = random_logits(3)
    me = Row(temperature=1.0, top_p=0.9, key=(7, 8), position=12)
    alone = np.asarray(run(jnp.asarray(logits), make_inputs([me])).token_ids)[0]
    for place in (3, 9):
        company = [Row(temperature=2.0, top_k=4, key=(index, 1), presence=1.0) for index in range(NUM_ROWS)]
        company[place] = me
        moved = logits.copy()
        moved[[0, place]] = moved[[place, 0]]
        assert np.asarray(run(jnp.asarray(moved), make_inputs(company)).token_ids)[place] == alone
    other_keys = draw_many(logits[0], Row(temperature=1.0, key=(7, 9)), 64)
    assert not np.array_equal(draw_many(logits[0], Row(temperature=1.0, key=(7, 8)), 64), other_keys)


def test_log_probabilities_are_of_the_unchanged_logits():
    logits = random_logits(4)
    rows = [Row(bias={5: 100.0}), Row(temperature=1.0, top_k=1), Row(target=33)]
    out = jax.device_get(run(jnp.asarray(logits), make_inputs(rows, logprobs=True)))
    wide = logits.astype(np.float64)
    wanted = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    assert out.token_ids[0] == 5
    assert out.token_ids[2] == 33
    for index in range(3):
        assert out.logprobs[index] == pytest.approx(wanted[index, out.token_ids[index]], abs=1e-5)
        best = np.argsort(-wanted[index], kind="stable")[:MAX_LOGPROBS]
        assert out.top_ids[index].tolist() == best.tolist()
        np.testing.assert_allclose(out.top_logprobs[index], wanted[index, best], atol=1e-5)


def test_huge_logits_and_tiny_temperatures_stay_finite():
    logits = random_logits(5) * 1e4
    rows = [Row(temperature=1e-5, key=(1, index), position=index) for index in range(NUM_ROWS)]
    tokens = np.asarray(run(jnp.asarray(logits), make_inputs(rows)).token_ids)
    assert np.array_equal(tokens, logits.argmax(-1))
