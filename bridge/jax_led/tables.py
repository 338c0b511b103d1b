"""JaxTables: the lookups and updates of an EmbeddingEngine for JAX programs.

Legend: B samples, L ids per sample, U distinct ids, R rows of a size class, D dim.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
import torch

from recis_hybrid.bridge.exchange.dlpack import to_jax, to_torch
from recis_hybrid.validation import describe_value

_SMALLEST = 8
"""The smallest size class."""


class Engine(Protocol):
    """The part of ``EmbeddingEngine`` in use."""

    configs: dict[str, Any]
    """Configs by feature."""
    training: bool
    """True in training mode."""

    @property
    def share(self) -> float:
        """This rank's share of the samples of all ranks."""

    def train(self, mode: bool = True) -> Any:
        """Set training or evaluation mode."""

    def lookup(self, batch: Any) -> tuple[dict[str, torch.Tensor], Any]:
        """Return the vectors of a batch, and the context for :meth:`apply_gradients`."""

    def distinct(
        self, batch: Any, features: Iterable[str], room: Callable[[str, int], int]
    ) -> tuple[Any, dict[str, Any]]:
        """Replace columns by their distinct ids, and return the row of each id."""

    def apply_gradients(self, ctx: Any, gradients: Mapping[str, torch.Tensor], optimizer: Any) -> None:
        """Update the rows of a lookup."""

    def describe_non_finite(self, batch: Any, values: Mapping[str, torch.Tensor]) -> list[str]:
        """Describe the features whose vectors or gradients are not finite."""

    def add_gradients(self, ctx: Any, gradients: Mapping[str, torch.Tensor]) -> None:
        """Add the gradients of a lookup to those of the optimizer's next step."""

    def prefetch(self, batch: Any) -> None:
        """Start sending the ids of a later batch."""


@dataclass(frozen=True, eq=False)
class JaxLookup:
    """The context of a lookup, for :meth:`JaxTables.apply_gradients`."""

    index: dict[str, jax.Array]
    """By feature of ``rows``: the row of each id, int32 in the shape of the ids."""
    shapes: dict[str, tuple[int, ...]]
    """By feature: the shape of the vectors, and so of their gradient."""
    lookup: Any
    """The engine's own context."""
    columns: Any
    """The batch that the engine looked up."""


class JaxTables:
    """The tables of an EmbeddingEngine for a program led by JAX.

    Lookups and updates run between jitted calls and share memory with them: vectors come as arrays, and their gradients
    go back, without a copy. Tables, ids and the sparse optimizer stay in torch; ids have 64 bits there, whether
    ``jax_enable_x64`` is on or not.

    A feature's vectors are pooled as its config says, or, for features in ``rows``, they are the distinct rows of the
    batch: ``[R, dim]``, where R is a power of two, of at least 8 and more than the number of distinct ids. The rest is
    zeros, of which the last row is the one for missing ids. ``ctx.index`` maps ids to rows: inside jit,
    ``vectors[name][index[name]]`` is the vector of each id, and its gradient sums over equal ids. R never shrinks, so
    that a jitted function compiles at most once per feature and power of two.

    Args:
        engine: An ``EmbeddingEngine``.
        optimizer: An optimizer of ``recis_hybrid.optim`` for the engine, such as ``engine.make_optimizer(lr=0.1)``;
            None for lookups without updates.
        rows: Features whose vectors are distinct rows.

    Raises:
        TypeError: if ``engine`` is not an engine.
        ValueError: if a name in ``rows`` is not a feature.

    Example:
        >>> from recis_hybrid import embedding, optim
        >>> engine = embedding.EmbeddingEngine({"item": embedding.EmbeddingConfig(dim=4)}, optimizer=optim.SGD)
        >>> tables = JaxTables(engine, engine.make_optimizer(lr=1.0))
        >>> vectors, ctx = tables.lookup({"item": np.array([2**60, 7, 2**60])})
        >>> vectors["item"].shape
        (3, 4)
        >>> gradients = jax.grad(lambda vectors: vectors["item"].sum())(vectors)
        >>> tables.apply_gradients(ctx, gradients)
        >>> after, _ = tables.lookup({"item": np.array([2**60, 7])}, train=False)
        >>> jnp.round(after["item"] - vectors["item"][:2], 4).tolist()
        [[-2.0, -2.0, -2.0, -2.0], [-1.0, -1.0, -1.0, -1.0]]
    """

    def __init__(self, engine: Engine, optimizer: Any = None, *, rows: Collection[str] = ()) -> None:
        if isinstance(engine, type) or not hasattr(engine, "apply_gradients"):
            raise TypeError(f"JaxTables: engine must be an EmbeddingEngine, got {describe_value(engine)}")
        names = [rows] if isinstance(rows, str) else list(rows)
        if unknown := [name for name in names if name not in engine.configs]:
            raise ValueError(f"JaxTables: rows must be features of the engine, {sorted(engine.configs)}, got {unknown}")
        self.engine = engine
        self.optimizer = optimizer
        self.rows = tuple(dict.fromkeys(names))
        """Features whose vectors are distinct rows."""
        self._classes: dict[str, int] = {}
        # Prefetching recognizes a batch by its columns, so converted ones are kept until the lookup.
        self._prefetched: list[tuple[Any, tuple[Any, dict[str, Any]]]] = []

    def lookup(self, batch: Mapping[str, Any], *, train: bool = True) -> tuple[dict[str, jax.Array], JaxLookup]:
        """Look up a batch, outside jit.

        Args:
            batch: By feature, a column of ids: numpy int64 or int32; JAX int32, or int64 with x64 on; or whatever
                ``EmbeddingEngine.forward`` takes, such as tensors and RaggedTensors. A uint32 array of numpy or JAX is
                a pair of words for each id, ``(…, 2)``, the low one first; numpy makes it of contiguous int64 ids with
                ``ids.view(np.uint32).reshape(*ids.shape, 2)``. Note that JAX itself cuts int64 ids to 32 bits when it
                makes an array of them while x64 is off, and nobody can tell afterwards.
            train: True to insert new ids and allow updates; sets the engine's mode.

        Returns:
            The vectors by feature, float32: in the shape of ``EmbeddingEngine.forward``, or ``[R, dim]`` for features
            in ``rows``; and the context for :meth:`apply_gradients`. Its ``index`` has the shape of dense ids; for a
            RaggedTensor it is ``[lists, R']``, with the last row for places beyond a list, and R' a power of two.

        Raises:
            KeyError: if the batch lacks a feature.
            TypeError: if ids are not integers, or are traced by jit, grad or vmap.
            ValueError: if shapes are wrong.
        """
        columns, places = self._take(batch)
        if self.engine.training != train:
            self.engine.train(train)
        values, found = self.engine.lookup(columns)
        index = {name: to_jax(self._dense(name, place, values[name].shape[0] - 1)) for name, place in places.items()}
        vectors = {name: to_jax(value) for name, value in values.items()}
        return vectors, JaxLookup(index, {name: vector.shape for name, vector in vectors.items()}, found, columns)

    def apply_gradients(self, ctx: JaxLookup, gradients: Mapping[str, jax.Array]) -> None:
        """Update the rows of a lookup with one step of the sparse optimizer, outside jit.

        The result is bitwise that of autograd and ``optimizer.step()`` in torch with the same gradients.

        Args:
            ctx: The context of the lookup.
            gradients: By feature, the gradient of the vectors that :meth:`lookup` returned, float32 in their shape.
                Frozen features need none. A feature that the loss does not use has a gradient of zeros in JAX, with
                which optimizers with momentum or weight decay change its rows; torch would skip them.

        Raises:
            KeyError: if a gradient is missing, or belongs to no feature.
            RuntimeError: if rows were removed or moved since the lookup, or it was in evaluation mode.
            TypeError: if a gradient is not a float32 array, or there is no optimizer.
            ValueError: if a gradient has another shape than the vectors.
        """
        self.engine.apply_gradients(ctx.lookup, _tensors("apply_gradients", ctx, gradients), self.optimizer)

    def add_gradients(self, ctx: JaxLookup, gradients: Mapping[str, jax.Array]) -> None:
        """Add the gradients of a lookup to those of the next ``tables.optimizer.step()``, which applies their sum.

        So several batches share one update; scale each batch's gradients by its share of the samples for their mean.

        Args:
            ctx: As for :meth:`apply_gradients`.
            gradients: As for :meth:`apply_gradients`.

        Raises:
            KeyError: As for :meth:`apply_gradients`.
            RuntimeError: As for :meth:`apply_gradients`.
            TypeError: As for :meth:`apply_gradients`.
            ValueError: As for :meth:`apply_gradients`.
        """
        if self.optimizer is None:
            raise TypeError("add_gradients: the tables have no optimizer; build JaxTables(engine, optimizer)")
        self.engine.add_gradients(ctx.lookup, _tensors("add_gradients", ctx, gradients))

    def describe_non_finite(self, ctx: JaxLookup, values: Mapping[str, jax.Array]) -> list[str]:
        """Describe the features whose vectors or gradients contain NaN or infinities: table, vectors, first ids.

        Args:
            ctx: The context of the lookup.
            values: By feature, values in the shape of its vectors.
        """
        tensors = {name: to_torch(value) for name, value in values.items()}
        return self.engine.describe_non_finite(ctx.columns, tensors)

    def prefetch(self, batch: Mapping[str, Any]) -> None:
        """Start sending the ids of a later training batch to the ranks that own them; nothing on one process.

        Args:
            batch: The object that :meth:`lookup` gets later, in the order of the calls.

        Raises:
            RuntimeError: if the engine's ``prefetch_depth`` batches are prefetched already.
        """
        columns, places = self._prepared(batch)
        self.engine.train()
        with torch.no_grad():  # the mode in which the lookup will run
            self.engine.prefetch(columns)
        if columns is not batch:
            self._prefetched.append((batch, (columns, places)))

    def _take(self, batch: Any) -> tuple[Any, dict[str, Any]]:
        """Return the prefetched columns and places of a batch, or prepare them."""
        for number, (known, prepared) in enumerate(self._prefetched):
            if known is batch:
                del self._prefetched[: number + 1]
                return prepared
        return self._prepared(batch)

    def _prepared(self, batch: Any) -> tuple[Any, dict[str, Any]]:
        """Return the batch for the engine, and the row of each id for features in ``rows``."""
        if not isinstance(batch, Mapping):
            return batch, {}  # refused by the engine
        pairs = {
            name: _joined(name, batch[name])
            for name in self.engine.configs
            if type(batch.get(name)) is not torch.Tensor and _is_pairs(batch.get(name))
        }
        columns = {**batch, **pairs} if pairs else batch
        return self.engine.distinct(columns, self.rows, self._class_of) if self.rows else (columns, {})

    def _class_of(self, key: str, size: int) -> int:
        """Return the size class for more than ``size`` items, which never shrinks."""
        self._classes[key] = max(self._classes.get(key, _SMALLEST), 1 << size.bit_length())
        return self._classes[key]

    def _dense(self, name: str, place: Any, missing: int) -> torch.Tensor:
        """Return the row of each id as a dense tensor; lists end in ``missing``."""
        if isinstance(place, torch.Tensor):
            return place
        longest = int(place.lengths().max()) if place.batch_size else 0
        length = self._class_of(f"{name}, length", max(longest - 1, 0))
        return cast(torch.Tensor, place.to_padded(length, padding=missing))


def _tensors(where: str, ctx: JaxLookup, gradients: Mapping[str, jax.Array]) -> dict[str, torch.Tensor]:
    """Return gradients as tensors in the same memory, after checking dtypes and shapes."""
    for name, gradient in gradients.items():
        if not isinstance(gradient, jax.Array) or gradient.dtype != jnp.float32:
            kind = getattr(gradient, "dtype", None) or describe_value(gradient)
            raise TypeError(
                f"{where}: feature {name!r}: the gradient must be a float32 JAX array, got {kind}; differentiate with "
                "respect to the vectors of lookup"
            )
        if name in ctx.shapes and gradient.shape != ctx.shapes[name]:
            raise ValueError(
                f"{where}: feature {name!r}: the gradient must have the shape of the vectors, "
                f"{list(ctx.shapes[name])}, got {list(gradient.shape)}; differentiate with respect to the vectors of "
                "the same lookup"
            )
    return {name: to_torch(gradient) for name, gradient in gradients.items()}


def _is_pairs(column: object) -> bool:
    """Return whether a column is an array of 32-bit words. The engine refuses traced ones."""
    is_array = isinstance(column, np.ndarray | jax.Array) and not isinstance(column, jax.core.Tracer)
    return is_array and cast(Any, column).dtype == np.uint32


def _joined(name: str, words: Any) -> torch.Tensor:
    """Return the int64 ids of pairs of words."""
    if words.ndim < 2 or words.shape[-1] != 2:
        raise ValueError(
            f"feature {name!r}: uint32 ids must be pairs of words, (…, 2), got {list(words.shape)}; convert int64 ids "
            "with ids.view(numpy.uint32).reshape(*ids.shape, 2), and 32-bit ids to int32 or numpy int64"
        )
    tensor = to_torch(words) if isinstance(words, jax.Array) else torch.from_numpy(np.ascontiguousarray(words))
    if tensor.numel() == 0:  # strides of empty tensors are arbitrary
        return torch.empty(words.shape[:-1], dtype=torch.int64)
    return tensor.contiguous().view(torch.int64).squeeze(-1)
