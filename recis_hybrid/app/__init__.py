"""The program without a script: a configuration in YAML, the command ``recis-hybrid``, scores and reports of runs.

Nothing of the package imports it; it builds on ``pipelines`` and all below.
"""

from __future__ import annotations

from recis_hybrid.app.loaded_run import LoadedRun as LoadedRun, load_run as load_run
