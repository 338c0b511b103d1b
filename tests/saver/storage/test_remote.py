"""Object stores: a file system in memory, and a real S3 server on this machine."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed as dist

from recis_hybrid.saver import CheckpointError, CorruptCheckpoint, Saver
from recis_hybrid.saver.checkpoint import table_plan
from recis_hybrid.saver.checkpoint.chain import StoredCheckpoint
from recis_hybrid.saver.cli import main
from recis_hybrid.saver.format.location import RemotePath
from recis_hybrid.serving import Reader, ServingError
from tests.saver.fakes import empty_shelf, example_shelf
from tests.saver.test_world_sizes import large, member, own, rows_of, sharded
from tests.support.ranks import all_of, in_ranks
from tests.support.toy import Toy


@pytest.fixture
def memory() -> Iterator[Any]:
    store = fsspec.filesystem("memory")
    store.store.clear()
    yield store
    store.store.clear()


@pytest.mark.parametrize("store", ["memory", "s3"])
def test_a_run_is_saved_and_resumed(store: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    fixture = request.getfixturevalue(store)
    url = fixture if store == "s3" else "memory://bucket/run"
    toy = Toy()
    saver = Saver(url, keep=2, async_save=store == "memory")
    for step in (1, 2, 3):
        toy.train_steps(2)
        saver.save(step, {**toy.parts(), "note": {"step": step}})
    saver.wait()
    assert saver.steps() == [2, 3]
    again = Toy(seed=3)
    reader = Saver(url)
    assert reader.load(again.parts()) == 3
    assert torch.equal(again.predictions(), toy.predictions())
    assert reader.read_json("note", step=2) == {"step": 2}
    # The same bytes as on disk, and nothing else.
    Saver(tmp_path).save(3, {**toy.parts(), "note": {"step": 3}})
    local, root = tmp_path / "step_000003", RemotePath.of(url)
    remote = (root / "step_000003").files()
    assert sorted(remote) == sorted(p.relative_to(local).as_posix() for p in local.rglob("*") if p.is_file())
    for name in remote:
        if name != "manifest.json":
            assert (root / "step_000003" / name).read_bytes() == (local / name).read_bytes()
    manifests = [json.loads((folder / "manifest.json").read_bytes()) for folder in (local, root / "step_000003")]
    assert manifests[0]["parts"] == manifests[1]["parts"]
    assert root.names() == [".lease", "step_000002", "step_000003"]


def test_ranks_share_a_store(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_plan, "RANGE_BYTES", 4096)
    all_of(3, lambda rank, group: Saver("memory://b/run", group=group).save(1, {"engine": sharded(rank, 3)}))

    def load(rank: int, group: dist.ProcessGroup) -> Any:
        engine = sharded(rank, 2, filled=False)
        Saver("memory://b/run", group=group).load({"engine": engine})
        return rows_of(engine)

    parts = all_of(2, load)
    for name, rows in rows_of(sharded(0, 1)).items():
        assert parts[0][name] | parts[1][name] == rows


def test_a_rank_fetches_little_more_than_its_own_rows(s3: str) -> None:
    Saver(s3).save(1, {"shelf": large(0, 1)})
    total = sum((RemotePath.of(s3) / "step_000001").files().values())
    read: list[int] = []

    def load(rank: int, group: dist.ProcessGroup) -> None:
        saver, shelf = Saver(s3, group=group), large(0, 2**16)
        saver.load({"shelf": shelf})
        read.append(saver.bytes_read)

    all_of(3, load)
    assert max(read) <= 1.2 * total / 3 + 2**20


class Cut(io.BytesIO):
    """A file that cannot be written."""

    def write(self, data: Any) -> int:
        raise OSError("connection lost")


@pytest.mark.parametrize("lost", ["manifest.json", "safetensors"])
def test_an_interrupted_save_is_not_a_checkpoint(memory: Any, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    url = "memory://b/run"
    Saver(url).save(1, {"shelf": example_shelf()})
    opened = RemotePath.open

    def cut(self: RemotePath, mode: str) -> Any:
        return Cut() if mode == "wb" and self.name.endswith(lost) else opened(self, mode)

    with monkeypatch.context() as patch:
        patch.setattr(RemotePath, "open", cut)
        with pytest.raises(CheckpointError, match="could not be written .*connection lost"):
            Saver(url).save(2, {"shelf": example_shelf()})
    assert Saver(url).steps() == [1]
    assert (RemotePath.of(url) / "step_000002").files() == {}
    # Loads ignore what a crash leaves behind, and the next save removes it.
    (RemotePath.of(url) / "step_000005" / "dense" / "x.safetensors").write_bytes(b"half")
    assert Saver(url).latest() == 1
    Saver(url).save(6, {"shelf": example_shelf()})
    assert Saver(url).steps() == [1, 6]
    assert (RemotePath.of(url) / "step_000005").files() == {}


def test_the_manifest_is_deleted_first(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url, removed = "memory://b/run", []
    saver = Saver(url, keep=1)
    saver.save(1, {"shelf": example_shelf()})
    unlink = RemotePath.unlink
    monkeypatch.setattr(RemotePath, "unlink", lambda self, **k: (removed.append(str(self)), unlink(self, **k)))
    saver.save(2, {"shelf": example_shelf()})
    saver.wait()
    assert removed == ["memory://b/run/step_000001/manifest.json"]
    assert saver.steps() == [2]
    assert (RemotePath.of(url) / "step_000001").files() == {}


def test_the_newest_saver_takes_over(memory: Any) -> None:
    first, second = Saver("memory://b/run"), Saver("memory://b/run")
    first.save(1, {"shelf": example_shelf()})
    second.save(2, {"shelf": example_shelf()})
    with pytest.raises(CheckpointError, match="another saver has taken over here .process .*end the other job"):
        first.save(3, {"shelf": example_shelf()})
    second.save(3, {"shelf": example_shelf()})
    assert second.steps() == [1, 2, 3]


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "add"])
def test_damage_is_found(memory: Any, harm: str) -> None:
    url = "memory://b/run"
    Saver(url).save(1, {"shelf": example_shelf()})
    path = RemotePath.of(url) / "step_000001" / "sparse/shelf/user%2Fcountry/00000-65535.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    if harm == "add":
        (path.parent / "x").write_bytes(b"x")
    elif harm == "remove":
        path.unlink()
    else:
        path.write_bytes(data if harm == "flip" else data[:-3])
    shelf = empty_shelf()
    with pytest.raises(CorruptCheckpoint, match="memory://b/run/step_000001"):
        Saver(url).load({"shelf": shelf})
    assert shelf.loaded is None


def test_separate_stores_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recis_hybrid.saver.storage import shared_check

    monkeypatch.setattr(shared_check, "PATIENCE_S", 0.2)

    def save(rank: int, group: dist.ProcessGroup) -> None:
        Saver(f"file://{tmp_path}/{rank}", group=group).save(1, {"shelf": example_shelf()})

    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
    results = in_ranks(2, save)
    assert all("all ranks must see the same directory" in str(result) for result in results)


def test_commands_accept_urls(memory: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url, toy = "memory://b/run", Toy()
    saver, local = Saver(url), Saver(tmp_path / "run")
    for step in (1, 2):
        toy.train_steps(1)
        saver.save(step, toy.parts(), delta=True)
        local.save(step, toy.parts())
    for arguments, status, said in (
        (["inspect", url], 0, "builds on step 1"),
        (["inspect", f"{url}/step_000001"], 0, "step 1, written by 1 process(es)"),
        (["verify", url], 0, f"{url}/step_000002: sound"),
        (["diff", url, str(tmp_path / "run")], 0, "are equal"),
        (["compact", url], 1, "cannot replace a checkpoint atomically. Name another location with --to"),
        (["compact", url, "--to", "memory://b/whole"], 0, "memory://b/whole/step_000002 is a full checkpoint"),
        (["compact", url, "--to", "memory://b/whole"], 1, "exists already"),
        (["export", url, "memory://b/out"], 0, "memory://b/out/step_000002 is written"),
        (["verify", "memory://b/out"], 0, "sound"),
        (["verify", "memory://b/nothing"], 1, "holds no complete checkpoint"),
        (["verify", "nosuch://b/run"], 1, "no file system is known for 'nosuch://b/run'"),
    ):
        assert main(arguments) == status, arguments
        output = capsys.readouterr()
        assert said in output.out + output.err
    assert RemotePath.of(url).names() == [".lease", "step_000001", "step_000002"]
    saver.save(3, toy.parts())  # no other saver has taken over
    assert main(["diff", "memory://b/whole", str(tmp_path / "run")]) == 0
    with pytest.raises(ServingError, match="memory://b/out: must be a directory, .*Copy the export to one"):
        Reader("memory://b/out")


@pytest.mark.parametrize("store", ["memory", "s3"])
def test_ranks_save_changes(store: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    fixture = request.getfixturevalue(store)
    url = fixture if store == "s3" else "memory://b/run"
    monkeypatch.setattr(table_plan, "RANGE_BYTES", 4096)

    def save(rank: int, group: dist.ProcessGroup) -> Any:
        engine = sharded(rank, 3)
        saver = Saver(url, group=group, async_save=True)
        saver.save(1, {"engine": engine}, delta=True)
        table, number = member(engine, "user")
        ids = table.ids(number)
        table.erase(number, ids[::3].clone())
        table.insert(number, own(torch.arange(10**6, 10**6 + 50), rank, 3))
        saver.save(2, {"engine": engine}, delta=True)
        saver.wait()
        return rows_of(engine)

    saved = all_of(3, save)
    changed = StoredCheckpoint(RemotePath.of(url), 2).manifest
    assert changed.previous is not None
    assert 50 <= changed.parts["engine"].tables["user"].rows < 150  # and those whose seen step is in the future

    def load(rank: int, group: dist.ProcessGroup) -> Any:
        engine = sharded(rank, 2, filled=False)
        assert Saver(url, group=group).load({"engine": engine}) == 2
        return rows_of(engine)

    parts = all_of(2, load)
    for name in saved[0]:
        assert parts[0][name] | parts[1][name] == saved[0][name] | saved[1][name] | saved[2][name]
