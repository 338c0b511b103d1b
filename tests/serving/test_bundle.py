"""Bundles of configured runs: scores equal to the trainer's, without torch, and errors that name the remedy."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recis_hybrid.app import cli, load_run
from recis_hybrid.serving import Bundle, InputError, Ragged, Rows, ServingError
from tests.support.configs import COLUMNS, small_config, write_csv

FEATURES: dict[str, Any] = {
    "user": {"dim": 4, "min_frequency": 2},
    "site": {"ops": [{"hash": {"kind": "farm"}}], "dim": 4, "combiner": "mean"},
    "price": {},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a run and its bundle ``b``."""
    folder = tmp_path_factory.mktemp("bundle")
    model = {"kind": "deepfm", "hidden": [4], "batch_norm": True, "dropout": 0.1}
    data = {"train": "train.csv", "evaluate": "eval.csv", "batch_size": 16, "columns": {"price": {"default": 0.5}}}
    config = small_config(
        folder, features=FEATURES, model=model, data=data, optimizer={"sparse": "adam", "sparse_lr": 0.05}
    )
    write_csv(folder / "eval.csv", {**COLUMNS, "user": lambda row: row % 11 - 2}, rows=40)
    assert cli.main(["train", str(config), "--quiet"]) == 0
    assert cli.main(["export", str(folder / "run"), "--bundle", str(folder / "b")]) == 0
    return folder


def rows_of(first: int = 0, last: int = 40) -> dict[str, Any]:
    """Return the columns of rows of eval.csv."""
    columns = {**COLUMNS, "user": lambda row: row % 11 - 2}
    return {name: [columns[name](row) for row in range(first, last)] for name in FEATURES}


def scores_of(folder: Path) -> np.ndarray[Any, Any]:
    """Return the trainer's scores of eval.csv."""
    batches = load_run(folder / "run").predict(str(folder / "eval.csv"))
    return torch.cat([batch["score"] for batch in batches]).numpy()


def test_scores_are_those_of_the_trainer(trained: Path) -> None:
    bundle = Bundle(trained / "b")
    found = bundle.predict(rows_of())["score"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, scores_of(trained), rtol=0, atol=1e-6)
    # Rows of several requests, one of which is empty, and single rows.
    parts = [bundle.check(rows_of(0, 7)), bundle.check(rows_of(7, 7)), bundle.check(rows_of(7, 40))]
    np.testing.assert_allclose(bundle.run(Rows.concat(parts))["score"], found, rtol=0, atol=1e-6)
    alone = [bundle.predict(rows_of(row, row + 1))["score"][0] for row in range(40)]
    np.testing.assert_allclose(alone, found, rtol=0, atol=1e-6)
    assert bundle.run(parts[1])["score"].shape == (0,)
    # Arrays hold the same values.
    columns = rows_of()
    same = {**columns, "user": np.array(columns["user"]), "price": np.array(columns["price"])}
    np.testing.assert_array_equal(bundle.predict(same)["score"], found)


def test_source_names_the_checkpoint(trained: Path) -> None:
    import hashlib

    bundle = Bundle(trained / "b")
    manifest = trained / "run" / "step_000004" / "manifest.json"
    assert bundle.source["sha256"] == hashlib.sha256(manifest.read_bytes()).hexdigest()
    assert (bundle.step, bundle.source["step"]) == (4, 4)
    assert bundle.digest == hashlib.sha256((bundle.path / "manifest.json").read_bytes()).hexdigest()


def test_neither_torch_nor_another_room_is_imported(trained: Path) -> None:
    script = (
        "import builtins, json, sys\n"
        "real = builtins.__import__\n"
        "def guarded(name, *rest, **more):\n"
        "    if name.split('.')[0] in ('torch', 'jax', 'pyarrow'):\n"
        "        raise ImportError(f'{name} is not here')\n"
        "    return real(name, *rest, **more)\n"
        "builtins.__import__ = guarded\n"
        "from recis_hybrid.serving import Bundle\n"
        "assert 'onnxruntime' not in sys.modules\n"
        "scores = Bundle(sys.argv[1]).predict(json.loads(sys.argv[2]))['score']\n"
        "rooms = {n.split('.')[1] for n in sys.modules if n.startswith('recis_hybrid.')}\n"
        "assert rooms == {'serving'}, rooms\n"
        "print(json.dumps(scores.tolist()))\n"
    )
    command = [sys.executable, "-c", script, str(trained / "b"), json.dumps(rows_of())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(json.loads(done.stdout), scores_of(trained), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"usr": [1] * 3}, "column 'usr' is unknown; did you mean 'user'?"),
        ({"user": None}, "column 'user': must be a list or an array"),
        ({"user": [1, 2]}, "'site' has 3 rows, and column .user. has 2;"),
        ({"user": [1, 2, "7"]}, "column 'user': row 2: must be int64, got '7'; send integers, which are exact in JSON"),
        ({"user": np.array(["1", "2", "3"])}, "column 'user': row 0: must be int64, got '1'; send integers"),
        ({"user": [1, 2.5, 3]}, "column 'user': row 1: must be an integer, got 2.5"),
        ({"user": [1, None, 3]}, "column 'user': row 1 has a null, and the column has no default"),
        ({"user": [1, 2, 2**64]}, "column 'user': row 2: must be int64, got 18446744073709551616"),
        ({"user": [[1], [2], [3]]}, r"column 'user': row 0: must be int64, got \[1\]; send one int64 for each row"),
        ({"user": [True, False, True]}, "column 'user': row 0: must be int64, got True .bool.; send 1 or 0"),
        ({"user": Ragged([1, 2, 3], [1, 1, 1])}, "column 'user': takes one int64 for each row, got lists"),
        ({"site": [1, 2, 3]}, "column 'site': row 0: must be a string, got 1"),
        ({"price": ["1", "2", "3"]}, "column 'price': row 0: must be float64, got '1'; send one float64"),
        ({"price": [1.0, float("nan"), 2.0]}, "feature 'price': row 1 is NaN"),
    ],
)
def test_bad_input_is_named(trained: Path, change: dict[str, Any], message: str) -> None:
    bundle = Bundle(trained / "b", verify=False)
    with pytest.raises(InputError, match=message):
        bundle.predict({**rows_of(0, 3), **change})


def test_missing_columns_are_named_and_nulls_have_defaults(trained: Path) -> None:
    bundle = Bundle(trained / "b", verify=False)
    columns = rows_of(0, 3)
    del columns["user"]
    with pytest.raises(InputError, match="column 'user' is missing; the columns are .'user', 'site', 'price'."):
        bundle.predict(columns)
    columns = rows_of(0, 3)
    given = bundle.predict({**columns, "price": [0.5, 0.5, 2.5]})["score"]
    np.testing.assert_array_equal(bundle.predict({**columns, "price": [None, None, 2.5]})["score"], given)


def test_damage_is_named(trained: Path, tmp_path: Path) -> None:
    for file in sorted(path.relative_to(trained / "b") for path in (trained / "b").rglob("*") if path.is_file()):
        if file.name.startswith("."):
            continue
        copy = tmp_path / "copy"
        shutil.copytree(trained / "b", copy)
        data = bytearray((copy / file).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / file).write_bytes(data)
        with pytest.raises(ServingError, match="damaged|changed|Export it again"):
            Bundle(copy)
        (copy / file).write_bytes(data[: len(data) // 2])
        with pytest.raises(ServingError, match="damaged|changed|bytes according to the manifest"):
            Bundle(copy)
        shutil.rmtree(copy)


def test_newer_versions_are_named(trained: Path, tmp_path: Path) -> None:
    for change, message in (
        (lambda value: value | {"version": 2}, "is a bundle of version 2, this package reads version 1; update"),
        (lambda value: value | {"tower": value["tower"] | {"kind": "stablehlo"}}, "unknown kind of tower 'stablehlo'"),
        (lambda value: {k: v for k, v in value.items() if k != "program"}, "its part 'bundle' is not valid"),
    ):
        copy = tmp_path / "copy"
        shutil.copytree(trained / "b", copy)
        manifest = copy / "step_000004" / "manifest.json"
        document = json.loads(manifest.read_text())
        del document["crc32"]
        meta = document["parts"]["bundle"]["meta"]
        meta["value"] = change(meta["value"])
        text = json.dumps(document)[:-1]
        manifest.write_text(f'{text},\n "crc32": "{zlib.crc32(text.encode()):08x}"\n}}\n')
        with pytest.raises(ServingError, match=message):
            Bundle(copy)
        shutil.rmtree(copy)


def test_a_missing_runtime_is_named(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ServingError, match=r"needs onnxruntime, .* pip install 'recis_hybrid.serve.'"):
        Bundle(trained / "b")


def test_exports_of_tables_are_not_bundles(trained: Path) -> None:
    assert cli.main(["export", str(trained / "run"), str(trained / "tables")]) == 0
    with pytest.raises(ServingError, match="is an export of tables, not a bundle. Export the run again with"):
        Bundle(trained / "tables")


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 11), ("bfloat16", 8), ("int8", 8), ("int4", 4)])
def test_narrow_embeddings_have_the_stated_error(trained: Path, dtype: str, bits: int) -> None:
    out = trained / dtype
    assert cli.main(["export", str(trained / "run"), "--bundle", str(out), "--dtype", dtype]) == 0
    exact, narrow = Bundle(trained / "b", verify=False), Bundle(out)
    stated = narrow.errors
    for name, table in narrow.tables.items():
        ids = np.arange(-5, 20)
        mine, found = table.read(ids)
        true, _ = exact.tables[name].read(ids)
        error = np.abs(mine - true)[found].max(initial=0)
        spacing = np.abs(true[found]).max(initial=0) * 2.0**-23
        bound = np.abs(true[found]).max(initial=0) * 2.0**-bits if stated[name] is None else stated[name] + 4 * spacing
        assert error <= bound
        assert mine.dtype == np.float32
        assert stated[name] is not None or dtype in ("float16", "bfloat16")
    # Ids without a row have their exact first values, whatever the dtype of the rows.
    unseen = [10**12 + row for row in range(40)]
    columns = {**rows_of(), "site": [f"unseen {row}" for row in range(40)], "user": unseen}
    np.testing.assert_array_equal(narrow.predict(columns)["score"], exact.predict(columns)["score"])
