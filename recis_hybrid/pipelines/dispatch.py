"""Hooks: calls callbacks, and says which one has raised."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from recis_hybrid import distributed
from recis_hybrid.pipelines.callback import Callback, CallbackError
from recis_hybrid.pipelines.step_timer import Clock

if TYPE_CHECKING:
    from recis_hybrid.pipelines.trainer import Trainer


class Hooks:
    """The callbacks of a trainer.

    Ranks save together, so that what a callback raises on one of several, or its wish to stop, waits until all ranks
    look together.

    Args:
        trainer: Whose they are.
        callbacks: Called in this order.
        rescue: Saves the state after one has raised, and says what came of it.
    """

    def __init__(self, trainer: Trainer, callbacks: Sequence[Callback], rescue: Callable[[], str]) -> None:
        self.callbacks = list(callbacks)
        self._trainer, self._rescue = trainer, rescue
        self._within_step = False
        self._wish: str | None = None
        self._deferred: tuple[Callback, str, Exception] | None = None

    def call(self, hook: str, *args: Any) -> None:
        """Call a method of all callbacks; raises CallbackError if one raises, on several ranks by :meth:`agree`."""
        for each in self.callbacks:
            try:
                getattr(each, hook)(self._trainer, *args)
            except CallbackError:
                raise
            except Exception as error:
                if not self._within_step and distributed.world_size() == 1:
                    raise self._error(each, hook, error) from error
                self._deferred = self._deferred or (each, hook, error)

    @contextmanager
    def within_step(self) -> Iterator[None]:
        """In the middle of a step there is no state to save: what is raised in it is told by :meth:`settle`."""
        self._within_step = True
        try:
            yield
        finally:
            self._within_step = False

    def settle(self) -> None:
        """Raise CallbackError for what a callback has raised within the step before; on one process."""
        if self._deferred is not None and distributed.world_size() == 1:
            deferred, self._deferred = self._deferred, None
            raise self._error(*deferred) from deferred[2]

    def wish_to_stop(self, reason: str) -> None:
        """Keep the reason that a callback has for the training to end, until :meth:`agree`."""
        self._wish = self._wish or reason

    def agree(self, *, interrupted: bool = False) -> tuple[str | None, bool]:
        """Looks, all ranks together, whether a callback has raised or asked for an end; waits for the other ranks.

        Args:
            interrupted: Whether a signal has asked this process to end.

        Returns:
            Why the training is to end, on all ranks, None if it goes on; and whether a signal has asked some rank.

        Raises:
            CallbackError: A callback of some rank has raised; all ranks have saved.
        """
        wish, self._wish = self._wish, None
        if distributed.world_size() == 1:
            return wish, interrupted
        deferred, self._deferred = self._deferred, None
        try:
            requests = distributed.all_succeed_or_raise(deferred and deferred[2], [wish, interrupted])
        except distributed.OtherRankError as error:
            raise CallbackError(
                f"a callback on rank {error.rank} raised {error.kind} at step {self._trainer.steps_done} or before: "
                f"{error.text}; {self._rescue()}"
            ) from None
        except Exception as error:
            if deferred is None or error is not deferred[2]:
                raise
            raise self._error(*deferred) from error
        ranks = [rank for rank, (reason, _) in enumerate(requests) if reason is not None]
        if wish is None and ranks:
            wish = f"requested by the ranks {ranks}"
        return wish, any(signalled for _, signalled in requests)

    def finish(self, error: BaseException | None) -> None:
        """Call ``after_fit`` of every callback; what these raise does not hide an error before."""
        self._deferred = self._wish = None
        for each in self.callbacks:
            try:
                each.after_fit(self._trainer)
            except Exception as another:
                if error is None:
                    raise self._error(each, "after_fit", another) from another
                error.add_note(f"{type(each).__name__}.after_fit raised, too: {another!r}")

    def state(self) -> list[list[Any]]:
        """Return the class and state of each callback."""
        return [[type(each).__name__, each.state_dict()] for each in self.callbacks]

    def load_state(self, state: list[list[Any]]) -> None:
        """Take back what :meth:`state` gave, by class and order; callbacks may have come or gone."""
        left = [[_RENAMED.get(name, name), saved] for name, saved in state]
        for each in self.callbacks:
            mine = next((entry for entry in left if entry[0] == type(each).__name__), None)
            if mine is not None:
                left.remove(mine)
                each.load_state_dict(mine[1])

    def _error(self, callback: Callback, hook: str, error: Exception) -> CallbackError:
        return CallbackError(
            f"the callback {type(callback).__name__} raised in {hook} at step {self._trainer.steps_done}: "
            f"{type(error).__name__}: {error}; {self._rescue()}"
        )


_RENAMED = {"Checkpoint": "PeriodicCheckpoint"}
"""Class names of callbacks in the checkpoints of earlier versions."""


@dataclass(frozen=True)
class Watcher:
    """What looks on while a step of the trainer runs."""

    clock: Clock
    hooks: Hooks

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time what is done within, in a step that is logged."""
        return self.clock.phase(name)

    def backward(self, when: Literal["before", "after"]) -> None:
        """Call the callbacks."""
        self.hooks.call(f"{when}_backward")
