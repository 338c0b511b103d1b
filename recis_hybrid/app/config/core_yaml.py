"""YAML with the core schema of version 1.2, without the surprises of YAML 1.1; duplicate keys are errors.

References:
    YAML 1.2.2, chapter 10.3: the core schema. https://yaml.org/spec/1.2.2/
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from typing import Any, ClassVar

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

_LIMIT = 1_000_000
_TAG = "tag:yaml.org,2002:"
_NUMBER = "-+0123456789."
# Tag, pattern, and possible first characters.
_CORE = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list(_NUMBER)),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list(_NUMBER),
    ),
    ("merge", r"<<", ["<"]),
)


def read_yaml(text: str | bytes, name: str = "text") -> Any:
    """Return the value of a YAML document.

    Scalars follow YAML 1.2: ``no``, ``1:30``, ``1_000`` and dates are strings, ``012`` and ``0o14`` are 12, ``1e-3`` is
    a number. Keys of mappings are strings as written. A duplicate key in a mapping is refused, but a key may replace
    one from a merge key (``<<: *defaults``).

    Args:
        text: One document; bytes may be UTF-8 or UTF-16 with a byte order mark.
        name: Name of the document in errors.

    Returns:
        Plain dicts, lists, strings, ints, floats, bools and None.

    Raises:
        yaml.YAMLError: The text is not valid; the message names the position.

    Example:
        >>> read_yaml("no: 1e-3, ")
        {'no': '1e-3,'}
        >>> read_yaml("{012: 012, on: [yes, 0o14, 1_000]}")
        {'012': 12, 'on': ['yes', 12, '1_000']}
    """
    loader = _Loader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    except RecursionError:
        raise yaml.YAMLError("lists and mappings are nested too deeply") from None
    finally:
        loader.dispose()


def write_yaml(value: Any) -> str:
    r"""Return plain values as YAML that :func:`read_yaml` and YAML 1.1 parsers read back unchanged.

    Args:
        value: Dicts with string keys, lists, strings, ints, floats, bools and None.

    Example:
        >>> write_yaml({"a": ["1e3", "no", 1e-5]})
        "a:\n- '1e3'\n- 'no'\n- 1.0e-05\n"
    """
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes strings that YAML 1.1 or 1.2 would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _Loader(yaml.SafeLoader):
    # Set below. SafeLoader's resolvers and constructors follow YAML 1.1.
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]
    yaml_constructors: ClassVar[dict[str | None, Any]] = {}

    def process_directives(self) -> Any:
        tags = super().process_directives()  # type: ignore[no-untyped-call]
        if self.yaml_version not in (None, (1, 2)):
            version = ".".join(map(str, self.yaml_version))
            raise ConstructorError(
                None, None, f"%YAML {version}: files are read as YAML 1.2; write %YAML 1.2, or remove the line"
            )
        return tags

    def get_single_node(self) -> Node | None:
        node: Node | None = super().get_single_node()
        if node is not None:
            _refuse_expansion(node)
            for each in _distinct(node):
                if isinstance(each, MappingNode):
                    _refuse_duplicates(each)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        if not isinstance(node, MappingNode):
            raise ConstructorError(None, None, f"expected a mapping, but found a {node.id}", node.start_mark)
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}


def _refuse_duplicates(node: MappingNode) -> None:
    """Raise for a key that is not a scalar, or a duplicate key, before merge keys are applied."""
    seen: dict[str, Any] = {}
    for key, _ in node.value:
        if not isinstance(key, ScalarNode):
            raise ConstructorError(None, None, "a key must be a string, not a list or a mapping", key.start_mark)
        if key.value in seen:
            raise ConstructorError(
                f"the key {key.value!r} occurs twice in a mapping, first",
                seen[key.value],
                "and again here; remove one",
                key.start_mark,
            )
        seen[key.value] = key.start_mark


def _children(node: Node) -> Iterator[Node]:
    if isinstance(node, MappingNode):
        for key, value in node.value:
            yield key
            yield value
    elif isinstance(node, SequenceNode):
        yield from node.value


def _distinct(root: Node) -> list[Node]:
    nodes: dict[int, Node] = {}
    stack = [root]
    while stack:
        node = stack.pop()
        if id(node) not in nodes:
            nodes[id(node)] = node
            stack += _children(node)
    return list(nodes.values())


def _refuse_expansion(root: Node) -> None:
    """Raise if an anchor contains itself, or nested aliases expand to more than a million values."""
    sizes: dict[int, int | None] = {}

    def size(node: Node) -> int:
        if isinstance(node, ScalarNode):
            return 1
        known = sizes.get(id(node), 0)
        if known is None:
            raise ConstructorError(None, None, "an anchor contains itself", node.start_mark)
        if not known:
            sizes[id(node)] = None
            known = sizes[id(node)] = 1 + sum(map(size, _children(node)))
            if known > _LIMIT:
                raise ConstructorError(
                    None, None, f"aliases expand to more than {_LIMIT:,} values; use fewer", node.start_mark
                )
        return known

    size(root)


def _int(loader: _Loader, node: Any) -> int:
    text = loader.construct_scalar(node)
    try:
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    except ValueError:
        raise ConstructorError(None, None, f"{text[:40]!r} is not an integer", node.start_mark) from None


def _float(loader: _Loader, node: Any) -> float:
    text = loader.construct_scalar(node)
    try:
        return float(re.sub(r"\.(inf|nan)$", r"\1", text.lower()))
    except ValueError:
        raise ConstructorError(None, None, f"{text[:40]!r} is not a number", node.start_mark) from None


def _bool(loader: _Loader, node: Any) -> bool:
    text = loader.construct_scalar(node).lower()
    if text not in ("true", "false"):
        raise ConstructorError(None, None, f"{text[:40]!r} is neither true nor false", node.start_mark)
    return bool(text == "true")


def _unknown(loader: _Loader, node: Any) -> None:
    raise ConstructorError(
        None, None, f"unknown tag {node.tag!r}; remove it, and put strings in quotes", node.start_mark
    )


for _name, _pattern, _first in _CORE:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{_TAG}{_name}", re.compile(rf"(?:{_pattern})$"), _first)
_Loader.yaml_constructors |= {
    f"{_TAG}null": lambda loader, node: None,
    f"{_TAG}bool": _bool,
    f"{_TAG}int": _int,
    f"{_TAG}float": _float,
    f"{_TAG}str": _Loader.construct_scalar,
    f"{_TAG}merge": _Loader.construct_scalar,  # ``<<`` as a value
    f"{_TAG}seq": lambda loader, node: loader.construct_sequence(node, deep=True),
    f"{_TAG}map": lambda loader, node: loader.construct_mapping(node, deep=True),
    None: _unknown,
}
