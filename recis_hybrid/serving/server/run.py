"""A server as an object: its socket, its bundle, and its end by a signal or a call."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from recis_hybrid.serving.server.options import ServerOptions

if TYPE_CHECKING:
    from recis_hybrid.serving.server.live import Source


class Server:
    """An HTTP server of a bundle. It listens from its creation on, and answers in :meth:`run`.

    Args:
        path: A bundle ``step_…``, or a folder or URL of bundles and updates, of which the newest is served, also if it
            comes later.
        options: Settings. None takes the defaults.
        source: Source of bundles, or of objects with their interface. None reads the path.

    Raises:
        ServingError: There is no bundle, or it is damaged.
        ImportError: A package of the extra ``serve`` is missing.
        OSError: The address cannot be listened on.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        options: ServerOptions | None = None,
        *,
        source: Source | None = None,
    ) -> None:
        try:
            import uvicorn

            from recis_hybrid.serving.server.app import Service
            from recis_hybrid.serving.server.live import LiveBundle, source_of
            from recis_hybrid.serving.server.metrics import Metrics
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"a server needs {error.name}, which is not installed: pip install 'recis_hybrid[serve]'",
                name=error.name,
            ) from error
        settings = options or ServerOptions()
        self.name = settings.name or _model_name(os.fspath(path))
        """Name of the model."""
        metrics = Metrics()
        self.live = LiveBundle(source or source_of(path), path, self.name, metrics)
        """The bundle in use."""
        config = uvicorn.Config(
            Service(self.live, self.name, settings, metrics).app(),
            log_config=None,
            access_log=False,
            server_header=False,
            # Addresses of clients are not used.
            proxy_headers=False,
            ws="none",
            timeout_keep_alive=75,
            timeout_graceful_shutdown=int(settings.timeout) + 1,
        )
        self._server = uvicorn.Server(config)
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        self._socket = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
        host = f"[{settings.host}]" if family == socket.AF_INET6 else settings.host
        self.url = f"http://{host}:{self._socket.getsockname()[1]}"
        """Address of the server."""

    def run(self) -> None:
        """Answer requests until SIGTERM, SIGINT or :meth:`stop`, then those in flight, and close the socket."""
        with self._socket, _ended_by_signals():
            self._server.run([self._socket])

    def stop(self) -> None:
        """End :meth:`run`, which another thread executes, as SIGTERM does."""
        self._server.should_exit = True


def _model_name(path: str) -> str:
    """Return the name of the bundle's folder in the form that URLs take."""
    place = PurePosixPath(path) if "://" in path else Path(path).resolve()
    if re.fullmatch(r"step_\d+", place.name):
        place = place.parent
    return "".join(c if c.isascii() and (c.isalnum() or c in "_-.~") else "-" for c in place.name)[:200] or "model"


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Return normally after a signal, which uvicorn raises again after its graceful exit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # SIGHUP must not end the process before the event loop handles it.
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
