"""The extra field of a stream that shows unfinished canvases; clients of OpenAI's API ignore it. Knows no route."""

from __future__ import annotations

from typing import Any

from dgemma_client import Prefill, Preview
from dgemma_openai.parsing.markers import ANY_MARKER


def diffusing(index: int, event: Preview | Prefill) -> dict[str, Any]:
    """As schemas' Diffusing: of one choice, either a canvas or how far its prompt has been read."""
    if isinstance(event, Prefill):
        return {
            "index": index,
            "prefilled_tokens": event.cached_tokens,
            "prompt_tokens": event.num_input_tokens,
        }
    text = ANY_MARKER.sub("", event.text)
    return {"index": index, "canvas_index": event.canvas_index, "step": event.step, "text": text}
