"""Chats: through the template, with tools and reasoning, read by the engine's parsers."""

from __future__ import annotations

import pytest

from engine import parsers
from engine.engine import Engine
from engine.errors import ConfigError, RequestError
from engine.sampling_params import SamplingParams
from tests.engine.engines import TINY, engine_with, tiny_engine, tokens_of, varied_model

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.0, seed=7, max_tokens=24, ignore_eos=True)


CHAT = [{"role": "user", "content": "the answer"}]
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if enable_thinking is defined %}"
    "<think={{ enable_thinking }}>{% endif %}{{ name | default('') }}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_chat_is_answered_through_the_template():
    engine = tiny_engine()
    output = engine.chat(CHAT, GREEDY)
    assert tokens_of([output]) == tokens_of(engine.generate([CHAT], GREEDY))
    streamed = list(engine.chat(CHAT, sampling_params=DRAWN, stream=True))
    assert "".join(each.delta_text for each in streamed) == engine.chat(CHAT, DRAWN).outputs[0].text
    assert not engine.has_unfinished


def test_tools_reasoning_and_variables_reach_the_template():
    engine = tiny_engine(max_model_len=192)
    tools = [{"type": "function", "function": {"name": "f"}}]
    output = engine.chat(
        CHAT,
        GREEDY,
        tools=tools,
        reasoning=False,
        chat_template=TEMPLATE,
        chat_template_kwargs={"name": "Ada"},
        request_id="mine",
    )
    text = '[{"function": {"name": "f"}, "type": "function"}]<think=False>Adauser: the answer\nassistant: '
    read = engine.tokenizer.decode(output.prompt_token_ids)
    assert sorted(read) == sorted(text)
    assert read.endswith("<think=False>Adauser: the answer\nassistant: ")
    assert output.request_id == "mine"
    with pytest.raises(RequestError, match="'tools'"):
        engine.chat(CHAT, GREEDY, tools=tools, chat_template_kwargs={"tools": []})
    assert engine.chat(
        CHAT, GREEDY, chat_template=TEMPLATE, add_generation_prompt=False
    ).prompt_token_ids == (tuple(engine.tokenizer("user: the answer\n")["input_ids"]))


def test_completions_are_read_by_the_parsers_of_the_engine():
    engine = engine_with(tool_parser="hermes", reasoning_parser="deepseek_r1")
    output = engine.chat(CHAT, DRAWN, tools=[{"type": "function", "function": {"name": "f"}}])
    sample = output.outputs[0]
    expected = parsers.parse_message(
        sample.text, "hermes", "deepseek_r1", [{"type": "function", "function": {"name": "f"}}]
    )
    assert sample.message == expected
    assert (output.reasoning_content, output.tool_calls) == (expected.reasoning, expected.tool_calls)
    with pytest.raises(ConfigError, match=r"engine\.tool_parser='no'"):
        Engine(varied_model(), TINY, tool_parser="no")
    assert Engine(varied_model(), TINY, tool_parser="auto", compile_runner=False).chat(CHAT, GREEDY)


def test_stop_strings_inside_the_reasoning_stop_only_where_asked():
    free = tiny_engine().chat(CHAT, DRAWN).outputs[0].text
    stop = free[3:5]
    thinking = engine_with(tool_parser="hermes", reasoning_parser="deepseek_r1")
    assert thinking.chat(CHAT, DRAWN.replace(stop=[stop])).outputs[0].text == free
    strict = engine_with(reasoning_parser="deepseek_r1", ignore_stop_strings_in_reasoning=False)
    assert strict.chat(CHAT, DRAWN.replace(stop=[stop])).outputs[0].text == free[: free.index(stop)]
