"""A broker with a topic, and a Redis, to try things out: `python -m tests.adapters.servers TOPIC PARTITIONS` until Ctrl-C."""

from __future__ import annotations

import math
import signal
import sys
import tempfile
from contextlib import closing, suppress
from pathlib import Path

from tests.adapters.brokers import Cluster
from tests.adapters.processes import until
from tests.adapters.redis_servers import Redis


def main() -> None:
    topic, partitions = sys.argv[1], int(sys.argv[2])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(Cluster(Path(folder) / "kafka")) as cluster,
        closing(Redis(Path(folder) / "redis")) as redis,
    ):
        cluster.create_topic(topic, partitions)
        print(f"export RISKRING_BROKERS={cluster.bootstrap} RISKRING_TOPIC={topic} RISKRING_REDIS={redis.url}", flush=True)
        with suppress(KeyboardInterrupt):
            until(lambda: False, math.inf)  # not `signal.pause`, which misses what came just before it
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # who asks twice shall not leave the folder behind


if __name__ == "__main__":
    main()
