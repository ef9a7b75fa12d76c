"""Scores in Redis, plain and readable by any client: a key for each user, and a hash for each partition that says what they are worth.

    {prefix}{user}                    the score, as the shortest decimal that gives the same float64; expires when the score is 0.0
    {prefix}~{topic}:{partition}      position clock at owner exact_from topic_id partitions state, and fence, written

Instants are nanoseconds since the epoch; `written` is Redis's own time of the last tick, microseconds. An id that begins with "~" has two.
The fields of the hash describe the last tick that was written whole. `fence` is the position and the instant of the newest tick of which
anything was written, and which sink wrote it. Each script compares it first, and writes all of its keys or none:

- An older state never takes the place of a newer one: not that of a process that does not know yet that its partition is another's by now,
  nor that of one that starts again from an older snapshot.
- A tick that lists only changes must follow the one that this sink wrote before it. If something else is there, or nothing, Redis has lost
  data (it was flushed, restarted without them, or a replica took over) or somebody else has written; then only a tick of everybody will do.
- A hash of another topic of the same name is removed by `begin`, which is called when a partition is assigned, and by nothing else.

Users without a transaction in the window have no key: theirs expires at `zero_at`. Only when the engine's clock is ahead of the clock on
the wall, by no more than `max_ahead`, are keys deleted, since those would stay until the wall clock is there.

Partition p is on server p modulo the number of servers; that is the caller's to decide.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from engine.errors import ConfigError, ConnectorError
from engine.ticks import Lost, Published, Refused, Tick

#: Users of one script, and scripts on their way at a time.
_USERS_AT_ONCE: Final = 2000
_CHUNKS_AT_ONCE: Final = 8

#: Threads that write: one makes bytes while Redis works for the other.
_WRITERS: Final = 2

#: How long Redis may take to answer.
_ANSWER_SECONDS: Final = 3.0

#: Compares fences as texts of whole numbers: Redis has only floats, which do not hold nanoseconds.
#: KEYS: the hash, users. ARGV: position, instant, sink; what the fence may be, two of them, "*" for any that is not newer; topic id; number
#: of fields, these and their values; then for each user a score, "" if the key shall go, and when it expires, in milliseconds.
#: Answers whether it has written (1), found a newer fence or another topic (0), or not the one that it must be (2); and the fence it found.
_SCRIPT: Final = """
local function before(a, b)
  if #a ~= #b then return #a < #b end
  return a < b
end
local found = redis.call('HMGET', KEYS[1], 'fence', 'topic_id')
local fence = found[1] or ''
if found[2] and found[2] ~= ARGV[6] then return {0, fence} end
if fence ~= '' then
  local position, at = string.match(fence, '^(%d+):(%d+):')
  if before(ARGV[1], position) or (ARGV[1] == position and before(ARGV[2], at)) then return {0, fence} end
end
if ARGV[4] ~= '*' and fence ~= ARGV[4] and fence ~= ARGV[5] then return {2, fence} end
local fields = tonumber(ARGV[7])
local next = 8 + 2 * fields
for user = 2, #KEYS do
  if ARGV[next] == '' then
    redis.call('DEL', KEYS[user])
  else
    redis.call('SET', KEYS[user], ARGV[next], 'PXAT', ARGV[next + 1])
  end
  next = next + 2
end
redis.call('HSET', KEYS[1], 'fence', ARGV[1] .. ':' .. ARGV[2] .. ':' .. ARGV[3], 'topic_id', ARGV[6])
if fields > 0 then
  local now = redis.call('TIME')
  redis.call('HSET', KEYS[1], 'written', now[1] .. string.format('%06d', now[2]), unpack(ARGV, 8, 7 + 2 * fields))
end
return {1, fence}
"""

#: Deletes the hash of a topic that is gone. KEYS: the hash. ARGV: the id of the topic that has its name now.
_BEGIN: Final = """
local id = redis.call('HGET', KEYS[1], 'topic_id')
if id and id ~= ARGV[1] then redis.call('DEL', KEYS[1]) end
return id or ''
"""


#: What a script answers first.
_WRITTEN: Final = 1
_NOT_MINE: Final = 2


class RedisSink:
    """One Redis server.

    Args:
        url: `redis://`, `rediss://` or `unix://`, as redis-py has them. Neither it nor what it holds is ever shown.
        prefix: Of all keys.

    Raises:
        ConfigError: It is no such URL.
        ConnectorError: The server cannot be reached, or would throw scores away.
    """

    def __init__(self, url: str, prefix: str = "risk:") -> None:
        self.prefix = prefix
        self._client = connect(url)
        self.where = where(self._client)
        self._name = secrets.token_hex(4)  # no other sink has it
        self._fences: dict[tuple[str, int], str] = {}  # what this one wrote last
        self._writers = ThreadPoolExecutor(_WRITERS, thread_name_prefix="riskring-redis")
        with told(self.where):
            self._client.ping()
            self._check_policy()
            self._script = self._client.script_load(_SCRIPT)

    def _check_policy(self) -> None:
        memory = self._client.info("memory")
        policy, most = memory.get("maxmemory_policy", "noeviction"), memory.get("maxmemory", 0)
        if policy != "noeviction" and most:
            raise ConnectorError(
                f"{self.where}: maxmemory-policy is {policy}, which throws scores away when memory is short, so that they would be read as "
                "'no risk'; set it to noeviction"
            )

    def begin(self, topic: str, partition: int, topic_id: str) -> None:
        """Take a partition over, whose topic has this id now. What is there of another topic of its name is forgotten.

        Raises:
            ConnectorError: Redis cannot be reached or refuses.
        """
        self._fences.pop((topic, partition), None)
        with told(self.where):
            self._client.eval(_BEGIN, 1, heartbeat_key(self.prefix, topic, partition), topic_id)

    def publish(self, tick: Tick) -> Published | Refused | Lost:
        """Write a tick: its users a few thousand at a time, what it says of the partition with the last of them.

        Raises:
            ConnectorError: Redis cannot be reached or refuses. The same tick may be published again.

        Cost: some 3 us a user of Redis's own time, as much of this process's.
        """
        place = tick.topic, tick.partition
        last = self._fences.get(place)
        if last is None and not tick.everybody:
            return Lost()
        with told(self.where):
            for outcome, found in self._answers(list(self._chunks(tick, last))):
                if outcome != _WRITTEN:
                    self._fences.pop(place, None)  # the next tick is of everybody
                    return Lost() if outcome == _NOT_MINE else Refused(_fence_of(found))
        self._fences[place] = self._fence(tick)
        return Published()

    def _answers(self, chunks: list[list[Any]]) -> Iterator[Any]:
        """Write chunks: the first, which sets the fence; then those that need it, in any order; then the last, which tells of all."""
        first, between, last = chunks[:1], chunks[1:-1], chunks[1:][-1:]
        yield from self._write(first)
        some = [between[start : start + _CHUNKS_AT_ONCE] for start in range(0, len(between), _CHUNKS_AT_ONCE)]
        for answers in self._writers.map(self._write, some):  # each on a connection of its own
            yield from answers
        yield from self._write(last)

    def _fence(self, tick: Tick) -> str:
        return f"{tick.position}:{tick.at_ns}:{self._name}"

    def _write(self, chunks: list[list[Any]]) -> list[Any]:
        if not chunks:
            return []
        pipeline = self._client.pipeline(transaction=False)
        for chunk in chunks:
            pipeline.execute_command("EVALSHA", self._script, *chunk)
        try:
            return list(pipeline.execute())
        except redis.exceptions.NoScriptError:  # it was restarted
            self._check_policy()
            self._script = self._client.script_load(_SCRIPT)
            return self._write(chunks)

    def _chunks(self, tick: Tick, last: str | None) -> Iterator[list[Any]]:
        """Arguments of the script, one list a call."""
        mine = self._fence(tick)  # there already where a tick is published again
        before = ["*", ""] if tick.everybody or last is None else [last, mine]
        key = heartbeat_key(self.prefix, tick.topic, tick.partition)
        fields = {
            "position": tick.position,
            "clock": "" if tick.clock_ns is None else tick.clock_ns,
            "at": tick.at_ns,
            "owner": tick.owner,
            "exact_from": "" if tick.exact_from_ns is None else tick.exact_from_ns,
            "partitions": tick.partitions,
            "state": tick.state,
        }
        told_at_last = [item for pair in fields.items() for item in pair]
        keys, values = self._users(tick)
        for first in range(0, max(len(keys), 1), _USERS_AT_ONCE):
            end = first + _USERS_AT_ONCE
            some = told_at_last if end >= len(keys) else []
            users = keys[first:end]
            head = [tick.position, tick.at_ns, self._name, *(before if first == 0 else [mine, mine]), tick.topic_id, len(some) // 2]
            yield [1 + len(users), key, *users, *head, *some, *values[2 * first : 2 * end]]

    def _users(self, tick: Tick) -> tuple[list[Any], list[Any]]:
        """A key of each user, and in turn their scores and when these expire."""
        users = tick.users
        if users is None or len(users) == 0:
            return [], []
        if tick.at_ns <= tick.wall_ns:  # keys of those who have no transaction any more have expired
            users = users.filter(pc.greater(users["count"], 0))
        there = pc.greater(users["count"], 0)
        scores = pc.if_else(there, users["score"].cast(pa.string()), "")
        zero_ns = users["zero_at"].cast(pa.int64()).fill_null(0).to_numpy()  # null: there is none, and the key goes
        expiry_ms = -(-zero_ns // 1_000_000)  # not before: an absent key means 0.0
        values: list[Any] = [None] * (2 * len(users))
        values[0::2], values[1::2] = scores.to_pylist(), expiry_ms.tolist()
        return user_keys(self.prefix, users["user_id"]), values

    def close(self) -> None:
        """End the connections."""
        self._writers.shutdown(wait=False, cancel_futures=True)
        self._client.close()


def user_keys(prefix: str, users: Any) -> list[bytes]:
    """The key of each user: the prefix, and the id as UTF-8 text, integers in decimal, or its bytes; a "~" in front is doubled.

    Example:
        >>> user_keys("risk:", pa.array(["alice", "~t:0"]))
        [b'risk:alice', b'risk:~~t:0']
    """
    users = users.combine_chunks() if isinstance(users, pa.ChunkedArray) else users
    if pa.types.is_integer(users.type):
        users = users.cast(pa.string())
    kind = pa.large_binary()
    users = users.cast(kind)
    special = pc.starts_with(users, pattern="~")
    if pc.any(special).as_py():  # else it could be the key of a hash
        users = pc.if_else(special, pc.binary_join_element_wise(pa.scalar(b"~", kind), users, pa.scalar(b"", kind)), users)
    keys: list[bytes] = pc.binary_join_element_wise(pa.scalar(prefix.encode(), kind), users, pa.scalar(b"", kind)).to_pylist()
    return keys


def heartbeat_key(prefix: str, topic: str, partition: int) -> str:
    """The key of a partition's hash."""
    return f"{prefix}~{topic}:{partition}"


def _fence_of(text: Any) -> tuple[int, int]:
    position, at, _ = str(text or b"0:0:", "ascii").split(":")
    return int(position), int(at)


def connect(url: str) -> Any:
    """A client of the server at a URL, which is not reached yet.

    Raises:
        ConfigError: It is no URL of Redis.
    """
    try:
        return redis.Redis.from_url(
            url,
            socket_timeout=_ANSWER_SECONDS,
            socket_connect_timeout=_ANSWER_SECONDS,
            retry=Retry(ExponentialBackoff(cap=0.2, base=0.01), 2),
            retry_on_error=[redis.exceptions.ConnectionError],
        )
    except (ValueError, redis.exceptions.RedisError):
        scheme = url.partition(":")[0] if ":" in url else "nothing"
        raise ConfigError(f"a URL of Redis begins with {scheme!r}; wanted redis://HOST:PORT, rediss://HOST:PORT or unix://PATH") from None


def where(client: Any) -> str:
    """The server of a client, without secrets."""
    options = client.connection_pool.connection_kwargs
    return f"Redis at {options.get('path') or '{}:{}'.format(options.get('host', 'localhost'), options.get('port', 6379))}"


@contextmanager
def told(server: str) -> Iterator[None]:
    """Errors of the client as errors that say where, and nothing that is secret."""
    try:
        yield
    except redis.exceptions.AuthenticationError:
        raise ConnectorError(f"{server}: the password or user name is refused; check the URL") from None
    except (redis.exceptions.RedisError, OSError) as error:
        text = str(error).partition(", with args")[0]  # of a command that it does not know, the password of AUTH among them
        raise ConnectorError(f"{server}: {type(error).__name__}: {text}") from None
