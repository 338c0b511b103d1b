"""ProgressBar: progress of the current stage on stderr."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from recis_hybrid import distributed
from recis_hybrid.pipelines.callback import Callback, Record
from recis_hybrid.pipelines.metrics_record import is_reserved
from recis_hybrid.pipelines.stages import Run, Stage


class ProgressBar(Callback):
    """Shows steps, loss, logged figures and samples/s on stderr, and a line per evaluation, on rank 0.

    Figures are means over the steps since the last record of the log.
    """

    def __init__(self) -> None:
        self._bar: Any = None

    def before_stage(self, trainer: Run, stage: Stage) -> None:
        """Open the bar of a training stage."""
        steps = trainer.steps_left(stage)
        if steps is not None and distributed.rank() == 0:
            name = getattr(stage, "name", "train")
            self._bar = tqdm(desc=name, total=steps or None, unit="step", dynamic_ncols=True)

    def after_step(self, trainer: Run) -> None:
        """Advance the bar."""
        if self._bar is not None:
            self._bar.update()

    def on_log(self, trainer: Run, record: Record) -> None:
        """Show the figures of a record."""
        if distributed.rank() != 0:
            return
        if self._bar is not None and record["event"] == "train":
            figures = "".join(f", {name} {value:.4g}" for name, value in record.items() if not is_reserved(name))
            self._bar.set_postfix_str(f"loss {record['loss']:.4f}{figures}, {record['samples_per_s']:,.0f} samples/s")
        elif record["event"] == "eval":
            prefix = f"{record['name']}/"
            shown = ", ".join(f"{k.removeprefix(prefix)} {v:.5f}" for k, v in record.items() if k.startswith(prefix))
            tqdm.write(f"step {record['step']}, {record['name']}: {shown}", file=sys.stderr)

    def after_stage(self, trainer: Run, stage: Stage) -> None:
        """Close the bar."""
        self._close()

    def after_fit(self, trainer: Run) -> None:
        """Close the bar if the stage did not end normally."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
