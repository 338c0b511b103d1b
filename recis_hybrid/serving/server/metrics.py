"""Metrics of a server, in the text format of Prometheus."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Info,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Histogram(Collector):
    """A histogram that one thread counts in. That of prometheus_client takes seven times as long, with its locks.

    Args:
        name: Name of the metric.
        about: Its description.
        bounds: Upper bounds of the buckets, ascending; a bound belongs to its bucket.
    """

    def __init__(self, name: str, about: str, bounds: tuple[float, ...]) -> None:
        self._name, self._about, self._bounds = name, about, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Yield the counts of values up to each bound."""
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self._name, self._about, buckets=buckets, sum_value=self._sum)


class Metrics:
    """Counters and histograms of one server. Each server has its own registry."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = Counter(
            "recis_hybrid_requests",
            "Scoring requests by route and HTTP status.",
            ["route", "code"],
            registry=self._registry,
        )
        self.seconds = self._histogram("request_seconds", "Time from a request's headers to its answer.", _SECONDS)
        self.run_seconds = self._histogram("run_seconds", "Time of one run of the model.", _SECONDS)
        self.batch_rows = self._histogram("batch_rows", "Rows of one run; its sum counts all rows.", _COUNTS)
        self.batch_requests = self._histogram("batch_requests", "Requests of one run.", _COUNTS)
        self.queue = Gauge("recis_hybrid_queue_requests", "Requests that wait for a run.", registry=self._registry)
        self._bundle = Info("recis_hybrid_bundle", "Bundle in use.", registry=self._registry)
        self._step = Gauge("recis_hybrid_bundle_step", "Training step of the bundle.", registry=self._registry)
        self._reloads = Counter(
            "recis_hybrid_reloads", "Attempts to load a newer bundle, by result.", ["result"], registry=self._registry
        )
        self._reloads_by_result = {result: self._reloads.labels(result) for result in ("loaded", "failed")}
        self._children: dict[tuple[str, int], Counter] = {}

    def request(self, route: str, code: int, seconds: float) -> None:
        """Count a request that has been answered."""
        child = self._children.get((route, code))
        if child is None:
            child = self._children[route, code] = self._requests.labels(route, str(code))
        child.inc()
        self.seconds.observe(seconds)

    def bundle(self, name: str, step: int, digest: str) -> None:
        """Report the bundle in use."""
        self._bundle.info({"name": name, "step": str(step), "digest": digest})
        self._step.set(step)

    def reload(self, result: str) -> None:
        """Count an attempt to load a newer bundle: "loaded" or "failed"."""
        self._reloads_by_result[result].inc()

    def text(self) -> bytes:
        """Return all metrics as text."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"recis_hybrid_{name}", about, buckets)
        self._registry.register(histogram)
        return histogram
