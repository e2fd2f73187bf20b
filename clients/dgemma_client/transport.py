"""How requests reach a server: the interface, and gRPC to Triton. Knows tensors, not events.

One request per stream: the asyncio stubs hide Triton's empty final response, so the end of the stream is completion.
An error of the model comes as a message without a status, and its kind is told from the message. Triton would send a
status if asked to by the header `triton_grpc_error`; but then errors make it use freed memory, and 2.51 dies of that
within some hundred refusals (`make stress` found it). So gRPC's own retries, which go by status, never come to pass.

After an error the stream is read to its end. One that is cancelled there leaves a request behind in Triton, which can
then neither unload the model nor stop before its exit timeout.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any, Protocol

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2, service_pb2_grpc

from dgemma_client.errors import (
    Cancelled,
    ClientError,
    ConnectError,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    ServerError,
)
from dgemma_client.events import ServerInfo
from dgemma_client.requests import InferRequest
from dgemma_client.tensors import Values, decode, encode

Outputs = Mapping[str, Values]  # one response: tensor name -> elements

_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),  # a restarted server is found again at once
    ("grpc.max_reconnect_backoff_ms", 2000),
)
_FIRST_PAUSE_S = 0.5  # before a request is sent again; each further one is twice as long
_PROBE_S = 2.0
_CLOCKS_S = 0.005  # that gRPC's clock and the loop's may differ by
_LAST_READ_S = 1.0  # from an error to the end of its stream, which follows at once
_BY_STATUS: dict[grpc.StatusCode, type[ClientError]] = {
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: InvalidRequest,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Overloaded,
}
_REFUSALS: dict[str, type[ClientError]] = {  # parts of messages without a status: the model's, then Triton's own
    "the engine failed": ServerError,
    "the queue is full": Overloaded,
    "the server is shutting down": Overloaded,
    "no available versions": Overloaded,  # of a model that is being loaded again, "unknown model" before it
    "unknown model": InvalidRequest,
    "expected": InvalidRequest,
    "unexpected": InvalidRequest,
    "not ready": Overloaded,
    "stopping": Overloaded,
    "maximum queue size": Overloaded,
}


class Transport(Protocol):
    """What `Client` needs; raises ClientError, and asyncio.CancelledError only when its task is cancelled."""

    def stream(self, request: InferRequest, timeout_s: float, connect_timeout_s: float) -> AsyncGenerator[Outputs]:
        """The responses to one request, as they come; closing the generator cancels the request on the server."""
        ...

    async def live(self, timeout_s: float) -> bool:
        """Whether a server answers."""
        ...

    async def ready(self, model: str, timeout_s: float) -> bool:
        """Whether the server would serve the model now."""
        ...

    async def info(self, model: str, timeout_s: float) -> ServerInfo:
        """Names and versions."""
        ...

    async def close(self) -> None:
        """End what is under way and let go of the connection."""
        ...


class GrpcTransport:
    """Triton's gRPC endpoint at `host:port`; give `credentials` for TLS.

    `retries` is how often a request is sent again for which the server was too busy or not there; never after its first
    response. Before that it waits as long as the server asks for, else about 0.5 s, 1 s, 2 s and so on. Where the
    request's time is too short for the wait, the error stands.
    """

    def __init__(self, url: str, credentials: grpc.ChannelCredentials | None = None, *, retries: int = 0) -> None:
        if retries < 0:
            raise InvalidRequest(f"retries: {retries} is below 0")
        self._url, self._retries = url, retries
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(url, options=_CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(url, credentials, options=_CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def stream(
        self, request: InferRequest, timeout_s: float, connect_timeout_s: float
    ) -> AsyncGenerator[Outputs]:
        message = encode(request.model, request.request_id, request.inputs)
        now = asyncio.get_running_loop().time
        deadline = now() + timeout_s
        for attempt in range(self._retries + 1):
            answered = False
            try:
                async with aclosing(self._once(message, deadline - now(), connect_timeout_s)) as responses:
                    async for outputs in responses:
                        answered = True
                        yield outputs
                return
            except (Overloaded, ConnectError) as error:
                pause_s = _pause_s(error, attempt)
                if answered or attempt == self._retries or pause_s > deadline - now():
                    raise
            await asyncio.sleep(pause_s)

    async def _once(self, message: Any, timeout_s: float, connect_timeout_s: float) -> AsyncGenerator[Outputs]:
        """The responses to one attempt."""
        call, now = None, asyncio.get_running_loop().time
        deadline = now() + timeout_s
        try:
            await self._connect(min(timeout_s, connect_timeout_s))
            call = self._stub.ModelStreamInfer(_only(message), timeout=timeout_s)
            async for response in call:
                if response.error_message:
                    await _read_to_end(call)
                    raise _refusal(response.error_message)
                yield decode(response.infer_response)
        except grpc.aio.AioRpcError as error:
            if now() > deadline - _CLOCKS_S:  # a call that ends while its message is being sent has another status
                raise DeadlineExceeded(f"no end after {timeout_s:g} s") from None
            raise await self._error(error) from None
        except grpc.aio.UsageError:
            raise Cancelled("the client was closed before the request was sent") from None
        except asyncio.CancelledError:
            if _task_is_cancelled():
                raise
            raise Cancelled("the client was closed while the request was under way") from None
        finally:
            if call is not None:
                call.cancel()

    async def live(self, timeout_s: float) -> bool:
        try:
            return bool((await self._stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=timeout_s)).live)
        except grpc.aio.AioRpcError:
            return False

    async def ready(self, model: str, timeout_s: float) -> bool:
        try:
            request = service_pb2.ModelReadyRequest(name=model)
            return bool((await self._stub.ModelReady(request, timeout=timeout_s)).ready)
        except grpc.aio.AioRpcError:
            return False

    async def info(self, model: str, timeout_s: float) -> ServerInfo:
        await self._connect(timeout_s)
        try:
            server = await self._stub.ServerMetadata(service_pb2.ServerMetadataRequest(), timeout=timeout_s)
            request = service_pb2.ModelConfigRequest(name=model)
            config = (await self._stub.ModelConfig(request, timeout=timeout_s)).config
        except grpc.aio.AioRpcError as error:
            raise await self._error(error) from None
        return ServerInfo(
            server=server.name,
            server_version=server.version,
            model=config.name,
            inputs=tuple(tensor.name for tensor in config.input),
            outputs=tuple(tensor.name for tensor in config.output),
            parameters={name: parameter.string_value for name, parameter in config.parameters.items()},
        )

    async def close(self) -> None:
        await self._channel.close()

    def _connected(self) -> bool:
        return bool(self._channel.get_state() is grpc.ChannelConnectivity.READY)

    async def _connect(self, timeout_s: float) -> None:
        """Have a connection within the time, so that its failure is told apart from a failing request."""
        if self._connected():
            return
        try:
            await self._stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            reason = f"no answer in {timeout_s:g} s" if _timed_out(error) else error.details()
            raise ConnectError(f"no Triton gRPC server at {self._url}: {reason}") from None

    async def _error(self, error: grpc.aio.AioRpcError) -> ClientError:
        code, details = error.code(), error.details() or "no details"
        # The server sends this status, and gRPC makes it of a broken connection: a server that answers sent it.
        if code is grpc.StatusCode.UNAVAILABLE and not (self._connected() and await self.live(_PROBE_S)):
            return ConnectError(f"the connection to {self._url} broke: {details}")
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
            return InvalidRequest(details)  # retrying would not help
        return _BY_STATUS.get(code, ServerError)(details)


def _pause_s(error: Overloaded | ConnectError, attempt: int) -> float:
    hint_s = error.retry_after_s if isinstance(error, Overloaded) else None
    pause_s = _FIRST_PAUSE_S * 2**attempt if hint_s is None else hint_s
    return pause_s * random.uniform(0.8, 1.2)  # so that not all come back at once


async def _read_to_end(call: Any) -> None:
    """Ignores what still comes."""
    with contextlib.suppress(TimeoutError, grpc.aio.AioRpcError):
        async with asyncio.timeout(_LAST_READ_S):
            async for _ in call:
                pass


async def _only(message: Any) -> AsyncIterator[Any]:
    yield message


def _refusal(message: str) -> ClientError:
    if InvalidRequest(message).field is not None:  # only what the model refuses begins with a field's name
        return InvalidRequest(message)
    known = (kind for part, kind in _REFUSALS.items() if part in message)
    return next(known, ServerError)(message)


def _timed_out(error: grpc.aio.AioRpcError) -> bool:
    return error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def _task_is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
