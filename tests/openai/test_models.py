"""The list of models: names, context length, and what happens when the server is away."""

from __future__ import annotations

import pytest
from tests.openai.conftest import front

from dgemma_client.errors import ConnectError

pytestmark = pytest.mark.asyncio


async def test_the_model_tells_its_context_length() -> None:
    async with front() as api:
        answer = (await api.get("/v1/models")).json()
    [model] = answer["data"]
    assert answer["object"] == "list"
    assert (model["id"], model["object"], model["root"], model["max_model_len"]) == (
        "diffusion_gemma",
        "model",
        "demo",
        4096,
    )


async def test_each_name_is_a_model() -> None:
    async with front(served_model_names=("org/name", "short")) as api:
        listed = [model["id"] for model in (await api.get("/v1/models")).json()["data"]]
        slashed = await api.get("/v1/models/org/name")
        unknown = await api.get("/v1/models/diffusion_gemma")
        first = await api.chat(model="short")
    assert listed == ["org/name", "short"]
    assert slashed.json()["id"] == "org/name"
    assert unknown.status_code == 404
    assert unknown.json()["error"]["code"] == "model_not_found"
    assert first.json()["model"] == "short"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/diffusion_gemma", "/v1/metadata", "/v1/manifest"])
async def test_without_a_server_nothing_is_made_up(path: str) -> None:
    async with front() as api:
        api.triton.failure = ConnectError("nobody at 127.0.0.1:8001")
        answer = await api.get(path)
        again = await api.chat()
    for found in (answer, again):
        assert found.status_code == 503
        assert found.headers["retry-after"] == "1"
        assert found.json()["error"]["message"] == "the model server does not answer; it may be starting"


async def test_facts_are_asked_for_again_after_a_while() -> None:
    async with front() as api:
        first = (await api.chat()).json()["system_fingerprint"]
        api.triton.facts["max_model_len"] = "99"
        assert (await api.get("/v1/models")).json()["data"][0]["max_model_len"] == 4096
        assert api.triton.asked_for_facts == 1
        api.app.state.gateway._facts_until = 0.0
        assert (await api.get("/v1/models")).json()["data"][0]["max_model_len"] == 99
        assert (await api.chat()).json()["system_fingerprint"] != first


@pytest.mark.parametrize("facts", [{}, {"max_model_len": "many"}])
async def test_a_server_that_does_not_tell_its_context_length_is_named(facts: dict[str, str]) -> None:
    async with front() as api:
        api.triton.facts = facts
        answer = await api.get("/v1/models")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "configuration_error"
    assert "start Triton with `dgemma-server`" in answer.json()["error"]["message"]
