"""TensorBoard: the log as TensorBoard scalars and texts."""

from __future__ import annotations

import os
from typing import Any

from recis_hybrid import distributed
from recis_hybrid.pipelines.arguments import check_path
from recis_hybrid.pipelines.callback import Callback, Record
from recis_hybrid.pipelines.callbacks.record_values import digest_of, figures_of
from recis_hybrid.pipelines.stages import Run


class TensorBoard(Callback):
    """Writes every number of the log as a TensorBoard scalar, on rank 0.

    If an engine tracks frequent ids (``EmbeddingEngine.track``), those of each table are a text ``hottest/NAME``. The
    digest of each complete checkpoint is a text ``checkpoint/digest``.

    Requires ``pip install recis_hybrid[tensorboard]``.

    Args:
        path: Folder for the event files.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        check_path("TensorBoard", path)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ImportError(
                f"TensorBoard: there is no module {error.name!r}; run `pip install recis_hybrid[tensorboard]`"
            ) from error
        make: Any = SummaryWriter
        self._make: Any = lambda step: make(os.fspath(path), purge_step=step)
        self._writer: Any = None

    def before_fit(self, trainer: Run) -> None:
        """Open the event file and drop the entries of steps that a resumed run repeats."""
        if distributed.rank() == 0:
            self._writer = self._make(trainer.steps_done + 1)

    def on_log(self, trainer: Run, record: Record) -> None:
        """Write the numbers and the frequent ids of a record."""
        if self._writer is None:
            return
        for tag, value in figures_of(record).items():
            self._writer.add_scalar(tag, value, record["step"])
        if (digest := digest_of(record)) is not None:
            self._writer.add_text("checkpoint/digest", digest, record["step"])
        for name, ids in record.get("hottest", {}).items():
            rows = [f"| {each} | {frequency} | {error} |" for each, frequency, error in ids]
            table = "\n".join(["| id | frequency | error |", "| --- | --- | --- |", *rows])
            self._writer.add_text(f"hottest/{name}", table, record["step"])

    def after_fit(self, trainer: Run) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
