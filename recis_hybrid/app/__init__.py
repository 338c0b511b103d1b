"""Training without a script: YAML configurations, the command ``recis-hybrid``, predictions and reports of runs.

No other package may import it. It builds on ``pipelines`` and everything below.
"""

from __future__ import annotations

from recis_hybrid.app.loaded_run import LoadedRun as LoadedRun, load_run as load_run
