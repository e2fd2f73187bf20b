"""Train the demo checkpoint on generated data: `python -m dgemma_build.demo.train --output DIR`.

Uniform-state diffusion: each example's canvas has a corruption level uniform in [0, 1], every position is replaced
by a random token with that probability, and the loss is the cross-entropy over all canvas positions. In the second
phase a share of the examples is corrupted in order instead, little before a random cut and fully behind it, as
canvases of long structured answers are while they are denoised. Half of the examples are self-conditioned on a first
pass without gradient. Matrices are trained with Muon, the rest with AdamW.

`--from CHECKPOINT` goes on with tasks that revise a document and with second turns of chats, and with nothing else.
A share of the canvases then starts from a draft that is fluent and partly wrong (`mistakes.py`), half of these without
any noise on top, so that the denoiser repairs a draft rather than copy it.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from dgemma_build.demo.batches import Batch, Bucket, Phase, batches
from dgemma_build.demo.export import training_state
from dgemma_build.demo.model import DemoConfig, Denoiser
from dgemma_build.demo.tokenizer import build_tokenizer

TRAINING_LOG = "train_log.jsonl"
_SHORT = {"sudoku4": 0.12, "sudoku6": 0.36, "json": 0.14, "infill": 0.12}  # skills of one canvas and little context
_REVISING = {"rename": 0.4, "fix": 0.4, "table": 0.12, "json": 0.08}


# From nothing: the skills that answer with something new.
FIRST_PHASES = (
    Phase(0, (Bucket("short", 64, 48, _SHORT), Bucket("long", 256, 12, {"table": 1.0}))),
    Phase(1250, (Bucket("short", 64, 32, _SHORT), Bucket("long", 256, 24, {"table": 1.0})), 0.4),
)
# From a checkpoint: revisions, second turns and drafts. What was learnt before and is not drawn here is forgotten.
REVISION_PHASES = (
    Phase(
        0,
        (
            Bucket("short", 96, 14, _REVISING),
            Bucket("long", 192, 8, _REVISING),
            Bucket("far", 384, 4, dict.fromkeys(_REVISING, 0.25), second_turns=1.0),
        ),
        ordered_share=0.3,
        draft_share=0.3,
    ),
)


@dataclass(frozen=True)
class Plan:
    """What a training run does: every number that shapes the weights."""

    steps: int
    seed: int = 0
    vocab_size: int = 1024
    phases: tuple[Phase, ...] = FIRST_PHASES
    muon_lr: float = 0.02
    adam_lr: float = 0.004
    warmup: int = 100
    balance_weight: float = 0.01
    save_every: int = 250

    def phase(self, step: int) -> Phase:
        """The phase that `step` belongs to."""
        return max((phase for phase in self.phases if phase.from_step <= step), key=lambda phase: phase.from_step)


def revision_plan(steps: int, seed: int) -> Plan:
    """To go on from a trained checkpoint: smaller steps than from nothing, and the phases of the revising skills."""
    return Plan(steps, seed, phases=REVISION_PHASES, muon_lr=0.01, adam_lr=0.002, warmup=40, save_every=50)


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz iterations (Jordan et al., 2024); 3-D weights as stacks of matrices."""

    def __init__(self, params: Sequence[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                buffer = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                buffer.lerp_(weight.grad, 1 - group["momentum"])
                update = _orthogonal(weight.grad.lerp(buffer, group["momentum"]))
                weight.add_(update, alpha=-group["lr"] * max(1.0, weight.shape[-2] / weight.shape[-1]) ** 0.5)


def _orthogonal(matrix: Tensor, iterations: int = 5) -> Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16()
    transpose = x.shape[-2] > x.shape[-1]
    if transpose:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    orthogonal: Tensor = (x.mT if transpose else x).float()
    return orthogonal


# ---------------------------------------------------------------- loss


def loss_of(
    model: Denoiser,
    forward: object,
    batch: Batch,
    ordered_share: float,
    rng: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy, load-balance loss and accuracy [B] of a batch."""
    context, lengths, clean = batch.context, batch.lengths, batch.clean
    count, width = clean.shape
    level = torch.rand(count, 1, generator=rng)
    cut = torch.rand(count, 1, generator=rng) * width
    ramp = torch.where(torch.arange(width) < cut, 0.3 * level, torch.ones(()))
    level = torch.where(torch.rand(count, 1, generator=rng) < ordered_share, ramp, level.expand(-1, width))
    if batch.drafted.any():  # half of the drafts are seen as they are
        level = level * ~(batch.drafted[:, None] & (torch.rand(count, 1, generator=rng) < 0.5))
    noise = torch.randint(model.config.vocab_size, clean.shape, generator=rng)
    noisy = torch.where(torch.rand(clean.shape, generator=rng) < level, noise, batch.start)
    soft = torch.zeros(count, width, model.config.hidden_size)
    half = count // 2
    with torch.no_grad():
        logits, _ = forward(context[:half], lengths[:half], noisy[:half], soft[:half])  # type: ignore[operator]
        temperature = 0.4 + 0.6 * torch.rand(half, 1, 1, generator=rng)
        soft[:half] = model.soft_embedding(logits / temperature)
    logits, balance = forward(context, lengths, noisy, soft)  # type: ignore[operator]
    loss = F.cross_entropy(logits.flatten(0, 1), clean.flatten())
    return loss, balance, (logits.argmax(-1) == clean).float().mean(-1)


def _rate(step: int, plan: Plan) -> float:
    """Share of the peak learning rate: linear warm-up, flat, then linear to zero over the last 40 percent."""
    decay_from = 0.6 * plan.steps
    if step < plan.warmup:
        return (step + 1) / plan.warmup
    return 1.0 if step < decay_from else max(0.0, (plan.steps - step) / (plan.steps - decay_from))


class _Run:
    """Model, optimizers and their state on disk."""

    def __init__(self, plan: Plan, state_file: Path, resume: bool, weights: Path | None) -> None:
        torch.manual_seed(plan.seed)
        self.plan, self._state_file = plan, state_file
        if weights is None:
            self.tokenizer = build_tokenizer(plan.vocab_size, plan.seed)
        else:
            self.tokenizer = Tokenizer.from_file(str(weights / "tokenizer.json"))
        self.model = Denoiser(DemoConfig(vocab_size=self.tokenizer.get_vocab_size()))
        if weights is not None:
            self.model.load_state_dict(training_state(weights))
        hidden = [p for p in self.model.parameters() if p.ndim >= 2 and p is not self.model.embed_tokens.weight]
        self._others = [p for p in self.model.parameters() if not any(p is q for q in hidden)]
        self._optimizers = [
            Muon(hidden, plan.muon_lr),
            torch.optim.AdamW(self._others, plan.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.first_step = 0
        if resume and state_file.exists():
            state = torch.load(state_file, weights_only=True)
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.first_step = state["step"]

    def update(self, step: int, data: dict[str, Batch], forward: object) -> dict[str, float]:
        """One step on the batches of every bucket; the figures for the log."""
        rng = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + step)
        for optimizer, peak in zip(self._optimizers, (self.plan.muon_lr, self.plan.adam_lr), strict=True):
            optimizer.param_groups[0]["lr"] = peak * _rate(step, self.plan)
        figures: dict[str, float] = {}
        phase = self.plan.phase(step)
        for name, batch in data.items():
            weight = len(batch.clean) / sum(bucket.size for bucket in phase.buckets)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss, balance, accuracy = loss_of(self.model, forward, batch, phase.ordered_share, rng)
            (weight * (loss + self.plan.balance_weight * balance)).backward()  # type: ignore[no-untyped-call]
            figures[name] = round(loss.item(), 4)
            figures[f"{name}_accuracy"] = round(accuracy.mean().item(), 4)
            figures[f"{name}_balance"] = round(balance.item(), 3)
        norm = torch.nn.utils.clip_grad_norm_(self._others, 1.0)
        if not math.isfinite(norm.item()):
            raise RuntimeError(f"step {step}: the gradient norm is {norm.item()}")
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return figures

    def save(self, step: int) -> None:
        """What `resume` reads, after `step` steps."""
        optimizers = [optimizer.state_dict() for optimizer in self._optimizers]
        temporary = self._state_file.with_suffix(".tmp")
        torch.save({"model": self.model.state_dict(), "optimizers": optimizers, "step": step}, temporary)
        temporary.replace(self._state_file)


def train(plan: Plan, output: Path, resume: bool, compiled: bool, weights: Path | None = None) -> None:
    """Run the plan; writes `training.pt` and `train_log.jsonl` to `output`. `weights`: the checkpoint to start from,
    whose log, if it has one, goes before the new one."""
    output.mkdir(parents=True, exist_ok=True)
    run = _Run(plan, output / "training.pt", resume, weights)
    log_file = output / TRAINING_LOG
    if weights is not None and not log_file.exists() and (weights / TRAINING_LOG).exists():
        shutil.copyfile(weights / TRAINING_LOG, log_file)
    forward = torch.compile(run.model, dynamic=False) if compiled else run.model
    started = time.monotonic()
    parameters = sum(p.numel() for p in run.model.parameters())
    head = {"parameters": parameters, "plan": asdict(plan), "first_step": run.first_step, "continued": bool(weights)}
    phases = [plan.phase(step) for step in range(run.first_step, plan.steps)]
    steps = batches(run.tokenizer, run.model.config.canvas_length, phases, plan.seed, run.first_step)
    with log_file.open("a") as log:
        log.write(json.dumps(head) + "\n")
        for step, data in enumerate(steps, run.first_step):
            shaped = data if compiled else {name: batch.trimmed() for name, batch in data.items()}
            figures = run.update(step, shaped, forward)
            if step % 20 == 0 or step + 1 == plan.steps:
                line = {"step": step, **figures, "seconds": round(time.monotonic() - started, 1)}
                log.write(json.dumps(line) + "\n")
                log.flush()
                print(line, flush=True)
            if (step + 1) % plan.save_every == 0 or step + 1 == plan.steps:
                run.save(step + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--from", dest="weights", type=Path, help="checkpoint to go on from, with the revising skills")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="go on from OUTPUT/training.pt")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    plan = Plan(steps=args.steps, seed=args.seed) if args.weights is None else revision_plan(args.steps, args.seed)
    train(plan, args.output, args.resume, not args.no_compile, args.weights)


if __name__ == "__main__":
    main()
