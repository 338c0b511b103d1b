"""Ids and vectors read from Parquet, JSON, .npy and safetensors files, in chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from recis_hybrid.columnio import BadFileError, read_vectors
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine

IDS = torch.tensor([5, -1, 2**62, 0, 7])
VECTORS = torch.arange(15.0).view(5, 3) / 8


def table_of(ids: Any = None, vectors: Any = None, kind: Any = None) -> pa.Table:
    ids = pa.array(IDS.tolist()) if ids is None else pa.array(ids)
    vectors = pa.array(VECTORS.tolist() if vectors is None else vectors, kind or pa.list_(pa.float32()))
    return pa.table({"id": ids, "vector": vectors, "other": pa.array(["x"] * len(ids))})


def written(folder: Path, kind: str) -> tuple[Any, dict[str, Any]]:
    names: dict[str, Any] = {"ids": "id", "vectors": "vector"}
    path = folder / f"items.{kind.removeprefix('fixed ').removeprefix('big-endian ')}"
    if kind.endswith("parquet"):
        table = table_of(kind=pa.list_(pa.float32(), 3) if kind.startswith("fixed") else None)
        pq.write_table(table, path, row_group_size=2)
    elif kind == "json":
        path.write_text(
            "".join(
                f'{{"id": {i}, "vector": {v}}}\n'
                for i, v in zip(*map(list, (IDS.tolist(), VECTORS.tolist())), strict=True)
            )
        )
    elif kind == "safetensors":
        save_file({"id": IDS, "vector": VECTORS.to(torch.bfloat16)}, path)
    else:
        order = ">" if kind.startswith("big") else "="
        np.save(folder / "ids.npy", IDS.numpy().astype(f"{order}i8"))
        np.save(path, VECTORS.numpy().astype(f"{order}f4"))
        names = {"ids": folder / "ids.npy"}
    return path, names


KINDS = ["parquet", "fixed parquet", "json", "safetensors", "npy", "big-endian npy"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_rows", [2, 100])
def test_chunks(tmp_path: Path, kind: str, chunk_rows: int) -> None:
    path, names = written(tmp_path, kind)
    chunks = list(read_vectors(path, **names, chunk_rows=chunk_rows))
    assert [len(ids) for ids, _ in chunks] == ([2, 2, 1] if chunk_rows == 2 else [5])
    assert torch.equal(torch.cat([ids for ids, _ in chunks]), IDS)
    vectors = torch.cat([rows for _, rows in chunks])
    assert vectors.dtype == {"safetensors": torch.bfloat16, "json": torch.float64}.get(kind, torch.float32)
    assert torch.equal(vectors.float(), VECTORS)


def test_rows_of_a_file_are_loaded(tmp_path: Path) -> None:
    path, names = written(tmp_path, "parquet")
    engine = EmbeddingEngine({"item": EmbeddingConfig(dim=3, trainable=False)})
    assert engine.load_rows("item", read_vectors(path, **names, chunk_rows=2)) == 5
    assert torch.equal(engine({"item": IDS.flip(0)})["item"], VECTORS.flip(0))


def test_unsigned_ids_keep_their_bits(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.array([2**64 - 1, 2**63], dtype=np.uint64))
    np.save(tmp_path / "vectors.npy", np.ones((2, 1), dtype=np.float16))
    ((ids, vectors),) = read_vectors(tmp_path / "vectors.npy", ids=tmp_path / "ids.npy")
    assert (ids.tolist(), vectors.dtype) == ([-1, -(2**63)], torch.float16)


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        (table_of(ids=[1, 2, None, 4, 5]), ValueError, "'id'.*null"),
        (table_of(vectors=[[1.0], None, [2.0], [3.0], [4.0]]), ValueError, "'vector'.*null"),
        (table_of(vectors=[[1.0], [2.0], [None], [3.0], [4.0]]), ValueError, "'vector'.*null"),
        (table_of(ids=list("abcde")), TypeError, "'id' of .* must be an integer id per row, got RaggedTensor"),
        (table_of(ids=[0.5] * 5), TypeError, "must be an integer id per row, got torch.float64"),
        (
            table_of(vectors=[[1.0]] * 3 + [[1.0, 2.0]] * 2),
            ValueError,
            r"got 1 elements in row 0 and 2 in row 3 \(id 0\)",
        ),
        (
            table_of(vectors=[1.0] * 5, kind=pa.float32()),
            TypeError,
            "'vector' of .* must be lists of numbers, got torch.f",
        ),
        (table_of(vectors=[["a"]] * 5, kind=pa.list_(pa.string())), TypeError, "must be lists of numbers, got Ragged"),
        (table_of().drop_columns("vector"), ValueError, "has no column 'vector'"),
    ],
)
def test_bad_columns(tmp_path: Path, table: pa.Table, error: type[Exception], message: str) -> None:
    pq.write_table(table, tmp_path / "items.parquet")
    with pytest.raises(error, match=message):
        list(read_vectors(tmp_path / "items.parquet", ids="id", vectors="vector", chunk_rows=2))


def test_bad_numpy_files(tmp_path: Path) -> None:
    ids, vectors = tmp_path / "ids.npy", tmp_path / "vectors.npy"
    np.save(vectors, VECTORS.numpy())
    np.save(ids, IDS[:4].numpy())
    with pytest.raises(ValueError, match=r"must be \[N\] and vectors \[N, D\], got \[4\] in .*ids.npy and \[5, 3\] in"):
        read_vectors(vectors, ids=ids)
    with pytest.raises(ValueError, match="must be omitted for a .npy file, got 'vector'"):
        read_vectors(vectors, ids=ids, vectors="vector")
    np.save(ids, VECTORS[:, 0].numpy())
    with pytest.raises(TypeError, match=r"must be an integer id per row, got torch.float32"):
        read_vectors(vectors, ids=ids)
    np.save(ids, np.array([{}, {}], dtype=object))
    with pytest.raises(BadFileError, match="must be a .npy file of numbers, but"):
        read_vectors(vectors, ids=ids)
    np.save(ids, IDS.numpy())
    vectors.write_bytes(vectors.read_bytes()[:-8])
    with pytest.raises(BadFileError, match="must be a .npy file of numbers, but"):
        read_vectors(vectors, ids=ids)


def test_bad_safetensors_files_and_arguments(tmp_path: Path) -> None:
    file = tmp_path / "items.safetensors"
    save_file({"id": IDS, "vector": VECTORS}, file)
    with pytest.raises(ValueError, match=r"has no tensor 'vectors'; it has \['id', 'vector'\]"):
        read_vectors(file, ids="id", vectors="vectors")
    with pytest.raises(ValueError, match="must name the vectors' column or tensor, got None"):
        read_vectors(file, ids="id")
    with pytest.raises(FileNotFoundError, match="none"):
        read_vectors(tmp_path / "none.safetensors", ids="id", vectors="vector")
    with pytest.raises(ValueError, match="chunk_rows must be at least 1, got 0"):
        read_vectors(file, ids="id", vectors="vector", chunk_rows=0)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(BadFileError, match="is not a complete safetensors file"):
        read_vectors(file, ids="id", vectors="vector")
