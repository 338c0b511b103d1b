"""Windows: folders of files that arrive over time; a model is evaluated on each and then trained on it."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from recis_hybrid.columnio.ranks import choose_on_first_rank, has_other_ranks

if TYPE_CHECKING:
    from recis_hybrid.columnio.files.paths import Paths

_VERSION = 1


@dataclass(frozen=True)
class Window:
    """Files that belong together, such as those of an hour or a day."""

    name: str
    """Unique name: that of the folder, or the number in a list."""
    paths: Sequence[str]
    """Paths for a ColumnDataset."""


class Windows:
    """An endless stream of complete windows, in the order of their names.

    A window is a folder in ``source``. It is complete once it contains the file ``marker``, which its writer creates
    last. A window completed late is yielded late. No window is yielded twice, even if it is removed and rewritten,
    because the state records the names of all finished windows. Names that begin with a dot or an underscore are
    ignored. A window is finished once the next one is requested. A job killed within a window restarts that window, or
    resumes within it from the state of its ColumnDataset.

    With torch.distributed, all ranks must request the windows of a folder together. Rank 0 polls for the next window
    and sends its name to all ranks by a collective of the default group, in the requesting thread. The other ranks take
    the window of that name from their own ``source`` without polling.

    Args:
        source: A folder or its URL, which need not exist yet; or a list of windows, each a path or a sequence of paths,
            after which the stream ends.
        marker: File that marks a folder as complete.
        poll_s: Seconds between two polls of the folder.
        idle_s: End the stream after this many seconds without a new window; None never ends it.
        filesystem: File system of ``source``, from ``pyarrow.fs`` or fsspec; None means the local one, or that of a
            URL.
        sleep: Called with the seconds to wait; None waits that long, or until :meth:`stop` is called.
        alone: Poll in this process alone, even with torch.distributed.

    Raises:
        ValueError: ``poll_s`` is not positive, or ``idle_s`` is negative.

    Example:
        >>> windows = Windows([["day-1.parquet"], ["day-2.parquet", "day-2b.parquet"]])
        >>> for window in windows:
        ...     print(window.name, *window.paths)  # evaluate on it, then train on it
        0 day-1.parquet
        1 day-2.parquet day-2b.parquet
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Sequence[Paths],
        *,
        marker: str = "_SUCCESS",
        poll_s: float = 10.0,
        idle_s: float | None = None,
        filesystem: Any = None,
        sleep: Callable[[float], None] | None = None,
        alone: bool = False,
    ) -> None:
        if poll_s <= 0 or (idle_s is not None and idle_s < 0):
            raise ValueError(
                f"Windows: poll_s must be positive and idle_s must not be negative, got {poll_s} and {idle_s}"
            )
        self._source, self._marker, self._filesystem = source, marker, filesystem
        self._poll_s, self._idle_s, self._sleep = poll_s, idle_s, sleep or self._wait
        self._stopped, self._wakeups = False, SimpleQueue[None]()
        self._alone, self._is_list = alone, not isinstance(source, str | os.PathLike)
        self._done: set[str] = set()

    def __repr__(self) -> str:
        source = self._source
        text = os.fspath(source) if isinstance(source, str | os.PathLike) else f"{len(source)} windows"
        return f"Windows({text}; {len(self._done)} done)"

    def state_dict(self) -> dict[str, Any]:
        """Return the names of the finished windows, in JSON types."""
        return {"version": _VERSION, "done": sorted(self._done)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the windows that were finished when ``state`` was saved.

        Args:
            state: The result of ``state_dict``.

        Raises:
            ValueError: ``state`` is not a state of Windows.
        """
        if state.get("version") != _VERSION or not isinstance(state.get("done"), list):
            raise ValueError(f"Windows.load_state_dict: this is not a state of Windows: {dict(state)}")
        self._done = set(state["done"])

    def stop(self) -> None:
        """End the stream instead of waiting for another window; may be called from a signal handler.

        If several ranks request windows together, a call on rank 0 ends the stream on all of them.
        """
        self._stopped = True
        self._wakeups.put(None)

    def _wait(self, seconds: float) -> None:
        with contextlib.suppress(Empty):
            self._wakeups.get(timeout=seconds)

    def __iter__(self) -> Iterator[Window]:
        """Yield the windows that are not finished, waiting for new ones to appear.

        Raises:
            RuntimeError: Rank 0, which chooses for all ranks, failed.
        """
        idle = 0.0
        self._stopped, self._wakeups = False, SimpleQueue()
        while True:
            # Poll again after each window: an earlier one may have been completed in the meantime.
            poll = functools.partial(self._poll, idle)
            together = not self._alone and not self._is_list and has_other_ranks()
            name, ended = choose_on_first_rank(poll) if together else poll()
            if name is not None:
                idle = 0.0
                yield self._window(name)
                # Names are kept even if windows disappear. Otherwise a temporarily unreachable folder, or a rewritten
                # marker, would yield all its rows again.
                self._done.add(name)
                continue
            if ended:
                return
            # All ranks take part in each poll, so that none waits in a collective until a window appears.
            self._sleep(self._poll_s)
            idle += self._poll_s

    def _poll(self, idle: float) -> tuple[str | None, bool]:
        """Return the name of the next window or None, and whether the stream has ended."""
        if self._stopped:
            return None, True
        if isinstance(self._source, str | os.PathLike):
            names = _complete_folders(os.fspath(self._source), self._marker, self._filesystem)
        else:
            names = [str(number) for number in range(len(self._source))]
        name = next((name for name in sorted(names, key=_order) if name not in self._done), None)
        return name, name is None and (self._is_list or (self._idle_s is not None and idle >= self._idle_s))

    def _window(self, name: str) -> Window:
        if isinstance(self._source, str | os.PathLike):
            # The query of a URL stays at its end.
            source = os.fspath(self._source)
            head, _, query = source.partition("?") if "://" in source else (source, "", "")
            return Window(name, [f"{head.rstrip('/')}/{name}" + (f"?{query}" if query else "")])
        paths = self._source[int(name)]
        return Window(name, [os.fspath(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)])


def _order(name: str) -> tuple[int, str]:
    # Numbers sort by value, even without leading zeros. Other names sort alphabetically, before all numbers.
    return (int(name), "") if name.isdecimal() else (-1, name)


def _complete_folders(source: str, marker: str, filesystem: Any) -> list[str]:
    import pyarrow.fs as pafs

    from recis_hybrid.columnio.files.paths import as_filesystem, locate

    location, path = locate(source, None if filesystem is None else as_filesystem(filesystem))
    infos = location.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    folders = [info for info in infos if info.type == pafs.FileType.Directory and info.base_name[:1] not in "._"]
    if not folders:
        return []
    markers = location.get_file_info([f"{info.path}/{marker}" for info in folders])
    return [
        info.base_name
        for info, marker_info in zip(folders, markers, strict=True)
        if marker_info.type == pafs.FileType.File
    ]
