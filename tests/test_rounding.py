"""`engine.rounding`: a number becomes the grid value that exact arithmetic says, and 'rounded' says whether it was one."""

from __future__ import annotations

import decimal
import math
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.kernels import NOT_FINITE, OUT_OF_RANGE, round_amounts
from tests.rows import (
    INTEGERS,
    amounts_of,
    expected_amount,
    times_of,
)


def nearest(exact: Fraction, dtype) -> float:
    """The float of a width nearest to a fraction, ties to even, by trying the neighbours."""
    with np.errstate(all="ignore"):
        start = dtype(float(exact))
        tries = [start, np.nextafter(start, dtype(-math.inf)), np.nextafter(start, dtype(math.inf))]
    bits = {np.float16: np.uint16, np.float32: np.uint32, np.float64: np.uint64}[dtype]
    tries = [value for value in tries if np.isfinite(value)]
    return float(min(tries, key=lambda value: (abs(Fraction(float(value)) - exact), int(value.view(bits)) & 1)))


def expected_float(value, decimals: int, dtype=np.float64):
    if not math.isfinite(value):
        return 0, "amount_not_finite", 0
    units, reason = expected_amount(Fraction(float(value)), decimals)
    if reason:
        return 0, reason, 0
    return units, None, int(nearest(Fraction(units, 10**decimals), dtype) != float(value))


def expected_decimal(value: decimal.Decimal, decimals: int):
    units, reason = expected_amount(Fraction(value), decimals)
    rounded = int(reason is None and Fraction(units, 10**decimals) != Fraction(value))
    with decimal.localcontext(prec=200):
        quantized = value.quantize(decimal.Decimal(1).scaleb(-decimals), rounding=decimal.ROUND_HALF_EVEN)
        assert reason or int(quantized.scaleb(decimals)) == units
    return units, reason, rounded


# --------------------------------------------------------------------------------------------------
# Amounts: floats

FLOATS = [
    *(0.0, -0.0, 0.1, 0.12345, 0.00005, 0.00015, 0.00025, -0.00005, 0.5, 1.5, 2.5, 1e-300, 5e-324, -5e-324, 1e300, 1.7976931348623157e308),
    *(math.nan, math.inf, -math.inf, 2.0**53, 2.0**53 + 2, -(2.0**53), 2.0**52 + 0.5, 2.0**51 + 0.25, 2.0**53 / 10**4, 900719925474.0992),
    *(
        9007199254740993.0,
        9007199254740994.0,
        90071992.54740992,
        90071992.54740993,
        1e11 + 0.00005,
        0.49999999999999994,
        4503599627370497.5,
    ),
]


def with_neighbours(values):
    return [near for value in values for near in (math.nextafter(value, -math.inf), value, math.nextafter(value, math.inf))]


@pytest.mark.parametrize("decimals", range(9))
def test_float64_known(decimals):
    values = with_neighbours(FLOATS)
    assert amounts_of(pa.array(values, pa.float64()), decimals) == [expected_float(value, decimals) for value in values]


@st.composite
def float_amounts(draw):
    """Floats where rounding is decided: next to grid values and to halves between them, at every size."""
    decimals = draw(st.integers(0, 8))
    grid = st.integers(-(2**54), 2**54)
    small = st.integers(-(10**6), 10**6)
    halves = st.builds(lambda units: float(Fraction(2 * units + 1, 2 * 10**decimals)), grid | small)
    whole = st.builds(lambda units: units / 10**decimals, grid | small)
    edge = st.builds(lambda step: (2**53 + step / 4) / 10**decimals, st.integers(-8, 8))
    value = st.floats() | halves | whole | edge
    near = st.builds(lambda base, step: math.nextafter(base, math.copysign(math.inf, step)) if step else base, value, st.integers(-1, 1))
    return decimals, draw(st.lists(near, min_size=1, max_size=50))


@given(float_amounts())
@settings(max_examples=300, deadline=None)
def test_float64_is_rounded_by_its_exact_value(case):
    decimals, values = case
    assert amounts_of(pa.array(values, pa.float64()), decimals) == [expected_float(value, decimals) for value in values]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@given(float_amounts())
@settings(max_examples=150, deadline=None)
def test_narrow_floats_are_rounded_by_their_exact_value(dtype, case):
    decimals, values = case
    with np.errstate(all="ignore"):
        narrow = np.array(values).astype(dtype)
    found = amounts_of(pa.array(narrow), decimals)
    assert found == [expected_float(value, decimals, dtype) for value in narrow]


def test_every_finite_float16():
    values = np.arange(2**16, dtype=np.uint16).view(np.float16)
    values = values[np.isfinite(values)][::7]
    for decimals in (0, 4, 8):
        assert amounts_of(pa.array(values), decimals) == [expected_float(value, decimals, np.float16) for value in values]


@pytest.mark.parametrize("decimals", range(9))
def test_float32_next_to_half_way_points(decimals):
    # Grid values as close as they come to the middle between two float32: where rounding twice could go wrong.
    generator = np.random.default_rng(decimals)
    middles = (generator.integers(2**23, 2**24, 3000) * 2 + 1).astype(np.float64) * 2.0 ** generator.integers(-30, 29, 3000)
    units = np.rint(middles * 10.0**decimals)
    near = (units[np.abs(units) <= 2.0**53] / 10**decimals).astype(np.float32)
    values = np.concatenate([near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))])
    assert amounts_of(pa.array(values), decimals) == [expected_float(value, decimals, np.float32) for value in values]


@pytest.mark.parametrize("decimals", range(9))
def test_float64_where_spacing_and_sureness_change(decimals):
    """Around 2**51 units, where the quick test ends, up to 2**53, where floats are whole units; the smallest floats; both zeros."""
    edges = [(power + step / 8) / 10**decimals for power in (2.0**50, 2.0**51, 2.0**52, 2.0**53) for step in range(-12, 13)]
    tiny = [count * 5e-324 for count in (1, 2, 3, 2**52 - 1, 2**52, 2**52 + 1)]
    halves = [(units + 0.5) / 10**decimals for units in (0, 1, 2, 3, 2**20, 2**20 + 1)]
    values = with_neighbours([*edges, *tiny, *halves, 0.0])
    values += [-value for value in values]
    assert amounts_of(pa.array(values, pa.float64()), decimals) == [expected_float(value, decimals) for value in values]


def test_float64_kernel_says_how_many_faults():
    values = np.array([1.0, math.nan, 0.12345, math.inf, 1e300, -math.inf, -2.5, -0.0])
    values.flags.writeable = False
    units, rounded, faults = np.full(8, 7), np.zeros(8, np.uint8), np.full(8, 9, np.uint8)
    with np.errstate(all="ignore"):
        assert round_amounts(values, 10.0**4, 2**53, units, rounded, faults) == 4
    assert units.tolist() == [10000, 0, 1235, 0, 0, 0, -25000, 0]
    assert rounded.tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    assert faults.tolist() == [0, NOT_FINITE, 0, NOT_FINITE, OUT_OF_RANGE, NOT_FINITE, 0, 0]
    assert round_amounts(values[:0], 10.0**4, 2**53, units, rounded, faults) == 0
    limits = np.array([2.0**52, 2.0**52 + 1, -(2.0**52), -(2.0**52) - 1])
    assert round_amounts(limits, 1.0, 2**52, units, rounded, faults) == 2
    assert units.tolist()[:4] == [2**52, 0, -(2**52), 0]
    assert faults.tolist()[:4] == [0, OUT_OF_RANGE, 0, OUT_OF_RANGE]


def test_rows_on_the_grid_and_off_it_do_not_influence_each_other():
    generator = np.random.default_rng(2)
    values = np.round(generator.lognormal(3, 2, 20000), 2)
    off = generator.random(20000) < 0.01
    values[off] = generator.lognormal(3, 12, off.sum())
    values[::997] = np.nan
    assert amounts_of(pa.array(values)) == [expected_float(value, 4) for value in values.tolist()]


def test_no_numpy_warnings(recwarn):
    array = pa.array(with_neighbours(FLOATS), pa.float64())
    amounts_of(array)
    with np.errstate(all="ignore"):
        narrow = np.array(FLOATS).astype(np.float32)
    amounts_of(pa.array(narrow))
    times_of(pa.array([2**63 - 1, -(2**63)], pa.timestamp("s")))
    assert not recwarn.list


# --------------------------------------------------------------------------------------------------
# Amounts: integers and decimals


@pytest.mark.parametrize("kind", INTEGERS, ids=str)
@pytest.mark.parametrize("decimals", [0, 4, 8])
def test_integer_amounts(kind, decimals):
    limits = np.iinfo(kind.to_pandas_dtype())
    limit = 2**53 // 10**decimals
    tries = {0, 1, 7, -1, limit, limit + 1, -limit, -limit - 1, int(limits.min), int(limits.max)}
    values = sorted(value for value in tries if limits.min <= value <= limits.max)
    expected = [(*expected_amount(Fraction(value), decimals), 0) for value in values]
    assert amounts_of(pa.array(values, kind), decimals) == expected
    assert [amounts_of(pa.array([value], kind), decimals)[0] for value in values] == expected


def decimal_kinds():
    kinds = [(pa.decimal128, 38), (pa.decimal256, 76)]
    if hasattr(pa, "decimal32"):
        kinds += [(pa.decimal32, 9), (pa.decimal64, 18)]
    return kinds


def decimal_array(digits, kind):
    """Unscaled integers as a decimal array; `pyarrow.array` refuses negative scales."""
    size = kind.bit_width // 8
    data = b"".join(value.to_bytes(size, "little", signed=True) for value in digits)
    return pa.Array.from_buffers(kind, len(digits), [None, pa.py_buffer(data)])


@st.composite
def decimal_amounts(draw):
    decimals = draw(st.integers(0, 8))
    make, most = draw(st.sampled_from(decimal_kinds()))
    precision = draw(st.integers(1, most))
    scale = draw(st.integers(-4, precision))
    top = 10**precision - 1
    any_digits = st.integers(-top, top) | st.integers(-1000, 1000)
    # Next to the halves between two units, where there are any.
    step = 10 ** max(scale - decimals, 0)
    halves = st.builds(lambda units, off: (2 * units + 1) * step // 2 + off, st.integers(-(2**54), 2**54), st.integers(-1, 1))
    edge = st.builds(lambda off: (2**53) * step + step // 2 + off, st.integers(-1, 1))
    digits = draw(st.lists(any_digits | halves | edge, max_size=20))
    return decimals, make(precision, scale), [value for value in digits if abs(value) <= top]


@given(decimal_amounts())
@example((4, pa.decimal128(38, 38), [10**38 - 1, -(10**38) + 1, 5 * 10**33, 15 * 10**33, 5 * 10**33 + 1]))
@example((0, pa.decimal256(76, 0), [2**53, 2**53 + 1, -(2**53), 10**76 - 1, 2**64, 2**63, -(2**63), -(2**63) - 1]))
@example((0, pa.decimal128(38, 19), [5 * 10**18, 5 * 10**18 + 1, -5 * 10**18 - 1, 15 * 10**18, 25 * 10**18, -(2**63)]))
@settings(max_examples=300, deadline=None)
def test_decimals_are_rounded_half_even_by_their_digits(case):
    decimals, kind, digits = case
    with decimal.localcontext(prec=200):
        values = [decimal.Decimal(value).scaleb(-kind.scale) for value in digits]
        expected = [expected_decimal(value, decimals) for value in values]
    assert amounts_of(decimal_array(digits, kind), decimals) == expected
    assert amounts_of(decimal_array([7, *digits, 7], kind)[1:-1], decimals) == expected


def test_negative_scale():
    array = decimal_array([120, 9_007_199_254_740, 9_007_199_254_741, 0], pa.decimal128(13, -3))
    assert amounts_of(array, 0) == [(120000, None, 0), (9_007_199_254_740_000, None, 0), (0, "amount_out_of_range", 0), (0, None, 0)]
    assert amounts_of(array, 4) == [(1_200_000_000, None, 0), *[(0, "amount_out_of_range", 0)] * 2, (0, None, 0)]
    array = decimal_array([1, 0, -1], pa.decimal128(3, -30))
    assert amounts_of(array) == [(0, "amount_out_of_range", 0), (0, None, 0), (0, "amount_out_of_range", 0)]
