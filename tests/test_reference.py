"""The definition against cases worked by hand. Each expected number stands in the test with its arithmetic."""

import random
import struct
from collections import defaultdict, deque
from decimal import Decimal
from fractions import Fraction
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from engine import reference as reference_module
from engine.config import REASONS, TIME_NS_MAX, TIME_NS_MIN, Config
from engine.engine import RiskEngine
from engine.errors import CapacityError, TimeTooOldError
from engine.reference import Features, Reference, Row, Verification, nearest_float32, plain_rows, siphash, to_units, verify

S = 10**9  # nanoseconds in a second


def reference(window: Any = "60s", **options: Any) -> Reference:
    options.setdefault("max_ahead", None)
    return Reference(Config.of(window, shards=1, **options))


def put(judge: Reference, *rows: Any, **options: Any) -> list[Any]:
    """Apply rows; for each its score, or its reason."""
    return [row.score if row.reason is None else row.reason for row in judge.ingest(rows, **options)]


# ------------------------------------------------------------------------------------------------ window (S4, S5)


def test_closed_both_counts_a_transaction_exactly_one_window_old() -> None:
    judge = reference("60s", closed="both")
    # At 60 s the row of 0 s is exactly 60 s old and counts: (10 + 20) / 2. 1 ns later it does not.
    assert put(judge, ("a", 10, 0), ("a", 20, 60 * S)) == [10.0, 15.0]
    assert put(judge, ("a", 30, 60 * S + 1)) == [25.0]  # (20 + 30) / 2
    assert judge.score("a", 60 * S) == 15.0
    assert judge.score("a", 60 * S + 1) == 25.0


def test_closed_right_does_not() -> None:
    judge = reference("60s", closed="right")
    # At 60 s - 1 ns the row of 0 s still counts: (10 + 20) / 2. At 60 s it has just left: (20 + 30) / 2.
    assert put(judge, ("a", 10, 0), ("a", 20, 60 * S - 1), ("a", 30, 60 * S)) == [10.0, 15.0, 25.0]
    assert judge.score("a", 60 * S - 1) == 15.0
    assert judge.score("a", 60 * S) == 25.0


def test_a_window_of_one_nanosecond() -> None:
    both, right = reference("1ns", closed="both"), reference("1ns", closed="right")
    rows = [("a", 1, 0), ("a", 3, 0), ("a", 8, 1), ("a", 100, 2)]
    assert put(both, *rows) == [1.0, 2.0, 4.0, 54.0]  # 1; (1+3)/2; (1+3+8)/3; (8+100)/2
    assert put(right, *rows) == [1.0, 2.0, 8.0, 100.0]  # only equal times share a window


def test_score_is_the_mean_not_the_sum() -> None:
    judge = reference()
    assert put(judge, ("a", 1, 0), ("a", 2, 1), ("a", 2, 2)) == [1.0, 1.5, 5 / 3]


def test_score_is_rounded_correctly_where_two_roundings_would_go_wrong() -> None:
    judge = reference(decimals=0)
    # Sum 3 * 2**53 - 2 is no float64: rounded first it is 3 * 2**53 - 2 or a neighbour 2 away. Exact division by 3 is asked for.
    rows = [("a", 2**53, 0), ("a", 2**53, 0), ("a", 2**53 - 2, 0)]
    wanted = Fraction(3 * 2**53 - 2, 3)
    got = put(judge, *rows)[-1]
    assert abs(Fraction(got) - wanted) <= Fraction(1, 2)  # half an ulp: floats just below 2**53 are 1 apart
    assert got == 9007199254740991.0  # 2**53 - 2/3 lies nearest to 2**53 - 1


def test_users_do_not_mix_and_ids_of_different_type_are_different() -> None:
    judge = reference()
    assert put(judge, ("a", 10, 0), ("b", 20, 0), ("", 5, 0)) == [10.0, 20.0, 5.0]
    assert [judge.score(user) for user in ("a", "b", "", "unknown")] == [10.0, 20.0, 5.0, 0.0]
    bytes_judge = reference()
    put(bytes_judge, (b"a", 10, 0))
    assert bytes_judge.score("a") == 0.0


def test_nothing_ingested() -> None:
    judge = reference()
    assert judge.clock_ns is None
    assert judge.score("a") == 0.0
    assert judge.features("a", -5) == Features(0, 0, 0.0, None, None, None)
    assert judge.users() == []
    assert judge.retained("a") == []
    assert judge.ingest([]) == []


def test_negative_amounts_sum_zero_and_minus_zero() -> None:
    judge = reference()
    assert put(judge, ("a", -7, 0), ("a", 7, 1), ("a", -1, 2)) == [-7.0, 0.0, -1 / 3]
    zero = judge.score("a", 1)
    assert (zero, str(zero)) == (0.0, "0.0")
    [minus_zero] = put(judge, ("b", -0.0, 2))
    assert str(minus_zero) == "0.0"
    assert judge.rounded == 0
    assert judge.features("b", 2) == Features(1, 0, 0.0, 2, 2 + 60 * S, 2 + 60 * S + 1)


# ---------------------------------------------------------------------------------- clock, lateness, guards (S6-S8)


def test_lateness_edge() -> None:
    judge = reference("60s", lateness="5s")
    # Clock 100 s: 95 s is exactly 5 s behind and is applied; 1 ns earlier is late.
    assert put(judge, ("a", 10, 100 * S), ("b", 1, 95 * S), ("b", 1, 95 * S - 1)) == [10.0, 1.0, "late"]
    assert judge.rejected == {**dict.fromkeys(REASONS, 0), "late": 1}
    assert judge.clock_ns == 100 * S


def test_lateness_zero_takes_equal_times_only() -> None:
    judge = reference("60s", lateness="0s")
    assert put(judge, ("a", 10, 5), ("b", 1, 5), ("b", 1, 4), ("a", 20, 5)) == [10.0, 1.0, "late", 15.0]


def test_default_lateness_is_the_window() -> None:
    judge = reference("60s")
    assert put(judge, ("a", 10, 60 * S), ("a", 2, 0), ("a", 2, -1)) == [10.0, 2.0, "late"]
    assert judge.score("a") == 6.0  # (2 + 10) / 2: the row of 0 s is exactly 60 s old


def test_lateness_is_measured_against_the_clock_before_the_row() -> None:
    judge = reference("60s", lateness="1s")
    # The jump to 50 s makes what follows late, not what came before it; a row cannot be late against itself.
    assert put(judge, ("a", 1, 10 * S), ("a", 2, 9 * S), ("a", 3, 50 * S), ("a", 4, 48 * S)) == [1.0, 2.0, 2.0, "late"]
    # 50 s: (1 + 2 + 3) / 3 = 2


def test_only_applied_rows_and_sum_overflow_move_the_clock() -> None:
    judge = reference("60s", lateness="60s", max_jump="30s", max_ahead="10s")
    put(judge, ("a", 1, 0))
    wall = 20 * S
    rows = [(None, 1, 5 * S), ("a", None, 6 * S), ("a", 1, None), ("a", float("nan"), 7 * S), ("a", 2**53, 8 * S)]
    rows += [("a", 1, TIME_NS_MAX + 1), ("a", 1, 30 * S + 1), ("a", 1, -60 * S - 1)]
    wanted = ["null_user", "null_amount", "null_timestamp", "amount_not_finite", "amount_out_of_range"]
    assert put(judge, *rows, wall_ns=wall) == [*wanted, "timestamp_out_of_range", "future", "late"]
    assert judge.clock_ns == 0
    assert put(judge, ("a", 1, 30 * S)) == [1.0]
    assert put(judge, ("a", 1, 60 * S + 1)) == ["jump"]
    assert judge.clock_ns == 30 * S


def test_future_guard_edge() -> None:
    judge = reference(max_ahead="10s")
    # Wall 100 s: 110 s is exactly 10 s ahead and is applied; 1 ns later is not. Without a wall clock there is no future.
    assert put(judge, ("a", 1, 110 * S), ("a", 1, 110 * S + 1), wall_ns=100 * S) == [1.0, "future"]
    assert put(judge, ("a", 1, 110 * S + 1)) == [1.0]
    assert put(reference(max_ahead=None), ("a", 1, 10**18), wall_ns=0) == [1.0]


def test_jump_guard_edge() -> None:
    judge = reference(max_jump="10s")
    # The first row has no clock to jump from. 1000 s -> 1010 s is exactly 10 s; each row is measured against the clock just before it.
    assert put(judge, ("a", 1, 1000 * S), ("a", 1, 1010 * S + 1), ("a", 1, 1010 * S), ("a", 1, 1020 * S)) == [1.0, "jump", 1.0, 1.0]


def test_times_before_1970_and_at_the_ends_of_the_range() -> None:
    judge = reference("60s")
    assert put(judge, ("a", 1, TIME_NS_MIN - 1), ("a", 1, TIME_NS_MIN), ("a", 3, TIME_NS_MIN + 60 * S)) == [
        "timestamp_out_of_range",
        1.0,
        2.0,
    ]
    assert put(judge, ("a", 5, -1)) == [5.0]
    assert put(judge, ("a", 7, TIME_NS_MAX), ("a", 7, TIME_NS_MAX + 1)) == [7.0, "timestamp_out_of_range"]
    assert judge.features("a") == Features(1, 70000, 7.0, TIME_NS_MAX, TIME_NS_MAX, TIME_NS_MAX)


# -------------------------------------------------------------------------------------------------- rejects (S12)


def test_first_reason_wins_in_the_order_of_reasons() -> None:
    options = {"max_ahead": "1s", "max_jump": "1s", "lateness": "0s", "decimals": 0}
    far, nan, big = 10**30, float("nan"), 2**53 + 1
    rows = [
        ((None, None, None), "null_user"),
        (("a", None, None), "null_amount"),
        (("a", nan, None), "null_timestamp"),
        (("a", nan, far), "amount_not_finite"),
        (("a", float("-inf"), far), "amount_not_finite"),
        (("a", Decimal("NaN"), far), "amount_not_finite"),
        (("a", Decimal("Infinity"), far), "amount_not_finite"),
        (("a", big, far), "amount_out_of_range"),
        (("a", -big, far), "amount_out_of_range"),
        (("a", 1e308, far), "amount_out_of_range"),
        (("a", 1, far), "timestamp_out_of_range"),
        (("a", 1, 10 * S), "future"),
        (("a", 1, 2 * S), "jump"),  # wall 2 s: not in the future, but 2 s ahead of the clock
        (("a", 1, -1), "late"),
        (("a", 1, 0), None),
    ]
    judge = reference(**options)
    assert put(judge, ("a", 1, 0)) == [1.0]
    for row, wanted in rows:
        [answer] = judge.ingest([row], wall_ns=2 * S)
        assert answer.reason == wanted, row
        assert (answer.score is None) == (wanted is not None)
    assert sum(judge.rejected.values()) == 14
    assert judge.accepted == 2
    assert judge.clock_ns == 0


def test_amount_range_edge_is_taken_after_rounding() -> None:
    judge = reference(decimals=0)
    # 2**53 is the most; 2**53 + 0.5 rounds half-even down to it, 2**53 + 0.50001 rounds beyond it.
    half = Decimal(2**53) + Decimal("0.5")
    assert put(judge, ("a", 2**53, 0), ("b", -(2**53), 0), ("c", half, 0)) == [2.0**53, -(2.0**53), 2.0**53]
    assert put(judge, ("d", half + Decimal("0.00001"), 0), ("e", -(2**53) - 1, 0)) == ["amount_out_of_range"] * 2
    assert judge.rounded == 1  # only the applied one counts


def test_sum_overflow_at_the_edge_and_the_clock_moves() -> None:
    judge = reference("60s", lateness="0s", decimals=0)
    # 512 * 2**53 = 2**62 exactly is allowed; one unit more is not, one less is.
    put(judge, *[("a", 2**53, 0)] * 512)
    assert judge.features("a").sum_units == 2**62
    assert put(judge, ("a", 1, 1)) == ["sum_overflow"]
    assert judge.clock_ns == 1
    assert put(judge, ("a", 5, 0)) == ["late"]  # behind the clock that the refused row moved
    assert put(judge, ("a", -1, 1)) == [(2**62 - 1) / 513]
    assert put(judge, ("a", 1, 1)) == [2**62 / 514]
    assert (judge.accepted, judge.rejected["sum_overflow"], judge.rejected["late"]) == (514, 1, 1)


def test_sum_overflow_is_over_retained_amounts_with_the_clock_of_the_row_itself() -> None:
    judge = reference("60s", lateness="0s", decimals=0)
    put(judge, *[("a", -(2**53), 0)] * 512)
    assert put(judge, ("a", -1, 60 * S)) == ["sum_overflow"]  # the rows of 0 s are retained at a clock of 60 s ...
    assert put(judge, ("a", -1, 60 * S + 1)) == [-1.0]  # ... and no longer 1 ns later
    assert judge.retained("a") == [(60 * S + 1, -1)]


def test_sum_overflow_counts_retained_rows_outside_the_window_too() -> None:
    judge = reference("1s", lateness="10s", decimals=0)
    put(judge, *[("a", 2**53, 0)] * 512)
    # At 5 s the window is empty, but the amounts are retained till 11 s for lookups in the past.
    assert put(judge, ("a", 1, 5 * S)) == ["sum_overflow"]
    assert judge.score("a", 5 * S) == 0.0


# --------------------------------------------------------------------------------------------- row scores (S9)


def test_row_scores_of_equal_times_follow_arrival() -> None:
    judge = reference()
    assert put(judge, ("a", 4, 7), ("a", 2, 7), ("b", 9, 7), ("a", 0, 7)) == [4.0, 3.0, 9.0, 2.0]
    assert judge.retained("a") == [(7, 40000), (7, 20000), (7, 0)]


def test_row_scores_of_rows_out_of_order() -> None:
    judge = reference("60s")
    rows = [
        ("a", 10, 100 * S),  # alone: 10
        ("a", 20, 70 * S),  # [10 s, 70 s]: itself; the row of 100 s is later
        ("a", 30, 90 * S),  # [30 s, 90 s]: 20, 30
        ("a", 40, 40 * S),  # [-20 s, 40 s]: itself
        ("a", 50, 100 * S),  # [40 s, 100 s]: 40, 20, 30, 10, 50
        ("a", 60, 70 * S),  # [10 s, 70 s]: 40, 20, 60
    ]
    assert put(judge, *rows) == [10.0, 20.0, 25.0, 40.0, 30.0, 40.0]
    tens = [(40, 40), (70, 20), (70, 60), (90, 30), (100, 10), (100, 50)]  # ties in arrival order
    assert judge.retained("a") == [(seconds * S, amount * 10**4) for seconds, amount in tens]


# ----------------------------------------------------------------------------------------------- lookups (S10)


def test_as_of_lookups_and_too_old() -> None:
    judge = reference("60s", lateness="30s")
    put(judge, ("a", 10, 0), ("a", 20, 50 * S), ("a", 60, 80 * S))
    assert judge.score("a") == 40.0  # [20 s, 80 s]: 20, 60
    assert judge.score("a", 79 * S) == 20.0  # [19 s, 79 s]: 20
    assert judge.score("a", 60 * S) == 15.0  # [0 s, 60 s]: 10, 20
    assert judge.score("a", 50 * S) == 15.0  # exactly clock - lateness: 10, 20
    with pytest.raises(TimeTooOldError, match="30000000001 ns behind"):
        judge.score("a", 50 * S - 1)
    with pytest.raises(TimeTooOldError):
        judge.score("unknown", 50 * S - 1)


def test_scores_decay_to_zero_in_silence() -> None:
    judge = reference("60s")
    put(judge, ("a", 10, 0), ("a", 20, 30 * S))
    assert judge.score("a", 60 * S) == 15.0
    assert judge.score("a", 60 * S + 1) == 20.0
    assert judge.score("a", 90 * S) == 20.0
    assert judge.score("a", 90 * S + 1) == 0.0
    assert judge.score("a", TIME_NS_MAX) == 0.0
    assert judge.score("a") == 15.0  # looking ahead changed nothing


def test_valid_until_and_zero_at_of_a_silent_user() -> None:
    both, right = reference("60s"), reference("60s", closed="right")
    for judge in (both, right):
        put(judge, ("a", 10, 0), ("a", 20, 30 * S))
    # both: the oldest one counts through 60 s, the newest through 90 s.
    assert both.features("a") == Features(2, 300000, 15.0, 30 * S, 60 * S, 90 * S + 1)
    assert both.features("a", 60 * S + 1) == Features(1, 200000, 20.0, 30 * S, 90 * S, 90 * S + 1)
    assert both.features("a", 90 * S + 1) == Features(0, 0, 0.0, None, None, None)
    # right: each of them 1 ns less.
    assert right.features("a") == Features(2, 300000, 15.0, 30 * S, 60 * S - 1, 90 * S)
    assert right.features("a", 60 * S) == Features(1, 200000, 20.0, 30 * S, 90 * S - 1, 90 * S)
    assert right.features("a", 90 * S) == Features(0, 0, 0.0, None, None, None)


def test_valid_until_and_zero_at_in_the_past_see_what_comes_later() -> None:
    judge = reference("10s", lateness="100s")
    put(judge, ("a", 1, 0), ("a", 2, 5 * S), ("a", 3, 40 * S), ("b", 1, 100 * S))
    # At 0 s: the row of 0 s alone, until the one of 5 s enters. Empty after 15 s: 5 s + 10 s + 1 ns, long before 40 s.
    assert judge.features("a", 0) == Features(1, 10000, 1.0, 0, 5 * S - 1, 15 * S + 1)
    assert judge.features("a", 5 * S) == Features(2, 30000, 1.5, 5 * S, 10 * S, 15 * S + 1)
    assert judge.features("a", 15 * S) == Features(1, 20000, 2.0, 5 * S, 15 * S, 15 * S + 1)
    # In the gap nothing is counted, and that is right until just before 40 s.
    assert judge.features("a", 15 * S + 1) == Features(0, 0, 0.0, None, 40 * S - 1, None)
    assert judge.features("a", 40 * S) == Features(1, 30000, 3.0, 40 * S, 50 * S, 50 * S + 1)
    assert judge.features("a") == Features(0, 0, 0.0, None, None, None)


@pytest.mark.parametrize(("enters", "zero_at"), [(10 * S, 20 * S + 1), (10 * S + 1, 20 * S + 2), (10 * S + 2, 10 * S + 1)])
def test_zero_at_when_one_enters_as_the_last_leaves(enters: int, zero_at: int) -> None:
    judge = reference("10s", lateness="100s")
    # The row of 0 s counts through 10 s. One that enters at 10 s + 1 ns leaves no gap; 1 ns later there is one.
    put(judge, ("a", 1, 0), ("a", 2, enters))
    assert judge.features("a", 0) == Features(1, 10000, 1.0, 0, min(10 * S, enters - 1), zero_at)


def test_features_of_equal_times() -> None:
    judge = reference("10s", lateness="100s")
    put(judge, ("a", 1, 5), ("a", 3, 5), ("a", 8, 6), ("a", 8, 6))
    assert judge.features("a", 5) == Features(2, 40000, 2.0, 5, 5, 6 + 10 * S + 1)
    assert judge.features("a", 6) == Features(4, 200000, 5.0, 6, 5 + 10 * S, 6 + 10 * S + 1)


def test_a_chain_of_later_rows_moves_zero_at() -> None:
    judge = reference("10s", lateness="100s")
    put(judge, *[("a", 1, seconds * S) for seconds in (0, 8, 16, 24, 50)])
    # 0 -> 8 -> 16 -> 24 follow within 10 s each, 50 does not: empty after 34 s.
    assert judge.features("a", 0).zero_at_ns == 34 * S + 1


# --------------------------------------------------------------------------------------- retention (S15), capacity


def test_retained_edge() -> None:
    judge = reference("60s", lateness="30s")
    put(judge, ("a", 10, 0), ("b", 1, 90 * S))
    # Retention 60 s + 30 s: at a clock of 90 s the row of 0 s is still needed, by a lookup at 60 s.
    assert judge.retained("a") == [(0, 100000)]
    assert judge.score("a", 60 * S) == 10.0
    assert judge.users() == ["a", "b"]
    put(judge, ("b", 1, 90 * S + 1))
    assert judge.retained("a") == []
    assert judge.users() == ["b"]
    assert judge.score("a", 60 * S + 1) == 0.0


def test_retained_edge_closed_right() -> None:
    judge = reference("60s", lateness="30s", closed="right")
    put(judge, ("a", 10, 0), ("b", 1, 90 * S - 1))
    assert judge.users() == ["a", "b"]
    put(judge, ("b", 1, 90 * S))
    assert judge.users() == ["b"]


def test_users_are_ascending_by_value_or_by_bytes() -> None:
    judge = reference()
    put(judge, *[(user, 1, 0) for user in (5, -1, 2**63, 0, -(2**63))])
    assert judge.users() == [-(2**63), -1, 0, 5, 2**63]
    judge = reference()
    put(judge, *[(user, 1, 0) for user in ("b", "", "a", "ab", "é", "z", "\U0001f600", "\uffff")])
    assert judge.users() == ["", "a", "ab", "b", "z", "é", "\uffff", "\U0001f600"]


def test_capacity_counts_users_with_a_retained_transaction() -> None:
    judge = reference("10s", lateness="0s", users=2)
    put(judge, ("a", 1, 0), ("b", 2, 5 * S))
    with pytest.raises(CapacityError, match="users=2"):
        put(judge, ("c", 3, 10 * S))  # "a" is retained at a clock of exactly 10 s
    assert put(judge, ("c", 3, 10 * S + 1)) == [3.0]  # and is not 1 ns later
    assert judge.users() == ["b", "c"]
    # "a" has lost its place: coming back it is a new user, and there is none free before 15 s.
    with pytest.raises(CapacityError):
        put(judge, ("a", 1, 15 * S))
    assert put(judge, ("a", 1, 15 * S + 1)) == [1.0]


def test_capacity_error_leaves_everything_as_it_was() -> None:
    judge = reference("10s", lateness="5s", users=2)
    put(judge, ("a", 0.00001, 0), ("b", 2, S), ("b", 2, None))
    state = judge.digest(), judge.clock_ns, judge.accepted, dict(judge.rejected), judge.rounded, judge.retained("a"), judge.retained("b")
    # In order: a reject, a rounded row, a clock that makes "a" and "b" dead, two new users, and a third one too many.
    batch = [("a", None, 0), ("b", 0.00001, 2 * S), ("c", 1, 100 * S), ("d", 1, 100 * S), ("e", 1, 100 * S)]
    with pytest.raises(CapacityError):
        judge.ingest(batch)
    assert state == (
        judge.digest(),
        judge.clock_ns,
        judge.accepted,
        dict(judge.rejected),
        judge.rounded,
        judge.retained("a"),
        judge.retained("b"),
    )
    assert judge.users() == ["a", "b"]
    assert put(judge, *batch[:-1]) == ["null_amount", 1.0, 1.0, 1.0]  # (2 + 0) / 2, then two users in the places of the dead
    assert judge.users() == ["c", "d"]


def test_a_rejected_row_takes_no_place() -> None:
    judge = reference("10s", lateness="0s", users=1)
    assert put(judge, ("a", 1, 10 * S), ("b", 1, 0), ("c", None, 10 * S), ("a", 3, 10 * S)) == [1.0, "late", "null_amount", 2.0]


def test_a_users_own_dead_rows_do_not_keep_its_place() -> None:
    judge = reference("10s", lateness="0s", users=1)
    assert put(judge, ("a", 1, 0), ("a", 5, 11 * S)) == [1.0, 5.0]
    assert judge.retained("a") == [(11 * S, 50000)]


# -------------------------------------------------------------------------------------------- amounts to units (S3)


@pytest.mark.parametrize(
    ("amount", "units", "rounded"),
    [
        (0, 0, False),
        (12, 120000, False),
        (-12, -120000, False),
        (0.1, 1000, False),  # the float nearest to 0.1
        (0.1 + 0.2, 3000, True),  # 0.30000000000000004 is another float than 0.3
        (0.12345, 1235, True),  # the float lies above the tie: 0.12345000000000000417...
        (0.00005, 1, True),  # the float lies above the tie: 0.0000500000000000000023...
        (-0.00005, -1, True),
        (0.5, 5000, False),
        (0.03125, 312, True),  # 1/32 = 312.5 units exactly: a tie, to the even 312
        (0.09375, 938, True),  # 3/32 = 937.5 units exactly: to the even 938
        (-0.03125, -312, True),
        (-0.09375, -938, True),
        (5e-324, 0, True),
        (-0.0, 0, False),
        (Decimal("0.1"), 1000, False),
        (Decimal("0.00005"), 0, True),  # ties to even: 0.5 units -> 0, 1.5 -> 2, 2.5 -> 2
        (Decimal("0.00015"), 2, True),
        (Decimal("0.00025"), 2, True),
        (Decimal("-0.00015"), -2, True),
        (Decimal("0.000050000000000000000000001"), 1, True),
        (Decimal("123.4500"), 1234500, False),
        (Decimal("-0"), 0, False),
        (900719925474.0992, 2**53, False),  # the greatest amount at 4 decimals
    ],
)
def test_to_units(amount: Any, units: int, rounded: bool) -> None:
    assert to_units(amount, 4) == (units, rounded)
    # The same by rational arithmetic: Python rounds a Fraction half-even.
    assert units == round(Fraction(amount) * 10**4)


def single(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


def test_to_units_of_float32() -> None:
    # The float32 nearest to 0.1 is 0.100000001490116...: not the float64 nearest to 0.1, so only as a float32 it is unchanged.
    assert to_units(single(0.1), 4, single=True) == (1000, False)
    assert to_units(single(0.1), 4) == (1000, True)
    assert to_units(single(0.12345), 4, single=True) == (1235, True)  # 0.123450003...: above the tie
    assert to_units(single(123456.78), 2, single=True) == (12345678, False)  # 123456.78125 -> 78.125 units of cents -> .78
    assert to_units(0.5, 4, single=True) == (5000, False)
    assert to_units(2.0**-149, 4, single=True) == (0, True)
    assert to_units(-0.0, 4, single=True) == (0, False)


def test_nearest_float32() -> None:
    assert nearest_float32(Fraction(0)) == 0.0
    # Half way between two float32 the even one is taken: 1 + 2**-24 -> 1, 1 + 3 * 2**-24 -> 1 + 2**-22.
    assert nearest_float32(1 + Fraction(1, 2**24)) == 1.0
    assert nearest_float32(1 + Fraction(3, 2**24)) == 1 + 2.0**-22
    # Just above the half: rounding to float64 first would fall on the half and then down.
    assert nearest_float32(1 + Fraction(1, 2**24) + Fraction(1, 2**80)) == 1 + 2.0**-23
    assert nearest_float32(Fraction(1, 2**150)) == 0.0
    assert nearest_float32(Fraction(3, 2**150)) == 2.0**-148
    draw = random.Random(5)
    for _ in range(2000):
        value = draw.uniform(-1, 1) * 10 ** draw.randrange(-44, 30)
        assert nearest_float32(Fraction(value)) == single(value)


def test_rounded_counts_applied_rows_only() -> None:
    judge = reference(decimals=2)
    assert put(judge, ("a", 0.125, 100 * S), ("a", 0.125, 0), ("b", 0.1, 100 * S), ("c", single(0.1), 100 * S)) == [0.12, "late", 0.1, 0.1]
    assert judge.rounded == 2  # 0.125, and a float32 given as if it were a float64
    assert put(judge, ("d", single(0.1), 100 * S), single=True) == [0.1]
    assert judge.rounded == 2


def test_decimals_zero_and_eight() -> None:
    assert put(reference(decimals=0), ("a", 2.5, 0), ("a", 3.5, 0)) == [2.0, 3.0]  # 2 and 4: (2 + 4) / 2
    assert put(reference(decimals=8), ("a", Decimal("0.00000001"), 0), ("a", 21 * 10**6, 0)) == [1e-8, 10500000.000000005]


# -------------------------------------------------------------------------------------------------- digest (S11)


def test_siphash_2_4_gives_the_vectors_of_its_authors() -> None:
    # Published with the paper's reference code: key 00 01 .. 0f, messages of the first n bytes 00 01 02 ...
    key0, key1 = struct.unpack("<QQ", bytes(range(16)))
    vectors = {0: 0x726FDB47DD0E0E31, 1: 0x74F839C593DC67FD, 8: 0x93F5F5799A932462, 15: 0xA129CA6149BE45E5, 63: 0x958A324CEB064572}
    for length, wanted in vectors.items():
        assert siphash(bytes(range(length)), key0, key1, compressions=2, finalizations=4) == wanted


def test_siphash_1_3_gives_the_hashes_of_cpython() -> None:
    # hash(bytes) % 2**64 of CPython 3.11, whose sys.hash_info.algorithm is siphash13, under PYTHONHASHSEED=0: both key words are 0.
    vectors = {
        b"a": 0x407448D2B89B1813,
        b"riskring": 0x0CAF98650B69C9C5,
        bytes(range(15)): 0xF30EB725BB91C9EA,
        bytes(range(24)): 0x31185A47AF932F3A,
    }
    for message, wanted in vectors.items():
        assert siphash(message, 0, 0) == wanted


def test_digest_known_answers() -> None:
    def lane(index: int, user: bytes, is_integer: bool, *entries: bytes) -> int:
        user_hash = siphash(user, 0x7269736B72696E67, index + 2 * is_integer)
        return sum(siphash(entry, user_hash, index) for entry in entries) % 2**64

    empty = reference()
    text = f"riskring-1 60000000000 60000000000 both 4 none 0 0 {0:016x} {0:016x}"
    assert empty.digest() == blake2b(text.encode(), digest_size=16).hexdigest() == "a27b1e1d40002d69564c2dc656357864"

    # "é" is c3 a9 in UTF-8; its transactions are 5.0 at 3 ns, then -0.0001 at 7 ns; the clock is 7.
    judge = reference()
    put(judge, ("é", Decimal("-0.0001"), 7), ("é", 5, 3))
    zero, one = bytes(8), b"\x01" + bytes(7)
    first = zero + b"\x03" + bytes(7) + (50000).to_bytes(8, "little")
    second = one + b"\x07" + bytes(7) + b"\xff" * 8
    lanes = [lane(index, b"\xc3\xa9", False, first, second) for index in (0, 1)]
    text = f"riskring-1 60000000000 60000000000 both 4 7 1 2 {lanes[0]:016x} {lanes[1]:016x}"
    assert judge.digest() == blake2b(text.encode(), digest_size=16).hexdigest() == "a258d41e65d54712445623eda43f71dc"

    # Integer -1 is eight bytes ff, under keys of its own.
    judge = reference("1s", lateness="2s", closed="right", decimals=0)
    put(judge, (-1, 5, 3))
    entry = zero + b"\x03" + bytes(7) + b"\x05" + bytes(7)
    lanes = [lane(index, b"\xff" * 8, True, entry) for index in (0, 1)]
    text = f"riskring-1 1000000000 2000000000 right 0 3 1 1 {lanes[0]:016x} {lanes[1]:016x}"
    assert judge.digest() == blake2b(text.encode(), digest_size=16).hexdigest() == "05ed934d2ad8bfc0d79119e125302a52"


def test_digest_ignores_arrival_order_across_users_and_totals_but_not_ties_of_one_user() -> None:
    rows = [("a", 1, 10), ("a", 2, 10), ("b", 3, 5), ("c", 4, 12)]
    other = [("b", 3, 5), ("c", 4, 12), ("a", 1, 10), ("a", 2, 10), ("a", None, 10), (None, 1, 1)]
    swapped = [("a", 2, 10), ("a", 1, 10), ("b", 3, 5), ("c", 4, 12)]
    judges = [reference(), reference(users=3), reference()]
    for judge, its_rows in zip(judges, (rows, other, swapped), strict=True):
        put(judge, *its_rows)
    assert judges[0].digest() == judges[1].digest()
    assert judges[0].digest() != judges[2].digest()


def test_digest_is_of_retained_transactions_and_reads_do_not_change_it() -> None:
    judge, fresh = reference("10s", lateness="0s"), reference("10s", lateness="0s")
    put(judge, ("a", 1, 0), ("b", 1, 0), ("b", 2, 5 * S), ("c", 3, 10 * S + 1))
    put(fresh, ("b", 2, 5 * S), ("c", 3, 10 * S + 1))
    before = judge.digest()
    assert before == fresh.digest()
    assert (judge.score("a"), judge.score("b", 100 * S), judge.users()) == (0.0, 0.0, ["b", "c"])
    assert judge.digest() == before


def test_digest_tells_states_apart() -> None:
    digests = {
        reference(**options).digest() for options in ({}, {"decimals": 2}, {"lateness": "1s"}, {"closed": "right"}, {"window": "61s"})
    }
    for rows in (
        [("a", 1, 0)],
        [("a", 1, 1)],
        [("a", 2, 0)],
        [("b", 1, 0)],
        [(b"a", 1, 0), (b"b", 1, 0)],
        [(0x3736353433323130, 1, 0)],
        [("01234567", 1, 0)],
    ):
        judge = reference()
        put(judge, *rows)
        digests.add(judge.digest())
    assert len(digests) == 5 + 7


# -------------------------------------------------------------- the reference code the product was asked for


class Deques:
    """What users of rolling scores have today: a deque per user and running float totals."""

    def __init__(self) -> None:
        self.transactions: defaultdict[str, deque[tuple[float, float]]] = defaultdict(deque)
        self.amount_sum: defaultdict[str, float] = defaultdict(float)
        self.txn_count: defaultdict[str, int] = defaultdict(int)

    def add_transaction(self, user: str, amount: float, timestamp: float) -> None:
        dq = self.transactions[user]
        dq.append((timestamp, amount))
        self.amount_sum[user] += amount
        self.txn_count[user] += 1
        while dq and timestamp - dq[0][0] > 60:
            _, old_amount = dq.popleft()
            self.amount_sum[user] -= old_amount
            self.txn_count[user] -= 1

    def get_risk_score(self, user: str) -> float:
        if self.txn_count[user] == 0:
            return 0.0
        return self.amount_sum[user] / self.txn_count[user]


def test_reference_code_agrees_where_it_is_right() -> None:
    """Rows in order, whole amounts, and the score asked for at the user's own last row: equal, window edge included."""
    draw, judge, deques, seconds = random.Random(60), reference(decimals=0), Deques(), 0
    for _ in range(20_000):
        seconds += draw.choice((0, 0, 0, 1, 2, 30, 59, 60, 61))
        user, amount = draw.choice("abcd"), draw.randrange(-1000, 1000)
        deques.add_transaction(user, amount, seconds)
        assert put(judge, (user, amount, seconds * S)) == [deques.get_risk_score(user)]


def test_reference_code_forgets_that_time_passes() -> None:
    judge, deques = reference(), Deques()
    for user, amount, seconds in (("alice", 100, 0), ("bob", 1, 3600)):
        deques.add_transaction(user, amount, seconds)
        put(judge, (user, amount, seconds * S))
    assert deques.get_risk_score("alice") == 100.0  # an hour later: no row of hers came to push the old one out
    assert judge.score("alice") == 0.0
    assert judge.score("alice", 3600 * S) == 0.0


def test_reference_code_is_wrong_after_a_row_out_of_order() -> None:
    judge, deques = reference(), Deques()
    for amount, seconds in ((10, 50), (50, 0), (30, 70)):
        deques.add_transaction("alice", amount, seconds)
        put(judge, ("alice", amount, seconds * S))
    # At 70 s the row of 0 s is 70 s old, but it hides in the deque behind that of 50 s.
    assert deques.get_risk_score("alice") == 30.0  # (10 + 50 + 30) / 3
    assert judge.score("alice") == 20.0  # (10 + 30) / 2


def test_reference_code_scores_a_late_row_with_rows_that_come_after_it() -> None:
    judge, deques = reference(), Deques()
    deques.add_transaction("alice", 10, 50)
    put(judge, ("alice", 10, 50 * S))
    deques.add_transaction("alice", 20, 40)
    assert deques.get_risk_score("alice") == 15.0
    assert put(judge, ("alice", 20, 40 * S)) == [20.0]  # at 40 s the row of 50 s has not happened


def test_reference_code_drifts() -> None:
    judge, deques = reference(), Deques()
    rows = [(1e9, 0), (0.1, 30), (0.1, 61)]
    for amount, seconds in rows:
        deques.add_transaction("alice", amount, seconds)
        put(judge, ("alice", amount, seconds * S))
    # 1e9 + 0.1 + 0.1 - 1e9: the digits that 1e9 pushed out of the running float sum never come back.
    assert deques.get_risk_score("alice") != 0.1
    assert judge.score("alice") == 0.1
    assert judge.ingest([("alice", 0.3, 61 * S)]) == [Row(None, 0.5 / 3)]


# ------------------------------------------------------------------------------------- verify: engine against it


CSV = """user_id,amount,timestamp
007,1.50,1970-01-01T00:00:01
7,0.12345,1970-01-01 00:00:01.000000001Z
007,2.5e0,1970-01-01T02:00:02+02:00
é,nan,1970-01-01
é,x,1970-01-01
,1,1970-01-01
é,1e999999999,1970-01-01
é,1e-400,1969-12-31T23:59:59
é,-12345678901234567890.0e-19,1970-01-01T00:00
é,+.5, 1970-01-01T00:00:03
é,1,0000-02-29
é,1,9999-12-31T23:59:59
é,1,1900-02-29
é,1,1970-01-01T24:00
é,1,yesterday
é,0.00000000000000000000000000000000000000000001,1970-01-01t00:00:03z
"""


def test_verify_of_a_csv_file(tmp_path: Path) -> None:
    path = tmp_path / "payments.csv"
    path.write_text(CSV)
    assert verify(str(path), Config.of(shards=2)) == Verification(16, 3, True, None)


def test_text_is_read_exactly(tmp_path: Path) -> None:
    texts = {
        "1.50": Decimal("1.50"),
        "2.5e0": Decimal("2.5"),
        "1e999999999": 10**400,
        "1e-400": 5e-324,
        "0e-400": 0.0,
        "12345678901234567890e-1": Decimal("1234567890123456789.0"),
        "123456789012345678901234567e-9": 123456789012345678.901234567,  # 27 digits and an exponent: the float64
        "x": None,
        "1_0": None,
        "": None,
    }
    for text, wanted in texts.items():
        assert reference_module._amount_of_text(text) == wanted
    assert reference_module._amount_of_text("-INF") == float("-inf")
    times = {
        "1970-01-01": 0,
        "1970-01-01T00:00:00.5-01:30": 5400 * S + S // 2,
        "1969-12-31 23:59:59.999999999Z": -1,
        "0000-01-01": -719_528 * 86_400 * S,  # days from 0000-01-01 to 1970-01-01 in the proleptic Gregorian calendar
        "9999-12-31": 2_932_896 * 86_400 * S,
        "2000-02-29T23": (11_016 * 24 + 23) * 3600 * S,
        "1900-02-29": None,
        "1970-01-01T24:00": None,
        "1970-01-01T00:00+24:00": None,
        "1970-01-01T00:00:00.": None,
        "5": None,
    }
    for text, wanted_ns in times.items():
        assert reference_module._time_ns_of_text(text, None) == wanted_ns, text
    assert reference_module._time_ns_of_text("-5", 1000) == -5000
    assert reference_module._time_ns_of_text("1970-01-02", 1000) == 86_400 * S


def test_plain_rows_of_every_type_of_time() -> None:
    day = 86_400 * S
    columns = [
        (pa.array([1, None], pa.timestamp("ms", "UTC")), [10**6, None]),
        (pa.array([1, None], pa.date32()), [day, None]),
        (pa.array([day // 10**6, None], pa.date64()), [day, None]),
        (pa.array([1, None], pa.uint32()), [10**9, None]),
        (pa.nulls(2), [None, None]),
    ]
    for column, wanted in columns:
        batch = pa.record_batch({"user_id": pa.array(["a", "b"]), "amount": pa.array([Decimal("1.5"), None]), "timestamp": column})
        assert [row[2] for row in plain_rows(batch, Config.of(time_unit="s"))] == wanted
        assert verify(batch, Config.of(time_unit="s")).equal


def test_verify_reports_progress_and_raises_when_both_are_full(tmp_path: Path) -> None:
    table = pa.table({"user_id": [1, 2, 3], "amount": [1, 2, 3], "timestamp": pa.array([0, 0, 0], pa.timestamp("s"))})
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    seen: list[int] = []
    assert verify([tmp_path / "a.parquet", tmp_path / "a.parquet"], Config.of(), progress=seen.append).rows == 6
    assert seen == [3, 6]
    with pytest.raises(CapacityError):
        verify(table, Config.of(users=2, shards=1))


def test_verify_takes_the_wall_clock_it_is_given() -> None:
    table = pa.table({"user_id": [1], "amount": [1], "timestamp": pa.array([11 * S], pa.timestamp("ns"))})
    assert verify(table, Config.of(), wall_ns=0) == Verification(1, 0, True, None)  # in the future for both
    assert verify(table, Config.of(), wall_ns=S) == Verification(1, 1, True, None)
    assert verify(table, Config.of()) == Verification(1, 1, True, None)


def test_verify_finds_each_kind_of_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checker is shown to fail: one side is bent, and the text names the row, what was found and what was wanted."""
    rows = {"user_id": ["a", "b", "a"], "amount": [1.0, 0.00001, 4.0], "timestamp": [0, 10, 60]}
    config = Config.of(time_unit="s", shards=1)

    def difference(bent: type, name: str, replacement: Any) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(bent, name, replacement)
            found = verify(rows, config)
        assert not found.equal
        return str(found.difference)

    ingest, right = Reference.ingest, reference("60s", closed="right")

    def bent_rows(judge: Reference, *args: Any, **options: Any) -> list[Row]:
        judge.config = right.config
        return ingest(judge, *args, **options)

    def full(*_: Any, **__: Any) -> None:
        raise CapacityError("full")

    assert difference(Reference, "ingest", bent_rows) == "batch 0, row 2 ('a', 4.0, 60000000000): found score 2.5, wanted score 4.0"
    late = [Row(None, 1.0), Row("late", None), Row(None, 2.5)]
    row_1 = "batch 0, row 1 ('b', 1e-05, 10000000000): found score 0.0, wanted reason late"
    assert difference(Reference, "ingest", lambda *_, **__: late) == row_1
    assert difference(Reference, "ingest", full) == "batch 0, found no error, wanted CapacityError"
    assert difference(RiskEngine, "ingest", full) == "batch 0, found CapacityError, wanted no error"
    assert difference(RiskEngine, "digest", lambda _: "0" * 32).startswith("digest: found 00000000000000000000000000000000, wanted ")
    unrounded = [Row(None, 1.0), Row(None, 0.0), Row(None, 2.5)]
    assert difference(Reference, "ingest", lambda *_, **__: unrounded) == "batch 0, total of rows accepted: found 3, wanted 0"
    assert difference(Reference, "users", lambda _: ["a", "b", "c"]) == "users with a retained transaction: found 2, wanted 3"
    nobody = Features(0, 0, 0.0, None, None, None)
    assert difference(Reference, "features", lambda *_: nobody).startswith("features at the clock: found ('a', Features(count=2, ")
