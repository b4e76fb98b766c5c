"""What stands between the markers of a tool call, in the manner of each family of models.

Each function takes the text and the tools (dicts of JSON schemas by name) and gives the calls, or raises
CallSyntaxError. It is a model's text: nothing in it is trusted or run.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from engine.parsers.events import ToolCall

MAX_BODY_LEN = 1 << 20
"""Characters; a longer body is text."""


class CallSyntaxError(ValueError):
    """The text is no tool call. `is_cut`: it may be one when more of it has come."""

    def __init__(self, message: str, is_cut: bool = False):
        super().__init__(message)
        self.is_cut = is_cut


Tools = Mapping[str, Mapping[str, Any]]
"""JSON schema of the parameters, by the name of the tool."""


def json_calls(body: str, tools: Tools) -> list[ToolCall]:
    """`{"name": …, "arguments": {…}}` (or "parameters"), several in an array or one after the other."""
    calls: list[ToolCall] = []
    for value in _json_values(body):
        calls += [_call_of(each) for each in (value if isinstance(value, list) else [value])]
    if not calls:
        raise CallSyntaxError("no call in it")
    return calls


def fenced_json_calls(body: str, tools: Tools) -> list[ToolCall]:
    """The same, perhaps in a fence of Markdown."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*?)\n?```\s*", body, re.DOTALL)
    return json_calls(fenced[1] if fenced else body, tools)


def mistral_calls(body: str, tools: Tools) -> list[ToolCall]:
    """`[{…}]` of Mistral's first models; since then `name{…}` or `name[ARGS]{…}`."""
    if body.lstrip().startswith(("[", "{")):
        return json_calls(body, tools)
    named = re.match(r"\s*([\w.\-]+)\s*(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)", body)
    if named is None:
        raise CallSyntaxError("it does not begin with a name")
    return [ToolCall(named[1], _arguments(_one_json_value(body[named.end() :])))]


def deepseek_calls(body: str, tools: Tools) -> list[ToolCall]:
    """`name<｜tool▁sep｜>{…}` (V3.1), or `function<｜tool▁sep｜>name` and JSON in a fence (V3, R1)."""
    head, separator, rest = body.partition("<｜tool▁sep｜>")
    if not separator:
        raise CallSyntaxError("it has no separator")
    if head.strip() != "function":
        return [ToolCall(_name(head.strip()), _arguments(_one_json_value(rest)))]
    name, _, fenced = rest.partition("\n")
    text = re.sub(r"^\s*```(?:json)?|```\s*$", "", fenced.strip())
    return [ToolCall(_name(name.strip()), _arguments(_one_json_value(text)))]


def kimi_calls(body: str, tools: Tools) -> list[ToolCall]:
    """`functions.name:0<|tool_call_argument_begin|>{…}`."""
    head, separator, rest = body.partition("<|tool_call_argument_begin|>")
    if not separator:
        raise CallSyntaxError("it has no arguments")
    name = re.sub(r":\d+$", "", head.strip()).removeprefix("functions.")
    return [ToolCall(_name(name), _arguments(_one_json_value(rest)))]


def function_tag_calls(body: str, tools: Tools) -> list[ToolCall]:
    """`<function=name><parameter=key>value</parameter></function>` of Qwen3-Coder."""
    functions = re.findall(r"<function=([^>\s]+)\s*>(.*?)</function>", body, re.DOTALL)
    if not functions:
        raise CallSyntaxError("it has no function", is_cut="<function=" in body)
    return [
        _typed_call(name, re.findall(r"<parameter=([^>]+)>(.*?)</parameter>", inside, re.DOTALL), tools)
        for name, inside in functions
    ]


def invoke_tag_calls(body: str, tools: Tools) -> list[ToolCall]:
    """`<invoke name="…"><parameter name="key">value</parameter></invoke>` of MiniMax-M2."""
    invokes = re.findall(r"<invoke name=\"?([^\">]+)\"?\s*>(.*?)</invoke>", body, re.DOTALL)
    if not invokes:
        raise CallSyntaxError("it invokes nothing", is_cut="<invoke" in body)
    pattern = r"<parameter name=\"?([^\">]+)\"?\s*>(.*?)</parameter>"
    return [_typed_call(name, re.findall(pattern, inside, re.DOTALL), tools) for name, inside in invokes]


def steptml_calls(body: str, tools: Tools) -> list[ToolCall]:
    """`function<｜tool_sep｜><steptml:invoke name="…"><steptml:parameter name="key">value…` of Step-3."""
    return invoke_tag_calls(body.replace("steptml:", ""), tools)


def argument_tag_calls(body: str, tools: Tools) -> list[ToolCall]:
    """`name` and `<arg_key>key</arg_key><arg_value>value</arg_value>` of GLM-4.5 and later."""
    head = body.partition("<arg_key>")[0].strip()
    pattern = r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>"
    return [_typed_call(head, re.findall(pattern, body, re.DOTALL), tools)]


def pythonic_calls(body: str, tools: Tools) -> list[ToolCall]:
    """`[f(a=1), g(b="x")]`, or a call a line: Python's syntax with values of JSON, read and never run."""
    try:
        tree = ast.parse(body.strip())
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise CallSyntaxError(f"it is no Python: {error}") from error
    expressions: list[ast.AST] = []
    for statement in tree.body:
        if not isinstance(statement, ast.Expr):
            raise CallSyntaxError("it is more than calls")
        value = statement.value
        expressions += value.elts if isinstance(value, (ast.List, ast.Tuple)) else [value]
    if not expressions:
        raise CallSyntaxError("no call in it")
    try:
        return [_pythonic_call(each) for each in expressions]
    except RecursionError as error:
        raise CallSyntaxError("it is nested too deeply") from error


def brace_calls(quote: str) -> Callable[[str, Tools], list[ToolCall]]:
    """`call:name{key:value,…}` of Gemma: keys bare, strings between `quote`s, the rest as in JSON."""

    def calls(body: str, tools: Tools) -> list[ToolCall]:
        named = re.match(r"\s*call:\s*([\w.\-]+)\s*(?=\{)", body)
        if named is None:
            raise CallSyntaxError("it does not begin with call:name{")
        # What is between two quotes is a string; outside of them keys get the quotes that JSON wants.
        parts = body[named.end() :].split(quote)
        if len(parts) % 2 == 0:
            raise CallSyntaxError("a string does not end", is_cut=True)
        for index, part in enumerate(parts):
            if index % 2:
                parts[index] = json.dumps(part, ensure_ascii=False)
            else:
                parts[index] = re.sub(r"([{,]\s*)([\w.\-]+)(\s*:)", r'\1"\2"\3', part)
        return [ToolCall(named[1], _arguments(_one_json_value("".join(parts))))]

    return calls


def _json_values(text: str) -> Iterator[Any]:
    """The values of JSON in a text, with space, commas or semicolons between them."""
    decoder = json.JSONDecoder(strict=False, parse_constant=_refuse_constant)
    between = " \t\r\n;,"
    text = text.lstrip(between)
    while text:
        try:
            value, end = decoder.raw_decode(text)
        except (ValueError, RecursionError) as error:
            is_cut = isinstance(error, json.JSONDecodeError) and error.msg.startswith("Unterminated string")
            raise CallSyntaxError(f"it is no JSON: {error}", is_cut) from error
        yield value
        text = text[end:].lstrip(between)


def _one_json_value(text: str) -> Any:
    values = list(_json_values(text))
    if len(values) != 1:
        raise CallSyntaxError(f"{len(values)} values of JSON where one belongs")
    return values[0]


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _call_of(value: Any) -> ToolCall:
    if isinstance(value, Mapping) and isinstance(value.get("function"), Mapping):
        value = value["function"]
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise CallSyntaxError("it is no object with a name")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # JSON in JSON, as OpenAI's own answers have it
        arguments = _one_json_value(arguments)
    return ToolCall(_name(value["name"]), _arguments(arguments))


def _name(text: str) -> str:
    if not re.fullmatch(r"[\w.\-]{1,128}", text):
        raise CallSyntaxError("it has no name of a tool")
    return text


def _arguments(value: Any) -> str:
    if value is None:
        value = {}
    if not isinstance(value, Mapping):
        raise CallSyntaxError("its arguments are no object")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise CallSyntaxError(f"its arguments are no JSON: {error}") from error
    # A lone surrogate, which JSON can spell and UTF-8 cannot.
    return text if text.isascii() or not re.search("[\ud800-\udfff]", text) else json.dumps(value)


def _typed_call(name: str, pairs: list[tuple[str, str]], tools: Tools) -> ToolCall:
    """A call whose values came as bare text: the tool's schema says what is a string."""
    properties = tools.get(name, {}).get("properties", {})
    arguments: dict[str, Any] = {}
    for key, text in pairs:
        schema = properties.get(key.strip())
        arguments[key.strip()] = _typed(text, schema if isinstance(schema, Mapping) else {})
    return ToolCall(_name(name.strip()), _arguments(arguments))


def _typed(text: str, schema: Mapping[str, Any]) -> Any:
    text = text.removeprefix("\n").removesuffix("\n")
    types = schema.get("type")
    types = types if isinstance(types, list) else [types]
    if types == ["string"]:
        return text
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return text
    return text if "string" in types and isinstance(value, (int, float)) else value


def _pythonic_call(node: ast.AST) -> ToolCall:
    if not isinstance(node, ast.Call) or node.args:
        raise CallSyntaxError("it is no call by keywords")
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise CallSyntaxError("it unpacks a mapping")
        arguments[keyword.arg] = _pythonic_value(keyword.value)
    return ToolCall(_dotted(node.func), _arguments(arguments))


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    raise CallSyntaxError("it calls no name")


_NAMES_OF_JSON = {"true": True, "false": False, "null": None}


def _pythonic_value(node: ast.AST) -> Any:
    if isinstance(node, ast.Constant) and (
        node.value is None or isinstance(node.value, (str, int, float, bool))
    ):
        return node.value
    if isinstance(node, ast.Name) and node.id in _NAMES_OF_JSON:
        return _NAMES_OF_JSON[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _pythonic_value(node.operand)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return -value
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_pythonic_value(each) for each in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_pythonic_value(key) if key is not None else None for key in node.keys]
        if all(isinstance(key, str) for key in keys):
            return dict(zip(keys, map(_pythonic_value, node.values), strict=True))
    raise CallSyntaxError("a value in it is no JSON")
