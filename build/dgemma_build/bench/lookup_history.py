"""What prompt-lookup drafts are worth where a file is edited: they are compared with this repository's own history.

    python -m dgemma_build.bench.lookup_history [--files 250] [--canvas 256]

A file before a commit is the prompt, after it the output, canvas by canvas behind the first. Knows no model: a draft is
right where the output has its tokens. Prints a JSON line: by strength of the draft, how many there were, which share
was right as a whole, which share of the tokens was right, and the mean confidence that the tokens were given.
MIN_STRENGTH and the constants of `confidences` were chosen by these figures.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from dgemma_runtime.contract import Int32Array
from dgemma_runtime.drafting import lookup

STRENGTHS = (4, 8, 12, 16, 24, 32, 64, 128, 256, 1024)  # tokens; a figure from each to the next
_PIECES = re.compile(r" ?[A-Za-z]{1,6}|[0-9]| +|\n *|[^A-Za-z0-9\s]{1,2}|\s")  # about as long as a tokenizer's
_SUFFIXES = (".py", ".md", ".js", ".yaml", ".toml")
_CHARACTERS = (500, 20_000)  # of a file, least and most
_TURN, _END, _PADDING = (1, 2), 3, 4  # ids that no piece has


@dataclass(frozen=True)
class Draft:
    """Of one canvas."""

    strength: float  # tokens
    right: float  # share of the canvas's tokens
    confidence: float  # mean


def edited_files(repository: Path, count: int) -> list[tuple[str, str]]:
    """`count` files before and after a commit, drawn from the whole history; always the same for one history."""
    commits = _git(repository, "log", "--no-merges", "--format=%H").split()
    random.Random(0).shuffle(commits)
    found: list[tuple[str, str]] = []
    for commit in commits:
        changes = _git(repository, "diff-tree", "-r", "--diff-filter=M", "--no-commit-id", "--abbrev=40", commit)
        for change in changes.splitlines():
            *_, old, new, _, path = change.split(maxsplit=5)
            texts = (
                [_git(repository, "cat-file", "blob", blob) for blob in (old, new)] if path.endswith(_SUFFIXES) else []
            )
            if texts and all(_CHARACTERS[0] <= len(text) <= _CHARACTERS[1] for text in texts):
                found.append((texts[0], texts[1]))
        if len(found) >= count:
            break
    return found[:count]


def drafts(files: Sequence[tuple[str, str]], canvas_length: int) -> Iterator[Draft]:
    """Of every canvas that lookup drafts."""
    ids: dict[str, int] = {}

    def encode(text: str) -> list[int]:
        return [ids.setdefault(piece, len(ids) + 1 + _PADDING) for piece in _PIECES.findall(text)]

    for old, new in files:
        prompt = np.array([*encode(old), *_TURN], np.int32)
        answer = [*encode(new), _END]
        output = np.array(answer + [_PADDING] * (-len(answer) % canvas_length), np.int32)
        for start in range(canvas_length, len(output), canvas_length):
            draft = _draft(prompt, output, start, canvas_length)
            if draft is not None:
                yield draft


def _draft(prompt: Int32Array, output: Int32Array, start: int, length: int) -> Draft | None:
    proposal = lookup.propose(np.concatenate([prompt, output[:start]]), len(prompt), length, (_END,))
    if proposal is None:
        return None
    real = output[start : start + length] != _PADDING
    right = (proposal.token_ids == output[start : start + length])[real]
    nearest = float(proposal.confidences[0])
    strength = 2 * nearest / (1 - nearest)  # `confidences` at the distance 0, turned round
    return Draft(round(strength), float(right.mean()), float(proposal.confidences[real].mean()))


def figures(found: Sequence[Draft]) -> dict[str, dict[str, float]]:
    """By strength; shares."""
    result = {}
    for low, high in pairwise((*STRENGTHS, np.inf)):
        chosen = [draft for draft in found if low <= draft.strength < high]
        if chosen:
            result[str(low)] = {
                "drafts": len(chosen),
                "right as a whole": _mean([draft.right == 1 for draft in chosen]),
                "tokens right": _mean([draft.right for draft in chosen]),
                "confidence": _mean([draft.confidence for draft in chosen]),
            }
    return result


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 3)


def _git(repository: Path, *arguments: str) -> str:
    run = subprocess.run(["git", "-C", repository, *arguments], capture_output=True, check=True)
    return run.stdout.decode(errors="replace")


def main() -> None:
    """Print the figures, of weak drafts too."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--files", type=int, default=250)
    parser.add_argument("--canvas", type=int, default=256, help="tokens")
    arguments = parser.parse_args()
    lookup.MIN_STRENGTH = lookup.MIN_MATCH
    files = edited_files(Path(__file__).parent, arguments.files)
    found = list(drafts(files, arguments.canvas))
    print(json.dumps({"files": len(files), "canvas": arguments.canvas, "from strength": figures(found)}))


if __name__ == "__main__":
    main()
