"""Which parsers a model needs, by the markers that its chat template writes."""

from __future__ import annotations

_TOOLS_BY_MARKERS: tuple[tuple[tuple[str, ...], str], ...] = (
    # The first whose markers are all in the template; what several families share comes last.
    (("<|channel|>", "<|message|>"), "openai"),
    (("<minimax:tool_call>",), "minimax_m2"),
    (("<｜tool▁call▁begin｜>",), "deepseek_v3"),
    (("<｜tool_call_begin｜>",), "step3"),
    (("<|tool_call_begin|>",), "kimi_k2"),
    (("<start_function_call>",), "functiongemma"),
    (("<|tool_call>",), "gemma4"),
    (("<function_calls>",), "olmo3"),
    (("<|python_start|>",), "llama4_pythonic"),
    (("<|python_tag|>",), "llama3_json"),
    (("Environment: ipython",), "llama3_json"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<|tool_call|>",), "granite"),
    (("<arg_key>",), "glm45"),
    (("<tool_calls>",), "minimax"),
    (("<tool_call>", "<function="), "qwen3_coder"),
    (("<tool_call>",), "hermes"),
)
_REASONING_BY_MARKERS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("<|channel|>", "<|message|>"), "gptoss"),
    (("<seed:think>",), "seed_oss"),
    (("[THINK]",), "mistral"),
    (("<|channel>thought",), "gemma"),
    (("◁think▷",), "kimi"),
    (("Here is my thought process",), "granite"),
    (("<minimax:tool_call>", "<think>"), "minimax_m2"),
    (("<function_calls>", "<think>"), "olmo3"),
    (("<think>", "enable_thinking"), "qwen3"),
    (("<｜Assistant｜>", "</think>", "thinking"), "deepseek_v3"),
    (("</think>",), "deepseek_r1"),
)


def choose_parsers(chat_template: str | None, model_type: str | None = None) -> tuple[str | None, str | None]:
    """The tool parser and the reasoning parser for a model, None where its template shows no such thing.

    model_type: of the model's config, for families that say nothing in their template.
    """
    template = chat_template or ""
    tool = next((name for marks, name in _TOOLS_BY_MARKERS if all(m in template for m in marks)), None)
    reasoning = next(
        (name for marks, name in _REASONING_BY_MARKERS if all(m in template for m in marks)), None
    )
    if tool is None and model_type == "gpt_oss":
        return "openai", "gptoss"
    return tool, reasoning
