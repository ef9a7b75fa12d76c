"""Servers as processes of a test run: started, suspended, killed and started again, and none outlives the run.

Time passes here and nowhere else in the tests: `until` asks again and again until what should become true is true.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

LOOPBACK = "127.0.0.1"
#: Ports below those that systems give to clients (from 32768 on Linux). A client that calls for a server which is down could
#: otherwise be given the server's own port, and the server could not come back.
PORTS = range(20_000, 32_000)

#: On Linux the system kills a server when the thread that started it ends, hence one thread that lives as long as the tests.
_starter = ThreadPoolExecutor(1, "starter")
_bound_to_the_run = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []


def until(condition: Callable[[], T], seconds: float = 60.0, what: str = "what is waited for") -> T:
    """What `condition` returns, as soon as that is true; TimeoutError if it does not become so."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.02)
    return found


class Port:
    """A free port of the loopback, held for this process until `close`, also while its server is down.

    The UDP port of the same number is the lock between processes that look for a port at once: it leaves no file behind.
    """

    def __init__(self) -> None:
        for step in range(len(PORTS)):
            self.number = PORTS[(os.getpid() + step) % len(PORTS)]
            self._lock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            try:
                self._lock.bind((LOOPBACK, self.number))
                with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
                    probe.bind((LOOPBACK, self.number))
            except OSError:
                self._lock.close()
            else:
                return
        raise OSError(f"no free port from {PORTS.start} to {PORTS.stop - 1}")

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self.number}"

    def close(self) -> None:
        self._lock.close()


class Process:
    """A command that can be started again and again; what it prints is added to the file `log`.

    It ends with the test run, also when that is killed: on Linux by the system, elsewhere only by `kill` or `stop`.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.command = list(command)
        self.log = log
        self.environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "it was not started"
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it was started and has not ended; a suspended one is alive."""
        return self._process is not None and self._process.poll() is None

    def start(self, ready: str = "", seconds: float = 60.0) -> None:
        """Start it; with `ready`, return when it has printed that text."""
        self.launch()
        self.wait_ready(ready, seconds)

    def launch(self) -> None:
        """Start it without waiting for anything."""
        assert not self.alive, f"{self.command[0]} runs already"
        with self.log.open("ab") as log:
            self._printed_before = log.tell()
            # A session of its own: Ctrl-C is for the tests, which then end it in order.
            options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
            command = _bound_to_the_run + self.command
            self._process = _starter.submit(subprocess.Popen, command, env=self.environment, **options).result()

    def wait_ready(self, ready: str, seconds: float = 60.0) -> None:
        """Return when it has printed `ready` since it was last started; RuntimeError with the end of its log if it ended before."""

        def printed() -> bool:
            alive = self.alive  # asked first: what it printed before it ended is seen
            if ready in self.printed():
                return True
            if not alive:
                last = "\n".join(self.printed().splitlines()[-20:])
                raise RuntimeError(f"{self.command[0]} ended with status {self.wait()} before it was ready:\n{last}")
            return False

        until(printed, seconds, f"{self.command[0]} prints {ready!r} to {self.log}")

    def printed(self) -> str:
        """What it has printed since it was last started."""
        with self.log.open("rb") as log:
            log.seek(self._printed_before)
            return log.read().decode(errors="replace")

    def wait(self, seconds: float = 60.0) -> int:
        """Its exit status (negative: the signal that ended it) once it has ended."""
        assert self._process is not None, "it was not started"
        return self._process.wait(seconds)

    def signal(self, number: int) -> None:
        """Send it a signal, if it runs."""
        if self._process is not None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """End it at once (SIGKILL); nothing if it does not run. Suspended ones end, too."""
        self.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def stop(self, seconds: float = 60.0) -> int:
        """Ask it to end (SIGTERM); its exit status. If it takes longer than that, it is killed, and TimeoutExpired is raised."""
        self.resume()
        self.signal(signal.SIGTERM)
        try:
            return self.wait(seconds)
        finally:
            self.kill()

    def suspend(self) -> None:
        """Let it stand still (SIGSTOP) with all its connections open."""
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on (SIGCONT)."""
        self.signal(signal.SIGCONT)
