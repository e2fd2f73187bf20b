"""The list of models. Knows no generation."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from dgemma_openai.gateway import Gateway, GatewayDep, ModelFacts

router = APIRouter(tags=["models"])


class Permission(BaseModel):
    id: str
    object: Literal["model_permission"] = "model_permission"
    created: int
    allow_create_engine: bool = False
    allow_sampling: bool = True
    allow_logprobs: bool = False
    allow_search_indices: bool = False
    allow_view: bool = True
    allow_fine_tuning: bool = False
    organization: str = "*"
    group: None = None
    is_blocking: bool = False


class Model(BaseModel):
    """`max_model_len` is how agents find the context length."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str
    parent: None = None
    max_model_len: int
    permission: list[Permission]


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


@router.get("/v1/models")
async def models(gateway: GatewayDep) -> Models:
    facts = await gateway.facts()
    return Models(data=[_model(gateway, name, facts) for name in gateway.settings.names])


@router.get("/v1/models/{name:path}")
async def model(name: str, gateway: GatewayDep) -> Model:
    gateway.check_model(name)
    return _model(gateway, name, await gateway.facts())


def _model(gateway: Gateway, name: str, facts: ModelFacts) -> Model:
    return Model(
        id=name,
        created=gateway.started,
        owned_by="dgemma-triton",
        root=facts.parameters.get("checkpoint", name),
        max_model_len=facts.max_model_len,
        permission=[Permission(id=f"modelperm-{facts.fingerprint}", created=gateway.started)],
    )
