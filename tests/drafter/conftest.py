"""A small odd denoiser, a random drafter for it, and engines of both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from dgemma_build.checkpoint import Checkpoint
from dgemma_build.drafter.checkpoint import write_drafter
from dgemma_build.drafter.config import DrafterConfig
from dgemma_build.drafter.export import DrafterRequest, build_drafter
from dgemma_build.drafter.network import Drafter
from dgemma_build.engine import BuildRequest, build_engine
from dgemma_build.random_checkpoint import write_checkpoint
from dgemma_runtime.contract import (
    CommitRow,
    DenoiseResult,
    DenoiseRow,
    DraftRow,
    EncodeRow,
    Engine,
    SequencePages,
)

CANVAS, VOCAB, PAGE = 12, 211, 8  # of the odd denoiser; tokens of a page


class Slots:
    """An engine whose slots have pages of their own, and contexts of these lengths in them."""

    def __init__(self, engine: Engine, lengths: Sequence[int]) -> None:
        self.engine = engine
        random = np.random.default_rng(3)
        self.texts = [random.integers(VOCAB, size=length).astype(np.int32) for length in lengths]
        self.uniforms = random.random((len(lengths), CANVAS), dtype=np.float32)
        self.noise = random.integers(VOCAB, size=(len(lengths), CANVAS)).astype(np.int32)
        order = random.permutation(8 * len(lengths)).astype(np.int32)  # pages of a sequence are nowhere side by side
        self.pages = [SequencePages(own, own) for own in np.split(order, len(lengths))]
        for text, pages in zip(self.texts, self.pages, strict=True):
            engine.encode([EncodeRow(text[start : start + PAGE], start, pages) for start in range(0, len(text), PAGE)])

    def draft_row(self, slot: int) -> DraftRow:
        return DraftRow(slot, len(self.texts[slot]), self.pages[slot], int(self.texts[slot][-1]))

    def row(self, slot: int, first: bool) -> DenoiseRow:
        position = len(self.texts[slot])
        return DenoiseRow(slot, self.noise[slot], self.uniforms[slot], 0.7, position, self.pages[slot], first)

    def step(self, *slots: int, first: bool = True) -> DenoiseResult:
        return self.engine.denoise([self.row(slot, first) for slot in slots])

    def commit(self, slot: int) -> None:
        canvas = self.noise[slot]
        self.engine.denoise([], [CommitRow(slot, canvas, len(self.texts[slot]), self.pages[slot])])
        self.texts[slot] = np.concatenate([self.texts[slot], canvas])


@pytest.fixture(scope="session")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint directory: window 17, canvas 12, two sliding and two full layers, nothing divides anything."""
    torch.set_num_threads(1)
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "odd_a", "odd_a")


@pytest.fixture(scope="session")
def denoiser_engine(denoiser: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("engines") / "odd_a"
    build_engine(BuildRequest(denoiser, output))
    return output


def random_drafter(denoiser: Path, directory: Path, reads: tuple[int, ...], seed: int = 0) -> Path:
    """No norm weight is one, so that a forgotten one shows."""
    opened = Checkpoint(denoiser)
    spec = opened.config.spec
    sizes = {"hidden_size": 20, "intermediate_size": 28, "num_attention_heads": 6}
    config = DrafterConfig(opened.sha256(), spec.vocab_size, spec.canvas_length, spec.hidden_size, reads=reads, **sizes)
    torch.manual_seed(seed)
    model = Drafter(config, opened.config, torch.from_numpy(opened.float32("embed_tokens.weight")))
    random = np.random.default_rng(seed)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            tensors[name] = tensor * random.uniform(0.6, 1.4, tensor.shape).astype(np.float32)
    write_drafter(directory, config, tensors)
    return directory


@pytest.fixture(scope="session")
def drafter(denoiser: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint directory of a drafter that reads a full, a sliding and another full layer."""
    return random_drafter(denoiser, tmp_path_factory.mktemp("drafters") / "random", (1, 2, 3))


@pytest.fixture(scope="session")
def drafter_engine(denoiser: Path, drafter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("engines") / "drafter"
    build_drafter(DrafterRequest(drafter, denoiser, output))
    return output
