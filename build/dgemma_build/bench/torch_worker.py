"""Transformers' own `generate` as a contender, eager or compiled; run as a process of its own (see worker.py)."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import DiffusionGemmaForBlockDiffusion
from transformers.utils import logging

from dgemma_build.bench.worker import Message, peak_memory_bytes, serve
from dgemma_build.oracle import generation_defaults


class _FirstCanvas:
    """A streamer that notes when the first canvas came; `generate` puts the prompt first."""

    def __init__(self) -> None:
        self.puts = 0
        self.at = 0.0

    def put(self, value: Any) -> None:
        self.puts += 1
        if self.puts == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        """Nothing is left to note."""


class _Transformers:
    """The model as its users load it: fp32, default attention and experts."""

    def __init__(self, checkpoint: Path) -> None:
        model: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(checkpoint, dtype=torch.float32)
        self._model = model.eval()

    def handle(self, message: Message) -> Message:
        """Run one workload; `batch`: in lock-step, else one request after the other."""
        ids = torch.tensor(message["prompts"])
        batches = [ids] if message["batch"] else list(torch.split(ids, 1))
        options = {
            "max_new_tokens": message["canvases"] * message["canvas_length"],
            "max_denoising_steps": message["steps"],
            "stability_threshold": None,
            "eos_token_id": None,
            **({"cache_implementation": "static"} if message["compiled"] else {}),
        }
        first = []
        started = time.perf_counter()
        with generation_defaults(self._model, options) as rest:
            for batch in batches:
                streamer = _FirstCanvas()
                out = self._model.generate(batch, streamer=streamer, **rest)
                first += [streamer.at - started] * len(batch)
                if out.sequences.shape[1] != ids.shape[1] + options["max_new_tokens"]:
                    raise RuntimeError(f"generate returned {tuple(out.sequences.shape)}")
        seconds = time.perf_counter() - started
        return {
            "seconds": seconds,
            "first_canvas_s": sum(first) / len(first),
            "peak_memory_bytes": peak_memory_bytes(),
        }


def _start(message: Message) -> Any:
    torch.set_num_threads(message["threads"])
    warnings.simplefilter("ignore")  # of the compiler; they are not about the figures
    log: Any = logging
    log.set_verbosity_error()
    log.disable_progress_bar()
    return _Transformers(Path(message["checkpoint"])).handle


if __name__ == "__main__":
    serve(_start)
