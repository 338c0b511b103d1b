"""Requests that wait while the model runs are computed together in the next run.

An idle server starts a run at once: no request waits for others to come.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from recis_hybrid.serving.columns import Rows
from recis_hybrid.serving.server.errors import RequestError
from recis_hybrid.serving.server.metrics import Metrics

Outputs = dict[str, npt.NDArray[np.float32]]
# A run that is expected to take less time than this stays on the thread of the event loop. Handing it to another thread
# and back costs about 0.1 ms, and Python's lock keeps the event loop from doing much else meanwhile.
_SHORT_RUN = 0.002
# Runs of fewer rows take about as long as one of this many.
_FIXED_ROWS = 64


class Model(Protocol):
    """The part of a bundle that computes scores."""

    def run(self, rows: Rows) -> Mapping[str, npt.NDArray[np.float32]]:
        """Return float32 ``[B]`` or ``[B, k]`` for each output."""


@dataclass(frozen=True, eq=False)
class _Request:
    model: Model
    rows: Rows
    answer: asyncio.Future[Outputs]


class Batcher:
    """A bounded queue of requests, and the threads that compute them.

    Its methods are called on the thread of one event loop.

    Args:
        threads: Number of runs at once. With one thread, short runs stay on the thread of the event loop.
        max_batch: Number of rows up to which requests are computed together.
        max_queue: Number of requests that may wait.
        metrics: Metrics of the server.
    """

    def __init__(self, threads: int, max_batch: int, max_queue: int, metrics: Metrics) -> None:
        self._threads = threads
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._metrics = metrics
        self._waiting: deque[_Request] = deque()
        self._running = 0
        self._is_scheduled = False
        # Seconds a row of the latest runs. Their minimum is not disturbed by other programs on the machine.
        self._seconds_a_row: deque[float] = deque([float("inf")], 8)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="run")
        metrics.queue.set_function(lambda: len(self._waiting))

    async def run(self, model: Model, rows: Rows) -> Outputs:
        """Compute the scores of a request, alone or together with others that wait.

        Args:
            model: Bundle that has checked the rows.
            rows: Checked rows.

        Returns:
            Scores by output.

        Raises:
            RequestError: The queue is full.
            InputError: An operator of the bundle refuses a value of this request.
        """
        if len(self._waiting) >= self._max_queue:
            text = f"the server is overloaded: {self._max_queue} requests are waiting. Try again later."
            raise RequestError(503, text)
        loop = asyncio.get_running_loop()
        request = _Request(model, rows, loop.create_future())
        self._waiting.append(request)
        self._schedule(loop)
        return await request.answer

    def close(self) -> None:
        """Wait for the runs in progress."""
        self._pool.shutdown()

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        # The run starts in the next iteration of the event loop, so that requests that have arrived already join it.
        if not self._is_scheduled and self._running < self._threads:
            self._is_scheduled = True
            loop.call_soon(self._start, loop)

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_scheduled = False
        batch = self._next_batch()
        if not batch:
            return
        rows = sum(request.rows.rows for request in batch)
        if self._threads == 1 and min(self._seconds_a_row) * max(rows, _FIXED_ROWS) < _SHORT_RUN:
            self._finish(batch, *_timed_run(batch))
        else:
            self._running += 1
            future = loop.run_in_executor(self._pool, _timed_run, batch)
            future.add_done_callback(lambda done: self._finish_elsewhere(loop, batch, done))
        if self._waiting:
            self._schedule(loop)

    def _next_batch(self) -> list[_Request]:
        """Remove the next requests from the queue: of one bundle, and ``max_batch`` rows at most, or one request."""
        batch: list[_Request] = []
        rows = 0
        while self._waiting:
            request = self._waiting[0]
            # A request that has timed out is cancelled.
            if not request.answer.done():
                if batch and (request.model is not batch[0].model or rows + request.rows.rows > self._max_batch):
                    break
                batch.append(request)
                rows += request.rows.rows
            self._waiting.popleft()
        return batch

    def _finish_elsewhere(
        self,
        loop: asyncio.AbstractEventLoop,
        batch: Sequence[_Request],
        done: asyncio.Future[tuple[list[Outputs | Exception], float]],
    ) -> None:
        self._running -= 1
        self._finish(batch, *done.result())
        if self._waiting:
            self._schedule(loop)

    def _finish(self, batch: Sequence[_Request], answers: list[Outputs | Exception], seconds: float) -> None:
        rows = sum(request.rows.rows for request in batch)
        self._seconds_a_row.append(seconds / max(rows, _FIXED_ROWS))
        self._metrics.run_seconds.observe(seconds)
        self._metrics.batch_rows.observe(rows)
        self._metrics.batch_requests.observe(len(batch))
        for request, answer in zip(batch, answers, strict=True):
            if request.answer.done():
                continue
            if isinstance(answer, Exception):
                request.answer.set_exception(answer)
            else:
                request.answer.set_result(answer)


def _timed_run(batch: Sequence[_Request]) -> tuple[list[Outputs | Exception], float]:
    begin = time.perf_counter()
    answers = _run(batch)
    return answers, time.perf_counter() - begin


def _run(batch: Sequence[_Request]) -> list[Outputs | Exception]:
    """Return the scores of each request, or its error."""
    model = batch[0].model
    try:
        if len(batch) == 1:
            return [dict(model.run(batch[0].rows))]
        outputs = model.run(Rows.concat([request.rows for request in batch]))
    except Exception as error:
        if len(batch) == 1:
            return [error]
        # One request can have caused it; the others must not suffer.
        return [answer for request in batch for answer in _run([request])]
    answers: list[Outputs | Exception] = []
    first = 0
    for request in batch:
        last = first + request.rows.rows
        answers.append({name: values[first:last] for name, values in outputs.items()})
        first = last
    return answers
