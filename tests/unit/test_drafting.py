"""Who drafts a canvas, in a whole service with scripted engines; what is counted; drafters that fail."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dgemma_runtime.contract import DraftResult, Float32Array, Int32Array
from dgemma_runtime.drafting import drafting
from dgemma_runtime.drafting.proposal import DraftOutcome
from dgemma_runtime.engines.scripted import ChaoticEngine, ScriptedEngine, answer_script, scripted_manifest
from dgemma_runtime.errors import EngineMemoryError, InvalidRequest
from dgemma_runtime.observer import Observer
from dgemma_runtime.parameters import default_parameters, parse_parameters
from dgemma_runtime.requests import GenerationRequest, LiveRequest
from dgemma_runtime.service import Service
from dgemma_runtime.settings import plan_limits
from dgemma_runtime.statistics import DraftStatistics
from dgemma_runtime.testing import EOS, Recorder, small_settings, submit, tiny_codec, tiny_tokenizer

if TYPE_CHECKING:
    from tests.unit.conftest import Start

CODEC = tiny_codec()
LENGTH = 8
PROMPT = "say the quick brown fox jumps over it: "
ANSWER = "the quick brown fox jumps over it"
MANIFEST = scripted_manifest(tiny_tokenizer().get_vocab_size(), LENGTH, sliding_window=13, max_model_len=512)
DEFAULTS = default_parameters({"eos_token_id": EOS})


def ids(text: str) -> Int32Array:
    return CODEC.encode(text)[1:]


def engine(answer: str = ANSWER, **options: Any) -> ScriptedEngine:
    """Certain after one pass, so that stopping takes two without a draft and one with a right one."""
    script = answer_script([(CODEC.encode(PROMPT), np.append(ids(answer), EOS).astype(np.int32))], LENGTH, steps=1)
    return ScriptedEngine(MANIFEST, plan_limits(MANIFEST, small_settings()), script, **options)


def steps(recorder: Recorder) -> list[int]:
    assert recorder.finished().error is None
    return [commit.steps for commit in recorder.commits]


def ask(service: Service, draft: str | Int32Array | None = None, **values: Any) -> Recorder:
    recorder = Recorder()
    service.submit(GenerationRequest(PROMPT, parse_parameters(values, service.defaults), draft=draft), recorder)
    return recorder


def network(context: Int32Array) -> tuple[Int32Array, Float32Array]:
    """Drafts the answer as the script has it."""
    written = len(context) - len(CODEC.encode(PROMPT))
    whole = np.append(ids(ANSWER), [EOS] + [0] * LENGTH)
    return whole[written:][:LENGTH].astype(np.int32), np.full(LENGTH, 0.99, np.float32)


# ---------------------------------------------------------------- drafters


def test_without_a_drafter_nothing_is_drafted(start: Start) -> None:
    recorder = ask(start(engine(drafts=network)), drafter="off")
    assert set(steps(recorder)) == {2}
    assert recorder.finished().statistics.drafts == ()


def test_what_the_prompt_has_is_drafted(start: Start) -> None:
    recorder = ask(start(engine()), drafter="lookup")
    taken = steps(recorder)
    assert taken[0] == 2, "nothing before the answer was there before"
    assert 1 in taken[1:]
    assert recorder.finished().text == ANSWER
    (told,) = recorder.finished().statistics.drafts
    assert told.drafter == "lookup"
    assert 0 < told.canvases < len(taken)
    assert told.steps_saved == taken.count(1)


@pytest.mark.parametrize(("drafter", "first"), [("lookup", 1), ("auto", 2)])
def test_who_asks_for_lookup_has_the_announced_document_for_a_start(start: Start, drafter: str, first: int) -> None:
    prompt = np.concatenate([CODEC.encode("it jumps:\n"), ids(ANSWER), [EOS], ids("say: ")]).astype(np.int32)
    script = answer_script([(prompt, np.append(ids(ANSWER), EOS).astype(np.int32))], LENGTH, steps=1)
    service = start(ScriptedEngine(MANIFEST, plan_limits(MANIFEST, small_settings()), script))
    recorder = Recorder()
    service.submit(GenerationRequest(prompt, parse_parameters({"drafter": drafter}, service.defaults)), recorder)
    assert steps(recorder)[0] == first
    assert recorder.finished().text == ANSWER


def test_a_client_s_draft_comes_first(start: Start) -> None:
    service = start(engine(drafts=network))
    recorder = ask(service, draft=np.append(ids(ANSWER), EOS).astype(np.int32))
    canvases = -(-(len(ids(ANSWER)) + 1) // LENGTH)
    assert steps(recorder) == [1] * canvases
    output = len(recorder.finished().token_ids)
    assert recorder.finished().statistics.drafts == (DraftStatistics("client", canvases, output, output, 0.0),)
    assert steps(ask(service, draft=ANSWER))[:-1] == [1] * (canvases - 1), "text is a draft as well"


def test_a_client_s_draft_is_found_again_behind_what_differs(start: Start) -> None:
    """The output is longer than the draft by three tokens at its beginning."""
    answer = "abc" + ANSWER
    recorder = ask(start(engine(answer)), draft=np.append(ids(ANSWER), EOS).astype(np.int32))
    taken = steps(recorder)
    assert taken[0] == 2
    assert recorder.finished().text == answer
    assert 1 in taken[1:]


def test_what_the_prompt_has_is_not_counted_as_a_client_s(start: Start) -> None:
    recorder = ask(start(engine()), draft=np.full(len(ids(ANSWER)), 7, np.int32))
    told = {drafts.drafter: drafts for drafts in recorder.finished().statistics.drafts}
    assert told.keys() == {"client", "lookup"}
    assert (told["client"].canvases, told["client"].accepted_tokens) == (1, 0)
    assert told["lookup"].accepted_tokens > 0
    assert recorder.finished().text == ANSWER


def test_a_network_that_is_never_sure_enough_rests(start: Start) -> None:
    def unsure(context: Int32Array) -> tuple[Int32Array, Float32Array]:
        return network(context)[0], np.full(LENGTH, 0.5, np.float32)

    answer = "".join(chr(ord("a") + index * 7 % 26) for index in range(80))  # repeats nothing of 16 tokens
    drafting_engine = engine(answer, drafts=unsure)
    recorder = ask(start(drafting_engine), drafter="model")
    assert steps(recorder) == [2] * 11
    asked = [call.positions[0] for call in drafting_engine.calls if call.kind == "draft"]
    start_of_answer = len(CODEC.encode(PROMPT))
    assert [(position - start_of_answer) // LENGTH for position in asked] == [0, 2, 5]
    assert recorder.finished().statistics.drafts == ()


def test_the_network_drafts_where_the_text_does_not(start: Start) -> None:
    drafting_engine = engine(drafts=network)
    recorder = ask(start(drafting_engine), drafter="model")
    assert set(steps(recorder)) == {1}
    (told,) = recorder.finished().statistics.drafts
    assert (told.drafter, told.canvases) == ("model", len(recorder.commits))
    assert told.accepted_tokens == told.drafted_tokens == len(recorder.finished().token_ids)
    drafts = [call for call in drafting_engine.calls if call.kind == "draft"]
    assert len(drafts) == len(recorder.commits)


def test_canvases_that_start_together_are_drafted_together(start: Start) -> None:
    drafting_engine = engine(drafts=network)
    service = start(drafting_engine)
    with service._changed:  # all are there before the first tick
        recorders = [ask(service, drafter="model") for _ in range(3)]
    for recorder in recorders:
        assert set(steps(recorder)) == {1}
    assert max(len(call.slots) for call in drafting_engine.calls if call.kind == "draft") == 3


def test_both_draft_with_auto(start: Start) -> None:
    recorder = ask(start(engine(drafts=network)))
    assert steps(recorder)[0] == 1, "only the network has something to say before the first canvas"
    assert {told.drafter for told in recorder.finished().statistics.drafts} == {"lookup", "model"}


def test_a_network_that_is_not_there_is_refused(start: Start) -> None:
    with pytest.raises(InvalidRequest, match=r"^drafter: 'model': this server has no drafter network; send auto"):
        ask(start(engine()), drafter="model")


# ---------------------------------------------------------------- what goes wrong


class Watching(Observer):
    def __init__(self) -> None:
        self.failures: list[str] = []
        self.outcomes: list[DraftOutcome] = []

    def drafter_failed(self, drafter: str) -> None:
        self.failures.append(drafter)

    def drafted(self, request: LiveRequest, outcome: DraftOutcome, steps_saved: float) -> None:
        self.outcomes.append(outcome)


def watched(of: ScriptedEngine) -> tuple[Service, Watching]:
    watching = Watching()
    service = Service(of, CODEC, small_settings(), DEFAULTS, watching)
    service.start()
    return service, watching


def test_a_network_that_fails_is_switched_off(caplog: pytest.LogCaptureFixture) -> None:
    drafting_engine = engine(drafts=network, fail_on={"draft": 2})
    service, watching = watched(drafting_engine)
    taken = steps(ask(service, drafter="model"))
    assert (taken[0], set(taken[1:])) == (1, {2})
    assert set(steps(ask(service, drafter="model"))) == {2}
    service.stop()
    assert watching.failures == ["model"]
    assert len(watching.outcomes) == 1
    assert caplog.text.count("drafter model failed and is switched off") == 1
    assert [call.kind for call in drafting_engine.calls].count("draft") == 2


def test_a_lookup_that_fails_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("a fault")

    monkeypatch.setattr(drafting, "propose", broken)
    service, watching = watched(engine())
    recorder = ask(service)
    assert set(steps(recorder)) == {2}
    assert recorder.finished().text == ANSWER
    service.stop()
    assert watching.failures == ["lookup"]


def test_a_network_without_memory_is_asked_again_for_the_next_canvas(monkeypatch: pytest.MonkeyPatch) -> None:
    drafting_engine = engine(drafts=network)
    draft, failed = drafting_engine.draft, list[bool]()

    def starved(rows: Any) -> DraftResult:
        if not failed:
            failed.append(True)
            raise EngineMemoryError("there is no memory for this call")
        return draft(rows)

    monkeypatch.setattr(drafting_engine, "draft", starved)
    service, watching = watched(drafting_engine)
    taken = steps(ask(service, drafter="model"))
    service.stop()
    assert (taken[0], set(taken[1:])) == (2, {1})
    assert watching.failures == []


@pytest.mark.parametrize(
    ("draft", "values", "message"),
    [
        (ANSWER, {"max_tokens": 5}, r"draft_text: has \d+ tokens, the output may have 5; shorten it or raise max_tok"),
        (np.array([1, 10**6], np.int32), {}, r"draft_ids: token ids must be from 0 to \d+, got 1000000"),
        (np.array([], np.int32), {}, "draft_ids: is empty"),
        (ANSWER, {"drafter": "lookup"}, "draft_text: excludes drafter 'lookup'; leave drafter out"),
        (ANSWER, {"drafter": "off"}, "draft_text: excludes drafter 'off'; leave drafter out"),
    ],
)
def test_drafts_that_cannot_be_used_are_refused(start: Start, draft: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{message}"):
        ask(start(engine()), draft=draft, **values)


# ---------------------------------------------------------------- seeds


def chaotic(start: Start, **settings: Any) -> Service:
    """Every number depends on all that a canvas is given, so these texts are equal only where all of that is."""
    small = small_settings(**settings)
    return start(ChaoticEngine(MANIFEST, plan_limits(MANIFEST, small)), small)


@pytest.mark.parametrize("verification", ["direct", "halves"])
def test_a_seed_means_the_same_with_drafts_in_any_company(start: Start, verification: str) -> None:
    """Halves need a second slot, or a second call where no slot is free; preempted canvases start again."""
    common = {"max_denoising_steps": 4, "end_id": -1, "max_tokens": 100, "draft_verification": verification}
    prompts = ["one two one two one two ", "aaaa", "say it again, say it again, say"]
    drafts = [np.arange(20, dtype=np.int32) + 5, None, np.arange(90, dtype=np.int32) % 40]

    def submitted(service: Service) -> Iterator[Recorder]:
        for seed, (prompt, draft) in enumerate(zip(prompts, drafts, strict=True)):
            recorder = Recorder()
            values = parse_parameters({**common, "seed": seed}, service.defaults)
            service.submit(GenerationRequest(prompt, values, draft=draft), recorder)
            yield recorder

    def texts(recorders: Iterable[Recorder]) -> list[list[int]]:
        return [recorder.finished().token_ids.tolist() for recorder in recorders]

    alone = texts(submitted(chaotic(start, max_batch_size=4)))  # one after the other
    for settings in ({"max_batch_size": 3}, {"max_batch_size": 6}, {"full_pages": 104}):
        service = chaotic(start, **settings)
        with service._changed:  # all are there before the first tick
            recorders = list(submitted(service))
        assert texts(recorders) == alone, settings


def test_a_draft_changes_what_a_seed_means(start: Start) -> None:
    service = chaotic(start)
    common: dict[str, Any] = {"max_denoising_steps": 4, "end_id": -1, "max_tokens": 60, "seed": 3}
    plain = submit(service, "hello", **common).finished().token_ids.tolist()
    recorder = Recorder()
    draft = np.arange(60, dtype=np.int32)
    service.submit(GenerationRequest("hello", parse_parameters(common, service.defaults), draft=draft), recorder)
    assert recorder.finished().token_ids.tolist() != plain
