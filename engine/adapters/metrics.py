"""What a node or server is doing, for Prometheus. Most is read from the engines when somebody asks; what takes time is counted at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import numpy as np
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from engine.access import Address
from engine.errors import ConnectorError, StaleError
from engine.node import Node
from engine.partition import READY
from engine.service import Service

#: Bounds of the histogram of lookups: one takes some tens of microseconds.
_LOOKUP_BUCKETS: Final = (2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5)


class Meters:
    """Counts for a node or a server, and shows that.

    Attributes:
        registry: Of the metrics, those of `show` among them.

    Example:
        >>> meters = Meters()
        >>> meters.looked_up(0.0001)
        >>> b"riskring_lookup_seconds_count 1.0" in meters.text()[0]
        True
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        shared: dict[str, Any] = {"registry": self.registry}
        self._ingest = Histogram("riskring_ingest_seconds", "Time in which a batch was decoded and applied", **shared)
        self._lookup = Histogram("riskring_lookup_seconds", "Time in which a lookup was answered", buckets=_LOOKUP_BUCKETS, **shared)
        self._publish = Histogram("riskring_publish_seconds", "Time in which a tick of a partition was published", **shared)
        self._snapshot = Histogram("riskring_snapshot_seconds", "Time in which a snapshot was written", **shared)

    def ingested(self, seconds: float) -> None:
        """A batch was applied."""
        self._ingest.observe(seconds)

    def looked_up(self, seconds: float) -> None:
        """A lookup was answered."""
        self._lookup.observe(seconds)

    def published(self, seconds: float) -> None:
        """A tick was published."""
        self._publish.observe(seconds)

    def saved(self, seconds: float) -> None:
        """A snapshot was written."""
        self._snapshot.observe(seconds)

    def show(self, node: Node) -> None:
        """Show a node's partitions from now on."""
        self.registry.register(_NodeCollector(node))

    def show_lookups(self, service: Service) -> None:
        """Show how many users are looked up from now on."""
        self.registry.register(_LookupsCollector(service))

    def show_engine(self, service: Service, saved_at: Callable[[], float | None]) -> None:
        """Show the engine of a server from now on.

        Args:
            service: Who asks it.
            saved_at: When the last snapshot was written, by `time.monotonic`; None: never.
        """
        self.registry.register(_EngineCollector(service, saved_at))

    def text(self) -> tuple[bytes, str]:
        """All figures, in the text format of Prometheus, and the type of that."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def serve(self, address: str) -> Callable[[], None]:
        """Answer at `HOST:PORT`, until what is returned is called.

        Raises:
            ConfigError: It is no address.
            ConnectorError: It is taken.
        """
        where = Address.of(address, "metrics")
        try:
            server, _ = start_http_server(where.port, where.host, registry=self.registry)
        except OSError as error:
            raise ConnectorError(f"--metrics {address}: {error}; give another address") from None
        return server.shutdown


class _LookupsCollector:
    """Reads a service when Prometheus asks."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        yield CounterMetricFamily("riskring_lookups", "Users looked up", value=self._service.lookups)


class _EngineCollector:
    """Reads the engine of a server when Prometheus asks; it shows nothing as long as there is none."""

    def __init__(self, service: Service, saved_at: Callable[[], float | None]) -> None:
        self._service, self._saved_at = service, saved_at

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        try:
            stats = self._service.stats()
        except StaleError:
            return
        yield from _results(stats.accepted, stats.rejected)
        yield from _state(stats.users, stats.transactions, stats.bytes)
        if stats.clock is not None:
            seconds = int(stats.clock.astype(np.int64)) / 1e9
            yield _gauge("riskring_clock_seconds", "Greatest event time accepted", seconds)
        saved_at = self._saved_at()
        if saved_at is not None:
            yield _gauge("riskring_snapshot_age_seconds", "Time since the last snapshot", time.monotonic() - saved_at)


class _NodeCollector:
    """Reads a node when Prometheus asks."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        partitions = list(self._node.partitions.values())
        yield from _results(self._node.accepted, self._node.dead)
        stats = [(partition, partition.engine.stats()) for partition in partitions]
        held = [(each.users, each.transactions, each.bytes) for _, each in stats]
        yield from _state(*(sum(column) for column in zip(*held, strict=True))) if held else _state(0, 0, 0)
        yield _gauge("riskring_publish_pending", "Users whose scores could not be published so far", self._node.pending)
        clock = GaugeMetricFamily("riskring_clock_seconds", "Greatest event time accepted", labels=["partition"])
        ready = GaugeMetricFamily("riskring_partition_ready", "1 if a partition has caught up with the log", labels=["partition"])
        behind = GaugeMetricFamily("riskring_kafka_lag", "Messages not applied yet", labels=["partition"])
        age = GaugeMetricFamily("riskring_snapshot_age_seconds", "Time since the last snapshot", labels=["partition"])
        for partition in partitions:
            label = [str(partition.number)]
            if partition.engine.clock_ns is not None:
                clock.add_metric(label, partition.engine.clock_ns / 1e9)
            ready.add_metric(label, float(partition.state == READY))
            if partition.lag is not None:
                behind.add_metric(label, partition.lag)
            if partition.saved_at is not None:
                age.add_metric(label, time.monotonic() - partition.saved_at)
        yield from (clock, ready, behind, age)


def _results(accepted: int, reasons: Mapping[str, int]) -> Iterator[Any]:
    results = CounterMetricFamily("riskring_transactions", "Rows, by what became of them", labels=["result"])
    rejected = CounterMetricFamily("riskring_rejected", "Rows and messages that were not applied, by reason", labels=["reason"])
    results.add_metric(["accepted"], accepted)
    results.add_metric(["rejected"], sum(reasons.values()))
    for reason, count in sorted(reasons.items()):
        rejected.add_metric([reason], count)
    yield from (results, rejected)


def _state(users: int, transactions: int, state_bytes: int) -> Iterator[Any]:
    yield _gauge("riskring_users", "Users with a retained transaction", users)
    yield _gauge("riskring_transactions_retained", "Transactions within window and lateness", transactions)
    yield _gauge("riskring_state_bytes", "Memory of the engines", state_bytes)


def _gauge(name: str, text: str, value: float) -> Any:
    return GaugeMetricFamily(name, text, value=value)
