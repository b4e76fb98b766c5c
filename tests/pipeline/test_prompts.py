"""Rows to prompts: the laws of sampling overrides, length, ids and batches."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.sampling_params import SamplingParams
from pipeline.fitting import fit
from pipeline.id_index import IdIndex
from pipeline.rows import REASONS, Prompt, Reject, SourceRow
from pipeline.shards import InputSettings, list_shards, read_rows
from tests.pipeline.input_helpers import lines, write_jsonl, write_parquet
from tests.pipeline.prompt_helpers import BOS, TOKENIZER, USER, build, make_builder, ok, refused, row_of

# Sampling


def test_a_row_overrides_what_it_names():
    base = SamplingParams(max_tokens=16, temperature=0.5)
    overrides = {"temperature": 0, "max_new_tokens": 3, "stop": ["\n"], "seed": None}
    expected = base.replace(temperature=0, max_tokens=3, stop=("\n",))
    for value in (overrides, json.dumps(overrides)):
        assert ok(build({"prompt": "a", "s": value}, {"sampling_column": "s"})).sampling == expected
    for nothing in (None, "null", {}, "{}", {"seed": None, "max_tokens": None}):
        assert ok(build({"prompt": "a", "s": nothing}, {"sampling_column": "s"})).sampling == base


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temprature": 1}, "'temperature'"),
        ({"self": 1}, "self"),
        ({"max_tokens": 3, "max_new_tokens": 3}, "twice"),
        ({"max_tokens": 400}, "no room for a prompt in 400 tokens"),
        ({"max_tokens": "3"}, "max_tokens"),
        ({"stop_token_ids": [10**6]}, "vocabulary"),
        ({"logit_bias": {"1": 10**400}}, "logit_bias"),
        ('{"seed": NaN}', "NaN"),
        ('{"seed": 1, "seed": 2}', "twice"),
        ("{", "not JSON"),
        ("[" * 100_000, "deep"),
        ("[]", "sampling"),
        ([1], "mapping"),
        (3, "mapping"),
    ],
)
def test_bad_sampling_rejects_the_row(value, says):
    reject = build({"prompt": "a", "s": value}, {"sampling_column": "s"})
    refused(reject, "bad_sampling", says)


def test_a_row_without_the_sampling_column_is_not_run_at_other_values():
    refused(
        build({"prompt": "a"}, {"sampling_column": "s"}), "missing_column", "'s'", "prompt.sampling_column"
    )


def test_max_tokens_that_leave_no_room_stop_the_run():
    with pytest.raises(ConfigError, match="max_tokens=400 leaves no room"):
        make_builder(max_tokens=400)
    builder = make_builder({"sampling_column": "s"}, max_tokens=400)
    refused(builder.build(row_of({"prompt": "a", "s": None})), "bad_sampling", "no room")
    assert ok(builder.build(row_of({"prompt": "a", "s": {"max_tokens": 1}}))).sampling.max_tokens == 1


# Length


@given(
    token_ids=st.lists(st.integers(0, 99), min_size=1, max_size=30),
    room=st.integers(1, 40),
    how=st.sampled_from(["truncate_left", "truncate_right", "truncate_middle"]),
    num_head=st.integers(0, 1),
    num_tail=st.integers(0, 4),
)
def test_a_cut_fills_the_room_and_keeps_both_ends(token_ids, room, how, num_head, num_tail):
    assert fit(token_ids, room, "reject") == (tuple(token_ids) if len(token_ids) <= room else None)
    kept = fit(token_ids, room, how, num_head, num_tail)
    if len(token_ids) <= room:
        assert kept == tuple(token_ids)
        return
    if room <= num_head + num_tail:
        assert kept is None
        return
    assert kept is not None
    assert len(kept) == room
    assert kept[:num_head] == tuple(token_ids[:num_head])
    end, kept_end = len(token_ids) - num_tail, room - num_tail
    assert kept[kept_end:] == tuple(token_ids[end:])
    middle, space = token_ids[num_head:end], room - num_head - num_tail
    expected = {
        "truncate_left": middle[-space:],
        "truncate_right": middle[:space],
        "truncate_middle": middle[: (space + 1) // 2] + (middle[-(space // 2) :] if space > 1 else []),
    }[how]
    assert list(kept[num_head:kept_end]) == expected


def test_prompt_and_max_tokens_fill_the_model_exactly():
    for how in ("reject", "truncate_left", "truncate_right", "truncate_middle"):
        builder = make_builder({"over_long": how}, max_tokens=16, max_model_len=50)
        fits = ok(builder.build(row_of({"prompt_token_ids": list(range(34))})))
        assert (len(fits.token_ids), fits.was_truncated) == (34, False)
        longer = builder.build(row_of({"prompt_token_ids": list(range(35))}))
        if how == "reject":
            refused(longer, "prompt_too_long", "35 tokens", "max_tokens is 16", "max_model_len=50")
        else:
            assert (len(ok(longer).token_ids), ok(longer).was_truncated) == (34, True)


@pytest.mark.parametrize("how", ["truncate_left", "truncate_right", "truncate_middle"])
def test_a_cut_chat_still_opens_the_assistants_turn(how):
    text = "<" + "z" * 200 + ">"
    prompt = ok(
        build({"messages": [{"role": "user", "content": text}]}, {"over_long": how}, max_model_len=80)
    )
    assert len(prompt.token_ids) == 64
    assert prompt.was_truncated
    assert prompt.text is not None
    assert prompt.text.endswith("<|im_start|>assistant\n")
    assert prompt.token_ids[0] == BOS
    assert ("<z" in prompt.text) == (how != "truncate_left")
    assert ("z>" in prompt.text) == (how != "truncate_right")
    assert TOKENIZER.encode(prompt.text) == list(prompt.token_ids)


def test_a_chat_too_long_even_for_its_frame_is_rejected():
    refused(build({"messages": USER}, {"over_long": "truncate_left"}, max_model_len=20), "prompt_too_long")


# Columns, ids, batches


def test_columns_needed_are_those_that_matter():
    inputs = {"id_column": "key", "carry_columns": ("label", "a")}
    assert make_builder(inputs=inputs).columns_needed == (
        "a",
        "key",
        "label",
        "messages",
        "prompt",
        "prompt_token_ids",
    )
    settings = {
        "template": "{{ a }}{{ b }}",
        "system_template": "{{ c }}",
        "chat": True,
        "sampling_column": "s",
    }
    assert make_builder(settings).columns_needed == ("a", "b", "c", "s")
    assert make_builder({"form": "messages"}).columns_needed == ("messages",)
    assert make_builder({"template": "{{ row }}"}).columns_needed is None


def test_carried_columns_travel_with_the_prompt():
    prompt = ok(
        build({"prompt": "a", "label": [1], "other": 2}, inputs={"carry_columns": ("label", "sparse")})
    )
    assert prompt.carried == {"label": [1], "sparse": None}


def test_a_named_id_is_the_rows_id_and_a_bad_one_a_reject():
    inputs = {"id_column": "key"}
    assert ok(build({"prompt": "a", "key": 7}, inputs=inputs)).row_id == "7"
    assert refused(build({"prompt": "", "key": "k"}, inputs=inputs), "empty_prompt").row_id == "k"
    assert refused(build({"prompt": "a"}, inputs=inputs), "missing_column", "input.id_column").row_id is None
    assert refused(build({"prompt": "a", "key": None}, inputs=inputs), "null_value").row_id is None
    assert refused(build({"prompt": "a", "key": 1.5}, inputs=inputs), "wrong_type").row_id is None


def test_hashed_ids_depend_on_place_and_prompt_alone():
    columns = {"prompt": "a", "label": 1}
    mine = ok(build(columns)).row_id
    assert ok(build(columns | {"label": 2}, inputs={"carry_columns": ("label",)})).row_id == mine
    assert ok(build(columns | {"prompt": "b"})).row_id != mine
    builder = make_builder()
    assert ok(builder.build(row_of(columns, position=1))).row_id != mine
    # The first row of a slice that begins at row 1 is row 1 of its source, however it is sliced.
    sliced = SourceRow(5, 0, columns, "a.jsonl", first_row=1)
    assert ok(builder.build(sliced)).row_id == ok(builder.build(row_of(columns, position=1))).row_id


def test_moving_the_data_or_asking_for_more_columns_keeps_every_id(tmp_path):
    write_jsonl(tmp_path / "one" / "x" / "a.jsonl", lines({"prompt": f"p{i % 2}", "n": i} for i in range(4)))
    write_parquet(tmp_path / "one" / "b.parquet", [{"prompt": f"p{i % 2}", "n": i} for i in range(4)])
    shutil.copytree(tmp_path / "one", tmp_path / "deep" / "two")
    found = []
    for root in (tmp_path / "one", tmp_path / "deep" / "two"):
        for carry in ((), ("n",)):
            builder = make_builder(inputs={"carry_columns": carry})
            input_settings = InputSettings(path=str(root), carry_columns=carry)
            rows = [
                row
                for shard in list_shards(input_settings)
                for row in read_rows(shard, input_settings, columns=builder.columns_needed)
            ]
            found.append([ok(prompt).row_id for prompt in builder.build_many(rows)])
    assert len(set(found[0])) == 8
    assert found == [found[0]] * 4


def test_the_second_row_of_an_id_is_rejected_naming_the_first(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", lines([{"id": "x", "prompt": ""}, {"id": "y", "prompt": "1"}]))
    write_jsonl(tmp_path / "b.jsonl", lines([{"id": "x", "prompt": "2"}, {"id": "z", "prompt": "3"}] * 2))
    input_settings = InputSettings(path=str(tmp_path), id_column="id")
    shards = list_shards(input_settings)
    with IdIndex.build(tmp_path / "ids", shards, input_settings) as index:
        builder = make_builder(inputs={"id_column": "id"}, id_index=index)
        # Shards in any order give the same answer.
        found = {
            (shard.index, result.position): result
            for shard in reversed(shards)
            for result in builder.build_many(list(read_rows(shard, input_settings)))
        }
    reasons = {key: result.reason if isinstance(result, Reject) else "ok" for key, result in found.items()}
    assert reasons == {
        (0, 0): "empty_prompt",
        (0, 1): "ok",
        (1, 0): "duplicate_id",
        (1, 1): "ok",
        (1, 2): "duplicate_id",
        (1, 3): "duplicate_id",
    }
    across, within = found[1, 0], found[1, 3]
    assert isinstance(across, Reject)
    assert isinstance(within, Reject)
    assert "shard 0 row 0" in across.message
    assert "'z' was already given to row 1" in within.message
    assert across.row_id == "x"


ROWS = [
    {"prompt": "plain"},
    {"prompt": ""},
    {"messages": USER},
    {"prompt_token_ids": [1, 2]},
    {"prompt": "z" * 900},
    {"nothing": 1},
    {"prompt": "é" * 20},
]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, len(ROWS) - 1), max_size=12))
def test_a_batch_is_its_rows_one_by_one(indices):
    builder = make_builder()
    passed_through = Reject(0, 99, None, "not_json", "message", "a.jsonl", "")
    rows: list[SourceRow | Reject] = [row_of(ROWS[i], position) for position, i in enumerate(indices)]
    results = builder.build_many([*rows, passed_through])
    assert results == [*(builder.build(row) for row in rows if isinstance(row, SourceRow)), passed_through]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=100)
@given(
    columns=st.dictionaries(
        st.sampled_from(["prompt", "messages", "prompt_token_ids", "s", "id"]),
        json_values
        | st.lists(st.dictionaries(st.sampled_from(["role", "content"]), json_values | st.just("user"))),
    ),
    over_long=st.sampled_from(["reject", "truncate_left", "truncate_right", "truncate_middle"]),
    has_id=st.booleans(),
    has_sampling=st.booleans(),
)
def test_any_columns_make_a_prompt_that_fits_or_a_reject(columns, over_long, has_id, has_sampling):
    builder = make_builder(
        {"over_long": over_long, "sampling_column": "s" if has_sampling else None},
        {"id_column": "id" if has_id else None},
        max_model_len=24,
    )
    result = builder.build(row_of(columns))
    if isinstance(result, Prompt):
        assert 0 < len(result.token_ids) <= 24 - result.sampling.max_tokens
        assert all(0 <= token < len(TOKENIZER) for token in result.token_ids)
        assert result.row_id
    else:
        assert result.reason in REASONS
        assert result.message.isprintable()
        dataclasses.asdict(result)
        json.dumps(result.message, ensure_ascii=False).encode()


def test_what_shapes_a_prompt_is_there_for_the_fingerprint():
    sources = make_builder({"template": "{{ a }}", "system_template": "s", "chat": True}).template_sources
    assert sources == {
        "template": "{{ a }}",
        "system_template": "s",
        "chat_template": TOKENIZER.chat_template,
    }
