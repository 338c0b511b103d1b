from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from recis_hybrid.saver import CheckpointError, Saver
from tests.saver.fakes import example_shelf
from tests.support.devices import on_devices
from tests.support.toy import Toy


@on_devices
def test_a_background_save_has_the_state_at_the_call(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy, saver = Toy(device=device), Saver(tmp_path / "run", async_save=True)
    toy.train_steps(3)
    before = toy.predictions()
    may_write, write = threading.Event(), Saver._write

    def delayed(self: Saver, *args: object) -> None:
        assert may_write.wait(60)
        write(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Saver, "_write", delayed)
    saver.save(3, {**toy.parts(), "note": {"epoch": 1}})
    assert saver.steps() == []
    toy.train_steps(3)
    may_write.set()
    saver.wait()
    assert saver.steps() == [3]
    again = Toy(seed=4, device=device)
    assert saver.load(again.parts()) == 3
    assert torch.equal(again.predictions(), before)
    Saver(tmp_path / "sync").save(3, {**again.parts(), "note": {"epoch": 1}})
    for file in (tmp_path / "sync" / "step_000003").rglob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "run" / file.relative_to(tmp_path / "sync")).read_bytes()


def test_state_that_is_not_owned_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf, may_write, write = example_shelf(), threading.Event(), Saver._write
    borrowed = shelf.checkpoint_state()
    assert not borrowed.owned
    tensor = next(iter(borrowed.tensors.values()))
    original = tensor.clone()

    def delayed(self: Saver, *args: object) -> None:
        assert may_write.wait(60)
        write(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Saver, "_write", delayed)
    monkeypatch.setattr(shelf, "checkpoint_state", lambda: borrowed)
    saver = Saver(tmp_path, async_save=True)
    saver.save(1, {"shelf": shelf})
    tensor.zero_()
    may_write.set()
    saver.wait()
    tensor.copy_(original)
    Saver(tmp_path / "sync").save(1, {"shelf": shelf})
    for file in (tmp_path / "sync" / "step_000001").rglob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / file.relative_to(tmp_path / "sync")).read_bytes()


def test_a_failure_is_raised_once_by_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver(tmp_path, async_save=True)
    saver.save(1, {"shelf": example_shelf()})
    saver.wait()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        saver.save(2, {"shelf": example_shelf()})
        with pytest.raises(CheckpointError, match=r"\.step_000002\.partial: could not be written .*No space left"):
            saver.save(3, {"shelf": example_shelf()})
    assert saver.steps() == [1]
    saver.save(3, {"shelf": example_shelf()})
    saver.wait()
    assert saver.steps() == [1, 3]


@pytest.mark.parametrize("saver_lives", [True, False])
def test_process_exit_waits_and_reports(saver_lives: bool, tmp_path: Path, root: Path) -> None:
    code = (
        "import sys, time, pathlib\nfrom recis_hybrid.saver import Saver\nfrom tests.saver.fakes import example_shelf\n"
        "saver = Saver(sys.argv[1], async_save=True)\nsaver.save(1, {'shelf': example_shelf()})\nsaver.wait()\n"
        "def fail(*_):\n    time.sleep(0.3)\n    raise OSError(28, 'No space left on device')\n"
        "saver.save(2, {'shelf': example_shelf()})\nsaver.wait()\npathlib.Path.rename = fail\n"
        "saver.save(3, {'shelf': example_shelf()})\n" + ("" if saver_lives else "del saver\n")
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=root, capture_output=True, text=True, check=False, timeout=300
    )
    assert f"recis_hybrid: the save of step 3 in {tmp_path} failed: " in done.stderr
    assert done.stderr.count("No space left") == 1
    assert Saver(tmp_path).steps() == [1, 2]


def test_a_second_job_is_refused_while_the_first_runs(tmp_path: Path, root: Path) -> None:
    code = (
        "import sys\nfrom recis_hybrid.saver import Saver\nfrom tests.saver.fakes import example_shelf\n"
        "saver = Saver(sys.argv[1])\nsaver.save(1, {'shelf': example_shelf()})\nprint('saved', flush=True)\ninput()\n"
    )
    job = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert job.stdout is not None
        assert job.stdout.readline() == "saved\n"
        with pytest.raises(CheckpointError, match=rf"another saver saves here \(process {job.pid} on "):
            Saver(tmp_path).save(2, {"shelf": example_shelf()})
        assert Saver(tmp_path).load({"shelf": example_shelf()}) == 1  # loading needs no lease
    finally:
        job.kill()
        job.communicate()
    Saver(tmp_path).save(2, {"shelf": example_shelf()})
    assert Saver(tmp_path).steps() == [1, 2]
