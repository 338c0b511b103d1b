"""The bundle in use, and its replacement by a newer one."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Any, Protocol

from recis_hybrid.serving.bundle import Bundle
from recis_hybrid.serving.errors import ServingError
from recis_hybrid.serving.server.layout import Layout
from recis_hybrid.serving.server.metrics import Metrics
from recis_hybrid.serving.updates.follower import Follower

_log = logging.getLogger("recis_hybrid.serving")


class Source(Protocol):
    """A source of bundles, such as a ``Follower``."""

    @property
    def bundle(self) -> Any:
        """The newest bundle that has been loaded."""

    def poll(self) -> Any | None:
        """Load what has appeared, and return the new bundle; None if there is nothing new."""


class OneBundle:
    """A bundle that is never replaced.

    Args:
        bundle: The bundle.
    """

    def __init__(self, bundle: Any) -> None:
        self.bundle = bundle
        """The bundle."""

    def poll(self) -> None:
        """Return None."""


def source_of(path: str | os.PathLike[str]) -> Source:
    """Return the source of a bundle, or of a folder or URL to which bundles and updates are written.

    Args:
        path: A ``step_…`` folder, or a folder or URL of several.

    Raises:
        ServingError: There is no bundle, or it is damaged.
    """
    if "://" not in os.fspath(path) and (Path(path) / "manifest.json").is_file():
        return OneBundle(Bundle(path))
    return Follower(path)


class LiveBundle:
    """The bundle in use.

    Args:
        source: Source of the bundle and of those that replace it.
        path: Folder that the source reads.
        name: Name of the model.
        metrics: Metrics of the server.
    """

    def __init__(self, source: Source, path: str | os.PathLike[str], name: str, metrics: Metrics) -> None:
        self._source = source
        self._path = os.fspath(path)
        self._name = name
        self._metrics = metrics
        self._lock = threading.Lock()
        # Files of the folder at the last failure: without a change they would fail again, after being read again.
        self._failed: dict[str, tuple[int, int, int]] | None = None
        self.layout = Layout(source.bundle)
        """The bundle and the layout of its requests. Replaced as a whole, so that a reader sees one version."""
        self._report()

    def poll(self, *, again: bool = False) -> bool:
        """Use a newer bundle if there is one. If it is damaged, log why, and keep the one in use.

        Args:
            again: Whether to try a damaged bundle again although its folder has not changed.

        Returns:
            Whether the bundle has been replaced.
        """
        with self._lock:
            present = _manifests(self._path)
            if present is not None and present == self._failed and not again:
                return False
            try:
                bundle = self._source.poll()
                self._failed = None
            # Whatever is wrong with a file must not end a server that has a bundle to serve.
            except Exception as error:
                self._failed = present
                self._metrics.reload("failed")
                step = self.layout.bundle.step
                detail = error if isinstance(error, ServingError | OSError) else repr(error)
                _log.error("a newer bundle cannot be loaded, step %d stays in use: %s", step, detail)
                return False
            if bundle is None:
                return False
            self.layout = Layout(bundle)
            self._metrics.reload("loaded")
            self._report()
            _log.info("step %d is in use, digest %s", bundle.step, bundle.digest)
            return True

    def _report(self) -> None:
        self._metrics.bundle(self._name, self.layout.bundle.step, self.layout.bundle.digest)


def _manifests(path: str) -> dict[str, tuple[int, int, int]] | None:
    """Return inode, size and time of the manifests in a folder by path; None for a URL."""
    if "://" in path:
        return None
    found: dict[str, tuple[int, int, int]] = {}
    for manifest in Path(path).glob("step_*/manifest.json"):
        try:
            state = manifest.stat()
        except OSError:
            # It has been deleted since it was listed.
            continue
        found[str(manifest)] = state.st_ino, state.st_size, state.st_mtime_ns
    return found
