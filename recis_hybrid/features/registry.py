"""Operations by name: those of the package, and those registered by users."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from recis_hybrid.features.op import missing_method
from recis_hybrid.features.ops import ids, joins, numbers, resize, rows, times, tokenize, vocabulary

OpClass = TypeVar("OpClass", bound=type)

_REGISTERED: dict[str, type] = {
    "age": times.Age,
    "bucketize": numbers.Bucketize,
    "cast": numbers.Cast,
    "clip": numbers.Clip,
    "concat": joins.Concat,
    "cross": joins.Cross,
    "date_part": times.DatePart,
    "decimal_string": ids.DecimalString,
    "distinct": rows.Distinct,
    "fill_null": resize.FillNull,
    "hash": ids.Hash,
    "length": rows.Length,
    "log": numbers.Log,
    "mask": vocabulary.Mask,
    "mod": ids.Mod,
    "multi_hash": ids.MultiHash,
    "multi_hot": rows.MultiHot,
    "normalize": numbers.Normalize,
    "one_hot": rows.OneHot,
    "pad": resize.Pad,
    "string_multi_hash": ids.StringMultiHash,
    "tile": rows.Tile,
    "to_dense": resize.ToDense,
    "tokenize": tokenize.Tokenize,
    "top_k": rows.TopK,
    "truncate": resize.Truncate,
    "vocabulary": vocabulary.Vocabulary,
}


def register_op(name: str) -> Callable[[OpClass], OpClass]:
    """Register a class of operations under a name for configurations (see :func:`make_op`).

    Features accept unregistered classes as well; registration checks a class where it is defined.

    Args:
        name: A name that is not taken.

    Returns:
        A decorator for the class, which must have ``fault`` and ``kernel`` (see :class:`Op`) and be hashable, such as a
        frozen dataclass.

    Raises:
        TypeError: If the class lacks a method or is not hashable.
        ValueError: If the name is taken.

    Example:
        >>> from dataclasses import dataclass
        >>> @register_op("add_n")
        ... @dataclass(frozen=True)
        ... class Add:
        ...     n: int
        ...     def fault(self):
        ...         return None if self.n else "n must not be 0"
        ...     def kernel(self):
        ...         return lambda column: column._replace(values=column.values + self.n)
        >>> FeatureEngine([Feature("user", ops=[Add(5), Mod(4)])])({"user": torch.tensor([3])})
        {'user': tensor([0])}
    """

    def register(cls: OpClass) -> OpClass:
        method = missing_method(cls)
        if method is not None:
            raise TypeError(f"register_op({name!r}): {cls.__name__} must have a method {method}(); see features.Op")
        by_identity: Any = object.__eq__
        if cls.__hash__ is None or cls.__eq__ is by_identity:
            raise TypeError(
                f"register_op({name!r}): {cls.__name__} must compare by its parameters and be hashable; make it a "
                f"@dataclass(frozen=True)"
            )
        if name in _REGISTERED and _REGISTERED[name] is not cls:
            raise ValueError(f"register_op({name!r}): {_REGISTERED[name].__name__} has that name; choose another")
        _REGISTERED[name] = cls
        return cls

    return register


def registered_ops() -> dict[str, type]:
    """Return the registered classes of operations by name."""
    return dict(_REGISTERED)


def make_op(name: str, **parameters: Any) -> Any:
    """Return an operation by name, for configurations.

    Args:
        name: Name of a registered class.
        parameters: Parameters of the class.

    Raises:
        TypeError: If the class does not have one of the parameters, or requires another one.
        ValueError: If the name is not registered.

    Example:
        >>> make_op("mod", n=100)
        Mod(n=100)
    """
    if name not in _REGISTERED:
        raise ValueError(f"make_op: unknown operation {name!r}; the registered operations are {sorted(_REGISTERED)}")
    known = list(inspect.signature(_REGISTERED[name]).parameters.values())
    names = [each.name for each in known if each.kind is not each.VAR_KEYWORD]
    unknown = [each for each in parameters if each not in names]
    if unknown and len(names) == len(known):
        close = difflib.get_close_matches(unknown[0], names, 1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise TypeError(f"make_op: {name!r} takes no {unknown[0]!r}{hint} Its parameters are {names}")
    return _REGISTERED[name](**parameters)
