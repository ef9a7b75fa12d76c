"""What tests with real servers need on a machine, and what is done where it is missing."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping

import pytest

from tests.adapters import kafka_jars


def need(commands: Mapping[str, str], modules: Mapping[str, str]) -> None:
    """Skip the test, or fail it where `CI=true`, unless all of this is there; the reason is one line that says how to install it.

    Args:
        commands: programs, and the Debian packages that have them.
        modules: Python modules, and the extras of riskring that have them.
    """
    packages = [package for command, package in commands.items() if shutil.which(command) is None]
    extras = [extra for module, extra in modules.items() if importlib.util.find_spec(module) is None]
    advice = [f"apt-get install {' '.join(packages)}"] * bool(packages) + [f"pip install 'riskring[{','.join(extras)}]'"] * bool(extras)
    if advice:
        reason = f"needs a real server: {' && '.join(advice)}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


def need_kafka() -> None:
    """What `tests.adapters.brokers` needs; Maven only as long as it has not fetched the jars."""
    maven = {} if kafka_jars.folder().is_dir() else {"mvn": "maven"}
    need({"java": "openjdk-17-jre-headless"} | maven, {"confluent_kafka": "kafka"})


def need_redis() -> None:
    """What `tests.adapters.redis_servers` needs."""
    need({"redis-server": "redis-server"}, {"redis": "redis"})


def need_browser() -> None:
    """What `tests.adapters.browser` needs."""
    need({"chromium": "chromium"}, {"playwright": "dev", "axe_playwright_python": "dev", "starlette": "serve", "uvicorn": "serve"})


def need_flink() -> None:
    """What `tests.adapters.flink` needs: Java, Maven, and an environment with Flink and the extra `flink`."""
    need({"java": "openjdk-17-jre-headless", "mvn": "maven"}, {})
    if not os.environ.get("RISKRING_FLINK_PYTHON"):
        environment = "python3 -m venv flink && flink/bin/pip install 'riskring[flink]'"
        reason = f"needs Flink: {environment} && export RISKRING_FLINK_PYTHON=$PWD/flink/bin/python"
        if os.environ.get("CI") == "true":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
