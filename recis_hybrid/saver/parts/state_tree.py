"""Contents of a ``state_dict`` as tensors and JSON: nested dictionaries, lists, tuples and plain values.

Each container is one JSON object that names its kind: ``{"dict": {...}}``, ``{"pairs": [[key, value], ...]}`` (keys
that are not strings), ``{"list": [...]}``, ``{"tuple": [...]}``. A tensor is ``{"tensor": name}``, and a number that
JSON lacks is ``{"float": "inf"}``, ``"-inf"`` or ``"nan"``.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from recis_hybrid.checkpointing import JSON
from recis_hybrid.saver.errors import OTHER_STEP, CheckpointError, CorruptCheckpoint
from recis_hybrid.saver.format.json_values import checked_json


def pack(where: str, value: object, tensors: dict[str, Tensor], path: str = "") -> JSON:
    """Split a value into tensors and JSON.

    Args:
        where: Name of the value, for the message.
        value: The value.
        tensors: Receives the tensors, named by their place in the value.
        path: Place of the value.

    Returns:
        The JSON.

    Raises:
        CheckpointError: A nested value is not a container, a tensor or JSON.
    """
    if isinstance(value, Tensor):
        name = path or "value"
        while name in tensors:  # another place has the same name
            name += "'"
        tensors[name] = value.detach()
        return {"tensor": name}
    inner = f"{path}." if path else ""
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {"dict": {key: pack(where, each, tensors, f"{inner}{key}") for key, each in value.items()}}
        pairs = enumerate(value.items())
        return {"pairs": [[checked_json(where, k), pack(where, v, tensors, f"{inner}{n}")] for n, (k, v) in pairs]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [pack(where, each, tensors, f"{inner}{n}") for n, each in enumerate(value)]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(float(value))}
    try:
        return checked_json(where, value)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {path or 'it'} cannot be saved: {error}") from error


def unpack(where: str, packed: JSON, tensors: dict[str, Tensor]) -> Any:
    """Reassemble a value from tensors and JSON.

    Args:
        where: Name of the value, for the message.
        packed: Result of :func:`pack`.
        tensors: The tensors that it split off.

    Returns:
        The value.

    Raises:
        CorruptCheckpoint: :func:`pack` does not return such JSON.
    """
    if not isinstance(packed, dict | list):
        return packed
    if isinstance(packed, dict) and len(packed) == 1:
        (kind, inner), *_ = packed.items()
        if kind == "tensor" and isinstance(inner, str) and inner in tensors:
            return tensors[inner]
        if kind == "float" and inner in ("inf", "-inf", "nan"):
            return float(inner)
        if kind == "dict" and isinstance(inner, dict):
            return {key: unpack(where, each, tensors) for key, each in inner.items()}
        if kind == "pairs" and isinstance(inner, list) and all(isinstance(p, list) and len(p) == 2 for p in inner):
            return {pair[0]: unpack(where, pair[1], tensors) for pair in inner}  # type: ignore[index]
        if kind in ("list", "tuple") and isinstance(inner, list):
            values = [unpack(where, each, tensors) for each in inner]
            return values if kind == "list" else tuple(values)
    raise CorruptCheckpoint(f"{where}: its state is not as it was written. {OTHER_STEP}")
