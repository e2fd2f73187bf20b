"""What all routes share: settings, backend, metrics, facts of the model, whether work is taken. Knows no route."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from dgemma_client import Client
from dgemma_client.errors import ClientError
from dgemma_openai.backend import Backend
from dgemma_openai.errors import ApiError, from_client, overloaded, shown
from dgemma_openai.metrics import Metrics
from dgemma_openai.settings import Settings

_FACTS_S = 10.0  # that facts are taken to stand: a restarted server may have another engine


@dataclass(frozen=True)
class ModelFacts:
    """Of the model that is served; from its configuration in Triton."""

    max_model_len: int  # tokens, prompt and output
    fingerprint: str  # the same for the same engine and software
    parameters: Mapping[str, str]  # all that the server says

    @property
    def version(self) -> str:
        return self.parameters.get("server_version", "unknown")


class Gateway:
    """One per application."""

    def __init__(self, settings: Settings, client: Client) -> None:
        self.settings = settings
        self.backend = Backend(client, settings.timeout_s, settings.log_prompts)
        self.metrics = Metrics(settings.triton_metrics)
        self.started = int(time.time())
        self.draining = False  # no new work is taken
        self.working = 0  # requests under way that generate or might
        self._facts: ModelFacts | None = None
        self._facts_until = 0.0
        self._asking = asyncio.Lock()

    async def close(self) -> None:
        await self.backend.close()
        await self.metrics.close()

    def check_model(self, name: str) -> None:
        """Raises ApiError for a model that is not served here."""
        if name not in self.settings.names:
            known = ", ".join(self.settings.names)
            message = f"model: {shown(name)} is not served here; known are {known}"
            raise ApiError(404, message, "model", "model_not_found")

    def check_choices(self, count: int) -> None:
        """Raises ApiError for more answers than one request may ask for."""
        if count > self.settings.max_choices:
            message = f"asks for {count} answers in one request, at most {self.settings.max_choices} are given"
            raise ApiError(400, f"n: {message}", "n")

    async def facts(self) -> ModelFacts:
        """Raises ApiError (503) where the server does not answer."""
        if self._facts is not None and time.monotonic() < self._facts_until:
            return self._facts
        async with self._asking:
            if self._facts is None or time.monotonic() >= self._facts_until:
                try:
                    info = await self.backend.info()
                except ClientError as error:
                    raise from_client(error, {}) from None
                self._facts = _facts(info.parameters, info.server_version)
                self._facts_until = time.monotonic() + _FACTS_S
        return self._facts


def _facts(parameters: Mapping[str, str], server_version: str) -> ModelFacts:
    try:
        max_model_len = int(parameters["max_model_len"])
    except (KeyError, ValueError):
        message = "the model's configuration does not tell max_model_len; start Triton with `dgemma-server`"
        raise ApiError(500, message, code="configuration_error") from None
    told = json.dumps([sorted(parameters.items()), server_version])
    fingerprint = "fp_" + hashlib.sha256(told.encode()).hexdigest()[:12]
    return ModelFacts(max_model_len, fingerprint, dict(parameters))


def new_id(prefix: str) -> str:
    """As chatcmpl-..., unique."""
    return f"{prefix}-{uuid.uuid4().hex}"


def _of(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


def _open(request: Request) -> Gateway:
    gateway = _of(request)
    if gateway.draining:
        raise overloaded("the server is shutting down; try again, another one may answer")
    return gateway


GatewayDep = Annotated[Gateway, Depends(_of)]
OpenGatewayDep = Annotated[Gateway, Depends(_open)]  # refuses new work while the server stops
