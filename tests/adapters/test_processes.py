"""What the real servers of tests are built on: processes and ports, what is needed, and Kafka's jars; without a server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pytest

from tests.adapters.kafka_jars import jars
from tests.adapters.needs import need
from tests.adapters.processes import PORTS, Port, Process, until

ROOT = Path(__file__).parents[2]
LINUX = sys.platform.startswith("linux")
#: Waits for a signal that is blocked: one that came between `ready` and `pause` would be waited for once more, for ever.
ENDS_WITH_SEVEN = """
import signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
print("ready", flush=True)
signal.sigwait({signal.SIGTERM})
sys.exit(7)
"""


def command(pid: int) -> str:
    """What a process runs; "" if there is none, or it ended and nobody has asked for its status."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return ""
    name, _, rest = state.partition("(")[2].rpartition(")")
    return "" if rest.split()[0] == "Z" else name


class TestNeeds:
    COMMANDS: ClassVar = {"no-such-command": "package", "sh": "dash", "neither-this": "other"}
    MODULES: ClassVar = {"no_such_module": "kafka", "json": "redis"}
    ADVICE = "^needs a real server: apt-get install package other && pip install 'riskring\\[kafka]'$"

    def test_nothing_is_said_of_what_is_there(self) -> None:
        need({"sh": "dash"}, {"json": "redis"})

    def test_what_is_missing_skips(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CI", raising=False)
        with pytest.raises(pytest.skip.Exception, match=self.ADVICE):
            need(self.COMMANDS, self.MODULES)

    def test_and_fails_where_all_must_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CI", "true")
        with pytest.raises(pytest.fail.Exception, match=self.ADVICE):
            need(self.COMMANDS, self.MODULES)


class TestJars:
    """With a Maven that notes its calls and makes one jar."""

    @pytest.fixture
    def maven(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        script = tmp_path / "bin" / "mvn"
        script.parent.mkdir()
        script.write_text(
            f"#!/bin/sh\necho call >>{tmp_path}/calls\n[ -e {tmp_path}/broken ] && echo no network && exit 1\ntouch kafka.jar\n"
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
        monkeypatch.setenv("RISKRING_KAFKA_LIB", str(tmp_path / "cache" / "lib"))
        return tmp_path

    def test_are_fetched_once_by_many(self, maven: Path) -> None:
        program = "from tests.adapters.kafka_jars import jars; print((jars() / 'kafka.jar').exists())"
        many = [subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
        assert [process.communicate()[0] for process in many] == ["True\n"] * 3
        assert (maven / "calls").read_text() == "call\n"

    def test_are_fetched_again_after_a_failure(self, maven: Path) -> None:
        (maven / "broken").touch()
        with pytest.raises(RuntimeError, match=r"(?s)dependency:copy-dependencies .* failed:\nno network"):
            jars()
        assert not (maven / "cache" / "lib").exists()
        (maven / "broken").unlink()
        assert sorted(path.name for path in jars().iterdir()) == ["kafka.jar", "pom.xml"]


class TestProcesses:
    def test_a_port_is_nobody_elses_while_it_is_held(self) -> None:
        held = [Port() for _ in range(20)]
        assert len({port.number for port in held}) == 20
        assert all(port.number in PORTS for port in held)
        program = "from tests.adapters.processes import Port; print(*[Port().number for _ in range(20)])"
        # The other process begins its search where this one did.
        begin = f"import os; os.getpid = lambda: {os.getpid()}; "
        done = subprocess.run([sys.executable, "-c", begin + program], cwd=ROOT, capture_output=True, text=True, check=True)
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
        process = Process([sys.executable, "-c", ENDS_WITH_SEVEN], tmp_path / "log")
        process.start("ready")
        process.suspend()
        assert process.alive
        assert process.stop() == 7
        process.kill()
        assert process.wait() == 7

    @pytest.mark.skipif(not LINUX, reason="only Linux ends processes with what started them")
    def test_it_outlives_the_thread_that_started_it(self, tmp_path: Path) -> None:
        process = Process([sys.executable, "-c", ENDS_WITH_SEVEN], tmp_path / "log")
        thread = threading.Thread(target=process.start, args=("ready",))
        thread.start()
        thread.join()
        until(lambda: not Path(f"/proc/self/task/{thread.native_id}").exists(), what="the end of the thread")
        assert process.stop() == 7

    @pytest.mark.skipif(not LINUX, reason="only Linux ends processes with what started them")
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
        run = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert run.stdin is not None and run.stdout is not None
        pids = [int(pid) for pid in run.stdout.readline().split()]
        assert len(pids) == 2 and all(command(pid) in ("sh", "sleep") for pid in pids)
        run.send_signal(signal.SIGKILL)
        run.wait()
        run.stdin.close()
        run.stdout.close()
        try:
            until(lambda: all(command(pid) == "" for pid in pids), what="the end of both")
        except TimeoutError:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            raise
