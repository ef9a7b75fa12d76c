"""The servers that other tests use do what those rely on: data outlives SIGKILL where it should, and failures are real ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.adapters.processes import PORTS, Port, Process, until

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

    def test_a_topic_made_anew_is_empty(self, kafka: Cluster, topic: Callable[..., str]) -> None:
        name = topic(2, retention_ms="-1")
        kafka.send(name, [b"a"], partition=1)
        kafka.delete_topic(name)
        assert kafka.partitions(name) == {}
        kafka.create_topic(name, 3)
        assert (sorted(kafka.partitions(name)), values(kafka, name)) == ([0, 1, 2], [])


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
        before = kafka3.coordinator("group")
        kafka3.broker(before).stop()
        until(lambda: kafka3.coordinator("group") != before)


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


class TestProcesses:
    def test_a_port_is_nobody_elses_while_it_is_held(self) -> None:
        held = [Port() for _ in range(20)]
        assert len({port.number for port in held}) == 20
        assert all(port.number in PORTS for port in held)
        program = "from tests.adapters.processes import Port; print(*[Port().number for _ in range(20)])"
        # The other process begins its search where this one did.
        begin = f"import os; os.getpid = lambda: {os.getpid()}; "
        done = subprocess.run([sys.executable, "-c", begin + program], capture_output=True, text=True, check=True)
        assert not {port.number for port in held} & set(map(int, done.stdout.split()))
        for port in held:
            port.close()

    def test_one_that_ends_too_early_shows_its_log(self, tmp_path: Path) -> None:
        process = Process([sys.executable, "-c", "print('no such option'); raise SystemExit(3)"], tmp_path / "log")
        with pytest.raises(RuntimeError, match=r"(?s)status 3 before it was ready.*no such option"):
            process.start("ready")
        assert not process.alive

    def test_ready_is_what_it_prints_after_the_last_start(self, tmp_path: Path) -> None:
        first = Process([sys.executable, "-c", "print('ready')"], tmp_path / "log")
        first.start("ready")
        assert first.wait() == 0
        second = Process([sys.executable, "-c", "print('broken')"], tmp_path / "log")
        with pytest.raises(RuntimeError, match="broken"):
            second.start("ready")

    def test_stop_gives_the_status_also_of_a_suspended_process(self, tmp_path: Path) -> None:
        program = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print('ready', flush=True); signal.pause()"
        process = Process([sys.executable, "-c", program], tmp_path / "log")
        process.start("ready")
        process.suspend()
        assert process.alive
        assert process.stop() == 7
        process.kill()
        assert process.wait() == 7

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ends the processes of a killed one")
    def test_none_outlives_a_test_run_that_is_killed(self, tmp_path: Path) -> None:
        program = f"""
from pathlib import Path
from tests.adapters.processes import Process
servers = [Process(["sh", "-c", "echo ready; exec sleep 1000"], Path({str(tmp_path)!r}) / f"log-{{index}}") for index in range(2)]
for server in servers:
    server.start("ready")
servers[1].suspend()
print(*(server.pid for server in servers), flush=True)
input()
"""
        run = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert run.stdin is not None and run.stdout is not None
        pids = [int(pid) for pid in run.stdout.readline().split()]
        assert len(pids) == 2 and all(command(pid) in ("sh", "sleep") for pid in pids)
        run.send_signal(signal.SIGKILL)
        run.wait()
        until(lambda: all(command(pid) == "" for pid in pids), what="the end of both")
        run.stdin.close()
        run.stdout.close()


def command(pid: int) -> str:
    """What a process runs; "" if there is none, or it ended and nobody has asked for its status."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return ""
    name, _, rest = state.partition("(")[2].rpartition(")")
    return "" if rest.split()[0] == "Z" else name
