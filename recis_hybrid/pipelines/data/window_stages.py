"""WindowStages: the same stages for each window of a stream, as test-then-train wants them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from recis_hybrid.columnio import Window, Windows
from recis_hybrid.pipelines.arguments import described, refuse_no_callable
from recis_hybrid.pipelines.stages import Stage


class WindowStages:
    """The stages of each window of a stream, one window after another, for ``Trainer.fit``.

    Its place can be saved: a run that is resumed goes on in the window that it was in, and does not ask for windows
    that are done and may be gone.

    Args:
        windows: The stream; each that it gives is gone through.
        stages: What is done with a window.

    Example:
        >>> from recis_hybrid.columnio import Windows
        >>> days = Windows([["monday.parquet"], ["tuesday.parquet"]])
        >>> test_then_train = WindowStages(days, lambda day: [Evaluate(window=day), Train(window=day)])
        >>> [type(stage).__name__ for stage in test_then_train]
        ['Evaluate', 'Train', 'Evaluate', 'Train']
    """

    def __init__(self, windows: Windows, stages: Callable[[Window], Sequence[Stage]]) -> None:
        if not (isinstance(windows, Iterable) and hasattr(windows, "load_state_dict")):
            raise TypeError(
                f"WindowStages: windows must be Windows, as Windows([['monday.parquet']]), got {described(windows)}"
            )
        refuse_no_callable("WindowStages", "stages", stages, "a function from a window to its stages")
        self._windows = windows
        self._stages = stages
        self._window: str | None = None
        self._number = 0
        self._resumed: tuple[str, int] | None = None

    @property
    def window(self) -> str | None:
        """The window that the last stage was of."""
        return self._window

    def __iter__(self) -> Iterator[Stage]:
        """Begins with the stage that was given last when a loaded state was taken."""
        for window in self._windows:
            first = 0
            if self._resumed is not None and self._resumed[0] == window.name:
                first, self._resumed = self._resumed[1], None
            self._window = window.name
            for number, stage in enumerate(self._stages(window)):
                if number >= first:
                    self._number = number
                    yield stage

    def stop(self) -> None:
        """End the stages instead of waiting for another window; see :meth:`Windows.stop`."""
        self._windows.stop()

    def state_dict(self) -> dict[str, Any]:
        """Return which windows are done, and which stage was given last."""
        return {"windows": self._windows.state_dict(), "window": self._window, "number": self._number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the state was taken."""
        self._windows.load_state_dict(state["windows"])
        self._resumed = None if state["window"] is None else (state["window"], state["number"])
