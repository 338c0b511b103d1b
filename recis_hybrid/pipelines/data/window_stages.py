"""WindowStages: the same stages for each window of a stream, for example test-then-train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from recis_hybrid.columnio import Window, Windows
from recis_hybrid.pipelines.arguments import check_callable
from recis_hybrid.pipelines.stages import Stage
from recis_hybrid.validation import describe_value


class WindowStages:
    """The stages of each window of a stream, one window after another, for ``Trainer.fit``.

    Its position can be saved. A restarted run continues in its window and does not open earlier ones, which may have
    been deleted.

    Args:
        windows: The stream of windows.
        stages: Function from a window to its stages.

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
                f"WindowStages: windows must be Windows, such as Windows([['monday.parquet']]), got "
                f"{describe_value(windows)}"
            )
        check_callable("WindowStages", "stages", stages, "a function from a window to its stages")
        self._windows = windows
        self._stages = stages
        self._window: str | None = None
        self._number = 0
        self._resume_at: tuple[str, int] | None = None

    @property
    def window(self) -> str | None:
        """Name of the window of the last stage yielded."""
        return self._window

    def __iter__(self) -> Iterator[Stage]:
        """Yield the stages. If a state was loaded, start with the last stage before the checkpoint."""
        for window in self._windows:
            first = 0
            if self._resume_at is not None and self._resume_at[0] == window.name:
                first, self._resume_at = self._resume_at[1], None
            self._window = window.name
            for number, stage in enumerate(self._stages(window)):
                if number >= first:
                    self._number = number
                    yield stage

    def stop(self) -> None:
        """End iteration instead of waiting for another window; see :meth:`Windows.stop`."""
        self._windows.stop()

    def state_dict(self) -> dict[str, Any]:
        """Return the completed windows and the number of the last stage."""
        return {"windows": self._windows.state_dict(), "window": self._window, "number": self._number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position that :meth:`state_dict` returned."""
        self._windows.load_state_dict(state["windows"])
        self._resume_at = None if state["window"] is None else (state["window"], state["number"])
