"""The demo's training module and the oracle are one function, through the checkpoint that export writes."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, DynamicCache

from dgemma_build.checkpoint import Checkpoint
from dgemma_build.demo.batches import Bucket, Phase, Sampler
from dgemma_build.demo.export import training_state, write_checkpoint
from dgemma_build.demo.model import DemoConfig, Denoiser
from dgemma_build.demo.tokenizer import TURN_END, TURN_START, build_tokenizer, render_chat, render_turn
from dgemma_build.demo.train import Plan, _rate, revision_plan, train
from dgemma_build.oracle import load_oracle

VOCAB = 1024
DEMO = Path(__file__).parents[2] / "build" / "checkpoints" / "demo"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Denoiser, Path]:
    """An untrained denoiser, every norm and scalar away from one, rounded as the checkpoint rounds it."""
    torch.manual_seed(0)
    model = Denoiser(DemoConfig(vocab_size=build_tokenizer(VOCAB).get_vocab_size(), sliding_window=21))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            parameter.copy_(parameter.bfloat16().float())
    directory = tmp_path_factory.mktemp("demo") / "checkpoint"
    write_checkpoint(model.state_dict(), model.config, directory, VOCAB, seed=0)
    return model, directory


@pytest.mark.parametrize("context_length", [5, 20, 21, 60])
@torch.no_grad()
def test_training_module_equals_the_oracle(written: tuple[Denoiser, Path], context_length: int) -> None:
    model, directory = written
    oracle = load_oracle(directory)
    config, rng = model.config, torch.Generator().manual_seed(context_length)
    context = torch.randint(config.vocab_size, (1, context_length), generator=rng)
    canvas = torch.randint(config.vocab_size, (1, config.canvas_length), generator=rng)
    cache = DynamicCache(config=oracle.config.get_text_config(decoder=True))
    oracle.model.encoder(input_ids=context, past_key_values=cache)
    padded = torch.nn.functional.pad(context, (0, 7))  # the training batches are padded on the right
    lengths = torch.tensor([context_length])
    soft, previous = torch.zeros(1, config.canvas_length, config.hidden_size), None
    for _ in range(2):
        logits, _balance = model(padded, lengths, canvas, soft)
        expected = oracle(past_key_values=cache, decoder_input_ids=canvas, self_conditioning_logits=previous).logits
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
        soft, previous = model.soft_embedding(logits), expected


def test_tokenizer_loads_in_transformers_and_agrees(written: tuple[Denoiser, Path]) -> None:
    _, directory = written
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = "Convert to JSON:\nname: Ada\nage: 36"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == render_turn(text)
    chat = [("Solve this", "1234\n3412"), (text, '{"name": "Ada"}')]
    messages = [
        {"role": role, "content": part} for turn in chat for part, role in zip(turn, ("user", "model"), strict=True)
    ]
    again = [*messages, {"role": "user", "content": "again"}]
    assert render_chat(chat, "again") == tokenizer.apply_chat_template(
        again, tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(rendered, add_special_tokens=False).input_ids
    assert ids == build_tokenizer(VOCAB).encode(rendered, add_special_tokens=False).ids
    assert tokenizer.convert_tokens_to_ids([TURN_START, TURN_END]) == [4, 5]
    assert tokenizer.decode(ids) == rendered


def test_the_shipped_tokenizer_is_the_one_that_is_built() -> None:
    assert json.loads(build_tokenizer(VOCAB).to_str()) == json.loads((DEMO / "tokenizer.json").read_text())


def test_a_checkpoint_gives_back_the_weights_it_was_written_from(written: tuple[Denoiser, Path]) -> None:
    model, directory = written
    state = training_state(directory)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_the_learning_rate_warms_up_holds_and_ends_at_zero() -> None:
    plan = Plan(steps=1000)
    rates = [_rate(step, plan) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / plan.warmup)
    assert set(rates[plan.warmup : 600]) == {1.0}
    assert rates[-1] == pytest.approx(1 / 400)
    assert plan.phase(0).ordered_share == 0.0
    assert plan.phase(10**6).ordered_share > 0


SMALL = (Bucket("short", 64, 4, {"json": 1.0}), Bucket("long", 256, 2, {"table": 1.0}))


def test_training_runs_stops_and_resumes(tmp_path: Path) -> None:
    phases = (Phase(0, SMALL), Phase(1, SMALL, 1.0))
    train(Plan(steps=1, phases=phases), tmp_path, resume=False, compiled=False)
    train(Plan(steps=2, phases=phases), tmp_path, resume=True, compiled=False)
    log = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
    assert [entry["first_step"] for entry in log if "first_step" in entry] == [0, 1]
    assert [entry["step"] for entry in log if "step" in entry] == [0, 1]
    assert all(4 < entry["short"] < 8 for entry in log if "step" in entry)  # nats; about log(vocabulary) at the start
    state = torch.load(tmp_path / "training.pt", weights_only=True)
    assert state["step"] == 2
    config = DemoConfig(vocab_size=state["model"]["embed_tokens.weight"].shape[0])
    write_checkpoint(state["model"], config, tmp_path / "checkpoint", VOCAB, seed=0)
    assert Checkpoint(tmp_path / "checkpoint").config.spec.canvas_length == config.canvas_length


def test_training_goes_on_from_a_checkpoint_with_its_log_before_the_new_one(tmp_path: Path) -> None:
    before = (DEMO / "train_log.jsonl").read_text()
    phases = (Phase(0, SMALL, draft_share=0.5),)
    train(replace(revision_plan(1, seed=1), phases=phases), tmp_path, resume=False, compiled=False, weights=DEMO)
    after = (tmp_path / "train_log.jsonl").read_text()
    assert after.startswith(before)
    head, line = (json.loads(entry) for entry in after.removeprefix(before).splitlines())
    assert head["continued"]
    assert line["short"] < 1, "nats; weights from nothing have more than 4"


def test_a_batch_of_drafts_has_second_turns_and_starts_that_are_partly_wrong() -> None:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    bucket = Bucket("far", 900, 60, {"fix": 0.5, "rename": 0.5}, second_turns=0.5)
    batch = Sampler(tokenizer, 64, draft_share=0.5).batch(bucket, random.Random(0))
    (turn,) = tokenizer.encode(TURN_START, add_special_tokens=False).ids
    turns = torch.eq(batch.context, turn).sum(1)
    assert set(turns.tolist()) == {2, 4}, "user and model, once or twice"
    assert 15 < batch.drafted.sum() < 45
    wrong = (batch.start != batch.clean).sum(1)
    assert wrong[~batch.drafted].sum() == 0
    assert (wrong[batch.drafted] > 0).float().mean() > 0.5
    assert batch.context.shape == (60, 900)
    trimmed = batch.trimmed()
    assert batch.lengths.max() <= trimmed.context.shape[1] < 900
    assert torch.count_nonzero(trimmed.context) == torch.count_nonzero(batch.context)
    assert (batch.context != 0).sum(1).tolist() == batch.lengths.tolist(), "padding stands only behind a context"
