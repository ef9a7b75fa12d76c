"""A stand-alone Flink as processes of the test run, from the scripts of the wheel `apache-flink`, which is in an environment of its own.

`RISKRING_FLINK_PYTHON` names the Python of that environment. Further jars come by Maven and stay in the user's cache folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tests.adapters.kafka_jars import fetch_into
from tests.adapters.needs import need_flink
from tests.adapters.processes import LOOPBACK, Port, Process, until

FLINK = "2.2.1"
CONNECTOR = "org.apache.flink:flink-sql-connector-kafka:5.0.0-2.2"
ROOT = Path(__file__).parents[2]

#: Java that begins at once, and takes little of what others need.
_QUICK = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC "

#: What would make a test slow: who died is missed within seconds, and two workers of Python fit into a small machine.
CONFIG = {
    "jobmanager.rpc.address": LOOPBACK,
    "jobmanager.bind-host": LOOPBACK,
    "jobmanager.memory.process.size": "1g",
    "rest.address": LOOPBACK,
    "rest.bind-address": LOOPBACK,
    "taskmanager.host": LOOPBACK,
    "taskmanager.bind-host": LOOPBACK,
    "taskmanager.memory.process.size": "1536m",
    "taskmanager.memory.managed.size": "256m",
    "taskmanager.memory.network.min": "64mb",
    "taskmanager.memory.network.max": "64mb",
    "heartbeat.interval": "1 s",
    "heartbeat.timeout": "6 s",
    "heartbeat.rpc-failure-threshold": "1",
    "restart-strategy.type": "fixed-delay",
    "restart-strategy.fixed-delay.attempts": "1000",
    "restart-strategy.fixed-delay.delay": "500 ms",
    "slot.request.timeout": "120 s",
}


def python() -> str:
    """Of Flink's environment."""
    return os.environ["RISKRING_FLINK_PYTHON"]


@cache
def home() -> Path:
    """The folder of the wheel, which has Flink's scripts and jars."""
    need_flink()
    program = "import importlib.util; print(importlib.util.find_spec('pyflink').submodule_search_locations[0])"
    return Path(subprocess.run([python(), "-c", program], capture_output=True, text=True, check=True).stdout.strip())


def jar_of(coordinates: str) -> Path:
    """A jar alone, without what it depends on; the first call on a machine fetches it."""
    need_flink()
    folder = fetch_into(coordinates.replace(":", "-"), (coordinates,), transitive=False)
    (jar,) = folder.glob("*.jar")
    return jar


def connector() -> Path:
    """The jar by which Flink speaks with Kafka."""
    return jar_of(CONNECTOR)


def environment(folder: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Of Flink's processes: `engine` is found in this checkout, and nothing of the caller's riskring has an influence."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RISKRING_")}
    mine = {
        "PYTHONPATH": str(ROOT),
        "FLINK_HOME": str(home()),
        "FLINK_CONF_DIR": str(folder / "conf"),
        "FLINK_LOG_DIR": str(folder / "log"),
        "FLINK_PID_DIR": str(folder / "pid"),
        "PYFLINK_CLIENT_EXECUTABLE": python(),
        "PATH": f"{Path(python()).parent}:{os.environ['PATH']}",
        "NUMBA_CACHE_DIR": os.environ.get("RISKRING_FLINK_NUMBA_CACHE", str(folder.parent / "flink-numba")),
    }
    return kept | mine | dict(more or {})


class FlinkCluster:
    """A JobManager and some TaskManagers below `folder`, with all slots there when this returns; `quick` ones start soon and run slowly."""

    def __init__(
        self, folder: Path, managers: int = 1, slots: int = 2, config: Mapping[str, str] | None = None, quick: bool = True
    ) -> None:
        self.folder = folder
        for name in ("conf", "log", "pid", "checkpoints"):
            (folder / name).mkdir(parents=True)
        shutil.copy(home() / "conf" / "log4j-console.properties", folder / "conf")
        self._ports = [Port(), Port()]
        self.address = self._ports[0].address
        self._slots = managers * slots
        self.checkpoints = folder / "checkpoints"
        own = {
            "rest.port": str(self._ports[0].number),
            "jobmanager.rpc.port": str(self._ports[1].number),
            "taskmanager.numberOfTaskSlots": str(slots),
            "io.tmp.dirs": str(folder / "tmp"),
            "python.executable": python(),
        }
        java = re.search(r"^ +all: (.*)$", (home() / "conf" / "config.yaml").read_text(), re.MULTILINE)
        assert java is not None
        lines = {**CONFIG, **own, **dict(config or {}), "env.java.opts.all": f"{_QUICK if quick else ''}{java[1]}"}
        (folder / "conf" / "config.yaml").write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in lines.items()))
        self.environment = environment(folder)
        script = str(home() / "bin" / "jobmanager.sh")
        self.job_manager = Process([script, "start-foreground"], folder / "jobmanager.log", self.environment)
        self.task_managers = [
            Process([str(home() / "bin" / "taskmanager.sh"), "start-foreground"], folder / f"taskmanager-{index}.log", self.environment)
            for index in range(managers)
        ]
        for process in (self.job_manager, *self.task_managers):
            process.launch()
        self.wait_ready()

    def wait_ready(self) -> None:
        """Until the JobManager answers, and all slots are free."""
        until(lambda: self._free_slots() == self._slots, 90, "TaskManagers at the JobManager")

    def _free_slots(self) -> int:
        try:
            return int(self.get("/overview")["slots-available"])
        except OSError:
            return -1

    def get(self, path: str, body: Any = None) -> Any:
        """What the JobManager answers to GET, or to POST of a body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://{self.address}{path}", data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def jobs(self, *states: str) -> list[str]:
        """Ids of jobs in one of some states."""
        return [job["id"] for job in self.get("/jobs")["jobs"] if job["status"] in states]

    def wait_running(self, seconds: float = 90) -> str:
        """The id of the job, when all of its tasks run."""

        def running() -> str:
            for job in self.jobs("RUNNING"):
                if all(vertex["status"] == "RUNNING" for vertex in self.get(f"/jobs/{job}")["vertices"]):
                    return job
            assert not self.jobs("FAILED"), self.why(self.jobs("FAILED")[0])
            return ""

        return until(running, seconds, "a job that runs")

    def why(self, job: str) -> str:
        """The last failure of a job."""
        return str(self.get(f"/jobs/{job}/exceptions")["exceptionHistory"]["entries"][:1])

    def completed(self, job: str) -> int:
        """Checkpoints of a job that are complete; since the JobManager began."""
        try:
            return int(self.get(f"/jobs/{job}/checkpoints")["counts"]["completed"])
        except OSError:
            return 0

    def wait_checkpoint(self, job: str, more: int = 1, seconds: float = 120) -> None:
        """Until so many more are complete."""
        before = self.completed(job)
        try:
            until(lambda: self.completed(job) >= before + more, seconds, "checkpoints")
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.get(f'/jobs/{job}/checkpoints')['counts']}\n{self.why(job)}") from None

    def stop(self, job: str) -> str:
        """Stop a job with a savepoint; where that is."""
        trigger = self.get(f"/jobs/{job}/stop", {"targetDirectory": str(self.folder / "savepoints"), "drain": False})["request-id"]

        def done() -> Any:
            status = self.get(f"/jobs/{job}/savepoints/{trigger}")
            return status if status["status"]["id"] == "COMPLETED" else None

        operation = until(done, 120, "the savepoint")["operation"]
        assert "location" in operation, operation
        until(lambda: job in self.jobs("FINISHED"), 60, "the end of the job")
        return str(operation["location"])

    def cancel(self, job: str) -> None:
        """End a job; its checkpoints stay."""
        request = urllib.request.Request(f"http://{self.address}/jobs/{job}?mode=cancel", method="PATCH")
        urllib.request.urlopen(request, timeout=30).close()
        until(lambda: job in self.jobs("CANCELED"), 60, "the end of the job")

    def log(self) -> str:
        """What TaskManagers have printed, and their workers of Python."""
        return "".join(process.log.read_text(errors="replace") for process in self.task_managers)

    def flink(self, *words: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
        """Run `bin/flink`."""
        return run([str(home() / "bin" / "flink"), *words], self.environment, seconds)

    def riskring(self, *words: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
        """Run the command of Flink's environment."""
        return run([python(), "-m", "engine.cli", *words], self.environment, seconds)

    def close(self) -> None:
        """End all for good."""
        for process in (*self.task_managers, self.job_manager):
            process.resume()
            process.kill()
        for port in self._ports:
            port.close()


def run(command: Sequence[str], env: Mapping[str, str], seconds: float) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    return subprocess.run(command, env=dict(env), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=seconds)


__all__ = ["CONNECTOR", "FLINK", "FlinkCluster", "connector", "environment", "home", "jar_of", "python", "run", "urllib"]
