"""Rows in a real Redis server."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recis_hybrid.serving import Bundle, RedisSink, ServingError
from tests.support.updates import IDS, Training

redis = pytest.importorskip("redis", reason="redis is not installed")


@pytest.fixture(scope="module")
def socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Path of the Unix socket of a server."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not on PATH (apt-get install redis-server)")
    # Paths of sockets have at most 107 characters.
    folder = tmp_path_factory.mktemp("redis")
    path = str(folder / "s")
    options = ["--port", "0", "--unixsocket", path, "--save", "", "--dir", str(folder), "--daemonize", "no"]
    server = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
    try:
        client = redis.Redis(unix_socket_path=path, retry=redis.retry.Retry(redis.backoff.ConstantBackoff(0.05), 400))
        client.ping()
        client.close()
        yield path
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def client(socket: str) -> Iterator[Any]:
    client = redis.Redis(unix_socket_path=socket)
    client.flushall()
    yield client
    client.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``bundles`` (full of step 1, updates of steps 2 and 3), and full ones, ``1`` to ``4``."""
    folder = tmp_path_factory.mktemp("updates")
    training = Training(folder)
    for step in range(1, 5):
        training.train(rows=150 if step == 1 else 30)
        training.export(folder / str(step), dtype="int8")
        if step < 4:
            training.export(update=step > 1, **({"dtype": "int8"} if step == 1 else {}))
    return folder


def rows_of(client: Any, prefix: str = "ctr") -> dict[str, bytes]:
    keys = [key.decode() for key in client.scan_iter(match=f"{prefix}:*", count=1000)]
    return {key: client.get(key) for key in keys if key != f"{prefix}:version"}


def expected_rows(path: Path, prefix: str = "ctr") -> dict[str, bytes]:
    """Return the rows of a full bundle."""
    every = np.arange(-IDS, IDS)
    rows = {}
    for name, table in Bundle(path).tables.items():
        vectors, exists = table.read(every)
        rows |= {
            f"{prefix}:{name}:{each}": row.astype("<f4").tobytes()
            for each, row, found in zip(every.tolist(), vectors, exists, strict=True)
            if found
        }
    return rows


def publish(written: Path, folder: Path, step: int, source: str = "bundles") -> None:
    shutil.copytree(written / source / f"step_{step:06d}", folder / f"step_{step:06d}")


def test_rows_follow_the_updates(written: Path, tmp_path: Path, client: Any) -> None:
    client.set("other", "kept")
    client.set("ctr:itemised:5", "kept")  # another table of the same first letters
    publish(written, tmp_path, 1)
    sink = RedisSink(tmp_path, client, "ctr")
    assert sink.poll() == 1
    assert sink.poll() is None
    for step in (2, 3):
        publish(written, tmp_path, step)
        assert sink.poll() == step
        rows = rows_of(client)
        assert rows.pop("ctr:itemised:5") == b"kept"
        assert rows == expected_rows(written / str(step))
        assert json.loads(client.get("ctr:version")) == {"step": step, "digest": sink.version().digest}  # type: ignore[union-attr]
    # A full bundle replaces all rows.
    publish(written, tmp_path, 4, source="4")
    assert RedisSink(tmp_path, client, "ctr").poll() == 4
    assert {key: row for key, row in rows_of(client).items() if "itemised" not in key} == expected_rows(written / "4")
    assert client.get("other") == b"kept"


def test_a_prefix_may_have_letters_of_patterns(written: Path, tmp_path: Path, client: Any) -> None:
    publish(written, tmp_path, 1)
    client.set("a*b:user:999999", "kept")
    prefix = "a[*]?\\b"
    client.set(f"{prefix}:user:999999", "stale")
    RedisSink(tmp_path, client, prefix).poll()
    assert client.get("a*b:user:999999") == b"kept"
    assert client.get(f"{prefix}:user:999999") is None
    assert client.exists(*expected_rows(written / "1", prefix)) == len(expected_rows(written / "1", prefix))


class Dying:
    """A client whose n-th command does not return, as if the process had been killed."""

    def __init__(self, client: Any, commands: int) -> None:
        self._client, self._left = client, commands

    def __getattr__(self, name: str) -> Any:
        if name in ("set", "pipeline", "scan"):
            self._left -= 1
            if self._left < 0:
                raise KeyboardInterrupt
        return getattr(self._client, name)


@pytest.mark.parametrize("source", ["bundles", "4"])
def test_a_sink_that_dies_continues(written: Path, tmp_path: Path, client: Any, source: str) -> None:
    for step in (1, 2, 3):
        publish(written, tmp_path, step)
    if source == "4":
        RedisSink(tmp_path, client, "ctr").poll()
        publish(written, tmp_path, 4, source="4")
    deaths = 0
    for commands in range(100):
        sink = RedisSink(tmp_path, Dying(client, commands), "ctr")
        before = sink.version()
        try:
            sink.poll()
        except KeyboardInterrupt:
            deaths += 1
            # The version never names rows that are not there.
            version = RedisSink(tmp_path, client, "ctr").version()
            assert version is None or before is None or version.step >= before.step
            continue
        break
    assert deaths >= 3
    assert rows_of(client) == expected_rows(written / ("3" if source == "bundles" else "4"))


def test_urls_and_text_answers(written: Path, tmp_path: Path, client: Any, socket: str) -> None:
    publish(written, tmp_path, 1)
    client.set("ctr:user:77777", "stale")
    for url in (f"unix://{socket}", f"unix://{socket}?decode_responses=true"):
        sink = RedisSink(tmp_path, url, "ctr")
        sink.poll()
        assert sink.version() is not None
        sink._client.close()
    assert rows_of(client) == expected_rows(written / "1")
    with pytest.raises(redis.ConnectionError):
        RedisSink(tmp_path, f"unix://{socket}.none", "ctr").poll()


def test_chains_and_versions_that_are_refused(written: Path, tmp_path: Path, client: Any) -> None:
    publish(written, tmp_path, 1)
    sink = RedisSink(tmp_path, client, "ctr")
    sink.poll()
    publish(written, tmp_path, 3)
    with pytest.raises(ServingError, match="the update of step 3 builds on step 2 .* is missing"):
        sink.poll()
    assert rows_of(client) == expected_rows(written / "1")
    client.set("ctr:version", "7")
    with pytest.raises(ServingError, match="ctr:version in Redis is not a version: b'7'"):
        sink.poll()


def test_a_missing_package_is_an_error_that_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ServingError, match=r"install recis_hybrid\[redis\]"):
        RedisSink(tmp_path, "redis://localhost", "ctr")


def test_the_code_blocks_of_the_guide_run(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: Any, socket: str
) -> None:
    monkeypatch.chdir(tmp_path)
    training = Training(tmp_path)
    training.train(rows=4000)
    training.export(tmp_path / "live")

    def update() -> None:
        training.train(rows=4000)
        training.export(tmp_path / "live", update=True)

    blocks = re.findall(r"^```python\n(.*?)^```$", (root / "docs" / "updates.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, Any] = {"__name__": "guide", "publish_an_update": update, "redis_url": f"unix://{socket}"}
    try:
        for block in blocks:
            exec(compile(block, "docs/updates.md", "exec"), names)
        vectors, exists = names["follower"].bundle.tables["item"].read(np.array([7]))
        assert exists.tolist() == [True]
        assert names["vector"].tobytes() == vectors[0].tobytes()
    finally:
        names["client"].close()
        names["sink"]._client.close()
