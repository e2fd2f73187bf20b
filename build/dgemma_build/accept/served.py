"""Rows measured through a real Triton server and our client: seeds, held-out accuracy."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from dgemma_build.accept.table import Result, Row, Setting
from dgemma_build.demo.records import Example
from dgemma_build.demo.skills import SKILLS, held_out_set
from dgemma_client import Client
from dgemma_client.requests import Message
from dgemma_runtime.server import running_server

THREADS, MAX_BATCH_SIZE, MAX_TOKENS = 2, 4, 512
ACCURACY_BAR = 0.9
REQUIRED_SKILLS = ("sudoku4", "sudoku6", "json", "table", "infill")

Answer = tuple[str, tuple[int, ...]]  # text, token ids


async def _answers(url: str, examples: Sequence[Example]) -> list[Answer]:
    """The answer to each example, seed i for the i-th, a few requests at a time."""
    gate = asyncio.Semaphore(MAX_BATCH_SIZE)

    async def one(client: Client, seed: int, example: Example) -> Answer:
        async with gate:
            messages: list[Message] = [{"role": "user", "content": example.prompt}]
            result = await client.generate(messages=messages, max_tokens=MAX_TOKENS, seed=seed)
            return result.text, result.token_ids

    async with Client(url, timeout_s=300) as client:
        return await asyncio.gather(*(one(client, seed, example) for seed, example in enumerate(examples)))


def accuracy(skill: str) -> Row:
    """Held-out examples through the server, defaults of the checkpoint."""

    def measure(setting: Setting) -> Result:
        count = 25 if setting.quick else 100
        examples = held_out_set(skill, count)
        with running_server(setting.engine("demo"), threads=THREADS, max_batch_size=MAX_BATCH_SIZE) as server:
            answers = asyncio.run(_answers(server.grpc_url, examples))
        right = sum(
            SKILLS[skill].check(example.prompt, text) for example, (text, _) in zip(examples, answers, strict=True)
        )
        return Result(f"{right} of {count}", right >= ACCURACY_BAR * count, {"right": right, "of": count})

    return Row(f"held-out accuracy through the server, {skill}", "at least 90%", measure)


def _seeds(setting: Setting) -> Result:
    examples = [held_out_set(skill, 2)[1] for skill in SKILLS]
    runs = []
    for _ in range(2):  # a server each
        with running_server(setting.engine("demo"), threads=THREADS, max_batch_size=MAX_BATCH_SIZE) as server:
            runs += [asyncio.run(_answers(server.grpc_url, examples)) for _ in range(2)]
    # A trained model finds the one right answer from any noise; what noise does shows with an untrained one.
    with running_server(setting.engine("odd_a"), threads=THREADS) as server:
        drawn = asyncio.run(_unseeded(server.grpc_url))
    same = sum(all(run[index] == first for run in runs) for index, first in enumerate(runs[0]))
    different = len(set(drawn))
    figure = f"{same} of {len(examples)} prompts identical in 2 x 2 runs; {different} of {len(drawn)} differ unseeded"
    return Result(figure, same == len(examples) and different == len(drawn))


async def _unseeded(url: str) -> list[tuple[int, ...]]:
    """Token ids of one prompt, several times, without a seed."""
    async with Client(url, timeout_s=60) as client:
        results = [await client.generate("An unusual prompt", max_tokens=24, end_id=-1) for _ in range(8)]
    return [result.token_ids for result in results]


ROWS: tuple[Row, ...] = (
    Row("same seed twice and across a server restart; without a seed", "identical; different", _seeds),
    *(accuracy(skill) for skill in REQUIRED_SKILLS),
)
