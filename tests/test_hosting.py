"""The command `flink`, as far as it goes without Flink: what it refuses, what has to be there, and what Java's clients are told."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine import ConfigError, hosting
from engine.cli import main
from engine.hosting import java_options

HERE = ["flink", "--brokers", "localhost:1", "--topic", "payments"]


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("RISKRING_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As if PyFlink were there, and a Java of version 17."""
    monkeypatch.setattr(hosting, "_flink_home", lambda: tmp_path)
    java(tmp_path / "bin", 'openjdk version "17.0.15" 2025-04-15')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    return tmp_path


def java(folder: Path, version: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "java").write_text(f"#!/bin/sh\necho '{version}' >&2\n")
    (folder / "java").chmod(0o755)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "somewhere to put scores: --redis, --scores-topic or --changes-topic"),
        (["--redis", "redis://a", "--redis-file", "b"], "--redis and --redis-file: give one"),
        (["--redis", "redis://a", "--changes-topic", "c"], "--redis and --changes-topic: changes are told once"),
        (["--redis", "redis://a", "--clock", "event"], "--clock event: scores in Redis expire"),
        (["--scores-topic", "s", "--parallelism", "0"], "--parallelism 0: must be from 1"),
        (["--scores-topic", "s", "--parallelism", "9", "--max-parallelism", "8"], "--parallelism 9: must be from 1 to --max-parallelism 8"),
        (["--scores-topic", "s", "--from-savepoint", "latest"], "--from-savepoint latest: needs --checkpoints"),
        (["--scores-topic", "payments"], "must be different topics"),
        (["--scores-topic", "s", "--dead-letter-topic", "s"], "must be different topics"),
        (["--scores-topic", "s", "--exactly-once", "--checkpoint-every", "20m"], "--checkpoint-every 20m: must be less than 15 minutes"),
    ],
)
def test_flags_that_do_not_go_together(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*HERE, *words]) == 2
    assert told in capsys.readouterr().err


def test_what_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flink", "--topic", "payments"]) == 2
    assert "flink needs --brokers" in capsys.readouterr().err


def test_an_environment_without_flink(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*HERE, "--scores-topic", "s"]) == 1
    assert "environment of its own: python3 -m venv flink && flink/bin/pip install 'riskring[flink]'" in capsys.readouterr().err


def test_another_flink(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=["somewhere"]))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.20.3")
    assert main([*HERE, "--scores-topic", "s"]) == 1
    assert "apache-flink 1.20.3 is installed, and the job is made for 2.2; pip install 'riskring[flink]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("version", "told"),
    [
        ('openjdk version "1.8.0_412"', "is Java 8, which Flink does not run on; install a JRE of version 11, 17, 21"),
        ("what?", "is Java of an unknown version, which Flink does not run on"),
    ],
)
def test_the_wrong_java(installed: Path, version: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    java(installed / "bin", version)
    assert main([*HERE, "--scores-topic", "s"]) == 1
    assert told in capsys.readouterr().err


def test_no_java(installed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("JAVA_HOME", str(installed / "nothing"))
    assert main([*HERE, "--scores-topic", "s"]) == 1
    assert f"JAVA_HOME={installed / 'nothing'} has none; install a JRE" in capsys.readouterr().err
    monkeypatch.delenv("JAVA_HOME")
    monkeypatch.setenv("PATH", str(installed / "nothing"))
    assert main([*HERE, "--scores-topic", "s"]) == 1
    assert "there is none; install a JRE of version 11, 17, 21 (Debian: openjdk-17-jre-headless)" in capsys.readouterr().err


def test_no_jar(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fix = "mvn dependency:copy -Dartifact=org.apache.flink:flink-sql-connector-kafka:5.0.0-2.2 -DoutputDirectory=."
    assert main([*HERE, "--scores-topic", "s"]) == 2
    assert f"flink needs --jar, Flink's connector for Kafka: {fix}" in capsys.readouterr().err
    for name, content in (("no.jar", None), ("text.jar", "no zip")):
        if content is not None:
            (installed / name).write_text(content)
        assert main([*HERE, "--scores-topic", "s", "--jar", str(installed / name)]) == 2
        assert f"{name}: no jar is there; get it by: {fix}" in capsys.readouterr().err


def jar(folder: Path) -> str:
    with zipfile.ZipFile(folder / "some.jar", "w") as file:
        file.writestr("a", "b")
    return str(folder / "some.jar")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "no.such.host.invalid:80"])
def test_a_cluster_that_is_not_there(installed: Path, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*HERE, "--scores-topic", "s", "--jar", jar(installed), "--cluster", address]) == 1
    assert f"--cluster {address}: no JobManager answers there" in capsys.readouterr().err


def test_the_newest_checkpoint_is_the_latest(tmp_path: Path) -> None:
    import argparse  # noqa: PLC0415

    args = argparse.Namespace(checkpoints=str(tmp_path), from_savepoint="latest")
    with pytest.raises(ConfigError, match="holds no complete checkpoint"):
        hosting._savepoint(args)
    for age, name in enumerate(("a/chk-9", "b/chk-2", "a/chk-10")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "_metadata").touch()
        os.utime(tmp_path / name / "_metadata", ns=(0, (10 - age) * 10**9))
    (tmp_path / "a" / "chk-11").mkdir()  # not complete
    assert hosting._savepoint(args) == str(tmp_path / "a" / "chk-9")
    args.checkpoints = tmp_path.as_uri()
    assert hosting._savepoint(args) == str(tmp_path / "a" / "chk-9")
    args.from_savepoint = "s3://risk/savepoint"
    assert hosting._savepoint(args) == "s3://risk/savepoint"


def test_options_of_kafka_for_java() -> None:
    given = {"security.protocol": "SASL_SSL", "sasl.mechanisms": "SCRAM-SHA-512", "sasl.username": 'a"b', "sasl.password": "c\\d"}
    assert java_options(given | {"ssl.ca.location": "ca.pem"}) == {
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "SCRAM-SHA-512",
        "ssl.truststore.location": "ca.pem",
        "ssl.truststore.type": "PEM",
        "sasl.jaas.config": ('org.apache.kafka.common.security.scram.ScramLoginModule required username="a\\"b" password="c\\\\d";'),
    }
    with pytest.raises(ConfigError, match=r"sasl\.mechanism=GSSAPI: must be one of PLAIN, SCRAM-SHA-256, SCRAM-SHA-512"):
        java_options({"sasl.mechanism": "GSSAPI", "sasl.username": "a"})
    with pytest.raises(ConfigError, match=r"ssl\.key\.location: Java's clients want a keystore"):
        java_options({"ssl.key.location": "key.pem"})


def test_options_of_flink(capsys: pytest.CaptureFixture[str], installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[str, str]] = []
    monkeypatch.setattr(hosting, "_job", lambda args, jar: found.append(hosting._flink_options(args)) or 1 / 0)
    words = [*HERE, "--scores-topic", "s", "--jar", jar(installed), "--checkpoints", "some", "--checkpoint-every", "1.5s"]
    assert main([*words, "--flink-option", "state.backend.type=other", "--restarts", "3"]) == 1
    assert found[0]["execution.checkpointing.dir"] == (Path.cwd() / "some").as_uri()
    assert found[0]["execution.checkpointing.interval"] == "1500 ms"
    assert found[0]["state.backend.type"] == "other"
    assert found[0]["restart-strategy.fixed-delay.attempts"] == "3"
    assert main([*words, "--flink-option", "nothing"]) == 2
    assert "--flink-option nothing: must be NAME=VALUE" in capsys.readouterr().err
