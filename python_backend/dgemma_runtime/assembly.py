"""Puts codec, chat template, engine and service together; makes arrays at the edge into requests. Knows no Triton."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dgemma_runtime.chat import TEMPLATE_FILE, ChatTemplate
from dgemma_runtime.codec import TOKENIZER_CONFIG_FILE, Codec, read_json_object
from dgemma_runtime.contract import EngineLimits, Int32Array
from dgemma_runtime.engines.factory import open_engine
from dgemma_runtime.errors import EngineError, InvalidRequest
from dgemma_runtime.events import Event, Finished
from dgemma_runtime.observer import Observer
from dgemma_runtime.parameters import default_parameters
from dgemma_runtime.process_settings import ProcessSettings
from dgemma_runtime.requests import GenerationRequest
from dgemma_runtime.service import Service
from dgemma_runtime.tensors import Arrays, Chat, OutputOptions, parse_request
from dgemma_runtime.watchdog import WatchedEngine

_WARM_UP_S = 300.0


@dataclass(frozen=True)
class PreparedRequest:
    """What to submit, and what its responses need."""

    request: GenerationRequest
    options: OutputOptions
    echoed_text: str  # the prompt, where the client wants it in front of the output; else empty
    echoed_ids: Int32Array  # [n]


@dataclass(frozen=True)
class Application:
    """One engine and what turns requests into work for it."""

    service: Service
    template: ChatTemplate | None  # None: the engine directory has none
    canvas_length: int  # tokens
    limits: EngineLimits
    engine: WatchedEngine  # for the watchdog; the service's thread alone calls it

    @staticmethod
    def open(settings: ProcessSettings, observer: Observer | None = None) -> Application:
        """Load everything, start the engine thread, warm up; raises DGemmaError with a message fit for an operator."""
        codec = Codec.load(settings.engine)
        template = _load_template(settings.engine)
        engine = WatchedEngine(open_engine(settings.engine, settings.runtime))
        try:
            defaults = default_parameters(engine.manifest.generation_defaults)
            service = Service(engine, codec, settings.runtime, defaults, observer)
        except BaseException:
            engine.close()
            raise
        application = Application(service, template, engine.manifest.model.canvas_length, engine.limits, engine)
        service.start()
        if settings.warm_up:
            try:
                application.warm_up()
            except BaseException:
                service.stop()
                raise
        return application

    def prepare(
        self, tensors: Arrays, request_parameters: str, request_id: str, timeout_us: int = 0
    ) -> PreparedRequest:
        """From what Triton hands over; raises InvalidRequest."""
        parsed = parse_request(tensors, request_parameters, self.service.defaults, timeout_us)
        given = parsed.prompt
        prompt, source = (self._render(given), "messages") if isinstance(given, Chat) else (given, "")
        request = GenerationRequest(
            prompt, parsed.parameters, request_id, source, parsed.draft, parsed.template, parsed.suffix
        )
        if parsed.options.exclude_input_in_output:
            return PreparedRequest(request, parsed.options, "", np.empty(0, np.int32))
        ids = self.service.intake.prompt_ids(request)
        skip = parsed.parameters.skip_special_tokens
        text = prompt if isinstance(prompt, str) else self.service.codec.decode(ids, skip)
        encoded = replace(request, prompt=ids, source=request.prompt_field)  # a long text is encoded once
        return PreparedRequest(encoded, parsed.options, text, ids)

    def warm_up(self) -> None:
        """Two short canvases, so that prefill, denoising and commit have all run; raises EngineError."""
        prompt = np.zeros(1, np.int32)
        room = self.service.max_model_len - len(prompt)
        parameters = replace(
            self.service.defaults,
            max_tokens=min(self.canvas_length + 1, room),
            max_denoising_steps=2,
            end_ids=(),
        )
        ended = threading.Event()
        errors: list[str | None] = []

        def sink(event: Event) -> None:
            if isinstance(event, Finished):
                errors.append(event.error if event.reason == "error" else None)
                ended.set()

        self.service.submit(GenerationRequest(prompt, parameters, "warm-up"), sink)
        if not ended.wait(_WARM_UP_S):
            raise EngineError(f"the warm-up generation did not end within {_WARM_UP_S:g} s")
        if errors[0] is not None:
            raise EngineError(f"the warm-up generation failed: {errors[0]}")

    def _render(self, chat: Chat) -> str:
        if self.template is None:
            message = "this engine has no chat template; send the formatted prompt as text_input"
            raise InvalidRequest("messages", message)
        return self.template.render(
            chat.messages,
            chat.tools,
            add_generation_prompt=chat.add_generation_prompt,
            continue_final_message=chat.continue_final_message,
            **chat.variables,
        )


def _load_template(directory: Path) -> ChatTemplate | None:
    present = (directory / TEMPLATE_FILE).is_file()
    if not present and "chat_template" not in read_json_object(directory / TOKENIZER_CONFIG_FILE):
        return None
    return ChatTemplate.load(directory)
