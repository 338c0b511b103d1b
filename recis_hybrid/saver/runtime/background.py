"""Work in a background thread; failures are reported."""

from __future__ import annotations

import atexit
import sys
import threading
import weakref
from collections.abc import Callable
from functools import cache


class Background:
    """A thread for one piece of work at a time.

    The process waits for the work before it ends; an exception that no caller has received is printed to stderr.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._name = ""

    def start(self, name: str, work: Callable[[], object]) -> None:
        """Start work once the previous work is done.

        Args:
            name: Description of the work, for the message at exit.
            work: Called in the thread.

        Raises:
            BaseException: The previous work raised it.
        """
        self.wait()
        self._name = name
        _report_at_exit().add(self)

        def run() -> None:
            try:
                work()
            except BaseException as error:  # raised by wait()
                self._error = error

        self._thread = threading.Thread(target=run, name=name)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the work; raise the exception that it raised, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def join(self) -> None:
        """Wait for the work; leave its exception to :meth:`wait`."""
        if self._thread is not None:
            self._thread.join()

    def report(self) -> None:
        """Print an exception that no caller has received."""
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
