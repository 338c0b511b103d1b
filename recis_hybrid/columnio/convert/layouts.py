"""Conversion of Arrow's less common layouts to plain ones, and access to fields of structs. Imports pyarrow.

Plain types are numbers, dates and times, strings, structs, and lists of these. Dictionaries, run-end encoding, views
and extension types are decoded, and a map becomes a list of structs of ``key`` and ``value``. Plain arrays are not
copied.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from recis_hybrid.columnio.convert.numbers import Array, ArrowType

_types = pa.types


@lru_cache(maxsize=4096)
def plain_type(arrow_type: ArrowType) -> ArrowType:
    """Return the type of ``plain(array)`` for an array of ``arrow_type``."""
    if isinstance(arrow_type, pa.BaseExtensionType):
        return pa.bool_() if _is_bool8(arrow_type) else plain_type(arrow_type.storage_type)
    if _types.is_dictionary(arrow_type) or _types.is_run_end_encoded(arrow_type):
        return plain_type(arrow_type.value_type)
    if _types.is_string_view(arrow_type):
        return pa.large_string()
    if _types.is_binary_view(arrow_type) or _types.is_fixed_size_binary(arrow_type):
        return pa.large_binary()
    if _types.is_map(arrow_type):
        return pa.list_(_pair(plain_type(arrow_type.key_type), plain_type(arrow_type.item_type)))
    if _types.is_struct(arrow_type):
        return pa.struct([field.with_type(plain_type(field.type)) for field in arrow_type])
    if _types.is_list_view(arrow_type):
        return pa.list_(plain_type(arrow_type.value_type))
    if _types.is_large_list_view(arrow_type):
        return pa.large_list(plain_type(arrow_type.value_type))
    if is_list(arrow_type):
        return _list_of(arrow_type, plain_type(arrow_type.value_type))
    return arrow_type


def plain(array: Array) -> Array:
    """Return an array in the layout of ``plain_type``; the array itself if it is plain already."""
    array_type = array.type
    if not _differs(array_type):
        return array
    if isinstance(array_type, pa.BaseExtensionType):
        return pc.not_equal(array.storage, 0) if _is_bool8(array_type) else plain(array.storage)
    if _types.is_dictionary(array_type):
        values = array.dictionary
        decodable = pa.DictionaryArray.from_arrays(array.indices, plain(values)) if _differs(values.type) else array
        return decodable.dictionary_decode()
    if _types.is_run_end_encoded(array_type):
        return plain(pc.run_end_decode(array))
    if _types.is_map(array_type):
        return plain(array.cast(pa.list_(_pair(array_type.key_type, array_type.item_type))))
    if _types.is_struct(array_type):
        children = [plain(array.field(number)) for number in range(array_type.num_fields)]
        return pa.StructArray.from_arrays(children, fields=list(plain_type(array_type)), mask=_mask(array))
    if _types.is_list_view(array_type) or _types.is_large_list_view(array_type):
        # A cast by pyarrow loses the offsets of null lists.
        offsets = pc.cumulative_sum(pc.fill_null(pc.list_value_length(array), 0))
        offsets = pa.concat_arrays([pa.array([0], offsets.type), offsets])
        array_class = pa.LargeListArray if _types.is_large_list_view(array_type) else pa.ListArray
        return array_class.from_arrays(offsets, plain(array.flatten()), mask=_mask(array))
    if is_list(array_type):
        return _with_values(array, plain)
    return array.cast(plain_type(array_type))


def is_list(arrow_type: ArrowType) -> bool:
    """Return whether a plain type is a list type."""
    tests = (_types.is_list, _types.is_large_list, _types.is_fixed_size_list)
    return any(test(arrow_type) for test in tests)


def has_null_type(arrow_type: ArrowType) -> bool:
    """Return whether a plain type is the null type, or contains it."""
    if is_list(arrow_type):
        return has_null_type(arrow_type.value_type)
    if _types.is_struct(arrow_type):
        return any(has_null_type(field.type) for field in arrow_type)
    return bool(_types.is_null(arrow_type))


def field_type(arrow_type: ArrowType, path: tuple[str, ...]) -> ArrowType | None:
    """Return the type of the result of ``field``; None if there is no such field."""
    if not path:
        return arrow_type
    if is_list(arrow_type):
        inner = field_type(arrow_type.value_type, path)
        return None if inner is None else _list_of(arrow_type, inner)
    if _types.is_null(arrow_type):
        return arrow_type
    if not _types.is_struct(arrow_type) or arrow_type.get_field_index(path[0]) < 0:
        return None
    return field_type(arrow_type.field(path[0]).type, path[1:])


def field(array: Array, path: tuple[str, ...]) -> Array:
    """Return a field of structs, or lists of the field for lists of structs.

    Args:
        array: A plain array.
        path: Names of fields, the outermost first.

    Returns:
        An array of the same length; the field of a null struct is null.
    """
    if not path or _types.is_null(array.type):
        return array
    if is_list(array.type):
        return _with_values(array, lambda values: field(values, path))
    return field(pc.struct_field(array, [array.type.get_field_index(path[0])]), path[1:])


def resolve(schema: Any, name: str) -> tuple[str, tuple[str, ...]] | None:
    """Find a column by name, or a field by dotted path.

    Args:
        schema: A schema of plain types.
        name: Name of a column, or ``"column.field"`` to any depth.

    Returns:
        The column and the path in it; None if there is no such column.
    """
    if name in schema.names:
        return name, ()
    for column in schema.names:
        if name.startswith(f"{column}.") and schema.names.count(column) == 1:
            path = _path(schema.field(column).type, name[len(column) + 1 :])
            if path is not None:
                return column, path
    return None


def nested_names(schema: Any) -> list[str]:
    """Return the dotted paths of all fields of structs outside lists."""
    names: list[str] = []

    def below(prefix: str, arrow_type: ArrowType) -> None:
        if _types.is_struct(arrow_type):
            for each in arrow_type:
                names.append(f"{prefix}.{each.name}")
                below(names[-1], each.type)

    for each in schema:
        below(each.name, each.type)
    return [name for name in dict.fromkeys(names) if name not in schema.names]


def _path(arrow_type: ArrowType, rest: str) -> tuple[str, ...] | None:
    while is_list(arrow_type):
        arrow_type = arrow_type.value_type
    if _types.is_null(arrow_type):
        # A column of only nulls may have any field.
        return tuple(rest.split("."))
    if not _types.is_struct(arrow_type):
        return None
    for each in arrow_type:
        if rest == each.name:
            return (each.name,)
        if rest.startswith(f"{each.name}."):
            further = _path(each.type, rest[len(each.name) + 1 :])
            if further is not None:
                return (each.name, *further)
    return None


def _with_values(array: Array, change: Any) -> Array:
    """Return lists of the same lengths with changed values; only values inside lists are passed to ``change``."""
    array_type, mask = array.type, _mask(array)
    if _types.is_fixed_size_list(array_type):
        values = change(array.values.slice(array.offset * array_type.list_size, len(array) * array_type.list_size))
        return pa.FixedSizeListArray.from_arrays(values, array_type.list_size, mask=mask)
    offsets = array.offsets
    first, last = offsets[0].as_py(), offsets[-1].as_py()
    values = change(array.values.slice(first, last - first))
    array_class = pa.LargeListArray if _types.is_large_list(array_type) else pa.ListArray
    return array_class.from_arrays(pc.subtract(offsets, offsets[0]), values, mask=mask)


def _list_of(arrow_type: ArrowType, inner: ArrowType) -> ArrowType:
    if inner == arrow_type.value_type:
        return arrow_type
    if _types.is_fixed_size_list(arrow_type):
        return pa.list_(inner, arrow_type.list_size)
    return pa.large_list(inner) if _types.is_large_list(arrow_type) else pa.list_(inner)


def _pair(key: ArrowType, value: ArrowType) -> ArrowType:
    return pa.struct([("key", key), ("value", value)])


def _mask(array: Array) -> Array | None:
    return array.is_null() if array.null_count else None


def _differs(arrow_type: ArrowType) -> bool:
    return bool(arrow_type != plain_type(arrow_type))


def _is_bool8(arrow_type: ArrowType) -> bool:
    return getattr(arrow_type, "extension_name", None) == "arrow.bool8"
