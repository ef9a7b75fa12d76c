"""Reading scores from Redis by the reader's rule: a key that is absent means 0.0 while the user's partition is fresh, and else unknown.

A partition is fresh when its heartbeat was written no longer than `max_age` ago, by Redis's own clock, says "ready", and its scores are
exact by then. Scores and heartbeats are read in one transaction: between two requests Redis could be flushed and published anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.adapters.redis_sink import connect, heartbeat_key, told, user_keys, where
from engine.columns import ids_of
from engine.config import duration_ns
from engine.errors import ConfigError, ConnectorError, StaleError
from engine.partitions import partition_of
from engine.userids import id_array

#: Users of one request.
_USERS_AT_ONCE: Final = 10_000

#: What a heartbeat says, in the order in which it is shown.
_FIELDS: Final = ("state", "position", "clock", "at", "exact_from", "owner", "topic_id", "partitions")


class RiskCache:
    """Scores that a node keeps in Redis.

    Args:
        urls: Of the servers, in the order that the node was given; one, or several with commas between or as a list.
        topic: The topic that the node reads.
        prefix: Of the keys.
        max_age: How old a heartbeat may be.

    Raises:
        ConfigError: An argument cannot be used.

    Example:
        >>> RiskCache("http://localhost", topic="payments")
        Traceback (most recent call last):
        engine.errors.ConfigError: a URL of Redis begins with 'http'; wanted redis://HOST:PORT, rediss://HOST:PORT or unix://PATH
    """

    def __init__(self, urls: str | Sequence[str], *, topic: str, prefix: str = "risk:", max_age: Any = "2s") -> None:
        texts = urls.split(",") if isinstance(urls, str) else list(urls)
        self._clients = [connect(url.strip()) for url in texts]
        self._topic, self._prefix = topic, prefix
        self._max_age_ns = duration_ns(max_age, "max_age")
        if self._max_age_ns <= 0:
            raise ConfigError(f"max_age={max_age!r} must be more than 0")
        self._partitions: int | None = None

    def score(self, user: Any) -> float:
        """Score of one user. See `scores`."""
        return float(self.scores([user])[0])

    def scores(self, users: Any, *, stale: str = "raise") -> NDArray[np.float64]:
        """Scores of many users.

        Args:
            users: (n,) integers, strings or bytes, of the kind that the transactions have.
            stale: What becomes of users whose partition is not fresh: "raise", or "nan".

        Returns:
            (n,) float64; 0.0 for who has no transaction in the window; nan for a null.

        Raises:
            StaleError: Scores of some users are not known, and `stale` is "raise". Its text says of which partitions, and why.
            ConnectorError: Redis cannot be reached, or the topic was never published there.

        Cost: one request a server, and one more; some 2 us a user.
        """
        if stale not in ("raise", "nan"):
            raise ConfigError(f"stale={stale!r} must be 'raise' or 'nan'")
        array, _ = id_array(users)
        array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
        count = self._count_partitions()
        chosen = partition_of(ids_of(array, "users"), count)
        scores = np.full(len(array), np.nan)
        for number, client in enumerate(self._clients):
            mine = np.flatnonzero((chosen >= 0) & (chosen % len(self._clients) == number))
            if len(mine):
                scores[mine] = self._asked(client, array.take(pa.array(mine)), chosen[mine], stale)
        return scores

    def _asked(self, client: Any, users: Any, chosen: NDArray[np.int32], stale: str) -> NDArray[np.float64]:
        keys = user_keys(self._prefix, users)
        partitions = np.unique(chosen).tolist()
        whys: dict[int, str] = {}
        texts: list[bytes | None] = []
        for first in range(0, len(keys), _USERS_AT_ONCE):
            found, not_fresh = self._together(client, keys[first : first + _USERS_AT_ONCE], partitions)
            texts += found
            whys |= {part: why for part, why in not_fresh.items() if why}
        scores = np.array([b"0" if text is None else text for text in texts]).astype(np.float64)
        if whys and stale == "raise":
            part, why = next(iter(whys.items()))
            raise StaleError(f"scores of {len(whys)} partitions of topic {self._topic!r} are not known: partition {part} {why}")
        scores[np.isin(chosen, list(whys))] = np.nan
        return scores

    def _together(self, client: Any, keys: list[bytes], partitions: list[int]) -> tuple[list[bytes | None], dict[int, str]]:
        """Scores, and why each partition is not fresh, "" for those that are: as they were at one instant."""
        with told(where(client)):
            pipeline = client.pipeline(transaction=True)
            pipeline.mget(keys)
            pipeline.time()
            for part in partitions:
                pipeline.hgetall(heartbeat_key(self._prefix, self._topic, part))
            texts, (seconds, micros), *beats = pipeline.execute()
        now_us = seconds * 1_000_000 + micros
        return texts, {part: self._why(_texts(beat), now_us) for part, beat in zip(partitions, beats, strict=True)}

    def _why(self, beat: dict[str, str], now_us: int) -> str:
        if "at" not in beat:
            return "was never published"
        if int(beat["partitions"]) != self._partitions:
            self._partitions = None  # asked for again next time
            return f"has a heartbeat of a topic of {beat['partitions']} partitions"
        age_us = now_us - int(beat["written"])
        if age_us * 1000 > self._max_age_ns:
            return f"was published {age_us / 1e6:.1f} s ago by {beat['owner']}, and should have been within {self._max_age_ns / 1e9:g} s"
        if beat["state"] != "ready":
            return f"is {beat['state']}"
        if beat["exact_from"] and int(beat["at"]) < int(beat["exact_from"]):
            return f"is exact only in {(int(beat['exact_from']) - int(beat['at'])) / 1e9:.1f} s"
        return ""

    def _count_partitions(self) -> int:
        if self._partitions is None:
            client = self._clients[0]  # where partition 0 is
            with told(where(client)):
                found = client.hget(heartbeat_key(self._prefix, self._topic, 0), "partitions")
            if found is None:
                raise ConnectorError(f"nothing of topic {self._topic!r} is published in {where(client)}")
            self._partitions = int(found)
        return self._partitions

    def close(self) -> None:
        """End the connections."""
        for client in self._clients:
            client.close()


def _texts(beat: dict[bytes, bytes]) -> dict[str, str]:
    return {str(name, "utf-8"): str(value, "utf-8") for name, value in beat.items()}


def _escaped(text: str) -> str:
    """A text as a pattern of Redis."""
    return "".join("\\" + each if each in "*?[]^-\\" else each for each in text)


def heartbeats(urls: Sequence[str], prefix: str, now_ns: int) -> list[dict[str, Any]]:
    """What all partitions say of themselves, by topic and partition: `topic partition age_seconds` and the fields of the heartbeat.

    Raises:
        ConnectorError: A server cannot be reached.
    """
    rows = []
    for url in urls:
        client = connect(url)
        with told(where(client)):
            for key in client.scan_iter(match=_escaped(f"{prefix}~") + "*", count=10_000):
                if client.type(key) != b"hash":
                    continue  # of a user whose id begins with ~
                beat = _texts(client.hgetall(key))
                topic, _, partition = str(key, "utf-8").removeprefix(f"{prefix}~").rpartition(":")
                if "at" in beat and partition.isdigit():
                    age = round((now_ns - int(beat["at"])) / 1e9, 3)
                    rows.append({"topic": topic, "partition": int(partition), "age_seconds": age} | {name: beat[name] for name in _FIELDS})
        client.close()
    return sorted(rows, key=lambda row: (row["topic"], row["partition"]))
