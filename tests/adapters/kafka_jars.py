"""Kafka's brokers as Maven packs them: a folder of jars, fetched once for each user of a machine.

They lie in `$RISKRING_KAFKA_LIB`, or else in the user's cache folder. Whoever comes first fetches them under a lock and renames the
finished folder into place, so a folder that is there is whole.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

KAFKA = "4.2.0"
LOG4J = "2.24.3"
ARTIFACTS = {
    "org.apache.kafka:kafka_2.13": KAFKA,
    "org.apache.logging.log4j:log4j-slf4j-impl": LOG4J,
    "org.apache.logging.log4j:log4j-core": LOG4J,
}
DEPENDENCY = "<dependency><groupId>{0}</groupId><artifactId>{1}</artifactId><version>{2}</version></dependency>"
PROJECT = """<project>
  <modelVersion>4.0.0</modelVersion>
  <groupId>riskring</groupId><artifactId>tests</artifactId><version>1</version><packaging>pom</packaging>
  <dependencies>{}</dependencies>
</project>
"""


def folder() -> Path:
    """Where the jars are, or will be."""
    given = os.environ.get("RISKRING_KAFKA_LIB")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else cache / "riskring" / f"kafka-{KAFKA}"


def jars() -> Path:
    """The folder of jars; the first call on a machine fetches 43 MB."""
    return fetched(folder(), [f"{name}:{version}" for name, version in ARTIFACTS.items()])


def fetch_into(name: str, artifacts: Sequence[str], transitive: bool = True) -> Path:
    """A folder beside that of Kafka's jars, with other jars."""
    return fetched(folder().with_name(name), artifacts, transitive)


def fetched(lib: Path, artifacts: Sequence[str], transitive: bool = True) -> Path:
    """The folder `lib` with some jars; fetched if it is not there."""
    lib.parent.mkdir(parents=True, exist_ok=True)
    with lib.with_name(f"{lib.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed, also by the end of the process
        if not lib.is_dir():
            fetch(lib, artifacts, transitive)
    return lib


def fetch(lib: Path, artifacts: Sequence[str], transitive: bool) -> None:
    unfinished = lib.with_name(f"{lib.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    unfinished.mkdir()
    dependencies = "".join(DEPENDENCY.format(*artifact.split(":")) for artifact in artifacts)
    (unfinished / "pom.xml").write_text(PROJECT.format(dependencies))
    command = ["mvn", "-q", "-B", "-C", "dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={unfinished}"]
    command += [] if transitive else ["-DexcludeTransitive=true"]
    done = subprocess.run(
        command, cwd=unfinished, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}")
    unfinished.rename(lib)
