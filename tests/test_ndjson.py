"""Numbers put into quotes: by the compiled loop, and by the pattern that says what it shall do."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import Config
from engine.ndjson import quoting


def by_pattern(block: bytes, config: Config) -> bytes:
    keys = "|".join(re.escape(json.dumps(key, ensure_ascii=False)) for key in (config.amount, config.timestamp))
    unquoted = rf"([{{, \t\r\n](?:{keys})[ \t\r\n]*:[ \t\r\n]*)(-?(?:[0-9][0-9.eE+-]*|NaN|Inf(?:inity)?))"
    return re.sub(unquoted.encode(), rb'\1"\2"', block)


NAMES = [("amount", "timestamp"), ("a", "at"), ("a", 'a"'), ("e", "é"), ('b"', "b\\"), ("x.*", "[x]")]

pieces = st.sampled_from(
    [
        *[json.dumps(name, ensure_ascii=False) for names in NAMES for name in names],
        *['"', ":", ",", "{", "}", " ", "\n", "\t", "\r", "\\", "-", "+", ".", "e", "E", "1", "0", "93", "x", "a", "[", "null"],
        *["NaN", "-NaN", "Inf", "Infinity", "-Infinity", "Infini", "Na", ': 5,"a":', '"amount":1', ',"timestamp": -2.5e+7'],
    ]
)


keys = st.sampled_from([json.dumps(name, ensure_ascii=False) for names in NAMES for name in names])
gaps = st.sampled_from(["", *" \t\r\n"])
members = st.builds("{}{}{}:{}{}".format, st.sampled_from('{, \t\r\n:x"'), keys, gaps, gaps, st.sampled_from('10-NIx"'))


@given(st.lists(pieces | members, max_size=60).map("".join), st.sampled_from(NAMES))
def test_the_loop_does_what_the_pattern_says(text: str, names: tuple[str, str]) -> None:
    config = Config.of(amount=names[0], timestamp=names[1], user_id="u")
    assert quoting(config)(text.encode()) == by_pattern(text.encode(), config)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{"amount":1}', '{"amount":"1"}'),
        ('"amount":1', '"amount":1'),
        ('{"amount" : -1.5e+3 , "timestamp":7}', '{"amount" : "-1.5e+3" , "timestamp":"7"}'),
        ('{"amount":null,"timestamp":"7"}', '{"amount":null,"timestamp":"7"}'),
        ('{"text":"{\\"amount\\":1}"}', '{"text":"{\\"amount\\":1}"}'),
        ('{"amounts":1,"amount":[2]}', '{"amounts":1,"amount":[2]}'),
        ('{"amount":-Infinity,"timestamp":NaN}', '{"amount":"-Infinity","timestamp":"NaN"}'),
        ('{"amount":-,"timestamp":', '{"amount":-,"timestamp":'),
        ('{"amount":12', '{"amount":"12"'),
        *[(f'{{"x":0,{gap}"amount"{gap}:{gap}5{gap}}}', f'{{"x":0,{gap}"amount"{gap}:{gap}"5"{gap}}}') for gap in " \t\r\n"],
        ("", ""),
    ],
)
def test_examples(before: str, after: str) -> None:
    config = Config.of()
    assert quoting(config)(before.encode()).decode() == after == by_pattern(before.encode(), config).decode()


def test_nothing_but_numbers_has_room() -> None:
    block = b'{"a":0' * 10_000
    config = Config.of(amount="a", timestamp="t", user_id="u")
    assert quoting(config)(block) == b'{"a":"0"' * 10_000
