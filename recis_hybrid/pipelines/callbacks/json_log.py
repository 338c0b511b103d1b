"""JsonLog: the log as a file of JSON lines, which ``recis-hybrid report`` reads."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from recis_hybrid import distributed
from recis_hybrid.pipelines.arguments import path_of
from recis_hybrid.pipelines.callback import Callback, Record
from recis_hybrid.saver import Location
from recis_hybrid.saver.format.location import RemotePath

if TYPE_CHECKING:
    from recis_hybrid.pipelines.trainer import Trainer


class JsonLog(Callback):
    """Appends each record of the log to a file, one JSON object a line; on rank 0 alone.

    What is not a finite number is null. A run that is resumed goes on in the file: lines of steps after the checkpoint
    are taken out first, since those steps are done again.

    Args:
        path: The file; its folder is made if it is not there. An object store takes no lines: there the file is
            written anew with each checkpoint and at the end.
    """

    def __init__(self, path: str | os.PathLike[str] | Location) -> None:
        self._path: Location = path if isinstance(path, RemotePath) else path_of("JsonLog", path)
        self._file: IO[str] | None = None

    def before_fit(self, trainer: Trainer) -> None:
        """Open the file."""
        if distributed.rank() != 0:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = self._path.read_bytes().decode().splitlines() if self._path.exists() else []
        kept = "".join(f"{line}\n" for line in lines if _step(line) <= trainer.steps_done)
        if isinstance(self._path, Path):
            self._path.write_text(kept)
            self._file = open(self._path, "a")
        else:
            self._file = io.StringIO()
            self._file.write(kept)

    def on_log(self, trainer: Trainer, record: Record) -> None:
        """Write a line."""
        if self._file is not None:
            self._file.write(json.dumps(_plain(record), allow_nan=False) + "\n")
            self._file.flush()

    def after_save(self, trainer: Trainer, path: Location) -> None:
        """Rewrites the file in an object store."""
        if isinstance(self._file, io.StringIO) and not isinstance(self._path, Path):
            self._path.write_bytes(self._file.getvalue().encode())

    def after_fit(self, trainer: Trainer) -> None:
        """Close the file."""
        if self._file is not None:
            self.after_save(trainer, self._path)
            self._file.close()
            self._file = None


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 2**63  # the end of a line that a crash has cut


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
