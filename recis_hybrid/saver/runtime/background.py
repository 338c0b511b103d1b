"""Work in a thread of its own, whose failure is not lost."""

from __future__ import annotations

import atexit
import sys
import threading
import weakref
from collections.abc import Callable
from functools import cache


class Background:
    """One piece of work at a time. Python waits for it at its end; an error that nobody was told goes to stderr."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._name = ""

    def start(self, name: str, work: Callable[[], object]) -> None:
        """Begin work, once what was begun before is done.

        Args:
            name: what it is, for the message at exit.
            work: called in the thread.

        Raises:
            BaseException: what the earlier work raised.
        """
        self.wait()
        self._name = name
        _report_at_exit().add(self)

        def run() -> None:
            try:
                work()
            except BaseException as error:  # handed to whoever waits
                self._error = error

        self._thread = threading.Thread(target=run, name=name)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the work, and raise what it raised, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def report(self) -> None:
        """Print an error that nobody was told."""
        if self._error is not None:
            print(f"recis_hybrid: {self._name} failed: {self._error}", file=sys.stderr)
            self._error = None

    def __del__(self) -> None:
        self.report()


@cache
def _report_at_exit() -> weakref.WeakSet[Background]:
    alive: weakref.WeakSet[Background] = weakref.WeakSet()
    # Python joins threads first, and then calls what is registered here.
    atexit.register(_report, alive)
    return alive


def _report(alive: weakref.WeakSet[Background]) -> None:
    for each in list(alive):
        each.report()
