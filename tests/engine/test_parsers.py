"""Tool calls and reasoning, in the manner of each family: whole, in pieces, and damaged."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.parsers import (
    REASONING_PARSERS,
    TOOL_PARSERS,
    ContentDelta,
    ReasoningDelta,
    ToolCallArguments,
    choose_parsers,
    ends_inside_reasoning,
    make_parser,
    message_of,
    parse_message,
)

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "hourly": {"type": "boolean"},
                },
            },
        },
    },
    {"type": "function", "function": {"name": "files.list", "parameters": {"type": "object"}}},
]
ARGUMENTS = {"city": "Zürich </x>", "days": 3, "hourly": True}
JSON = json.dumps(ARGUMENTS, ensure_ascii=False)
PYTHON = "weather(city='Zürich </x>', days=3, hourly=True)"

# One call of `weather` with ARGUMENTS, as the models of each parser write it.
WRITTEN = {
    "hermes": f'<tool_call>\n{{"name": "weather", "arguments": {JSON}}}\n</tool_call>',
    "mistral": f'[TOOL_CALLS] [{{"name": "weather", "arguments": {JSON}}}]',
    "llama3_json": f'<|python_tag|>{{"name": "weather", "parameters": {JSON}}}',
    "llama4_json": f'{{"name": "weather", "parameters": {JSON}}}',
    "pythonic": f"[{PYTHON}]",
    "llama4_pythonic": f"<|python_start|>[{PYTHON}]<|python_end|>",
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
    f"```json\n{JSON}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "qwen3_coder": "<tool_call>\n<function=weather>\n<parameter=city>\nZürich </x>\n</parameter>\n"
    "<parameter=days>\n3\n"
    "</parameter>\n<parameter=hourly>\ntrue\n</parameter>\n</function>\n</tool_call>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"
    "<|tool_call_argument_begin|>"
    f"{JSON}<|tool_call_end|><|tool_calls_section_end|>",
    "glm45": "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Zürich </x></arg_value>\n"
    "<arg_key>days</arg_key>\n"
    "<arg_value>3</arg_value>\n<arg_key>hourly</arg_key>\n<arg_value>true</arg_value>\n</tool_call>",
    "granite": f'<|tool_call|>[{{"name": "weather", "arguments": {JSON}}}]',
    "granite_20b_fc": f'<function_call> {{"name": "weather", "arguments": {JSON}}}',
    "minimax": f'<tool_calls>\n{{"name": "weather", "arguments": {JSON}}}\n</tool_calls>',
    "minimax_m2": '<minimax:tool_call>\n<invoke name="weather">\n'
    '<parameter name="city">Zürich </x></parameter>\n'
    '<parameter name="days">3</parameter>\n<parameter name="hourly">true</parameter>\n'
    "</invoke>\n</minimax:tool_call>",
    "gemma3": f"```tool_code\n{PYTHON}\n```",
    "functiongemma": "<start_function_call>call:weather{city:<escape>Zürich </x><escape>,days:3,hourly:true}"
    "<end_function_call>",
    "gemma4": '<|tool_call>call:weather{city:<|"|>Zürich </x><|"|>,days:3,hourly:true}<tool_call|>',
    "olmo3": f"<function_calls>\n{PYTHON}\n</function_calls>",
    "step3": "<｜tool_calls_begin｜><｜tool_call_begin｜>function<｜tool_sep｜>"
    '<steptml:invoke name="weather">'
    '<steptml:parameter name="city">Zürich </x></steptml:parameter>'
    '<steptml:parameter name="days">3</steptml:parameter>'
    '<steptml:parameter name="hourly">true</steptml:parameter></steptml:invoke>'
    "<｜tool_call_end｜><｜tool_calls_end｜>",
    "xlam": f'```json\n[{{"name": "weather", "arguments": {JSON}}}]\n```',
    "openai": "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>" + JSON + "<|call|>",
}
BARE = {"llama4_json", "pythonic", "xlam"}


def in_pieces(text, cuts, tool_parser, reasoning_parser=None, **options):
    parser = make_parser(tool_parser, reasoning_parser, TOOLS, **options)
    bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    events = [event for a, b in pairwise(bounds) for event in parser.push(text[a:b])]
    return message_of([*events, *parser.finish()])


def test_each_parser_has_an_example():
    assert WRITTEN.keys() == TOOL_PARSERS.keys()


@pytest.mark.parametrize("name", WRITTEN)
def test_a_call_is_read(name):
    before = "" if name in BARE | {"openai"} else "I shall look.\n\n"
    message = parse_message(before + WRITTEN[name], name, None, TOOLS)
    assert [call.name for call in message.tool_calls] == ["weather"]
    assert json.loads(message.tool_calls[0].arguments) == ARGUMENTS
    assert message.content == before.rstrip()


@pytest.mark.parametrize("name", sorted(WRITTEN.keys() - BARE - {"granite", "granite_20b_fc"}))
def test_several_calls_and_what_is_said_between_them(name):
    message = parse_message(f"{WRITTEN[name]}\n{WRITTEN[name]}", name, None, TOOLS)
    assert [json.loads(call.arguments) for call in message.tool_calls] == [ARGUMENTS, ARGUMENTS]
    assert message.content == ""


@pytest.mark.parametrize("name", WRITTEN)
@settings(max_examples=25)
@given(
    cuts=st.lists(st.integers(0, 1000), max_size=40),
    after=st.sampled_from(["", "\n", " Well.", "<tool", "[TO"]),
)
def test_pieces_give_what_the_whole_gives(name, cuts, after):
    text = WRITTEN[name] + after
    assert in_pieces(text, cuts, name) == parse_message(text, name, None, TOOLS)


@pytest.mark.parametrize("name", sorted(WRITTEN.keys() - {"openai"}))
@settings(max_examples=25)
@given(keep=st.integers(0, 400), cuts=st.lists(st.integers(0, 1000), max_size=8))
def test_a_call_cut_short_or_damaged_loses_nothing(name, keep, cuts):
    """Every beginning of a call is a call, or comes back as content."""
    text = WRITTEN[name][: keep % len(WRITTEN[name])]
    message = parse_message(text, name, None, TOOLS)
    assert message == in_pieces(text, cuts, name)
    if not message.tool_calls:
        kept = text
        for around in ("<｜tool▁calls▁begin｜>", "<|tool_calls_section_begin|>", "<｜tool_calls_begin｜>"):
            kept = kept.removeprefix(around)
        assert message.content == kept


@given(st.text(alphabet=st.sampled_from('<>|[]{}"\\: ,toolcallTOOLCALLS_/=\n`#１'), max_size=200))
def test_any_text_is_read_without_an_error(text):
    for name in TOOL_PARSERS:
        parse_message(text, name, "qwen3", TOOLS)


@pytest.mark.parametrize(
    ("text", "parser"),
    [
        pytest.param("[" * 100_000, "pythonic", id="brackets"),
        pytest.param("<tool_call>" + '{"a":' * 100_000 + "</tool_call>", "hermes", id="objects"),
        pytest.param('<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', "hermes", id="nan"),
        pytest.param(
            '<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>', "hermes", id="infinity"
        ),
        pytest.param('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "hermes", id="no object"),
        pytest.param('<tool_call>{"name": "a b", "arguments": {}}</tool_call>', "hermes", id="no name"),
        pytest.param("[__import__('os').system(command='x')]", "pythonic", id="a call of a call"),
        pytest.param("<tool_call>" + " " * (1 << 21) + "</tool_call>", "hermes", id="very long"),
    ],
)
def test_hostile_calls_are_content(text, parser):
    message = parse_message(text, parser, None, TOOLS)
    assert message.tool_calls == ()
    assert message.content == text


def test_an_end_inside_a_string_ends_no_call():
    arguments = {"city": "a</tool_call>b<tool_call>"}
    text = f'<tool_call>{{"name": "weather", "arguments": {json.dumps(arguments)}}}</tool_call>.'
    message = parse_message(text, "hermes", None, TOOLS)
    assert json.loads(message.tool_calls[0].arguments) == arguments
    assert message.content == "."


def test_a_lone_surrogate_can_still_be_encoded():
    message = parse_message('<tool_call>{"name": "f", "arguments": {"a": "\\ud800é"}}</tool_call>', "hermes")
    message.tool_calls[0].arguments.encode()


def test_bare_json_is_a_call_only_of_a_tool_that_was_given():
    text = '{"name": "launch", "parameters": {}}'
    assert parse_message(text, "llama3_json", None, TOOLS).content == text
    assert parse_message(text, "llama3_json", None, None).content == text
    assert parse_message('{"name": "files.list"}', "llama3_json", None, TOOLS).tool_calls[0].arguments == "{}"


def test_mistrals_newer_spelling():
    message = parse_message(
        '[TOOL_CALLS]weather[ARGS]{"days": 1}[TOOL_CALLS]files.list{}', "mistral", None, TOOLS
    )
    assert [(call.name, call.arguments) for call in message.tool_calls] == [
        ("weather", '{"days": 1}'),
        ("files.list", "{}"),
    ]


def test_content_does_not_wait_for_the_end():
    parser = make_parser("hermes", None, TOOLS)
    assert parser.push("Hello <to") == [ContentDelta("Hello")]
    assert parser.push("ast>, you") == [ContentDelta(" <toast>, you")]


REASONED = {
    "deepseek_r1": "<think>{}</think>",
    "deepseek_v3": "<think>{}</think>",
    "qwen3": "<think>\n{}\n</think>\n\n",
    "mistral": "[THINK]{}[/THINK]",
    "granite": "Here is my thought process:\n{}\nHere is my response:\n",
    "gemma": "<|channel>thought\n{}<channel|>",
    "kimi": "◁think▷{}◁/think▷",
    "olmo3": "{}</think>",
    "step3": "{}</think>",
    "minimax_m2": "<think>\n{}\n</think>\n",
    "seed_oss": "<seed:think>{}</seed:think>",
    "gptoss": "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>",
}


@pytest.mark.parametrize("name", REASONED)
@settings(max_examples=25)
@given(cuts=st.lists(st.integers(0, 1000), max_size=40))
def test_reasoning_and_answer_in_any_pieces(name, cuts):
    assert REASONED.keys() == REASONING_PARSERS.keys()
    text = REASONED[name].format("Is 2 < 3?\n\nYes.") + "It is <b>true</b>."
    message = in_pieces(text, cuts, None, name)
    assert (message.reasoning, message.content) == ("Is 2 < 3?\n\nYes.", "It is <b>true</b>.")


def test_reasoning_then_a_call():
    text = "<think>a call</think>\n\n" + WRITTEN["hermes"]
    message = parse_message(text, "hermes", "qwen3", TOOLS)
    assert (message.reasoning, message.content, len(message.tool_calls)) == ("a call", "", 1)
    both = "<|channel|>analysis<|message|>a call<|end|><|start|>assistant" + WRITTEN["openai"]
    message = parse_message(both, "openai", "gptoss", TOOLS)
    assert (message.reasoning, message.content, len(message.tool_calls)) == ("a call", "", 1)


def test_a_call_inside_the_reasoning_is_none():
    text = f"<think>perhaps {WRITTEN['hermes']}</think>no"
    message = parse_message(text, "hermes", "qwen3", TOOLS)
    assert (message.tool_calls, message.content) == ((), "no")


def test_where_the_prompt_left_off_decides():
    assert ends_inside_reasoning("…<|assistant|><think>\n", "qwen3") is True
    assert ends_inside_reasoning("…<think>\n\n</think>\n\n", "qwen3") is False
    assert ends_inside_reasoning("…<|assistant|>", "qwen3") is None
    assert parse_message("so</think>yes", None, "qwen3", inside_reasoning=True).reasoning == "so"
    assert parse_message("yes", None, "deepseek_r1", inside_reasoning=False).content == "yes"
    # Cut by its length: all of it is reasoning, and none of the answer.
    assert parse_message("so, so", None, "deepseek_r1").reasoning == "so, so"


def test_no_thought_is_no_reasoning():
    assert parse_message("yes <think>no</think>", None, "qwen3").content == "yes <think>no</think>"
    assert parse_message("plain", "openai", "gptoss").content == "plain"
    assert parse_message("<think></think>yes", None, "qwen3") == parse_message("yes", None, "qwen3")


def test_arguments_of_gpt_oss_stream():
    parser = make_parser("openai", "gptoss", TOOLS)
    parser.push("<|channel|>commentary to=functions.weather<|message|>")
    assert parser.push('{"days"') == [ToolCallArguments(0, '{"days"')]
    parser = make_parser(None, "gptoss")
    assert parser.push("<|channel|>analysis<|message|>so") == [ReasoningDelta("so")]


@pytest.mark.parametrize(
    ("template", "chosen"),
    [
        ("{{ tools }} <tool_call> {% if enable_thinking %}<think>", ("hermes", "qwen3")),
        ("<tool_call>\n<function=", ("qwen3_coder", None)),
        ("[TOOL_CALLS] [THINK]", ("mistral", "mistral")),
        ("<|channel|>analysis<|message|>", ("openai", "gptoss")),
        ("<|im_start|>", (None, None)),
        (None, (None, None)),
    ],
)
def test_parsers_are_chosen_by_the_template(template, chosen):
    assert choose_parsers(template) == chosen


def test_an_unknown_parser_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean hermes"):
        make_parser("hermess")
    with pytest.raises(ConfigError, match="reasoning_parser='x' is no parser: known are"):
        make_parser(None, "x")
