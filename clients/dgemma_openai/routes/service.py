"""Health, versions, metrics: what orchestrators, probes and operators ask. Knows no generation."""

from __future__ import annotations

import hashlib
from importlib.metadata import distribution, version
from typing import Literal

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from dgemma_openai.errors import ApiError
from dgemma_openai.gateway import GatewayDep

router = APIRouter(tags=["service"])
health_router = APIRouter(tags=["service"])  # all that a port for health alone has
API_VERSION = "1"
_DISTRIBUTION, _LICENSE_FILE = "dgemma-triton", "licenses/LICENSE"
_RELEASE = version(_DISTRIBUTION)
_LICENSE_NAME, _LICENSE_URL = "Apache 2.0", "https://www.apache.org/licenses/LICENSE-2.0"
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Health(BaseModel):
    object: Literal["health.response"] = "health.response"
    message: str
    status: str


class Version(BaseModel):
    release: str
    api: str


class License(BaseModel):
    name: str
    path: str
    sha: str
    size: int
    url: str
    type: str
    content: str


class ModelInfo(BaseModel):
    shortName: str  # noqa: N815 - NIM's
    modelUrl: str  # noqa: N815


class LicenseInfo(BaseModel):
    name: str
    url: str


class Metadata(BaseModel):
    assetInfo: list[str]  # noqa: N815
    licenseInfo: LicenseInfo  # noqa: N815
    modelInfo: list[ModelInfo]  # noqa: N815
    repository_override: str
    version: str
    selectedModelProfileId: str  # noqa: N815


@health_router.get("/v1/health/live", response_model=Health)
@health_router.get("/health", response_model=Health)
async def live() -> Health:
    """The front end answers."""
    return Health(message="Service is live.", status="live")


@health_router.get("/v1/health/ready", response_model=Health, responses={503: {"model": Health}})
async def ready(gateway: GatewayDep) -> Response:
    """The model takes requests."""
    if gateway.draining:
        health = Health(message="Service is shutting down.", status="not ready")
    elif await gateway.backend.ready():
        health = Health(message="Service is ready.", status="ready")
    else:
        health = Health(message="The model is not loaded, or its engine has failed.", status="not ready")
    return JSONResponse(health.model_dump(), 200 if health.status == "ready" else 503)


@router.get("/v1/version", response_model=Version)
async def show_version() -> Version:
    return Version(release=_RELEASE, api=API_VERSION)


@router.get("/v1/license")
async def license_text() -> License:
    """Of this software; the checkpoint has its own."""
    content = distribution(_DISTRIBUTION).read_text(_LICENSE_FILE)
    if content is None:
        raise ApiError(500, f"{_LICENSE_FILE} is missing from the installed package {_DISTRIBUTION}; install it again")
    return License(
        name=_LICENSE_NAME,
        path=_LICENSE_FILE,
        sha=hashlib.sha256(content.encode()).hexdigest(),
        size=len(content.encode()),
        url=_LICENSE_URL,
        type="file",
        content=content,
    )


@router.get("/v1/metadata", response_model=Metadata)
async def metadata(gateway: GatewayDep) -> Metadata:
    """What is served, in NIM's words."""
    facts = await gateway.facts()
    told = facts.parameters
    profile = f"{told.get('backend', 'unknown')}-{told.get('precision', 'unknown')}"
    return Metadata(
        assetInfo=[],
        licenseInfo=LicenseInfo(name=_LICENSE_NAME, url=_LICENSE_URL),
        modelInfo=[ModelInfo(shortName=name, modelUrl=told.get("checkpoint", "")) for name in gateway.settings.names],
        repository_override="",
        version=facts.version,
        selectedModelProfileId=profile,
    )


@router.get("/v1/manifest")
async def manifest(gateway: GatewayDep) -> dict[str, str]:
    """All that the server tells of its engine and settings."""
    return dict((await gateway.facts()).parameters)


@router.get("/v1/metrics", response_class=Response)
@router.get("/metrics", response_class=Response)
async def metrics(gateway: GatewayDep) -> Response:
    """Prometheus' text format: this front end's, then the server's."""
    return Response(await gateway.metrics.page(), media_type=_METRICS_TYPE)


router.include_router(health_router)
