"""JsonLog: the log as a file of JSON lines, which ``recis-hybrid report`` reads."""

from __future__ import annotations

import json
import math
import os
from typing import IO, TYPE_CHECKING, Any

from recis_hybrid.pipelines.arguments import path_of
from recis_hybrid.pipelines.callback import Callback, Record, rank

if TYPE_CHECKING:
    from recis_hybrid.pipelines.trainer import Trainer


class JsonLog(Callback):
    """Appends each record of the log to a file, one JSON object a line; on rank 0 alone.

    What is not a finite number is null. A run that is resumed goes on in the file: lines of steps after the checkpoint
    are taken out first, since those steps are done again.

    Args:
        path: The file; its folder is made if it is not there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path_of("JsonLog", path)
        self._file: IO[str] | None = None

    def before_fit(self, trainer: Trainer) -> None:
        """Opens the file."""
        if rank() != 0:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            kept = [line for line in self._path.read_text().splitlines() if _step(line) <= trainer.steps_done]
            self._path.write_text("".join(f"{line}\n" for line in kept))
        self._file = open(self._path, "a")

    def on_log(self, trainer: Trainer, record: Record) -> None:
        """Writes a line."""
        if self._file is not None:
            self._file.write(json.dumps(_plain(record), allow_nan=False) + "\n")
            self._file.flush()

    def after_fit(self, trainer: Trainer) -> None:
        """Closes the file."""
        if self._file is not None:
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
