"""Columns from numpy, pandas, JAX and others: shared, copied, or rejected with the name of the column."""

from __future__ import annotations

import array
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine
from recis_hybrid.features import Clip, Feature, FeatureEngine, Hash, Mod
from recis_hybrid.ragged import RaggedTensor
from recis_hybrid.ragged.arrays import as_column

IDS = np.array([3, -1, 2**63 - 1, 3], dtype=np.int64)


def tensor_of(value: Any) -> torch.Tensor:
    column = as_column("column 'x'", value)
    assert isinstance(column, torch.Tensor)
    return column


def read_only(values: Any) -> Any:
    values = values.copy()
    values.flags.writeable = False
    return values


@pytest.mark.parametrize(
    "dtype", [np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.float16, np.float32, np.float64]
)
def test_numpy_arrays_share_their_memory(dtype: Any) -> None:
    values = np.array([0, 1, 1], dtype=dtype)
    for source in (values, read_only(values), np.stack([values, values])[:, ::2], values[:0]):
        column = tensor_of(source)
        assert column.numpy().dtype == dtype
        assert np.array_equal(column.numpy(), source)
        assert not source.size or column.data_ptr() == source.ctypes.data


def test_read_only_memory_lives_as_long_as_its_tensor() -> None:
    column = tensor_of(read_only(np.arange(1_000_000)))
    filler = [np.zeros(1_000_000) for _ in range(3)]
    assert column.sum() == 499_999_500_000
    assert len(filler) == 3
    assert tensor_of(np.frombuffer(b"\x01\x00\x00\x00\x00\x00\x00\x00", dtype=np.int64)).tolist() == [1]


def test_copied_numpy_arrays() -> None:
    swapped = IDS.astype(IDS.dtype.newbyteorder(">"))
    misaligned = np.frombuffer(b"\0" + IDS.tobytes(), dtype=np.uint8)[1:].view(np.int64)
    for source in (swapped, misaligned, IDS[::-1][::-1][::-1]):
        assert tensor_of(source).tolist() == source.tolist()
    assert tensor_of(np.array([2**64 - 1, 2**63, 7], dtype=np.uint64)).tolist() == [-1, -(2**63), 7]
    assert tensor_of(np.array([2**32 - 1], dtype=np.uint32)).dtype == torch.int64
    assert tensor_of(np.array([2**16 - 1], dtype=np.uint16)).tolist() == [65_535]
    assert tensor_of(np.array([2**64 - 1], dtype=">u8")).tolist() == [-1]


def test_tensors_are_returned_unchanged() -> None:
    column, rows = torch.tensor([1]), RaggedTensor.from_lists([[1]])
    assert as_column("x", column) is column
    assert as_column("x", rows) is rows
    unsigned = torch.tensor([-1]).view(torch.uint64)
    assert tensor_of(unsigned).tolist() == [-1]
    assert tensor_of(unsigned).data_ptr() == unsigned.data_ptr()
    column = as_column("x", RaggedTensor(unsigned, torch.tensor([0, 1])))
    assert isinstance(column, RaggedTensor)
    assert column.to_lists() == [[-1]]


def test_lists_of_numbers() -> None:
    assert tensor_of([1, -2]).dtype == tensor_of((3,)).dtype == tensor_of([]).dtype == torch.int64
    assert tensor_of([0.5]).tolist() == [0.5]
    assert tensor_of([2**64 - 1, 1]).tolist() == [-1, 1]
    assert tensor_of(np.array([1, 2], dtype=np.longlong)).tolist() == tensor_of([np.int64(1), 2]).tolist() == [1, 2]
    assert tensor_of([True, False]).dtype == torch.bool


def test_arrow_arrays_of_numbers() -> None:
    assert tensor_of(pa.array([1, 2])).tolist() == [1, 2]
    assert tensor_of(pa.chunked_array([[1], [2]])).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (np.array(["a"]), TypeError, "must hold numbers, got a numpy.ndarray of <U1; .*from_strings"),
        (np.array([b"a"]), TypeError, "from_strings"),
        (np.array([1, None]), TypeError, "of object; .*fill missing values"),
        (np.array(["2024-01-01"], dtype="datetime64[D]"), TypeError, r"astype\('datetime64\[s\]'\)"),
        (np.array([1j]), None, ""),
        (np.array([(1, 2)], dtype=[("a", int), ("b", int)]), TypeError, "must hold numbers"),
        (np.longdouble([1]), TypeError, "column 'x': can't convert"),
        (["a"], TypeError, "must hold numbers, got a list of <U1"),
        ([2**64], TypeError, "must hold 64-bit integers, got a list with"),
        ([2**63, -1], TypeError, "must hold 64-bit integers, got a list with"),
        ([[1], [2, 3]], ValueError, "must be a list of numbers, got a list of lists; use RaggedTensor.from_lists"),
        ([torch.tensor([1])], ValueError, "must be a list of numbers"),
        ("abc", TypeError, "must be a Tensor or a RaggedTensor, .* got str; "),
        (5, TypeError, "got int;"),
        (array.array("q", [1]), TypeError, "got array.array;"),
        (pa.array([[1]]), TypeError, "a pyarrow.ListArray cannot be imported through DLPack"),
        (pa.array([1, None]), TypeError, "cannot be imported through DLPack"),
    ],
)
def test_invalid_columns_are_rejected_with_their_names(value: Any, error: Any, message: str) -> None:
    if error is None:
        assert tensor_of(value).is_complex()
        return
    with pytest.raises(error, match=message):
        tensor_of(value)


def test_pandas() -> None:
    pd = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pd.DataFrame({"user": [5, -6, 5], "price": [0.5, 1, 2], "name": ["a", "b", None]}, index=[7, 8, 9])
    assert tensor_of(frame["user"]).tolist() == [5, -6, 5]
    assert tensor_of(frame["user"].astype("Int64")).dtype == torch.int64
    assert tensor_of(frame[["user", "user"]]).shape == (3, 2)
    for source, message in (
        (frame["name"], "must hold numbers, got a pandas.Series of object; convert strings"),
        (pd.Series([1, None], dtype="Int64"), "must not have missing values, got a pandas.Series of Int64; fill them"),
        (pd.Series([pd.Timestamp("2024-01-01")]), "convert with .astype"),
    ):
        with pytest.raises(TypeError, match=message):
            tensor_of(source)


@pytest.mark.jax
def test_jax_arrays_share_their_memory() -> None:
    jax = pytest.importorskip("jax")
    ids = jax.numpy.arange(64, dtype=jax.numpy.int32)
    column = tensor_of(ids)
    assert column.dtype == torch.int32
    assert column.data_ptr() == ids.unsafe_buffer_pointer()
    engine = EmbeddingEngine({"x": EmbeddingConfig(dim=4), "y": EmbeddingConfig(dim=4)})
    same = engine({"x": ids, "y": np.arange(64)})
    assert torch.equal(same["x"], engine({"x": torch.arange(64), "y": torch.arange(64)})["x"])
    with jax.enable_x64(True):
        wide = jax.numpy.array([2**62, -5])
        assert tensor_of(wide).tolist() == [2**62, -5]
        assert tensor_of(jax.numpy.array([2**64 - 1], dtype=jax.numpy.uint64)).tolist() == [-1]

    def traced(ids: Any) -> Any:
        with pytest.raises(TypeError, match=r"column 'x' must hold numbers, got int32\[64\] that JAX is tracing"):
            tensor_of(ids)
        return ids

    jax.jit(traced)(ids)


def test_engines_accept_arrays() -> None:
    weights = np.array([[1.0, 2.0], [0.5, 0.0]])
    grid = np.array([[7, 8], [9, 7]], dtype=np.int32)
    configs = {"plain": EmbeddingConfig(dim=4), "grid": EmbeddingConfig(dim=4, combiner="mean", weights="w")}
    arrays = {"plain": read_only(IDS), "grid": grid.T.copy().T, "w": weights, "label": np.ones(4)}
    tensors = {"plain": torch.tensor(IDS), "grid": torch.tensor(grid), "w": torch.tensor(weights)}
    for train in (True, False):
        engines = [EmbeddingEngine(configs).train(train) for _ in range(2)]
        first, second = engines[0](arrays), engines[1](tensors)
        assert all(torch.equal(first[name], second[name]) for name in configs)
    first["plain"].detach()
    features = FeatureEngine(
        [Feature("id", ops=[Hash(), Mod(100)]), Feature("price", ops=[Clip(0, 1)]), Feature("raw")]
    )
    batch = {"id": np.array([1, 2], dtype=np.uint64), "price": [0.5, 3.0], "raw": np.array([True, False])}
    column = features({**batch, "label": IDS})
    want = features(
        {
            "id": torch.tensor([1, 2]),
            "price": torch.tensor([0.5, 3.0], dtype=torch.float64),
            "raw": torch.tensor([True, False]),
        }
    )
    assert all(torch.equal(column[name], want[name]) for name in want)
    assert column["label"] is IDS
    with pytest.raises(TypeError, match="feature 'id', hash.farm.: Hash takes integers, got torch.float32"):
        features({**batch, "id": np.float32([1, 2])})
    with pytest.raises(ValueError, match="column 'raw': it has 3 rows"):
        features({**batch, "raw": np.zeros(3)})
    with pytest.raises(TypeError, match="feature 'plain': ids must be int64 or int32, got torch.float64"):
        EmbeddingEngine({"plain": EmbeddingConfig(dim=4)})({"plain": [0.5]})
