"""A Redis server as a process of the test run, on a port of its own; it keeps nothing unless told to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.processes import LOOPBACK, Port, Process

redis = pytest.importorskip("redis")

CONFIG = {"bind": LOOPBACK, "save": '""', "appendonly": "no", "maxmemory-policy": "noeviction"}


class Redis:
    """A server in `folder`, running when this returns; `config` are lines of redis.conf, `{"appendonly": "yes"}` for one that remembers.

    `start` brings it back on the same port after `kill` or `stop`: empty, or with what it wrote to its folder.
    """

    def __init__(self, folder: Path, config: Mapping[str, str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._port = Port()
        lines = CONFIG | {"port": str(self.port), "dir": str(folder)} | dict(config or {})
        (folder / "redis.conf").write_text("".join(f"{name} {value}\n" for name, value in lines.items()))
        self.process = Process(["redis-server", str(folder / "redis.conf")], folder / "log")
        self.start()

    @property
    def port(self) -> int:
        return self._port.number

    @property
    def url(self) -> str:
        return f"redis://{self._port.address}/0"

    def client(self, **options: Any) -> Any:
        """A new `redis.Redis`; answers are bytes unless `decode_responses=True`."""
        return redis.Redis.from_url(self.url, **options)

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        self.process.start("Ready to accept connections")

    def kill(self) -> None:
        self.process.kill()

    def stop(self) -> None:
        self.process.stop()

    def suspend(self) -> None:
        self.process.suspend()

    def resume(self) -> None:
        self.process.resume()

    def close(self) -> None:
        """End it for good."""
        self.kill()
        self._port.close()
