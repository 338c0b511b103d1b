"""Updates of bundles: what they hold, what they read, and what they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recis_hybrid.app import cli, load_run
from recis_hybrid.checkpointing import BUCKETS
from recis_hybrid.publish import PublishError
from recis_hybrid.saver import CheckpointError
from recis_hybrid.saver.checkpoint.chain import StoredCheckpoint, open_checkpoint
from recis_hybrid.serving import Bundle, Follower
from tests.support.configs import COLUMNS, small_config
from tests.support.updates import Training, assert_same


def rows_of(update: Path) -> dict[str, tuple[set[int], set[int]]]:
    """Return the changed and removed ids of each table."""
    stored = open_checkpoint(str(update))
    found = {}
    for name, entry in stored.manifest.parts["engine"].tables.items():
        assert entry.removed is not None
        changes = stored.changes_since(stored.manifest.previous, "engine", name)  # type: ignore[arg-type]
        assert changes is not None
        assert changes.removed is not None
        found[name] = (set(changes.columns["ids"].tolist()), set(changes.removed.columns["ids"].tolist()))
        assert entry.rows == len(found[name][0])
    return found


def embeddings(training: Training) -> dict[str, dict[int, bytes]]:
    state = training.engine.checkpoint_state().tables
    return {
        name: dict(zip(table.columns["ids"].tolist(), map(bytes, table.columns["embedding"].numpy()), strict=True))
        for name, table in state.items()
    }


@pytest.mark.parametrize("dtype", [None, "int8", "bfloat16"])
def test_updates_end_in_the_state_of_a_full_bundle(tmp_path: Path, dtype: str | None) -> None:
    training = Training(tmp_path)
    training.train(rows=100)
    training.export(dtype=dtype)
    for live in (False, True):
        training.train()
        training.train()  # an update may span several checkpoints
        training.export(update=True, live=live)
    training.export(tmp_path / "full", dtype=dtype, live=True)
    assert_same(Follower(tmp_path / "bundles").bundle, Bundle(tmp_path / "full"))
    # An update is a checkpoint: the saver's commands verify it, and make it full.
    assert cli.main(["verify", str(tmp_path / "bundles")]) == 0
    assert cli.main(["compact", str(tmp_path / "bundles"), "--to", str(tmp_path / "compact")]) == 0
    assert_same(Bundle(tmp_path / "compact"), Bundle(tmp_path / "full"))


def test_an_update_from_incremental_checkpoints_reads_the_changes_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path)
    training.train(rows=100)
    training.export()
    training.train()
    training.train()
    before = training.step

    def refuse(*args: Any) -> Any:
        raise AssertionError("must not read a whole table")

    with monkeypatch.context() as patched:
        patched.setattr(StoredCheckpoint, "pieces", refuse)
        update = training.export(update=True)
    changed = {
        name: set(StoredCheckpoint(tmp_path / "run", 1).read("engine").tables[name].columns["ids"].tolist())
        ^ set(StoredCheckpoint(tmp_path / "run", before).read("engine").tables[name].columns["ids"].tolist())
        for name in ("user", "item")
    }
    found = rows_of(update)
    for name, ids in changed.items():
        assert ids <= found[name][0] | found[name][1]
    assert len(found["user"][0]) <= 60


def test_an_update_from_other_checkpoints_has_only_rows_that_differ(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.train(rows=100)
    training.export()
    first = embeddings(training)
    training.train()
    # A full checkpoint does not lead back to the exported one, so rows are compared.
    training.step += 1
    training.saver.save(training.step, {"engine": training.engine, "tower": training.tower})
    second = embeddings(training)
    update = training.export(update=True)
    for name, (changed, removed) in rows_of(update).items():
        assert changed == {each for each, row in second[name].items() if first[name].get(each) != row}
        assert removed == first[name].keys() - second[name].keys()
    training.export(tmp_path / "full")
    assert_same(Follower(tmp_path / "bundles").bundle, Bundle(tmp_path / "full"))


def test_changes_since_a_checkpoint_of_another_digest_are_unknown(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.train()
    training.train()
    training.train()
    stored = StoredCheckpoint(tmp_path / "run", 3)
    link = StoredCheckpoint(tmp_path / "run", 2).manifest.previous
    assert link is not None
    changes = stored.changes_since(link, "engine", "user")
    assert changes is not None
    # Half of the buckets each.
    halves = [
        stored.changes_since(link, "engine", "user", each) for each in ((0, BUCKETS // 2), (BUCKETS // 2, BUCKETS))
    ]
    ids = torch.cat([half.columns["ids"] for half in halves if half is not None])
    assert torch.equal(ids, changes.columns["ids"])
    assert stored.changes_since(replace(link, sha256="0" * 64), "engine", "user") is None
    assert stored.changes_since(replace(link, step=0), "engine", "user") is None


def test_updates_that_cannot_be_written(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.train()
    with pytest.raises(PublishError, match="holds no bundle to update; write one first, without --update"):
        training.export(update=True)
    training.export(dtype="int8")
    with pytest.raises(PublishError, match="must be of a later step than 1, got 1"):
        training.export(update=True)
    training.train()
    with pytest.raises(PublishError, match="omit dtype"):
        training.export(update=True, dtype="int8")
    with pytest.raises(PublishError, match="the tower of the model have changed since.*Write a full bundle"):
        training.export(update=True, outputs=("click",))
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "tables")]) == 0
    training.train()
    with pytest.raises(PublishError, match="is no bundle, but an export of tables"):
        training.export(tmp_path / "tables", update=True)
    # Nothing was written, and a later update builds on the bundle.
    assert [path.name for path in sorted((tmp_path / "bundles").glob("step_*"))] == ["step_000001"]
    training.export(update=True)


def test_two_processes_cannot_write_the_same_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recis_hybrid.publish import bundle as module

    training = Training(tmp_path)
    training.train()
    training.export()
    training.train()
    changed = module.changed_tables

    def meanwhile(*args: Any) -> Any:
        monkeypatch.undo()
        step, training.step = training.step, 2
        training.export(update=True)
        training.step = step
        return changed(*args)

    training.train()
    monkeypatch.setattr(module, "changed_tables", meanwhile)
    with pytest.raises(CheckpointError, match="builds on step 1, but the latest step in .* is 2"):
        training.export(update=True)


def test_the_command_updates_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features = {"user": {"dim": 4}, "site": {"ops": [{"hash": {"kind": "farm"}}], "dim": 4}}
    config = small_config(tmp_path, features=features, model={"hidden": [16]}, optimizer={"sparse": "adam"})
    run, out = str(tmp_path / "run"), str(tmp_path / "b")
    words = ["train", str(config), "--quiet", "train.checkpoint_steps=1", "train.checkpoint_whole_every=3"]
    words += ["train.keep=9"]
    assert cli.main([*words, "train.epochs=1"]) == 0
    assert cli.main(["export", run, "--bundle", out]) == 0
    follower = Follower(out)
    assert cli.main([*words, "train.epochs=2", "--resume"]) == 0
    capsys.readouterr()
    assert cli.main(["export", run, "--bundle", out, "--update", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == {"path": f"{out}/step_000008", "rows": 10, "removed": 0}  # 7 users and 3 sites
    assert cli.main(["export", run, "--bundle", out, "--update"]) == 1
    assert "must be of a later step than 8, got 8" in capsys.readouterr().err
    updated = follower.poll()
    assert updated is not None
    assert updated.source["step"] == 8
    assert cli.main(["export", run, "--bundle", str(tmp_path / "full")]) == 0
    request = {name: [COLUMNS[name](row) for row in range(40)] for name in features}
    scores = updated.predict(request)["score"]
    assert scores.tobytes() == Bundle(tmp_path / "full").predict(request)["score"].tobytes()
    batches = load_run(run).predict(str(tmp_path / "eval.csv"))
    np.testing.assert_allclose(scores, torch.cat([batch["score"] for batch in batches]).numpy(), rtol=0, atol=1e-6)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["export", run, "out", "--update"])
    assert "--update is for --bundle" in capsys.readouterr().err
