"""An in-process gRPC server that behaves as Triton does on a stream, for tests that need a real connection.

Knows no model: a handler yields what each request gets.

    async with FakeTriton(handler) as server, Client(server.url) as client:
        ...
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from dgemma_client.requests import InferRequest
from dgemma_client.tensors import INPUTS, NUMPY_TYPES, OUTPUTS, Values, pack_texts, unpack
from dgemma_client.transport import Outputs


@dataclass(frozen=True)
class Refusal:
    """What Triton or the model refuses: a message without a status."""

    message: str


@dataclass(frozen=True)
class ModelError:
    """A stream that ends with a status, as gRPC itself and proxies end one."""

    status: grpc.StatusCode
    message: str


Item = Outputs | Refusal | ModelError | float | bytes  # bytes: the raw content of a text_output; float: seconds to wait
Handler = Callable[[InferRequest], Iterable[Item]]


class FakeTriton:
    """What it saw: `requests` in order, `left` the ids of those whose client went away before the end, `peers` the
    addresses of its clients' connections. `parameters` are those of the model's configuration.
    """

    def __init__(self, handler: Handler, port: int = 0, parameters: Mapping[str, str] | None = None) -> None:
        self._servicer = _Servicer(handler, {"max_model_len": "4096"} if parameters is None else parameters)
        self._server = grpc.aio.server(options=(("grpc.max_receive_message_length", -1),))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self._servicer, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.url = f"127.0.0.1:{self.port}"

    @property
    def requests(self) -> list[InferRequest]:
        return self._servicer.requests

    @property
    def left(self) -> list[str]:
        return self._servicer.left

    @property
    def peers(self) -> set[str]:
        return self._servicer.peers

    async def until_left(self, timeout_s: float = 5.0) -> None:
        """Wait until a client has gone away; raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not self.left:
                await asyncio.sleep(0.005)

    async def __aenter__(self) -> Self:
        await self._server.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Drop every connection at once."""
        await self._server.stop(None)


class _Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(self, handler: Handler, parameters: Mapping[str, str]) -> None:
        self._handler, self._parameters = handler, parameters
        self.requests: list[InferRequest] = []
        self.left: list[str] = []
        self.peers: set[str] = set()

    async def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerLiveResponse(live=True)

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ModelReadyResponse(ready=True)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerMetadataResponse(name="fake", version="0")

    async def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        response = service_pb2.ModelConfigResponse()
        response.config.name = request.name
        for name, value in self._parameters.items():
            response.config.parameters[name].string_value = value
        for name in INPUTS:
            response.config.input.add(name=name)
        for name in OUTPUTS:
            response.config.output.add(name=name)
        return response

    async def ModelStreamInfer(self, requests: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        self.peers.add(context.peer())
        if "triton_grpc_error" in dict(context.invocation_metadata()):
            raise ValueError("this header crashes Triton 2.51")
        async for message in requests:
            request = _decoded(message)
            self.requests.append(request)
            try:
                for item in self._handler(request):
                    if isinstance(item, int | float):
                        await asyncio.sleep(item)
                    elif isinstance(item, ModelError):
                        await context.abort(item.status, item.message)
                    else:
                        yield _response(item)
            except (asyncio.CancelledError, GeneratorExit):
                self.left.append(request.request_id)
                raise


def _decoded(message: Any) -> InferRequest:
    inputs = {
        tensor.name: unpack(tensor.name, tensor.datatype, tensor.shape, raw)
        for tensor, raw in zip(message.inputs, message.raw_input_contents, strict=True)
    }
    return InferRequest(message.model_name, message.id, inputs)


def _response(item: Outputs | Refusal | bytes) -> Any:
    message = service_pb2.ModelStreamInferResponse()
    if isinstance(item, Refusal):
        message.error_message = item.message
    elif isinstance(item, bytes):
        message.infer_response.outputs.add(name="text_output", datatype="BYTES", shape=[1])
        message.infer_response.raw_output_contents.append(item)
    else:
        for name, values in item.items():
            message.infer_response.outputs.add(name=name, datatype=OUTPUTS[name], shape=[len(values)])
            message.infer_response.raw_output_contents.append(_content(name, values))
    return message


def _content(name: str, values: Values) -> bytes:
    datatype = OUTPUTS[name]
    return pack_texts(name, values) if datatype == "BYTES" else np.array(values, NUMPY_TYPES[datatype]).tobytes()
