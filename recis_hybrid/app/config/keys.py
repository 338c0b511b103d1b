"""Text of ``--help`` on the keys of a configuration: types, defaults and meanings."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING
from typing import Annotated, Any, Literal, Union

import yaml

from recis_hybrid.app.config.schema import Config

_KINDS = {int: "integer", float: "number", bool: "true | false", str: "string", types.NoneType: "null"}


def describe_keys() -> str:
    """Return a line for each key, followed by its meaning.

    Example:
        >>> print(describe_keys().splitlines()[2])
          data.train: string | list of string
    """
    lines = []
    for key, kind, default, text in _keys(Config, ""):
        lines.append(f"  {key}: {kind}" + (f" ({default})" if default else ""))
        lines += textwrap.wrap(text, 96, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)


def _keys(cls: type, prefix: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield each key, its type, its default ("" if it is required), and its meaning."""
    hints, texts = typing.get_type_hints(cls, include_extras=True), _texts(cls)
    for each in dataclasses.fields(cls):
        hint = hints[each.name]
        inner = typing.get_args(hint)[1] if typing.get_origin(hint) is dict else hint
        if dataclasses.is_dataclass(inner):
            yield from _keys(inner, f"{prefix}{each.name}." + ("NAME." if inner is not hint else ""))  # type: ignore[arg-type]
            continue
        default = each.default if each.default_factory is MISSING else each.default_factory()
        shown = "" if default is MISSING else yaml.safe_dump(default, default_flow_style=True).splitlines()[0]
        text = texts[each.name].replace("``", "").replace("None", "null")  # YAML's spelling
        yield f"{prefix}{each.name}", _kind(hint), shown, text


def _texts(cls: type) -> dict[str, str]:
    """Return the docstrings under the fields of a dataclass, which Python discards."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    found = {}
    for field, below in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            found[field.target.id] = inspect.cleandoc(ast.literal_eval(below.value))
    return found


def _kind(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return f"{_kind(arguments[0])}, {arguments[1]}"
    if origin in (Union, types.UnionType):
        return " | ".join(_kind(each) for each in arguments)
    if origin is Literal:
        return " | ".join(arguments)
    if origin is list:
        return f"list of {_kind(arguments[0])}"
    return "mapping" if origin is dict else _KINDS[hint]
