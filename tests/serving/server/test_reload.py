"""Newer bundles, which replace the one in use without losing a request."""

from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from recis_hybrid.serving.errors import ServingError
from recis_hybrid.serving.server import Server
from tests.serving.server.servers import GOOD, SCORES, predict, request, running
from tests.serving.server.stand_in import write_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "shop", 7, 1.0)
    return tmp_path / "shop"


def wait_for(server: Server, step: int) -> None:
    while request(server, "/health")[1]["step"] != step:
        pass


def test_requests_see_the_old_or_the_new_bundle(folder: Path) -> None:
    found: list[tuple[int, dict[str, Any]]] = []
    with running(folder, poll=0.02) as server:
        done = threading.Event()

        def send() -> None:
            while not done.is_set():
                found.append(predict(server))

        threads = [threading.Thread(target=send) for _ in range(4)]
        for thread in threads:
            thread.start()
        for step in range(8, 18):
            write_model(folder, step, float(step))
            wait_for(server, step)
        done.set()
        for thread in threads:
            thread.join()
        assert predict(server)[1]["step"] == 17
    assert {status for status, _ in found} == {200}
    for _, answer in found:
        factor = 1 if answer["step"] == 7 else answer["step"]
        assert answer["outputs"]["score"] == [factor * score for score in SCORES["score"]]


def test_a_damaged_bundle_leaves_the_old_one_in_use(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "recis_hybrid.serving")
    with running(folder, poll=0) as server:
        write_model(folder, 8, None)
        assert not server.live.poll()
        assert not server.live.poll()
        assert [record.getMessage() for record in caplog.records if "cannot be loaded" in record.getMessage()] == [
            f"a newer bundle cannot be loaded, step 7 stays in use: {folder / 'step_000008'}: is damaged."
        ]
        assert predict(server)[1]["step"] == 7
        # It is tried again when it has changed.
        shutil.rmtree(folder / "step_000008")
        write_model(folder, 8, 3.0)
        assert server.live.poll()
        status, answer = predict(server)
        assert (status, answer["step"], answer["outputs"]["score"]) == (200, 8, [3 * n for n in SCORES["score"]])
        # The folder in use may go: the bundle is in memory.
        shutil.rmtree(folder)
        assert not server.live.poll()
        assert predict(server)[0] == 200


def test_versions_follow_the_bundle(folder: Path) -> None:
    with running(folder, poll=0) as server:
        assert request(server, "/v2/models/shop/versions/7/ready")[0] == 200
        write_model(folder, 9, 2.0)
        assert server.live.poll()
        assert not server.live.poll(again=True)
        assert request(server, "/v2/models/shop")[1]["versions"] == ["9"]
        assert request(server, "/v2/models/shop/versions/7/ready")[0] == 404
        assert request(server, "/health")[1] == {
            **{"live": True, "ready": True, "model": "shop", "step": 9},
            "digest": "digest of 2.0",
        }


def test_without_a_bundle_there_is_no_server(tmp_path: Path) -> None:
    write_model(tmp_path, 7, None)
    with pytest.raises(ServingError, match="is damaged"), running(tmp_path):
        pass


def test_a_column_may_come_or_go(folder: Path) -> None:
    """A request that was checked by the old bundle is computed by it."""
    with running(folder) as server:
        old = server.live.layout.bundle
        rows = old.check(GOOD)
        write_model(folder, 8, 5.0)
        wait_for(server, 8)
        assert old.run(rows)["score"].tolist() == SCORES["score"]
        assert predict(server)[1]["outputs"]["score"] == [5 * n for n in SCORES["score"]]
