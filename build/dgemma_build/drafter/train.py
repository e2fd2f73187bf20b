"""Train a drafter: `python -m dgemma_build.drafter.train --checkpoint DIR --data FILE --held-out FILE --output DIR`.

The loss is the cross-entropy of the denoiser's committed canvases, given its keys and values of what precedes them.
Everything but the drafter is frozen. Matrices are trained with Muon, the rest with AdamW. What a step sees depends on
the seed and the step alone, so a run that is resumed takes the steps that it would have taken.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F

from dgemma_build.checkpoint import Checkpoint
from dgemma_build.demo.train import Muon
from dgemma_build.drafter.checkpoint import write_drafter
from dgemma_build.drafter.config import DrafterConfig, check_sizes
from dgemma_build.drafter.features import ContextEncoder, Features, stack
from dgemma_build.drafter.network import Drafter
from dgemma_build.drafter.records import Record, read_records
from dgemma_runtime.contract import file_sha256
from dgemma_runtime.errors import ConfigurationError, DGemmaError

STATE_FILE, LOG_FILE = "training.pt", "train_log.jsonl"


@dataclass(frozen=True)
class Plan:
    """What a training run does: every number that shapes the weights, the data apart."""

    steps: int
    batch: int = 64  # canvases
    parts: int = 2  # of a batch, by length of context, so that little is padded
    seed: int = 0
    muon_lr: float = 0.02
    adam_lr: float = 0.004
    warmup: int = 50

    def rate(self, step: int) -> float:
        """Share of the peak learning rate: linear warm-up, flat, then linear to zero over the second half."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return min(1.0, 2 * (self.steps - step) / self.steps)


@dataclass(frozen=True)
class Example:
    """One canvas and what precedes it."""

    group: str
    features: Features  # of the whole answer's context
    position: int  # tokens of context before this canvas
    last_id: int
    canvas: list[int]


def examples(records: Sequence[Record], encoder: ContextEncoder, progress: Progress, batch: int = 64) -> list[Example]:
    """Every canvas of the records; what precedes an answer's last canvas is encoded once."""
    texts = [sum(record.canvases[:-1], record.prompt) for record in records]
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    found: list[list[Example]] = [[] for _ in records]
    for start in progress.track(range(0, len(order), batch), description="reading contexts"):
        chosen = order[start : start + batch]
        for index, features in zip(chosen, encoder.encode([texts[index] for index in chosen]), strict=True):
            record, position = records[index], len(records[index].prompt)
            for canvas in record.canvases:
                last = texts[index][position - 1]
                found[index].append(Example(record.group, features, position, last, canvas))
                position += len(canvas)
    return [example for group in found for example in group]


def batches_of(plan: Plan, data: Sequence[Example], step: int) -> Iterator[list[Example]]:
    """The parts of one step's batch."""
    rng = random.Random(f"{plan.seed}:{step}")
    chosen = sorted(rng.choices(data, k=plan.batch), key=lambda example: example.position)
    size = -(-plan.batch // plan.parts)
    for start in range(0, plan.batch, size):
        yield chosen[start : start + size]


def logits_of(model: Drafter, part: Sequence[Example]) -> Tensor:
    """[B, C, vocab]"""
    positions = [example.position for example in part]
    context = stack([example.features for example in part], positions)
    logits: Tensor = model(context, torch.tensor(positions), torch.tensor([example.last_id for example in part]))
    return logits


def targets_of(part: Sequence[Example]) -> Tensor:
    """[B, C]"""
    return torch.tensor([example.canvas for example in part])


@torch.no_grad()
def evaluate(model: Drafter, data: Sequence[Example], batch: int = 128) -> dict[str, dict[str, float]]:
    """By group and over all: share of positions and of whole canvases proposed right, and the mean confidence."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * 4)
    ordered = sorted(data, key=lambda example: example.position)
    for start in range(0, len(ordered), batch):
        part = ordered[start : start + batch]
        top = logits_of(model, part).softmax(-1).max(-1)
        right = top.indices == targets_of(part)
        for example, row, confidence in zip(part, right, top.values, strict=True):
            found = (1.0, row.float().mean().item(), float(row.all()), confidence.mean().item())
            for name in (example.group, "all"):
                sums[name] = [a + b for a, b in zip(sums[name], found, strict=True)]
    names = ("positions", "canvases", "confidence")
    return {
        group: dict(zip(names, (round(value / total[0], 4) for value in total[1:]), strict=True))
        for group, total in sums.items()
    }


class Run:
    """Model, optimizers and their state on disk.

    Raises ConfigurationError where it is to go on from a state that is missing, or is one of another run; a run may be
    made longer or shorter.
    """

    def __init__(self, plan: Plan, model: Drafter, state_file: Path, data_sha256: str, resume: bool) -> None:
        self.plan, self.model, self._state_file = plan, model, state_file
        self._of = {**model.config.document(), **asdict(plan), "data_sha256": data_sha256}
        matrices = [p for p in model.layers.parameters() if p.ndim == 2]
        self._others = [p for p in model.parameters() if not any(p is q for q in matrices)]
        self._optimizers = [
            Muon(matrices, plan.muon_lr),
            torch.optim.AdamW(self._others, plan.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.first_step = 0
        if resume:
            state = self._saved()
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.first_step = state["step"]

    def _saved(self) -> dict[str, Any]:
        path, anew = self._state_file, "leave out --resume to begin anew"
        if not path.is_file():
            raise ConfigurationError(f"--resume: {path} not found; {anew}")
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True)
            saved = state["of"]
        except (RuntimeError, TypeError, KeyError, EOFError, UnpicklingError) as error:
            raise ConfigurationError(f"--resume: {path} is no state of a training run ({error!r}); {anew}") from None
        for name in sorted((saved.keys() | self._of.keys()) - {"steps"}):
            if saved.get(name) != self._of.get(name):
                raise ConfigurationError(
                    f"--resume: {path} is of a run with {name} {saved.get(name)!r}, this one has "
                    f"{self._of.get(name)!r}; give what that run was given, or {anew}"
                )
        if state["step"] > self.plan.steps:
            raise ConfigurationError(f"--steps {self.plan.steps}: {path} is after step {state['step']}; ask for more")
        return state

    def update(self, step: int, data: Sequence[Example]) -> dict[str, float]:
        """One step; its figures."""
        for optimizer, peak in zip(self._optimizers, (self.plan.muon_lr, self.plan.adam_lr), strict=True):
            optimizer.param_groups[0]["lr"] = peak * self.plan.rate(step)
        loss_sum, positions, canvases = 0.0, 0.0, 0.0
        for part in batches_of(self.plan, data, step):
            share, targets = len(part) / self.plan.batch, targets_of(part)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = logits_of(self.model, part)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            (share * loss).backward()  # type: ignore[no-untyped-call]
            right = logits.argmax(-1) == targets
            loss_sum += share * loss.item()
            positions += share * right.float().mean().item()
            canvases += share * right.all(-1).float().mean().item()
        if not math.isfinite(torch.nn.utils.clip_grad_norm_(self._others, 1.0).item()):
            raise RuntimeError(f"step {step}: the gradient is not finite")
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {"loss": round(loss_sum, 4), "positions": round(positions, 4), "canvases": round(canvases, 4)}

    def save(self, step: int) -> None:
        """What `resume` reads, after `step` steps."""
        optimizers = [optimizer.state_dict() for optimizer in self._optimizers]
        temporary = self._state_file.with_suffix(".tmp")
        state = {"of": self._of, "model": self.model.state_dict(), "optimizers": optimizers, "step": step}
        torch.save(state, temporary)
        temporary.replace(self._state_file)


@dataclass(frozen=True)
class Data:
    """What to learn and what to be judged by."""

    training: Sequence[Example]
    held_out: Sequence[Example]


def train(run: Run, data: Data, output: Path, progress: Progress) -> None:
    """Run the plan; writes state, log and the drafter's checkpoint to `output`."""
    output.mkdir(parents=True, exist_ok=True)
    plan, model = run.plan, run.model
    started = time.monotonic()
    parameters = sum(p.numel() for p in model.parameters())
    head = {"parameters": parameters, "plan": asdict(plan), "first_step": run.first_step}
    head |= {"canvases": len(data.training), "held_out": len(data.held_out), "drafter": model.config.document()}
    task = progress.add_task("training", total=plan.steps, completed=run.first_step)
    with (output / LOG_FILE).open("a" if run.first_step else "w") as log:
        log.write(json.dumps(head) + "\n")
        for step in range(run.first_step, plan.steps):
            figures = run.update(step, data.training)
            progress.update(task, advance=1, description=f"training, loss {figures['loss']:.4f}")
            if step % 20 == 0 or step + 1 == plan.steps:
                seconds = round(time.monotonic() - started, 1)
                log.write(json.dumps({"step": step, **figures, "seconds": seconds}) + "\n")
            if (step + 1) % 250 == 0 or step + 1 == plan.steps:
                run.save(step + 1)
                log.write(json.dumps({"after": step + 1, "held_out": evaluate(model, data.held_out)}) + "\n")
            log.flush()
    tensors = {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}
    write_drafter(output, model.config, tensors)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="the denoiser's")
    parser.add_argument("--data", type=Path, required=True, help="records of dgemma_build.drafter.data")
    parser.add_argument("--held-out", type=Path, required=True, help="other records, to judge by")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64, help="canvases in a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--intermediate-size", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--reads", type=int, nargs="+", default=[1, 3, 4, 5], help="the denoiser's layers to attend to")
    parser.add_argument("--resume", action="store_true", help="go on from OUTPUT's training.pt")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    args = _options().parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    denoiser = Checkpoint(args.checkpoint)
    spec = denoiser.config.spec
    sizes = (args.hidden_size, args.intermediate_size, args.heads, tuple(args.reads))
    config = DrafterConfig(denoiser.sha256(), spec.vocab_size, spec.canvas_length, spec.hidden_size, *sizes)
    check_sizes(config, denoiser.config, Path("the command line"))
    model = Drafter(config, denoiser.config, torch.from_numpy(denoiser.float32("embed_tokens.weight")))
    records = [read_records(path, spec, config.denoiser_sha256) for path in (args.data, args.held_out)]
    plan = Plan(args.steps, args.batch, seed=args.seed)
    run = Run(plan, model, args.output / STATE_FILE, file_sha256(args.data), args.resume)
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        encoder = ContextEncoder(args.checkpoint, config.reads)
        data = Data(*(examples(each, encoder, progress) for each in records))
        train(run, data, args.output, progress)


if __name__ == "__main__":
    try:
        main()
    except (DGemmaError, OSError) as error:
        sys.exit(f"error: {error}")
