"""The dashboard: it asks for what is exported, all of it, and its panels lie beside each other."""

from __future__ import annotations

import json
import re
from importlib import resources
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest

from engine import RiskEngine
from engine.service import Service

pytest.importorskip("prometheus_client", reason="needs pip install 'riskring[serve]'")


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((resources.files("engine.adapters") / "grafana.json").read_text("utf-8"))
    return found


def queries(dashboard: dict[str, Any]) -> list[str]:
    variables = [variable["definition"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    return variables + [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def exported() -> dict[str, set[str]]:
    """Names that a server and a node export, and the labels that each has, by what it is called in queries."""
    from engine.adapters.metrics import Meters  # noqa: PLC0415 - only here it is known that its client is installed

    engine = RiskEngine(users=1000)
    engine.add("alice", 1, "2026-01-01T00:00:00Z")
    engine.add(None, 1, "2026-01-01T00:00:00Z")
    partition = SimpleNamespace(number=3, engine=engine, state="ready", lag=5, saved_at=1.0)
    server, node = Meters(), Meters()
    server.show_lookups(Service.of(engine))
    server.show_engine(Service.of(engine), lambda: 1.0)
    node.show(SimpleNamespace(partitions={3: partition}, accepted=1, dead={"late": 2}, pending=0))  # type: ignore[arg-type]
    found: dict[str, set[str]] = {}
    for meters in (server, node):
        for family in meters.registry.collect():
            for sample in family.samples:
                if not sample.name.endswith("_created"):
                    found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_each_metric_asked_for_is_exported_and_each_exported_one_is_shown(dashboard: dict[str, Any]) -> None:
    names = exported()
    asked = {name for query in queries(dashboard) for name in re.findall(r"\briskring_\w+", query)}
    assert asked - names.keys() == set()
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}
    assert families == {re.sub(r"_bucket$", "", name) for name in asked}


def test_labels_asked_for_are_there(dashboard: dict[str, Any]) -> None:
    names = exported()
    for query in queries(dashboard):
        labels = {label for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(", ")}
        for name in re.findall(r"\briskring_\w+", query):
            assert labels - names[name] <= {"job", "instance"}, query
        assert query.count("(") == query.count(")") and query.count("{") == query.count("}")
        for function, argument in re.findall(r"(\w+)\((riskring_\w+)", query):  # counters and buckets only by their rates
            assert (function == "rate") == argument.endswith(("_total", "_bucket")), query
    for panel in dashboard["panels"]:
        legends = {label for target in panel.get("targets", []) for label in re.findall(r"{{(\w+)}}", target["legendFormat"])}
        grouped = " ".join(target["expr"] for target in panel.get("targets", []))
        assert all(re.search(rf"by \([^)]*\b{label}\b", grouped) for label in legends), panel["title"]


def test_panels_lie_beside_each_other(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below
    assert all(panel["targets"] and panel["datasource"]["uid"] == "${source}" for panel in panels if panel["type"] != "row")
