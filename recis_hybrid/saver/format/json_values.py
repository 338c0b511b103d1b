"""Lossless JSON: values that do not read back equal are refused."""

from __future__ import annotations

import json
from typing import cast

from recis_hybrid.checkpointing import JSON
from recis_hybrid.saver.errors import CheckpointError

MOST_LEVELS = 64
"""Maximum depth of nesting; versions of Python differ in how much deeper they could read."""


def checked_json(where: str, value: object) -> JSON:
    """Return an independent copy of a value, which is as JSON reads it back and equal to the value.

    Args:
        where: Name of the value, for the message.
        value: The value.

    Returns:
        The copy.

    Raises:
        CheckpointError: The value, or something in it, is not JSON (a tuple, an integer key, NaN, an object).
    """
    try:
        copy = cast(JSON, json.loads(json.dumps(value, allow_nan=False)))
        same = _same(copy, value, MOST_LEVELS)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} must be JSON with finite numbers, but {error}. {_REMEDY}") from error
    if not same:
        raise CheckpointError(
            f"{where} must be JSON that reads back equal, but {_short(value)} reads back as {_short(copy)}. {_REMEDY}"
        )
    return copy


def checked_object(where: str, value: object) -> dict[str, JSON]:
    """Return :func:`checked_json` of a dictionary with string keys.

    Args:
        where: Name of the value, for the message.
        value: The dictionary.

    Returns:
        The copy.

    Raises:
        CheckpointError: The value is not a dictionary, or not JSON.
    """
    copy = checked_json(where, value)
    if not isinstance(copy, dict):
        raise CheckpointError(f"{where} must be a dictionary, got {_short(value)}. {_REMEDY}")
    return copy


_REMEDY = "Use None, bool, int, finite float, str, list, and dict with string keys; tensors go into `tensors`."


def _same(copy: JSON, value: object, levels: int) -> bool:
    """Return whether values are equal; unlike ``==``, this distinguishes 1 from True and 1.0."""
    if levels < 0:
        raise ValueError(f"it is nested more than {MOST_LEVELS} levels deep")
    if isinstance(copy, dict):
        if not isinstance(value, dict) or copy.keys() != value.keys():
            return False
        return all(_same(copy[key], value[key], levels - 1) for key in copy)
    if isinstance(copy, list):
        if not isinstance(value, list) or len(copy) != len(value):
            return False
        return all(_same(a, b, levels - 1) for a, b in zip(copy, value, strict=True))
    if isinstance(copy, bool) or isinstance(value, bool):
        return copy is value
    return isinstance(value, type(copy)) and copy == value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
