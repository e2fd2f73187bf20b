"""Batches that the demo is trained on: which tasks, in turns or alone, with drafts or without. Knows no model.

They are made in a process of their own, from the plan's seed and the step alone.
"""

from __future__ import annotations

import queue
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from multiprocessing import get_context
from multiprocessing.queues import Queue
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from dgemma_build.demo.mistakes import Mistakes, Sources
from dgemma_build.demo.records import Example
from dgemma_build.demo.skills import draw
from dgemma_build.demo.tokenizer import TURN_END, render_chat
from dgemma_build.demo.turns import draw_chat

Array = np.ndarray[Any, np.dtype[Any]]
_WIDTHS = 32  # trimmed batches have multiples of this: torch keeps something for every shape it has met


@dataclass(frozen=True)
class Bucket:
    """Examples of one batch; their contexts fit `context` tokens."""

    name: str
    context: int
    size: int  # examples a step
    weights: dict[str, float]  # share of each skill; of 1 in all
    second_turns: float = 0.0  # share of the examples that are the second turn of a chat


@dataclass(frozen=True)
class Phase:
    """What the batches of a stretch of steps are like, from `from_step` on."""

    from_step: int
    buckets: tuple[Bucket, ...]
    ordered_share: float = 0.0  # of the examples corrupted in order
    draft_share: float = 0.0  # of the examples that start from a draft


@dataclass(frozen=True)
class Sample:
    """One canvas to train on."""

    context: list[int]
    clean: list[int]  # [canvas_length]
    start: list[int]  # [canvas_length]; what noise is put on: the clean canvas, or a draft of it
    drafted: bool


@dataclass(frozen=True)
class Batch:
    """Samples as tensors."""

    context: Tensor  # [B, P] int64, padded on the right
    lengths: Tensor  # [B] int64
    clean: Tensor  # [B, C] int64
    start: Tensor  # [B, C] int64
    drafted: Tensor  # [B] bool

    def trimmed(self) -> Batch:
        """Without the padding that no row needs; the widths vary then, for which a compiled model would be remade."""
        width = -(-int(self.lengths.max()) // _WIDTHS) * _WIDTHS
        return replace(self, context=self.context[:, :width])

    def arrays(self) -> list[Array]:
        """Every field, for a queue between processes."""
        return [getattr(self, field.name).numpy() for field in fields(self)]

    @classmethod
    def of(cls, arrays: Sequence[Array]) -> Batch:
        """What `arrays` gave."""
        return cls(*(torch.from_numpy(array) for array in arrays))


class Sampler:
    """Draws samples of the training split."""

    def __init__(self, tokenizer: Tokenizer, canvas_length: int, draft_share: float) -> None:
        self._tokenizer, self._canvas_length, self._draft_share = tokenizer, canvas_length, draft_share
        self._mistakes = Mistakes(tokenizer)

    def sample(self, skill: str, second_turn: bool, rng: random.Random) -> Sample:
        """Of a long answer one canvas is drawn; those before it are context."""
        told: list[Example] = []
        if second_turn:
            first, example = draw_chat(skill, rng, held_out=False)
            told.append(first)
        else:
            example = draw(skill, rng, held_out=False)
        prompt = self._ids(render_chat([(turn.prompt, turn.answer) for turn in told], example.prompt))
        answer = self._padded(example.answer)
        start = self._canvas_length * rng.randrange(len(answer) // self._canvas_length)
        clean = answer[start : start + self._canvas_length]
        drafted = self._draft_share > 0 and rng.random() < self._draft_share
        first_ids = clean
        if drafted:
            other = self._padded(draw(skill, rng, held_out=False).answer)
            documents = [self._ids(turn.answer + TURN_END) for turn in told]
            if example.skill in ("rename", "fix"):
                documents.append(self._ids(example.prompt.split("\n", 1)[1] + TURN_END))
            first_ids = self._mistakes.draft(Sources(answer, start, documents, other), self._canvas_length, rng)
        return Sample(prompt + answer[:start], clean, first_ids, drafted)

    def batch(self, bucket: Bucket, rng: random.Random) -> Batch:
        """One batch; examples whose context is too long are drawn again."""
        samples: list[Sample] = []
        while len(samples) < bucket.size:
            skill = rng.choices(list(bucket.weights), list(bucket.weights.values()))[0]
            second_turn = bucket.second_turns > 0 and rng.random() < bucket.second_turns
            sample = self.sample(skill, second_turn, rng)
            if len(sample.context) <= bucket.context:
                samples.append(sample)
        return _pack(samples, bucket.context)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _padded(self, answer: str) -> list[int]:
        ids = self._ids(answer + TURN_END)
        return ids + [0] * (-len(ids) % self._canvas_length)


def _pack(samples: Sequence[Sample], width: int) -> Batch:
    context = torch.zeros(len(samples), width, dtype=torch.long)
    for row, sample in enumerate(samples):
        context[row, : len(sample.context)] = torch.tensor(sample.context)
    return Batch(
        context,
        torch.tensor([len(sample.context) for sample in samples]),
        torch.tensor([sample.clean for sample in samples]),
        torch.tensor([sample.start for sample in samples]),
        torch.tensor([sample.drafted for sample in samples]),
    )


def _produce(
    out: Queue[list[list[Array]]],
    tokenizer_json: str,
    canvas_length: int,
    phases: Sequence[Phase],
    seed: int,
    first: int,
) -> None:
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_str(tokenizer_json)
    for step, phase in enumerate(phases, first):
        sampler = Sampler(tokenizer, canvas_length, phase.draft_share)
        rng = random.Random(f"{seed}:{step}")
        out.put([sampler.batch(bucket, rng).arrays() for bucket in phase.buckets])


def batches(
    tokenizer: Tokenizer, canvas_length: int, phases: Sequence[Phase], seed: int, first: int
) -> Iterator[dict[str, Batch]]:
    """Per step, by bucket: its batch. `phases` are those of the steps from `first` on, one each."""
    context = get_context("spawn")
    out: Queue[list[list[Array]]] = context.Queue(maxsize=8)
    args = (out, tokenizer.to_str(), canvas_length, phases, seed, first)
    worker = context.Process(target=_produce, args=args, daemon=True)
    worker.start()
    for phase in phases:
        while True:
            try:
                made = out.get(timeout=5)
                break
            except queue.Empty:
                if not worker.is_alive():
                    raise RuntimeError(f"the data process ended with exit code {worker.exitcode}") from None
        yield {bucket.name: Batch.of(arrays) for bucket, arrays in zip(phase.buckets, made, strict=True)}
    worker.join()
