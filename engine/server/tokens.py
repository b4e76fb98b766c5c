"""`POST /tokenize` and `POST /detokenize`, with vLLM's fields."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from engine.server.chat_body import ChatPromptFields, Message
from engine.server.errors import ERROR_ANSWERS, bad_request
from engine.server.fields import ModelField, Text, TokenId
from engine.server.json_body import StrictRoute
from engine.server.prompts import chat_prompt, template_messages, text_prompt
from engine.server.served import ServedModels
from engine.server.settings import ServerSettings
from engine.server.tool_choice import make_tool_choice


class TokenizeBody(ModelField, ChatPromptFields):
    """A text or a chat, one of them."""

    prompt: Text | None = None
    messages: list[Message] | None = Field(None, min_length=1)  # type: ignore[assignment]
    add_special_tokens: bool | None = None
    """Of a text: those that the tokenizer adds by itself, such as BOS (default: true)."""
    return_token_strs: bool | None = None


class Tokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeBody(ModelField):
    tokens: list[TokenId] = Field(max_length=1_048_576)


class DetokenizedText(BaseModel):
    prompt: str


def token_routes(models: ServedModels, settings: ServerSettings) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute, tags=["tokens"], responses=ERROR_ANSWERS)

    @routes.post("/tokenize", response_model_exclude_none=True)
    async def tokenize(body: TokenizeBody) -> Tokens:
        """The token ids that a prompt comes to."""
        model = models.find(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise bad_request("give a prompt or messages, one of them", "prompt")
        if body.messages is not None:
            tools = make_tool_choice([t.function for t in body.tools or ()], None, None, None, settings)
            messages = template_messages(body.messages)
            ids = await chat_prompt(model, messages, settings, tools=tools.offered, fields=body)
        elif body.add_special_tokens is False:
            encode = model.tokenizer.backend_tokenizer.encode
            ids = (await run_in_threadpool(encode, body.prompt, add_special_tokens=False)).ids
        else:
            ids = await text_prompt(model, body.prompt or "")
        answer = Tokens(count=len(ids), max_model_len=model.max_model_len, tokens=ids)
        if body.return_token_strs:
            answer.token_strs = model.tokenizer.convert_ids_to_tokens(ids)
        return answer

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> DetokenizedText:
        """The text of token ids, special tokens included."""
        model = models.find(body.model)
        highest = max(body.tokens, default=0)
        if highest >= model.vocab_size:
            message = f"token id {highest} is not in the vocabulary of {model.vocab_size}"
            raise bad_request(message, "tokens", "bad_token_id")
        decode = model.tokenizer.decode
        return DetokenizedText(prompt=await run_in_threadpool(decode, body.tokens, skip_special_tokens=False))

    return routes
