"""Every error the runtime raises on purpose. Knows nothing else.

DGemmaError
├── InvalidRequest      the request cannot be honoured; names field, value and remedy
├── Overloaded          the queue is full; try again later
├── CheckpointError     a checkpoint, tokenizer or template is missing, corrupt or foreign
├── ManifestError       an engine directory is missing, corrupt or does not fit this runtime
├── ConfigurationError  a setting of the serving process is wrong
└── EngineError         the engine failed; the process can no longer serve
    └── EngineMemoryError  one call found no memory; the engine goes on
"""

from __future__ import annotations


class DGemmaError(Exception):
    """Base of all errors raised on purpose; the message may be shown to a client."""


class InvalidRequest(DGemmaError):
    """A request that cannot be honoured: `field` is the input's name, the message has value, range and remedy."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class Overloaded(DGemmaError):
    """The request queue is full, or the server is shutting down; the message says when to try again."""


class CheckpointError(DGemmaError):
    """A checkpoint that cannot be used; the message names the file or tensor."""


class ManifestError(DGemmaError):
    """An engine directory that cannot be used; the message names the file and what differs."""


class ConfigurationError(DGemmaError):
    """A runtime setting that cannot be used; the message names the setting, its value and the remedy."""


class EngineError(DGemmaError):
    """The engine failed while running; every live request ends with this error."""


class EngineMemoryError(EngineError):
    """An engine call found no memory. Nothing of the call counts, and the engine can go on with less."""
