"""Requests made up from the published OpenAPI document, right ones and wrong ones. Knows the front end by its URL."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    negative_data_rejection,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)
from schemathesis.core.failures import FailureGroup
from schemathesis.core.result import Err

# Not whether all that the document allows is accepted: which fields contradict each other it says in words.
_CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
_LENGTHS = {  # what bounds an answer
    "/v1/chat/completions": "max_tokens",
    "/v1/completions": "max_tokens",
    "/v1/fim/completions": "max_tokens",
    "/v1/edit/completions": "max_tokens",
    "/v1/messages": "max_tokens",
    "/v1/responses": "max_output_tokens",
}
_SHOWN = 1000  # characters of a failure


@dataclass
class Report:
    """What was asked, and what is wrong with the answers."""

    requests: int = 0
    operations: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def check(url: str, examples: int, model: str, max_tokens: int, timeout_s: float = 60.0) -> Report:
    """`examples` of each operation, half of them wrong; the same ones each time.

    Right requests name `model`, and their answers have at most `max_tokens` tokens, so that they come in time.
    """
    report = Report()
    for operation, mode in _operations(f"{url}/openapi.json"):
        report.operations += mode is GenerationMode.POSITIVE
        _check_operation(operation, mode, max(examples // 2, 1), report, (model, max_tokens, timeout_s))
    return report


def _operations(document: str) -> Iterator[tuple[Any, GenerationMode]]:
    for found in schemathesis.openapi.from_url(document).get_all_operations():
        if isinstance(found, Err):
            raise found.err()
        operation = found.ok()
        yield operation, GenerationMode.POSITIVE
        if operation.body:  # no text is a wrong path
            yield operation, GenerationMode.NEGATIVE


def _check_operation(
    operation: Any, mode: GenerationMode, examples: int, report: Report, how: tuple[str, int, float]
) -> None:
    model, max_tokens, timeout_s = how

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Case[Any]) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            body = _whole_numbers(case.body)
            _bound(case.path, body, model, max_tokens)
            case.body = body
        response = case.call(timeout=timeout_s)
        report.requests += 1
        report.statuses[response.status_code] += 1
        try:
            case.validate_response(response, checks=_CHECKS)
        except FailureGroup as failure:
            report.problems.append(f"{operation.label}: {str(failure)[:_SHOWN]}")

    ask()


def _whole_numbers(value: Any) -> Any:
    """1.0 as 1: to the document both are whole numbers, and few clients write the former, which is refused."""
    if isinstance(value, dict):
        return {name: _whole_numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _bound(path: str, body: dict[str, Any], model: str, max_tokens: int) -> None:
    """Makes more of them requests that are answered, and the answers short."""
    if "model" in body:
        body["model"] = model
    if path in _LENGTHS:
        body[_LENGTHS[path]] = max_tokens
        body.pop("max_completion_tokens", None)  # which says the same
    if body.get("n") is not None:
        body["n"] = min(body["n"], 3)
    if body.get("stream_options") or body.get("diffusing"):
        body["stream"] = True
    if path == "/tokenize" and body.get("messages"):
        body.pop("prompt", None)
    if messages := body.get("messages"):  # results belong to a call that made-up messages do not have
        body["messages"] = [message for message in messages if message.get("role") != "tool"] or messages
