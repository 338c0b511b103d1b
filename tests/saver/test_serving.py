"""The numpy reader, compared with the engine whose export it reads."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from recis_hybrid import ops, optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, Normal
from recis_hybrid.saver import Saver
from recis_hybrid.saver.checkpoint import table_plan
from recis_hybrid.saver.cli import main
from recis_hybrid.serving import Reader, ServingError, bucket_of
from tests.saver.fakes import edit_manifest
from tests.support.devices import EDGE_IDS


def engine_of(dtype: torch.dtype = torch.float32) -> EmbeddingEngine:
    configs = {
        "user": EmbeddingConfig(dim=5, dtype=dtype, initializer=Normal(0, 1)),
        "a/b": EmbeddingConfig(dim=3, dtype=dtype),
        "none": EmbeddingConfig(dim=4, dtype=dtype),
    }
    engine = EmbeddingEngine(configs, optimizer=optim.Adam)
    ids = torch.cat([torch.tensor(EDGE_IDS), torch.arange(3000) * 7])
    engine({"user": ids, "a/b": ids[:100], "none": ids[:0]})
    return engine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lookups_equal_those_of_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(table_plan, "RANGE_BYTES", 8192)  # several files
    engine, tower = engine_of(dtype), nn.Linear(5, 2).to(dtype)
    Saver(tmp_path / "run").save(1, {"engine": engine, "tower": tower, "sparse": optim.Adam(engine.parameters())})
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    reader = Reader(tmp_path / "out", verify=True)
    assert reader.step == 1
    assert reader.tables == ["a/b", "none", "user"]
    assert reader.dim("user") == 5
    assert len(list((tmp_path / "out" / "step_000001" / "sparse" / "engine" / "user").iterdir())) > 1
    ids = torch.cat([torch.tensor(EDGE_IDS), torch.arange(3000) * 7])[torch.randperm(3008)]
    with torch.no_grad():
        expected = engine.eval()({"user": ids, "a/b": ids[:0], "none": ids[:0]})["user"]
    found = reader.lookup("user", ids.numpy())
    assert found.dtype == np.float32
    assert np.array_equal(found, expected.numpy())
    weights = reader.dense("tower")
    assert np.array_equal(weights["weight"], tower.weight.detach().float().numpy())
    # The training checkpoint can be served, too.
    assert np.array_equal(Reader(tmp_path / "run").lookup("user", ids.numpy()), found)


def test_unknown_ids_tables_and_parts(tmp_path: Path) -> None:
    Saver(tmp_path).save(1, {"engine": engine_of()})
    reader = Reader(tmp_path)
    unknown = np.array([1, 7, 2**40, -9])
    found = reader.lookup("user", unknown)
    assert not found[[2, 3]].any()
    assert found[[0, 1]].any(axis=1).all()
    assert reader.lookup("user", unknown, default=0.5)[2].tolist() == [0.5] * 5
    assert reader.lookup("user", unknown, default=np.arange(5))[3].tolist() == [0, 1, 2, 3, 4]
    assert reader.lookup("none", unknown).tolist() == [[0.0] * 4] * 4
    assert reader.lookup("user", []).shape == (0, 5)
    with pytest.raises(ServingError, match=r"there is no table 'item', there are \['a/b', 'none', 'user'\]"):
        reader.lookup("item", unknown)
    with pytest.raises(ServingError, match=r"ids must be int64 \[n\], got float64 \[1\]"):
        reader.lookup("user", [0.5])
    with pytest.raises(ServingError, match="there is no part 'tower'"):
        reader.dense("tower")


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=50))
def test_buckets_equal_those_of_the_native_library(ids: list[int]) -> None:
    tensor = torch.tensor(ids, dtype=torch.int64)
    assert bucket_of(tensor.numpy()).tolist() == ops.id_map.bucket_of(tensor).tolist()


def test_neither_torch_nor_the_library_is_imported(tmp_path: Path, root: Path) -> None:
    Saver(tmp_path).save(1, {"engine": engine_of()})
    code = (
        "import sys\nfrom recis_hybrid.serving import Reader\n"
        "assert Reader(sys.argv[1]).lookup('user', [0, 5]).shape == (2, 5)\n"
        "found = {name for name in sys.modules if name.split('.')[0] in ('torch', 'safetensors', 'pyarrow')}\n"
        "assert not found, found\n"
        "assert {n.split('.')[1] for n in sys.modules if n.startswith('recis_hybrid.')} == {'serving'}\n"
        "assert 'librecis' not in open('/proc/self/maps').read()"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_incremental_checkpoint_is_refused(tmp_path: Path) -> None:
    engine, saver = engine_of(), Saver(tmp_path)
    saver.save(1, {"engine": engine}, delta=True)
    saver.save(2, {"engine": engine}, delta=True)
    with pytest.raises(ServingError, match="contains only the changes since step 1. Export it with"):
        Reader(tmp_path)
    assert Reader(tmp_path / "step_000001").step == 1


def damage(directory: Path, change: Callable[[bytearray], object]) -> Path:
    path = next((directory / "sparse" / "engine" / "user").iterdir())
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.append(0), "according to the manifest, has"),
        (lambda d: d.__setitem__(slice(0, 8), struct.pack("<Q", 2**60)), "its header cannot have"),
        (lambda d: d.__setitem__(slice(8, 12), b"[[[["), "cannot be read"),
        (lambda d: d.__setitem__(slice(0, 8), bytes(8)), "its header cannot have 0 bytes"),
        (lambda d: d.__setitem__(slice(None), d.replace(b'"shape":[3007,5]', b'"shape":[3007,6]')), "cannot be at"),
        (
            lambda d: d.__setitem__(slice(None), d.replace(b'"shape":[3007,5]', b'"shape":[5,3007]')),
            "must contain embed",
        ),
        (lambda d: d.__setitem__(slice(None), d.replace(b'"I64","shape":[3007]', b'"F99","shape":[3007]', 1)), "read"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, change: Callable[[bytearray], object], message: str) -> None:
    path = damage(Saver(tmp_path).save(1, {"engine": engine_of()}), change)
    with pytest.raises(ServingError, match=message) as caught:
        Reader(tmp_path).lookup("user", [1])
    assert str(path) in str(caught.value)


def test_a_flipped_bit_is_found_on_request(tmp_path: Path) -> None:
    path = damage(Saver(tmp_path).save(1, {"engine": engine_of()}), lambda d: d.__setitem__(-1, d[-1] ^ 1))
    Reader(tmp_path)
    with pytest.raises(ServingError, match="has changed since it was written") as caught:
        Reader(tmp_path, verify=True)
    assert str(path) in str(caught.value)


def test_unsafe_and_invalid_manifests_are_refused(tmp_path: Path) -> None:
    directory = Saver(tmp_path).save(1, {"engine": engine_of()})
    shutil.copy(directory / "manifest.json", tmp_path / "kept")

    def first(document: dict[str, dict[str, dict[str, dict[str, dict[str, list[dict[str, dict[str, str]]]]]]]]) -> None:
        document["parts"]["engine"]["tables"]["user"]["ranges"][0]["file"]["path"] = "../../etc/passwd"

    edit_manifest(directory, first)
    with pytest.raises(ServingError, match=r"a path must lead to a file in this folder, got '../../etc/passwd'"):
        Reader(tmp_path)
    edit_manifest(directory, lambda d: d.update(format_version=2))
    with pytest.raises(ServingError, match="format must be 'recis_hybrid.checkpoint', version 1, got"):
        Reader(tmp_path)
    edit_manifest(directory, lambda d: d.pop("parts"))
    with pytest.raises(ServingError, match="format must be|is not a manifest"):
        Reader(tmp_path)
    (directory / "manifest.json").write_text(json.dumps({}))
    with pytest.raises(ServingError, match="is damaged"):
        Reader(tmp_path)
    (directory / "manifest.json").unlink()
    with pytest.raises(ServingError, match="holds no complete checkpoint"):
        Reader(tmp_path)
