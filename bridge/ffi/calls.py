"""Lookups and updates of an engine's tables inside jit.

Legend: B samples, L ids per sample, n ids, V vectors, D dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from recis_hybrid.bridge.ffi.primitives import TableCall, apply, look_up
from recis_hybrid.bridge.ffi.tables import JitTables, combiner_of
from recis_hybrid.bridge.ffi.words import words
from recis_hybrid.validation import check_type, describe_value


class _Call(NamedTuple):
    """The static part of a lookup."""

    tables: tuple[TableCall, ...]
    """The calls of the tables that have features in the lookup."""
    trained: tuple[bool, ...]
    """For each of them, True if gradients change it."""


@partial(jax.tree_util.register_dataclass, data_fields=["contexts"], meta_fields=["call", "shapes"])
@dataclass(frozen=True)
class JitLookup:
    """The rows of a lookup, for :func:`update`; a pytree, which jitted functions may return and loops may carry."""

    contexts: tuple[jax.Array, ...]
    """For each table, the lookup's positions grouped by row, uint32."""
    call: _Call
    """The static part."""
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    """Features, and the shapes of their vectors."""


def lookup(
    tables: JitTables,
    ids: Mapping[str, Any],
    offsets: Mapping[str, Any] | None,
    token: Any,
    *,
    train: bool = True,
) -> tuple[dict[str, jax.Array], JitLookup, jax.Array]:
    """Look up ids inside jit.

    With ``jax.grad`` or ``jax.vjp``, the gradient with respect to ``token`` is the token of an update by the gradients
    of the vectors: differentiate with respect to token and parameters, and the backward pass updates the tables.
    Without, call :func:`update`.

    Args:
        tables: The tables, lent by :meth:`JitTables.begin`.
        ids: By feature: int32 ``[B]``, ``[B, L]`` or ``[B, L, K]``, whose last axis is a bag (of one id for ``[B]``);
            with ``offsets``, ``[n]``. uint32 arrays ``(…, 2)`` are ids of 64 bits, the low word first; with
            ``jax_enable_x64``, int64 and uint64 arrays are, too. numpy int64 is accepted where it is not traced.
        offsets: By feature with ragged ids: int32 or int64 ``[V + 1]``, where the bags begin and end in ``ids``, which
            may be longer; None: all bags are dense.
        token: The token of the call before, float32 ``[2]``.
        train: Insert ids that have no row. Otherwise, nothing is changed, and there are no gradients.

    Returns:
        The vectors by feature, float32: ``[B, D]``, ``[B, L, D]`` for ids ``[B, L, K]``, or ``[V, D]``; with the
        combiner None, one for each id. The lookup, for :func:`update`. The token.

    Raises:
        KeyError: If a feature is missing or unknown.
        NotImplementedError: If it is in vmap, pmap or shard_map, or compiled for several devices.
        TypeError: If ids or offsets have the wrong dtype.
        ValueError: If they have the wrong shape.
    """
    check_type("ffi.lookup", "tables", tables, JitTables, "JitTables(engine, optimizer)")
    if token is None or getattr(token, "shape", None) != (2,) or token.dtype != jnp.float32:
        raise TypeError(
            f"ffi.lookup: token must be the float32 [2] of JitTables.begin or of the call before, got "
            f"{describe_value(token)}"
        )
    offsets = {} if offsets is None else offsets
    _check_names(tables, ids, offsets)
    calls, trained, id_words, offset_words, shapes = [], [], [], [], []
    for number, (plan, table) in enumerate(zip(tables.engine.plans, tables.engine.tables, strict=True)):
        columns = [
            _column(name, member, tables.engine.configs[name], ids[name], offsets.get(name))
            for name, member in plan.features.items()
            if name in ids
        ]
        if not columns:
            continue
        inserts = train and not table.read_only
        calls.append(_table_call(tables, number, table, columns, inserts))
        trained.append(inserts and tables.trained[number])
        id_words.append(tuple(column.ids for column in columns))
        offset_words.append(tuple(column.offsets for column in columns if column.offsets is not None))
        shapes += [(column.name, column.shape) for column in columns]
    call = _Call(tuple(calls), tuple(trained))
    vectors, contexts, token = _lookup(call, token, tuple(id_words), tuple(offset_words))
    named = {name: values.reshape(shape) for (name, shape), values in zip(shapes, vectors, strict=True)}
    return {name: named[name] for name in ids}, JitLookup(contexts, call, tuple(shapes)), token


def update(tables: JitTables, ctx: JitLookup, gradients: Mapping[str, Any], token: Any) -> jax.Array:
    """Update the rows of a lookup inside jit: one step of the optimizer.

    The token must become an output of the jitted function, or XLA drops the update.

    Args:
        tables: The tables of the lookup.
        ctx: The result of :func:`lookup` with ``train=True``.
        gradients: By feature, the gradient of the vectors, float32 in their shape. Features of read-only tables need
            none.
        token: The token of the call before, float32 ``[2]``.

    Returns:
        The token.

    Raises:
        KeyError: If a gradient is missing, or belongs to no feature of the lookup.
        NotImplementedError: As for :func:`lookup`.
        RuntimeError: If the lookup was not a training lookup, or there is no optimizer.
        TypeError: If a gradient is not float32, or it is differentiated.
        ValueError: If a gradient has another shape than the vectors.
    """
    check_type("ffi.update", "tables", tables, JitTables, "JitTables(engine, optimizer)")
    shapes = dict(ctx.shapes)
    if tables.optimizer is None:
        raise RuntimeError("ffi.update: the tables have no optimizer; build JitTables(engine, optimizer)")
    if unknown := sorted(set(gradients) - set(shapes)):
        raise KeyError(f"ffi.update: got gradients for {unknown}; the lookup has {sorted(shapes)}")
    for name, gradient in gradients.items():
        if gradient.dtype != jnp.float32 or gradient.shape != shapes[name]:
            kind = TypeError if gradient.dtype != jnp.float32 else ValueError
            raise kind(
                f"ffi.update: feature {name!r}: the gradient must be float32 {list(shapes[name])} as the vectors, got "
                f"{gradient.dtype} {list(gradient.shape)}"
            )
    values = {name: gradient.reshape(-1, shapes[name][-1]) for name, gradient in gradients.items()}
    for call, trained, context in zip(ctx.call.tables, ctx.call.trained, ctx.contexts, strict=True):
        if not trained and not tables.engine.tables[call.table].read_only:
            raise RuntimeError("ffi.update: the lookup was made with train=False, and takes no gradients")
        if missing := [name for name in call.features if trained and name not in values]:
            raise KeyError(f"ffi.update: no gradient for the features {missing}")
        if trained:
            token = apply(call, token, context, [values[name] for name in call.features])
    return cast(jax.Array, token)


class _Column(NamedTuple):
    """The ids of a feature, as words."""

    name: str
    member: int
    combiner: int
    zeros: bool
    ids: Any
    offsets: Any | None
    length: int
    vectors: int
    shape: tuple[int, ...]


def _check_names(tables: JitTables, ids: Mapping[str, Any], offsets: Mapping[str, Any]) -> None:
    configs = tables.engine.configs
    if unknown := sorted((set(ids) | set(offsets)) - set(configs)):
        raise KeyError(f"ffi.lookup: {unknown} are not features of the engine, which has {sorted(configs)}")
    if missing := [name for name, config in configs.items() if name not in ids and not config.optional]:
        raise KeyError(f"ffi.lookup: no ids for the features {missing}")


def _column(name: str, member: int, config: Any, ids: Any, offsets: Any | None) -> _Column:
    flat, shape = words(f"feature {name!r}: ids", ids)
    zeros, combiner = config.unknown == "zeros", combiner_of(config)
    if offsets is not None:
        ends, extent = words(f"feature {name!r}: offsets", offsets)
        if len(shape) != 1 or len(extent) != 1 or extent[0] < 1:
            raise ValueError(
                f"feature {name!r}: ids with offsets must be [n] and offsets [V + 1], got {list(shape)} and "
                f"{list(extent)}"
            )
        if config.combiner is None:
            return _Column(name, member, combiner, zeros, flat, None, shape[0], shape[0], (shape[0], config.dim))
        vectors = extent[0] - 1
        return _Column(name, member, combiner, zeros, flat, ends, shape[0], vectors, (vectors, config.dim))
    if not 1 <= len(shape) <= 3:
        raise ValueError(f"feature {name!r}: ids must be [B], [B, L] or [B, L, K], got {list(shape)}")
    bags, length = (shape, 1) if len(shape) == 1 else (shape[:-1], shape[-1])
    count = int(np.prod(shape))
    if config.combiner is None:
        return _Column(name, member, combiner, zeros, flat, None, count, count, (*shape, config.dim))
    vectors = int(np.prod(bags))
    ends = None if length == 1 else words("offsets", np.arange(vectors + 1, dtype=np.int64) * length)[0]
    return _Column(name, member, combiner, zeros, flat, ends, count, vectors, (*bags, config.dim))


def _table_call(tables: JitTables, number: int, table: Any, columns: Sequence[_Column], inserts: bool) -> TableCall:
    names, members, combiners, zeros, _, offsets, lengths, vectors, _ = zip(*columns, strict=True)
    has_offsets = tuple(part is not None for part in offsets)
    dim = table.layout.dim
    return TableCall(
        tables.chain,
        number,
        table.name,
        names,
        members,
        combiners,
        zeros,
        lengths,
        vectors,
        has_offsets,
        dim,
        inserts,
        tables.platform,
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(call: _Call, token: Any, ids: Any, offsets: Any) -> tuple[list[Any], tuple[Any, ...], Any]:
    """Return the vectors of all features, the contexts of all tables, and the token."""
    vectors: list[Any] = []
    contexts = []
    for table, of_table, ends in zip(call.tables, ids, offsets, strict=True):
        token, context, values = look_up(table, token, of_table, ends)
        contexts.append(context)
        vectors += values
    return vectors, tuple(contexts), token


def _forward(call: _Call, token: Any, ids: Any, offsets: Any) -> tuple[Any, Any]:
    vectors, contexts, token = _lookup(call, token, ids, offsets)
    return (vectors, contexts, token), (contexts, token)


def _backward(call: _Call, residuals: Any, cotangents: Any) -> tuple[Any, None, None]:
    contexts, token = residuals
    gradients, _, later = cotangents
    # The gradient of a token is the token of the updates of later lookups, or zeros if there are none.
    token = jnp.where(later[0] > 0, later, token)
    first = 0
    for table, trained, context in zip(call.tables, call.trained, contexts, strict=True):
        count = len(table.features)
        if trained:
            token = apply(table, token, context, gradients[first : first + count])
        first += count
    return token, None, None


_lookup.defvjp(_forward, _backward)
