"""JsonLog: the log as a JSON Lines file, which ``recis-hybrid report`` reads."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path
from typing import IO, Any

from recis_hybrid import distributed
from recis_hybrid.pipelines.arguments import check_path
from recis_hybrid.pipelines.callback import Callback, Record
from recis_hybrid.pipelines.stages import Run
from recis_hybrid.saver import Location
from recis_hybrid.saver.format.location import RemotePath


class JsonLog(Callback):
    """Appends each record of the log to a file, one JSON object per line, on rank 0.

    If an engine tracks frequent ids (``EmbeddingEngine.track``), ``hottest`` has ``[id, frequency, error]`` of each, by
    member table. Non-finite numbers become null. A resumed run removes the lines of the steps that it repeats, then
    appends.

    Args:
        path: The file; its folder is created if needed. Object stores cannot append, so there the file is rewritten
            with each checkpoint and at the end.
    """

    def __init__(self, path: str | os.PathLike[str] | Location) -> None:
        self._path: Location = path if isinstance(path, RemotePath) else check_path("JsonLog", path)
        self._file: IO[str] | None = None

    def before_fit(self, trainer: Run) -> None:
        """Open the file."""
        if distributed.rank() != 0:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = self._path.read_bytes().decode().splitlines() if self._path.exists() else []
        text = "".join(f"{line}\n" for line in lines if _step(line) <= trainer.steps_done)
        if isinstance(self._path, Path):
            self._path.write_text(text)
            self._file = open(self._path, "a")
        else:
            self._file = io.StringIO()
            self._file.write(text)

    def on_log(self, trainer: Run, record: Record) -> None:
        """Write a line."""
        if self._file is not None:
            self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
            self._file.flush()

    def after_save(self, trainer: Run, path: Location) -> None:
        """Rewrite the file if it is in an object store."""
        if isinstance(self._file, io.StringIO) and not isinstance(self._path, Path):
            self._path.write_bytes(self._file.getvalue().encode())

    def after_fit(self, trainer: Run) -> None:
        """Close the file."""
        if self._file is not None:
            self.after_save(trainer, self._path)
            self._file.close()
            self._file = None


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 2**63  # a last line truncated by a crash


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
