"""Servers for tests: one broker for all tests of a worker, topics of their own, a Redis that begins empty."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.servers import Cluster, Redis, missing

_NUMBERS = count()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is not installed is said once for each test, and in CI it is a failure."""
    packages = missing()
    for item in items:
        if item.get_closest_marker("servers") is not None and packages and os.environ.get("CI") != "true":
            item.add_marker(pytest.mark.skip(reason=f"needs servers: apt-get install {packages}"))


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One broker."""
    with Cluster(tmp_path_factory.mktemp("kafka")) as cluster:
        yield cluster


@pytest.fixture
def topic(kafka: Cluster, request: pytest.FixtureRequest) -> Callable[..., str]:
    """Makes topics of names of their own: `topic(partitions, **config)`."""

    def make(partitions: int = 1, **config: str) -> str:
        name = f"topic-{os.getpid()}-{next(_NUMBERS)}"
        kafka.make_topic(name, partitions, **config)
        return name

    return make


@pytest.fixture(scope="session")
def _redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    server = Redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.close()


@pytest.fixture
def redis_server(_redis: Redis) -> Redis:
    """A Redis that is empty."""
    _redis.client().flushall()
    return _redis


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[Callable[..., Redis]]:
    """Makes Redis servers that a test may end."""
    servers: list[Any] = []

    def make(*options: str) -> Redis:
        servers.append(Redis(tmp_path, *options))
        found: Redis = servers[-1]
        return found

    yield make
    for server in servers:
        server.close()
