"""How each family of models marks its tool calls and its reasoning: two tables.

Sources: the models' own chat templates and their authors' documentation; the names are those that vLLM and
EasyDeL use for the same formats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.parsers import call_bodies as bodies
from engine.parsers.call_bodies import Tools
from engine.parsers.events import ToolCall


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """Calls between markers. Without `ends` a call goes on to the next start, or the end of the text."""

    models: str
    starts: tuple[str, ...]
    ends: tuple[str, ...]
    calls: Callable[[str, Tools], list[ToolCall]]
    around: tuple[str, ...] = ()
    """Markers of a list of calls, which say nothing by themselves."""
    bare: str = ""
    """Characters: a whole message that begins with one of them may be calls without a marker, if it names
    tools that were given."""


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """Reasoning between markers, before the answer."""

    models: str
    starts: tuple[str, ...]
    ends: tuple[str, ...]
    begins_inside: bool = False
    """The text begins with the reasoning, for the start is in the prompt, or is left out."""


_TOOL_CALL = ("<tool_call>",)
_TOOL_CALL_END = ("</tool_call>",)

TOOL_FORMATS: dict[str, ToolFormat] = {
    "hermes": ToolFormat(
        "Hermes 2 and 3, Qwen2.5, Qwen3, SmolLM3", _TOOL_CALL, _TOOL_CALL_END, bodies.json_calls
    ),
    "mistral": ToolFormat("Mistral and Mixtral", ("[TOOL_CALLS]",), (), bodies.mistral_calls),
    "llama3_json": ToolFormat(
        "Llama 3.1 to 3.3", ("<|python_tag|>",), ("<|eom_id|>", "<|eot_id|>"), bodies.json_calls, bare="{"
    ),
    "llama4_json": ToolFormat(
        "Llama 4, in JSON", ("<|python_tag|>",), ("<|eom|>", "<|eot|>"), bodies.json_calls, bare="{["
    ),
    "pythonic": ToolFormat(
        "Llama 3.2, Gemma 3 and others that write calls as Python", (), (), bodies.pythonic_calls, bare="["
    ),
    "llama4_pythonic": ToolFormat(
        "Llama 4", ("<|python_start|>",), ("<|python_end|>",), bodies.pythonic_calls, bare="["
    ),
    "deepseek_v3": ToolFormat(
        "DeepSeek V3, V3.1, R1",
        ("<｜tool▁call▁begin｜>",),
        ("<｜tool▁call▁end｜>",),
        bodies.deepseek_calls,
        around=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    ),
    "qwen3_coder": ToolFormat("Qwen3-Coder", _TOOL_CALL, _TOOL_CALL_END, bodies.function_tag_calls),
    "kimi_k2": ToolFormat(
        "Kimi K2",
        ("<|tool_call_begin|>",),
        ("<|tool_call_end|>",),
        bodies.kimi_calls,
        around=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    ),
    "glm45": ToolFormat("GLM-4.5 to 4.7", _TOOL_CALL, _TOOL_CALL_END, bodies.argument_tag_calls),
    "granite": ToolFormat(
        "Granite 3", ("<|tool_call|>", "<tool_call>"), _TOOL_CALL_END, bodies.json_calls, bare="["
    ),
    "granite_20b_fc": ToolFormat(
        "Granite 20B for function calls", ("<function_call>",), (), bodies.json_calls
    ),
    "minimax": ToolFormat("MiniMax-M1", ("<tool_calls>",), ("</tool_calls>",), bodies.json_calls),
    "minimax_m2": ToolFormat(
        "MiniMax-M2", ("<minimax:tool_call>",), ("</minimax:tool_call>",), bodies.invoke_tag_calls
    ),
    "gemma3": ToolFormat("Gemma 3, in a fence", ("```tool_code\n",), ("```",), bodies.pythonic_calls),
    "functiongemma": ToolFormat(
        "FunctionGemma", ("<start_function_call>",), ("<end_function_call>",), bodies.brace_calls("<escape>")
    ),
    "gemma4": ToolFormat("Gemma 4", ("<|tool_call>",), ("<tool_call|>",), bodies.brace_calls('<|"|>')),
    "olmo3": ToolFormat(
        "OLMo 3", ("<function_calls>",), ("</function_calls>",), bodies.pythonic_calls
    ),
    "step3": ToolFormat(
        "Step-3",
        ("<｜tool_call_begin｜>",),
        ("<｜tool_call_end｜>",),
        bodies.steptml_calls,
        around=("<｜tool_calls_begin｜>", "<｜tool_calls_end｜>"),
    ),
    "xlam": ToolFormat(
        "xLAM", ("<tool_call>", "[TOOL_CALLS]"), _TOOL_CALL_END, bodies.fenced_json_calls, bare="[`"
    ),
}  # fmt: skip

HARMONY_MODELS = "gpt-oss"

_THINK, _THINK_END = ("<think>",), ("</think>",)

REASONING_FORMATS: dict[str, ReasoningFormat] = {
    "deepseek_r1": ReasoningFormat("DeepSeek R1, QwQ", _THINK, _THINK_END, begins_inside=True),
    "deepseek_v3": ReasoningFormat("DeepSeek V3.1 and V3.2", _THINK, _THINK_END),
    "qwen3": ReasoningFormat("Qwen3, SmolLM3, GLM-4.5", _THINK, _THINK_END),
    "mistral": ReasoningFormat("Magistral", ("[THINK]",), ("[/THINK]",)),
    "granite": ReasoningFormat(
        "Granite 3.2 and 3.3",
        ("Here is my thought process:", "Here's my thought process:", "<think>"),
        ("Here is my response:", "Here's my response:", "</think>"),
    ),
    "gemma": ReasoningFormat("Gemma 4", ("<|channel>thought\n",), ("<channel|>",)),
    "kimi": ReasoningFormat("Kimi", ("◁think▷", "<think>"), ("◁/think▷", "</think>")),
    "olmo3": ReasoningFormat("OLMo 3 Think", _THINK, _THINK_END, begins_inside=True),
    "step3": ReasoningFormat("Step-3", _THINK, _THINK_END, begins_inside=True),
    "minimax_m2": ReasoningFormat("MiniMax-M2", _THINK, _THINK_END, begins_inside=True),
    "seed_oss": ReasoningFormat("Seed-OSS", ("<seed:think>",), ("</seed:think>",), begins_inside=True),
}
