"""Training without a script: YAML configurations, the command ``recis-hybrid``, predictions and reports of runs.

No other package may import it. It builds on ``pipelines`` and everything below.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recis_hybrid.app.loaded_run import LoadedRun as LoadedRun, load_run as load_run
else:

    def __getattr__(name: str) -> object:
        # Imported on first use, because `recis-hybrid serve` runs in this package but needs no torch.
        if name not in ("LoadedRun", "load_run"):
            raise AttributeError(f"module 'recis_hybrid.app' has no attribute {name!r}")
        return getattr(importlib.import_module("recis_hybrid.app.loaded_run"), name)
