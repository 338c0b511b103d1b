"""The features' program of a bundle: the plan of a FeatureEngine as JSON. ``docs/bundles.md`` specifies it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any

from recis_hybrid.checkpointing import JSON
from recis_hybrid.features import (
    Age,
    Bucketize,
    Cast,
    Clip,
    Concat,
    Cross,
    DatePart,
    DecimalString,
    Distinct,
    FeatureEngine,
    Hash,
    Log,
    Mask,
    Mod,
    MultiHot,
    Normalize,
    OneHot,
    Pad,
    Tile,
    ToDense,
    TopK,
    Truncate,
    Vocabulary,
)
from recis_hybrid.features.ops.ids import MultiHashPart
from recis_hybrid.features.ops.numbers import FillNan
from recis_hybrid.features.ops.resize import FillEmpty
from recis_hybrid.features.ops.rows import CountOnes, ListLengths
from recis_hybrid.features.ops.tokenize import PadTokens, TokenIds, TokenMask


class PublishError(ValueError):
    """A model cannot be published; the message names the feature or table, and the remedy."""


def _number(value: Any) -> JSON:
    """Return a number in JSON, where one that is not finite is a string."""
    if isinstance(value, Integral):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _entry(value: Any) -> JSON:
    """Return an entry of a vocabulary: a string if it is UTF-8, else hexadecimal."""
    if not isinstance(value, bytes):
        return _number(value)
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"hex": value.hex()}


def _multi_hash(op: Any) -> dict[str, JSON]:
    multiplier, prime = op.parameters()
    return {"multiplier": multiplier, "prime": prime, "buckets": op.buckets}


# By the exact class, because a subclass may compute something else: the operator's name, and its parameters.
_OPERATORS: dict[type, tuple[str, Callable[[Any], dict[str, JSON]]]] = {
    Age: ("age", lambda op: {"unit": op.unit, "until": op.until, "missing": op.missing}),
    Bucketize: ("bucketize", lambda op: {"boundaries": [_number(b) for b in op.boundaries], "right": op.right}),
    Cast: ("cast", lambda op: {"dtype": str(op.dtype).removeprefix("torch.")}),
    Clip: ("clip", lambda op: {"least": _number(op.least), "most": _number(op.most)}),
    Concat: ("concat", lambda op: {}),
    CountOnes: ("count_ones", lambda op: {}),
    Cross: ("cross", lambda op: {"limit": op.limit}),
    DatePart: (
        "date_part",
        lambda op: {"part": op.part, "unit": op.unit, "utc_offset": op.utc_offset, "missing": op.missing},
    ),
    DecimalString: ("decimal_string", lambda op: {"unsigned": op.unsigned}),
    Distinct: ("distinct", lambda op: {}),
    FillEmpty: ("fill_empty", lambda op: {"value": _number(op.value)}),
    FillNan: ("fill_nan", lambda op: {"value": _number(op.value)}),
    Hash: ("hash", lambda op: {"kind": op.kind}),
    ListLengths: ("list_lengths", lambda op: {"level": op.level}),
    Log: ("log", lambda op: {"plus": _number(op.plus)}),
    Mask: ("mask", lambda op: {"values": [_entry(value) for value in op.values]}),
    Mod: ("mod", lambda op: {"n": op.n}),
    MultiHashPart: ("multi_hash", _multi_hash),
    MultiHot: ("multi_hot", lambda op: {"classes": op.classes}),
    Normalize: ("normalize", lambda op: {"mean": _number(op.mean), "std": _number(op.std)}),
    OneHot: ("multi_hot", lambda op: {"classes": op.classes}),
    Pad: (
        "pad",
        lambda op: {"length": op.length, "value": _number(op.value), "side": op.side, "level": op.level},
    ),
    Tile: ("tile", lambda op: {"times": op.times}),
    ToDense: ("to_dense", lambda op: {"length": op.length, "value": _number(op.value), "side": op.side}),
    TopK: ("top_k", lambda op: {"k": op.k}),
    Truncate: ("truncate", lambda op: {"length": op.length, "side": op.side, "level": op.level}),
    Vocabulary: (
        "vocabulary",
        lambda op: {"entries": [_entry(entry) for entry in op.entries], "unknown": op.unknown},
    ),
}
_TOKENS = (TokenIds, PadTokens, TokenMask)


def program_of(engine: FeatureEngine | None, extra: Iterable[str] = ()) -> dict[str, JSON]:
    """Return the program of an engine.

    Args:
        engine: The engine; None for no operations.
        extra: Columns that the model reads and no feature computes.

    Returns:
        ``columns``, ``steps`` and ``outputs``.

    Raises:
        PublishError: An operation cannot be in a bundle.
    """
    plan = None if engine is None else engine.plan
    read = [] if plan is None else list(plan.columns)
    computed = {} if plan is None else plan.outputs
    columns = list(dict.fromkeys([*read, *(name for name in extra if name not in computed)]))
    shift = len(columns) - len(read)

    def register(number: int) -> int:
        return number if number < len(read) else number + shift

    steps: list[JSON] = []
    for instruction in () if plan is None else plan.instructions:
        steps.append(_step(instruction.op, [register(source) for source in instruction.sources], instruction.features))
    outputs: dict[str, JSON] = {name: register(number) for name, number in computed.items()}
    outputs |= {name: columns.index(name) for name in extra if name not in computed}
    return {"columns": list(columns), "steps": steps, "outputs": outputs}


def _step(op: Any, inputs: Sequence[int], features: Sequence[str]) -> JSON:
    where = f"feature {features[0]!r}: {op}"
    if type(op) in _TOKENS:
        raise PublishError(
            f"{where} cannot be in a bundle, which has no tokenizer. Tokenize before the request: declare the feature "
            f"over a column of token ids"
        )
    if type(op) not in _OPERATORS:
        raise PublishError(
            f"{where} cannot be in a bundle, because {type(op).__name__} is not an operation of recis_hybrid.features. "
            f"Compute it before the request, as a column, or express it by the package's operations"
        )
    name, parameters = _OPERATORS[type(op)]
    return {"op": name, "inputs": list(inputs), "feature": features[0], **parameters(op)}
