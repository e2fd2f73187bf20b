"""Engines without a model, for tests: they answer from a script and check what they are asked. Knows no library.

Their "keys and values" are the token ids and positions themselves, kept in pages, so a context read back shows whether
every page was written, kept and addressed as it must be.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dgemma_runtime.contract import (
    FULL,
    SLIDING,
    CommitRow,
    DenoiseResult,
    DenoiseRow,
    DraftResult,
    DraftRow,
    EncodeRow,
    EngineLimits,
    Float32Array,
    Int32Array,
    LayerSpec,
    Manifest,
    ModelSpec,
    SequencePages,
)
from dgemma_runtime.drafter_manifest import DrafterManifest
from dgemma_runtime.errors import EngineError, EngineMemoryError


@dataclass(frozen=True)
class ScriptedCanvas:
    """What a canvas becomes, and after how many steps (2 or more under adaptive stopping with stability 1)."""

    token_ids: Int32Array  # [canvas_length]
    steps: int


Script = Callable[[Int32Array], ScriptedCanvas]  # from the context's token ids [n]
Drafts = Callable[[Int32Array], tuple[Int32Array, Float32Array]]  # from the same: ids and confidences [canvas_length]


@dataclass(frozen=True)
class EngineCall:
    """One recorded call; the tuples have an entry per row."""

    kind: str  # encode, denoise, commit (beside a denoise), draft, release, close
    slots: tuple[int, ...] = ()  # of denoise, commit, draft and release
    positions: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()  # encoded tokens, or the canvas length


def scripted_manifest(
    vocab_size: int, canvas_length: int = 64, sliding_window: int = 32, max_model_len: int = 4096
) -> Manifest:
    """A manifest of one sliding and one full layer, for engines that have no files."""
    layers = (LayerSpec(SLIDING, 1, 8), LayerSpec(FULL, 1, 8))
    model = ModelSpec(vocab_size, 8, canvas_length, sliding_window, max_model_len, layers)
    return Manifest(
        model=model,
        checkpoint="scripted",
        checkpoint_sha256="",
        backend="scripted",
        backend_version="1",
        target="cpu",
        precision="fp32",
        kv_dtype="fp32",
        onnx_sha256="",
        max_model_len=max_model_len,
        max_batch_size=0,
        files={},
        generation_defaults={"eos_token_id": 1},
    )


def scripted_drafter_manifest(denoiser: Manifest) -> DrafterManifest:
    """Of a drafter without files, for an engine with this manifest."""
    model = denoiser.model
    return DrafterManifest(
        denoiser=denoiser.checkpoint,
        denoiser_sha256=denoiser.checkpoint_sha256,
        drafter="scripted",
        drafter_sha256="",
        vocab_size=model.vocab_size,
        canvas_length=model.canvas_length,
        reads=(len(model.layers) - 1,),
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=1,
        denoiser_hidden_size=model.hidden_size,
        backend="scripted",
        backend_version="1",
        target="cpu",
        precision="fp32",
        onnx_sha256="",
        files={},
    )


def answer_script(
    answers: Sequence[tuple[Int32Array, Int32Array]], canvas_length: int, steps: int = 2, padding_id: int = 0
) -> Script:
    """A script of (prompt ids, answer ids) pairs: a context that begins with a prompt gets the answer's next canvas."""

    def script(context: Int32Array) -> ScriptedCanvas:
        for prompt, answer in answers:
            if np.array_equal(context[: len(prompt)], prompt):
                written = len(context) - len(prompt)
                part = answer[written : written + canvas_length]
                padding = np.full(canvas_length - len(part), padding_id, np.int32)
                return ScriptedCanvas(np.concatenate([part, padding]).astype(np.int32), steps)
        raise AssertionError(f"no scripted answer for a context that begins with {context[:16].tolist()}")

    return script


@dataclass
class _Slot:
    context: Int32Array
    canvas: ScriptedCanvas | None
    steps: int = 0
    memory: int = 0  # stands for the soft embedding
    committed: bool = False  # the canvas is part of the context now


class ScriptedEngine:
    """Follows a script. `fail_on` maps a kind of call to the number of the call that fails, counted from 1. More than
    `most_canvases` at once find no memory. With `drafts` it has a drafter, which proposes what they say.
    """

    def __init__(
        self,
        manifest: Manifest,
        limits: EngineLimits,
        script: Script | None,
        fail_on: Mapping[str, int] | None = None,
        delay_s: float = 0.0,
        most_canvases: int | None = None,
        drafts: Drafts | None = None,
    ) -> None:
        self.manifest, self.limits = manifest, limits
        self.drafter = scripted_drafter_manifest(manifest) if drafts else None
        self._drafts = drafts
        self.calls: list[EngineCall] = []
        self._script, self._delay_s, self._most_canvases = script, delay_s, most_canvases
        self._fail_on = dict(fail_on or {})
        self._slots: dict[int, _Slot] = {}
        self._starved = False  # the last call found no memory
        # Token id and position of every place in every page, -1 where never written.
        self._full = np.full((limits.full_pages, limits.page_size, 2), -1, np.int32)
        self._sliding = np.full((limits.sliding_pages, limits.page_size, 2), -1, np.int32)

    def encode(self, rows: Sequence[EncodeRow]) -> None:
        positions = tuple(row.position for row in rows)
        self._record(EngineCall("encode", (), positions, tuple(len(row.token_ids) for row in rows)))
        assert rows
        self._check_writes([], rows)
        for row in rows:
            assert 1 <= len(row.token_ids) <= self.limits.max_encode_tokens
            self._context(row.pages, row.position)
            self._write(row)

    def denoise(self, rows: Sequence[DenoiseRow], commits: Sequence[CommitRow] = ()) -> DenoiseResult:
        length = self.manifest.model.canvas_length
        slots = tuple(row.slot for row in rows)
        assert rows or commits
        if commits:
            positions = tuple(row.position for row in commits)
            self._record(EngineCall("commit", tuple(row.slot for row in commits), positions, (length,) * len(commits)))
        if rows:
            self._record(EngineCall("denoise", slots, tuple(row.position for row in rows), (length,) * len(rows)))
        together = [*slots, *(row.slot for row in commits)]
        assert len(set(together)) == len(together) <= self.limits.max_batch_size
        if self._most_canvases is not None and len(self._slots.keys() | set(slots)) > self._most_canvases:
            self._starved = True
            raise EngineMemoryError(f"no memory for more than {self._most_canvases} canvases")
        self._starved = False
        self._check_writes(rows, [EncodeRow(row.token_ids, row.position, row.pages) for row in commits])
        results = [self._denoise(row) for row in rows]
        for commit in commits:
            self._commit(commit)
        if not results:
            empty = np.empty((0, length), np.int32)
            return DenoiseResult(empty, empty, empty.astype(np.float32))
        argmax, sampled, entropies = (np.stack(arrays) for arrays in zip(*results, strict=True))
        return DenoiseResult(argmax, sampled, entropies)

    def draft(self, rows: Sequence[DraftRow]) -> DraftResult:
        slots, positions = tuple(row.slot for row in rows), tuple(row.position for row in rows)
        length = self.manifest.model.canvas_length
        self._record(EngineCall("draft", slots, positions, (length,) * len(rows)))
        assert self._drafts is not None, "there is no drafter"
        assert len(set(slots)) == len(slots) > 0
        found = []
        for row in rows:
            context, before = self._context(row.pages, row.position), self._slots.get(row.slot)
            assert before is None or before.committed, f"slot {row.slot} has a canvas already"
            assert context[-1] == row.last_id, "last_id is not the context's last token"
            found.append(self._drafts(context))
            assert found[-1][0].shape == found[-1][1].shape == (length,)
        ids, confidences = (np.stack(arrays) for arrays in zip(*found, strict=True))
        return DraftResult(ids.astype(np.int32), confidences.astype(np.float32))

    def release(self, slot: int) -> None:
        self._record(EngineCall("release", (slot,)))
        assert slot in self._slots or self._starved, "nothing was in the slot"
        self._slots.pop(slot, None)

    def close(self) -> None:
        self._record(EngineCall("close"))

    # ------------------------------------------------------------ one row

    def _denoise(self, row: DenoiseRow) -> tuple[Int32Array, Int32Array, Float32Array]:
        length = self.manifest.model.canvas_length
        assert row.canvas_ids.shape == row.uniforms.shape == (length,)
        assert row.canvas_ids.dtype == np.int32
        assert row.uniforms.dtype == np.float32
        assert ((row.uniforms >= 0) & (row.uniforms < 1)).all()
        assert row.temperature > 0
        assert 0 <= row.slot < self.limits.max_batch_size
        context = self._context(row.pages, row.position)
        if row.first_step:
            before = self._slots.get(row.slot)
            assert before is None or np.array_equal(before.context, context), "another sequence took the slot"
            self._slots[row.slot] = _Slot(context, self._script(context) if self._script else None)
        slot = self._slots[row.slot]
        assert not slot.committed
        assert np.array_equal(slot.context, context), "the context changed during a canvas"
        slot.steps += 1
        return self._step(row, slot)

    def _commit(self, row: CommitRow) -> None:
        slot = self._slots[row.slot]
        assert slot.steps, "only a canvas that was denoised is committed"
        assert not slot.committed
        assert row.token_ids.shape == (self.manifest.model.canvas_length,)
        assert np.array_equal(slot.context, self._context(row.pages, row.position)), (
            "a commit belongs behind its context"
        )
        self._write(EncodeRow(row.token_ids, row.position, row.pages))
        slot.context, slot.committed = np.concatenate([slot.context, row.token_ids]), True

    def _step(self, row: DenoiseRow, slot: _Slot) -> tuple[Int32Array, Int32Array, Float32Array]:
        """More of the scripted canvas with every step, all of it in the last two, certain only in the last."""
        canvas = slot.canvas
        assert canvas is not None
        length = len(canvas.token_ids)
        shown = length if slot.steps >= canvas.steps - 1 else length * slot.steps // canvas.steps
        argmax = np.where(np.arange(length) < shown, canvas.token_ids, row.canvas_ids).astype(np.int32)
        entropies = np.full(length, 0.0 if slot.steps >= canvas.steps else 1.0, np.float32)
        return argmax, argmax, entropies

    def _context(self, pages: SequencePages, length: int) -> Int32Array:
        """Token ids [length] read from the pages; all that is visible must be there and be the same in both groups."""
        page_size = self.limits.page_size
        assert len(pages.full) == len(pages.sliding)
        assert len(pages.full) * page_size >= length
        full = self._full[pages.full].reshape(-1, 2)[:length]
        first = max(0, length - (self.manifest.model.sliding_window - 1))
        held = pages.sliding[first // page_size : -(-length // page_size)]
        assert (pages.full >= 0).all(), "a page of the full layers is missing"
        assert (held >= 0).all(), "a page of the sliding layers within the window was given back"
        start = first // page_size * page_size
        sliding = self._sliding[held].reshape(-1, 2)[first - start : length - start]
        assert np.array_equal(full[:, 1], np.arange(length)), "a position was never written, or written over"
        assert np.array_equal(sliding, full[first:]), "the sliding layers' pages differ from the full layers'"
        tokens: Int32Array = full[:, 0].copy()
        return tokens

    def _write(self, row: EncodeRow) -> None:
        positions = np.arange(row.position, row.position + len(row.token_ids))
        index, offset = np.divmod(positions, self.limits.page_size)
        assert row.token_ids.dtype == np.int32
        for memory, pages in ((self._full, row.pages.full), (self._sliding, row.pages.sliding)):
            assert (pages[index] >= 0).all(), "tokens are to be written to a page that was given back"
            memory[pages[index], offset, 0] = row.token_ids
            memory[pages[index], offset, 1] = positions

    def _check_writes(self, readers: Sequence[DenoiseRow], writers: Sequence[EncodeRow]) -> None:
        """Nobody else in the call holds a page that is written to."""
        size = self.limits.page_size
        for group in ("full", "sliding"):
            tables = [row.pages for row in readers] + [row.pages for row in writers]
            held = [getattr(table, group) for table in tables]
            counts = np.bincount(np.concatenate([pages[pages >= 0] for pages in held]), minlength=1)
            for row in writers:
                first, last = row.position // size, -(-(row.position + len(row.token_ids)) // size)
                written = getattr(row.pages, group)[first:last]
                assert (counts[written] == 1).all(), "a page that is written to belongs to two sequences"

    def _record(self, call: EngineCall) -> None:
        self.calls.append(call)
        if self._delay_s:
            time.sleep(self._delay_s)
        if sum(other.kind == call.kind for other in self.calls) == self._fail_on.get(call.kind):
            raise EngineError(f"scripted failure of {call.kind} call {self._fail_on[call.kind]}")


class ChaoticEngine(ScriptedEngine):
    """No script: each number is a hash of all that a model's would depend on (context, canvas, uniforms, temperature
    and the steps before), so that the slightest difference in what a request is given changes its tokens.
    """

    def __init__(self, manifest: Manifest, limits: EngineLimits, delay_s: float = 0.0) -> None:
        super().__init__(manifest, limits, None, delay_s=delay_s)

    def _step(self, row: DenoiseRow, slot: _Slot) -> tuple[Int32Array, Int32Array, Float32Array]:
        given = (slot.context, row.canvas_ids, row.uniforms, np.float64(row.temperature), np.int64(slot.memory))
        slot.memory = zlib.crc32(b"".join(array.tobytes() for array in given))
        random = np.random.default_rng(slot.memory)
        length = self.manifest.model.canvas_length
        argmax, sampled = random.integers(self.manifest.model.vocab_size, size=(2, length), dtype=np.int32)
        return argmax, sampled, (random.random(length, np.float32) * np.float32(0.05)).astype(np.float32)
