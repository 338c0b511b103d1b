"""Exports: what they contain, and quantized embeddings within the stated error, read in several ways."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, MinFrequency, Normal
from recis_hybrid.saver import CheckpointMismatch, Saver
from recis_hybrid.saver.checkpoint import table_plan
from recis_hybrid.saver.cli import main
from recis_hybrid.serving import Reader, ServingError
from tests.saver.fakes import edit_manifest
from tests.support.devices import EDGE_IDS

LEVELS = {"int8": 255, "int4": 15}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_export_omits_optimizers(tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str | None) -> None:
    config = EmbeddingConfig(dim=2, admission=MinFrequency(2))
    engine = EmbeddingEngine({"id": config}, optimizer=optim.Adam)
    tower = nn.Linear(2, 1)
    for _ in range(2):
        engine({"id": torch.tensor([3, 9, 9])})
    Saver(tmp_path / "run").save(
        5,
        {
            "engine": engine,
            "tower": tower,
            "dense": torch.optim.Adam(tower.parameters()),
            "note": {"v": 1},
            "generator": torch.Generator(),
        },
    )
    arguments = ["export", str(tmp_path / "run"), str(tmp_path / "out")] + (["--dtype", dtype] if dtype else [])
    assert main(arguments) == 0
    assert "step_000005 is written" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert main(["inspect", "--json", str(tmp_path / "out")]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name: part["kind"] for name, part in found["parts"].items()} == {
        "engine": "saveable",
        "tower": "module",
        "note": "json",
    }
    tables = found["parts"]["engine"]["tables"]
    assert {name: table["columns"] for name, table in tables.items()} == {
        "id": {"ids": "int64 []", "embedding": f"{dtype or 'float32'} [2]"}
    }
    assert tables["id"]["meta"] == {"dim": 2, "dtype": dtype or "float32", "optimizer_state": []}
    assert main(arguments) == 1
    assert "exists already" in capsys.readouterr().err


def saved(folder: Path, dim: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Save a run of a table ``user``, and return its ids and embeddings."""
    config = EmbeddingConfig(dim=dim, dtype=dtype, initializer=Normal(0.1, 1))
    engine = EmbeddingEngine({"user": config}, optimizer=optim.Adam)
    ids = torch.cat([torch.tensor(EDGE_IDS), torch.arange(2000) * 7 + 2])
    vectors = engine({"user": ids})["user"].detach()
    Saver(folder / "run").save(1, {"engine": engine})
    return ids, vectors


def half_a_step(vectors: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return the stated bound of the error, ``[n, 1]``: half a step, and three roundings of float32."""
    low, high = vectors.double().aminmax(dim=1, keepdim=True)
    return (high - low) / LEVELS[dtype] / 2 + 3 * 2.0**-24 * vectors.double().abs().amax(1, keepdim=True)


@pytest.mark.parametrize("dim", [1, 5, 16])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_quantized_rows_are_within_half_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, dim: int, stored: torch.dtype
) -> None:
    monkeypatch.setattr(table_plan, "RANGE_BYTES", 8192)  # several files
    ids, vectors = saved(tmp_path, dim, stored)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", dtype]) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0
    reader = Reader(tmp_path / "out", verify=True)
    assert reader.dim("user") == dim
    found = torch.from_numpy(reader.lookup("user", ids.numpy()))
    error = (found.double() - vectors.double()).abs()
    assert bool((error <= half_a_step(vectors, dtype)).all())
    if dim > 1:
        assert float(error.max()) > 0.7 * float(half_a_step(vectors, dtype).max())  # the bound is tight
    assert reader.lookup("user", np.array([1, 3]), default=0.25).tolist()[1] == [0.25] * dim
    columns = reader.parts["engine"]["tables"]["user"]["columns"]
    assert [(c["name"], c["dtype"]) for c in columns] == [
        ("ids", "int64"),
        ("embedding", "uint8"),
        ("scale", "float32"),
        ("minimum", "float32"),
    ]
    assert columns[1]["shape"] == [dim if dtype == "int8" else (dim + 1) // 2]


@pytest.mark.parametrize(("dtype", "dim"), [("int8", 5), ("int4", 5), ("int4", 1)])
def test_the_code_of_the_guide_reads_a_quantized_export(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, dim: int
) -> None:
    ids, vectors = saved(tmp_path, dim)
    main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", dtype])
    text = (root / "docs" / "checkpoints.md").read_text()
    (block,) = (b for b in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) if "codes" in b)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block.replace('"int4", 16', f'"{dtype}", {dim}'), names)
    expected = Reader(tmp_path / "out").lookup("user", names["rows"]["ids"])
    assert np.array_equal(names["vectors"], expected)
    # And with plain torch.
    (path,) = (tmp_path / "out").rglob("user/*.safetensors")
    rows = load_file(path)
    codes = rows["embedding"]
    if dtype == "int4":
        codes = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1)[:, :dim]
    found = rows["minimum"][:, None] + rows["scale"][:, None] * codes
    assert np.array_equal(found.numpy(), expected)
    order = rows["ids"].argsort()[ids.argsort().argsort()]
    assert bool(((found[order] - vectors).abs() <= half_a_step(vectors, dtype)).all())


def test_rows_of_extreme_values(tmp_path: Path) -> None:
    most, least = torch.finfo(torch.float32).max, 2.0**-149
    vectors = torch.tensor(
        [
            [0.0] * 4,
            [-0.5] * 4,
            [most / 4, -most / 4, 0, 1],
            [most, most, most, most / 1.5],
            [least, 0, 3 * least, -least],
        ]
    )
    vectors = torch.cat([vectors, torch.tensor([[1, 1 + 2.0**-23, 1, 1], [1e-30, -1e-30, 0, 1]])])
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=4)})
    engine.load_rows("id", torch.arange(7), vectors)
    Saver(tmp_path / "run").save(1, {"engine": engine})
    for dtype in LEVELS:
        main(["export", str(tmp_path / "run"), str(tmp_path / dtype), "--dtype", dtype])
        found = torch.from_numpy(Reader(tmp_path / dtype).lookup("id", np.arange(7)))
        # The scale of a row of the smallest floats is a multiple of the least one.
        bound = half_a_step(vectors, dtype) + LEVELS[dtype] * least / 2
        assert bool(((found.double() - vectors.double()).abs() <= bound).all())
        assert torch.equal(found[:2], vectors[:2])


@pytest.mark.parametrize("value", [torch.inf, torch.nan, -torch.finfo(torch.float32).max])
def test_rows_that_cannot_be_quantized_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2)})
    engine.tables[0].insert(0, torch.tensor([3, -9]), {"embedding": torch.tensor([[1.0, 2.0], [1e38, value]])})
    Saver(tmp_path / "run").save(1, {"engine": engine})
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "int8"]) == 1
    text = capsys.readouterr().err
    assert "table 'id': int8 needs finite values within a range of 2^127 in each row, the row of id -9 has" in text
    assert "Export it as float32" in text
    assert not list((tmp_path / "out").glob("step_*"))


def test_a_quantized_export_is_neither_trained_nor_exported_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path, 5)
    main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "int8"])
    engine = EmbeddingEngine({"user": EmbeddingConfig(dim=5)})
    with pytest.raises(CheckpointMismatch, match=r"column 'embedding': checkpoint uint8 \[5\], live object float32"):
        Saver(tmp_path / "out").load({"engine": engine})
    capsys.readouterr()
    for more in ([], ["--dtype", "float32"]):
        assert main(["export", str(tmp_path / "out"), str(tmp_path / "again"), *more]) == 1
        assert "table 'user' is quantized already. Export the checkpoint" in capsys.readouterr().err


def test_a_damaged_quantized_export_is_named(tmp_path: Path) -> None:
    saved(tmp_path, 4)
    main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "int8"])
    directory = tmp_path / "out" / "step_000001"
    edit_manifest(directory, lambda d: d["parts"]["engine"]["tables"]["user"]["meta"].update(dtype="int4"))
    with pytest.raises(ServingError, match=r"user/.*: must contain embedding \[2008, 2\]"):
        Reader(tmp_path / "out").lookup("user", np.array([2]))
