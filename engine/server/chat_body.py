"""What `POST /v1/chat/completions` takes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from engine.server.fields import (
    MAX_INT,
    Body,
    ChatSchemaFormat,
    Function,
    FunctionName,
    JsonObject,
    JsonObjectFormat,
    SamplingFields,
    ShortText,
    Text,
    TextFormat,
)

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class Told(BaseModel):
    """Part of a message. Keys that are not known are left out of the prompt: clients send back answers of
    all makers' servers, with keys of their own."""

    model_config = ConfigDict(extra="ignore", strict=True)


class TextPart(Told):
    type: Literal["text", "input_text", "output_text"]
    text: Text


class RefusalPart(Told):
    type: Literal["refusal"]
    refusal: Text


Part = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


class CalledFunction(Told):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: Text


class MessageToolCall(Told):
    id: ShortText
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Told):
    """A message of a chat. `content` may be missing where an assistant called tools."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | list[Part] | None = None
    name: ShortText | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: ShortText | None = None
    function_call: CalledFunction | None = None
    reasoning_content: Text | None = None
    refusal: Text | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


class ChatPromptFields(Body):
    """What a chat's prompt is made of."""

    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ChatBody(ChatPromptFields, SamplingFields):
    """A chat to be completed."""

    max_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Function] | None = Field(None, min_length=1)
    function_call: Literal["none", "auto"] | FunctionName | None = None
    response_format: (
        Annotated[TextFormat | JsonObjectFormat | ChatSchemaFormat, Field(discriminator="type")] | None
    ) = None
    reasoning_effort: ReasoningEffort | None = None
    store: Literal[False] | None = None
    metadata: JsonObject | None = Field(None, max_length=0)
    service_tier: Literal["auto", "default"] | None = None
