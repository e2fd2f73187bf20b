"""The page's files as they are served, without a browser."""

from __future__ import annotations

import re

import pytest
from tests.openai.conftest import front

pytestmark = pytest.mark.asyncio
TYPES = {
    "/": "text/html; charset=utf-8",
    "/playground/page.css": "text/css; charset=utf-8",
    "/playground/main.js": "text/javascript; charset=utf-8",
    "/playground/turn.js": "text/javascript; charset=utf-8",
    "/playground/icon.svg": "image/svg+xml",
}


@pytest.mark.parametrize("path", TYPES)
async def test_each_file_has_its_type_and_guards(path: str) -> None:
    async with front() as site:
        answer = await site.get(path)
        head = await site.http.head(path)

    assert answer.status_code == head.status_code == 200
    assert answer.headers["content-type"] == TYPES[path]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    policy = answer.headers["content-security-policy"]
    assert {"default-src 'none'", "frame-ancestors 'none'", "script-src 'self'"} <= set(policy.split("; "))
    assert "unsafe" not in policy
    assert answer.content
    assert head.content == b""
    assert head.headers["content-length"] == str(len(answer.content))


async def test_a_file_that_has_not_changed_is_not_sent_again() -> None:
    async with front() as site:
        first = await site.get("/")
        again = await site.get("/", if_none_match=first.headers["etag"])
        other = await site.get("/", if_none_match='"something else"')

    assert first.headers["cache-control"] == "no-cache"
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    assert other.status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/playground/",
        "/playground/index.html",
        "/playground/nothing.js",
        "/playground/../app.py",
        "/playground/..%2fapp.py",
        "/playground/%2e%2e/%2e%2e/pyproject.toml",
        "/playground/..\\app.py",
        "/playground//etc/passwd",
        "/playground/main.js%00.css",
        "/playground/main.js/",
    ],
)
async def test_other_paths_are_not_found(path: str) -> None:
    async with front() as site:
        answer = await site.get(path)

    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


@pytest.mark.parametrize("path", TYPES)
async def test_without_the_playground_there_is_no_such_path(path: str) -> None:
    async with front(playground=False) as site:
        answer = await site.get(path)

    assert answer.status_code == 404


async def test_the_page_is_no_part_of_the_published_api() -> None:
    async with front() as site:
        paths = (await site.get("/openapi.json")).json()["paths"]

    assert not [path for path in paths if path == "/" or "playground" in path]


async def test_the_page_names_only_its_own_files_and_has_no_inline_code() -> None:
    async with front() as site:
        page = (await site.get("/")).text
        named = re.findall(r'(?:src|href)="([^"]*)"', page)
        answers = [await site.get(f"/{name}") for name in named]

    assert named
    assert all(answer.status_code == 200 for answer in answers)
    assert not re.search(r"\son\w+=|\sstyle=|<style|javascript:", page)
    assert all(re.search(r'src="', script) for script in re.findall(r"<script[^>]*>", page))
