"""What a node is doing, for Prometheus. Most of it is read from the engines when somebody asks; what takes time is counted at once."""

from __future__ import annotations

import time
from collections import Counter as Counts
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from engine.errors import ConfigError, ConnectorError
from engine.node import Node
from engine.partition import READY


class NodeMeters:
    """Counts for a node, and shows them.

    Attributes:
        registry: Of the metrics, those of `show` among them.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        shared: dict[str, Any] = {"registry": self.registry}
        self._ingest = Histogram("riskring_ingest_seconds", "Time in which a batch of records was decoded and applied", **shared)
        self._publish = Histogram("riskring_publish_seconds", "Time in which a tick of a partition was published", **shared)
        self._snapshot = Histogram("riskring_snapshot_seconds", "Time in which a snapshot was written", **shared)

    def ingested(self, seconds: float) -> None:
        """A batch was applied."""
        self._ingest.observe(seconds)

    def published(self, seconds: float) -> None:
        """A tick was published."""
        self._publish.observe(seconds)

    def saved(self, seconds: float) -> None:
        """A snapshot was written."""
        self._snapshot.observe(seconds)

    def show(self, node: Node) -> None:
        """Show a node's partitions from now on."""
        self.registry.register(_NodeCollector(node))

    def serve(self, address: str) -> Callable[[], None]:
        """Answer at `HOST:PORT`, until what is returned is called.

        Raises:
            ConfigError: It is no address.
            ConnectorError: It is taken.
        """
        host, _, port = address.rpartition(":")
        if not port.isdigit():
            raise ConfigError(f"--metrics {address!r} is no address; write HOST:PORT, or :PORT for all of this machine's addresses")
        try:
            server, _ = start_http_server(int(port), host or "0.0.0.0", registry=self.registry)
        except (OSError, OverflowError) as error:
            raise ConnectorError(f"--metrics {address}: {error}; give another address") from None
        return server.shutdown


class _NodeCollector:
    """Reads a node when Prometheus asks."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        partitions = list(self._node.partitions.values())
        results = CounterMetricFamily("riskring_transactions", "Rows, by what became of them", labels=["result"])
        rejected = CounterMetricFamily("riskring_rejected", "Rows and messages that were not applied, by reason", labels=["reason"])
        accepted, reasons = self._node.accepted, Counts(self._node.dead)
        results.add_metric(["accepted"], accepted)
        results.add_metric(["rejected"], sum(reasons.values()))
        for reason, count in sorted(reasons.items()):
            rejected.add_metric([reason], count)
        yield from (results, rejected)
        stats = [(partition, partition.engine.stats()) for partition in partitions]
        yield _gauge("riskring_users", "Users with a retained transaction", sum(each.users for _, each in stats))
        yield _gauge(
            "riskring_transactions_retained", "Transactions within window and lateness", sum(each.transactions for _, each in stats)
        )
        yield _gauge("riskring_state_bytes", "Memory of the engines", sum(each.bytes for _, each in stats))
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


def _gauge(name: str, text: str, value: float) -> Any:
    return GaugeMetricFamily(name, text, value=value)
