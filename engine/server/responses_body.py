"""What `POST /v1/responses` takes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from engine.server.chat_body import Message, ReasoningEffort, Told
from engine.server.fields import (
    MAX_INT,
    Body,
    Function,
    JsonObjectFormat,
    JsonSchemaFormat,
    Name,
    SamplingFields,
    ShortText,
    Text,
    TextFormat,
)

LOGPROBS = "message.output_text.logprobs"


class InputMessage(Message):
    """A message; its type may be left out."""

    type: Literal["message"] = "message"


class InputCall(Told):
    """A call of an earlier answer."""

    type: Literal["function_call"]
    call_id: ShortText
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: Text


class InputCallOutput(Told):
    """What a called function returned."""

    type: Literal["function_call_output"]
    call_id: ShortText
    output: Text


class InputReasoning(Told):
    """The reasoning of an earlier answer: templates leave it out of what follows."""

    type: Literal["reasoning"]


def _type_of(value: Any) -> str:
    return str(value.get("type", "message")) if isinstance(value, dict) else getattr(value, "type", "message")


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputCallOutput, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")],
    Discriminator(_type_of),
]


class FunctionTool(Function):
    """A function, all in one object."""

    type: Literal["function"]


class NamedFunction(Body):
    type: Literal["function"]
    name: Name


class SchemaFormat(JsonSchemaFormat):
    """A schema, all in one object."""

    type: Literal["json_schema"]


class TextOptions(Body):
    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None


class ReasoningOptions(Body):
    effort: ReasoningEffort | None = None


class ResponseBody(SamplingFields):
    """An input to be answered, after the conversation that `previous_response_id` names.

    Of the fields of chats, those that say how tokens are drawn are taken here too; there is one answer (n=1).
    """

    input: Text | Annotated[list[InputItem], Field(min_length=1)]
    instructions: Text | None = None
    previous_response_id: ShortText | None = None
    store: bool | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: list[Literal["message.output_text.logprobs"]] | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    metadata: Annotated[dict[str, ShortText], Field(max_length=16)] | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
