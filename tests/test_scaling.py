"""``docs/scaling.md`` contains the output of ``benchmarks/scaling.py``, and the model counts bytes on the wire."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import scaling


def test_the_page_contains_the_output_of_the_script(root: Path) -> None:
    page = (root / "docs" / "scaling.md").read_text()
    for name, lines in scaling.tables(json.loads(scaling.POINTS.read_text())):
        missing = [line for line in lines if line not in page]
        assert missing == [], f"{name}: run `python -m benchmarks.scaling` and put its output into docs/scaling.md"


def test_exchanges_are_free_on_one_rank_and_grow_with_the_hosts() -> None:
    alone = scaling.step(scaling.CLICKS, scaling.H100, 1)
    assert alone.ids == alone.rows == alone.gradients == alone.all_reduce == 0
    assert alone.serial == pytest.approx(alone.memory + alone.tower + alone.launches)
    rows = [scaling.step(scaling.CLICKS, scaling.H100, ranks).rows for ranks in (2, 8, 16, 128, 1024)]
    assert rows == sorted(rows)
    free = replace(scaling.H100, collective_s=0.0, peer_s=0.0)
    # All but 7 of 1,023 peers are on other hosts: their bytes are sent at the adapter's bandwidth.
    sent = scaling.CLICKS.samples * 300 * 0.4 * 2 * 64 * 1023 / 1024
    assert scaling.step(scaling.CLICKS, free, 1024).rows == pytest.approx(sent * 1016 / 1023 / free.between)


def test_slow_input_determines_the_step() -> None:
    slow = replace(scaling.H100, ingest=1e6)
    assert scaling.step(scaling.CLICKS, slow, 8).seconds == pytest.approx(4096 * 2800 / 1e6)
