"""Bodies of requests for scores: the shortest way of reading one says what the general one says."""

from __future__ import annotations

import json
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given

pytest.importorskip("orjson", reason="needs the extra `serve`")

from engine import RiskEngine
from engine.adapters import http_bodies
from engine.adapters.http_bodies import JSON, lookup
from engine.errors import EngineError
from engine.kernels.integers import parse_integers
from engine.service import Service

USERS_MAX = 5


def service_of(kind: type) -> Service:
    engine = RiskEngine(users=10, time_unit="s", max_ahead=None)
    engine.add(kind(7), 2.5, 0)
    return Service.of(engine)


SERVICE, OF_TEXTS = service_of(int), service_of(str)


def outcome(body: bytes, service: Service) -> Any:
    try:
        users, at = lookup(body, JSON, service, USERS_MAX)
        return users.tolist(), at
    except EngineError as error:
        return type(error).__name__, str(error)


def slowly(body: bytes, service: Service) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http_bodies, "_plain_lookup", lambda *_: None)
        return outcome(body, service)


spaces = st.text(" \t\r\n", max_size=2)
integers = st.one_of(st.integers(-20, 20), st.integers(-(2**63), 2**63), st.sampled_from([10**17, 10**18 - 1, 10**18, -(10**18) + 1]))
odd = st.sampled_from(["-0", "00", "01", "-01", "--1", "+1", "1.0", "1e3", "-", "", "null", "true", '"7"', "[1]", "\x0b1", "1 2", "\u0661"])
elements = st.builds(lambda a, e, b: f"{a}{e}{b}", spaces, st.one_of(integers.map(str), integers.map(str), odd), spaces)
tails = st.sampled_from(["", ',"at":null', ',"at":"1970-01-01"', ',"at":nul', ',"x":1', ',"user_ids":[8]', ",", ',"at":7'])
ends = st.sampled_from(["]}", "]} ", "] }", "]", "}", "]]}", "]}}", "]}\0", "] \n } \t\r\n"])


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    heads = st.sampled_from(
        ['{"user_ids":[', ' { "user_ids"\t:\n[', '{"at":null,"user_ids":[', '{"user_id":[', '[{"user_ids":[', '{"user\\u005fids":[']
    )
    inside, end = ",".join(draw(st.lists(elements, max_size=USERS_MAX + 2))), draw(ends)
    bracket, brace = end[:1].replace("}", ""), end[1:] if end[:1] == "]" else end
    return f"{draw(heads)}{inside}{bracket}{draw(tails)}{brace}".encode()


@given(bodies())
@example(b'{"user_ids":[]}')
@example(b'{"user_ids":[007]}')
@example(b'{"user_ids":[7')
@example(b'{"user_ids":[7,')
@example(b'{"user_ids":[-')
@example(b'{"user_ids":[7 ')
@example(b'{"user_ids":[7]')
@example(b'{"user_ids":[7],"user_ids":[8]}')
@example(b'{"user_ids":[1,2,3,4,5]}')
@example(b'{"user_ids":[1,2,3,4,5,6]}')
@example(b'{"user_ids":[999999999999999999,-999999999999999999,1000000000000000000]}')
@example(b'{"user_ids":[9223372036854775808]}')
@example(b'{"user_ids":[7]}\xff')
def test_what_is_asked_for(body: bytes) -> None:
    for service in (SERVICE, OF_TEXTS):
        assert outcome(body, service) == slowly(body, service)


@pytest.mark.parametrize("text", ["[7]", "[ -7 , 0,12 ]", "[" + ",".join(map(str, range(-500, 500))) + "]\n"])
def test_integers_are_those_of_json(text: str) -> None:
    """And as many as there is room for, however the text goes on."""
    expected = json.loads(text)
    for more in ("", "]", ",7]", "}"):
        found = np.full(len(expected) + 1, 99)
        assert parse_integers(np.frombuffer((text + more).encode(), np.uint8), 1, found) == len(expected)
        assert found.tolist() == [*expected, len(text.rstrip("\n"))]
        assert parse_integers(np.frombuffer((text + more).encode(), np.uint8), 1, found[:-1]) == -1


def test_the_shortest_way_is_taken_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_bodies, "json_of", None)
    for body in (b'{"user_ids":[7,8],"at":null}', b' {"user_ids": [7, 8]}\n'):
        assert outcome(body, SERVICE) == ([7, 8], None)
    with pytest.raises(TypeError):
        outcome(b'{"user_ids":[7,8]}', OF_TEXTS)
