"""What is published of a partition at an instant, and what may become of it. No Redis here: whoever keeps scores for others takes ticks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Tick:
    """The state of a partition at an instant, as far as it has changed.

    Attributes:
        topic, topic_id, partitions: The topic, what tells it from another of its name, and how many partitions it has.
        partition: Which one.
        owner: Who publishes.
        position: The first offset that is not applied.
        clock_ns: The engine's clock; None before the first row.
        at_ns: The instant that the scores are of.
        wall_ns: The clock on the wall, which `at_ns` is, or is ahead of.
        exact_from_ns: Before it scores may lack transactions; None: they are exact.
        state: "ready", "catching_up" or "full".
        users: Arrow table as of `RiskEngine.updates`; None: the engine has none.
        everybody: Whether it lists all users, not only those who changed.
    """

    topic: str
    topic_id: str
    partitions: int
    partition: int
    owner: str
    position: int
    clock_ns: int | None
    at_ns: int
    wall_ns: int
    exact_from_ns: int | None
    state: str
    users: Any
    everybody: bool


class Published:
    """All of it was written."""


@dataclass(frozen=True)
class Refused:
    """A newer state is there already: of another process, that took the partition over.

    Attributes:
        fence: Position and instant of that state.
    """

    fence: tuple[int, int]


class Lost:
    """What was published before is gone; everything must be published anew."""


class Sink(Protocol):
    """Keeps scores for others."""

    def begin(self, topic: str, partition: int, topic_id: str) -> None:
        """Take a partition over; what is there of another topic of its name is forgotten.

        Raises:
            ConnectorError: It cannot be reached.
        """

    def publish(self, tick: Tick) -> Published | Refused | Lost:
        """Write a tick, whole or up to a fence. It may be published again when this raises.

        Raises:
            ConnectorError: It cannot be reached.
        """
