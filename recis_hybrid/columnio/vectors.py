"""Ids with vectors that were computed elsewhere, read from files in chunks.

Letters: n rows of a chunk, N rows of the files, D elements of a vector.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from recis_hybrid.columnio.dataset import ColumnDataset
from recis_hybrid.columnio.errors import BadFileError
from recis_hybrid.columnio.options import ShardOptions
from recis_hybrid.ragged import RaggedTensor
from recis_hybrid.validation import check_integer

if TYPE_CHECKING:
    from recis_hybrid.columnio.files.paths import Paths

_Slice: TypeAlias = Callable[[int, int], Tensor]
"""Returns the rows of an array from a first one to one before a last one."""


def read_vectors(
    path: Paths, *, ids: str | os.PathLike[str], vectors: str | None = None, chunk_rows: int = 65_536
) -> Iterator[tuple[Tensor, Tensor]]:
    """Read ids and their vectors from files, for :meth:`EmbeddingEngine.load_rows`.

    Every process reads all rows, also if several ranks train together.

    Args:
        path: Files with a column of ids and a column of lists of D numbers, in any form that :class:`ColumnDataset`
            reads, e.g. Parquet; or one ``.safetensors`` file; or a ``.npy`` file of vectors ``[N, D]``.
        ids: Name of the column or tensor of ids; for a ``.npy`` file, the path of another one with the ids ``[N]``.
        vectors: Name of the column or tensor of vectors; None for a ``.npy`` file.
        chunk_rows: Rows read at a time, n.

    Returns:
        An iterator of chunks: ids, int64 ``[n]``, and vectors ``[n, D]`` in the dtype of the file. Files are opened,
        and the columns are checked, before this function returns.

    Raises:
        BadFileError: A file is damaged.
        FileNotFoundError: A file does not exist.
        TypeError: The ids are not integers, or the vectors are not lists of numbers.
        ValueError: A column is missing, rows have different numbers of elements, or there are not as many ids as
            vectors.

    Example:
        >>> for ids, vectors in read_vectors("items.parquet", ids="id", vectors="embedding"):  # doctest: +SKIP
        ...     vectors.shape
        torch.Size([65536, 384])
    """
    chunk_rows = check_integer("read_vectors", "chunk_rows", chunk_rows, 1)
    suffix = Path(path).suffix.lower() if isinstance(path, str | os.PathLike) else ""
    if (vectors is None) != (suffix == ".npy"):
        rule = "must name the vectors' column or tensor" if vectors is None else "must be omitted for a .npy file"
        raise ValueError(f"read_vectors: vectors {rule}, got {vectors!r} for {path}")
    if suffix not in (".npy", ".safetensors"):
        return _columns(path, str(ids), str(vectors), chunk_rows)
    opened = _numpy(ids, path) if suffix == ".npy" else _safetensors(path, str(ids), str(vectors))  # type: ignore[arg-type]
    return _chunks(*opened, chunk_rows)


def _columns(path: Paths, ids: str, vectors: str, chunk_rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    everything = ShardOptions(rank=0, world_size=1)
    data = ColumnDataset(path, [ids, vectors], chunk_rows, shard=everything)

    def chunks() -> Iterator[tuple[Tensor, Tensor]]:
        first, width = 0, None
        for batch in data:
            found, rows = batch[ids], batch[vectors]
            _check_ids(f"column {ids!r} of {path}", found)
            assert isinstance(found, Tensor)
            if isinstance(rows, RaggedTensor):
                if rows.outer or rows.dtype == torch.uint8:
                    raise TypeError(
                        f"read_vectors: column {vectors!r} of {path} must be lists of numbers, got {rows!r}"
                    )
                lengths = rows.lengths()
                width = int(lengths[0]) if width is None else width
                if bool((lengths != width).any()):
                    place = int((lengths != width).nonzero()[0])
                    raise ValueError(
                        f"read_vectors: column {vectors!r} of {path} must be lists of equal lengths, got {width} "
                        f"elements in row 0 and {int(lengths[place])} in row {first + place} (id {int(found[place])})"
                    )
                rows = rows.values.view(-1, width)
            if rows.dim() != 2:
                raise TypeError(
                    f"read_vectors: column {vectors!r} of {path} must be lists of numbers, got {rows.dtype}"
                )
            first += found.numel()
            yield found.to(torch.int64), rows

    return chunks()


def _chunks(ids: _Slice, vectors: _Slice, rows: int, chunk_rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    for first in range(0, rows, chunk_rows):
        last = min(first + chunk_rows, rows)
        yield ids(first, last).to(torch.int64), vectors(first, last)


def _numpy(ids: str | os.PathLike[str], vectors: str | os.PathLike[str]) -> tuple[_Slice, _Slice, int]:
    arrays = []
    for path in (ids, vectors):
        try:
            # Mapped, so that only the rows of a chunk are in memory.
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise BadFileError(f"read_vectors: {path} must be a .npy file of numbers, but {error}") from error
        if not isinstance(array, np.ndarray):
            raise BadFileError(f"read_vectors: {path} must be a .npy file, got an archive of arrays")
        if array.dtype.kind not in "iuf":
            raise TypeError(f"read_vectors: {path} must hold numbers, got {array.dtype}")
        arrays.append(array)
    rows = _check_shapes(str(ids), arrays[0].shape, str(vectors), arrays[1].shape)

    def slice_of(array: Any) -> _Slice:
        native = array.dtype.newbyteorder("=")
        return lambda first, last: torch.from_numpy(np.array(array[first:last], dtype=native))

    _check_ids(str(ids), slice_of(arrays[0])(0, 0))
    return slice_of(arrays[0]), slice_of(arrays[1]), rows


def _safetensors(path: str | os.PathLike[str], ids: str, vectors: str) -> tuple[_Slice, _Slice, int]:
    from safetensors import SafetensorError, safe_open

    try:
        file: Any = safe_open(path, framework="pt")
        names = sorted(file.keys())
    except SafetensorError as error:
        raise BadFileError(f"read_vectors: {path} is not a complete safetensors file: {error}") from error
    if missing := [name for name in (ids, vectors) if name not in names]:
        raise ValueError(f"read_vectors: {path} has no tensor {missing[0]!r}; it has {names}")
    slices = [file.get_slice(name) for name in (ids, vectors)]
    where = [f"tensor {name!r} of {path}" for name in (ids, vectors)]
    shapes = [tuple(each.get_shape()) for each in slices]
    rows = _check_shapes(where[0], shapes[0], where[1], shapes[1])

    def slice_of(each: Any) -> _Slice:
        return lambda first, last: each[first:last]

    _check_ids(where[0], slice_of(slices[0])(0, 0))
    return slice_of(slices[0]), slice_of(slices[1]), rows


def _check_ids(where: str, ids: Tensor | RaggedTensor) -> None:
    if isinstance(ids, RaggedTensor) or ids.dim() != 1 or ids.dtype.is_floating_point or ids.dtype == torch.bool:
        got = repr(ids) if isinstance(ids, RaggedTensor) else f"{ids.dtype} {list(ids.shape)}"
        raise TypeError(
            f"read_vectors: {where} must be an integer id per row, got {got}; write ids as integers, hashed as the "
            f"features are if they are strings"
        )


def _check_shapes(ids: str, ids_shape: tuple[int, ...], vectors: str, vectors_shape: tuple[int, ...]) -> int:
    """Return the number of rows."""
    if len(ids_shape) != 1 or len(vectors_shape) != 2 or ids_shape[0] != vectors_shape[0]:
        raise ValueError(
            f"read_vectors: ids must be [N] and vectors [N, D], got {list(ids_shape)} in {ids} and "
            f"{list(vectors_shape)} in {vectors}"
        )
    return ids_shape[0]
