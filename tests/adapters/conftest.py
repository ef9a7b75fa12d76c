"""Real servers for tests; each test that asks for one bears the mark `servers`.

| fixture | what it gives |
|-|-|
| `kafka` | one broker, shared by the tests of a worker; whatever a test did to it, the next finds it running |
| `kafka3` | three brokers, likewise |
| `topic` | `topic(partitions=1, **config)` makes a topic of `kafka` with a name of its own and returns the name |
| `own_kafka` | `own_kafka(count=1, config=None)` starts a cluster for one test |
| `redis_server` | a Redis for one test, empty |
| `own_redis` | `own_redis(config=None)` starts a further one |
| `node` | `node(topic, *flags, name="node", on=None)` starts nodes on `kafka` or another cluster; they share a folder of states |
| `site`, `visit` | of `test_page`: a server with an engine and a clock, and a browser that looks at its page |
| `free_port` | a port of the loopback that nobody listens on, and that no other server is given |

What is not installed skips these tests, and fails them where `CI=true`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.adapters.needs import need_kafka, need_redis
from tests.adapters.processes import Port

if TYPE_CHECKING:
    from tests.adapters.brokers import Cluster
    from tests.adapters.nodes import NodeProcess
    from tests.adapters.redis_servers import Redis

SERVERS = {"_browser", "node", "own_kafka", "kafka", "kafka3", "own_redis", "redis_server"}


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not SERVERS.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.servers)


@pytest.fixture(scope="session")
def _cluster_class() -> type[Cluster]:
    need_kafka()
    from tests.adapters.brokers import Cluster  # noqa: PLC0415 - only here it is known that its client is installed

    return Cluster


@pytest.fixture(scope="session")
def _redis_class() -> type[Redis]:
    need_redis()
    from tests.adapters.redis_servers import Redis  # noqa: PLC0415

    return Redis


@pytest.fixture(scope="session")
def _shared_one(_cluster_class: type[Cluster], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with closing(_cluster_class(tmp_path_factory.mktemp("kafka"))) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def _shared_three(_cluster_class: type[Cluster], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with closing(_cluster_class(tmp_path_factory.mktemp("kafka3"), 3)) as cluster:
        yield cluster


@pytest.fixture
def kafka(_shared_one: Cluster) -> Iterator[Cluster]:
    yield _shared_one
    _shared_one.heal()


@pytest.fixture
def kafka3(_shared_three: Cluster) -> Iterator[Cluster]:
    yield _shared_three
    _shared_three.heal()


@pytest.fixture
def topic(kafka: Cluster) -> Callable[..., str]:
    def make(partitions: int = 1, **config: str) -> str:
        return kafka.new_topic(partitions, config={name.replace("_", "."): value for name, value in config.items()})

    return make


@pytest.fixture
def own_kafka(_cluster_class: type[Cluster], tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    with ExitStack() as started:
        numbers = iter(range(1_000_000))

        def make(count: int = 1, config: Mapping[str, str] | None = None) -> Cluster:
            return started.enter_context(closing(_cluster_class(tmp_path / f"kafka-{next(numbers)}", count, config)))

        yield make


@pytest.fixture
def free_port() -> Iterator[int]:
    with closing(Port()) as port:
        yield port.number


@pytest.fixture
def own_redis(_redis_class: type[Redis], tmp_path: Path) -> Iterator[Callable[..., Redis]]:
    with ExitStack() as started:
        numbers = iter(range(1_000_000))

        def make(config: Mapping[str, str] | None = None) -> Redis:
            return started.enter_context(closing(_redis_class(tmp_path / f"redis-{next(numbers)}", config)))

        yield make


@pytest.fixture
def redis_server(own_redis: Callable[..., Redis]) -> Redis:
    return own_redis()


@pytest.fixture
def node(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., NodeProcess]]:
    need_kafka()
    from tests.adapters.nodes import NodeProcess  # noqa: PLC0415

    started: list[NodeProcess] = []

    def start(topic: str, *flags: str, on: Cluster | None = None, **named: Any) -> NodeProcess:
        cluster = request.getfixturevalue("kafka") if on is None else on
        started.append(NodeProcess(tmp_path, cluster, topic, *flags, **named))
        return started[-1]

    yield start
    for each in started:
        each.resume()
        each.kill()
