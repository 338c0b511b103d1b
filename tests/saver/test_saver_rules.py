"""Rules of the saver: choice of checkpoint, retention, order of writes, refusals."""

from __future__ import annotations

import errno
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from recis_hybrid.saver import CheckpointError, CheckpointMismatch, CorruptCheckpoint, PartState, Saver
from recis_hybrid.saver.actions import write
from tests.saver.fakes import Shelf, edit_manifest, empty_shelf, entries, example_shelf


def test_json_values_are_read_back(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    values: dict[str, Any] = {
        "reader": {"file": 3, "row": 2**40, "shuffle": [0.1, -0.0]},
        "nothing": None,
        "yes": True,
        "text": "城\n",
    }
    saver.save(1, values)
    saver.save(2, {"text": "later"})
    assert {name: saver.read_json(name, step=1) for name in values} == values
    assert saver.read_json("text") == "later"
    with pytest.raises(CheckpointMismatch, match=r"part 'reader' must be in the checkpoint, which has \['text'\]"):
        saver.read_json("reader")


def test_only_requested_parts_are_loaded(tmp_path: Path) -> None:
    directory = Saver(tmp_path).save(1, {"engine": example_shelf(), "model": nn.Linear(2, 2), "note": 1})
    # A part that is not requested is not read; only the names and sizes of its files are checked.
    path = directory / "dense" / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    engine = empty_shelf()
    assert Saver(tmp_path).load({"engine": engine}) == 1
    assert engine.loaded is not None
    with pytest.raises(CorruptCheckpoint, match="model.safetensors"):
        Saver(tmp_path).load({"model": nn.Linear(2, 2)})


def test_any_name_is_accepted(tmp_path: Path) -> None:
    names = ["a/b", "..", "城", "%2F", "~", "x" * 300, "self.x", " "]
    saved = {name: Shelf(PartState(tensors={"t": torch.tensor(float(i))})) for i, name in enumerate(names)}
    Saver(tmp_path).save(1, saved)
    live = {name: Shelf(PartState(tensors={"t": torch.tensor(0.0)})) for name in names}
    Saver(tmp_path).load(live)
    assert [shelf.loaded.tensors["t"].item() for shelf in live.values() if shelf.loaded] == list(range(len(names)))
    assert entries(tmp_path) == ["step_000001"]


def test_the_highest_complete_step_is_the_latest(tmp_path: Path) -> None:
    saver = Saver(tmp_path / "not" / "there")
    assert saver.steps() == []
    assert saver.latest() is None
    with pytest.raises(CheckpointError, match=r"must hold a complete checkpoint of step 'latest', it holds \[\]"):
        saver.load({"x": nn.Linear(1, 1)})
    for step in (0, 9, 1_000_000):
        saver.save(step, {"note": step})
    root = tmp_path / "not" / "there"
    for name in ("step_2000000", "step_7", "step_0000012", "step_x", ".step_000300.partial", "other"):
        (root / name).mkdir()
    (root / "step_000010").write_text("a file")
    for name in ("step_7", "step_0000012"):
        shutil.copy(root / "step_000009" / "manifest.json", root / name)
    assert saver.steps() == [0, 9, 1_000_000]
    assert saver.latest() == 1_000_000
    assert saver.read_json("note") == 1_000_000
    assert saver.read_json("note", step=9) == 9
    with pytest.raises(CheckpointError, match=r"of step 10, it holds \[0, 9, 1000000\]"):
        saver.read_json("note", step=10)


def test_all_checkpoints_are_kept_on_request(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep=None)
    for step in range(8):
        saver.save(step, {"note": step})
    assert saver.steps() == list(range(8))
    del saver  # a live saver holds the lease
    saver = Saver(tmp_path, keep=1)
    saver.save(8, {"note": 8})
    assert saver.steps() == [8]


def test_the_oldest_is_deleted_after_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver(tmp_path, keep=1)
    saver.save(1, {"note": 1})
    seen: list[list[int]] = []
    rmtree = shutil.rmtree

    def watched(path: Any, **options: Any) -> None:
        if tmp_path in Path(path).parents:  # threads of other tests may still delete files
            seen.append(saver.steps())
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    saver.save(2, {"note": 2})
    assert saver.steps() == [2]
    saver.wait()
    assert seen == [[2]]
    assert not list(tmp_path.glob(".step*"))


def test_a_failed_deletion_is_raised_by_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver(tmp_path, keep=1)
    saver.save(1, {"note": 1})

    def refuse(path: Path, **_: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        saver.save(2, {"note": 2})
        with pytest.raises(CheckpointError, match=r"step_000001.deleted: could not be removed \(.*not permitted"):
            saver.wait()
    saver.save(3, {"note": 3})
    saver.wait()
    assert entries(tmp_path) == ["step_000003"]
    assert not list(tmp_path.glob(".step*"))


@pytest.mark.parametrize("step", [-1, 1.0, True, "1", 10**18])
def test_invalid_steps_are_refused(tmp_path: Path, step: Any) -> None:
    with pytest.raises(CheckpointError, match="step must be an integer from 0 to"):
        Saver(tmp_path).save(step, {"note": 1})


def test_steps_must_increase(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    saver.save(5, {"note": 5})
    for step in (5, 4):
        with pytest.raises(CheckpointError, match=rf"must be above the latest one in {tmp_path}, 5, got {step}"):
            saver.save(step, {"note": 0})
    assert saver.read_json("note") == 5


@pytest.mark.parametrize("keep", [0, -1, 1.5, True, "5"])
def test_keep_must_be_positive(tmp_path: Path, keep: Any) -> None:
    error, rule = (ValueError, "at least 1") if type(keep) is int else (TypeError, "an integer")
    with pytest.raises(error, match=f"Saver: keep must be {rule}, got"):
        Saver(tmp_path, keep=keep)


def test_an_unknown_url_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no file system is known for 'nowhere://bucket/run' .*Install fsspec's"):
        Saver("nowhere://bucket/run")


def test_invalid_parts_are_refused(tmp_path: Path) -> None:
    Saver(tmp_path).save(1, {"note": 1})
    parts: Any
    for parts, got in (({}, r"\[\]"), (nn.Linear(2, 2), "Linear"), ({1: 1}, r"\[1\]"), (None, "NoneType")):
        for call in (partial(Saver(tmp_path).save, 2), Saver(tmp_path).load, Saver(tmp_path).load_some):
            with pytest.raises(CheckpointError, match=f"parts must be a mapping from .*got {got}"):
                call(parts)  # type: ignore[operator]


def test_a_relative_path_is_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saver = Saver("run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    saver.save(1, {"note": 1})
    assert (tmp_path / "run" / "step_000001").is_dir()


class Failing(Shelf):
    """Fails to return its state."""

    def checkpoint_state(self) -> PartState:
        raise RuntimeError("out of luck")


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver(tmp_path)
    saver.save(1, {"note": 1})
    with pytest.raises(RuntimeError, match="out of luck"):
        saver.save(2, {"model": nn.Linear(2, 2), "engine": Failing(PartState())})

    def full(path: Path, *_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write, "write_tensors", full)
    with pytest.raises(CheckpointError, match=r"could not be written .*No space left on device.*Make room"):
        saver.save(2, {"model": nn.Linear(2, 2)})
    monkeypatch.undo()
    assert entries(tmp_path) == ["step_000001"]
    saver.save(2, {"model": nn.Linear(2, 2)})


def test_a_missing_folder_is_a_checkpoint_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Path.mkdir

    def no_folder(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name != "dense":
            make(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", no_folder)
    with pytest.raises(CheckpointError, match=r"could not be written .*dense/model.safetensors"):
        Saver(tmp_path).save(1, {"model": nn.Linear(2, 2)})
    assert entries(tmp_path) == []


def test_everything_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def note_sync(descriptor: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def note_rename(path: Path, target: Path) -> Path:
        events.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    root = tmp_path / "run"
    directory = Saver(root).save(1, {"engine": example_shelf(), "model": nn.Linear(2, 2), "note": 1})
    partial = root / ".step_000001.partial"
    written = {str(partial / path.relative_to(directory)) for path in [directory, *directory.rglob("*")]}
    at = events.index("rename")
    assert set(events[:at]) == written | {str(tmp_path)}
    assert events[at + 1 :] == [str(root)]
    # A folder is synced after its contents, and the manifest after all other files.
    for path in written:
        inside = [events.index(other) for other in written if other.startswith(f"{path}/")]
        assert all(index < events.index(path) for index in inside)
    files = [events.index(path) for path in written if path.endswith(".safetensors")]
    assert max(files) < events.index(str(partial / "manifest.json"))


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*.safetensors"))


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("place", [0.0, 0.3, 0.7, 1.0])
def test_a_changed_byte_anywhere_is_refused(tmp_path: Path, number: int, place: float) -> None:
    Saver(tmp_path).save(1, {"note": 1})
    directory = Saver(tmp_path).save(2, {"engine": example_shelf(), "model": nn.Linear(2, 2)})
    path = files_of(directory)[number]
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    path.write_bytes(data)
    engine, model = empty_shelf(), nn.Linear(2, 2)
    before = model.weight.detach().clone()
    with pytest.raises(CorruptCheckpoint) as caught:
        Saver(tmp_path).load({"engine": engine, "model": model})
    message = str(caught.value)
    assert str(path) in message
    assert ("table 'user/country'" in message) == ("sparse" in str(path))
    assert "load another step" in message
    assert f"Other steps in {tmp_path}: [1]." in message
    assert engine.loaded is None
    assert torch.equal(model.weight, before)


def test_swapped_files_are_refused(tmp_path: Path) -> None:
    directory = Saver(tmp_path).save(1, {"a": example_shelf(), "b": example_shelf()})
    a, b = directory / "dense" / "a.safetensors", directory / "dense" / "b.safetensors"
    a.rename(tmp_path / "x")
    b.rename(a)
    (tmp_path / "x").rename(b)
    with pytest.raises(CorruptCheckpoint, match=r"a.safetensors \(part 'a'\): bytes 0 to \d+ must have the CRC-32"):
        Saver(tmp_path).load({"a": empty_shelf()})

    # If the manifest swaps them, too, their metadata reveals it.
    def swap(document: dict[str, Any]) -> None:
        parts = document["parts"]
        parts["a"]["file"], parts["b"]["file"] = (
            {**parts["a"]["file"], "crc32": parts["b"]["file"]["crc32"]},
            {**parts["b"]["file"], "crc32": parts["a"]["file"]["crc32"]},
        )

    edit_manifest(directory, swap)
    with pytest.raises(CorruptCheckpoint, match=r"a.safetensors .* its metadata must be .*'a'.* is .*'b'"):
        Saver(tmp_path).load({"a": empty_shelf()})


def test_a_renamed_folder_is_refused(tmp_path: Path) -> None:
    Saver(tmp_path).save(1, {"note": 1}).rename(tmp_path / "step_000002")
    with pytest.raises(CorruptCheckpoint, match="step_000002 has step 1. Rename it to step_000001"):
        Saver(tmp_path).read_json("note")


def test_a_symlink_is_not_followed(tmp_path: Path) -> None:
    directory = Saver(tmp_path / "run").save(1, {"model": nn.Linear(2, 2)})
    path = directory / "dense" / "model.safetensors"
    path.rename(tmp_path / "outside.safetensors")
    path.symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(CorruptCheckpoint, match=r"dense/model.safetensors: .* plain files"):
        Saver(tmp_path / "run").load({"model": nn.Linear(2, 2)})


def test_foreign_files_are_named(tmp_path: Path) -> None:
    directory = Saver(tmp_path).save(1, {"model": nn.Linear(2, 2)})
    (directory / "notes.txt").write_text("mine")
    (directory / ".hidden").write_text("mine")
    with pytest.raises(CorruptCheckpoint, match=r"but also holds \['.hidden', 'notes.txt'\]. Remove these files"):
        Saver(tmp_path).load({"model": nn.Linear(2, 2)})


def test_a_part_may_have_the_name_of_an_option(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    saver.save(1, {"delta": 1, "step": 2, "strict": 3})
    assert [saver.read_json(name) for name in ("delta", "step", "strict")] == [1, 2, 3]


def test_delta_must_be_true_or_false(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="delta must be True or False, got 1"):
        Saver(tmp_path).save(1, {"note": 1}, delta=1)  # type: ignore[arg-type]


def test_numpy_integers_are_integers(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep=np.int64(2))  # type: ignore[arg-type]
    for step in np.arange(1, 5):
        saver.save(step, {"note": 1})
    assert saver.steps() == [3, 4]
    assert saver.read_json("note", np.int32(3)) == 1  # type: ignore[arg-type]
