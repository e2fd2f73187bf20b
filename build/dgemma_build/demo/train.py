"""Train the demo checkpoint on generated data: `python -m dgemma_build.demo.train --output DIR`.

Uniform-state diffusion: each example's canvas has a corruption level uniform in [0, 1], every position is replaced
by a random token with that probability, and the loss is the cross-entropy over all canvas positions. In the second
phase a share of the examples is corrupted in order instead, little before a random cut and fully behind it, as
canvases of long structured answers are while they are denoised. Half of the examples are self-conditioned on a first
pass without gradient. Matrices are trained with Muon, the rest with AdamW.
"""

from __future__ import annotations

import argparse
import json
import math
import queue
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from dgemma_build.demo.model import DemoConfig, Denoiser
from dgemma_build.demo.skills import SKILLS, draw
from dgemma_build.demo.tokenizer import TURN_END, build_tokenizer, render_turn

SHORT_CONTEXT = 64  # tokens; skills whose context always fits one canvas worth
LONG_CONTEXT = 256
LONG_SKILLS = ("table",)


@dataclass(frozen=True)
class Phase:
    """What the batches of a stretch of steps are like, from `from_step` on."""

    from_step: int
    short_batch: int
    long_batch: int
    ordered_share: float  # of the examples corrupted in order


@dataclass(frozen=True)
class Plan:
    """What a training run does: every number that shapes the weights."""

    steps: int
    seed: int = 0
    vocab_size: int = 1024
    phases: tuple[Phase, ...] = (Phase(0, 48, 12, 0.0), Phase(1250, 32, 24, 0.4))
    muon_lr: float = 0.02
    adam_lr: float = 0.004
    warmup: int = 100
    balance_weight: float = 0.01

    def phase(self, step: int) -> Phase:
        """The phase that `step` belongs to."""
        return max((phase for phase in self.phases if phase.from_step <= step), key=lambda phase: phase.from_step)


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


# ---------------------------------------------------------------- data


def canvases(tokenizer: Tokenizer, skill: str, rng: random.Random, canvas_length: int) -> tuple[list[int], list[int]]:
    """One (context ids, clean canvas ids) pair; of a long answer one canvas is drawn, those before it are context."""
    example = draw(skill, rng, held_out=False)
    prompt = tokenizer.encode(render_turn(example.prompt), add_special_tokens=False).ids
    answer = tokenizer.encode(example.answer + TURN_END, add_special_tokens=False).ids
    answer += [0] * (-len(answer) % canvas_length)
    start = canvas_length * rng.randrange(len(answer) // canvas_length)
    return prompt + answer[:start], answer[start : start + canvas_length]


def _pack(pairs: list[tuple[list[int], list[int]]], width: int) -> tuple[Tensor, Tensor, Tensor]:
    context = torch.zeros(len(pairs), width, dtype=torch.long)
    for row, (ids, _) in enumerate(pairs):
        context[row, : len(ids)] = torch.tensor(ids)
    lengths = torch.tensor([len(ids) for ids, _ in pairs])
    return context, lengths, torch.tensor([ids for _, ids in pairs])


def _produce(out: Queue[object], tokenizer_json: str, plan: Plan, canvas_length: int, first_step: int) -> None:
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_str(tokenizer_json)
    short = [skill for skill in SKILLS if skill not in LONG_SKILLS]
    for step in range(first_step, plan.steps):
        rng = random.Random(f"{plan.seed}:{step}")
        parts: list[Tensor] = []
        for skills, count, width in (
            (short, plan.phase(step).short_batch, SHORT_CONTEXT),
            (list(LONG_SKILLS), plan.phase(step).long_batch, LONG_CONTEXT),
        ):
            weights = [SKILLS[skill].weight for skill in skills]
            pairs: list[tuple[list[int], list[int]]] = []
            while len(pairs) < count:
                pair = canvases(tokenizer, rng.choices(skills, weights)[0], rng, canvas_length)
                if len(pair[0]) <= width:
                    pairs.append(pair)
            parts += _pack(pairs, width)
        out.put([part.numpy() for part in parts])


def batches(tokenizer: Tokenizer, plan: Plan, canvas_length: int, first_step: int) -> Iterator[list[Tensor]]:
    """Per step: context, lengths and canvas of the short batch, then of the long one; made in a second process."""
    context = get_context("spawn")
    out: Queue[object] = context.Queue(maxsize=8)
    args = (out, tokenizer.to_str(), plan, canvas_length, first_step)
    worker = context.Process(target=_produce, args=args, daemon=True)
    worker.start()
    for _ in range(first_step, plan.steps):
        while True:
            try:
                arrays = out.get(timeout=5)
                break
            except queue.Empty:
                if not worker.is_alive():
                    raise RuntimeError(f"the data process ended with exit code {worker.exitcode}") from None
        yield [torch.from_numpy(array) for array in arrays]  # type: ignore[attr-defined]
    worker.join()


# ---------------------------------------------------------------- loss


def loss_of(
    model: Denoiser,
    forward: object,
    batch: Sequence[Tensor],
    ordered_share: float,
    rng: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy, load-balance loss and accuracy [B] of a batch: context, lengths, clean canvases [B, C]."""
    context, lengths, clean = batch
    count, width = clean.shape
    level = torch.rand(count, 1, generator=rng)
    cut = torch.rand(count, 1, generator=rng) * width
    ramp = torch.where(torch.arange(width) < cut, 0.3 * level, torch.ones(()))
    level = torch.where(torch.rand(count, 1, generator=rng) < ordered_share, ramp, level.expand(-1, width))
    noise = torch.randint(model.config.vocab_size, clean.shape, generator=rng)
    noisy = torch.where(torch.rand(clean.shape, generator=rng) < level, noise, clean)
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

    def __init__(self, plan: Plan, state_file: Path, resume: bool) -> None:
        torch.manual_seed(plan.seed)
        self.plan, self._state_file = plan, state_file
        self.tokenizer = build_tokenizer(plan.vocab_size, plan.seed)
        self.model = Denoiser(DemoConfig(vocab_size=self.tokenizer.get_vocab_size()))
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

    def update(self, step: int, data: list[Tensor], forward: object) -> dict[str, float]:
        """One step on a short and a long batch; the figures for the log."""
        rng = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + step)
        for optimizer, peak in zip(self._optimizers, (self.plan.muon_lr, self.plan.adam_lr), strict=True):
            optimizer.param_groups[0]["lr"] = peak * _rate(step, self.plan)
        figures: dict[str, float] = {}
        for name, part in (("short", data[:3]), ("long", data[3:])):
            weight = len(part[0]) / (len(data[0]) + len(data[3]))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss, balance, accuracy = loss_of(self.model, forward, part, self.plan.phase(step).ordered_share, rng)
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


def train(plan: Plan, output: Path, resume: bool, compiled: bool) -> None:
    """Run the plan; writes `training.pt` and `train_log.jsonl` to `output`."""
    output.mkdir(parents=True, exist_ok=True)
    run = _Run(plan, output / "training.pt", resume)
    forward = torch.compile(run.model, dynamic=False) if compiled else run.model
    started = time.monotonic()
    parameters = sum(p.numel() for p in run.model.parameters())
    head = {"parameters": parameters, "plan": asdict(plan), "first_step": run.first_step}
    steps = batches(run.tokenizer, plan, run.model.config.canvas_length, run.first_step)
    with (output / "train_log.jsonl").open("a") as log:
        log.write(json.dumps(head) + "\n")
        for step, data in enumerate(steps, run.first_step):
            figures = run.update(step, data, forward)
            if step % 20 == 0 or step + 1 == plan.steps:
                line = {"step": step, **figures, "seconds": round(time.monotonic() - started, 1)}
                log.write(json.dumps(line) + "\n")
                log.flush()
                print(line, flush=True)
            if (step + 1) % 250 == 0 or step + 1 == plan.steps:
                run.save(step + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="go on from OUTPUT/training.pt")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(Plan(steps=args.steps, seed=args.seed), args.output, args.resume, not args.no_compile)


if __name__ == "__main__":
    main()
