"""The page for people at `/` and its files, all read when the application is made. Knows no file's meaning."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

_PAGE = "index.html"
_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_POLICY = (
    *("default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'", "connect-src 'self'"),
    *("base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
    *("require-trusted-types-for 'script'", "trusted-types 'none'"),
)
_HEADERS = {
    "Cache-Control": "no-cache",  # kept, and asked for again with its ETag
    "Content-Security-Policy": "; ".join(_POLICY),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class _File:
    content: bytes
    type: str
    etag: str


def playground_router() -> APIRouter:
    """Only the names of the page's own files are known; a path is looked up among them and never on the disk."""
    router = APIRouter(include_in_schema=False)
    found = _read()
    page = found.pop(_PAGE)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def show_page(request: Request) -> Response:
        return _answer(request, page)

    @router.api_route("/playground/{name:path}", methods=["GET", "HEAD"])
    async def show_file(name: str, request: Request) -> Response:
        if name not in found:
            raise HTTPException(404, "there is no such file")
        return _answer(request, found[name])

    return router


def _read() -> dict[str, _File]:
    found = {}
    for entry in (files("dgemma_openai") / "playground").iterdir():
        content = entry.read_bytes()
        type_ = _TYPES[entry.name.rpartition(".")[2]]
        found[entry.name] = _File(content, type_, f'"{hashlib.sha256(content).hexdigest()[:16]}"')
    return found


def _answer(request: Request, file: _File) -> Response:
    headers = {**_HEADERS, "ETag": file.etag}
    if file.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.type, headers=headers)
