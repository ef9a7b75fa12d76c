"""`engine.texts`: amounts and times that are written as text are parsed exactly, each by itself."""

from __future__ import annotations

import datetime
import decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import TIME_NS_MAX, TIME_NS_MIN, Config
from tests.rows import (
    CONFIG,
    IN_SECONDS,
    UNIT_NS,
    UTC,
    expected_amount,
    expected_time,
    rows_of_batch,
    text_batch,
)

# --------------------------------------------------------------------------------------------------
# Text

AMOUNT_WORDS = """
    1 1.5 -1.5 +1.5 .5 5. 007 -0 0.00005 0.00015 0.000050000000000000000000000000000000000000000000001
    1e3 1E+3 1.5e-2 5e-5 15e-5 1e-30 1e-44 1E-9 1e-09 1e+007 1e+99 1e39 1e-400 0e-400 1e400 -1e400 1e15
    9007199254740992 900719925474.0992 900719925474.0993 900719925474.09925 900719925474.0992500001 12345678901234567890.5
    nan NaN -nan inf +Inf -Infinity iNFINITY
    x 1,5 1_000 0x10 --1 + - . e5 1e 1e+ 1d5 1.2.3 infinit nanx $5 1e5e5 1e+-5 1e0x5 1e+0X5 1e-0x5 1e--5 1e-+5 0e+-0
"""
AMOUNT_TEXTS = [
    *AMOUNT_WORDS.split(),
    *("", " ", "1 5", "\u0661", " 1.5 ", "\t2", "0" * 50 + "1.25", "9" * 60, "-" + "9" * 38, "0." + "0" * 60 + "1", "0.1" + "0" * 60),
    *("1.00005" + "0" * 31, "1.00005" + "0" * 32 + "1", "1.00005" + "0" * 33),
]


def expected_amount_text(text: str | None, decimals: int):
    text = None if text is None else text.strip(" \t")
    try:
        assert text is not None
        assert text.isascii()
        assert "_" not in text
        value = decimal.Decimal(text)
    except (AssertionError, decimal.InvalidOperation):
        return 0, "null_amount", 0
    if not value.is_finite():
        return 0, "amount_not_finite", 0
    exact = Fraction(value)
    units, reason = expected_amount(exact, decimals)
    return units, reason, int(reason is None and Fraction(units, 10**decimals) != exact)


def text_amounts(texts, decimals=4):
    found = rows_of_batch(text_batch(amounts=texts), Config.of(shards=1, decimals=decimals))
    return [(units, reason, rounded) for _, _, units, reason, rounded in found]


@pytest.mark.parametrize("decimals", [0, 4, 8])
def test_amount_texts(decimals):
    texts = [*AMOUNT_TEXTS, None]
    expected = [expected_amount_text(text, decimals) for text in texts]
    assert text_amounts(texts, decimals) == expected
    assert [text_amounts([text], decimals)[0] for text in texts] == expected  # whatever its neighbours are


@given(
    st.lists(
        st.from_regex(r"\A[ ]?[+-]?[0-9]{0,12}(\.[0-9]{0,12})?([eE][+-]?[0-9]{1,2})?\Z")
        | st.decimals(allow_nan=True).map(str).filter(lambda text: "NaN" not in text or text == "NaN")
        | st.text("0123456789.eE+-xXnaif _", max_size=8)
        | st.integers(-(2**60), 2**60).map(lambda units: f"{units // 10**5}.{abs(units) % 10**5:05}")
        | st.none(),
        min_size=1,
        max_size=20,
    ),
    st.integers(0, 8),
)
@settings(max_examples=300, deadline=None)
def test_amount_texts_like_decimal(texts, decimals):
    expected = [expected_amount_text(text, decimals) for text in texts]
    assert text_amounts(texts, decimals) == expected
    assert [text_amounts([text], decimals)[0] for text in texts] == expected


def test_one_malformed_text_among_many_costs_one_row():
    n = 5000
    amounts = [f"{row}.25" for row in range(n)]
    times = [f"2020-01-01T00:00:00.{row:06}" for row in range(n)]
    good = rows_of_batch(text_batch(amounts, times))
    assert all(row[3] is None for row in good)
    amounts[1234], times[4321], times[77] = "many", "never", "2300-01-01"
    bad = rows_of_batch(text_batch(amounts, times))
    assert [row[3] for row in bad if row[3]] == ["timestamp_out_of_range", "null_amount", "null_timestamp"]
    assert [row for row in bad if not row[3]] == [row for place, row in enumerate(good) if place not in (77, 1234, 4321)]


EPOCH = datetime.datetime(1970, 1, 1, tzinfo=UTC)


def ns_of(moment: datetime.datetime) -> int:
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return (moment - EPOCH) // datetime.timedelta(microseconds=1) * 1000


TIME_TEXTS = {
    "1970-01-01": 0,
    "1970-01-01T00:00:00Z": 0,
    "1970-01-01 00": 0,
    "1970-01-01T01:02": 3720 * 10**9,
    "1970-01-01T01:02Z": 3720 * 10**9,
    "1969-12-31T23:59:59.999999999": -1,
    "2024-02-29T12:34:56.123456789+02:00": ns_of(datetime.datetime(2024, 2, 29, 10, 34, 56)) + 123456789,
    "2024-02-29 12:34:56.5-0530": ns_of(datetime.datetime(2024, 2, 29, 18, 4, 56, 500000)),
    "2024-02-29T12:34:56+02": ns_of(datetime.datetime(2024, 2, 29, 10, 34, 56)),
    "2024-02-29t12:34:56z": ns_of(datetime.datetime(2024, 2, 29, 12, 34, 56)),
    " 1970-01-02 ": 86400 * 10**9,
    "2000-02-29": ns_of(datetime.datetime(2000, 2, 29)),
    "1677-09-21T00:12:43.145224193": TIME_NS_MIN,
    "1677-09-21T00:12:43.145224192": "timestamp_out_of_range",
    "1677-09-21T00:12:42.999999999": "timestamp_out_of_range",
    "2262-04-11T23:47:16.854775807": TIME_NS_MAX,
    "2262-04-11T23:47:16.854775808": "timestamp_out_of_range",
    "2262-04-11T23:47:17": "timestamp_out_of_range",
    "2262-04-12T01:47:16.854775807+02:00": TIME_NS_MAX,
    "2300-01-01": "timestamp_out_of_range",
    "2300-01-01T00:00:00Z": "timestamp_out_of_range",
    "9999-12-31T23:59:59": "timestamp_out_of_range",
    "0000-01-01": "timestamp_out_of_range",
    "1600-01-01": "timestamp_out_of_range",
    **dict.fromkeys(
        ["2023-02-29", "1900-02-29", "2024-04-31", "2024-13-01", "2024-00-10", "2024-01-00", "2024-01-01T24:00", "2024-01-01T00:60"],
        "null_timestamp",
    ),
    **dict.fromkeys(
        ["2024-01-01T00:00:60", "2024-01-01T00:00:00.", "2024-01-01T00:00:00.1234567890", "2024-1-1", "2024", "20240101", "", "now", "x"],
        "null_timestamp",
    ),
    **dict.fromkeys(
        ["2024-01-01T00:00:00+24:00", "2024-01-01T00:00:00+02:60", "2024-01-01Z", "2024-01-01T00:00:00 UTC", "2300-02-30", "0x10", "1.5"],
        "null_timestamp",
    ),
    "0": "null_timestamp",
    "1700000000": "null_timestamp",
}


def text_times(texts, config=CONFIG):
    return [(time, reason) for _, time, _, reason, _ in rows_of_batch(text_batch(times=texts), config)]


def answer(expected):
    return (0, expected) if isinstance(expected, str) else (expected, None)


def test_time_texts():
    texts = [*TIME_TEXTS, None]
    expected = [answer(value) for value in TIME_TEXTS.values()] + [(0, "null_timestamp")]
    assert text_times(texts) == expected
    assert [text_times([text])[0] for text in texts] == expected
    assert [text_times([text, "1970-01-01T00:00:00Z"])[0] for text in texts] == expected
    assert [text_times([text, "1970-01-01T00:00:00"])[0] for text in texts] == expected


@pytest.mark.parametrize("unit", UNIT_NS)
def test_integer_time_texts(unit):
    config = Config.of(shards=1, time_unit=unit)
    limit = TIME_NS_MAX // UNIT_NS[unit]
    numbers = [0, 1, -1, limit, limit + 1, -limit, -limit - 1, 10**18, 10**19, 2**64, -(2**63), 10**30]
    texts = [*map(str, numbers), "+5", "0" * 30 + "7", "-" + "0" * 30 + "7", "0x10", "1.0", "1e3", " 8 "]
    expected = [expected_time(number, UNIT_NS[unit]) for number in numbers]
    expected += [expected_time(number, UNIT_NS[unit]) for number in (5, 7, -7)]
    expected += [(0, "null_timestamp")] * 3 + [expected_time(8, UNIT_NS[unit])]
    mixed = {**TIME_TEXTS, "0": 0, "2024": expected_time(2024, UNIT_NS[unit])[0], "20240101": 20240101 * UNIT_NS[unit]}
    mixed["1700000000"] = 1700000000 * UNIT_NS[unit]
    texts += list(mixed)
    expected += [answer(value) for value in mixed.values()]
    assert text_times(texts, config) == expected
    assert [text_times([text], config)[0] for text in texts] == expected


@given(
    st.lists(
        st.builds(
            lambda moment, sep, zone: moment.replace(tzinfo=None).isoformat(sep) + zone,
            st.datetimes(datetime.datetime(1600, 1, 1), datetime.datetime(2400, 1, 1)),
            st.sampled_from("T "),
            st.sampled_from(["", "Z", "+00:00", "-11:30", "+23:59"]),
        ),
        min_size=1,
        max_size=20,
    )
)
@settings(max_examples=200, deadline=None)
def test_time_texts_like_datetime(texts):
    expected = [expected_time(ns_of(datetime.datetime.fromisoformat(text)), 1) for text in texts]
    assert text_times(texts) == expected
    assert [text_times([text])[0] for text in texts] == expected


@given(
    st.lists(
        st.text("0123456789-:T Z+.x", max_size=12).map(lambda end: "2024-01-01" + end) | st.text("0123456789-:TZ+", max_size=26), max_size=8
    )
)
@settings(max_examples=300, deadline=None)
def test_what_becomes_of_a_time_text_does_not_depend_on_its_neighbours(texts):
    for config in (CONFIG, IN_SECONDS):
        alone = [text_times([text], config)[0] for text in texts]
        assert text_times([*texts, "spoilt"], config)[:-1] == alone


@pytest.mark.parametrize(
    "text",
    [
        *["0.98635000000000000000000e0", "5.00000000000000000000e-5", "710428402767701081952545e-8", "-5.00000000000000000000e-5"],
        *["12345678901234567890.12345e9", "0.000000000000000000000005e9", "00000000000000000000000001e5", "1e-9", "+1.5e+3"],
    ],
)
@pytest.mark.parametrize("neighbour", ["x", "1e-44", "1", "nan", "1e10"])
def test_an_amount_does_not_depend_on_its_neighbours(text: str, neighbour: str) -> None:
    """A column that Arrow casts as a whole and one that is sorted out first must read a text alike."""
    assert text_amounts([text, neighbour])[0] == text_amounts([text])[0]
