"""Canvases of token ids to text as it may be sent. Knows no request, no time and no transport.

What is held back: bytes that are not yet a whole character, and text that could be the beginning of a stop string.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dgemma_runtime.codec import Codec
from dgemma_runtime.contract import Int32Array
from dgemma_runtime.events import StopReason


@dataclass(frozen=True)
class Emitted:
    """What one committed canvas adds to the output."""

    text: str  # may be sent now
    token_ids: Int32Array  # [n <= canvas_length], the canvas's part of the output
    reason: Literal["stop", "length"] | None  # why the output ends here, if it does
    stop_reason: StopReason = None


class OutputText:
    """The output of one sequence, canvas by canvas.

    The output ends at the first of: an end token, the token that completes a stop string, the `max_tokens`-th token.
    That token is still part of the token ids. The text leaves out special tokens (padding and its like even where they
    are not to be skipped), the end token, the stop string and what follows it, and bytes of a character that the end
    cut short. Of several stop strings the one completed first counts, among those the one that begins first. Bytes that
    are no character become U+FFFD. `full` is the reason of an end by the last of `max_tokens`; no character goes on
    across one of the `breaks`, places in the output.
    """

    def __init__(
        self,
        codec: Codec,
        max_tokens: int,
        end_ids: tuple[int, ...] = (),
        stop: tuple[str, ...] = (),
        skip_special_tokens: bool = True,
        *,
        full: Literal["stop", "length"] = "length",
        breaks: frozenset[int] = frozenset(),
    ) -> None:
        self._codec = codec
        self._remaining = self._max_tokens = max_tokens
        self._full, self._breaks = full, breaks
        self._skipped = codec.special_ids if skip_special_tokens else codec.silent_ids
        self.stop_reason: StopReason = None
        # A stop string that is a special token may never show up in the text; it stops as the token it is.
        special = {id_: text for text in stop if (id_ := codec.special_id(text)) is not None}
        self._ends: dict[int, str | int] = {id_: id_ for id_ in end_ids} | special
        self._end_ids = np.array(sorted(self._ends), dtype=np.int64)
        self._stop = tuple(text for text in stop if text not in special.values())
        self._utf8 = _utf8_decoder()
        self._held = ""
        self._texts: list[str] = []
        self._token_ids: list[Int32Array] = []

    @property
    def text(self) -> str:
        """All that was emitted so far."""
        return "".join(self._texts)

    @property
    def token_ids(self) -> Int32Array:
        """[n], of all committed canvases."""
        return np.concatenate([np.empty(0, np.int32), *self._token_ids])

    def commit(self, canvas_ids: Int32Array) -> Emitted:
        """Add a whole canvas [canvas_length]; not to be called again once the reason is not None."""
        emitted, self._held, self._utf8 = self._extend(canvas_ids)
        self._remaining -= len(emitted.token_ids)
        self._texts.append(emitted.text)
        self._token_ids.append(emitted.token_ids)
        self.stop_reason = emitted.stop_reason
        return emitted

    def preview(self, canvas_ids: Int32Array) -> str:
        """The text that would follow what was emitted so far, were this canvas [canvas_length] the last one."""
        emitted, held, _ = self._extend(canvas_ids)
        return emitted.text + held

    def _extend(self, canvas_ids: Int32Array) -> tuple[Emitted, str, codecs.IncrementalDecoder]:
        """What the canvas adds, the text held back after it, and the state of the byte decoder; changes nothing."""
        reason: Literal["stop", "length"] | None = None
        stop_reason: StopReason = None
        ids = canvas_ids
        if len(ids) >= self._remaining:
            ids, reason = ids[: self._remaining], self._full
        visible = len(ids)
        is_end = np.isin(ids, self._end_ids)
        if is_end.any():
            visible = int(is_end.argmax())
            ids, reason, stop_reason = ids[: visible + 1], "stop", self._ends[int(ids[visible])]
        text, offsets, utf8 = self._decode(ids[:visible])
        text = self._held + text
        if (found := self._find_stop(text)) is not None:
            start, end, stop_reason = found
            last = next(i for i, offset in enumerate(offsets) if len(self._held) + offset >= end)
            return Emitted(text[:start], ids[: last + 1].copy(), "stop", stop_reason), "", utf8
        sendable = len(text) if reason else len(text) - self._possible_stop(text)
        return Emitted(text[:sendable], ids.copy(), reason, stop_reason), text[sendable:], utf8

    def _decode(self, ids: Int32Array) -> tuple[str, list[int], codecs.IncrementalDecoder]:
        """The text of `ids` after all before them, and per id the text's length after it."""
        utf8 = _utf8_decoder()
        utf8.setstate(self._utf8.getstate())
        codec = self._codec
        parts: list[str] = []
        offsets: list[int] = []
        length = 0
        for place, id_ in enumerate(ids.tolist(), self._max_tokens - self._remaining):
            cut = utf8.decode(b"", True) if place in self._breaks else ""
            if (byte := codec.bytes.get(id_)) is not None:
                part = utf8.decode(byte)
            else:
                part = utf8.decode(b"", True) + ("" if id_ in self._skipped else codec.piece(id_))
            part = cut + part
            parts.append(part)
            length += len(part)
            offsets.append(length)
        return "".join(parts), offsets, utf8

    def _find_stop(self, text: str) -> tuple[int, int, str] | None:
        """Start, end and text of the stop string that is complete first; of those the one that starts first."""
        matches = [(start + len(s), start, s) for s in self._stop if (start := text.find(s)) >= 0]
        if not matches:
            return None
        end, start, string = min(matches)
        return start, end, string

    def _possible_stop(self, text: str) -> int:
        """The length of the longest end of `text` that could be the beginning of a stop string."""
        longest = min(max(map(len, self._stop), default=1) - 1, len(text))
        for length in range(longest, 0, -1):
            if any(s.startswith(text[-length:]) for s in self._stop):
                return length
        return 0


def _utf8_decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")("replace")
