"""Histograms of the server beside those of prometheus_client."""

from __future__ import annotations

import prometheus_client

from recis_hybrid.serving.server.metrics import Histogram


def lines_of(registry: object) -> list[str]:
    text = prometheus_client.generate_latest(registry).decode()
    return [line for line in text.splitlines() if "_created" not in line]


def test_histograms_have_the_text_of_those_of_prometheus_client() -> None:
    bounds = (0.001, 0.5, 1.0, 10.0)
    ours, theirs = prometheus_client.CollectorRegistry(), prometheus_client.CollectorRegistry()
    mine = Histogram("seconds", "Seconds of a request.", bounds)
    ours.register(mine)
    other = prometheus_client.Histogram("seconds", "Seconds of a request.", buckets=bounds, registry=theirs)
    assert lines_of(ours) == lines_of(theirs)
    for value in (0.0, 0.001, 0.0011, 0.5, 1.5, 10.0, 10.5, 1e9):
        mine.observe(value)
        other.observe(value)
        assert lines_of(ours) == lines_of(theirs)
    assert 'seconds_bucket{le="+Inf"} 8.0' in lines_of(ours)
