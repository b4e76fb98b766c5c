"""What a row says in each form, and the reason for every row that says nothing."""

from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing

from engine.errors import ConfigError
from engine.sampling_params import SamplingParams
from tests.pipeline.input_helpers import make_chat_tokenizer
from tests.pipeline.prompt_helpers import BOS, TOKENIZER, USER, build, make_builder, ok, refused


def make_bos_tokenizer():
    """One that puts BOS before all text it encodes, as Llama's does."""
    tokenizer = make_chat_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", BOS)]
    )
    return tokenizer


# The forms


def test_text_is_sent_as_it_is():
    prompt = ok(build({"prompt": "The answer é"}))
    assert prompt.text == "The answer é"
    assert list(prompt.token_ids) == TOKENIZER.encode("The answer é")
    assert prompt.sampling == SamplingParams(max_tokens=16, temperature=0.5)
    assert not prompt.was_truncated


def test_a_chat_is_what_the_tokenizer_makes_of_it():
    chat = [{"role": "system", "content": "be"}, *USER, {"role": "assistant", "content": "ho", "name": None}]
    for add in (True, False):
        prompt = ok(build({"messages": chat}, {"add_generation_prompt": add}))
        expected = TOKENIZER.apply_chat_template(chat, add_generation_prompt=add, return_dict=False)
        assert list(prompt.token_ids) == expected
        assert prompt.text == TOKENIZER.apply_chat_template(chat, add_generation_prompt=add, tokenize=False)


def test_text_in_a_chat_is_one_user_message():
    as_chat = ok(build({"prompt": "hi"}, {"chat": True}))
    assert as_chat.token_ids == ok(build({"messages": USER})).token_ids
    templated = ok(build({"x": "h"}, {"chat": True, "template": "{{ x }}i"}))
    assert templated.token_ids == as_chat.token_ids


def test_the_system_template_is_for_chats_without_a_system_message():
    settings = {"system_template": "You are {{ who }}."}
    own = [{"role": "system", "content": "mine"}, *USER]
    assert ok(build({"messages": own, "who": "x"}, settings)).text == ok(build({"messages": own})).text
    added = [{"role": "system", "content": "You are x."}, *USER]
    expected = ok(build({"messages": added})).text
    assert ok(build({"messages": USER, "who": "x"}, settings)).text == expected
    assert ok(build({"prompt": "hi", "who": "x"}, settings | {"chat": True})).text == expected
    refused(build({"messages": USER}, settings), "missing_column", "prompt.system_template", "'who'")


def test_token_ids_are_taken_as_they_are():
    prompt = ok(build({"prompt_token_ids": [5, 0, 7, 7]}))
    assert (prompt.token_ids, prompt.text) == ((5, 0, 7, 7), None)


def test_a_template_over_columns(tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text("{{ a }} and {{ b['c'] }}\n")
    for given_as in ({"template": "{{ a }} and {{ b['c'] }}"}, {"template_file": str(path)}):
        assert ok(build({"a": "x", "b": {"c": 3}, "prompt": "unused"}, given_as)).text == "x and 3"


def test_there_is_never_a_second_bos():
    tokenizer = make_bos_tokenizer()
    plain = ok(build({"prompt": "hi"}, tokenizer=tokenizer)).token_ids
    assert plain[0] == BOS
    assert BOS not in plain[1:]
    spelled = ok(build({"prompt": "<|im_start|>hi"}, tokenizer=tokenizer)).token_ids
    assert spelled == plain
    chat = ok(build({"messages": USER}, tokenizer=tokenizer)).token_ids
    assert chat == ok(build({"messages": USER})).token_ids


def test_the_form_is_the_one_column_that_has_a_value():
    assert ok(build({"prompt": "a", "messages": None})).text == "a"
    both = {"prompt": "a", "messages": USER}
    refused(build(both), "ambiguous_prompt", "'messages' and 'prompt'", "prompt.form")
    assert ok(build(both, {"form": "prompt"})).text == "a"
    assert ok(build(both, {"form": "messages"})).token_ids == ok(build({"messages": USER})).token_ids
    refused(build({"prompt": None, "messages": None}), "null_value", "'prompt'", "'messages'")
    refused(build({"text": "a"}), "missing_column", "'prompt'")
    assert ok(build({"text": "a"}, {"prompt_column": "text"})).text == "a"


# What is refused


@pytest.mark.parametrize(
    ("columns", "reason", "says"),
    [
        ({"prompt": ""}, "empty_prompt", "empty"),
        ({"prompt": " \n\t"}, "empty_prompt", "empty"),
        ({"prompt": 3}, "wrong_type", "int"),
        ({"prompt": ["a"]}, "wrong_type", "list"),
        ({"prompt": b"a"}, "wrong_type", "bytes"),
        ({"prompt": "a\udc00"}, "lone_surrogate", "surrogate"),
        ({"prompt": "x" * 2001}, "prompt_too_long", "max_prompt_chars"),
        ({"prompt": "z" * 1000}, "prompt_too_long", "1000 tokens"),
        ({"messages": "hi"}, "wrong_type", "a chat is a list"),
        ({"messages": []}, "empty_prompt", "empty list"),
        ({"messages": ["hi"]}, "wrong_type", "messages[0]"),
        (
            {"messages": [{"from": "human", "value": "hi"}]},
            "missing_column",
            "no 'role' (it has from, value)",
        ),
        ({"messages": [{"role": "user"}]}, "missing_column", "messages[0] has no 'content'"),
        ({"messages": [*USER, {"role": "user", "content": None}]}, "null_value", "messages[1].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "wrong_type",
            "messages[0].content",
        ),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "bad_role", "'robot'"),
        ({"messages": [{"role": "user", "content": " "}]}, "empty_prompt", "any text"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "lone_surrogate", "surrogate"),
        ({"prompt_token_ids": []}, "empty_prompt", "empty list"),
        ({"prompt_token_ids": "5"}, "wrong_type", "list of integers"),
        ({"prompt_token_ids": [1, True]}, "wrong_type", "prompt_token_ids[1] is a bool"),
        ({"prompt_token_ids": [1.0]}, "wrong_type", "float"),
        ({"prompt_token_ids": [1, None]}, "wrong_type", "NoneType"),
        ({"prompt_token_ids": [10**9]}, "bad_token_id", "ids go from 0 to"),
        ({"prompt_token_ids": [-1]}, "bad_token_id", "-1"),
        ({"prompt_token_ids": [1] * 385}, "prompt_too_long", "385 tokens"),
    ],
)
def test_each_bad_row_has_its_reason(columns, reason, says):
    reject = refused(build(columns, {"max_prompt_chars": 2000}), reason, says)
    assert reject.row_id is not None
    assert (reject.shard_index, reject.position, reject.source, reject.line) == (0, 0, "a.jsonl", 1)


@pytest.mark.parametrize(
    ("template", "columns", "reason", "says"),
    [
        ("{{ a }}{{ b }}", {"a": "x"}, "missing_column", "'b' is undefined"),
        ("{{ a }}", {"a": None}, "null_value", "null here: a"),
        ("{{ a }}", {"a": ""}, "empty_prompt", "empty"),
        ("{{ a.b }}", {"a": {}}, "template_error", "no attribute 'b'"),
        ("{{ a + 1 }}", {"a": "x"}, "template_error", "TypeError"),
        ("{{ a * 100000 }}", {"a": "xx"}, "template_error", "longer than"),
        ("{% for i in range(a) %}xxxxxxxx{% endfor %}", {"a": 90000}, "template_error", "max_prompt_chars"),
    ],
)
def test_a_template_that_fails_on_a_row_rejects_it(template, columns, reason, says):
    settings = {"template": template, "max_prompt_chars": 100_000}
    refused(build(columns, settings), reason, "prompt.template" if reason != "empty_prompt" else "", says)


def test_a_chat_template_that_refuses_a_chat_rejects_the_row():
    strict = make_chat_tokenizer(
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user\nfirst') }}{% endif %}"
        "{{ messages[0]['content'] + messages[1]['content'] }}"
    )
    system = [{"role": "system", "content": "x"}]
    refused(build({"messages": system}, tokenizer=strict), "template_error", "refuses this chat: user first")
    refused(build({"messages": USER}, tokenizer=strict), "template_error", "chat template")
    none = make_chat_tokenizer(None)
    refused(build({"messages": USER}, tokenizer=none), "template_error", "no chat template")
    with pytest.raises(ConfigError, match="no chat template"):
        make_builder({"chat": True}, tokenizer=none)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"template": "x", "template_file": "y"}, "both given"),
        ({"template": "no column"}, "uses no column"),
        ({"template": "{{ a"}, "prompt.template: line 1"),
        ({"form": "template"}, "needs prompt.template"),
        ({"form": "prompt", "template": "{{ a }}"}, "leaves prompt.template unused"),
        ({"template": "{{ a }}", "system_template": "x"}, "needs prompt.chat=true"),
        ({"form": "prompt_token_ids", "system_template": "x"}, "cannot apply to token ids"),
        ({"max_prompt_chars": 0}, "prompt.max_prompt_chars"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        make_builder(settings)
