"""Conversion of plain values to dataclasses, with errors that name the key."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union


class ConfigError(ValueError):
    """An invalid configuration; the message names the file, the key, the rule and the value."""


T = TypeVar("T")


def parse(cls: type[T], tree: Mapping[str, Any], where: str, key: str = "") -> T:
    """Convert a nested mapping of plain values to a dataclass, with type checks at all levels.

    Args:
        cls: The dataclass. For a field ``Annotated[type, rule]``, ``rule.fault(value)`` returns an error or None.
        tree: Values by key.
        where: Name of the file in error messages.
        key: Key of the mapping in error messages.

    Raises:
        ConfigError: A key is unknown or missing, or a value has the wrong type.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    inner = f"{key}." if key else ""
    for name in tree:
        if name not in hints:
            close = _close_key(str(name), cls)
            hint = f"; did you mean {inner}{close}?" if close else "."
            raise ConfigError(f"{where}: unknown key {inner}{name}{hint} Valid keys are {sorted(hints)}")
    fields: Any = dataclasses.fields(cls)  # type: ignore[arg-type]
    missing = [
        f"{inner}{each.name}"
        for each in fields
        if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING and each.name not in tree
    ]
    if missing:
        raise ConfigError(f"{where}: the keys {missing} are required")
    try:
        return cls(**{name: _value(hints[name], value, where, f"{inner}{name}") for name, value in tree.items()})
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {f'{key}: ' if key else ''}{error}") from error


def _close_key(name: str, cls: type) -> str | None:
    """Return the closest key to an unknown one, in this section or one below."""
    hints = typing.get_type_hints(cls)
    below = {
        key: f"{part}.{key}" for part, of in hints.items() if dataclasses.is_dataclass(of) for key in of.__annotations__
    }
    known = {**below, **{key: key for key in hints}}
    close = difflib.get_close_matches(name, known, 1)
    return known[close[0]] if close else None


def _value(hint: Any, value: Any, where: str, key: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        number = _value(arguments[0], value, where, key)
        if (rule := arguments[1].fault(number)) is not None:
            raise _error(where, key, rule, value)
        return number
    if dataclasses.is_dataclass(hint):
        value = {} if value is None else value  # YAML reads an empty section or feature as null
        if not isinstance(value, Mapping):
            raise _error(where, key, "a mapping of keys", value)
        return parse(hint, value, where, key)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        return _union_value(arguments, value, where, key)
    if origin is Literal:
        if value not in arguments:
            raise _error(where, key, f"one of {list(arguments)}", value)
        return value
    if origin is list:
        if not isinstance(value, list):
            raise _error(where, key, "a list", value)
        return [_value(arguments[0], each, where, f"{key}[{n}]") for n, each in enumerate(value)]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _error(where, key, "a mapping of keys", value)
        return {str(name): _value(arguments[1], each, where, f"{key}.{name}") for name, each in value.items()}
    if hint is float and type(value) is int:
        return float(value) if abs(value) < 2**1023 else math.inf
    if hint is Any or (type(value) is hint):
        return value
    raise _error(where, key, _RULES[hint], value)


_RULES = {float: "a number", int: "an integer", bool: "true or false", str: "a string", type(None): "null"}


def _union_value(hints: Sequence[Any], value: Any, where: str, key: str) -> Any:
    if value is None and type(None) in hints:
        return None
    kinds = [hint for hint in hints if hint is not type(None)]
    if len(kinds) == 1 or (isinstance(value, list) and typing.get_origin(kinds[-1]) is list):
        return _value(kinds[-1], value, where, key)
    for hint in kinds:
        if type(value) is hint:
            return value
    rules = [_RULES.get(hint, "a list") for hint in kinds]
    raise _error(where, key, f"{', '.join(rules[:-1])} or {rules[-1]}", value)


def _error(where: str, key: str, rule: str, value: Any) -> ConfigError:
    hint = ""
    if isinstance(value, str) and rule.startswith(("a number", "an integer", "at least")):
        plain = value.replace("_", "")
        quoted = re.fullmatch(r"[-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?", plain) is not None
        hint = f"; write {plain}, without {'quotes' if plain == value else 'underscores'}" if quoted else ""
    elif isinstance(value, float) and rule == "an integer" and value.is_integer():
        hint = f"; write {int(value)}"
    elif rule == "a mapping of keys" and isinstance(value, str) and ".ops[" in key:
        hint = f"; write {{{value}: {{}}}}"
    elif rule.startswith("a string") and isinstance(value, int | float):
        hint = "; put it in quotes"
    return ConfigError(f"{where}: {key} must be {rule}, got {show_value(value)}{hint}")


def show_value(value: Any) -> str:
    """Return a value as shortened text for a message."""
    return "null" if value is None else reprlib.repr(value)


def kind_of(value: Any) -> str:
    """Return the YAML kind of a value."""
    return {str: "string", type(None): "null", int: "number", float: "number"}.get(type(value), type(value).__name__)
