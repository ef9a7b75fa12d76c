"""Scores in a real Redis: what is written, when it goes, who may write; and who reads it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from engine import ConfigError, ConnectorError, RiskEngine, StaleError
from engine.adapters import redis_sink
from engine.adapters.redis_cache import RiskCache, heartbeats
from engine.adapters.redis_sink import RedisSink
from engine.partitions import partition_of
from engine.ticks import Lost, Published, Refused, Tick
from engine.userids import ids_of_one
from tests.adapters.redis_servers import Redis

pytestmark = pytest.mark.servers

SECOND = 10**9


def now_ns(server: Redis) -> int:
    """Redis's own clock."""
    seconds, micros = server.client().time()
    return int(seconds * SECOND + micros * 1000)


def tick(position: int, at_ns: int, users: Any = None, **other: Any) -> Tick:
    told: dict[str, Any] = {
        **{"topic": "topic", "topic_id": "id", "partitions": 1, "partition": 0, "owner": "me", "clock_ns": at_ns, "wall_ns": at_ns},
        **{"exact_from_ns": None, "state": "ready", "everybody": True},
    }
    return Tick(position=position, at_ns=at_ns, users=users, **(told | other))


def engine_of(at_ns: int, users: Any, amounts: Any, **options: Any) -> RiskEngine:
    engine = RiskEngine(**({"users": 5000, "max_ahead": None} | options))
    engine.ingest({"user_id": users, "amount": amounts, "timestamp": np.full(len(users), at_ns).astype("datetime64[ns]")})
    return engine


def updates(engine: RiskEngine, at_ns: int) -> Any:
    return engine.updates(at=np.datetime64(at_ns, "ns"))


def values(server: Redis) -> dict[str, str]:
    client = server.client()
    keys = [key for key in client.scan_iter() if b"~" not in key]
    return {key.decode(errors="replace"): client.get(key).decode() for key in keys}


class TestSink:
    def test_scores_are_texts_that_give_the_same_float(self, redis_server: Redis) -> None:
        at_ns, amounts = now_ns(redis_server), [12.5, 1, -3, 1e11, 0.0001, 0, 33.3333]
        users = [f"user {number}" for number in range(len(amounts))]
        engine = engine_of(at_ns, [*users, "third", "third", "third"], [*amounts, 1, 0, 0])
        assert isinstance(RedisSink(redis_server.url).publish(tick(1, at_ns, updates(engine, at_ns))), Published)
        found = values(redis_server)
        assert {key: float(text) for key, text in found.items()} == {f"risk:{user}": engine.score(user) for user in [*users, "third"]}
        assert (found["risk:user 0"], found["risk:third"], found["risk:user 4"]) == ("12.5", "0.3333333333333333", "0.0001")

    @pytest.mark.parametrize("chunk", [1, 2, 3, 2000])
    def test_many_users_in_chunks(self, redis_server: Redis, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
        monkeypatch.setattr(redis_sink, "_USERS_AT_ONCE", chunk)
        at_ns = now_ns(redis_server)
        engine = engine_of(at_ns, np.arange(500), np.arange(500))
        RedisSink(redis_server.url, "other:").publish(tick(7, at_ns, updates(engine, at_ns), clock_ns=None, exact_from_ns=5))
        assert {int(key.removeprefix("other:")): float(text) for key, text in values(redis_server).items()} == {
            n: float(n) for n in range(500)
        }
        beat = {name.decode(): value.decode() for name, value in redis_server.client().hgetall("other:~topic:0").items()}
        assert 0 <= now_ns(redis_server) // 1000 - int(beat.pop("written")) < 60 * 10**6
        assert beat.pop("fence").rpartition(":")[0] == f"7:{at_ns}"
        assert beat == {
            **{"position": "7", "clock": "", "at": str(at_ns), "owner": "me", "exact_from": "5", "topic_id": "id", "partitions": "1"},
            **{"state": "ready"},
        }

    def test_keys_go_when_the_score_is_zero_and_not_before(self, redis_server: Redis) -> None:
        at_ns = now_ns(redis_server) // 10**6 * 10**6 + 1  # a nanosecond after a millisecond
        engine = engine_of(at_ns, ["a"], [5], window="700ms")
        sink, client = RedisSink(redis_server.url), redis_server.client()
        sink.publish(tick(1, at_ns, updates(engine, at_ns)))
        zero_ns = engine.features(["a"])["zero_at"].cast(pa.int64())[0].as_py()
        assert client.pexpiretime("risk:a") == zero_ns // 10**6 + 1
        while client.get("risk:a") is not None:
            assert now_ns(redis_server) <= zero_ns + 10**9
        assert now_ns(redis_server) >= zero_ns
        fallen = updates(engine, now_ns(redis_server))
        assert fallen["count"].to_pylist() == [0]
        assert isinstance(sink.publish(tick(1, now_ns(redis_server), fallen)), Published)
        assert values(redis_server) == {}

    def test_users_who_are_gone_when_the_engine_is_ahead_of_the_wall_clock_are_deleted(self, redis_server: Redis) -> None:
        at_ns = now_ns(redis_server)
        engine = engine_of(at_ns, ["a", "b"], [5, 6], window="9s")
        sink = RedisSink(redis_server.url)
        sink.publish(tick(1, at_ns, updates(engine, at_ns)))
        ahead_ns = at_ns + 10 * SECOND
        engine.add("b", 7, np.datetime64(ahead_ns, "ns"))
        sink.publish(tick(2, ahead_ns, updates(engine, ahead_ns), wall_ns=at_ns))
        assert values(redis_server) == {"risk:b": "7"}

    def test_ids_of_every_kind(self, redis_server: Redis) -> None:
        at_ns = now_ns(redis_server)
        texts = ["é", "", "a\nb", "x" * 5000, "~topic:0", "~", "~~"]
        for users in (texts, [-(2**63), 0, 2**63 - 1], np.array([2**64 - 1], np.uint64), [b"\0\xff", b"", b"~topic:0"]):
            redis_server.client().flushall()
            engine = engine_of(at_ns, users, np.arange(1, len(users) + 1))
            RedisSink(redis_server.url).publish(tick(1, at_ns, updates(engine, at_ns)))
            cache = RiskCache(redis_server.url, topic="topic", max_age="60s")
            assert cache.scores(users).tolist() == engine.scores(users).tolist() == list(range(1, len(users) + 1))

    @pytest.mark.parametrize(
        ("position", "at", "taken"), [(4, 9, False), (5, -1, False), (5, 0, True), (5, 1, True), (6, -9, True), (10, 0, True)]
    )
    def test_the_fence(self, redis_server: Redis, position: int, at: int, taken: bool) -> None:
        """By position, then instant; nanoseconds are more than a float holds, and "10" is more than "9"."""
        at_ns = now_ns(redis_server) // 1000 * 1000 + 123
        engine = engine_of(at_ns, ["a", "b"], [1, 2])
        RedisSink(redis_server.url).publish(tick(5, at_ns, updates(engine, at_ns)))
        engine.add("a", 9, np.datetime64(at_ns, "ns"))
        before, beat = values(redis_server), redis_server.client().hgetall("risk:~topic:0")
        for users in (updates(engine, at_ns + 20), None):
            outcome = RedisSink(redis_server.url).publish(tick(position, at_ns + at, users, owner="other"))
            if taken:
                assert isinstance(outcome, Published)
            else:
                assert outcome == Refused((5, at_ns))
                assert (values(redis_server), redis_server.client().hgetall("risk:~topic:0")) == (before, beat)
        if taken:
            assert values(redis_server) == {"risk:a": "5", "risk:b": "2"}

    @pytest.mark.parametrize("lost", [0, 1, 2, 3])
    def test_a_tick_that_was_written_in_part(self, redis_server: Redis, monkeypatch: pytest.MonkeyPatch, lost: int) -> None:
        monkeypatch.setattr(redis_sink, "_USERS_AT_ONCE", 1)
        monkeypatch.setattr(redis_sink, "_CHUNKS_AT_ONCE", 1)
        at_ns, users = now_ns(redis_server), ["a", "b", "c", "d"]
        engine = engine_of(at_ns, users, [1, 2, 3, 4])
        sink = RedisSink(redis_server.url)
        sink.publish(tick(1, at_ns, updates(engine, at_ns)))
        engine.ingest({"user_id": users, "amount": [3, 4, 5, 6], "timestamp": np.full(4, at_ns).astype("datetime64[ns]")})
        second, write = tick(2, at_ns + 1, updates(engine, at_ns + 1)), sink._write

        key = f"risk:{second.users['user_id'][lost]}".encode()

        def interrupted(chunks: Any) -> Any:
            if any(key in chunk for chunk in chunks):
                raise ConnectorError("away")
            return write(chunks)

        monkeypatch.setattr(sink, "_write", interrupted)
        with pytest.raises(ConnectorError):
            sink.publish(second)
        beat = redis_server.client().hgetall("risk:~topic:0")
        begun = 2 if lost else 1
        assert (beat[b"position"], beat[b"fence"].rpartition(b":")[0]) == (b"1", f"{begun}:{at_ns + begun - 1}".encode())
        if begun == 2:
            assert RedisSink(redis_server.url).publish(tick(1, at_ns + 9)) == Refused((2, at_ns + 1))
        monkeypatch.setattr(sink, "_write", write)
        assert isinstance(sink.publish(second), Published)
        assert values(redis_server) == {"risk:a": "2", "risk:b": "3", "risk:c": "4", "risk:d": "5"}
        assert redis_server.client().hget("risk:~topic:0", "position") == b"2"

    @pytest.mark.parametrize("loss", ["flushed", "older", "another's", "script"])
    def test_lost_data_is_noticed_and_nothing_is_written_then(self, redis_server: Redis, loss: str) -> None:
        """Of changes alone the reader would take those who have not changed for 0.0."""
        at_ns, sink, client = now_ns(redis_server), RedisSink(redis_server.url), redis_server.client()
        engine = engine_of(at_ns, ["a", "b"], [1, 2])
        assert isinstance(sink.publish(tick(5, at_ns, everybody=False)), Lost), "the first tick is of everybody"
        sink.publish(tick(5, at_ns, updates(engine, at_ns)))
        if loss == "flushed":
            client.flushall()
        elif loss == "older":
            client.hset("risk:~topic:0", "fence", f"5:{at_ns - 1}:x")
        elif loss == "another's":
            RedisSink(redis_server.url).publish(tick(5, at_ns))
        else:
            client.script_flush()
        engine.add("a", 5, np.datetime64(at_ns, "ns"))
        before = values(redis_server), client.hgetall("risk:~topic:0")
        outcome = sink.publish(tick(6, at_ns + 1, updates(engine, at_ns + 1), everybody=False))
        if loss == "script":
            assert isinstance(outcome, Published)
        else:
            assert isinstance(outcome, Lost)
            assert (values(redis_server), client.hgetall("risk:~topic:0")) == before
            everybody = engine.updates(at=np.datetime64(at_ns + 1, "ns"), anew=True)
            assert isinstance(sink.publish(tick(6, at_ns + 1, everybody)), Published)
        assert isinstance(sink.publish(tick(6, at_ns + 2, everybody=False)), Published)
        assert values(redis_server) == {"risk:a": "3", "risk:b": "2"}

    def test_a_topic_that_was_made_anew(self, redis_server: Redis) -> None:
        """It begins at 0; and who still publishes the old one does not get it back."""
        at_ns, old, new = now_ns(redis_server), RedisSink(redis_server.url), RedisSink(redis_server.url)
        old.publish(tick(1000, at_ns))
        assert isinstance(new.publish(tick(3, at_ns, topic_id="new")), Refused)
        new.begin("topic", 0, "new")
        assert isinstance(new.publish(tick(3, at_ns, topic_id="new")), Published)
        for everybody in (False, True):
            assert not isinstance(old.publish(tick(1001, at_ns + 1, everybody=everybody)), Published)
        new.begin("topic", 0, "new")
        assert redis_server.client().hget("risk:~topic:0", "position") == b"3"

    @pytest.mark.parametrize("seed", range(8))
    def test_two_owners_in_any_order_never_show_an_older_state(
        self, redis_server: Redis, monkeypatch: pytest.MonkeyPatch, seed: int
    ) -> None:
        """States rise with their position; ticks of two processes come in any order, in chunks, some of them again."""
        monkeypatch.setattr(redis_sink, "_USERS_AT_ONCE", 2)
        choose, base_ns = random.Random(seed), now_ns(redis_server)
        sinks, shown = [RedisSink(redis_server.url) for _ in range(2)], (0, 0)
        for _ in range(60):
            position, at_ns = choose.randrange(1, 12), base_ns + choose.randrange(3)
            users = [f"user {number}" for number in range(5)]
            state = updates(engine_of(base_ns, users, [float(position)] * 5), at_ns)
            outcome = choose.choice(sinks).publish(tick(position, at_ns, state))
            if isinstance(outcome, Refused):
                assert outcome.fence == shown > (position, at_ns)
            else:
                assert (position, at_ns) >= shown
                shown = (position, at_ns)
            assert set(values(redis_server).values()) == {str(shown[0])}


class TestTrouble:
    def test_a_server_that_would_throw_scores_away_is_refused(self, own_redis: Callable[..., Redis]) -> None:
        with pytest.raises(ConnectorError, match=r"maxmemory-policy is allkeys-lru.*set it to noeviction"):
            RedisSink(own_redis({"maxmemory": "100mb", "maxmemory-policy": "allkeys-lru"}).url)
        RedisSink(own_redis({"maxmemory-policy": "allkeys-lru"}).url)  # memory is never short

    @pytest.mark.parametrize("url", ["", "localhost:6379", "http://localhost", "redis://localhost:port"])
    def test_urls(self, url: str) -> None:
        with pytest.raises(ConfigError, match="URL of Redis"):
            RedisSink(url)

    def test_secrets_are_never_shown(self, own_redis: Callable[..., Redis]) -> None:
        server = own_redis({"requirepass": "right"})
        for url in (f"redis://:wrong@127.0.0.1:{server.port}", "redis://:wrong@127.0.0.1:1", f"redis://user:wrong@127.0.0.1:{server.port}"):
            with pytest.raises(ConnectorError) as caught:
                RedisSink(url)
            assert "wrong" not in str(caught.value)
        RedisSink(f"redis://:right@127.0.0.1:{server.port}")
        with pytest.raises(ConnectorError):
            RedisSink(server.url)

    def test_nor_those_of_a_command_that_the_server_does_not_know(self, own_redis: Callable[..., Redis]) -> None:
        server = own_redis({"rename-command": 'HELLO ""'})
        with pytest.raises(ConnectorError, match="unknown command") as caught:
            RedisSink(f"redis://:secret@127.0.0.1:{server.port}")
        assert "secret" not in str(caught.value)

    def test_a_server_that_hangs_is_an_error_within_seconds(self, own_redis: Callable[..., Redis], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(redis_sink, "_ANSWER_SECONDS", 0.3)
        server = own_redis()
        sink, at_ns = RedisSink(server.url), now_ns(server)
        server.suspend()
        with pytest.raises(ConnectorError, match=r"Redis at 127\.0\.0\.1"):
            sink.publish(tick(1, at_ns))
        server.resume()
        assert isinstance(sink.publish(tick(1, at_ns)), Published)


class TestCache:
    def test_what_is_known_and_what_is_not(self, redis_server: Redis) -> None:
        at_ns = now_ns(redis_server)
        users = ["alice", "bob", "carol", "dave"]
        where = {user: int(partition_of(ids_of_one(user, "u"), 2)[0]) for user in users}
        assert set(where.values()) == {0, 1}
        sink, cache = RedisSink(redis_server.url), RiskCache(redis_server.url, topic="topic", max_age="60s")
        with pytest.raises(ConnectorError, match="nothing of topic 'topic' is published"):
            cache.scores(users)
        zero = [user for user in users if where[user] == 0]
        engine = engine_of(at_ns, zero[:1], [5])
        sink.publish(tick(1, at_ns, updates(engine, at_ns), partitions=2))
        assert cache.scores(zero).tolist() == [5.0] + [0.0] * (len(zero) - 1)
        assert cache.score(zero[0]) == 5.0
        with pytest.raises(StaleError, match="partition 1 was never published"):
            cache.scores(users)
        found = cache.scores([*users, None], stale="nan")
        known = {user: "0.0" if user != zero[0] else "5.0" for user in zero}
        assert [str(score) for score in found] == [*(known.get(user, "nan") for user in users), "nan"]
        with pytest.raises(ConfigError, match="stale='maybe'"):
            cache.scores(users, stale="maybe")
        assert cache.scores([]).tolist() == []

    @pytest.mark.parametrize(
        ("other", "why"),
        [
            ({"state": "catching_up"}, "is catching_up"),
            ({"state": "full"}, "is full"),
            ({"exact_from_ns": 2**62}, "is exact only in"),
            ({}, "s ago by me, and should have been within 0.05 s"),
        ],
    )
    def test_partitions_that_are_not_fresh(self, redis_server: Redis, other: dict[str, Any], why: str) -> None:
        ahead_ns = now_ns(redis_server) + 10 * SECOND  # an engine's clock can be so far ahead, and says nothing of freshness
        RedisSink(redis_server.url).publish(tick(1, ahead_ns, **other))
        cache = RiskCache(redis_server.url, topic="topic", max_age="60s" if other else "50ms")
        began = now_ns(redis_server)
        while not other and now_ns(redis_server) < began + SECOND // 10:
            pass
        with pytest.raises(StaleError, match=why):
            cache.score("alice")
        assert np.isnan(cache.scores(["alice"], stale="nan")).all()

    def test_several_servers(self, own_redis: Callable[..., Redis]) -> None:
        servers = [own_redis(), own_redis()]
        users, at_ns = [f"user {number}" for number in range(40)], now_ns(servers[0])
        sinks = [RedisSink(server.url) for server in servers]
        where = [int(partition_of(ids_of_one(user, "u"), 3)[0]) for user in users]
        for part in range(3):
            mine = [user for user, number in zip(users, where, strict=True) if number == part]
            engine = engine_of(at_ns, mine, np.arange(len(mine)) + 10 * part)
            sinks[part % 2].publish(tick(1, at_ns, updates(engine, at_ns), partition=part, partitions=3))
        cache = RiskCache([server.url for server in servers], topic="topic", max_age="60s")
        counts = [0, 0, 0]
        expected = []
        for part in where:
            expected.append(10.0 * part + counts[part])
            counts[part] += 1
        assert cache.scores(users).tolist() == expected
        assert [(row["partition"], row["state"]) for row in heartbeats([server.url for server in servers], "risk:", at_ns)] == [
            (0, "ready"), (1, "ready"), (2, "ready"),
        ]  # fmt: skip
