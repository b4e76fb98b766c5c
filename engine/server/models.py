"""`GET /v1/models`, `GET /v1/models/{id}` and `GET /v1/tools`."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from engine.server.errors import ERROR_ANSWERS
from engine.server.served import ServedModel, ServedModels


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    """Tokens of a prompt and its completion together."""


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class ModelTools(BaseModel):
    """How a model's calls and reasoning are told from its text; null where they are not."""

    model: str
    tool_parser: str | None
    reasoning_parser: str | None


class ToolSupport(BaseModel):
    object: Literal["list"]
    data: list[ModelTools]


def model_routes(models: ServedModels) -> APIRouter:
    routes = APIRouter(tags=["models"], responses=ERROR_ANSWERS)

    @routes.get("/v1/models")
    async def list_models() -> ModelList:
        """The models that requests may name."""
        return ModelList(object="list", data=[_told(model) for model in models])

    @routes.get("/v1/models/{model_id:path}")
    async def retrieve_model(model_id: str) -> Model:
        """One model; names with slashes are taken as they are."""
        return _told(models.find(model_id))

    @routes.get("/v1/tools")
    async def list_tool_support() -> ToolSupport:
        """The parsers of each model, as chosen by `server.tool_parser` and `server.reasoning_parser`."""
        data = [
            ModelTools(
                model=model.name, tool_parser=model.tool_parser, reasoning_parser=model.reasoning_parser
            )
            for model in models
        ]
        return ToolSupport(object="list", data=data)

    return routes


def _told(model: ServedModel) -> Model:
    return Model(
        id=model.name,
        object="model",
        created=model.created,
        owned_by="tidemill",
        max_model_len=model.max_model_len,
    )
