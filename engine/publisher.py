"""Ticks: what has changed in some partitions goes to a sink, again and again, in a thread of its own, so that rows never wait for it.

Nothing is queued. While a tick cannot be written, further changes gather in the engine, where a user changes at most once; so memory is
bounded, and what is written is never older than it need be. A tick that failed is tried again as it was: it may be written in part, and
what it holds is no longer what the engine will tell. After that, or after the sink has lost what it had, or has shown a newer state than
this one's, everything is told anew.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from engine.errors import ConnectorError
from engine.partition import Log, Partition
from engine.ticks import Lost, Refused, Sink, Tick

#: How long the thread is waited for when it shall end: a sink that hangs is left to itself.
_END_SECONDS: Final = 10.0


class Publisher:
    """Publishes partitions to a sink.

    Args:
        sink: Where to.
        seconds: From one tick to the next.
        now: The wall clock, nanoseconds.
        log: For troubles, and their ends.
        took: Told the seconds that each tick took.
    """

    def __init__(self, sink: Sink, seconds: float, now: Callable[[], int], log: Log, took: Callable[[float], None]) -> None:
        self._sink, self._seconds, self._now, self._log, self._took = sink, seconds, now, log, took
        self._lock = threading.RLock()
        self._partitions: dict[int, _Published] = {}
        self._wake = threading.Event()
        self._stopping = False
        self._away_since: float | None = None
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="riskring-publish", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, without another tick."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(_END_SECONDS)

    def add(self, partition: Partition) -> None:
        """Publish a partition from now on: first everything of it."""
        with self._lock:
            self._partitions[partition.number] = _Published(partition)

    def drop(self, number: int) -> None:
        """Publish a partition no longer; whoever calls waits until a tick under way has ended."""
        with self._lock:
            self._partitions.pop(number, None)

    def last(self, number: int) -> bool:
        """Publish a partition once more, and then no longer. Returns whether that could be done."""
        with self._lock:
            mine = self._partitions.pop(number, None)
            try:
                return mine is not None and self._publish(mine) and (mine.pending is None)
            except ConnectorError as error:
                self._log("warning", "the last tick is not published", partition=number, error=str(error))
                return False

    @property
    def pending(self) -> int:
        """Users of ticks that could not be written so far."""
        ticks = [mine.pending for mine in list(self._partitions.values())]
        return sum(len(tick.users) for tick in ticks if tick is not None and tick.users is not None)

    @property
    def away_seconds(self) -> float:
        """For how long the sink has not been reached; 0.0 if it was."""
        return 0.0 if self._away_since is None else time.monotonic() - self._away_since

    def _run(self) -> None:
        try:
            due = time.monotonic()
            while not self._stopping:
                due = max(due + self._seconds, time.monotonic())  # ticks that took too long are left out
                self.tick()
                self._wake.wait(max(due - time.monotonic(), 0))
        except BaseException as error:
            self.failure = error

    def tick(self) -> None:
        """Publish every partition."""
        for number in list(self._partitions):
            if self._stopping:
                return
            with self._lock:
                mine = self._partitions.get(number)
                if mine is None:
                    continue
                began = time.monotonic()
                try:
                    self._publish(mine)
                except ConnectorError as error:
                    if self._away_since is None:
                        self._away_since = began
                        self._log("error", "scores are not published", partition=number, error=str(error))
                    return  # the others are on the same server
                self._took(time.monotonic() - began)
            if self._away_since is not None:
                self._log("info", "scores are published again", seconds=round(self.away_seconds, 1))
                self._away_since = None

    def _publish(self, mine: _Published) -> bool:
        if not mine.begun:
            topic = mine.partition.topic
            self._sink.begin(topic.name, mine.partition.number, topic.id)
            mine.begun = True
        if mine.pending is None:
            mine.pending, mine.anew = mine.partition.draw(self._now(), mine.anew), False
        outcome = self._sink.publish(mine.pending)
        mine.pending = None
        if isinstance(outcome, Lost):
            self._log("warning", "the sink has lost its scores; all are published anew", partition=mine.partition.number)
        mine.anew = isinstance(outcome, Lost | Refused)
        if isinstance(outcome, Refused) != mine.refused:
            mine.refused = not mine.refused
            fence = outcome.fence if isinstance(outcome, Refused) else None
            text = "a newer state is published already; waiting until this one has passed it" if mine.refused else "published again"
            self._log("warning", text, partition=mine.partition.number, position=mine.partition.position, fence=fence)
        return not mine.anew


class _Published:
    """A partition, the tick of it that is to be written, and whether the next one shall tell everything."""

    def __init__(self, partition: Partition) -> None:
        self.partition = partition
        self.pending: Tick | None = None
        self.anew = True
        self.refused = self.begun = False
