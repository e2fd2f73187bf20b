"""Client of a DiffusionGemma model on NVIDIA Triton: an asyncio library over gRPC and the command `dgemma`.

    async with Client("127.0.0.1:8001") as client:
        result = await client.generate("Why is the sky blue?", max_tokens=64, seed=1)
        print(result.text)

`client.stream(...)` gives typed events (`Prefill`, `Preview`, `Delta`, `Done`) as they come.
"""

from dgemma_client.client import Client
from dgemma_client.errors import (
    Cancelled,
    ClientError,
    ConnectError,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    ServerError,
)
from dgemma_client.events import (
    Delta,
    Done,
    DraftStatistics,
    Event,
    Prefill,
    Preview,
    Result,
    ServerInfo,
    Statistics,
    Tokens,
)
from dgemma_client.mock import MockTransport
from dgemma_client.requests import ChatOptions, Message, Parameters
from dgemma_client.transport import GrpcTransport, Transport

__all__ = [
    "Cancelled",
    "ChatOptions",
    "Client",
    "ClientError",
    "ConnectError",
    "DeadlineExceeded",
    "Delta",
    "Done",
    "DraftStatistics",
    "Event",
    "GrpcTransport",
    "InvalidRequest",
    "Message",
    "MockTransport",
    "Overloaded",
    "Parameters",
    "Prefill",
    "Preview",
    "Result",
    "ServerError",
    "ServerInfo",
    "Statistics",
    "Tokens",
    "Transport",
]
