"""A share of the malformed requests of ``python -m tests.serving.server.fuzz``."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.serving.server.fuzz import LIMIT, fuzz
from tests.serving.server.servers import predict, running
from tests.serving.server.stand_in import write_model


@pytest.mark.parametrize("seed", [1, 2])
def test_malformed_requests_are_answered(tmp_path: Path, seed: int) -> None:
    write_model(tmp_path / "shop", 7, 1.0)
    with running(tmp_path / "shop", max_request_bytes=LIMIT) as server:
        url = urlsplit(server.url)
        assert url.hostname is not None
        assert url.port is not None
        findings = fuzz((url.hostname, url.port), 300, seed, "shop", lambda _: None)
        assert findings.faults == []
        # Valid requests are among them, and errors of several kinds.
        assert {"200", "400", "404"} <= set(findings.statuses)
        assert findings.statuses["200"] > 60
        assert predict(server)[0] == 200
