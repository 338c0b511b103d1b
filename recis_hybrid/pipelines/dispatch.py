"""Dispatcher: calls the callbacks of a trainer and attributes their exceptions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from recis_hybrid import distributed
from recis_hybrid.pipelines.callback import Callback, CallbackError
from recis_hybrid.pipelines.stages import Run
from recis_hybrid.pipelines.step_timer import StepTimer
from recis_hybrid.validation import check_type, describe_value

_RENAMED = {"Checkpoint": "PeriodicCheckpoint"}
"""Current class names of callbacks by their names in checkpoints of earlier versions."""


class Dispatcher:
    """The callbacks of a trainer.

    Ranks save together. With several ranks, a callback's exception or request to stop is therefore deferred until all
    ranks call :meth:`agree`.

    Args:
        run: Passed to the callbacks.
        callbacks: Called in this order.
        rescue: Saves the state after a callback raised and returns a sentence about the outcome.

    Raises:
        TypeError: ``callbacks`` is not a sequence of callbacks.
    """

    def __init__(self, run: Run, callbacks: Iterable[Callback], rescue: Callable[[], str]) -> None:
        self.callbacks = _check_callbacks(callbacks)
        self._run, self._rescue = run, rescue
        self._within_step = False
        self._stop_reason: str | None = None
        self._deferred: tuple[Callback, str, Exception] | None = None

    def call(self, hook: str, *args: Any) -> None:
        """Call a method of all callbacks.

        Raises:
            CallbackError: A callback raises. Within a step, or with several ranks, this is deferred.
        """
        for each in self.callbacks:
            try:
                getattr(each, hook)(self._run, *args)
            except CallbackError:
                raise
            except Exception as error:
                if not self._within_step and distributed.world_size() == 1:
                    raise self._error(each, hook, error) from error
                self._deferred = self._deferred or (each, hook, error)

    @contextmanager
    def within_step(self) -> Iterator[None]:
        """Defer exceptions of callbacks to :meth:`raise_deferred`, because no checkpoint can be saved within a step."""
        self._within_step = True
        try:
            yield
        finally:
            self._within_step = False

    def raise_deferred(self) -> None:
        """Raise CallbackError if a callback raised within the last step. With several ranks, :meth:`agree` does."""
        if self._deferred is not None and distributed.world_size() == 1:
            deferred, self._deferred = self._deferred, None
            raise self._error(*deferred) from deferred[2]

    def request_stop(self, reason: str) -> None:
        """Store a callback's reason to stop for :meth:`agree`."""
        self._stop_reason = self._stop_reason or reason

    def agree(self, *, interrupted: bool = False) -> tuple[str | None, bool]:
        """Share exceptions and requests to stop with the other ranks; collective.

        Args:
            interrupted: Whether this process received a signal to terminate.

        Returns:
            The reason to stop, or None; and whether any rank received a signal. All ranks make the same decision.

        Raises:
            CallbackError: A callback raised on some rank. All ranks have saved.
        """
        reason, self._stop_reason = self._stop_reason, None
        if distributed.world_size() == 1:
            return reason, interrupted
        deferred, self._deferred = self._deferred, None
        try:
            requests = distributed.all_succeed_or_raise(deferred and deferred[2], [reason, interrupted])
        except distributed.OtherRankError as error:
            raise CallbackError(
                f"a callback on rank {error.rank} raised {error.kind} at or before step {self._run.steps_done}: "
                f"{error.text}; {self._rescue()}"
            ) from None
        except Exception as error:
            if deferred is None or error is not deferred[2]:
                raise
            raise self._error(*deferred) from error
        ranks = [rank for rank, (requested, _) in enumerate(requests) if requested is not None]
        if reason is None and ranks:
            reason = f"requested by ranks {ranks}"
        return reason, any(signalled for _, signalled in requests)

    def finish(self, error: BaseException | None) -> None:
        """Call ``after_fit`` of every callback. An exception there becomes a note of ``error``, if there is one."""
        self._deferred = self._stop_reason = None
        for each in self.callbacks:
            try:
                each.after_fit(self._run)
            except Exception as another:
                if error is None:
                    raise self._error(each, "after_fit", another) from another
                error.add_note(f"{type(each).__name__}.after_fit also raised: {another!r}")

    def states(self) -> list[list[Any]]:
        """Return the class name and state of each callback."""
        return [[type(each).__name__, each.state_dict()] for each in self.callbacks]

    def load_states(self, states: list[list[Any]]) -> None:
        """Restore :meth:`states`, matching callbacks by class and order. Callbacks may have been added or removed."""
        remaining = [[_RENAMED.get(name, name), state] for name, state in states]
        for each in self.callbacks:
            match = next((entry for entry in remaining if entry[0] == type(each).__name__), None)
            if match is not None:
                remaining.remove(match)
                each.load_state_dict(match[1])

    def _error(self, callback: Callback, hook: str, error: Exception) -> CallbackError:
        return CallbackError(
            f"the callback {type(callback).__name__} raised in {hook} at step {self._run.steps_done}: "
            f"{type(error).__name__}: {error}; {self._rescue()}"
        )


@dataclass(frozen=True)
class StepObserver:
    """Reports phases of a step to the timer and backward passes to the callbacks."""

    timer: StepTimer
    dispatcher: Dispatcher

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time the block as a phase of the step, if the step is logged."""
        return self.timer.phase(name)

    def backward(self, when: Literal["before", "after"]) -> None:
        """Call ``before_backward`` or ``after_backward`` of the callbacks."""
        self.dispatcher.call(f"{when}_backward")


def _check_callbacks(callbacks: Any) -> Sequence[Callback]:
    if isinstance(callbacks, Callback | str) or not isinstance(callbacks, Iterable):
        hint = "; put it into a list" if isinstance(callbacks, Callback) else ""
        raise TypeError(f"Trainer: callbacks must be a sequence of callbacks, got {describe_value(callbacks)}{hint}")
    result = list(callbacks)
    for number, callback in enumerate(result):
        check_type("Trainer", f"callbacks[{number}]", callback, Callback, "a Callback, such as ProgressBar()")
    return result
