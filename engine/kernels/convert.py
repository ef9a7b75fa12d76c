"""Float amounts to whole units: rounding to the grid, half to even, by the exact binary value of the float.

A float that is the nearest one to a grid value is told by one division, which vector instructions do for eight rows at once; for
all others the product with the scale is taken without error as the sum of two floats (Dekker 1971; Muller et al., Handbook of
Floating-Point Arithmetic, section 4.4). Nothing here may be contracted to fused multiply-adds, and Numba does not.
"""

import numpy as np

from engine.kernels.compile import I64, U8, column, f64, i64, inline, kernel

#: Below this, a float that is the nearest one to a grid value cannot be nearer to another: see `round_amounts`.
SURE_UNITS = 2.0**51

#: Veltkamp's constant for 53 bits, 2**27 + 1.
SPLITTER = 134217729.0

#: What `faults` says.
NOT_FINITE = 1
OUT_OF_RANGE = 2


@inline
def exact_units(value, scale, product):
    """Half-even rounding of value * scale, of which `product` is the nearest float; |product| is at most 2**53.

    `rint(product)` is off by at most one unit, and whether it is is seen from the product's error against what is left to the next half.
    Those comparisons are exact: the distance from `product` to the next half is exact wherever the error can reach it. A scale has at
    most 27 bits, so only the value is split (Veltkamp), and both partial products are exact.
    """
    big = value * SPLITTER
    high = big - (big - value)
    error = (high * scale - product) + (value - high) * scale
    near = np.rint(product)
    above = 0.5 - (product - near)
    below = -0.5 - (product - near)
    units = np.int64(near)
    odd = (units & 1) == 1
    if error > above or (error == above and odd):
        return units + 1
    if error < below or (error == below and odd):
        return units - 1
    return units


@kernel(i64, column(f64), f64, i64, I64, U8, U8)
def round_amounts(
    values,  # (n,)  float64  in   amounts; anything, also at nulls
    scale,  # ()    float64  in   units in 1.0: 10**decimals, at most 10**8
    most,  # ()    int64    in   greatest magnitude in units, from 2**51 to 2**53
    units,  # (n,)  int64    out  0 where there is a fault
    rounded,  # (n,)  uint8    out  1 where the value is not the float nearest to its units and there is no fault; zeros before
    faults,  # (n,)  uint8    out  0, NOT_FINITE or OUT_OF_RANGE
):
    """Round amounts to the grid and return the number of faults.

    A float that is the nearest one to r / scale lies within |r| * 2**-53 units of r. Below 2**51 that is less than a
    quarter of a unit: r is then its exact rounding, and nothing was changed. Sequential; no invariants.
    """
    off_grid = 0
    for row in range(len(values)):  # no branches, so that it becomes vector instructions
        value = values[row]
        near = np.rint(value * scale)
        sure = (near / scale == value) & (abs(near) < SURE_UNITS)
        units[row] = np.int64(near if sure else 0.0)
        faults[row] = not sure
        off_grid += not sure
    if off_grid == 0:
        return 0
    fault_count = 0
    for row in range(len(values)):
        if faults[row] == 0:
            continue
        value = values[row]
        product = value * scale
        found = exact_units(value, scale, product) if abs(product) <= most else most + 1
        if abs(found) <= most:
            units[row] = found
            rounded[row] = found / scale != value
            faults[row] = 0
        else:
            faults[row] = OUT_OF_RANGE if abs(value) < np.inf else NOT_FINITE
            fault_count += 1
    return fault_count
