"""Interruption: end a training between two steps, with a checkpoint, on Ctrl-C, SIGTERM or SIGUSR1."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from recis_hybrid import distributed

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
_REPEAT_SECONDS = 5.0
"""Interval in which ranks under torchrun ignore a second signal: a scheduler signals both torchrun and the ranks, and
torchrun forwards its signal to the ranks."""


class Terminated(SystemExit):
    """A signal other than Ctrl-C ended the training. The exit status is 128 + the signal's number."""


class WaitInterrupted(KeyboardInterrupt):
    """Raised in a wait for batches or stages to end the wait and the training."""


class Interruption:
    """Records the first signal, which ends the training; a second signal ends the process immediately.

    The ``with`` block installs handlers for signals that have Python's default handler, and only in the main thread.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        """The signal that this process received."""
        self.wake: Callable[[], object] | None = None
        """Called on the first signal, to end a wait that must not be ended by an exception."""
        self._previous: dict[signal.Signals, Any] = {}
        self._interruptible = False
        self._raised = False
        self._first = 0.0

    def __enter__(self) -> Interruption:
        self.requested, self.wake, self._previous = None, None, {}
        self._interruptible = self._raised = False
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                if signal.getsignal(number) == default:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        requested, self.requested, self._previous = self.requested, None, {}
        if error is None and requested is not None and not self._raised:
            raise self.error(requested)  # the signal arrived after the last check

    def error(self, received: signal.Signals | None) -> BaseException:
        """Return the exception that ends the training.

        Args:
            received: The signal; None if only other ranks received one.
        """
        self._raised = True
        if received == signal.SIGINT:
            return KeyboardInterrupt()
        return Terminated(128 + (signal.SIGTERM if received is None else received))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let a signal raise WaitInterrupted in the block, which discards the block's results."""
        self._interruptible = bool(self._previous)
        try:
            if self._interruptible and self.requested is not None:
                raise WaitInterrupted
            yield
        finally:
            self._interruptible = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            if time.monotonic() - self._first > _REPEAT_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        self.requested, self._first = signal.Signals(number), time.monotonic()
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            # A Python handler would not run while the main thread is in native code. The default action does.
            for each in self._previous:
                signal.signal(each, self._previous[each] if _is_interactive() else signal.SIG_DFL)
        if distributed.rank() == 0:
            # print is not reentrant, and the signal may have interrupted one.
            text = f"\nrecis_hybrid: {self.requested.name}: ending after this step; a second signal ends immediately\n"
            os.write(2, text.encode())
        if self.wake is not None:
            self.wake()
        if self._interruptible:
            self._interruptible = False
            raise WaitInterrupted


def _is_interactive() -> bool:
    """Return whether a second Ctrl-C should raise KeyboardInterrupt, as in a notebook, rather than end the process."""
    return hasattr(sys, "ps1") or "IPython" in sys.modules
