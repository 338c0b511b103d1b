"""Requests and answers of the Open Inference Protocol, version 2, with its extension for binary tensors.

References:
    KServe: Open Inference Protocol. https://github.com/kserve/open-inference-protocol
    NVIDIA: Binary tensor data extension. Triton Inference Server.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson

from recis_hybrid.serving.errors import InputError
from recis_hybrid.serving.server.errors import RequestError
from recis_hybrid.serving.server.layout import DATATYPES

Outputs = Mapping[str, npt.NDArray[np.float32]]
_KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    **{datatype: ("integers", (int,)) for datatype in DATATYPES if "INT" in datatype},
    **{datatype: ("numbers", (int, float)) for datatype in DATATYPES if datatype.startswith("FP")},
    "BOOL": ("true or false", (bool,)),
    "BYTES": ("strings", (str,)),
}
_MOST_DIMENSIONS = 8


class Requested(NamedTuple):
    """An output that a client asks for."""

    name: str
    is_binary: bool


class InferRequest(NamedTuple):
    """A scoring request."""

    id: str | None
    tensors: dict[str, Any]
    outputs: list[Requested]


def load_json(body: bytes | memoryview) -> dict[str, Any]:
    """Return the JSON object of a body.

    Args:
        body: UTF-8.

    Returns:
        The object. Integers are exact from -2**63 to 2**64 - 1; others are numbers with a fraction.

    Raises:
        RequestError: The body is not a JSON object.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(400, f"the body is not valid JSON: {error}.") from error
    if type(document) is not dict:
        raise RequestError(400, f"the body must be a JSON object, got {_what(document)}.")
    return document


def parse_infer(body: bytes, header_length: bytes | None, outputs: Sequence[str]) -> InferRequest:
    """Parse the body of a scoring request.

    Args:
        body: JSON, followed by binary tensors.
        header_length: Header ``Inference-Header-Content-Length``: the number of bytes of the JSON. None means all.
        outputs: Names of the bundle's outputs.

    Returns:
        The request; its tensors are arrays, or lists where there are strings or nulls.

    Raises:
        RequestError: The request is malformed.
        InputError: A tensor is malformed.
    """
    view = memoryview(body)
    length = len(view)
    if header_length is not None:
        text = header_length.decode("latin-1")
        if not (text.isascii() and text.isdigit() and len(text) < 19 and int(text) <= len(view)):
            raise RequestError(
                400,
                f"Inference-Header-Content-Length must be a number of bytes up to {len(view)}, the length of the body, "
                f"got {text[:50]!r}.",
            )
        length = int(text)
    document = load_json(view[:length])
    inputs = document.get("inputs")
    if type(inputs) is not list or not inputs:
        raise RequestError(400, f"'inputs' must be a list of tensors, got {_what(inputs)}.")
    tensors: dict[str, Any] = {}
    binary = view[length:]
    for tensor in inputs:
        name, values, binary = _input(tensor, binary)
        if name in tensors:
            raise InputError(f"input {name!r} occurs twice.")
        tensors[name] = values
    if len(binary):
        raise RequestError(400, f"{len(binary)} bytes follow the last tensor: check binary_data_size of the inputs.")
    request_id = document.get("id")
    if request_id is not None and type(request_id) is not str:
        raise RequestError(400, f"'id' must be a string, got {_what(request_id)}.")
    parameters = _parameters(document, "the request")
    return InferRequest(request_id, tensors, _requested(document, parameters, outputs))


def render_infer(
    name: str, version: str, request: InferRequest, outputs: Outputs
) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """Return the body and the headers of an answer.

    Args:
        name: Name of the model.
        version: Version of the model.
        request: The request.
        outputs: Scores by output.

    Returns:
        Body; headers other than the length.
    """
    rendered: list[dict[str, Any]] = []
    binary: list[bytes] = []
    for output, is_binary in request.outputs:
        values = outputs[output]
        tensor: dict[str, Any] = {"name": output, "datatype": "FP32", "shape": values.shape}
        if is_binary:
            binary.append(values.astype("<f4", copy=False).tobytes())
            tensor["parameters"] = {"binary_data_size": len(binary[-1])}
        else:
            tensor["data"] = np.ascontiguousarray(values.reshape(-1))
        rendered.append(tensor)
    document: dict[str, Any] = {"model_name": name, "model_version": version, "outputs": rendered}
    if request.id is not None:
        document["id"] = request.id
    head = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    if not binary:
        return head, [(b"content-type", b"application/json")]
    headers = [
        (b"content-type", b"application/octet-stream"),
        (b"inference-header-content-length", str(len(head)).encode()),
    ]
    return b"".join([head, *binary]), headers


def _input(tensor: Any, binary: memoryview) -> tuple[str, Any, memoryview]:
    """Return the name and the values of one input, and the binary data of the inputs after it."""
    if type(tensor) is not dict or type(tensor.get("name")) is not str:
        raise RequestError(400, f"an input must be an object with a 'name', got {_what(tensor)}.")
    name, datatype, shape = tensor["name"], tensor.get("datatype"), tensor.get("shape")
    if type(datatype) is not str or datatype not in _KINDS:
        known = ", ".join(_KINDS)
        raise InputError(f"input {name!r}: 'datatype' must be one of {known}, got {_what(datatype)}.")
    if (
        type(shape) is not list
        or not 1 <= len(shape) <= _MOST_DIMENSIONS
        or not all(type(extent) is int and 0 <= extent < 2**40 for extent in shape)
    ):
        raise InputError(f"input {name!r}: 'shape' must be a list of sizes, as [B] or [B, k], got {_what(shape)}.")
    parameters = _parameters(tensor, f"input {name!r}")
    size = parameters.get("binary_data_size")
    if "shared_memory_region" in parameters:
        raise InputError(f"input {name!r}: shared memory is not supported. Send the data in the body.")
    if size is None:
        if "data" not in tensor:
            raise InputError(f"input {name!r}: must have 'data', or 'binary_data_size' in its parameters.")
        return name, _from_json(name, datatype, shape, tensor["data"]), binary
    if "data" in tensor:
        raise InputError(f"input {name!r}: must not have both 'data' and 'binary_data_size'.")
    if type(size) is not int or not 0 <= size <= len(binary):
        raise InputError(
            f"input {name!r}: 'binary_data_size' must be a number of bytes up to {len(binary)}, which is what is left "
            f"of the body, got {_what(size)}. Is the body truncated?"
        )
    return name, _from_bytes(name, datatype, shape, binary[:size]), binary[size:]


def _from_json(name: str, datatype: str, shape: list[int], data: Any) -> Any:
    """Return the values of ``data``, which is flat or nested: an array, or a list if there are strings or nulls."""
    if type(data) is not list:
        raise InputError(f"input {name!r}: 'data' must be a list, got {_what(data)}.")
    flat = data
    for level, extent in enumerate(shape[1:]):
        if not flat or type(flat[0]) is not list:
            break
        if {type(each) for each in flat} != {list} or {len(each) for each in flat} != {extent}:
            raise InputError(f"input {name!r}: the lists of 'data' must be of the shape {shape}.")
        if len(flat) != prod(shape[: level + 1]):
            raise InputError(f"input {name!r}: 'data' must be of the shape {shape}.")
        flat = list(chain.from_iterable(flat))
    if len(flat) != prod(shape):
        raise InputError(f"input {name!r}: the shape {shape} needs {prod(shape)} values, 'data' has {len(flat)}.")
    what, allowed = _KINDS[datatype]
    found = set(map(type, flat))
    has_nulls = type(None) in found
    if not found <= {*allowed, type(None)}:
        wrong = next(value for value in flat if type(value) not in {*allowed, type(None)})
        raise InputError(f"input {name!r}: 'data' must consist of {what} for {datatype}, got {_what(wrong)}.")
    if has_nulls or datatype == "BYTES":
        if len(shape) == 2:
            width = shape[1]
            return [flat[row * width : (row + 1) * width] for row in range(shape[0])]
        if len(shape) > 2:
            raise InputError(f"input {name!r}: the shape must be [B] or [B, k], got {shape}.")
        return flat
    try:
        with np.errstate(over="ignore"):
            return np.array(flat, dtype=DATATYPES[datatype]).reshape(shape)
    except OverflowError as error:
        raise InputError(f"input {name!r}: {datatype} cannot hold a value: {error}.") from error


def _from_bytes(name: str, datatype: str, shape: list[int], data: memoryview) -> Any:
    """Return the values of a binary tensor: an array that shares memory with the body, or a list of strings."""
    count = prod(shape)
    if datatype != "BYTES":
        dtype = np.dtype(DATATYPES[datatype])
        if count * dtype.itemsize != len(data):
            raise InputError(
                f"input {name!r}: the shape {shape} of {datatype} needs {count * dtype.itemsize} bytes, "
                f"'binary_data_size' is {len(data)}."
            )
        if datatype == "BOOL" and count and int(np.frombuffer(data, np.uint8).max()) > 1:
            raise InputError(f"input {name!r}: a byte of BOOL must be 0 or 1.")
        return np.frombuffer(data, dtype).reshape(shape)
    strings: list[str] = []
    position = 0
    while position < len(data):
        begin = position + 4
        position = begin + int.from_bytes(data[begin - 4 : begin], "little")
        if begin > len(data) or position > len(data):
            raise InputError(f"input {name!r}: string {len(strings)} is truncated.")
        try:
            strings.append(str(data[begin:position], "utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(f"input {name!r}: string {len(strings)} is not UTF-8: {error.reason}.") from error
    if len(strings) != count:
        raise InputError(f"input {name!r}: the shape {shape} needs {count} strings, there are {len(strings)}.")
    if len(shape) == 2:
        return [strings[row * shape[1] : (row + 1) * shape[1]] for row in range(shape[0])]
    if len(shape) > 2:
        raise InputError(f"input {name!r}: the shape must be [B] or [B, k], got {shape}.")
    return strings


def _requested(document: Mapping[str, Any], parameters: Mapping[str, Any], outputs: Sequence[str]) -> list[Requested]:
    """Return the outputs to send, all of them by default, and whether each is binary."""
    default = _flag(parameters, "binary_data_output", False, "the request")
    wanted = document.get("outputs")
    if wanted is None or wanted == []:
        return [Requested(name, default) for name in outputs]
    if type(wanted) is not list:
        raise RequestError(400, f"'outputs' must be a list of objects with a 'name', got {_what(wanted)}.")
    found: list[Requested] = []
    for output in wanted:
        name = output.get("name") if type(output) is dict else None
        if type(name) is not str:
            raise RequestError(400, f"an output must be an object with a 'name', got {_what(output)}.")
        if name not in outputs:
            raise RequestError(400, f"there is no output {name[:100]!r}; there are {_listed(outputs)}.")
        own = _parameters(output, f"output {name!r}")
        for unsupported in ("classification", "shared_memory_region"):
            if unsupported in own:
                raise RequestError(400, f"output {name!r}: the parameter {unsupported!r} is not supported.")
        found.append(Requested(name, _flag(own, "binary_data", default, f"output {name!r}")))
    if len({each.name for each in found}) < len(found):
        raise RequestError(400, "an output is requested twice.")
    return found


def _parameters(owner: Mapping[str, Any], where: str) -> dict[str, Any]:
    parameters = owner.get("parameters")
    if parameters is None:
        return {}
    if type(parameters) is not dict:
        raise RequestError(400, f"{where}: 'parameters' must be an object, got {_what(parameters)}.")
    return parameters


def _flag(parameters: Mapping[str, Any], name: str, default: bool, where: str) -> bool:
    value = parameters.get(name, default)
    if type(value) is not bool:
        raise RequestError(400, f"{where}: the parameter {name!r} must be true or false, got {_what(value)}.")
    return value


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _what(value: Any) -> str:
    """Return a short description of a value of JSON for a message."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        # Its elements may be lists too, nested more deeply than repr() allows.
        return f"a list of {len(value)}"
    return "null" if value is None else repr(value)[:80]
