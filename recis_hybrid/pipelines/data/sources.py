"""Sources: the sources of a trainer and their reading positions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch.utils.data import DataLoader

from recis_hybrid import distributed
from recis_hybrid.columnio import ColumnDataset, Window
from recis_hybrid.pipelines.data.resumable_source import Reader, is_endless
from recis_hybrid.pipelines.stages import Evaluate, Train
from recis_hybrid.ragged import Batch


class Sources:
    """The named sources of a trainer, which successive stages continue to read, and the current stage's own source.

    Args:
        named: Sources by name.
        open_window: Opens the files of a stage's window.
    """

    def __init__(
        self, named: Mapping[str, Iterable[Batch]], open_window: Callable[[Window], Iterable[Batch]] | None
    ) -> None:
        self._named = dict(named)
        self._open_window = open_window
        self._readers: dict[str, Reader] = {}
        # Reader of the current stage if it has its own source, and the position to restore it to after a restart.
        self._own: Reader | None = None
        self._own_state: dict[str, Any] | None = None

    @property
    def names(self) -> list[str]:
        """Names of the sources."""
        return list(self._named)

    def data(self, stage: Train | Evaluate) -> Iterable[Batch]:
        """Return the source of a stage.

        Raises:
            ValueError: There is no such source.
        """
        if stage.window is not None:
            if self._open_window is None:
                raise ValueError(
                    f"{type(stage).__name__}(window=) needs Trainer(open_window=), which opens the window's files"
                )
            return self._open_window(stage.window)
        if not isinstance(stage.data, str):
            return stage.data
        if stage.data not in self._named:
            raise ValueError(
                f"{type(stage).__name__}: there is no source {stage.data!r}, there are {sorted(self._named)}; pass it "
                f"to Trainer"
            )
        return self._named[stage.data]

    def whole_pass(self, stage: Evaluate) -> Iterable[Batch]:
        """Return the source of a stage, read from its start. The training's position in the source does not change.

        Raises:
            ValueError: There is no such source.
        """
        data = self.data(stage)
        if isinstance(data, ColumnDataset):
            return copy.copy(data)
        if isinstance(data, DataLoader) and isinstance(data.dataset, ColumnDataset) and not data.persistent_workers:
            loader = copy.copy(data)
            object.__setattr__(loader, "dataset", copy.copy(data.dataset))  # DataLoader.__setattr__ raises
            return loader
        return data

    def reader(self, stage: Train) -> Reader:
        """Return the reader of a stage. For a named source, it continues where the last stage stopped.

        Raises:
            ValueError: There is no such source, or the stage would never end.
        """
        if isinstance(stage.data, str) and stage.window is None:
            reader = self._readers.get(stage.data) or self._new_reader(self.data(stage))
            self._readers[stage.data] = reader
        else:
            reader = self._own = self._new_reader(self.data(stage))
            if self._own_state is not None:
                reader.load_state_dict(self._own_state)
                self._own_state = None
        _check_bound(stage, reader.data)
        return reader

    def _new_reader(self, data: Iterable[Batch]) -> Reader:
        return Reader(data, together=distributed.world_size() > 1)

    def leave(self, reader: Reader) -> None:
        """Close the reader of a finished stage if the stage has its own source."""
        if reader is self._own:
            reader.close()
            self._own = None

    def close(self) -> None:
        """Close all readers."""
        for reader in (*self._readers.values(), *([] if self._own is None else [self._own])):
            reader.close()
        self._readers.clear()
        self._own = self._own_state = None

    def state_dict(self) -> dict[str, Any]:
        """Return the positions of all readers."""
        readers = {name: reader.state_dict() for name, reader in self._readers.items()}
        return {"named": readers, "own": None if self._own is None else self._own.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the positions that :meth:`state_dict` returned."""
        for name, position in state["named"].items():
            if name in self._named:
                self._readers[name] = self._new_reader(self._named[name])
                self._readers[name].load_state_dict(position)
        self._own_state = state["own"]


def _check_bound(stage: Train, data: Iterable[Batch]) -> None:
    if stage.max_steps is not None or stage.endless:
        return
    unknown = stage.epochs is None and stage.window is None and not hasattr(data, "__len__")
    if is_endless(data) or unknown:
        fault = "never ends" if is_endless(data) else "has no length and may never end"
        raise ValueError(
            f"Train: the source {type(data).__name__} {fault}; set Train(max_steps=), or Train(endless=True) for a "
            f"stage that a callback stops"
        )
