"""Batches of waiting requests, the bounded queue, and timeouts."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from recis_hybrid.serving.server import Server
from tests.serving.server.servers import connect, predict, request, running
from tests.serving.server.stand_in import SumModel, write_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "shop", 7, 1.0)
    return tmp_path / "shop"


@pytest.fixture
def clients() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def one(user: int, rows: int = 1) -> dict[str, Any]:
    return {"user": [user] * rows, "items": [[]] * rows, "text": [""] * rows, "price": [[user, 0]] * rows}


def sent_while_busy(
    server: Server, clients: ThreadPoolExecutor, users: list[int], rows: int = 1
) -> tuple[list[tuple[int, dict[str, Any]]], list[int]]:
    """Send requests while a run is held up; return their answers, and the rows of the runs after it."""
    model: SumModel = server.live.layout.bundle
    # The first run of a server is on another thread, because its time is unknown.
    model.gate.clear()
    first = clients.submit(predict, server, **one(1))
    model.entered.acquire()
    answers = []
    for number, user in enumerate(users):
        answers.append(clients.submit(predict, server, **one(user, rows)))
        wait_for_queue(server, number + 1)
    model.gate.set()
    assert first.result()[0] == 200
    return [answer.result() for answer in answers], model.runs[1:]


def wait_for_queue(server: Server, size: int) -> None:
    while metric(server, "recis_hybrid_queue_requests") < size:
        pass


def metric(server: Server, name: str) -> float:
    connection = connect(server)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return next(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(f"{name} "))


def test_waiting_requests_are_one_run(folder: Path, clients: ThreadPoolExecutor) -> None:
    with running(folder) as server:
        answers, runs = sent_while_busy(server, clients, [3, 4, 5, 6], rows=2)
        assert [answer["outputs"]["score"] for _, answer in answers] == [[n, n] for n in (3, 4, 5, 6)]
        assert [answer["outputs"]["pair"] for _, answer in answers] == [[[n, 0]] * 2 for n in (3, 4, 5, 6)]
        assert runs == [8]
        assert metric(server, "recis_hybrid_batch_requests_sum") == 5
        assert metric(server, "recis_hybrid_batch_rows_sum") == 9


def test_a_batch_has_a_limit(folder: Path, clients: ThreadPoolExecutor) -> None:
    with running(folder, max_batch=5) as server:
        answers, runs = sent_while_busy(server, clients, [3, 4, 5, 6, 7], rows=2)
        assert {status for status, _ in answers} == {200}
        assert runs == [4, 4, 2]
        # A larger request is a run of its own.
        assert predict(server, **one(3, 20))[0] == 200
        assert server.live.layout.bundle.runs[-1] == 20


def test_one_bad_request_does_not_spoil_the_others(folder: Path, clients: ThreadPoolExecutor) -> None:
    with running(folder) as server:
        answers, runs = sent_while_busy(server, clients, [3, -4, 13, 6])
        assert [status for status, _ in answers] == [200, 400, 500, 200]
        assert answers[1][1]["error"] == "column 'user': must not be negative"
        assert [answers[n][1]["outputs"]["score"] for n in (0, 3)] == [[3], [6]]
        assert runs == [4, 1, 1, 1, 1]


def test_the_queue_is_bounded(folder: Path, clients: ThreadPoolExecutor) -> None:
    with running(folder, max_queue=2) as server:
        model = server.live.layout.bundle
        model.gate.clear()
        running_ = clients.submit(predict, server, **one(1))
        model.entered.acquire()
        waiting: list[Future[tuple[int, dict[str, Any]]]] = []
        for number in range(2):
            waiting.append(clients.submit(predict, server, **one(2)))
            wait_for_queue(server, number + 1)
        status, answer, headers = request(server, "/predict", {"columns": one(3)})
        assert (status, headers["retry-after"]) == (503, "1")
        assert answer["error"].startswith("the server is overloaded: 2 requests are waiting")
        model.gate.set()
        assert [each.result()[0] for each in (running_, *waiting)] == [200] * 3
        assert predict(server)[0] == 200


def test_a_request_times_out_and_is_not_run(folder: Path, clients: ThreadPoolExecutor) -> None:
    with running(folder, timeout=0.2) as server:
        model = server.live.layout.bundle
        model.gate.clear()
        first = clients.submit(predict, server, **one(1))
        model.entered.acquire()
        status, answer = predict(server, **one(2, rows=2))
        assert (status, answer["error"]) == (504, "the scores were not ready within 0.2 s. Send fewer rows.")
        assert first.result()[0] == 504
        model.gate.set()
        while predict(server, **one(3, rows=3))[0] != 200:
            pass
        # The second request left the queue when its time was over.
        assert set(model.runs) == {1, 3}


def test_a_request_in_flight_is_answered_after_stop(folder: Path, clients: ThreadPoolExecutor) -> None:
    with running(folder) as server:
        model = server.live.layout.bundle
        model.gate.clear()
        first = clients.submit(predict, server, **one(5))
        model.entered.acquire()
        server.stop()
        model.gate.set()
        status, answer = first.result()
        assert (status, answer["outputs"]["score"]) == (200, [5])


def test_several_threads_run_at_once(folder: Path, clients: ThreadPoolExecutor) -> None:
    with running(folder, threads=2) as server:
        model = server.live.layout.bundle
        model.gate.clear()
        answers = [clients.submit(predict, server, **one(1))]
        model.entered.acquire()
        answers.append(clients.submit(predict, server, **one(2)))
        # Both are in the model.
        model.entered.acquire()
        model.gate.set()
        assert [each.result()[1]["outputs"]["score"] for each in answers] == [[1], [2]]
