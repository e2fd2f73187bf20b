"""What the published OpenAPI document says beyond what FastAPI reads off the routes. Knows no request."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from dgemma_openai.schemas.base import ErrorBody
from dgemma_openai.schemas.chat import ChatChunk
from dgemma_openai.schemas.completions import CompletionChunk
from dgemma_openai.schemas.editors import FimChunk
from dgemma_openai.security import ANTHROPIC_PREFIX, is_open
from dgemma_openai.settings import Settings

_REFUSALS = {
    400: "Something in the request cannot be honoured; `param` names it.",
    401: "The API key is missing or not known.",
    404: "There is no such model here.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    429: "Too many requests; `Retry-After` says when to come back.",
    500: "The server failed.",
    503: "No request is taken now; `Retry-After` says when to come back.",
    504: "The answer was not there in time.",
}
_BODILESS = (401, 404, 429, 500, 503)  # of them, what a route without a body may answer
_CHUNKS: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatChunk,
    "/v1/completions": CompletionChunk,
    "/v1/fim/completions": FimChunk,
}
_REF = "#/components/schemas/"


class AnthropicError(BaseModel):
    type: str
    message: str


class AnthropicErrorBody(BaseModel):
    """A refusal in the shape of Anthropic's API."""

    type: str
    error: AnthropicError


def publish(app: FastAPI, settings: Settings) -> None:
    """Make `/openapi.json` the document of this application."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, settings)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # as FastAPI's documentation has it


def _document(app: FastAPI, settings: Settings) -> dict[str, Any]:
    found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    models: list[type[BaseModel]] = [ErrorBody, AnthropicErrorBody, *_CHUNKS.values()]
    _, more = models_json_schema([(model, "serialization") for model in models], ref_template=_REF + "{model}")
    components = found["components"]
    components["schemas"] |= more["$defs"]
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's 422, which is never sent
        components["schemas"].pop(name, None)
    for path, operations in found["paths"].items():
        for operation in operations.values():
            _add_refusals(path, operation)
            if settings.api_keys and not is_open(path):
                operation["security"] = [{"bearer": []}, {"header": []}]
            if path in _CHUNKS:
                _add_stream(operation, _CHUNKS[path].__name__)
            elif "text/event-stream" in operation["responses"]["200"].get("content", {}):
                _add_stream(operation, None)
    if settings.api_keys:
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
    return found


def _add_refusals(path: str, operation: dict[str, Any]) -> None:
    responses = operation["responses"]
    responses.pop("422", None)
    if is_open(path):
        return
    model = AnthropicErrorBody if path.startswith(ANTHROPIC_PREFIX) else ErrorBody
    content = {"application/json": {"schema": {"$ref": _REF + model.__name__}}}
    for status in _REFUSALS if "requestBody" in operation else _BODILESS:
        responses[str(status)] = {"description": _REFUSALS[status], "content": content}


def _add_stream(operation: dict[str, Any], chunk: str | None) -> None:
    """The schema is that of one event; 3.1 has no other place for it."""
    content = operation["responses"]["200"]["content"]
    data: dict[str, Any] = {"type": "string"}
    if chunk is not None:
        told = f"With `stream`: server-sent events, each a {chunk}, the last `[DONE]`. Where an answer fails after its "
        told += "first event, the last is an ErrorBody instead."
        either = {"anyOf": [{"$ref": _REF + chunk}, {"$ref": _REF + ErrorBody.__name__}]}
        data["anyOf"] = [{"const": "[DONE]"}, {"contentMediaType": "application/json", "contentSchema": either}]
    else:
        told = content["text/event-stream"]["schema"]["description"]
    members = {"event": {"type": "string"}, "data": data}
    content["text/event-stream"] = {
        "schema": {"type": "object", "description": told, "properties": members, "required": ["data"]}
    }
