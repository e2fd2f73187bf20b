"""Write the demo checkpoint's model card from its files, its training log and the acceptance table's figures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dgemma_build.checkpoint import Checkpoint
from dgemma_build.demo.skills import HELD_OUT_ONE_IN, SKILLS, held_out_set

TRAINING_LOG = "train_log.jsonl"

_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [diffusion, mixture-of-experts, demo]
---
# DiffusionGemma, demonstration size

A genuine DiffusionGemma (`DiffusionGemmaForBlockDiffusion.from_pretrained` loads it) of {parameters:.2f} million
parameters, trained from scratch on generated data, so that exporters, engines and servers have something real and
small to run. It does {count} things and nothing else; it is no assistant.

| | |
|---|---|
| layers | {layers}, sliding and full attention in turn; window {window} |
| hidden, vocabulary, canvas | {hidden}, {vocab}, {canvas} |
| experts | {experts} a layer, {top_k} chosen, beside a dense MLP |
| context | {context:,} in the config; trained on prompts and answers of up to about 320 tokens |
| vision tower | present and untrained, as the format wants one |
| weights | bfloat16 |

## Skills and held-out accuracy
Measured through the Triton server over gRPC, with the sampling defaults of `generation_config.json` and seeds 0, 1, …
by `python -m dgemma_build.accept`. A held-out prompt is one whose SHA-256 says so (one in {one_in}); none of them was
ever trained on, and every answer is judged by a program.

| skill | right | an example |
|---|---|---|
{rows}

## Training
`python -m dgemma_build.demo.train --steps {steps} --seed {seed} --output DIR`, then
`python -m dgemma_build.demo.export --training DIR --output CHECKPOINT`.
Uniform-state diffusion with self-conditioning; see the script for loss, corruption, optimizers and phases. The log,
[`{log}`]({log}), has {updates} lines; the run was interrupted and resumed, which the log shows, on two CPU cores.
Last logged step: {last}.

Data: `dgemma_build/demo/skills.py` writes every example from a seed. No text by people and no other model's output
went in.

## Limits
It answers only prompts in the wording of the examples. It was not evaluated for anything else, and long contexts are
there to test servers, not to be understood.
"""


def card(checkpoint_directory: Path, accepted: dict[str, Any]) -> str:
    """The card's text; `accepted` is what `dgemma_build.accept` wrote."""
    checkpoint = Checkpoint(checkpoint_directory)
    config = checkpoint.config
    log = [json.loads(line) for line in (checkpoint_directory / TRAINING_LOG).read_text().splitlines()]
    starts = [entry for entry in log if "plan" in entry]
    last = [entry for entry in log if "step" in entry][-1]
    figures = {row["what"].rsplit(", ", 1)[-1]: row["details"] for row in accepted["rows"] if "held-out" in row["what"]}
    lines = []
    for skill in SKILLS:
        prompt = held_out_set(skill, 1)[0].prompt.replace("\n", "<br>").replace("|", "\\|")
        lines.append(f"| {skill} | {figures[skill]['right']} of {figures[skill]['of']} | {prompt} |")
    return _CARD.format(
        parameters=starts[-1]["parameters"] / 1e6,
        count=len(SKILLS),
        layers=len(config.spec.layers),
        window=config.spec.sliding_window,
        hidden=config.spec.hidden_size,
        vocab=config.spec.vocab_size,
        canvas=config.spec.canvas_length,
        experts=config.num_experts,
        top_k=config.top_k_experts,
        context=config.spec.max_position_embeddings,
        one_in=HELD_OUT_ONE_IN,
        rows="\n".join(lines),
        steps=starts[-1]["plan"]["steps"],
        seed=starts[-1]["plan"]["seed"],
        log=TRAINING_LOG,
        updates=len(log),
        last=", ".join(f"{name} {value}" for name, value in last.items()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--accept", type=Path, required=True, help="JSON file of dgemma_build.accept")
    args = parser.parse_args()
    text = card(args.checkpoint, json.loads(args.accept.read_text()))
    (args.checkpoint / "README.md").write_text(text)


if __name__ == "__main__":
    main()
