"""Write the card of the demo's drafter from its files, its training log and what `measure` found. Measures nothing."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dgemma_build.drafter.checkpoint import CONFIG_FILE
from dgemma_build.drafter.config import parse_config
from dgemma_build.drafter.train import LOG_FILE
from dgemma_build.text_config import read_json

_CARD = """---
license: apache-2.0
tags: [diffusion, drafter, demo]
---
# Drafter of the demonstration checkpoint

A network of {parameters:.2f} million weights that proposes a whole canvas of the
[demonstration checkpoint](../demo/README.md) in one pass, from the keys and values that the denoiser has in its cache
anyway. The denoiser verifies the proposal and repairs it; what is committed is always its own. It belongs to the
checkpoint whose SHA-256 `config.json` names and is refused with any other.

| | |
|---|---|
| layers | {layers}, over the keys and values of the denoiser's layers {reads} (counted from 0) |
| hidden, MLP, heads | {hidden}, {inner}, {heads} |
| vocabulary, canvas | {vocab}, {canvas} |
| embedding and head | the denoiser's own |
| weights | bfloat16 |

## What it saves
Held-out prompts, {count} of each skill, seeds 0, 1, ..., the sampling defaults of the checkpoint, `draft_verification`
`{verification}` and `draft_confidence` {confidence}; every answer judged by a program. Steps are denoising steps per
canvas.

| skill | steps without | steps with | share | in one pass | right without | right with |
|---|---|---|---|---|---|---|
{rows}

A draft takes {draft_share:.0%} of the processor time of a denoising step of one canvas: {draft_ms:.2f} and
{step_ms:.2f} ms on one core.

What the network alone proposes for {held_out} canvases that it never saw, beside what the denoiser committed:

| skill | positions right | whole canvases right | mean confidence |
|---|---|---|---|
{proposals}

## How it was made
```
python -m dgemma_build.drafter.data --engine ENGINE --count 24000 --output all.jsonl
head -n {prompts} all.jsonl > train.jsonl
python -m dgemma_build.drafter.data --engine ENGINE --held-out --count 40 --output held.jsonl
python -m dgemma_build.drafter.train --checkpoint build/checkpoints/demo --data train.jsonl --held-out held.jsonl \\
    --steps {steps} --seed {seed} --output DIR
dgemma-build engine --drafter DIR --checkpoint build/checkpoints/demo --output DRAFTER
python -m dgemma_build.drafter.measure --engine ENGINE --draft-model DRAFTER --output measured.json
```
It learned {canvases:,} canvases that the denoiser itself committed, on prompts of the training split alone. The log,
[`{log}`]({log}), has {lines} lines; the run was on two busy CPU cores{resumed}. Last logged step: {last}.
"""


def card(directory: Path, measured: dict[str, Any], prompts: int) -> str:
    """The card's text; `measured` is a line that `dgemma_build.drafter.measure` wrote, `prompts` the training's."""
    config = parse_config(read_json(directory / CONFIG_FILE), directory / CONFIG_FILE)
    log = [json.loads(line) for line in (directory / LOG_FILE).read_text().splitlines()]
    starts = [entry for entry in log if "plan" in entry]
    proposals = [entry for entry in log if "held_out" in entry and "after" in entry][-1]["held_out"]
    last = [entry for entry in log if "loss" in entry][-1]
    plan = starts[-1]["plan"]
    return _CARD.format(
        parameters=starts[-1]["parameters"] / 1e6,
        layers=len(config.reads),
        reads=", ".join(map(str, config.reads)),
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        heads=config.num_attention_heads,
        vocab=config.vocab_size,
        canvas=config.canvas_length,
        count=measured["held_out_per_skill"],
        verification=measured["draft_verification"],
        confidence=measured["draft_confidence"],
        rows="\n".join(_row(name, group) for name, group in _last_all(measured["groups"])),
        draft_share=measured["calls"]["share"],
        draft_ms=measured["calls"]["draft_ms"],
        step_ms=measured["calls"]["step_ms"],
        held_out=starts[-1]["held_out"],
        proposals="\n".join(
            f"| {name} | {found['positions']:.1%} | {found['canvases']:.1%} | {found['confidence']:.3f} |"
            for name, found in _last_all(proposals)
        ),
        prompts=prompts,
        steps=plan["steps"],
        seed=plan["seed"],
        canvases=starts[-1]["canvases"],
        log=LOG_FILE,
        lines=len(log),
        resumed=f", interrupted and resumed at step {starts[-1]['first_step']}" if len(starts) > 1 else "",
        last=", ".join(f"{name} {value}" for name, value in last.items()),
    )


def _last_all(groups: dict[str, Any]) -> list[tuple[str, Any]]:
    """In the order of names, all of them together last."""
    return sorted(groups.items(), key=lambda item: (item[0] == "all", item[0]))


def _row(name: str, group: dict[str, Any]) -> str:
    before, after = group["without"], group["with"]
    return (
        f"| {name} | {before['steps_per_canvas']:.2f} | {after['steps_per_canvas']:.2f} | {group['steps_share']:.0%} | "
        f"{after['one_pass']} of {after['canvases']} | {before['right']} | {after['right']} of {after['of']} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--drafter", type=Path, required=True, help="checkpoint directory, with its training log")
    parser.add_argument(
        "--measured", type=Path, required=True, help="file of one line, of dgemma_build.drafter.measure"
    )
    parser.add_argument("--prompts", type=int, required=True, help="how many it was trained on")
    args = parser.parse_args()
    text = card(args.drafter, json.loads(args.measured.read_text()), args.prompts)
    (args.drafter / "README.md").write_text(text)


if __name__ == "__main__":
    main()
