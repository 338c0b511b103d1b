"""Settings of a server."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_NAME = re.compile(r"[A-Za-z0-9_.~-]{1,200}")


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Settings of a server of one bundle.

    Raises:
        ValueError: A value is out of range.
    """

    host: str = "127.0.0.1"
    """Address to listen on. The default is reachable from this machine only: a server has no authentication."""
    port: int = 8000
    """TCP port; 0 takes a free one."""
    name: str | None = None
    """Name of the model in URLs. None takes the name of the bundle's folder."""
    threads: int = 1
    """Number of batches that are computed at once."""
    max_request_bytes: int = 16 * 2**20
    """Largest body of a request, before and after decompression."""
    max_batch: int = 1024
    """Number of rows up to which waiting requests are computed together. A larger request is computed alone."""
    max_queue: int = 1024
    """Number of requests that may wait; further ones are answered with status 503."""
    timeout: float = 10.0
    """Seconds for a request, from its headers to its scores; after them it is answered with status 504 or 408."""
    poll: float = 5.0
    """Seconds between looks for a newer bundle; 0 looks only after SIGHUP."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be from 0 to 65535, got {self.port}")
        for name in ("threads", "max_request_bytes", "max_batch", "max_queue"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not (math.isfinite(self.timeout) and self.timeout > 0):
            raise ValueError(f"timeout must be a positive number of seconds, got {self.timeout}")
        if not (math.isfinite(self.poll) and self.poll >= 0):
            raise ValueError(f"poll must be a number of seconds, or 0, got {self.poll}")
        if self.name is not None and not _NAME.fullmatch(self.name):
            raise ValueError(f"name must consist of letters, digits, '_', '-', '.' and '~', got {self.name!r}")
