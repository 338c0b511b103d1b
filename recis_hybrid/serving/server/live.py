"""The bundle in use, and its replacement by a newer one."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recis_hybrid.serving.errors import ServingError
from recis_hybrid.serving.server.layout import Layout
from recis_hybrid.serving.server.metrics import Metrics

_STEP = re.compile(r"step_(\d{6,18})")
_log = logging.getLogger("recis_hybrid.serving")


class LiveBundle:
    """The newest bundle of a folder.

    Args:
        path: A bundle, or a folder of bundles, of which the one with the highest step is used.
        load: Opens a bundle.
        name: Name of the model.
        metrics: Metrics of the server.

    Raises:
        ServingError: There is no bundle, or the newest is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], load: Callable[[Path], Any], name: str, metrics: Metrics) -> None:
        self._path = Path(path)
        self._load = load
        self._name = name
        self._metrics = metrics
        self._lock = threading.Lock()
        self._seen = _newest(self._path)
        self.layout = Layout(load(self._path))
        """The bundle and the layout of its requests. Replaced as a whole, so that a reader sees one version."""
        self._report()

    def poll(self, *, again: bool = False) -> bool:
        """Load the newest bundle if it is not in use yet. If it is damaged, log why, and keep the one in use.

        Args:
            again: Whether to try a bundle again that could not be loaded before.

        Returns:
            Whether the bundle has been replaced.
        """
        with self._lock:
            try:
                newest = _newest(self._path)
                if newest == self._seen and not again:
                    return False
                self._seen = newest
                bundle = self._load(self._path)
            # Whatever is wrong with a file must not end a server that has a bundle to serve.
            except Exception as error:
                self._metrics.reload("failed")
                step = self.layout.bundle.step
                detail = error if isinstance(error, ServingError | OSError) else repr(error)
                _log.error("a newer bundle cannot be loaded, step %d stays in use: %s", step, detail)
                return False
            if bundle.digest == self.layout.bundle.digest:
                return False
            self.layout = Layout(bundle)
            self._metrics.reload("loaded")
            self._report()
            _log.info("step %d is in use, digest %s", bundle.step, bundle.digest)
            return True

    def _report(self) -> None:
        self._metrics.bundle(self._name, self.layout.bundle.step, self.layout.bundle.digest)


def _newest(path: Path) -> tuple[str, int, int, int] | None:
    """Return what identifies the newest manifest, without reading it: its path, inode, size and time."""
    if not path.is_dir():
        return None
    manifest = path / "manifest.json"
    if not manifest.is_file():
        steps = [(int(match[1]), each) for each in path.iterdir() if (match := _STEP.fullmatch(each.name))]
        complete = [(step, each / "manifest.json") for step, each in steps if (each / "manifest.json").is_file()]
        if not complete:
            return None
        manifest = max(complete)[1]
    state = manifest.stat()
    return str(manifest), state.st_ino, state.st_size, state.st_mtime_ns
