"""The servers that other tests use do what those rely on: data outlives SIGKILL where it should, and failures are real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from tests.adapters.processes import until

if TYPE_CHECKING:
    from tests.adapters.brokers import Cluster
    from tests.adapters.redis_servers import Redis


def values(cluster: Cluster, topic: str) -> list[bytes]:
    return [message.value() for message in cluster.read(topic)]


class TestOneBroker:
    def test_what_was_acknowledged_survives_sigkill(self, kafka: Cluster, topic: Callable[..., str]) -> None:
        name = topic(2)
        kafka.send(name, [b"a", b"b"], partition=1, key=b"k", timestamp_ms=1_000)
        kafka.broker(0).kill()
        assert not kafka.broker(0).alive
        kafka.broker(0).start()
        kafka.send(name, [b"c"])
        found = [(m.partition(), m.offset(), m.key(), m.value()) for m in kafka.read(name)]
        assert found == [(0, 0, None, b"c"), (1, 0, b"k", b"a"), (1, 1, b"k", b"b")]
        assert kafka.read(name)[1].timestamp()[1] == 1_000

    def test_a_suspended_broker_answers_nobody_until_it_goes_on(self, kafka: Cluster, topic: Callable[..., str]) -> None:
        name = topic()
        producer = kafka.producer()
        producer.produce(name, b"before")
        assert producer.flush(60) == 0
        kafka.broker(0).suspend()
        assert kafka.broker(0).alive
        producer.produce(name, b"meanwhile")
        assert producer.flush(0.5) == 1
        kafka.broker(0).resume()
        assert producer.flush(60) == 0
        assert values(kafka, name) == [b"before", b"meanwhile"]

    def test_it_stops_in_order_and_comes_back(self, kafka: Cluster, topic: Callable[..., str]) -> None:
        name = topic()
        kafka.send(name, [b"a"])
        kafka.broker(0).stop()
        assert "shut down completed" in kafka.broker(0).process.printed()
        kafka.heal()
        assert values(kafka, name) == [b"a"]

    def test_messages_go_after_their_time_if_a_topic_says_so_and_never_else(self, kafka: Cluster, topic: Callable[..., str]) -> None:
        short, long = topic(retention_ms="60000"), topic()
        for name in (short, long):
            kafka.send(name, [b"old"], timestamp_ms=1_000)
        until(lambda: values(kafka, short) == [], what="the end of an old message")
        kafka.send(short, [b"new"])
        assert [(message.offset(), message.value()) for message in kafka.read(short)] == [(1, b"new")]
        assert values(kafka, long) == [b"old"]

    def test_a_topic_made_anew_is_empty(self, kafka: Cluster, topic: Callable[..., str]) -> None:
        name = topic(2)
        kafka.send(name, [b"a"], partition=1)
        kafka.delete_topic(name)
        assert kafka.partitions(name) == {}
        kafka.create_topic(name, 3)
        assert (sorted(kafka.partitions(name)), values(kafka, name)) == ([0, 1, 2], [])


class TestOneOfItsOwn:
    def test_with_other_settings_and_at_an_end(self, own_kafka: Callable[..., Cluster]) -> None:
        confluent_kafka = pytest.importorskip("confluent_kafka")
        cluster = own_kafka(config={"message.max.bytes": "1000"})
        name = cluster.new_topic()
        cluster.send(name, [b"a" * 900])
        with pytest.raises(AssertionError, match="MSG_SIZE_TOO_LARGE"):
            cluster.send(name, [b"a" * 1_100])
        with pytest.raises(confluent_kafka.KafkaException, match="TOPIC_ALREADY_EXISTS"):
            cluster.create_topic(name)
        cluster.close()
        assert not cluster.broker(0).alive
        assert not (cluster.broker(0).folder / "data").exists()


class TestThreeBrokers:
    def test_a_leader_is_killed_and_production_goes_on(self, kafka3: Cluster) -> None:
        name = kafka3.new_topic()
        leader = kafka3.leader(name)
        kafka3.send(name, [b"before"])
        kafka3.broker(leader).kill()
        kafka3.send(name, [b"after"])
        assert kafka3.leader(name) != leader
        assert values(kafka3, name) == [b"before", b"after"]
        kafka3.heal()
        assert values(kafka3, name) == [b"before", b"after"]

    def test_a_suspended_controller_is_replaced(self, kafka3: Cluster) -> None:
        before = kafka3.controller()
        kafka3.broker(before).suspend()
        until(lambda: kafka3.controller() != before)
        kafka3.broker(before).resume()

    def test_a_group_moves_to_another_coordinator(self, kafka3: Cluster) -> None:
        groups = [f"group-{number}" for number in range(8)]
        before = [kafka3.coordinator(group) for group in groups]
        assert len(set(before)) > 1

        def told() -> list[int]:
            """What Kafka itself says, also when it has only just made the topic of offsets."""
            described = kafka3.admin.describe_consumer_groups(groups, request_timeout=10.0).values()
            return [] if any(each.exception() for each in described) else [each.result().coordinator.id for each in described]

        assert until(told) == before
        kafka3.broker(before[0]).stop()
        until(lambda: kafka3.coordinator(groups[0]) != before[0])


class TestRedis:
    def test_it_forgets_all_when_it_is_started_again(self, redis_server: Redis) -> None:
        redis_server.client().set("a", 1)
        assert redis_server.client().get("a") == b"1"
        redis_server.kill()
        redis_server.start()
        assert redis_server.client().dbsize() == 0
        assert redis_server.client().config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}

    def test_one_that_remembers(self, own_redis: Callable[..., Redis]) -> None:
        server = own_redis({"appendonly": "yes", "appendfsync": "always"})
        server.client().set("a", 1)
        server.kill()
        server.start()
        assert server.client(decode_responses=True).get("a") == "1"

    def test_a_suspended_one_answers_nobody_until_it_goes_on(self, redis_server: Redis) -> None:
        redis = pytest.importorskip("redis")
        redis_server.suspend()
        with pytest.raises(redis.TimeoutError):
            redis_server.client(socket_timeout=0.1, retry=None).ping()
        redis_server.resume()
        assert redis_server.client().ping()

    def test_each_has_its_own_port(self, own_redis: Callable[..., Redis]) -> None:
        assert own_redis().url != own_redis().url
