"""Names and types of the model's tensors, and their bytes in a KServe v2 message. Knows no connection.

The server has a table of its own; a test holds the two together.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2

from dgemma_client.errors import InvalidRequest, ServerError

Scalar = str | int | float | bool
Values = tuple[Scalar, ...]  # the elements of one tensor

INPUTS: dict[str, str] = {  # name -> KServe data type; all of shape [n], n = 1 but for the lists below
    "text_input": "BYTES",
    "input_ids": "INT32",
    "messages": "BYTES",  # JSON: {"messages": [...], "tools": [...], "enable_thinking": ..., ...}
    "max_tokens": "INT32",
    "min_tokens": "INT32",
    "end_id": "INT32",
    "stop_words": "BYTES",
    "bad_words": "BYTES",
    "temperature": "FP32",
    "top_k": "INT32",
    "top_p": "FP32",
    "seed": "UINT64",
    "repetition_penalty": "FP32",
    "presence_penalty": "FP32",
    "frequency_penalty": "FP32",
    "max_denoising_steps": "INT32",
    "entropy_bound": "FP32",
    "t_min": "FP32",
    "t_max": "FP32",
    "stability_threshold": "INT32",
    "confidence_threshold": "FP32",
    "drafter": "BYTES",
    "draft_confidence": "FP32",
    "draft_verification": "BYTES",
    "draft_text": "BYTES",
    "draft_ids": "INT32",
    "template": "BYTES",  # JSON: [text, number of tokens, ...]
    "suffix": "BYTES",
    "guided_decoding_guide_type": "BYTES",
    "guided_decoding_guide": "BYTES",
    "sampling_parameters": "BYTES",  # JSON object, vLLM style
    "priority": "INT32",
    "deadline_ms": "INT32",
    "cache_salt": "BYTES",
    "stream": "BOOL",
    "stream_previews": "BOOL",
    "skip_special_tokens": "BOOL",
    "exclude_input_in_output": "BOOL",
    "return_finish_reason": "BOOL",
    "return_num_input_tokens": "BOOL",
    "return_num_output_tokens": "BOOL",
}
LISTS = frozenset({"input_ids", "draft_ids", "stop_words", "bad_words"})  # inputs of any length

OUTPUTS: dict[str, str] = {  # what this client reads; other outputs are decoded and ignored
    "text_output": "BYTES",
    "output_ids": "INT32",
    "finish_reason": "BYTES",
    "num_input_tokens": "INT32",
    "num_output_tokens": "INT32",
    "denoising_steps": "INT32",
    "statistics": "BYTES",  # JSON object
    "prefilled_tokens": "INT32",
    "preview_output": "BYTES",
    "canvas_index": "INT32",
    "canvas_steps": "INT32",
}

NUMPY_TYPES = {
    "BOOL": "?",
    "INT8": "<i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "UINT8": "<u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "FP32": "<f4",
    "FP64": "<f8",
}
_FP32_MAX = float(np.finfo(np.float32).max)
_LENGTH = struct.Struct("<I")  # before each BYTES element


def encode(model: str, request_id: str, inputs: Mapping[str, Values]) -> Any:
    """The ModelInferRequest of `inputs`; raises InvalidRequest for a value that its tensor cannot hold."""
    request = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    for name, values in inputs.items():
        datatype = INPUTS[name]
        request.inputs.add(name=name, datatype=datatype, shape=[len(values)])
        request.raw_input_contents.append(_PACK[datatype](name, values))
    return request


def pack_texts(name: str, values: Values) -> bytes:
    """The content of a BYTES tensor; raises InvalidRequest naming it."""
    packed = bytearray()
    for value in values:
        if not isinstance(value, str):
            raise InvalidRequest(f"{name}: {value!r} is {type(value).__name__}; give text")
        try:
            data = value.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"{name}: not valid Unicode at character {error.start} ({value[error.start]!r}); decode it as UTF-8"
            ) from None
        packed += _LENGTH.pack(len(data)) + data
    return bytes(packed)


def _pack_bool(name: str, values: Values) -> bytes:
    for value in values:
        if not isinstance(value, bool):
            raise InvalidRequest(f"{name}: {value!r} is {type(value).__name__}; give True or False")
    return np.array(values, dtype="?").tobytes()


def _pack_integer(low: int, high: int, dtype: str) -> Callable[[str, Values], bytes]:
    def pack(name: str, values: Values) -> bytes:
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise InvalidRequest(f"{name}: {value!r} is {type(value).__name__}; give a whole number")
            if not low <= value <= high:
                raise InvalidRequest(f"{name}: {value} is outside of {low} to {high}")
        return np.array(values, dtype=dtype).tobytes()

    return pack


def _pack_float(name: str, values: Values) -> bytes:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
            raise InvalidRequest(f"{name}: {value!r} is {type(value).__name__}; give a number")
        if math.isfinite(value) and abs(value) > _FP32_MAX:
            raise InvalidRequest(f"{name}: {value} is outside of -{_FP32_MAX} to {_FP32_MAX}")
    return np.array(values, dtype="<f4").tobytes()


_PACK: dict[str, Callable[[str, Values], bytes]] = {
    "BYTES": pack_texts,
    "BOOL": _pack_bool,
    "INT32": _pack_integer(-(2**31), 2**31 - 1, "<i4"),
    "UINT64": _pack_integer(0, 2**64 - 1, "<u8"),
    "FP32": _pack_float,
}


def decode(response: Any) -> dict[str, Values]:
    """Every output tensor of a ModelInferResponse as plain values; raises ServerError where it is malformed."""
    if len(response.outputs) != len(response.raw_output_contents):
        raise ServerError(f"{len(response.outputs)} outputs came with {len(response.raw_output_contents)} contents")
    return {
        output.name: unpack(output.name, output.datatype, output.shape, raw)
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }


def unpack(name: str, datatype: str, shape: Sequence[int], raw: bytes) -> Values:
    """The elements of one tensor; raises ServerError where they do not fit its type and shape."""
    expected = OUTPUTS.get(name, datatype)
    if datatype != expected:
        raise ServerError(f"output {name} is {datatype}; expected {expected}")
    try:
        values = tuple(_texts(raw)) if datatype == "BYTES" else _numbers(datatype, raw)
    except KeyError:
        raise ServerError(f"output {name} has the data type {datatype}, which this client does not read") from None
    except UnicodeDecodeError as error:
        raise ServerError(f"output {name} is not valid UTF-8 (byte {error.start} of {len(error.object)})") from None
    except (struct.error, ValueError) as error:
        raise ServerError(f"output {name} is malformed: {error}") from None
    if len(values) != int(np.prod(shape)):
        raise ServerError(f"output {name} has {len(values)} elements for the shape {list(shape)}")
    return values


def _numbers(datatype: str, raw: bytes) -> Values:
    return tuple(np.frombuffer(raw, dtype=NUMPY_TYPES[datatype]).tolist())


def _texts(raw: bytes) -> Iterable[str]:
    offset = 0
    while offset < len(raw):
        (length,) = _LENGTH.unpack_from(raw, offset)
        offset += _LENGTH.size
        if offset + length > len(raw):
            raise ValueError(f"an element of {length} bytes goes past the end")
        yield raw[offset : offset + length].decode()
        offset += length
