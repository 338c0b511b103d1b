"""Followers: versions bitwise equal to full bundles, whole for every reader, and chains that are refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest

from recis_hybrid.serving import Bundle, Follower, ServingError
from tests.support.updates import Training, assert_same, columns

STEPS = 5


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``bundles`` (full of step 1, updates of steps 2 to 5), full ones ``2`` to ``5``, and ``foreign``."""
    folder = tmp_path_factory.mktemp("updates")
    training = Training(folder)
    training.train(rows=150)
    training.export()
    for _ in range(2, STEPS + 1):
        training.train()
        training.export(update=True)
        training.export(folder / str(training.step))
    other = Training(folder / "other", seed=1)
    other.train(rows=150)
    other.export(folder / "foreign")
    for _ in range(2, 4):
        other.train()
        other.export(folder / "foreign", update=True)
    return folder


def name(step: int) -> str:
    return f"step_{step:06d}"


def digest(path: Path) -> str:
    return hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()


def publish(written: Path, folder: Path, *steps: int, source: str = "bundles") -> None:
    """Let steps appear in a folder, as the publisher does."""
    folder.mkdir(exist_ok=True)
    for step in steps:
        shutil.copytree(written / source / name(step), folder / ".partial")
        (folder / ".partial").rename(folder / name(step))


def test_each_version_is_bitwise_that_of_a_full_bundle(written: Path, tmp_path: Path) -> None:
    publish(written, tmp_path / "b", 1)
    follower = Follower(tmp_path / "b")
    assert (follower.step, follower.digest) == (1, digest(tmp_path / "b" / name(1)))
    assert follower.poll() is None
    versions = {1: follower.bundle}
    for step in range(2, STEPS + 1):
        publish(written, tmp_path / "b", step)
        versions[step] = follower.poll()  # type: ignore[assignment]
        assert versions[step] is follower.bundle
        assert follower.poll() is None
        assert (versions[step].step, versions[step].digest) == (step, digest(tmp_path / "b" / name(step)))
        assert versions[step].path == tmp_path / "b" / name(step)
        assert versions[step].source == Bundle(written / str(step)).source
        assert_same(versions[step], Bundle(written / str(step)))
    # Earlier versions are immutable, even when their files are gone.
    for path in (tmp_path / "b").iterdir():
        shutil.rmtree(path)
    assert_same(versions[3], Bundle(written / "3"))
    # Several links at once end in the same version as one after another.
    assert_same(Follower(written / "bundles").bundle, versions[STEPS])


def test_a_newer_full_bundle_starts_a_new_chain(written: Path, tmp_path: Path) -> None:
    publish(written, tmp_path / "b", 1, 2)
    follower = Follower(tmp_path / "b")
    publish(written, tmp_path / "b", 4, source="4")  # step 3 is not needed any more
    newer = follower.poll()
    assert newer is not None
    assert_same(newer, Bundle(written / "4"))
    assert follower.poll() is None
    # The updates before it are ignored by a new follower, too, even damaged ones.
    (tmp_path / "b" / name(2) / "manifest.json").write_text("{}")
    assert_same(Follower(tmp_path / "b").bundle, newer)


def test_readers_see_one_version(written: Path, tmp_path: Path) -> None:
    publish(written, tmp_path / "b", 1)
    follower = Follower(tmp_path / "b")
    request = columns()
    expected = {1: Bundle(written / "bundles" / name(1)).predict(request)["score"].tobytes()}
    expected |= {step: Bundle(written / str(step)).predict(request)["score"].tobytes() for step in range(2, STEPS + 1)}
    seen: list[tuple[int, bytes]] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            bundle = follower.bundle
            seen.append((bundle.step, bundle.predict(request)["score"].tobytes()))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for step in range(2, STEPS + 1):
        publish(written, tmp_path / "b", step)
        follower.poll()
        count = len(seen)
        while len(seen) < count + 6:  # until each reader has read a version
            done.wait(0.001)
    done.set()
    for reader in readers:
        reader.join()
    assert {step for step, _ in seen} >= {2, 3, 4, 5}
    assert all(scores == expected[step] for step, scores in seen)


def test_a_missing_update_is_refused(written: Path, tmp_path: Path) -> None:
    publish(written, tmp_path / "b", 1, 2)
    follower = Follower(tmp_path / "b")
    publish(written, tmp_path / "b", 4, 5)
    message = (
        f"the update of step 4 builds on step 3 with the SHA-256 {digest(written / 'bundles' / name(3))}, which is "
        f"missing; the last one applied is step 2 with the SHA-256 {digest(written / 'bundles' / name(2))}"
    )
    for _ in range(2):
        with pytest.raises(ServingError, match=message):
            follower.poll()
    assert_same(follower.bundle, Bundle(written / "2"))
    # A new follower applies what comes before it, and then refuses it, too.
    fresh = Follower(tmp_path / "b")
    assert fresh.step == 2
    with pytest.raises(ServingError, match=message):
        fresh.poll()
    # Put back, it is applied.
    publish(written, tmp_path / "b", 3)
    assert fresh.poll() is not None
    assert_same(fresh.bundle, Bundle(written / str(STEPS)))
    assert_same(follower.poll() or follower.bundle, fresh.bundle)


def test_updates_out_of_order_are_refused(written: Path, tmp_path: Path) -> None:
    publish(written, tmp_path / "b", 2, source="2")
    follower = Follower(tmp_path / "b")
    publish(written, tmp_path / "b", 1)
    expected = f"step 1 has appeared, but step 2 with the SHA-256 {follower.digest} has been applied before"
    with pytest.raises(ServingError, match=expected):
        follower.poll()
    # So is an update of a step before, which a later one repeats.
    shutil.rmtree(tmp_path / "b" / name(1))
    publish(written, tmp_path / "b", 3)  # builds on another step 2, the update
    with pytest.raises(
        ServingError,
        match=f"the update of step 3 builds on step 2 with the SHA-256 {digest(written / 'bundles' / name(2))}, "
        f"another chain; the last one applied is step 2 with the SHA-256 {follower.digest}",
    ):
        follower.poll()
    assert_same(follower.bundle, Bundle(written / "2"))


def test_a_step_that_is_replaced_or_taken_back_is_refused(written: Path, tmp_path: Path) -> None:
    publish(written, tmp_path / "b", 1, 2, 3)
    follower = Follower(tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / name(3))
    with pytest.raises(ServingError, match=f"step 2 is the latest, but step 3 with the SHA-256 {follower.digest} has"):
        follower.poll()
    publish(written, tmp_path / "b", 3, source="foreign")
    found = digest(tmp_path / "b" / name(3))
    with pytest.raises(
        ServingError,
        match=f"step 3 has been replaced since it was applied: the SHA-256 .* must be {follower.digest}, is {found}",
    ):
        follower.poll()
    assert_same(follower.bundle, Bundle(written / "3"))


def test_an_update_of_another_training_is_refused(written: Path, tmp_path: Path) -> None:
    publish(written, tmp_path / "b", 1)
    follower = Follower(tmp_path / "b")
    publish(written, tmp_path / "b", 2, source="foreign")
    with pytest.raises(
        ServingError,
        match=f"the update of step 2 builds on step 1 with the SHA-256 {digest(written / 'foreign' / name(1))}, "
        f"another chain; the last one applied is step 1 with the SHA-256 {digest(written / 'bundles' / name(1))}",
    ):
        follower.poll()


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_damaged_update_is_refused_by_the_name_of_the_file(written: Path, tmp_path: Path) -> None:
    names = files(written / "bundles" / name(3))
    assert len(names) == 6  # manifest, tower, and the rows and removed ids of two tables
    for number, file in enumerate(names):
        for kind in ("flip", "cut", "missing"):
            folder = tmp_path / f"{number}{kind}"
            publish(written, folder, 1)
            follower = Follower(folder)
            publish(written, folder, 2, 3, 4)
            path = folder / name(3) / file
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            if kind == "missing":
                path.unlink()
            else:
                path.write_bytes(data if kind == "flip" else data[: len(data) // 2])
            # The update before it is applied; what is damaged raises with the next call, again and again.
            assert follower.poll() is not None
            message = str(path) if (file, kind) != ("manifest.json", "missing") else "builds on step 3 .* is missing"
            for _ in range(2):
                with pytest.raises(ServingError, match=message):
                    follower.poll()
            assert follower.step == 2
    assert_same(follower.bundle, Bundle(written / "2"))
    publish(written, folder, 5, source="5")
    assert_same(follower.poll() or follower.bundle, Bundle(written / "5"))


def test_an_update_of_another_model_is_refused(written: Path, tmp_path: Path) -> None:
    # The publisher does not write such updates; the checksums of this one are right.
    publish(written, tmp_path / "b", 1, 2)
    path = tmp_path / "b" / name(2) / "manifest.json"
    for change, message in (
        (('"combiner": "mean"', '"combiner": "sum"'), "the update has another model than the bundle of step 1"),
        (('"dim": 8', '"dim": 9'), "the update has other tables, widths or dtypes than the bundle of step 1"),
    ):
        text = (written / "bundles" / name(2) / "manifest.json").read_text()
        assert change[0] in text
        body = text.replace(*change).rpartition(',\n "crc32"')[0].encode()
        path.write_bytes(body + f',\n "crc32": "{zlib.crc32(body):08x}"\n}}\n'.encode())
        follower = Follower(tmp_path / "b")
        assert follower.step == 1
        with pytest.raises(ServingError, match=message):
            follower.poll()


def test_folders_without_a_full_bundle(written: Path, tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="is not a directory"):
        Follower(tmp_path / "none")
    with pytest.raises(ServingError, match="holds no full bundle. Write one with"):
        Follower(tmp_path)
    publish(written, tmp_path, 2, 3)
    with pytest.raises(ServingError, match=r"holds no full bundle, only updates of the steps \[2, 3\]"):
        Follower(tmp_path)
    with pytest.raises(ServingError, match="contains only the changes since step 2.*Follower"):
        Bundle(tmp_path)


def test_object_stores(written: Path, tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
    store = fsspec.filesystem("memory")
    url = "memory://followed"

    def upload(step: int) -> None:
        folder = written / "bundles" / name(step)
        # The manifest completes a step.
        for file in sorted(files(folder), key=lambda each: each == "manifest.json"):
            store.pipe_file(f"/followed/{name(step)}/{file}", (folder / file).read_bytes())

    upload(1)
    follower = Follower(url)
    upload(2)
    store.pipe_file(f"/followed/{name(3)}/dense/tower.safetensors", b"incomplete")
    assert follower.poll() is not None
    assert_same(follower.bundle, Bundle(written / "2"))
    assert follower.poll() is None
    upload(3)
    assert follower.poll() is not None
    # A temporary cache holds the full bundle and the last update.
    temporary = follower.bundle.path.parent
    assert sorted(path.name for path in temporary.iterdir()) == [name(1), name(3)]
    cached = Follower(url, cache=tmp_path)
    assert_same(cached.bundle, Bundle(written / "3"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [name(1), name(2), name(3)]
    upload(4)
    store.pipe_file(f"/followed/{name(4)}/dense/tower.safetensors", b"damaged")
    with pytest.raises(ServingError, match=f"{name(4)}/dense/tower.safetensors"):
        follower.poll()
    with pytest.raises(ServingError, match="cannot be opened"):
        Follower("unknown-store://x")
    store.rm("/followed", recursive=True)


def test_an_s3_server(written: Path, tmp_path: Path, s3: str) -> None:
    from pyarrow.fs import FileSystem, LocalFileSystem, copy_files

    store, root = FileSystem.from_uri(s3)

    def upload(step: int, *, source: str = "bundles", parts: slice = slice(None)) -> None:
        folder = written / source / name(step)
        # The manifest completes a step.
        for file in sorted(files(folder), key=lambda each: each == "manifest.json")[parts]:
            target = f"{root}/{name(step)}/{file}"
            copy_files(str(folder / file), target, source_filesystem=LocalFileSystem(), destination_filesystem=store)

    with pytest.raises(ServingError, match="no full bundle"):
        Follower(s3, cache=tmp_path / "none")
    upload(1)
    follower = Follower(s3)
    upload(2, parts=slice(-1))
    assert follower.poll() is None  # without its manifest
    upload(2)
    upload(4)
    assert follower.poll() is not None
    with pytest.raises(ServingError, match="the update of step 4 builds on step 3 .*, which is missing"):
        follower.poll()
    assert_same(follower.bundle, Bundle(written / "2"))
    upload(3)  # late
    assert follower.poll() is not None
    assert_same(follower.bundle, Bundle(written / "4"))
    upload(3, source="foreign")
    fresh = Follower(s3)
    assert fresh.step == 2
    with pytest.raises(ServingError, match="the update of step 3 builds on step 2 .*, another chain"):
        fresh.poll()
    upload(3)
    upload(5)
    assert follower.poll() is not None
    assert_same(Follower(s3, cache=tmp_path / "cache").bundle, follower.bundle)
    assert_same(follower.bundle, Bundle(written / "5"))


PROGRAM = """
import json, sys, time
sys.modules["torch"] = None
import numpy as np
from recis_hybrid.serving import Follower
follower = Follower(sys.argv[1])
every = np.arange(-405, 405)
while True:
    tables = {name: table.read(every) for name, table in follower.bundle.tables.items()}
    rows = {name: np.where(found[:, None], vectors, 0).astype(np.float32).tobytes().hex()
            for name, (vectors, found) in tables.items()}
    scores = follower.bundle.predict({"user": every, "items": np.stack([every, every[::-1]], axis=1)})["score"]
    print(json.dumps({"step": follower.step, "rows": rows, "scores": scores.tobytes().hex()}), flush=True)
    while follower.poll() is None:
        time.sleep(0.01)
"""


@pytest.mark.slow
def test_a_killed_follower_starts_again_and_ends_in_the_same_state(written: Path, tmp_path: Path) -> None:
    publish(written, tmp_path / "b", 1)
    every = np.arange(-405, 405)
    for step in range(2, STEPS + 1):
        program = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / "b")], stdout=subprocess.PIPE)
        assert program.stdout is not None
        try:
            first = json.loads(program.stdout.readline())
            assert first["step"] == step - 1
            publish(written, tmp_path / "b", step)
            # Killed while it applies the update, at the latest after its line; started again in the next round.
            if step < STEPS:
                continue
            state = json.loads(program.stdout.readline())
        finally:
            program.kill()
            program.wait()
            program.stdout.close()
    full = Bundle(written / str(STEPS))
    assert state["step"] == STEPS
    assert state["scores"] == full.predict(columns())["score"].tobytes().hex()
    for table, rows in state["rows"].items():
        vectors, found = full.tables[table].read(every)
        assert rows == np.where(found[:, None], vectors, np.float32(0)).tobytes().hex()
