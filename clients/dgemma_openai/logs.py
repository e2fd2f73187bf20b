"""The front end's own log on stderr: text, or a JSON object per line. No line holds a prompt unless asked to."""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar

from pythonjsonlogger.json import JsonFormatter

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
FORMATS = ("text", "json")
_FIELDS = "%(asctime)s %(levelname)s %(name)s %(message)s"
request_id: ContextVar[str] = ContextVar("request_id", default="")  # of the HTTP request that is being answered


def configure(level: str, log_format: str) -> None:
    """For this package and for uvicorn, whose access log is off: ours has the request's id."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter(_FIELDS, rename_fields={"asctime": "time", "levelname": "level", "name": "logger"})
        if log_format == "json"
        else logging.Formatter(_FIELDS)
    )
    for name in ("dgemma_openai", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = ([handler], False) if name != "uvicorn.error" else ([], True)
        logger.setLevel(level)
