"""Tables on disk in a configuration, beside the same run in memory."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch

from recis_hybrid.app import cli, load_run
from recis_hybrid.app.build import step_of
from recis_hybrid.app.config import ConfigError, load_config
from tests.support.configs import COLUMNS, small_config, write_csv

CACHE = 64 * (64 + 24)
"""Bytes of a cache of 64 records of dim 4 with the state of Adam."""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = small_config(
        tmp_path,
        features={"user": {"dim": 4}, "site": {"ops": [{"hash": {"kind": "farm"}}], "dim": 4}},
        optimizer={"sparse": "adam", "sparse_lr": 0.05},
        train={"epochs": 2, "checkpoint_steps": 20, "checkpoint_whole_every": 2},
    )
    columns = {**COLUMNS, "user": lambda row: row * row % 509}
    write_csv(tmp_path / "train.csv", columns, 1000)
    write_csv(tmp_path / "eval.csv", columns, 300)
    (tmp_path / "ssd").mkdir()
    return path


def on_disk(config: Path, *names: str) -> list[str]:
    folder = config.parent / "ssd"
    return [f"features.{name}.{key}" for name in names for key in (f"disk={folder}", f"cache_bytes={CACHE}")]


def last(capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    printed: dict[str, float] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return printed


def test_a_run_with_tables_on_disk_is_that_in_memory(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, scores = {}, {}
    for name, more in (("memory", []), ("disk", on_disk(config, "user", "site"))):
        run = config.parent / name
        assert cli.main(["train", str(config), "--quiet", f"run={run}", *more]) == 0
        trained = last(capsys)
        figures[name] = {key: value for key, value in trained.items() if key.startswith(("eval/", "loss"))}
        assert cli.main(["evaluate", str(run)]) == 0
        evaluated = last(capsys)
        assert {key: evaluated[key] for key in trained if key.startswith("eval/")} == {
            key: value for key, value in trained.items() if key.startswith("eval/")
        }
        loaded = load_run(run)
        scores[name] = [batch["score"].tolist() for batch in loaded.predict(str(config.parent / "eval.csv"))]
        placements = [table.store.on_disk for table in loaded.model.engine.tables]
        assert placements == [name == "disk"] * len(placements)
    assert figures["disk"] == figures["memory"]
    assert scores["disk"] == scores["memory"]


def test_records_are_read_from_the_disk(config: Path) -> None:
    (engine,) = step_of(load_config(config, on_disk(config, "user", "site"))).engines
    for number in range(20):
        engine({"user": torch.arange(40 * number, 40 * number + 40) % 500, "site": torch.arange(3)})
    (table,) = engine.tables
    assert len(table) == 503
    statistics = table.cache_statistics()
    assert statistics is not None
    assert statistics.misses > 0


def test_a_resumed_run_may_move_a_table_to_disk(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for name, more in (("memory", []), ("moved", on_disk(config, "user"))):
        arguments = ["train", str(config), "--quiet", f"run={config.parent / name}"]
        assert cli.main([*arguments, "train.epochs=1"]) == 0
        gc.collect()  # ends the first saver
        assert cli.main([*arguments, "--resume", *more]) == 0
        found[name] = {key: value for key, value in last(capsys).items() if key.startswith(("eval/", "loss"))}
    assert found["moved"] == found["memory"]


def test_the_plan_shows_the_disk(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rows", "user=3M,site=100"]
    assert cli.main(["plan", str(config), *options, *on_disk(config, "user"), "--json"]) == 0
    (rank,) = json.loads(capsys.readouterr().out)
    memory = next(table["memory"] for table in rank["tables"] if table["members"] == ["user"])
    record = 64
    assert memory["disk"] > 3_000_000 * record
    assert 3_000_000 * record < memory["disk_of_save"] < 1.2 * 3_000_000 * record
    assert memory["cache"] == CACHE
    assert cli.main(["plan", str(config), *options, *on_disk(config, "user")]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(k for k, line in enumerate(lines) if line.startswith("on disk"))
    assert lines[at].split()[5:] == "rows cache locations file while saving".split()
    assert lines[at + 1].split()[:2] == ["user", "3,000,000"]
    assert lines[at + 2].split()[:2] == ["all", "tables"]
    assert cli.main(["plan", str(config), *options]) == 0
    assert "on disk" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["features.user.disk=ssd"], "disk and cache_bytes belong together, got disk='ssd', cache_bytes=None"),
        (["features.user.cache_bytes=4096"], "disk and cache_bytes belong together, got disk=None, cache_bytes=4096"),
        (["features.price.disk=ssd", "features.price.cache_bytes=1"], "disk applies to embeddings only"),
        (["features.user.disk=", "features.user.cache_bytes=99999"], "disk and cache_bytes belong together"),
        (["features.user.disk=''", "features.user.cache_bytes=99999"], "path must be an existing folder, got ''"),
        (["features.user.disk=ssd", "features.user.cache_bytes=10"], "cache_bytes=10 is too small"),
        (["features.user.disk=ssd", "features.user.cache_bytes=0"], "features.user.cache_bytes must be at least 1"),
    ],
)
def test_bad_settings_are_refused(config: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        step_of(load_config(config, ["features.price={}", *overrides]))
