"""Fields that the bodies of several endpoints have in common.

A field that no body declares is refused by name (400 `unknown_parameter`), as OpenAI does. Accepted without
an effect are only the hints that OpenAI itself defines so: `user`, `safety_identifier` and
`prompt_cache_key`. Null means the default.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_INT = 2**31 - 1

Text = Annotated[str, Field(max_length=4_194_304)]
ShortText = Annotated[str, Field(max_length=1024)]
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
JsonObject = dict[str, Any]


class Body(BaseModel):
    """What a client sends: exactly these fields, of exactly these types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class StructuredFields(Body):
    """What `structured_outputs` may hold: one of these."""

    json_: JsonObject | Text | None = Field(None, alias="json")
    regex: Text | None = None
    choice: list[ShortText] | None = Field(None, min_length=1)
    grammar: Text | None = None
    json_object: bool | None = None


class ModelField(Body):
    model: ShortText = "default"
    """A name of `GET /v1/models`, or "default" where there is one model only."""


class HintFields(Body):
    user: ShortText | None = None
    safety_identifier: ShortText | None = None
    prompt_cache_key: ShortText | None = None


class SamplingFields(ModelField, HintFields):
    """How tokens are drawn: OpenAI's fields, then those that vLLM added and its clients send."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=16_384)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: ShortText | list[ShortText] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    top_k: int | None = Field(None, ge=-1, le=MAX_INT)
    """-1 and 0 turn it off."""
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    min_tokens: int | None = Field(None, ge=0, le=MAX_INT)
    stop_token_ids: list[TokenId] | None = None
    bad_words: list[ShortText] | None = None
    allowed_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    priority: int | None = Field(None, ge=-MAX_INT, le=MAX_INT)
    """Lower runs sooner, where the engine has `scheduling_policy=priority`."""
    guided_json: JsonObject | Text | None = None
    guided_regex: Text | None = None
    guided_choice: list[ShortText] | None = Field(None, min_length=1)
    guided_grammar: Text | None = None
    structured_outputs: StructuredFields | None = None


class JsonSchemaFormat(Body):
    name: Name
    description: Text | None = None
    schema_: JsonObject | None = Field(None, alias="schema")
    strict: bool | None = None


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class ChatSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchemaFormat


class Function(Body):
    """A function that the model may call."""

    name: Name
    description: Text | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class FunctionName(Body):
    name: Name
